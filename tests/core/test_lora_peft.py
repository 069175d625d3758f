"""Merged LoRAs against peft itself: every kind that it trains on a diffusers PixArt."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import pixart_core as pc
from pixart_core.checkpoint import CheckpointError, write_checkpoint
from pixart_core.checkpoint.lora import read_lora
from pixart_core.checkpoint.lora_apply import apply_lora, apply_loras
from pixart_core.checkpoint.lora_export import host_tensors, write_host_lora

KINDS = ["alpha", "patterns", "rslora", "dora", "biases", "whole", "loha", "loha_kernel", "lokr",
         "lokr_full", "lokr_both"]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def network(weights):
    return pc.load_transformer(weights, num_heads=4, variant="sigma")


@torch.no_grad()
def output(model, adapter):
    return model(**adapter.inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_peft(peft_adapter, kind):
    """bar: 1e-5 relative; the adapter itself moves the output by percents."""
    adapter = peft_adapter(kind)
    lora = read_lora(adapter.folder)
    assert not lora.unused and not lora.notes
    merged = output(apply_lora(network(adapter.weights), lora), adapter)
    assert relative(adapter.out, adapter.plain) > 0.02
    assert relative(merged, adapter.out) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_for_comfyui_reads_back_as_the_same(peft_adapter, tmp_path, kind):
    """What `convert --lora` writes means the same to us: alpha, DoRA's norms, fused biases."""
    adapter = peft_adapter(kind)
    file = tmp_path / "converted.safetensors"
    write_host_lora(file, host_tensors(read_lora(adapter.folder), adapter.weights))
    merged = output(apply_lora(network(adapter.weights), file), adapter)
    assert relative(merged, adapter.out) < 1e-5


@pytest.mark.parametrize("kind", ["dora", "whole"])
def test_what_comfyui_cannot_follow_needs_the_base(peft_adapter, kind):
    with pytest.raises(CheckpointError, match="--base"):
        host_tensors(read_lora(peft_adapter(kind).folder))


def test_strength_is_linear_in_the_weights(peft_adapter):
    """Half and half make a whole, minus one takes it back; also with DoRA, as in ComfyUI."""
    adapter = peft_adapter("dora")
    lora = read_lora(adapter.folder)
    whole, half = (apply_lora(adapter.weights, lora, s) for s in (1.0, 0.5))
    for name, weight in adapter.weights.items():
        torch.testing.assert_close(half[name] - weight, (whole[name] - weight) / 2,
                                   rtol=1e-4, atol=1e-6)
    plain = peft_adapter("alpha")
    lora = read_lora(plain.folder)
    back = apply_loras(plain.weights, [(lora, 0.7), (lora, -0.7)])
    for name, weight in plain.weights.items():
        torch.testing.assert_close(back[name], weight, rtol=1e-5, atol=1e-6)


def test_a_state_dict_is_not_changed_and_keeps_its_dtype(peft_adapter):
    """In float16, sums are taken in float32 and rounded once."""
    adapter = peft_adapter("alpha")
    half = {name: tensor.half() for name, tensor in adapter.weights.items()}
    before = {name: tensor.clone() for name, tensor in half.items()}
    merged = apply_loras(half, [(adapter.folder, 0.5), (adapter.folder, 0.5)])
    exact = apply_lora({name: tensor.float() for name, tensor in half.items()}, adapter.folder)
    for name, tensor in merged.items():
        assert torch.equal(half[name], before[name])
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor, exact[name].half(), rtol=1e-3, atol=1e-6)


def copied(adapter, folder, name="some_style.safetensors", config=None):
    """The adapter's tensors as one file among others, with its config beside it or not."""
    weights = load_file(adapter.folder / "adapter_model.safetensors")
    save_file(weights, folder / name)
    if config:
        content = (adapter.folder / "adapter_config.json").read_text()
        (folder / config).write_text(content)
    return folder / name


@pytest.mark.parametrize("config", ["some_style.json", "some_style.config.json",
                                    "some_style_config.json"])
def test_alpha_from_a_config_of_the_files_name(peft_adapter, tmp_path, config):
    """Other LoRAs in the folder do not matter."""
    adapter = peft_adapter("alpha")
    (tmp_path / "other.safetensors").write_bytes(b"")
    lora = read_lora(copied(adapter, tmp_path, config=config))
    assert {layer.scale for layer in lora.layers} == {7 / 4} and not lora.notes


def test_alpha_from_the_config_of_a_lone_file(peft_adapter, tmp_path):
    """An adapter_config.json counts for the only weight file, not for one of many."""
    adapter = peft_adapter("alpha")
    file = copied(adapter, tmp_path, config="adapter_config.json")
    assert {layer.scale for layer in read_lora(file).layers} == {7 / 4}
    copied(adapter, tmp_path, name="second.safetensors")
    lora = read_lora(file)
    assert {layer.scale for layer in lora.layers} == {1.0}
    assert "adapter_config.json" in lora.notes[0]


def test_alpha_of_the_caller_counts_most(peft_adapter, tmp_path):
    adapter = peft_adapter("alpha")
    assert {la.scale for la in read_lora(adapter.folder, alpha=8).layers} == {2.0}
    lora = read_lora(copied(adapter, tmp_path), alpha=8)
    assert {layer.scale for layer in lora.layers} == {2.0} and not lora.notes
    rslora = read_lora(peft_adapter("rslora").folder, alpha=8)
    assert {layer.scale for layer in rslora.layers} == {4.0}


def test_alpha_in_the_header_as_diffusers_writes_it(peft_adapter, tmp_path):
    adapter = peft_adapter("patterns")
    fields = json.loads((adapter.folder / "adapter_config.json").read_text())
    header = {f"transformer.{name}": value for name, value in fields.items()}
    weights = load_file(adapter.folder / "adapter_model.safetensors")
    renamed = {name.replace("base_model.model.", "transformer."): tensor
               for name, tensor in weights.items()}
    file = tmp_path / "lora.safetensors"
    write_checkpoint(file, renamed, {"lora_adapter_metadata": json.dumps(header)})
    merged = output(apply_lora(network(adapter.weights), file), adapter)
    assert relative(merged, adapter.out) < 1e-5


def test_a_bin_folder(peft_adapter, tmp_path):
    adapter = peft_adapter("alpha")
    weights = load_file(adapter.folder / "adapter_model.safetensors")
    torch.save(weights, tmp_path / "adapter_model.bin")
    config = (adapter.folder / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    merged = output(apply_lora(network(adapter.weights), tmp_path), adapter)
    assert relative(merged, adapter.out) < 1e-5


@pytest.mark.parametrize(("change", "words"), [
    ({"peft_type": "OFT"}, "peft_type OFT is not supported"),
    ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
    ({"r": 9}, "belongs to another LoRA"),
    ({"r": 0}, "r is 0"),
    ({"lora_alpha": "7"}, "lora_alpha is '7'"),
    ({"alpha_pattern": {"(": 3}}, "not a regular expression"),
    ({"alpha_pattern": 3}, "a JSON object was expected"),
    ({"use_qalora": True}, "use_qalora is set"),
])
def test_configs_that_cannot_be_followed(peft_adapter, tmp_path, change, words):
    adapter = peft_adapter("alpha")
    fields = json.loads((adapter.folder / "adapter_config.json").read_text())
    file = copied(adapter, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | change))
    with pytest.raises(CheckpointError, match=words):
        read_lora(file)
