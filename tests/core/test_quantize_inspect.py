"""pixart inspect on quantised files: formats, bits, ranks, and what runs them here."""

from types import SimpleNamespace

import pytest
import torch
from quant_layers import quantized
from quantize_models import make_control, make_model, run, words

from pixart_core.commands.describe_quantized import describe_quantized
from pixart_core.quant import kitchen
from pixart_core.quant.kitchen import Backend
from pixart_core.quant.policy import METHODS

__all__ = ["run"]  # a fixture


def rows(**stored):
    return {row.name: row.value for row in describe_quantized(stored)}


def weight(name, rank=16, rows=128):
    generator = torch.Generator().manual_seed(0)
    return quantized(name, torch.randn(rows, 128, generator=generator), rank=rank)


def test_a_whole_file(run, tmp_path):
    model = make_model(tmp_path / "model.safetensors", depth=2)
    run("quantize", model, "q.safetensors", "--method", "int8")
    shown = words(run("inspect", "q.safetensors"))
    assert "int8_tensorwise in 14 layers" in shown and "bits per weight" in shown
    assert "eager (plain PyTorch on the CPU)" in shown or torch.cuda.is_available()


def test_a_controlnet(run, tmp_path):
    control = make_control(tmp_path / "control.safetensors",
                           make_model(tmp_path / "model.safetensors", depth=2))
    run("quantize", control, "q.safetensors", "--method", "int4")
    shown = words(run("inspect", "q.safetensors"))
    assert "a PixArt ControlNet" in shown and "awq_w4a16 in 6 layers" in shown


def test_bits_count_scales_and_branch():
    """Four bits and what goes beside them: a scale of 8 bits for every 16, or branch and more."""
    assert rows(a=weight("nvfp4"))["quantised"] == "nvfp4 in 1 layer, 4.5 bits per weight"
    value = rows(a=weight("svdquant"), b=weight("svdquant"))["quantised"]
    assert value.startswith("svdquant_w4a4 in 2 layers")
    assert float(value.split()[4]) > 8


def test_ranks():
    found = rows(a=weight("svdquant", 16), b=weight("svdquant", 32), c=weight("svdquant", 16))
    assert found["rank"] == "16 and 32"
    assert "rank" not in rows(a=weight("int8"))


def test_several_formats_have_rows_of_their_own():
    found = describe_quantized({"a": weight("int8"), "b": weight("fp8")})
    assert [r.value.split()[0] for r in found if r.name == "quantised"] == ["int8_tensorwise",
                                                                           "float8_e4m3fn"]


def test_gguf_has_none():
    from pixart_core.quant.packed import PackedTensor

    packed = PackedTensor(torch.zeros(4, 34, dtype=torch.uint8), "Q8_0", torch.Size((4, 32)))
    assert describe_quantized({"a": packed}) == []


@pytest.mark.parametrize(("name", "expected"), [
    ("fp8", "compute capability 8.9"), ("mxfp8", "10.0"), ("nvfp4", "10.0"),
    ("int8", "eager"), ("svdquant", "eager"), ("int4", "eager")])
def test_what_runs_it_on_the_cpu(name, expected):
    assert expected in weight(name).format.runner("cpu")


def test_what_runs_it_on_a_card(monkeypatch):
    """The back end and why no faster one, as comfy-kitchen tells it."""
    from pixart_core.quant import kitchen_format

    monkeypatch.setattr(kitchen_format, "backend_for",
                        lambda *_: Backend("triton", "cuda: needs a newer driver"))
    assert weight("svdquant").format.runner("cuda") == "triton (cuda: needs a newer driver)"


def test_layers_that_ask_for_full_precision():
    form = METHODS["int8"].format.quantize(torch.randn(64, 64),
                                           {"full_precision_matrix_mult": True}).format
    assert "unpacked" in form.runner("cpu")


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "nvfp4", "int4"])
def test_what_runs_it_in_float32(name):
    """Kernels of 16 bits do not run where a model computes in float32, as ComfyUI's T5 does."""
    assert "float32" in weight(name).format.runner("cpu", torch.float32)


def test_back_ends_that_do_not_take_the_dtype(monkeypatch):
    """Also without the order of back ends, which comfy-kitchen does not promise to tell."""
    halves = SimpleNamespace(dtypes=frozenset({torch.bfloat16, torch.float16}))
    limits = SimpleNamespace(min_compute_capability=None, params={"x": halves})
    there = {"available": True, "disabled": False, "capabilities": ["product"]}
    library = SimpleNamespace(list_backends=lambda: {"cuda": there, "triton": there},
                              registry=SimpleNamespace(get_constraints=lambda *_: limits))
    monkeypatch.setattr(kitchen, "require_kitchen", lambda *_: library)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    assert str(kitchen.backend_for("some", ["product"], "cuda", torch.bfloat16)) == "cuda"
    slow = kitchen.backend_for("some", ["product"], "cuda", torch.float32)
    assert slow.name == "eager" and "cuda: takes no float32" in slow.why
