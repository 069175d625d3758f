"""What `pixart inspect` says of a LoRA: layers, ranks, strength and its source, what is unused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pixart_core.commands.describe import describe

NAME = "base_model.model.transformer_blocks.{}.attn1.to_{}"


def pair(module, rank=4, out=48):
    return {f"{module}.lora_A.weight": torch.ones(rank, 48),
            f"{module}.lora_B.weight": torch.ones(out, rank)}


def rows_of(path):
    """Value and source of each row; of several of one name, a list."""
    out = {}
    for row in describe(path, {}):
        out.setdefault(row.name, []).append(row[1:])
    return {name: found[0] if len(found) == 1 else found for name, found in out.items()}


def test_a_peft_folder(tmp_path):
    """Layers by kind, ranks, and the scale that adapter_config.json gives, with rsLoRA."""
    tensors = {**pair(NAME.format(0, "q")), **pair(NAME.format(0, "k")),
               **pair(NAME.format(1, "q"), rank=16), "base_model.model.proj_out.weight":
               torch.ones(32, 48)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True,
         "rank_pattern": {"transformer_blocks.1.attn1.to_q": 16}}))
    rows = rows_of(tmp_path)
    assert rows["layers"] == ("4: 3 LoRA, 1 replaced value", "tensor names")
    assert rows["rank"][0] == "4 (2 layers), 16 (1 layers)"
    assert rows["scale"] == ("2 to 4 (3 layers)", "adapter_config.json")
    assert rows["rsLoRA"][0] == "yes" and rows["DoRA"][0] == "no"
    assert "note" not in rows and "not used" not in rows and "LoRA loader" in rows["use"][0]


def test_a_file_of_many_kinds(tmp_path):
    """Each source of alpha has its row; names that are not used are there, and the notes."""
    module = "lycoris_transformer_blocks_0_attn1_to_"
    tensors = {f"{module}q.lora_down.weight": torch.ones(2, 48),
               f"{module}q.lora_up.weight": torch.ones(48, 2),
               f"{module}q.alpha": torch.tensor(1.0), f"{module}q.dora_scale": torch.ones(48, 1),
               f"{module}k.lokr_w1": torch.ones(4, 4), f"{module}k.lokr_w2": torch.ones(12, 12),
               **pair(NAME.format(0, "v")), "lycoris_proj_out.mystery": torch.ones(2)}
    save_file(tensors, tmp_path / "style.safetensors")
    rows = rows_of(tmp_path / "style.safetensors")
    assert rows["layers"][0] == "3: 2 LoRA, 1 LoKr"
    assert sorted(rows["scale"]) == [
        ("0.5 (1 layers)", "alpha in the file"), ("1 (1 layers)", "assumed: nothing says alpha"),
        ("1 (1 layers)", "no rank, so no alpha")]
    assert rows["DoRA"][0] == "1 layers" and rows["rsLoRA"][0] == "no"
    assert rows["not used"][0] == "1 tensors: lycoris_proj_out.mystery"
    assert ["does not say its alpha" in rows["note"][0][0], "mystery" in rows["note"][1][0]] == [
        True, True]


@pytest.mark.parametrize(("names", "row", "words"), [
    (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "cannot be used", "Flux"),
    (["lycoris_proj_out.oft_blocks"], "use", "not supported; LoRA, LoHa, LoKr and DoRA are"),
])
def test_loras_that_cannot_be_used(tmp_path, names, row, words):
    """Said, and no advice to load them."""
    save_file(dict.fromkeys(names, torch.ones(2, 2)), tmp_path / "a.safetensors")
    rows = rows_of(tmp_path / "a.safetensors")
    assert words in rows[row][0] and "LoRA loader" not in str(rows)
