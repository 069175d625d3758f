"""`pixart convert` and `inspect` for ControlNets and the HED network."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import pixart_core as pc
from pixart_core.checkpoint.controlnet import split_controlnet
from pixart_core.cli import app
from pixart_core.commands.describe import describe
from pixart_core.config import METADATA_KEY

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def official():
    """The tensors of an original ControlNet file, base included."""
    tensors = load_file(GOLDEN / "control_1024.safetensors")
    return {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}


@pytest.fixture
def folder(tmp_path, monkeypatch, official):
    """A folder with the original ControlNet and the base it was made from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    torch.save({"state_dict": official}, "control.pth")
    base = {k.removeprefix("base_model."): v for k, v in official.items()
            if k.startswith("base_model.")}
    save_file(base, "base.safetensors", {METADATA_KEY: json.dumps(
        {"num_heads": 2, "variant": "alpha"})})
    base["blocks.1.mlp.fc1.bias"] = base["blocks.1.mlp.fc1.bias"] + 0.25
    save_file(base, "tuned.safetensors", {METADATA_KEY: json.dumps({"num_heads": 2})})
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def converted(*options, out="out.safetensors"):
    done = run("convert", "control.pth", out, "--set", "num_heads=2", *options)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_control_alone_is_kept(folder, official):
    """Bit for bit, without the base, with its config in the header."""
    said = converted()
    assert "left out the base model" in said
    written = load_file("out.safetensors")
    control = {k: v for k, v in official.items() if not k.startswith("base_model.")}
    assert written.keys() == control.keys()
    assert all(torch.equal(written[k], control[k]) for k in control)
    with safe_open("out.safetensors", "pt") as file:
        config = json.loads(file.metadata()[METADATA_KEY])
    assert (config["num_heads"], config["depth"], config["variant"]) == (2, 3, "alpha")
    assert pc.load_controlnet("out.safetensors").config.num_heads == 2


def test_the_base_inside_is_compared(folder):
    assert "is equal in all" in converted("--base", "base.safetensors")
    said = converted("--base", "tuned.safetensors")
    assert "differs in 1 of" in said
    assert "0.25 in blocks.1.mlp.fc1.bias" in said


def test_half_precision_is_compared_as_such(folder, official):
    """A base saved in float16 is the same base."""
    half = {k.removeprefix("base_model."): v.half() for k, v in official.items()
            if k.startswith("base_model.")}
    save_file(half, "half.safetensors", {METADATA_KEY: json.dumps({"num_heads": 2})})
    assert "is equal in all" in converted("--base", "half.safetensors")


def test_diffusers_folder(folder, official):
    """What diffusers' adapter reads, and back again without loss."""
    converted(out="adapter")
    assert json.loads(Path("adapter/config.json").read_text())["num_layers"] == 3
    done = run("convert", "adapter", "back.safetensors")
    assert done.exit_code == 0, done.output
    control, back = split_controlnet(official).control, load_file("back.safetensors")
    assert back.keys() == control.keys()
    assert all(torch.equal(back[k], control[k]) for k in control)


def test_diffusers_names_in_one_file_and_another_dtype(folder):
    converted("--to", "diffusers", "--dtype", "float16")
    written = load_file("out.safetensors")
    assert "controlnet_blocks.0.transformer_block.attn1.to_q.weight" in written
    assert {t.dtype for t in written.values()} == {torch.float16}


@pytest.mark.parametrize(("arguments", "message"), [
    (("control.pth", "out.safetensors"), "num_heads"),
    (("base.safetensors", "out.safetensors", "--base", "base.safetensors"), "for ControlNets"),
    (("control.pth", "out.safetensors", "--set", "num_heads=2", "--ema"), "--ema is for"),
    (("control.pth", "out.safetensors", "--set", "num_heads=2", "--base", "control.pth"),
     "ControlNet"),
])
def test_what_is_refused(folder, arguments, message):
    done = run("convert", *arguments)
    assert done.exit_code != 0
    assert message in " ".join(done.output.split())
    assert not Path("out.safetensors").exists()


def test_nan_is_refused(folder, official):
    broken = dict(official)
    broken["controlnet.1.after_proj.bias"] = torch.full((48,), torch.nan)
    torch.save({"state_dict": broken}, "broken.pth")
    done = run("convert", "broken.pth", "out.safetensors", "--set", "num_heads=2")
    assert done.exit_code == 1
    assert "NaN" in done.output
    assert not Path("out.safetensors").exists()


def test_inspect_says_what_a_controlnet_is(folder):
    before = {row.name: row for row in describe(Path("control.pth"), {})}
    assert before["kind"].value == "a PixArt ControlNet"
    assert before["carries its base model"].value == "yes"
    assert "--set num_heads" in before["not known"].value
    converted()
    after = {row.name: row.value for row in describe(Path("out.safetensors"), {})}
    expected = {"copied blocks": "3", "num_heads": "2", "variant": "alpha", "hidden_size": "48",
                "image_size": "1024", "carries its base model": "no", "layout": "native"}
    assert {name: after[name] for name in expected} == expected
    assert run("inspect", "out.safetensors").exit_code == 0


def test_hed_to_safetensors(folder):
    torch.manual_seed(0)
    weights = pc.HEDDetector((4, 4, 4, 4, 4)).state_dict()
    torch.save(weights, "hed.pth")
    done = run("convert", "hed.pth", "hed.safetensors")
    assert done.exit_code == 0, done.output
    written = load_file("hed.safetensors")
    assert all(torch.equal(written[k], weights[k]) for k in weights)
    assert run("convert", "hed.pth", "folder").exit_code == 2
