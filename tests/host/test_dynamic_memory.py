"""Loading while the host manages memory dynamically: its layers are empty until they get weights.

The host turns it on with a graphics card only, so this looks into a Python of its own, where it is
turned on by hand (dynamic_memory.py).
"""

import importlib.util
import json
import os
import subprocess

import pytest
import torch
from checks import STARTER, parted, starter_file
from launch import has_package
from lora_checks import random_lora
from safetensors.torch import save_file

import pixart_core as pc
from pixart_core.checkpoint.gguf_write import write_gguf
from pixart_core.config import METADATA_KEY
from pixart_core.text.t5_file import read_t5
from pixart_core.text.t5_gguf import write_t5_gguf

DAMAGED = "blocks.1.mlp.fc1.weight"


def write_loras(folder, weights):
    """Files of every way in which our loader patches: {what it is: path}."""
    generator = torch.Generator().manual_seed(0)
    lora = random_lora(weights, ["blocks.0.attn.qkv", "blocks.3.mlp.fc1"])
    peft = {}
    for name, rows in (("attn1.to_q", 192), ("ff.net.0.proj", 768)):
        key = f"base_model.model.transformer_blocks.1.{name}"
        peft[f"{key}.lora_A.weight"] = torch.randn(4, 192, generator=generator) * 0.1
        peft[f"{key}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    dora = {f"{name.removesuffix('.lora_B.weight')}.lora_magnitude_vector":
            torch.rand(len(tensor), generator=generator) + 0.5
            for name, tensor in peft.items() if name.endswith("lora_B.weight")} | peft
    values = dict(peft)
    for name, shape in (("proj_out.modules_to_save.weight", (32, 192)),
                        ("transformer_blocks.2.attn1.to_k.weight", (192, 192)),
                        ("transformer_blocks.2.scale_shift_table", (6, 192))):
        values[f"base_model.model.{name}"] = torch.randn(shape, generator=generator) * 0.1
    found = {"lora": lora, "dora": dora, "replaced values": values}
    for name, tensors in found.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in found}


@pytest.fixture(scope="module")
def found(installation, repository, tmp_path_factory):
    """What dynamic_memory.py found."""
    management = installation.path / "comfy" / "memory_management.py"
    if not management.is_file() or "aimdo_enabled" not in management.read_text():
        pytest.skip("this ComfyUI has no dynamic memory management")
    weights, metadata = starter_file()
    weights = parted(weights)
    weights[DAMAGED][0, 0] = torch.nan
    damaged = tmp_path_factory.mktemp("dynamic") / "damaged.safetensors"
    save_file(weights, damaged, metadata=metadata)
    control = damaged.with_name("control.safetensors")
    net = pc.PixArtControlNet.from_base(pc.load_transformer(STARTER.lcm), depth=2)
    with torch.no_grad():
        for projection in (net.controlnet[0].before_proj, net.controlnet[1].after_proj):
            projection.weight.normal_(std=0.1)
    pc.write_checkpoint(control, net.state_dict(), {METADATA_KEY: net.config.to_json()})
    packed = {}
    if importlib.util.find_spec("gguf") and has_package(installation.python, "gguf"):
        packed = {"model": str(damaged.with_name("model.gguf")),
                  "t5": str(damaged.with_name("t5.gguf"))}
        write_gguf(packed["model"], *pc.open_transformer(STARTER.lcm), "Q4_0")
        write_t5_gguf(packed["t5"], read_t5(STARTER.t5_file), "Q8_0")
    run = subprocess.run(
        [installation.python, repository / "tests" / "host" / "dynamic_memory.py", repository,
         installation.path, STARTER.lcm, damaged, STARTER.t5_file, control,
         json.dumps(write_loras(damaged.parent, weights)), json.dumps(packed)],
        env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")},
        capture_output=True, text=True, timeout=400, cwd=damaged.parent)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(params=["layers", "patcher"])
def lane(request, found):
    return found[request.param]


def test_every_weight_is_that_of_the_file(lane):
    """No layer stays empty or zero, for MODEL, CLIP and CONTROL_NET."""
    assert lane["model_weights"] == [] and lane["clip_weights"] == []
    assert lane["control_weights"] == []


def test_output_equals_that_of_the_plain_path(lane):
    assert lane["same_output"] and lane["same_states"] and lane["same_steered"]


def test_loras_and_packed_weights_as_on_the_plain_path(lane):
    """LoRA, DoRA, values trained as a whole (a scale-shift table among them), GGUF, GGUF T5."""
    assert {"bare", "lora", "dora", "replaced values", "bare again"} <= lane["patched"].keys()
    assert set(lane["patched"].values()) == {0.0}, lane["patched"]


def test_these_loras_change_something(found):
    assert all(effect > 0.01 for effects in found["effects"].values() for effect in effects)


def test_damaged_weights_are_refused(lane):
    assert DAMAGED in lane["damaged"] and "NaN" in lane["damaged"]


def test_a_clone_without_it(found):
    """What hook and compile nodes of the host ask for: loaded once more, by the same file."""
    assert found["patcher"]["is_dynamic"] == [True, True]
    assert found["patcher"]["clones"] == [False, False]
    assert found["patcher"]["clone_states"]


def test_position_tables_leave_with_the_model(lane):
    """They are made in the first forward pass and dropped when the host unloads the MODEL."""
    assert lane["tables"] == [1, 0]
