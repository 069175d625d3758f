"""The package's own data set: what a seed draws, how it looks, what a folder of it holds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re

import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d
from typer.testing import CliRunner

from pixart_core.commands import app
from pixart_core.training.scenes import (
    COLORS,
    PLACES,
    SHAPES,
    ExportSettings,
    Scene,
    SceneObject,
    SceneSettings,
    captions,
    color_shifts,
    draw_scene,
    draw_scenes,
    export_scenes,
    held_out,
    outline,
    picture_size,
    render,
)
from pixart_core.training.scenes.draw import Dice
from pixart_core.training.scenes.shapes import EXTENTS
from pixart_core.training.score import place_word

MIXED = SceneSettings(128, ("1:1", "5:3", "3:5"), two=0.3, counts=0.3, corners=0.2)
PINNED = {"train": "78b1ee4085d13a47", "held_out": "71820af7ba56b67d"}


def _digest(split: str) -> str:
    told = [[scene.to_dict(), [c.text for c in captions(scene, 3, number)]]
            for number, scene in enumerate(draw_scenes(3, range(64), MIXED, split))]
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()


@pytest.mark.parametrize("split", list(PINNED))
def test_a_seed_names_the_same_scenes_and_captions_for_ever(split: str) -> None:
    """Protects trained models and published figures: scenes and words, byte for byte."""
    assert _digest(split) == PINNED[split]


def test_a_scene_depends_on_its_own_number_alone() -> None:
    """Protects data sets that grow, and captions: neighbours are drawn independently."""
    scenes = draw_scenes(0, range(20), MIXED, "train")
    assert draw_scene(0, 13, MIXED, "train") == scenes[13]
    assert captions(scenes[13], 0, 13, 6)[:4] == captions(scenes[13], 0, 13, 4)
    assert draw_scenes(1, range(20), MIXED, "train") != scenes


def test_the_split_is_clean_and_about_a_tenth() -> None:
    """Protects the held-out prompts: no training draw shares their attribute combination."""
    train = {s.key for s in draw_scenes(0, range(1500), MIXED, "train")}
    kept = {s.key for s in draw_scenes(0, range(300), MIXED, "held_out")}
    assert not train & kept and len(kept) > 40
    assert 0.07 < sum(held_out(str(i)) for i in range(4000)) / 4000 < 0.13


def test_every_word_is_drawn_for_training() -> None:
    """Protects the vocabulary: no colour, shape, place or count is missing from what is learned."""
    scenes = draw_scenes(0, range(1500), MIXED, "train")
    assert {o.color for s in scenes for o in s.objects} == set(COLORS)
    assert {s.background for s in scenes} == set(COLORS)
    assert {o.shape for s in scenes for o in s.objects} == set(SHAPES)
    assert {s.place for s in scenes} == {*PLACES, None}
    assert {s.relation for s in scenes} == {"left", "right", "above", "below", None}
    assert {len(s.objects) for s in scenes if s.kind == "count"} == {2, 3}


@pytest.mark.parametrize("image_size", [64, 128, 256])
def test_objects_are_inside_apart_and_large_enough(image_size: int) -> None:
    """Protects what a VAE of 8 px cells can hold: two cells of radius at 128 px, none cut off."""
    settings = dataclasses.replace(MIXED, image_size=image_size, ratios=("1:1", "2:1", "1:2"))
    for scene in draw_scenes(5, range(300), settings):
        boxes = [(o.x - EXTENTS[o.shape][0] * o.radius, o.y - EXTENTS[o.shape][1] * o.radius,
                  o.x + EXTENTS[o.shape][0] * o.radius, o.y + EXTENTS[o.shape][1] * o.radius)
                 for o in scene.objects]
        for left, top, right, bottom in boxes:
            assert left > 0 and top > 0 and right < scene.width and bottom < scene.height
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                gap = max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])
                assert gap > 0.06 * scene.length
        assert all(o.radius >= 16 / 128 * scene.length for o in scene.objects)
        assert all(o.color != scene.background for o in scene.objects)


def test_pairs_and_counts_are_what_they_are_called() -> None:
    """Protects relations and numbers in captions against the drawing."""
    for scene in draw_scenes(6, range(300), SceneSettings(two=0.5, counts=0.5)):
        a, b = scene.objects[:2]
        if scene.kind == "two":
            assert (a.color, a.shape) != (b.color, b.shape)
            assert {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y,
                    "below": a.y > b.y}[scene.relation]
        else:
            assert len({(o.color, o.shape, o.radius) for o in scene.objects}) == 1


def test_spread_keeps_objects_near_their_middles() -> None:
    """Protects the scenes small models learn from: a tenth of the spread is a tenth of the
    distances, none leaves one picture for each wording, and all other draws are the same."""
    drawn = {spread: draw_scenes(7, range(200), SceneSettings(spread=spread))
             for spread in (0.0, 0.1, 1.0)}
    assert [(s.key, s.place) for s in drawn[0.0]] == [(s.key, s.place) for s in drawn[1.0]]
    for middle, near, far in zip(*drawn.values(), strict=True):
        a, b, c = (scene.objects[0] for scene in (middle, near, far))
        assert b.radius - a.radius == pytest.approx(0.1 * (c.radius - a.radius), abs=0.02)
        if a.shape in ("circle", "square"):  # the room of others depends on their radius
            for axis in ("x", "y"):
                moved = getattr(c, axis) - getattr(a, axis)
                assert abs(getattr(b, axis) - getattr(a, axis)) <= 0.1 * abs(moved) + 0.5
    places = {(s.place, s.objects[0].shape, s.objects[0].size): (s.objects[0].x, s.objects[0].y)
              for s in drawn[0.0]}
    assert all((s.objects[0].x, s.objects[0].y) == places[s.place, s.objects[0].shape,
                                                          s.objects[0].size] for s in drawn[0.0])


@pytest.mark.parametrize("ratio", ["1:1", "5:3"])
def test_single_objects_stand_on_the_grid(ratio) -> None:
    """Protects the alignment to tokens, and to latent cells where a token has no room; the words
    stay true, nothing leaves the picture and all other draws are the same."""
    settings = SceneSettings(ratios=(ratio,), corners=0.2, spread=0.1)
    free = draw_scenes(7, range(300), settings)
    aligned = draw_scenes(7, range(300), dataclasses.replace(settings, grid=True))
    assert [s.key for s in aligned] == [s.key for s in free]
    steps = set()
    for scene, other in zip(aligned, free, strict=True):
        thing, was = scene.objects[0], other.objects[0]
        assert place_word(thing.x, thing.y, scene.width, scene.height) == scene.place
        for side, at, before, extent in zip((scene.width, scene.height), (thing.x, thing.y),
                                            (was.x, was.y), EXTENTS[thing.shape], strict=True):
            offset = abs(at - side / 2)
            assert offset % 8 == 0 and abs(at - before) <= 8.01
            assert offset + extent * thing.radius <= side / 2
            steps.add(offset % 16)
    assert steps == {0, 8}


def test_a_token_comes_before_a_cell_on_the_grid() -> None:
    """Protects the coarser line, where it has room, and the distance itself where none has."""
    dice = Dice(0, grid=True)
    assert [dice.on_grid(*at) for at in ((27, 20, 40), (27, 20, 31), (29.5, 29, 30))] == [
        32, 24, 29.5]
    assert Dice(0).on_grid(27, 20, 40) == 27


def test_spread_holds_pairs_near_too() -> None:
    """Protects scenes of two: without a spread one relation of two kinds is one picture."""
    places: dict[object, set[tuple[float, ...]]] = {}
    for scene in draw_scenes(8, range(1500), SceneSettings(two=1.0, spread=0.0)):
        kinds = tuple((o.shape, o.size) for o in scene.objects)
        spots = tuple(v for o in scene.objects for v in (o.x, o.y, o.radius))
        places.setdefault((scene.relation, kinds), set()).add(spots)
    assert len(places) < 1200 and all(len(spots) == 1 for spots in places.values())


def test_a_set_of_other_scenes_does_not_go_on(tmp_path) -> None:
    """Protects sets that are there: with another spread, or drawn by an older version."""
    settings = _export(4)
    export_scenes(tmp_path / "set", settings)
    narrow = dataclasses.replace(settings.scenes, spread=0.5)
    with pytest.raises(ValueError, match="another folder"):
        export_scenes(tmp_path / "set", dataclasses.replace(settings, scenes=narrow))
    file = tmp_path / "set" / "scenes.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {"version": facts["version"] - 1}))
    with pytest.raises(ValueError, match="another folder"):
        export_scenes(tmp_path / "set", settings)


def test_picture_sizes_are_multiples_of_16_of_one_area() -> None:
    """Protects the aspect-ratio buckets."""
    assert [picture_size(128, r) for r in ("1:1", "5:3", "3:5")] == [
        (128, 128), (160, 96), (96, 160)]
    for ratio in ("4:3", "2:1", "1:2"):
        width, height = picture_size(192, ratio)
        assert width % 16 == height % 16 == 0 and abs(math.sqrt(width * height) / 192 - 1) < 0.08


@pytest.mark.parametrize(("change", "word"), [
    ({"ratios": ("9:1",)}, "9:1"), ({"ratios": ("wide",)}, "wide"), ({"image_size": 100}, "100"),
    ({"two": 0.7, "counts": 0.5}, "together"), ({"corners": 2.0}, "corners"),
    ({"spread": -0.1}, "spread"),
    ({"ratios": ()}, "no ratios"),
])
def test_settings_that_cannot_be_drawn_are_named(change: dict, word: str) -> None:
    """Protects the messages for wrong settings."""
    with pytest.raises(ValueError, match=word):
        SceneSettings(**change)


def test_scenes_survive_json_and_are_checked() -> None:
    """Protects captions.jsonl: a scene read back is the scene, and nonsense is refused."""
    for scene in draw_scenes(8, range(30), MIXED):
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene
    one = draw_scene(0, 0)
    with pytest.raises(ValueError, match="hexagon"):
        SceneObject("red", "hexagon", "small", 1, 1, 1)
    with pytest.raises(ValueError, match="relation"):
        dataclasses.replace(one, relation="left")
    with pytest.raises(ValueError, match="objects"):
        dataclasses.replace(one, objects=one.objects * 2)
    with pytest.raises(ValueError, match="not a scene"):
        Scene.from_dict({"width": 64})


def test_renders_are_the_same_picture_at_every_scale() -> None:
    """Protects the renderer: pixel centres, distances and anti-aliasing at two resolutions."""
    scenes = draw_scenes(4, range(24), dataclasses.replace(MIXED, ratios=("5:3",)))
    small = render(scenes)
    large = avg_pool2d(render([s.scaled(2) for s in scenes]), 2)
    assert small.shape == (24, 3, 96, 160) and 0 <= small.min() <= small.max() <= 1
    assert (large - small).abs().mean() < 0.002
    assert (large - small).abs().max() < 0.3


def test_a_render_has_the_colours_of_its_scene() -> None:
    """Protects the palette: rim and middle of a circle."""
    thing = SceneObject("red", "circle", "large", 64, 64, 30)
    image = render([Scene(128, 128, "one", "blue", (thing,), place="centre")])[0]
    for (y, x), name in (((2, 2), "blue"), ((64, 64), "red"), ((64, 92), "red"),
                         ((64, 95), "blue")):
        assert torch.allclose(image[:, y, x] * 255, torch.tensor(COLORS[name]).float(), atol=1e-3)


def test_colour_shifts_are_small_and_follow_their_seed() -> None:
    """Protects the repeatable jitter of exported pictures."""
    scene = draw_scene(0, 1)
    shifts = color_shifts([5, 6, 5])
    assert torch.equal(shifts[0], shifts[2]) and not torch.equal(shifts[0], shifts[1])
    moved = (render([scene], shifts[:1]) - render([scene])).abs().max()
    assert 0 < moved <= 2.01 / 255


def test_outlines_run_where_the_colour_changes() -> None:
    """Protects control images: lines on every edge, black elsewhere, also inside a ring."""
    scenes = draw_scenes(11, range(48), SceneSettings(two=0.4, counts=0.3))
    lines, image = outline(scenes)[:, 0], render(scenes)
    step = torch.zeros_like(lines)
    for axis in (1, 2):
        change = (image.narrow(axis + 1, 1, 127) - image.narrow(axis + 1, 0, 127)).norm(dim=1)
        step.narrow(axis, 1, 127).add_(change)
    assert (lines[step > 0.4] > 0.2).all()
    assert 0.02 < (lines > 0.5).float().mean() < 0.15
    assert set(lines.unique()[[0, -1]].tolist()) == {0.0, 1.0}


def test_renders_of_several_sizes_are_refused() -> None:
    """Protects the message for scenes that do not fit one batch."""
    with pytest.raises(ValueError, match="96 x 160"):
        render([draw_scene(0, 0), draw_scene(0, 0, SceneSettings(ratios=("3:5",)))])


def _export(count: int = 40, **changes: object) -> ExportSettings:
    scenes = SceneSettings(64, ("1:1", "5:3"), two=0.3, counts=0.2)
    return ExportSettings(count, seed=2, scenes=scenes, outlines=True, **changes)


def test_an_export_holds_what_its_lines_say(tmp_path) -> None:
    """Protects the data set's format: pictures, captions, scenes and outlines belong together."""
    lines = export_scenes(tmp_path / "set", _export())
    entries = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(entries) == 40
    for number, entry in enumerate(entries):
        scene = Scene.from_dict(entry["scene"])
        assert scene == draw_scene(2, number, _export().scenes, "train")
        assert entry["text"] == [c.text for c in captions(scene, 2, number)]
        with Image.open(lines.parent / entry["file_name"]) as picture:
            assert picture.size == (scene.width, scene.height) and picture.mode == "RGB"
            near = picture.getpixel((1, 1))
        assert max(abs(a - b) for a, b in zip(near, COLORS[scene.background], strict=True)) <= 3
        with Image.open(lines.parent / entry["control"]) as hint:
            assert hint.size == (scene.width, scene.height) and hint.mode == "L"


def test_captions_of_an_export_name_what_they_are_told_to(tmp_path) -> None:
    """Protects sets to train a ControlNet on: colours in words, everything else in the outline."""
    settings = _export(30, phrasings=3, named=("background", "color"))
    entries = [json.loads(line) for line in
               export_scenes(tmp_path / "set", settings).read_text().splitlines()]
    texts = [text for entry in entries for text in entry["text"] if entry["scene"]["kind"] != "two"]
    for entry in entries:
        scene = Scene.from_dict(entry["scene"])
        for text in entry["text"]:
            assert scene.background in text and scene.objects[0].color in text
            assert scene.objects[0].shape in text
    assert not [t for t in texts if re.search("large|small|left|right|top|bottom|cent", t)]
    assert len(set(texts)) > 30  # three phrasings each
    with pytest.raises(ValueError, match="named is colour; use background, count, color"):
        _export(named=("colour",))


def test_an_interrupted_export_goes_on_and_ends_the_same(tmp_path) -> None:
    """Protects resuming: missing pictures come back equal, and whole sets are left alone."""
    lines = export_scenes(tmp_path / "set", _export())
    before = {p.name: p.read_bytes() for p in (tmp_path / "set").rglob("*.png")}
    text = lines.read_bytes()
    lines.unlink()
    for name in ("000003.png", "000027.png"):
        (tmp_path / "set" / "images" / name).unlink()
    assert export_scenes(tmp_path / "set", _export()).read_bytes() == text
    assert {p.name: p.read_bytes() for p in (tmp_path / "set").rglob("*.png")} == before
    picture = tmp_path / "set" / "images" / "000000.png"
    picture.write_bytes(b"kept")
    export_scenes(tmp_path / "set", _export())
    assert picture.read_bytes() == b"kept"


def test_an_export_does_not_mix_with_anything_else(tmp_path) -> None:
    """Protects a folder of other settings, or of other files, from being written into."""
    export_scenes(tmp_path / "set", _export(4))
    with pytest.raises(ValueError, match="another folder"):
        export_scenes(tmp_path / "set", _export(4, split="all"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="another folder"):
        export_scenes(tmp_path / "mine", _export(4))
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["letter.txt"]


def test_the_command_writes_a_set_and_refuses_another(tmp_path) -> None:
    """Protects `pixart train scenes`: its options reach the settings, errors are one line."""
    folder = str(tmp_path / "set")
    arguments = ["train", "scenes", folder, "--count", "6", "--image-size", "64", "--two", "0.5",
                 "--ratios", "5:3,3:5", "--edges", "--spread", "0.5", "--grid"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    entries = [json.loads(line) for line in
               (tmp_path / "set" / "captions.jsonl").read_text().splitlines()]
    scenes = json.loads((tmp_path / "set" / "scenes.json").read_text())["scenes"]
    assert (scenes["spread"], scenes["grid"]) == (0.5, True)
    assert {(e["scene"]["width"], e["scene"]["height"]) for e in entries} == {(80, 48), (48, 80)}
    assert all((tmp_path / "set" / e["control"]).is_file() for e in entries)
    again = CliRunner().invoke(app, [*arguments, "--seed", "1"])
    assert again.exit_code == 1 and "another folder" in again.output + again.stderr
