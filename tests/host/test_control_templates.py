"""The ControlNet templates: the same shape in new colours, and two shapes from two hints."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from workflow import load

from pixart_core.training.detect import find_parts

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "workflows" / "api"
REDRAWN = ["PixArt-alpha ControlNet HED", "PixArt-delta ControlNet HED LCM"]
TWO = "PixArt two ControlNets"


def nodes_of(prompt, kind):
    return {number: node for number, node in prompt.items() if node["class_type"] == kind}


def picture(host, result, node):
    [saved] = result.images(node)
    pixels = np.array(host.picture(saved).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def shown(host, name, **changes):
    """(first picture, edges or drawing by title, result) of a template.

    `changes` are given to every PixArtControlNetApply.
    """
    prompt = load(FOLDER / f"{name}.json")
    for node in nodes_of(prompt, "PixArtControlNetApply").values():
        node["inputs"].update(changes)
    result = host.run(prompt)
    previews = {node["_meta"]["title"]: picture(host, result, number)
                for number, node in nodes_of(prompt, "PreviewImage").items()}
    return previews, picture(host, result, next(iter(nodes_of(prompt, "SaveImage"))))


def shape_mask(image):
    """Where a picture (3, H, W) shows something that is no background, (H, W) bool."""
    parts = find_parts(image[None])
    inside = (parts.alpha > 0.5).any(0)
    return functional.interpolate(inside[None, None].float(), size=image.shape[-2:])[0, 0] > 0


def overlap(one, other):
    return ((one & other).sum() / (one | other).sum()).item()


@pytest.mark.parametrize("name", REDRAWN)
def test_the_shape_stays_where_the_colours_are_new(host, name):
    """Without control the same seed and prompt put it elsewhere or make it another size."""
    previews, steered = shown(host, name)
    wanted = shape_mask(previews["First picture"])
    _, plain = shown(host, name, strength=0.0)
    found = overlap(shape_mask(steered), wanted)
    assert found > 0.8
    assert found > overlap(shape_mask(plain), wanted) + 0.1


def test_two_controls_draw_both_shapes(host):
    """The picture's shape and the drawing's, of which each covers most of its own place."""
    previews, steered = shown(host, TWO)
    found = shape_mask(steered)
    first = shape_mask(previews["First picture"])
    rows, columns = (previews["As a hint"][0] > 0.5).nonzero(as_tuple=True)
    drawn = torch.zeros_like(first)
    drawn[rows.min():rows.max() + 1, columns.min():columns.max() + 1] = True
    assert overlap(found, first | drawn) > 0.6
    for shape in (first, drawn):
        assert (found & shape).sum() > 0.6 * shape.sum()
