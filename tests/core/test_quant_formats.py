"""Every quantised format: its error, its way through a file, and files that are wrong."""

import json

import pytest
import torch
import torch.nn.functional as F
from quant_layers import FORMATS, quantized, weight_and_bias

from pixart_core.quant import StoredWeight, file_tensors, four_bit, split_stored
from pixart_core.quant import kitchen as kitchen_module
from pixart_core.quant.kitchen_format import FULL_PRECISION, require_kernels
from pixart_core.quant.linear import PackedLinear
from pixart_core.quant.policy import METHODS
from pixart_core.quant.svdquant_format import GELU_SHIFT, NATURAL, TILED, SVDQuant

BOUNDS = {"int8": 0.01, "fp8": 0.03, "mxfp8": 0.03, "nvfp4": 0.12, "int4": 0.1, "svdquant": 0.12}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def said(**text):
    return torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)


@pytest.fixture(params=FORMATS)
def name(request):
    return request.param


def test_the_weight_is_close_and_survives_a_file(name):
    weight, _ = weight_and_bias()
    stored = quantized(name, weight)
    plain, again = split_stored({**file_tensors({"layer.weight": stored}), "other": weight})
    assert plain.keys() == {"other"}
    assert relative(stored.dense(), weight) < BOUNDS[name]
    assert torch.equal(again["layer.weight"].dense(), stored.dense())
    assert again["layer.weight"].format == stored.format


def test_a_layer_computes_with_the_stored_weight(name):
    """In float32 on the CPU; formats that quantise activations differ by no more than that."""
    weight, bias = weight_and_bias()
    stored = quantized(name, weight)
    x = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(2))
    layer = PackedLinear(128, 256)
    layer.bias.data = bias
    layer.pack(stored)
    expected = F.linear(x, stored.dense(), bias)
    bound = {"int8": 0.01, "svdquant": 0.12}.get(name, 1e-5)
    assert relative(layer(x), expected) < bound
    assert layer(x.half().float()).shape == (2, 9, 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_their_dtype(name, dtype):
    weight, bias = weight_and_bias()
    stored = quantized(name, weight)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(2)).to(dtype)
    out = stored.format.linear(x, stored.tensors, bias.to(dtype))
    assert out.dtype == dtype
    assert relative(out.float(), F.linear(x.float(), weight, bias)) < BOUNDS[name] + 0.1


def test_gradients_reach_the_input_through_the_dense_weight(name):
    """What trains through a quantised layer, a LoRA for one, must not lose its gradient."""
    weight, bias = weight_and_bias()
    stored = quantized(name, weight)
    x = torch.randn(5, 128, requires_grad=True)
    stored.format.linear(x, stored.tensors, bias).sum().backward()
    torch.testing.assert_close(x.grad, stored.dense().sum(0).expand_as(x), rtol=1e-4, atol=1e-5)


def test_unsigned_activations_shift_in_and_the_bias_takes_it_back():
    """The stored bias lacks what the shift adds; the dense layer has the bias of the original."""
    weight, bias = weight_and_bias()
    stored = quantized("svdquant", weight, unsigned=True)
    residual = stored.format.residual(stored.tensors) / stored.tensors["smooth_factor"]
    corrected = bias - GELU_SHIFT * residual.sum(1)
    x = F.gelu(torch.randn(64, 128, generator=torch.Generator().manual_seed(3)), approximate="tanh")
    out = stored.format.linear(x, stored.tensors, corrected)
    assert relative(out, F.linear(x, weight, bias)) < 0.12
    torch.testing.assert_close(stored.format.dense_bias(stored.tensors, corrected), bias,
                               rtol=1e-4, atol=1e-4)


def test_tiled_and_natural_layouts_are_the_same_layer():
    """Widths that are no multiple of 128 stay in the natural layout; the numbers are the same."""
    stored = quantized("svdquant", weight_and_bias()[0])
    assert stored.format.options["layout"] == TILED
    assert stored.tensors["weight"].shape == (2, 2, 32, 128)
    natural = quantized("svdquant", weight_and_bias()[0][:192])
    assert natural.format.options["layout"] == NATURAL
    assert relative(natural.dense(), weight_and_bias()[0][:192]) < 0.12
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.svdquant")
    rows = kitchen._tile_packed_weight_to_row_major(stored.tensors["weight"])
    codes = kitchen._unpack_int4_row_major(rows).float().reshape(256, 2, 64)
    scale = kitchen._tile_packed_scales_to_natural(stored.tensors["weight_scale"])
    expected = (codes * scale.t()[..., None]).reshape(256, 128)
    assert torch.equal(stored.format.residual(stored.tensors), expected)


FOLDED, BASIS = "proj_down_smooth_folded", "lowrank_branch_input_basis"


@pytest.mark.parametrize(("options", "smoothed"), [
    ({FOLDED: False, BASIS: "post_smoothing"}, True), ({FOLDED: False}, True),
    ({BASIS: "post_smoothing"}, True), ({}, False), ({FOLDED: True}, False),
    ({BASIS: "raw"}, False)])
def test_a_branch_made_for_smoothed_activations_is_folded(options, smoothed):
    """A file says so: one that says nothing was made for kernels, which multiply x itself."""
    stored = quantized("svdquant", weight_and_bias()[0])
    tensors = file_tensors({"layer.weight": stored})
    if smoothed:
        smooth = stored.tensors["smooth_factor"]
        tensors["layer.proj_down"] = tensors["layer.proj_down"] * smooth[:, None]
    tensors["layer.comfy_quant"] = said(format="svdquant_w4a4", layout=TILED, **options)
    again = split_stored(tensors)[1]["layer.weight"]
    torch.testing.assert_close(again.dense(), stored.dense(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{FOLDED: True, BASIS: "post_smoothing"},
                                     {FOLDED: False, BASIS: "raw"}, {BASIS: "rotated"}])
def test_a_branch_for_other_activations_is_refused(options):
    tensors = file_tensors({"layer.weight": quantized("svdquant", weight_and_bias()[0])})
    tensors["layer.comfy_quant"] = said(format="svdquant_w4a4", layout=TILED, **options)
    with pytest.raises(ValueError, match=BASIS):
        split_stored(tensors)


@pytest.mark.parametrize("method", ["int8", "svdquant"])
def test_full_precision_products_leave_activations_alone(method):
    """As a file asks for it."""
    weight, bias = weight_and_bias()
    stored = quantized(method, weight)
    tensors = file_tensors({"layer.weight": stored})
    tensors["layer.comfy_quant"] = said(**stored.format.comfy_quant(), **{FULL_PRECISION: True})
    exact = split_stored(tensors)[1]["layer.weight"]
    x = torch.randn(5, 128)
    out = exact.format.linear(x, exact.tensors, bias)
    assert torch.equal(out, F.linear(x, stored.dense(), bias))
    assert "full precision" in exact.format.backend("cpu").why


def test_infinite_scales_are_seen(name):
    stored = quantized(name, weight_and_bias()[0])
    assert stored.is_finite()
    leaf = next(n for n in stored.tensors if n != "weight")
    broken = {**stored.tensors, leaf: stored.tensors[leaf].clone()}
    broken[leaf].reshape(-1).view(torch.uint8).fill_(255)  # NaN in every one of these dtypes
    assert not StoredWeight(stored.format, broken).is_finite()


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.pop("layer.weight_scale"), "lacks layer.weight_scale"),
    (lambda t: t.update({"layer.comfy_quant": said(format="svdquant_w8a8")}), "svdquant_w8a8"),
    (lambda t: t.update({"layer.comfy_quant": t["layer.comfy_quant"][:-3]}), "does not say how"),
    (lambda t: t.update({"layer.comfy_quant": said(layout="x")}), "does not say how"),
    (lambda t: t.update({"layer.weight": t["layer.weight"].float()}), "float32"),
])
def test_incomplete_layers_are_named(name, change, words):
    tensors = file_tensors({"layer.weight": quantized(name, weight_and_bias()[0])})
    change(tensors)
    with pytest.raises(ValueError, match=words):
        split_stored(tensors)


@pytest.mark.parametrize(("options", "words"), [
    ({"group_size": 32}, "group_size 32"), ({"rank": 32}, "rank 32 and its proj_down has 16"),
    ({"layout": "nunchaku"}, "layout 'nunchaku'"), ({"layout": NATURAL}, "layout natural"),
    ({"convrot": True}, "convrot=True"),
])
def test_other_kinds_of_svdquant_are_refused(options, words):
    stored = quantized("svdquant", weight_and_bias()[0])
    tensors = file_tensors({"layer.weight": stored})
    tensors["layer.comfy_quant"] = said(**{**stored.format.comfy_quant(), **options})
    with pytest.raises(ValueError, match=words):
        split_stored(tensors)


def test_wrong_shapes_are_refused():
    for name, leaf in (("int8", "weight_scale"), ("mxfp8", "weight_scale"),
                       ("int4", "weight_zero"), ("svdquant", "proj_up")):
        tensors = file_tensors({"layer.weight": quantized(name, weight_and_bias()[0])})
        tensors[f"layer.{leaf}"] = tensors[f"layer.{leaf}"][:-1]
        with pytest.raises(ValueError, match=rf"layer\.{leaf}"):
            split_stored(tensors)


def test_a_missing_or_old_kitchen_is_said(monkeypatch):
    """A clear error that names the package, its version and what to do."""
    comfy_kitchen = pytest.importorskip("comfy_kitchen")
    monkeypatch.delattr(comfy_kitchen, "scaled_mm_svdquant_w4a4")
    stored = quantized("svdquant", weight_and_bias()[0])
    with pytest.raises(ImportError, match=r"svdquant_w4a4 weights need comfy-kitchen .* update it"):
        stored.format.linear(torch.randn(3, 128), stored.tensors, None)
    monkeypatch.setitem(__import__("sys").modules, "comfy_kitchen", None)
    with pytest.raises(ImportError, match="not installed"):
        kitchen_module.require_kitchen("int8_tensorwise")


def test_what_runs_a_file_is_looked_for_before_it_is_loaded(monkeypatch):
    """Not where the file asks for full precision, which needs no kernel."""
    comfy_kitchen = pytest.importorskip("comfy_kitchen")
    weight = weight_and_bias()[0]
    stored = {"layer.weight": quantized("int8", weight)}
    calm = {"layer.weight": METHODS["int8"].format.quantize(weight, {FULL_PRECISION: True})}
    require_kernels(stored)
    monkeypatch.delattr(comfy_kitchen, "int8_linear")
    with pytest.raises(ImportError, match="pip install -U comfy-kitchen"):
        require_kernels({**calm, "other.weight": stored["layer.weight"]})
    require_kernels(calm)


def test_int4_is_unpacked_a_piece_at_a_time_where_no_kernel_takes_it(monkeypatch):
    """ComfyUI computes T5 in float32: a whole matrix of T5 XXL would be half a gigabyte more."""
    monkeypatch.setattr(four_bit, "PIECE", 100 * 128)
    sizes, dense = [], four_bit.Int4.dense
    monkeypatch.setattr(four_bit.Int4, "dense", lambda self, tensors, dtype: sizes.append(
        self.shape[0]) or dense(self, tensors, dtype))
    weight, bias = weight_and_bias()
    stored = quantized("int4", weight)
    x = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(2))
    out = stored.format.linear(x, stored.tensors, bias)
    assert sizes == [100, 100, 56]
    torch.testing.assert_close(out, F.linear(x, stored.dense(), bias))


def test_the_back_end_is_known_with_its_reason(name):
    backend = quantized(name, weight_and_bias()[0]).format.backend("cpu")
    assert backend.name == "eager" and "CPU" in backend.why


def test_widening_adds_exactly_the_change_and_fills_the_rank_up():
    weight, bias = weight_and_bias()
    for rows in (256, 192):
        stored = quantized("svdquant", weight[:rows])
        down, up = torch.randn(128, 5), torch.randn(rows, 5) / 30
        wide = stored.format.widened(stored.tensors, down, up)
        assert wide["proj_down"].shape == (128, 32)
        x = torch.randn(7, 128)
        before = stored.format.linear(x, stored.tensors, bias[:rows])
        after = stored.format.linear(x, wide, bias[:rows])
        torch.testing.assert_close(after - before, x @ down @ up.t(), rtol=1e-3, atol=1e-4)
        dense = SVDQuant(stored.shape, stored.format.options).dense(wide, torch.float32)
        torch.testing.assert_close(dense - stored.dense(), up @ down.t(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "nvfp4"])
@pytest.mark.parametrize(("hip", "dtype", "runs"), [
    (None, torch.bfloat16, True), (None, torch.float32, False), ("6.4", torch.bfloat16, False)])
def test_low_precision_products_are_for_nvidia_cards_and_16_bits(monkeypatch, name, hip, dtype,
                                                                 runs):
    """A gfx1100 says 11.0 and is no Blackwell; no kernel gives float32."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (11, 0))
    form = quantized(name, weight_and_bias()[0]).format
    assert form.runs_on(torch.device("cuda"), dtype) is runs
