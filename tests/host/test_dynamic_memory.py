"""Loading while the host manages memory dynamically: its layers are empty until they get weights.

The host turns it on with a graphics card only, so this looks into a Python of its own, where it is
turned on by hand (dynamic_memory.py).
"""

import json
import os
import subprocess

import pytest
import torch
from checks import STARTER, parted, starter_file
from safetensors.torch import save_file

import pixart_core as pc
from pixart_core.config import METADATA_KEY

DAMAGED = "blocks.1.mlp.fc1.weight"


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
    run = subprocess.run(
        [installation.python, repository / "tests" / "host" / "dynamic_memory.py", repository,
         installation.path, STARTER.lcm, damaged, STARTER.t5_file, control],
        env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")},
        capture_output=True, text=True, timeout=240, cwd=damaged.parent)
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
