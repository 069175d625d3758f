"""pixart quantize: transformers and ControlNets, each weight rounded by itself."""

import json

import pytest
import torch
from quantize_models import FIELDS, make_control, make_model, predict, relative, run, words, write
from safetensors import safe_open

import pixart_core as pc
from pixart_core.config import METADATA_KEY
from pixart_core.quant.policy import METHODS
from pixart_core.quantize.network import QUANTIZATION_KEY

ROUNDED = [name for name, method in METHODS.items() if not method.calibrated]

__all__ = ["run"]  # a fixture


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="module")
def control(model):
    return make_control(model.with_name("control.safetensors"), model)


def stored(path):
    """Tensors and metadata as they are in a file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("method", ROUNDED)
def test_a_transformer_predicts_nearly_the_same(run, model, method):
    """And loads without being told anything: config, null caption and names are in the file."""
    done = run("quantize", model, "q.safetensors", "--method", method)
    assert done.exit_code == 0, done.output
    bar = 0.05 if METHODS[method].bits == 8 else 0.4
    assert 1e-4 < relative(predict("q.safetensors"), predict(model)) < bar
    weights, config = pc.open_transformer("q.safetensors")
    assert config == pc.open_transformer(model)[1]
    assert "y_embedder.y_embedding" in weights


def test_what_is_not_quantised_keeps_its_values(run, model):
    run("quantize", model, "q.safetensors", "--method", "nvfp4")
    before, after = stored(model)[0], stored("q.safetensors")[0]
    plain = [name for name in before if name in after and not name.endswith((
        "attn.qkv.weight", "proj.weight", "q_linear.weight", "fc1.weight", "fc2.weight"))]
    assert "blocks.1.cross_attn.kv_linear.weight" in plain and "t_block.1.weight" in plain
    assert all(torch.equal(before[name], after[name]) for name in plain)


def test_eight_bits_take_the_captions_keys_and_values_too(run, model):
    run("quantize", model, "q.safetensors", "--method", "int8")
    assert stored("q.safetensors")[0]["blocks.0.cross_attn.kv_linear.weight"].dtype == torch.int8


@pytest.mark.parametrize(("flags", "source", "expected"), [
    ((), torch.float16, torch.float16), ((), torch.bfloat16, torch.bfloat16),
    ((), torch.float32, torch.bfloat16),
    (("--dtype", "float16"), torch.float32, torch.float16)])
def test_the_dtype_of_the_rest(run, model, flags, source, expected):
    weights, config = pc.open_transformer(model)
    write("own.safetensors", {name: t.to(source) for name, t in weights.items()}, config)
    done = run("quantize", "own.safetensors", "q.safetensors", "--method", "int8", *flags)
    assert done.exit_code == 0, done.output
    after = stored("q.safetensors")[0]
    assert after["final_layer.linear.weight"].dtype == expected
    assert after["blocks.0.attn.qkv.bias"].dtype == expected


def test_the_header_says_how(run, model):
    run("quantize", model, "q.safetensors", "--method", "fp8")
    metadata = stored("q.safetensors")[1]
    assert json.loads(metadata[QUANTIZATION_KEY])["method"] == "fp8"
    assert json.loads(metadata[METADATA_KEY])["distilled"] == "lcm"


def test_layers_that_do_not_fit_stay_and_are_named_in_one_line(run, tmp_path):
    """Of 80 channels int4 takes no group of 64: only fc2, behind 128 hidden ones, is quantised."""
    odd = make_model(tmp_path / "odd.safetensors", hidden_size=80)
    done = run("quantize", odd, "q.safetensors", "--method", "int4")
    assert done.exit_code == 0, done.output
    line, = [line for line in done.stdout.splitlines() if "do not fit int4" in line]
    assert "blocks.0.attn.qkv.weight" in line and "and 6 more" in line
    after = stored("q.safetensors")[0]
    assert after["blocks.0.attn.qkv.weight"].dtype == torch.float16
    assert after["blocks.0.mlp.fc2.weight"].dtype == torch.int8


def test_no_layer_that_fits(run, tmp_path):
    odd = make_model(tmp_path / "odd.safetensors", hidden_size=40, mlp_hidden_size=72)
    done = run("quantize", odd, "q.safetensors", "--method", "mxfp8")
    assert done.exit_code == 1 and "no layer of odd.safetensors" in words(done)


def test_diffusers_names_and_sigma(run, tmp_path):
    """Any checkpoint goes in; native names come out."""
    path = make_model(tmp_path / "sigma.safetensors", variant="sigma", distilled=None)
    weights, config = pc.open_transformer(path)
    other = write("diffusers.safetensors",
                  {k: v.clone() for k, v in
                   pc.convert_state_dict(weights, to="diffusers").items()}, config)
    for source, target in ((path, "a.safetensors"), (other, "b.safetensors")):
        done = run("quantize", source, target, "--method", "int8")
        assert done.exit_code == 0, done.output
    assert torch.equal(predict("a.safetensors"), predict("b.safetensors"))


@pytest.mark.parametrize("method", ["int8", "nvfp4"])
def test_a_controlnet_stays_packed_and_steers_nearly_the_same(run, model, control, method):
    done = run("quantize", control, "q.safetensors", "--method", method)
    assert done.exit_code == 0, done.output
    dense = pc.load_controlnet(control, dtype=torch.float32)
    packed = pc.load_controlnet("q.safetensors", dtype=torch.float32)
    assert packed.controlnet[0].copied_block.attn.qkv.packing == METHODS[method].format.name
    base = pc.load_transformer(model, dtype=torch.float32)
    expected = predict(base, dense)
    assert relative(predict(base), expected) > 0.05
    assert relative(predict(base, packed), expected) < (0.02 if method == "int8" else 0.1)


def test_a_quantised_controlnet_can_be_unpacked(run, control):
    """`pixart convert` gives dense weights again, not the placeholders of packed ones."""
    run("quantize", control, "q.safetensors", "--method", "int8")
    assert run("convert", "q.safetensors", "dense.safetensors").exit_code == 0
    name = "controlnet.0.copied_block.mlp.fc1.weight"
    dense, original = stored("dense.safetensors")[0][name], stored(control)[0][name].float()
    assert 0 < relative(dense, original) < 0.02


def test_the_report_has_every_layer(run, model):
    run("quantize", model, "q.safetensors", "--method", "int8", "--report", "r.json")
    with open("r.json", encoding="utf-8") as file:
        report = json.load(file)
    assert len(report["layers"]) == 7 * FIELDS["depth"]
    means = report["mean"]
    assert next(iter(means)) == "attn.qkv" and 0 < means["all"]["weight"] < 0.02


def test_a_layer_of_zeros_has_no_error(run, model, tmp_path):
    """As models begin to train: the attention to the caption starts at zero."""
    weights, config = pc.open_transformer(model)
    weights["blocks.0.cross_attn.proj.weight"] = torch.zeros_like(
        weights["blocks.0.cross_attn.proj.weight"])
    pc.write_checkpoint(tmp_path / "new.safetensors", weights, {METADATA_KEY: config.to_json()})
    assert run("quantize", "new.safetensors", "q.safetensors", "--method", "int8", "--report",
               "r.json").exit_code == 0
    with open("r.json", encoding="utf-8") as file:
        report = json.load(file)
    assert report["layers"]["blocks.0.cross_attn.proj.weight"] == {"weight": 0.0}
    assert 0 < report["mean"]["all"]["weight"] < 0.02


def test_the_file_appears_only_when_it_is_whole(run, model, tmp_path, monkeypatch):
    """A stop while it is written leaves nothing behind."""
    import safetensors.torch

    def stop(tensors, path, **_):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", stop)
    assert run("quantize", model, "q.safetensors", "--method", "int8").exit_code != 0
    assert not list(tmp_path.iterdir())
