"""A whole family by one command, in miniature: every step, what is handed out, going on."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import pixart_core as pc
from pixart_core.commands import app
from pixart_core.starter import starter_in
from pixart_core.training.data import CachedSamples, rescale, rescale_cache
from pixart_core.training.recipes import RECIPES
from pixart_core.training.starter import FILE, make_starter, read_family

TINY = {"vae": {"crop": 16, "batch_size": 1}, "lcm": {"steps": 1}, "controlnet": {"depth": 1},
        "hed": {"steps": 1}, "text": {"steps": 1, "batch_size": 4, "layers": 1}}  # by recipe


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """The package's own file of steps, each of them cut down to almost nothing."""
    entries = yaml.safe_load(FILE.read_text())
    for step in entries["steps"]:
        if step["do"] in RECIPES:
            step.update({"steps": 2, "batch_size": 2, "sample_every": 0} | TINY.get(step["do"], {}))
        if step["do"] == "scenes":
            step.update(count=6, image_size=64)
        if step["do"] == "cache":
            step["image_size"] = 64
        if "model" in step and isinstance(step["model"], dict):
            step["model"].update(depth=2, hidden_size=192, num_heads=4, mlp_hidden_size=64)
        if "kv_compression" in step:
            step["kv_compression"]["layers"] = [1]
        if step["do"] == "svdquant":
            step.update(image_size=64, count=2, rows=64)
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
    """Protects an hour of encoding: the same rows under the other factor, captions untouched."""
    work = made[1]
    first, second = (CachedSamples(work / name) for name in ("cache", "sigma-cache"))
    assert (second.facts.variant, second.facts.latent_scale) == ("sigma", 0.13025)
    one, other = first.preview(4), second.preview(4)
    assert one.latents.std() > 0.01
    torch.testing.assert_close(other.latents, one.latents * 0.13025 / 0.18215, rtol=1e-3,
                               atol=1e-4)
    assert torch.equal(one.caption, other.caption) and one.texts == other.texts
    assert torch.equal(first.null_caption.states, second.null_caption.states)


def test_a_rescaled_cache_is_not_mistaken_for_another(made):
    """Protects a finished cache from a call for another variant, and from an unknown one."""
    source, out = made[1] / "cache", made[1] / "sigma-cache"
    with pytest.raises(ValueError, match=r"another cache \(variant is sigma, now alpha\)"):
        rescale_cache(source, out, "alpha")
    with pytest.raises(ValueError, match="was made of another cache than"):
        rescale_cache(made[1] / "cache64", out, "sigma")
    with pytest.raises(ValueError, match="variant is 'omega'; use one of"):
        rescale_cache(source, out.with_name("new"), "omega")
    assert not out.with_name("new").exists()


def test_a_stopped_rescaling_leaves_no_cache(made, monkeypatch, tmp_path):
    """Protects against half a cache that trains: the index comes last, and a rerun finishes."""
    def stop(*_):
        raise KeyboardInterrupt

    source = made[1] / "outlines"
    monkeypatch.setattr(rescale, "write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        rescale_cache(source, tmp_path / "out", "sigma")
    with pytest.raises(pc.CheckpointError, match="not a training cache"):
        CachedSamples(tmp_path / "out")
    monkeypatch.undo()
    first = CachedSamples(source)
    assert rescale_cache(source, tmp_path / "out", "sigma").rows == len(first)
    hints = [samples.preview(4).control for samples in (first, CachedSamples(tmp_path / "out"))]
    torch.testing.assert_close(hints[1], hints[0] * 0.13025 / 0.18215, rtol=1e-3, atol=1e-4)


def test_the_sigma_member_is_of_its_own_kind(made):
    """Protects what makes it a Sigma: compression and no size conditioning."""
    model = pc.load_transformer(made[0] / "diffusion_models" / "pixart_starter_sigma.safetensors")
    assert model.config.variant == "sigma" and not model.config.micro_conditioning
    assert model.config.kv_compression.layers == (1,)


def test_the_student_in_four_bits_is_the_student(made):
    """Protects the SVDQuant member: made of the student, close to it, with its config."""
    folder = made[0] / "diffusion_models"
    files = [folder / f"pixart_starter_lcm{kind}.safetensors" for kind in ("", "_svdquant")]
    student, packed = (pc.load_transformer(path, dtype=torch.float32) for path in files)
    assert packed.config == student.config
    formats = {w.packing for w in pc.read_checkpoint(files[1], keep_packed=True).packed.values()}
    assert formats == {"svdquant_w4a4"}
    x, caption = torch.randn(1, 4, 8, 8), torch.randn(1, 5, student.config.caption_channels)
    size = torch.tensor([[64.0, 64.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    with torch.no_grad():
        drawn = [m(x, torch.tensor([500.0]), m.prepare_caption(caption, mask), image_size=size,
                   aspect_ratio=torch.ones(1, 1)) for m in (student, packed)]
    assert 0 < (drawn[0] - drawn[1]).norm() < 0.3 * drawn[0].norm()


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
