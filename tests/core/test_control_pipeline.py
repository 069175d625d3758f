"""ControlNets in the standalone pipeline and on the command line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import pixart_core as pc
from pixart_core.cli import app
from pixart_core.config import METADATA_KEY
from pixart_core.control_image import fit_image
from pixart_core.settings import Settings
from pixart_core.starter import find_starter

PROMPT = "a large red circle on a blue background"
STARTER = find_starter()


@pytest.fixture(scope="module")
def control_file(tmp_path_factory):
    """A ControlNet for the starter with random projections, so that it does something."""
    base = pc.load_transformer(STARTER.transformer, dtype=torch.float32)
    net = pc.PixArtControlNet.from_base(base, depth=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "_proj." in name and "copied_block" not in name:
                parameter.normal_(std=0.03, generator=generator)
    file = tmp_path_factory.mktemp("control") / "control.safetensors"
    pc.write_checkpoint(file, net.state_dict(), {METADATA_KEY: net.config.to_json()})
    return file


@pytest.fixture(scope="module")
def pipeline(control_file):
    return pc.Pipeline.from_files(STARTER.transformer, STARTER.t5_file, STARTER.vae,
                                  dtype=torch.float32, device="cpu", controlnet=control_file)


@pytest.fixture(scope="module")
def edges():
    image = np.zeros((96, 64, 3), np.uint8)
    image[30:34, :] = 255
    return Image.fromarray(image)


def draw(pipeline, **settings):
    return np.asarray(pipeline.generate(PROMPT, **{"steps": 3, "seed": 1, **settings}), np.int16)


def test_control_changes_the_picture_and_zero_does_not(pipeline, edges):
    plain = draw(pipeline)
    assert np.abs(draw(pipeline, control_image=edges) - plain).max() > 8
    assert (draw(pipeline, control_image=edges, control_strength=0.0) == plain).all()


def test_the_range_names_its_steps(pipeline, edges):
    """Two ranges that share no step give what one run that switches control on gives."""
    settings = Settings("", steps=4, sampler="dpm", control_start=0.5)
    assert [settings.controls(t) for t in (999, 749, 499, 249)] == [False, False, True, True]
    settings = Settings("", steps=4, sampler="dpm", control_end=0.25)
    assert [settings.controls(t) for t in (999, 749, 499, 249)] == [True, False, False, False]
    for steps in (4, 10, 20):
        for t in Settings("", steps=steps, sampler="dpm").timesteps():
            named = 1 - t / 999
            assert Settings("", control_start=named).controls(t)
            assert Settings("", control_end=named).controls(t)
    never = draw(pipeline, control_image=edges, control_start=0.999)
    assert (never == draw(pipeline)).all()


def test_control_mode_steers_the_conditional_half_alone(pipeline, edges, monkeypatch):
    """In the guidance batch the negative half comes first."""
    seen = []
    forward = type(pipeline.transformer).forward

    def watch(self, *args, control=(), **kwargs):
        seen.extend((c.rows, c.weights) for c in control)
        return forward(self, *args, control=control, **kwargs)

    monkeypatch.setattr(type(pipeline.transformer), "forward", watch)
    draw(pipeline, control_image=edges, control_mode="control", steps=1)
    draw(pipeline, control_image=edges, control_mode="control", steps=1, guidance=1.0)
    draw(pipeline, control_image=edges, control_cond_only=True, steps=1)
    assert [rows for rows, _ in seen] == [slice(1, None), None, slice(1, None)]
    assert seen[2][1] == (1.0, 1.0, 1.0)
    assert seen[0][1][0] == pytest.approx(0.825**12)


@pytest.mark.parametrize("fields", [{}, {"control_mode": "control"}, {"guidance": 1.0}])
def test_a_control_image_for_each_prompt(pipeline, edges, fields):
    """Protects pairing: picture i of a batch follows image i, in both halves of guidance."""
    images = [edges, edges.transpose(Image.Transpose.ROTATE_90).resize(edges.size)]

    def both(control_image):
        drawn = pipeline.generate([PROMPT, PROMPT], steps=2, seed=1, control_image=control_image,
                                  **fields)
        return [np.asarray(picture, np.int16) for picture in drawn]

    together, first, second = both(images), both(images[0]), both(images[1])
    assert np.abs(together[0] - first[0]).max() <= 1
    assert np.abs(together[1] - second[1]).max() <= 1
    assert np.abs(first[1] - second[1]).max() > 4
    with pytest.raises(ValueError, match="2 control images for 1 pictures"):
        pipeline.generate(PROMPT, steps=1, control_image=images)


def test_a_control_image_without_a_controlnet_is_refused(pipeline, edges):
    alone = pc.Pipeline(pipeline.transformer, pipeline.encoder, pipeline.vae)
    with pytest.raises(ValueError, match="no ControlNet"):
        alone.generate(PROMPT, steps=1, control_image=edges)


def test_control_settings_without_a_control_image_are_refused(pipeline):
    with pytest.raises(ValueError, match="control_strength given without"):
        pipeline.generate(PROMPT, steps=1, control_strength=0.5)


def test_a_controlnet_of_another_width_is_refused(pipeline, make_weights):
    other = pc.load_transformer(make_weights(), num_heads=4)
    with pytest.raises(ValueError, match="48 wide with 4 heads"):
        pc.Pipeline(pipeline.transformer, pipeline.encoder, pipeline.vae,
                    pc.PixArtControlNet.from_base(other, depth=1))


@pytest.mark.parametrize(("fields", "message"), [
    ({"control_mode": "loud"}, "balanced"), ({"control_strength": -1}, "0 or more"),
    ({"control_start": 0.6, "control_end": 0.5}, "smaller one first"),
    ({"control_end": 1.5}, "from 0 to 1"),
])
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        Settings("", **fields)


@pytest.mark.parametrize(("size", "target"), [((40, 100), (24, 24)), ((24, 24), (48, 96)),
                                              ((33, 17), (40, 8))])
def test_a_control_image_is_covered_and_cut(size, target):
    """Neither stretched nor bordered: the middle of the picture stays in the middle."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, size[0]), torch.linspace(-1, 1, size[1]),
                                   indexing="ij")
    out = fit_image(torch.stack([rows, columns])[None], *target)
    assert out.shape == (1, 2, *target)
    assert out.mean(dim=(2, 3)).abs().max() < 0.08
    scale = max(target[0] / size[0], target[1] / size[1])
    steps = (out[0, 0, -1, 0] - out[0, 0, 0, 0]) / (target[0] - 1)
    assert steps == pytest.approx(2 / ((size[0] - 1) * scale), rel=0.15)
    same = torch.rand(1, 3, 8, 8)
    assert fit_image(same, 8, 8) is same


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


def test_generate_with_control_and_again(command, control_file, edges, pipeline, tmp_path):
    """The picture keeps the ControlNet's hash and settings; --like needs the same files."""
    edges.save(tmp_path / "edges.png")
    options = ("generate", PROMPT, "--steps", 2, "--device", "cpu")
    control = ("--controlnet", control_file, "--control-image", "edges.png")
    done = command(*options, *control, "--control-strength", 0.5, "--control-end", 0.6, "-o",
                   "one.png")
    assert done.exit_code == 0, done.output
    drawn = np.asarray(Image.open("one.png"), np.int16)
    alone = pipeline.generate(PROMPT, steps=2, control_image=edges, control_strength=0.5,
                              control_end=0.6, guidance=STARTER.guidance)
    assert np.abs(drawn - np.asarray(alone, np.int16)).max() <= 1
    record = json.loads(Image.open("one.png").text["pixart"])
    assert record["files"]["controlnet"]["name"] == "control.safetensors"
    again = command("generate", "--like", "one.png", *control, "-o", "two.png")
    assert again.exit_code == 0, again.output
    assert (np.asarray(Image.open("two.png")) == np.asarray(Image.open("one.png"))).all()
    missing = command("generate", "--like", "one.png", "-o", "three.png")
    assert missing.exit_code == 2
    assert "--control" in missing.output


@pytest.mark.parametrize("options", [("--controlnet", "FILE"), ("--control-image", "PNG"),
                                     ("--hed", "FILE"), ("--control-strength", "0.3")])
def test_half_a_control_is_refused(command, control_file, edges, tmp_path, options):
    edges.save(tmp_path / "edges.png")
    named = {"FILE": control_file, "PNG": "edges.png"}
    done = command("generate", PROMPT, *(named.get(o, o) for o in options))
    assert done.exit_code == 2
    assert "--control" in done.output


def test_hed_makes_edges_of_the_control_image(command, control_file, edges, tmp_path):
    """With --hed the ControlNet sees edges, not the picture."""
    from pixart_core.model.hed import HEDDetector

    torch.manual_seed(0)
    detector = HEDDetector()
    pc.write_checkpoint(tmp_path / "hed.safetensors", detector.state_dict(), {})
    edges.save(tmp_path / "photo.png")
    control = ("--controlnet", control_file, "--control-image", "photo.png", "--steps", 1)
    for name, extra in (("plain.png", ()), ("edges.png", ("--hed", "hed.safetensors"))):
        done = command("generate", PROMPT, *control, *extra, "-o", name)
        assert done.exit_code == 0, done.output
    assert (np.asarray(Image.open("plain.png")) != np.asarray(Image.open("edges.png"))).any()
