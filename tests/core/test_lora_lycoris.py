"""LyCORIS files: algorithms that are no LoRA, alpha without a rank, scalar."""

import pytest
import torch

from pixart_core.checkpoint import CheckpointError
from pixart_core.checkpoint.lora import read_lora

MODULE = "lycoris_transformer_blocks_0_attn1_to_q"


def other(*leaves, module=MODULE):
    return {f"{module}.{leaf}": torch.ones(2, 2) for leaf in (*leaves, "alpha")}


GLORA = [f"{part}.weight" for part in ("a1", "a2", "b1", "b2")]
LORA = {f"{MODULE}.lora_down.weight": torch.ones(2, 48), f"{MODULE}.lora_up.weight":
        torch.ones(48, 2)}
OTHER_ADAPTERS = {
    "oft": other("oft_blocks", "rescale"), "diag_oft": other("oft_diag"),
    "peft_oft": other("oft_R.default.weight", module="base_model.model.proj_out"),
    "peft_boft": other("boft_R", "boft_s", module="base_model.model.proj_out"),
    "glora": other(*GLORA), "dotted_glora": other(*GLORA, module="transformer.proj_out"),
}


@pytest.mark.parametrize("case", OTHER_ADAPTERS)
def test_adapters_that_are_no_lora(case):
    """Named, without the advice to load them with a LoRA loader, which refuses them here."""
    with pytest.raises(CheckpointError) as error:
        read_lora(OTHER_ADAPTERS[case])
    assert ("GLoRA" if "glora" in case else "an OFT or BOFT") in str(error.value)
    assert "not supported; LoRA, LoHa, LoKr and DoRA are" in str(error.value)
    assert "holds a LoRA" not in str(error.value) and "LoRA loader" not in str(error.value)


def test_other_adapters_beside_a_lora_are_listed():
    more = other("oft_blocks", *GLORA, module="transformer.proj_out")
    lora = read_lora({**LORA, **more})
    assert len(lora.layers) == 1 and set(lora.unused) == more.keys()


def test_alpha_for_layers_without_a_rank():
    """Said, where nobody tells a rank: a given alpha would be ignored without a word."""
    free = {f"lycoris_transformer_blocks_1_attn1_to_{p}.lokr_w{n}": torch.ones(n, n)
            for p in "qk" for n in (1, 2)}
    assert not read_lora({**LORA, **free}).notes
    lora = read_lora({**LORA, **free}, alpha=4)
    assert [layer.scale for layer in lora.layers] == [2.0, 1.0, 1.0]
    assert "alpha does not apply to 2 of its 3 layers" in lora.notes[0]
    told = read_lora(free, alpha=4, config={"peft_type": "LOKR", "r": 8, "alpha": 1})
    assert {layer.scale for layer in told.layers} == {0.5} and not told.notes
