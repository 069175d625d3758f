"""Folders of deepcompressor, written here from layers that were solved here."""

import pytest
import torch
from quantize_models import make_model, predict, relative, run, words

import pixart_core as pc
from pixart_core.checkpoint.convert import diffusers_module
from pixart_core.quant.svdquant import SVDQuantSettings, layer_output, solve_layer
from pixart_core.quant.svdquant.int4 import GELU_SHIFT

LAYERS = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.proj", "mlp.fc1", "mlp.fc2")

__all__ = ["run"]  # a fixture


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """A model's path, its layers solved, and the parts of the folder."""
    path = make_model(tmp_path_factory.mktemp("dc") / "model.safetensors", depth=2)
    weights, _ = pc.open_transformer(path)
    settings = SVDQuantSettings(rank=16, dtype=torch.float32, rounds=2)
    model = dict(pc.convert_state_dict(weights, to="diffusers"))
    model = {name: t.float().clone() for name, t in model.items()}
    parts = {"model": model, "scale": {}, "smooth": {"proj.fuse_when_possible": False},
             "branch": {}}
    layers = {}
    for i in range(2):
        for kind in LAYERS:
            native = f"blocks.{i}.{kind}"
            weight, bias = weights[f"{native}.weight"].float(), weights[f"{native}.bias"].float()
            generator = torch.Generator().manual_seed(i)
            x = torch.randn(200, weight.shape[1], generator=generator)
            unsigned = kind == "mlp.fc2"
            layer = solve_layer(weight, torch.nn.functional.gelu(x) if unsigned else x, bias,
                                act_unsigned=unsigned, settings=settings)
            layers[native] = layer
            add(parts, native, layer)
    return path, layers, parts


def add(parts, native, layer):
    """A solved layer as deepcompressor keeps it: the branch for smoothed inputs, a shift that the
    branch sees too and that the bias takes out of all of it."""
    names = diffusers_module(native)
    down = layer.proj_down * layer.smooth_factor[:, None]
    bias = layer.bias
    inner = ""
    if layer.act_unsigned:
        shifted = layer.proj_up @ (layer.proj_down.sum(0) * GELU_SHIFT)
        bias, inner = bias - shifted, ".linear"
        parts["model"][f"{names[0]}.shift"] = torch.tensor([GELU_SHIFT])
    scale = layer.weight_scale.t()
    pieces = zip(layer.residual().chunk(len(names)), scale.chunk(len(names)),
                 bias.chunk(len(names)), strict=True)
    for name, (weight, scales, own) in zip(names, pieces, strict=True):
        for leaf in ("weight", "bias"):
            parts["model"].pop(f"{name}.{leaf}")
        parts["model"][f"{name}{inner}.weight"] = weight.clone()
        parts["model"][f"{name}{inner}.bias"] = own.clone()
        parts["scale"][f"{name}{inner}.weight.scale.0"] = scales[:, None, :, None].clone()
        parts["scale"][f"{name}{inner}.weight.zero"] = None
    parts["smooth"][names[0] + inner] = layer.smooth_factor
    parts["branch"][names[0] + inner] = {"a.weight": down.t().clone(),
                                         "b.weight": layer.proj_up.clone()}


@pytest.fixture
def folder(solved, tmp_path):
    """Write the folder, changed or whole: `folder(smooth=None)` leaves a file out."""
    def write(change=None):
        target = tmp_path / "dc"
        target.mkdir()
        parts = {name: dict(part) for name, part in solved[2].items()}
        if change is not None:
            change(parts)
        for name, part in parts.items():
            torch.save(part, target / f"{name}.pt")
        return target

    return write


def convert(run, folder, base, *flags):
    return run("quantize", folder, "q.safetensors", "--from", "deepcompressor", "--base", base,
               *flags)


def test_it_computes_what_the_solved_layers_compute(run, folder, solved):
    """Codes, smoothing, branch and bias all arrive: fused qkv, and fc2 with its shift."""
    path, layers, _ = solved
    done = convert(run, folder(), path, "--dtype", "float16")
    assert done.exit_code == 0, done.output
    model = pc.load_transformer("q.safetensors", dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for native, layer in layers.items():
        x = torch.randn(20, layer.in_features, generator=generator)
        x = torch.nn.functional.gelu(x) if layer.act_unsigned else x
        with torch.no_grad():
            out = model.get_submodule(native)(x)
        assert relative(out, layer_output(layer, x)) < 0.01, native
        assert model.get_submodule(native).format.act_unsigned == layer.act_unsigned


def test_config_and_null_caption_come_from_the_base(run, folder, solved):
    convert(run, folder(), solved[0])
    weights, config = pc.open_transformer("q.safetensors")
    original, expected = pc.open_transformer(solved[0])
    assert config == expected
    assert torch.equal(weights["y_embedder.y_embedding"].float(),
                       original["y_embedder.y_embedding"].bfloat16().float())
    assert relative(predict("q.safetensors"), predict(solved[0])) < 0.3


def test_smoothing_that_went_into_the_layer_before(run, folder, solved):
    """deepcompressor may divide the values' weight instead of the input of attn1.to_out."""
    def fuse(parts):
        parts["smooth"].pop("proj.fuse_when_possible")  # its own default is to do so

    assert convert(run, folder(fuse), solved[0]).exit_code == 0
    model = pc.load_transformer("q.safetensors")
    assert (model.blocks[0].attn.proj.smooth_factor == 1).all()
    assert not (model.blocks[0].attn.qkv.smooth_factor == 1).all()


def missing_scale(parts):
    del parts["scale"]["transformer_blocks.0.attn1.to_k.weight.scale.0"]


def no_scale(parts):
    for part in "qkv":
        del parts["scale"][f"transformer_blocks.0.attn1.to_{part}.weight.scale.0"]


def wrong_groups(parts):
    name = "transformer_blocks.1.ff.net.2.linear.weight.scale.0"
    parts["scale"][name] = parts["scale"][name].expand(-1, -1, -1, 2)


def not_whole(parts):
    parts["model"]["transformer_blocks.0.attn2.to_q.weight"] = torch.randn(64, 64)


def beyond_four_bits(parts):
    name = "transformer_blocks.0.attn2.to_q.weight"
    parts["model"][name] = parts["model"][name] * 3


def no_branch(parts):
    del parts["branch"]["transformer_blocks.0.ff.net.0.proj"]


def another_rank(parts):
    branch = parts["branch"]["transformer_blocks.0.attn1.to_q"]
    parts["branch"]["transformer_blocks.0.attn1.to_q"] = {
        **branch, "b.weight": branch["b.weight"][:, :9]}


def bad_smooth(parts):
    parts["smooth"]["transformer_blocks.0.attn1.to_q"] = torch.zeros(64)


def two_levels(parts):
    name = "transformer_blocks.0.attn2.to_q.weight.scale.1"
    parts["scale"][name] = torch.ones(64, 1, 4, 1)


def another_shift(parts):
    parts["model"]["transformer_blocks.0.ff.net.2.shift"] = torch.tensor([0.5])


def another_layer(parts):
    parts["scale"]["transformer_blocks.0.attn2.to_k.weight.scale.0"] = torch.ones(64, 1, 1, 1)


def not_finite(parts):
    branch = parts["branch"]["transformer_blocks.0.attn1.to_q"]
    parts["branch"]["transformer_blocks.0.attn1.to_q"] = {
        **branch, "b.weight": branch["b.weight"] * torch.nan}


@pytest.mark.parametrize(("change", "expected"), [
    (missing_scale, "has no transformer_blocks.0.attn1.to_k.weight.scale.0"),
    (no_scale, "whose scale is missing"), (wrong_groups, "groups of 64"),
    (not_whole, "not whole numbers of -8 to 7"), (beyond_four_bits, "not whole numbers"),
    (no_branch, "branch.pt has no a.weight"), (another_rank, "(192, 9)"),
    (bad_smooth, "64 positive numbers"), (two_levels, "NVFP4"), (another_shift, "shift is 0.5"),
    (another_layer, "kept in 16 bits"), (not_finite, "not finite")],
    ids=lambda value: getattr(value, "__name__", ""))
def test_a_folder_that_is_not_whole_is_refused(run, folder, solved, change, expected):
    done = convert(run, folder(change), solved[0])
    assert done.exit_code == 1 and expected in words(done), words(done)


def test_a_file_that_is_missing(run, folder, solved):
    path = folder()
    (path / "smooth.pt").unlink()
    done = convert(run, path, solved[0])
    assert done.exit_code == 1 and "has no smooth.pt" in words(done)


class Command:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_nothing_in_the_files_runs(run, folder, solved, tmp_path):
    """A pickle that would open a file is refused, and the file is not there."""
    path = folder()
    torch.save({"a": Command()}, path / "smooth.pt")
    done = convert(run, path, solved[0])
    assert done.exit_code == 1 and "smooth.pt is no dictionary of tensors" in words(done)
    assert not (tmp_path / "ran").exists()


def test_calibration_options_are_refused(run, folder, solved):
    done = convert(run, folder(), solved[0], "--rank", 16)
    assert done.exit_code == 2 and "--rank given" in words(done)
