"""pixart quantize --method svdquant: calibration, solving, going on after a stop."""

import json

import pytest
import torch
from PIL import Image
from quantize_models import (
    FOUR_BITS,
    make_captions,
    make_control,
    make_model,
    predict,
    relative,
    run,
    words,
)
from safetensors import safe_open
from safetensors.torch import save_file

typer_testing = pytest.importorskip("typer.testing")

import pixart_core as pc  # noqa: E402
from pixart_core.checkpoint import read_checkpoint  # noqa: E402
from pixart_core.cli import app  # noqa: E402
from pixart_core.quantize import solve_network  # noqa: E402
from pixart_core.starter import find_starter  # noqa: E402

STARTER = find_starter()
QUICK = ("--method", "svdquant", "--steps", 2, "--rank", 16, "--rows", 50)

__all__ = ["run"]  # a fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of one block, captions for it, and the model quantised with a report."""
    path = tmp_path_factory.mktemp("models")
    make_model(path / "model.safetensors", depth=1)
    make_captions(path / "captions.safetensors")
    done = typer_testing.CliRunner().invoke(app, list(map(str, (
        "quantize", path / "model.safetensors", path / "q.safetensors", *QUICK, "--embeddings",
        path / "captions.safetensors", "--report", path / "r.json"))))
    assert done.exit_code == 0, done.output
    (path / "said.txt").write_text(done.stdout)
    return path


@pytest.fixture
def solve(run, folder):
    """Quantise the model of `folder` with its captions."""
    def call(out="q.safetensors", *flags, embeddings=folder / "captions.safetensors"):
        return run("quantize", folder / "model.safetensors", out, *QUICK, "--embeddings",
                   embeddings, *flags)

    return call


def values(path):
    return torch.cat([t.float().flatten() for t in pc.open_transformer(path)[0].values()])


def test_it_is_nearer_than_plain_rounding(folder):
    """The report measures every layer beside plain rounding and smoothing alone."""
    means = json.loads((folder / "r.json").read_text())["mean"]
    assert means["all"]["svdquant"] < means["all"]["smoothing_alone"] \
        <= means["all"]["round_to_nearest"]
    for column in ("SVDQuant", "plain int4", "smoothing alone"):
        assert column in (folder / "said.txt").read_text()
    assert relative(predict(folder / "q.safetensors"), predict(folder / "model.safetensors")) < 0.3


def test_which_layers_and_how(folder):
    """fc2, behind the GELU, takes activations without a sign; captions' keys stay in 16 bits."""
    model = pc.load_transformer(folder / "q.safetensors")
    forms = {n: m.format for n, m in model.named_modules() if getattr(m, "packing", None)}
    assert len(forms) == FOUR_BITS
    assert {n for n, f in forms.items() if f.act_unsigned} == {"blocks.0.mlp.fc2"}
    assert {f.name for f in forms.values()} == {"svdquant_w4a4"}
    assert model.blocks[0].attn.qkv.proj_down.shape == (64, 16)


def test_unpacked_weights_bring_the_bias_that_belongs_to_them(folder):
    """The stored bias of fc2 takes a shift back that dense weights do not have."""
    path = folder / "q.safetensors"
    name = "blocks.0.mlp.fc2"
    fc2 = pc.load_transformer(path, dtype=torch.float32).blocks[0].mlp.fc2
    x = torch.nn.functional.gelu(torch.randn(50, 128, generator=torch.Generator().manual_seed(0)))
    for weights in (pc.open_transformer(path)[0], read_checkpoint(path).state_dict):
        with torch.no_grad():
            expected = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"].float()
            assert relative(fc2(x), expected) < 0.1


def test_a_branch_of_another_rank(folder, tmp_path):
    """A file whose two halves of a branch do not fit is refused before it computes anything."""
    with safe_open(folder / "q.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    name = "blocks.0.mlp.fc1.proj_up"
    tensors[name] = tensors[name][..., :8, :].contiguous()
    save_file(tensors, tmp_path / "bad.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1\.proj_up has shape"):
        pc.load_transformer(tmp_path / "bad.safetensors")


def test_the_seed_decides(solve, folder):
    """The same command gives the same tensors, whether it reports or not."""
    solve("same.safetensors")
    solve("other.safetensors", "--seed", 1)
    first = values(folder / "q.safetensors")
    assert torch.equal(values("same.safetensors"), first)
    assert not torch.equal(values("other.safetensors"), first)


@pytest.fixture
def stopped(solve, monkeypatch):
    """A run that was stopped in its fifth layer; calls of the solver since then, and 10."""
    original, calls = solve_network.solve_layer, []

    def stop(*arguments, **named):
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(solve_network, "solve_layer", stop)
    done = solve()
    assert done.exit_code != 0 and "the same command goes on" in done.stderr
    calls.clear()
    calls.extend([None] * 10)  # past the stop
    return calls


def test_a_stopped_run_goes_on(solve, folder, stopped, tmp_path):
    """Neither drawn again nor solved again, and what comes out is the same to the bit."""
    assert not (tmp_path / "q.safetensors").exists()
    assert (tmp_path / "q.safetensors.work" / "inputs.safetensors").exists()
    done = solve()
    assert done.exit_code == 0 and "going on" in done.stderr
    assert len(stopped) - 10 == FOUR_BITS - 4
    assert [path.name for path in tmp_path.iterdir()] == ["q.safetensors"]
    assert torch.equal(values("q.safetensors"), values(folder / "q.safetensors"))


@pytest.mark.parametrize(("flags", "word"), [(("--guidance", "1.0"), ""), (("--seed", 7), "seed"),
                                             (("--dtype", "bfloat16"), "dtype"),
                                             (("--report", "r.json"), "compare")])
def test_other_settings_do_not_go_on(solve, stopped, flags, word):
    """A file would be half of one kind and half of another; settings that say the same go on."""
    done = solve("q.safetensors", *flags)
    if not word:
        assert done.exit_code == 0, done.output
        return
    assert done.exit_code == 1
    assert f"begun with {word}" in words(done) and "delete the folder" in words(done)


def test_other_captions_do_not_go_on(solve, stopped, tmp_path):
    make_captions(tmp_path / "others.safetensors", seed=5)
    done = solve(embeddings="others.safetensors")
    assert done.exit_code == 1 and "begun with embeddings" in words(done)


def test_another_input_does_not_go_on(run, stopped, folder):
    make_model(folder / "other.safetensors", seed=3)
    done = run("quantize", folder / "other.safetensors", "q.safetensors", *QUICK, "--embeddings",
               folder / "captions.safetensors")
    assert done.exit_code == 1 and "begun with input" in words(done)


def test_prompts_through_t5(run, folder, tmp_path):
    """T5 encodes the prompts of a text file, as many as --count says; with guidance, too."""
    from pixart_core.text import T5TextEncoder

    width = T5TextEncoder.from_path(STARTER.t5_file).caption_channels
    model = make_model(tmp_path / "model.safetensors", caption_channels=width, max_tokens=24,
                       depth=1)
    (tmp_path / "scenes.txt").write_text("a red circle\n\na blue square\na green star\n")
    done = run("quantize", model, "q.safetensors", *QUICK, "--t5", STARTER.t5_file, "--prompts",
               "scenes.txt", "--count", 2, "--guidance", 3)
    assert done.exit_code == 0, done.output
    with safe_open(tmp_path / "q.safetensors", "pt") as file:
        said = json.loads(file.metadata()["pixart_quantization"])
    assert (said["captions"], said["steps"], said["guidance"]) == (2, 2, 3.0)


def test_prompts_come_with_the_program():
    from pixart_core.commands.quantize_captions import read_prompts

    prompts = read_prompts(None)
    assert len(prompts) == len(set(prompts)) == 128


def test_a_controlnet(run, folder, tmp_path):
    """Calibrated as it works: beside its base, on control images."""
    base = make_model(tmp_path / "base.safetensors", image_size=64, base_size=4)
    control = make_control(tmp_path / "control.safetensors", base)
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (50, 40), (100 * i, 50, 9)).save(tmp_path / "images" / f"{i}.png")
    done = run("quantize", control, "q.safetensors", *QUICK, "--embeddings",
               folder / "captions.safetensors", "--base", base, "--vae", STARTER.vae,
               "--control-images", "images")
    assert done.exit_code == 0, done.output
    packed = pc.load_controlnet("q.safetensors", dtype=torch.float32)
    assert packed.controlnet[0].copied_block.mlp.fc2.packing == "svdquant_w4a4"
    dense = pc.load_controlnet(control, dtype=torch.float32)
    model = pc.load_transformer(base, dtype=torch.float32)
    assert relative(predict(model, packed), predict(model, dense)) < 0.2
