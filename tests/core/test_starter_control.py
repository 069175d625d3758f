"""The starter's ControlNet and edge detector: they load, and pictures follow the edges."""

import sys
from pathlib import Path

import pytest
import torch

import pixart_core as pc
from pixart_core.starter import find_starter
from pixart_core.training.evaluate import DrawSettings, evaluate_control
from pixart_core.training.scenes import Scene, SceneObject, render
from pixart_core.training.scenes.shapes import signed_distance

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.control_score import prompts_for  # noqa: E402
from benchmarks.held_out import SQUARE  # noqa: E402

STARTER = find_starter()
COUNT = 6


def followed(transformer, settings, count=COUNT, wrong=False):
    """Scores without and with control on the edges that the starter's HED finds.

    The words say neither size nor place; with `wrong` they name another shape, size and place.
    """
    pipeline = pc.Pipeline.from_files(transformer, STARTER.t5, STARTER.vae, device="cpu",
                                      controlnet=STARTER.controlnet)
    return evaluate_control(pipeline, prompts_for(count, 1000, wrong), settings, (0.0, 1.0),
                            pc.HEDDetector.from_path(STARTER.hed))


def test_pictures_follow_edges_and_keep_the_prompts_colours():
    """Protects the ControlNet templates' promise, in the engine."""
    settings = DrawSettings(steps=STARTER.steps, guidance=STARTER.guidance)
    plain, steered = followed(STARTER.transformer, settings)
    assert steered.f1 > 0.65
    assert steered.f1 > plain.f1 + 0.25
    shares = steered.report.rows["all"]
    assert shares["color"].mean >= 5 / 6 and shares["background"].mean >= 5 / 6


def test_the_lcm_student_follows_them_too():
    """4 steps without guidance, on the ControlNet of the base model."""
    plain, steered = followed(STARTER.lcm, DrawSettings(steps=STARTER.lcm_steps))
    assert steered.f1 > 0.65
    assert steered.f1 > plain.f1 + 0.25


def test_the_students_edges_come_from_the_hint_against_the_words():
    """They follow less well then, yet far better than without control."""
    plain, steered = followed(STARTER.lcm, DrawSettings(steps=STARTER.lcm_steps), 24, wrong=True)
    assert steered.f1 > 2 * plain.f1
    assert steered.report.rows["all"]["color"].mean >= 5 / 6


def test_prompts_with_wrong_words_ask_for_colours_alone():
    """Protects the table of control_score: geometry of one scene, colours and words of another."""
    right, wrong = (prompts_for(4, 1000, words) for words in (False, True))
    for one, other in zip(right, wrong, strict=True):
        assert one.scene == other.scene
        assert (one.scene.width, one.scene.height) == (SQUARE.image_size, SQUARE.image_size)
        color = one.scene.objects[0].color
        assert all(color in p.caption.text and p.scene.background in p.caption.text
                   for p in (one, other))
        assert other.caption.named == {"background", "color"}
        assert one.scene.objects[0].shape in one.caption.text
        assert "place" not in one.caption.named


@pytest.mark.parametrize("size", [64, 128, 200])
def test_edges_are_thin_lines_on_the_outline(size):
    """At the starter's size, below and above it, on a noisy ramp of grey: nearly all bright pixels
    lie within two of the outline, which they cover."""
    detector = pc.HEDDetector.from_path(STARTER.hed)
    x, y, radius = (part * size / 64 for part in (42.0, 40.0, 13.0))
    square = SceneObject("white", "square", "large", x, y, radius)
    image = render([Scene(size, size, "one", "black", (square,), place="bottom right")])
    ramp = torch.linspace(0, 0.25, size).expand(1, 3, size, size)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    edges = detector((image * 0.7 + ramp + 0.02 * noise).clamp(0, 1))[0, 0] > 0.5
    grid = torch.arange(size) + 0.5
    rows, columns = torch.meshgrid((grid - y) / radius, (grid - x) / radius, indexing="ij")
    distance = (signed_distance("square", columns, rows) * radius).abs()
    assert (distance[edges] < 2).float().mean() > 0.95
    assert edges[distance < 0.5].float().mean() > 0.8
