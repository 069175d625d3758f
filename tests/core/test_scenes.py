"""The scenes the starter was trained on: the same draws, pictures and scores as at its training."""

import hashlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "scenes.json").read_text())


@pytest.fixture(scope="module")
def scenes():
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from benchmarks import scenes

    return scenes


@pytest.fixture(scope="module")
def score(scenes):
    from benchmarks import score

    return score


def _drawn(scenes, kind):
    rng = random.Random(5)
    drawn = [scenes.sample_scene(rng, True, 0.5 * (kind == "mixed")) for _ in range(128)]
    return drawn, [scenes.caption(scene, rng) for scene in drawn]


@pytest.mark.parametrize("kind", ["single", "mixed"])
def test_a_seed_names_the_same_scenes_and_captions(scenes, kind):
    """Protects the held-out prompts behind every published figure: 128 scenes, byte for byte."""
    drawn, captions = _drawn(scenes, kind)
    assert captions[:6] == GOLDEN[kind]["captions"]
    for scene, caption, wanted in zip(drawn, captions, GOLDEN[kind]["hashes"], strict=True):
        text = json.dumps(scene, sort_keys=True) + caption
        assert hashlib.md5(text.encode()).hexdigest()[:12] == wanted


@pytest.mark.parametrize("kind", ["single", "mixed"])
def test_renders_are_the_training_pictures(scenes, kind):
    """Protects the renderer: whole-picture and top-left-quarter means of 128 scenes."""
    drawn, _ = _drawn(scenes, kind)
    image = scenes.render(drawn, jitter=0)
    assert image.min() >= 0 and image.max() <= 1
    means = torch.tensor(GOLDEN[kind]["means"])
    quarter = torch.tensor(GOLDEN[kind]["top_left_mean"])
    assert torch.allclose(image.mean((1, 2, 3)), means, atol=2e-5)
    assert torch.allclose(image[:, :, :32, :32].mean((1, 2, 3)), quarter, atol=2e-5)


def test_render_scales_and_jitters_from_its_generator(scenes):
    """Protects renders at other sizes and the repeatable colour jitter."""
    drawn, _ = _drawn(scenes, "single")
    small = scenes.render(drawn[:4], jitter=0)
    large = scenes.render(drawn[:4], size=128, jitter=0)
    assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 0.01
    jittered = [scenes.render(drawn[:4], generator=torch.Generator().manual_seed(1))
                for _ in range(2)]
    assert torch.equal(*jittered)
    assert 0 < (jittered[0] - small).abs().max() <= 2.01 / 255


def test_the_detector_reads_true_renders_without_a_mistake(scenes, score):
    """Protects the ruler itself: 100 % on pictures whose content is known."""
    drawn, _ = _drawn(scenes, "single")
    means = score.report(drawn[:64], scenes.render(drawn[:64], jitter=0))["single"]
    assert all(means[name] == 1.0 for name in (*score.ATTRIBUTES, "all"))


def test_the_detector_sees_what_is_wrong(scenes, score):
    """Protects against a detector that passes everything: each wrong attribute is marked."""
    scene = {"two": False, "bg": "blue", "pos": "left",
             "objs": [{"color": "red", "shape": "circle", "size": "large", "r": 16.0,
                       "cx": 20.0, "cy": 32.0}]}
    image = scenes.render([scene], jitter=0)[0]
    assert score.score(scene, image)["all"] == 1.0
    for change, attribute in (({"bg": "green"}, "bg"), ({"pos": "right"}, "pos")):
        result = score.score({**scene, **change}, image)
        assert result[attribute] == 0.0 and result["all"] == 0.0
    for change, attribute in (({"color": "yellow"}, "color"), ({"shape": "star"}, "shape"),
                              ({"size": "small"}, "size")):
        wanted = {**scene, "objs": [{**scene["objs"][0], **change}]}
        result = score.score(wanted, image)
        assert result[attribute] == 0.0 and result["all"] == 0.0
    empty = score.score(scene, torch.full((3, 64, 64), 0.5))
    assert empty["count"] == 0.0 and empty["all"] == 0.0 and empty["color"] == 0.0


def test_pairs_are_matched_in_the_order_that_fits(scenes, score):
    """Protects two-object scenes: both found, the relation read, the order immaterial."""
    pairs = [s for s in _drawn(scenes, "mixed")[0] if s["two"]][:12]
    images = scenes.render(pairs, jitter=0)
    for pair, image in zip(pairs, images, strict=True):
        assert score.score(pair, image)["all"] == 1.0
        swapped = {**pair, "objs": pair["objs"][::-1]}
        result = score.score(swapped, image)
        assert result["color"] == 1.0 or result["shape"] == 1.0
        assert result["pos"] == 0.0 or result["color"] < 1.0 or result["shape"] < 1.0


def test_held_out_splits_cleanly(scenes):
    """Protects the split: about a tenth is held out, and training never draws from it."""
    share = sum(scenes.held_out(f"{i}") for i in range(5000)) / 5000
    assert 0.08 < share < 0.12
    rng = random.Random(0)
    for _ in range(50):
        scene = scenes.sample_scene(rng, want_held=False)
        o = scene["objs"][0]
        assert not scenes.held_out(f"{scene['bg']}|{o['color']}{o['shape']}")


def test_unknown_shapes_are_named(scenes):
    """Protects the error message for a typo in a hand-written scene."""
    with pytest.raises(ValueError, match="hexagon"):
        scenes.signed_distance("hexagon", *torch.zeros(3, 1, 2, 2))
