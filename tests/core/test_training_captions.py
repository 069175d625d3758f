"""What captions of scenes say, and what they leave out."""

from __future__ import annotations

import re

import pytest

from pixart_core.training.scenes import (
    SceneSettings,
    caption_naming,
    captions,
    draw_scene,
    draw_scenes,
    full_caption,
)

MIXED = SceneSettings(128, ("1:1", "5:3", "3:5"), two=0.3, counts=0.3, corners=0.2)


def test_captions_say_what_is_drawn_and_only_what_they_claim() -> None:
    """Protects the words: named attributes are in the text, unnamed ones are not."""
    for number, scene in enumerate(draw_scenes(9, range(200), MIXED)):
        said = captions(scene, 9, number, 5)
        assert {"background", "color", "count", "shape"} <= said[0].named
        assert said[0].text == full_caption(scene, 9, number)
        for caption in said:
            words = caption.text.replace(",", "").split()
            for thing in scene.objects:
                assert thing.shape in caption.text
                assert ("color" in caption.named) <= (thing.color in words)
                assert ("size" in caption.named) == (thing.size in words and scene.kind != "count")
            assert ("background" in caption.named) == (scene.background in words)
            if scene.kind == "count":
                assert words.count({2: "two", 3: "three"}[len(scene.objects)]) == 1
            if "place" in caption.named and scene.kind == "one":
                assert all(w in words or (w == "centre" and "middle" in words)
                           for w in scene.place.split())


def test_only_the_centre_goes_without_saying() -> None:
    """Protects prompts without a place: they have one meaning, as in captions of photographs."""
    unsaid = [scene.place for number, scene in enumerate(draw_scenes(9, range(200)))
              for caption in captions(scene, 9, number) if "place" not in caption.named]
    assert set(unsaid) == {"centre"}
    assert len(unsaid) > 20


def test_relations_read_the_same_either_way_round() -> None:
    """Protects "A left of B" said as "B right of A"."""
    scene = draw_scene(0, 0, SceneSettings(two=1.0))
    a, b = (f"{o.size} {o.color} {o.shape}" for o in scene.objects)
    texts = {full_caption(scene, 0, n) for n in range(40)}
    ways = {"left": "left of", "right": "right of", "above": "(above|over)",
            "below": "(below|under)"}
    other = {"left": "right", "right": "left", "above": "below", "below": "above"}
    forward = re.compile(f"{a} (to the )?{ways[scene.relation]} an? {b}")
    backward = re.compile(f"{b} (to the )?{ways[other[scene.relation]]} an? {a}")
    assert all(bool(forward.search(t)) != bool(backward.search(t)) for t in texts)
    assert any(forward.search(t) for t in texts) and any(backward.search(t) for t in texts)


def test_captions_of_chosen_attributes() -> None:
    """Protects prompts for control, which must leave size and place open."""
    for number, scene in enumerate(draw_scenes(2, range(30))):
        caption = caption_naming(scene, ("background", "color"), 2, number)
        assert caption.named == {"background", "color", "shape", "count"}
        assert scene.objects[0].size not in caption.text
    with pytest.raises(ValueError, match="smell"):
        caption_naming(scene, ("smell",))
