"""The starter's ControlNet and edge detector: they load, and pictures follow the edges."""

import sys
from pathlib import Path

import pytest
import torch

import pixart_core as pc
from pixart_core.starter import find_starter

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.control_score import edge_f1, find_edges, outline, sample, shape_mask  # noqa: E402
from benchmarks.scenes import coverage, render, signed_distance  # noqa: E402
from benchmarks.score import detect  # noqa: E402

STARTER = find_starter()
PLACES = [("circle", 20.0, 22.0, 11.0), ("square", 42.0, 40.0, 13.0),
          ("circle", 34.0, 42.0, 16.0), ("square", 22.0, 36.0, 10.0)]
PROMPTS = ["a red circle on a white background", "a yellow square on a blue background",
           "a blue circle on a yellow background", "a green square on a white background"]
COLORS = [("red", "white"), ("yellow", "blue"), ("blue", "yellow"), ("green", "white")]


def scenes():
    return [{"two": False, "bg": "black",
             "objs": [{"color": "white", "shape": shape, "cx": cx, "cy": cy, "r": r}]}
            for shape, cx, cy, r in PLACES]


def wanted(i):
    """The edges that picture i should have."""
    shape, *place = PLACES[i]
    return outline(coverage(shape, *(torch.tensor([value]) for value in place))[0] > 0.5)


def followed(transformer):
    """(edge F1 with control, without, what the pictures with control show) over the four hints."""
    pipeline = pc.Pipeline.from_files(transformer, STARTER.t5, STARTER.vae, device="cpu",
                                      controlnet=STARTER.controlnet)
    scores, pictures = [], None
    for edges in (None, find_edges(STARTER, scenes())):
        pictures = sample(pipeline, PROMPTS, seed=0, edges=edges)
        scores.append(sum(edge_f1(outline(shape_mask(picture)), wanted(i))
                          for i, picture in enumerate(pictures)) / len(pictures))
    seen = [detect(picture) for picture in pictures]
    return scores[1], scores[0], [(s["objs"][0]["color"], s["bg"]) for s in seen]


def test_pictures_follow_edges_and_keep_the_prompts_colours():
    """Protects the ControlNet templates' promise, in the engine."""
    steered, plain, colors = followed(STARTER.transformer)
    assert steered > 0.65
    assert steered > plain + 0.25
    assert colors == COLORS


def test_the_lcm_student_follows_them_too():
    """4 steps without guidance; the ControlNet was trained on both."""
    steered, plain, _ = followed(STARTER.lcm)
    assert steered > 0.65
    assert steered > plain + 0.25


@pytest.mark.parametrize("size", [64, 128, 200])
def test_edges_are_thin_lines_on_the_outline(size):
    """At the starter's size and above it, on a noisy ramp of grey: nearly all bright pixels lie
    within two of the outline, which they cover."""
    detector = pc.HEDDetector.from_path(STARTER.hed)
    scale = size / 64
    image = render(scenes()[1:2], size, jitter=0.0)
    ramp = torch.linspace(0, 0.25, size).expand(1, 3, size, size)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    edges = detector((image * 0.7 + ramp + 0.02 * noise).clamp(0, 1))[0, 0] > 0.5
    shape, cx, cy, r = PLACES[1]
    grid = torch.arange(size) + 0.5
    y, x = torch.meshgrid(grid - cy * scale, grid - cx * scale, indexing="ij")
    distance = signed_distance(shape, x[None], y[None], torch.tensor([[[r * scale]]]))[0].abs()
    assert (distance[edges] < 2).float().mean() > 0.95
    assert edges[distance < 0.5].float().mean() > 0.8
