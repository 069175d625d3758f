"""What stands in the way of pixart quantize, and of the files it writes: one clear error each."""

import json
import os

import comfy_kitchen
import pytest
import torch
from quantize_models import make_captions, make_control, make_model, run, words
from safetensors import safe_open
from safetensors.torch import save_file

import pixart_core as pc
from pixart_core.starter import find_starter

STARTER = find_starter()
SVDQUANT = ("--method", "svdquant")

__all__ = ["run"]  # a fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a ControlNet, captions, and the model in int8 and int4."""
    path = tmp_path_factory.mktemp("models")
    model = make_model(path / "model.safetensors", depth=2, distilled=None)
    make_control(path / "control.safetensors", model)
    make_captions(path / "captions.safetensors")
    make_captions(path / "narrow.safetensors", width=12)
    from typer.testing import CliRunner

    from pixart_core.cli import app
    for method in ("int8", "int4"):
        assert CliRunner().invoke(app, ["quantize", str(model), str(path / f"{method}.safetensors"),
                                        "--method", method]).exit_code == 0
    return path


def fails(done, *expected, code=1):
    """One error of a few lines with every word; nothing of a traceback."""
    said = words(done)
    assert done.exit_code == code, done.output
    assert all(word in said for word in expected), said
    assert "Traceback" not in said and said.count("error:") <= 1


@pytest.mark.parametrize(("flags", "expected"), [
    ((), "use one of svdquant, int8"), (("--method", "gptq"), "use one of svdquant"),
    (("--method", "int8", "--dtype", "float32"), "--dtype"),
    (("--method", "int8", "--rank", "16"), "--rank given: int8"),
    (("--method", "int8", "--embeddings", "x", "--no-gptq"), "--embeddings, --gptq given"),
    (("--method", "int8", "--from", "nunchaku"), "deepcompressor"),
    (("--method", "int8", "--from", "deepcompressor"), "leave out --method"),
    ((*SVDQUANT, "--rank", "20"), "multiples of 16"), ((*SVDQUANT, "--rows", "0"), "--rows is 0"),
    ((*SVDQUANT, "--device", "tpu"), "--device"),
    ((*SVDQUANT, "--calibration-dtype", "int8"), "--calibration-dtype")])
def test_usage(run, folder, tmp_path, flags, expected):
    fails(run("quantize", folder / "model.safetensors", "q.safetensors", *flags), expected, code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["q.gguf", "q", "q.pth"])
def test_other_suffixes(run, folder, name):
    fails(run("quantize", folder / "model.safetensors", name, "--method", "int8"),
          ".safetensors files only", code=2)


@pytest.mark.parametrize(("target", "flags", "expected"), [
    ("there.safetensors", (), "exists already"), ("no/q.safetensors", (), "does not exist"),
    ("q.safetensors", ("--report", "no/r.json"), "does not exist"),
    ("q.safetensors", ("--report", "."), "is a folder")])
def test_what_cannot_be_written_is_said_before_anything_is_read(run, tmp_path, target, flags,
                                                                expected):
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    fails(run("quantize", "broken.safetensors", target, "--method", "int8", *flags), expected)
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"


def test_a_folder_that_cannot_be_written_to(run, folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda _, mode, **__: mode != os.W_OK)
    fails(run("quantize", folder / "model.safetensors", "q.safetensors", "--method", "int8"),
          "cannot be written to")


def test_an_input_that_is_not_there(run):
    fails(run("quantize", "no.safetensors", "q.safetensors", "--method", "int8"), "does not exist")


@pytest.mark.parametrize("method", ["int8", "svdquant"])
def test_quantised_already(run, folder, method):
    fails(run("quantize", folder / "int4.safetensors", "q.safetensors", "--method", method),
          "quantised already (awq_w4a16)", "from the original")


def test_float8_weights_are_quantised_already(run, folder, tmp_path):
    weights, config = pc.open_transformer(folder / "model.safetensors")
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in weights.items()},
              tmp_path / "fp8.safetensors", metadata={"pixart_config": config.to_json()})
    fails(run("quantize", "fp8.safetensors", "q.safetensors", "--method", "int8"),
          "quantised already (float8_e4m3fn)")


def test_another_kind_of_model(run):
    fails(run("quantize", STARTER.vae, "q.safetensors", "--method", "int8"),
          "VAE", "cannot be quantised")


@pytest.mark.parametrize("part", ["blocks.1.mlp.fc1.weight", "blocks.0.attn.qkv.bias"])
def test_numbers_that_are_not_finite(run, folder, tmp_path, part):
    weights, config = pc.open_transformer(folder / "model.safetensors")
    weights[part] = weights[part].clone().fill_(torch.inf)
    save_file(weights, tmp_path / "bad.safetensors",
              metadata={"pixart_config": config.to_json()})
    fails(run("quantize", "bad.safetensors", "q.safetensors", "--method", "int8"), part)
    assert not (tmp_path / "q.safetensors").exists()


def test_numbers_too_large_for_float16(run, folder, tmp_path):
    weights, config = pc.open_transformer(folder / "model.safetensors")
    weights = {n: t.float() for n, t in weights.items()}
    weights["blocks.0.mlp.fc1.bias"][0] = 1e6
    save_file(weights, tmp_path / "big.safetensors", metadata={"pixart_config": config.to_json()})
    fails(run("quantize", "big.safetensors", "q.safetensors", "--method", "int8", "--dtype",
              "float16"), "too large for float16", "--dtype bfloat16")


@pytest.mark.parametrize(("flags", "expected", "code"), [
    ((), ("--t5 FILE", "--embeddings FILE"), 1),
    (("--prompts", "PROMPTS"), ("--t5 FILE",), 1),
    (("--t5", "no.safetensors"), ("no.safetensors does not exist",), 1),
    (("--embeddings", "CAPTIONS"), ("guidance 4.5", "negative"), 1),
    (("--embeddings", "NARROW", "--guidance", "1"), ("12 wide", "reads 16"), 1),
    (("--embeddings", "MODEL", "--guidance", "1"), ("holds no encoded prompt",), 1),
    (("--embeddings", "CAPTIONS", "--t5", "T5"), ("leave one out",), 2),
    (("--t5", "T5", "--negative-embeddings", "CAPTIONS"), ("belong to --embeddings",), 2),
    (("--t5", "T5", "--prompts", "EMPTY"), ("holds no prompt",), 1),
    (("--t5", "T5", "--count", "0"), ("--count is 0",), 2),
    (("--t5", "T5", "--size", "33"), ("multiple of 8",), 1),
    (("--t5", "T5", "--base", "MODEL"), ("is a transformer",), 2)])
def test_calibration(run, folder, tmp_path, flags, expected, code):
    """Nothing that captions need is guessed, and no work folder is left."""
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "prompts.txt").write_text("a\n")
    names = {"CAPTIONS": folder / "captions.safetensors", "T5": STARTER.t5_file,
             "NARROW": folder / "narrow.safetensors", "MODEL": folder / "model.safetensors",
             "EMPTY": "empty.txt", "PROMPTS": "prompts.txt"}
    done = run("quantize", folder / "model.safetensors", "q.safetensors", *SVDQUANT,
               *(names.get(flag, flag) for flag in flags))
    fails(done, *expected, code=code)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "prompts.txt"]


def test_a_controlnet_needs_what_it_steers(run, folder):
    fails(run("quantize", folder / "control.safetensors", "q.safetensors", *SVDQUANT),
          "is a ControlNet", "--base, --control-images, --vae")


def test_a_controlnet_of_another_width(run, folder, tmp_path):
    """Said before anything is drawn."""
    base = make_model(tmp_path / "base.safetensors", hidden_size=128, num_heads=4)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    fails(run("quantize", folder / "control.safetensors", "q.safetensors", *SVDQUANT, "--base",
              base, "--vae", STARTER.vae, "--control-images", "images", "--embeddings",
              folder / "captions.safetensors"), "64 wide with 2 heads", "128 wide with 4")


def test_t5_options(run):
    fails(run("quantize", STARTER.t5_file, "q.safetensors", "--method", "int8", "--rank", 16,
              "--report", "r.json"), "--rank, --report: for PixArt models", code=2)


def changed(path, target, change):
    """A copy of a file whose tensors `change` has changed."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, target, metadata=metadata)
    return target


def says(tensors, layer, text):
    tensors[f"{layer}.comfy_quant"] = torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(("change", "expected"), [
    (lambda t: t.pop("blocks.0.attn.qkv.weight_scale"), "lacks blocks.0.attn.qkv.weight_scale"),
    (lambda t: says(t, "blocks.0.attn.qkv", json.dumps({"format": "awq_w4a16", "group_size": 48})),
     "group_size 48"),
    (lambda t: says(t, "blocks.0.attn.qkv", json.dumps({"format": "int3"})), "'int3'"),
    (lambda t: says(t, "blocks.0.attn.qkv", '{"format": "awq_w4'), "does not say how"),
    (lambda t: t.update({"blocks.0.attn.qkv.weight_zero": torch.zeros(1, 5)}), "weight_zero")])
def test_a_damaged_file(run, folder, tmp_path, change, expected):
    """Protects the loaders from files that were cut or changed; `pixart inspect` says the same."""
    path = changed(folder / "int4.safetensors", tmp_path / "bad.safetensors", change)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv") as error:
        pc.load_transformer(path)
    assert expected in str(error.value)
    fails(run("inspect", path), expected)


def test_a_comfy_kitchen_that_is_too_old(run, folder, monkeypatch):
    """It is said when the file is used, with the way to a newer one; inspect still describes it."""
    monkeypatch.delattr(comfy_kitchen, "int8_linear", raising=False)
    monkeypatch.delattr(comfy_kitchen, "quantize_int8_rowwise")
    model = pc.load_transformer(folder / "int8.safetensors", dtype=torch.float32)
    with torch.no_grad(), pytest.raises(ImportError, match="pip install -U comfy-kitchen"):
        model(torch.zeros(1, 4, 4, 4), torch.tensor([5.0]), torch.zeros(1, 2, 16))
    assert "pip install -U comfy-kitchen" in model.blocks[0].mlp.fc1.format.runner("cpu")
    assert run("inspect", folder / "int8.safetensors").exit_code == 0
    fails(run("quantize", folder / "model.safetensors", "q.safetensors", "--method", "int8"),
          "pip install -U comfy-kitchen")
