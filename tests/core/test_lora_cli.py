"""LoRAs in the pipeline, in `pixart generate --lora` and in `pixart convert --lora`."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import pixart_core as pc
from pixart_core.cli import app
from pixart_core.starter import find_starter

STARTER = find_starter()
PROMPT = "a large red circle on a blue background"
NAME = "base_model.model.transformer_blocks.{}.attn1.to_{}.lora_{}.weight"


@pytest.fixture
def style(tmp_path):
    """A PEFT folder with a random LoRA for the starter: rank 4, alpha 8."""
    generator = torch.Generator().manual_seed(0)
    width = pc.open_transformer(STARTER.transformer)[1].hidden_size
    folder = tmp_path / "style"
    folder.mkdir()
    save_file({NAME.format(i, part, ab): torch.randn(shape, generator=generator) * 0.1
               for i in range(3) for part in "qkv"
               for ab, shape in (("A", (4, width)), ("B", (width, 4)))},
              folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return folder


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def draw(out, *args, code=0):
    text = run("generate", PROMPT, "-o", out, "--steps", 2, "--device", "cpu", *args, code=code)
    return np.asarray(Image.open(out), np.int16) if code == 0 else text


def test_pipeline_equals_generate(style, tmp_path):
    """FILE:STRENGTH, twice, is `loras=[...]`; strength 0 is the picture without."""
    pipe = pc.Pipeline.from_files(STARTER.transformer, STARTER.t5_file, STARTER.vae, device="cpu",
                                  loras=[(style, 0.5), (style, 0.25)])
    expected = np.asarray(pipe.generate(PROMPT, steps=2, guidance=STARTER.guidance), np.int16)
    out = tmp_path / "a.png"
    assert (draw(out, "--lora", f"{style}:0.5", "--lora", f"{style}:0.25") == expected).all()
    plain = draw(out)
    assert np.abs(expected - plain).max() > 8
    assert (draw(out, "--lora", f"{style}:0") == plain).all()


def test_like_draws_it_again(style, tmp_path):
    """The strength is remembered, the file is not; a changed config is another LoRA."""
    first = draw(tmp_path / "a.png", "--lora", f"{style}:0.5")
    again = draw(tmp_path / "b.png", "--like", tmp_path / "a.png", "--lora", style)
    assert (again == first).all()
    text = draw(tmp_path / "c.png", "--like", tmp_path / "a.png", code=1)
    assert "style" in text and "--lora" in text
    (style / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 2}')
    text = draw(tmp_path / "c.png", "--like", tmp_path / "a.png", "--lora", style, code=1)
    assert "is not the lora_1" in text
    draw(tmp_path / "c.png", "--like", tmp_path / "a.png", "--lora", style, "--ignore-hashes")


def test_the_config_beside_a_file_is_remembered(style, tmp_path):
    """Its alpha is part of the picture."""
    file = style / "adapter_model.safetensors"
    draw(tmp_path / "a.png", "--lora", file)
    (style / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 2}')
    text = draw(tmp_path / "b.png", "--like", tmp_path / "a.png", "--lora", file, code=1)
    assert "lora_1_config" in text and "adapter_config.json" in text


@pytest.fixture
def bare(style, tmp_path):
    """The LoRA's file without its config: nothing says alpha any more."""
    (tmp_path / "bare").mkdir()
    return shutil.copy(style / "adapter_model.safetensors", tmp_path / "bare" / "style.safetensors")


def test_a_lost_alpha_can_be_given(style, bare, tmp_path):
    """FILE:STRENGTH:ALPHA draws what the whole folder draws; the note names the ways to give it."""
    expected = draw(tmp_path / "a.png", "--lora", f"{style}:0.5")
    given = draw(tmp_path / "b.png", "--lora", f"{bare}:0.5:8")
    assert (given == expected).all()
    assert (draw(tmp_path / "c.png", "--like", tmp_path / "b.png", "--lora", bare) == given).all()
    text = run("generate", PROMPT, "-o", tmp_path / "d.png", "--steps", 2, "--lora", f"{bare}:0.5")
    assert "FILE:STRENGTH:A" in text.replace("\n", "") and "--alpha" in text


def test_convert_writes_a_given_alpha(bare, tmp_path):
    file = tmp_path / "lora.safetensors"
    assert "--alpha" in run("convert", "--lora", bare, file)
    assert "does not say" not in run("convert", "--lora", bare, file, "--alpha", 8)
    name = "transformer.transformer_blocks.0.attn1.to_q"
    assert load_file(file)[f"{name}.alpha"] == 8
    assert "--alpha" in run("convert", "--lora", bare, file, "--alpha", 0, code=2)
    assert "--lora" in run("convert", STARTER.transformer, file, "--alpha", 8, code=2)


@pytest.mark.parametrize(("option", "words"), [
    ("missing.safetensors", "missing.safetensors does not exist"),
    ("missing.safetensors:0.5", "missing.safetensors does not exist"),
    ("missing.safetensors:0.5:8", "missing.safetensors does not exist"),
    (str(STARTER.transformer), "is no LoRA"),
])
def test_wrong_lora_options(tmp_path, option, words):
    assert words in draw(tmp_path / "a.png", "--lora", option, code=1)


def test_a_strength_must_be_finite(style, tmp_path):
    for numbers in ("nan", "1:inf"):
        assert "finite" in draw(tmp_path / "a.png", "--lora", f"{style}:{numbers}", code=2)


def test_convert_writes_alpha(style, tmp_path):
    """Names and tensors that ComfyUI's own loader knows, at the strength it was trained for."""
    file = tmp_path / "lora.safetensors"
    assert "for ComfyUI's LoRA loaders" in run("convert", "--lora", style, file)
    tensors = load_file(file)
    name = "transformer.transformer_blocks.0.attn1.to_q"
    assert {k for k in tensors if k.startswith(name)} == {
        f"{name}.lora_up.weight", f"{name}.lora_down.weight", f"{name}.alpha"}
    assert tensors[f"{name}.alpha"] == 8
    run("convert", "--lora", style, file, "--dtype", "float16")
    tensors = load_file(file)
    assert tensors[f"{name}.lora_up.weight"].dtype == torch.float16
    assert tensors[f"{name}.alpha"].dtype == torch.float32


def test_convert_dora_takes_the_norms_of_the_base(peft_adapter, tmp_path):
    adapter = peft_adapter("dora")
    base, file = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    save_file(adapter.weights, base)
    text = run("convert", "--lora", adapter.folder, file, code=1)
    assert "--base" in text and not file.exists()
    run("convert", "--lora", adapter.folder, file, "--base", base, "--set", "num_heads=4",
        "--set", "variant=sigma")
    model = pc.load_transformer(adapter.weights, num_heads=4, variant="sigma")
    pc.apply_lora(model, file)
    with torch.no_grad():
        out = model(**adapter.inputs)
    assert (out - adapter.out).norm() / adapter.out.norm() < 1e-5


@pytest.mark.parametrize("options", [["--ema"], ["--to", "native"], ["--set", "num_heads=4"]])
def test_options_that_are_not_for_loras(style, tmp_path, options):
    run("convert", "--lora", style, tmp_path / "lora.safetensors", *options, code=2)


def test_a_folder_is_no_target(style, tmp_path):
    assert "one file" in run("convert", "--lora", style, tmp_path / "folder", code=2)
