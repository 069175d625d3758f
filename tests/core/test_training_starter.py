"""A whole family by one command, in miniature: every step, what is handed out, going on."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import pixart_core as pc
from pixart_core.commands import app
from pixart_core.starter import starter_in
from pixart_core.training.data.index import read_index
from pixart_core.training.starter import FILE, make_starter, read_family

TINY = {"base64": {"steps": 2, "batch_size": 2}, "base": {"steps": 2, "batch_size": 2},
        "vae": {"steps": 2, "crop": 16, "batch_size": 1}, "lcm": {"steps": 1, "batch_size": 2},
        "controlnet": {"steps": 2, "batch_size": 2, "depth": 1}, "hed": {"steps": 1,
                                                                       "batch_size": 2},
        "text": {"steps": 1, "batch_size": 4, "layers": 1}, "sigma": {"steps": 1, "batch_size": 2}}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """The package's own file of steps, each of them cut down to almost nothing."""
    entries = yaml.safe_load(FILE.read_text())
    for step in entries["steps"]:
        step.update(TINY.get(step["name"], {}))
        if step["do"] == "scenes":
            step.update(count=6, image_size=64)
        if step["do"] == "cache":
            step["image_size"] = 64
        if "model" in step and isinstance(step["model"], dict):
            step["model"].update(depth=3, hidden_size=48, num_heads=2, mlp_hidden_size=64)
        if "kv_compression" in step:
            step["kv_compression"]["layers"] = [2]
        if step["do"] not in ("scenes", "cache", "retarget", "recache"):
            step.update(sample_every=0)
    path = tmp_path_factory.mktemp("family") / "tiny.yaml"
    path.write_text(yaml.safe_dump(entries, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def made(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    out = folder / "starter"
    result = CliRunner().invoke(app, ["train", "starter", str(out), "--family", str(family)])
    assert result.exit_code == 0, result.output
    return out, folder / "starter.work"


def test_the_family_is_one_that_the_package_finds(made):
    """Protects the hand-over: file names, and weights in half precision."""
    found = starter_in(made[0])
    assert found is not None
    weights = load_file(found.transformer)
    assert {t.dtype for t in weights.values()} == {torch.float16}
    assert load_file(found.vae)["vae_scale"].dtype == torch.float32


def test_its_members_draw_together(made):
    """Protects the fit of T5, transformers, VAE, ControlNet and edges to each other."""
    found = starter_in(made[0])
    for transformer, steps in ((found.transformer, 2), (found.lcm, 1)):
        pipeline = pc.Pipeline.from_files(transformer=transformer, t5=found.t5_file, vae=found.vae,
                                          controlnet=found.controlnet, device="cpu")
        picture = pipeline.generate("a red circle on a blue background", height=64, width=96,
                                    steps=steps)
        assert picture.size == (96, 64)
        hint = pc.HEDDetector.from_path(found.hed)(torch.rand(1, 3, 64, 96))
        assert hint.shape == (1, 1, 64, 96)


def test_sigma_trains_on_the_same_latents(made):
    """Protects an hour of encoding: alike VAEs share the shards, others are refused."""
    work = made[1]
    first, second = (read_index(work / name) for name in ("cache", "sigma-cache"))
    assert (second.facts.variant, second.facts.latent_scale) == ("sigma", 0.13025)
    assert first.facts.vae_sha256 != second.facts.vae_sha256
    assert [s.digest for s in first.shards] == [s.digest for s in second.shards]
    other = made[0].parent / "other.safetensors"
    tensors = load_file(work / "vae" / "vae.safetensors")
    save_file({name: t + 1 for name, t in tensors.items()}, other)
    step = {"name": "x", "do": "recache", "source": str(work / "cache"), "variant": "sigma",
            "old_vae": str(work / "vae" / "vae.safetensors"), "vae": str(other)}
    path = made[0].parent / "other.yaml"
    path.write_text(yaml.safe_dump({"steps": [step], "files": {"a": "b"}}))
    with pytest.raises(ValueError, match="different VAEs"):
        make_starter(made[0].parent / "out", made[0].parent / "work", read_family(path))


def test_the_sigma_member_is_of_its_own_kind(made):
    """Protects what makes it a Sigma: compression, no size conditioning, its VAE's scale."""
    model = pc.load_transformer(made[0] / "diffusion_models" / "pixart_starter_sigma.safetensors")
    assert model.config.variant == "sigma" and not model.config.micro_conditioning
    assert model.config.kv_compression.layers == (2,)
    vae = load_file(made[0] / "vae" / "vae_starter_sigma.safetensors")
    assert vae["vae_scale"].item() == pytest.approx(0.13025)
    alpha = load_file(made[0] / "vae" / "vae_starter.safetensors")
    assert torch.equal(vae["taesd_decoder.1.weight"], alpha["taesd_decoder.1.weight"])


def test_the_same_command_does_nothing_twice(made, family):
    """Protects going on: steps that are done stay as they are."""
    out, work = made
    before = {path: load_file(path) for path in work.glob("*/*.safetensors")}
    times = {path: path.stat().st_mtime_ns for path in (work / "cache").glob("*.safetensors")}
    make_starter(out, work, read_family(family))
    assert times == {path: path.stat().st_mtime_ns
                     for path in (work / "cache").glob("*.safetensors")}
    assert len(before) > 8
    for path, tensors in before.items():
        again = load_file(path)
        assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items()), path


@pytest.mark.parametrize(("text", "message"), [
    ("steps: [{do: base}]", "step 1 needs a name"),
    ("steps: [{name: a, do: fly}]", "step a is to do 'fly'"),
    ("steps: [{name: a, do: scenes}, {name: a, do: scenes}]", "two steps are called a"),
    ("files: {a: b}", "has no steps"),
])
def test_wrong_files_of_steps_are_named(text, message, tmp_path):
    path = tmp_path / "family.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_family(path)


def test_a_step_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "family.yaml"
    path.write_text(json.dumps({"steps": [{"name": "a", "do": "vae", "data": "{nowhere}/x"}],
                                "files": {"a": "{a}/b"}}))
    with pytest.raises(ValueError, match=r"names a step that is not there: 'nowhere'"):
        make_starter(tmp_path / "out", tmp_path / "work", read_family(path))
