"""The judge of drawn scenes: right about true pictures, strict about wrong ones."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pixart_core.commands import app
from pixart_core.training.components import connected
from pixart_core.training.detect import detect, detect_all
from pixart_core.training.evaluate import (
    DrawSettings,
    Prompt,
    ceiling,
    draw_pictures,
    edge_agreement,
    evaluate,
    evaluate_control,
    held_out_prompts,
    report,
    score,
)
from pixart_core.training.judge import DISTURBANCES, renders
from pixart_core.training.scenes import (
    SHAPES,
    Scene,
    SceneObject,
    SceneSettings,
    draw_scenes,
    held_out,
    outline,
    render,
)
from pixart_core.training.score import COLUMNS, Share, place_word

MIXED = SceneSettings(128, ("1:1", "5:3", "3:5"), two=0.35, counts=0.35, corners=0.2)


def _one(**changes: object) -> Scene:
    thing = SceneObject("red", "circle", "large", 40, 64, 33)
    return Scene(128, 128, "one", "blue", (dataclasses.replace(thing, **changes),), place="left")


def _picture(scene: Scene) -> torch.Tensor:
    return render([scene])[0]


def _means(scenes, images) -> dict[str, float]:
    return {name: share.mean for name, share in report(scenes, images).rows["all"].items()}


@pytest.mark.parametrize("settings", [
    MIXED, dataclasses.replace(MIXED, image_size=64), dataclasses.replace(MIXED, image_size=256)],
    ids=["128", "64", "256"])
def test_true_renders_are_read_without_a_mistake(settings: SceneSettings) -> None:
    """Protects the ruler itself: 100 % at every kind, ratio and size."""
    scenes = draw_scenes(21, range(60), settings, "held_out")
    means = _means(scenes, renders(scenes, jitter=4.0))
    assert set(means) == set(COLUMNS) and set(means.values()) == {1.0}


@pytest.mark.parametrize("name", [n for n in DISTURBANCES if n != "clean"])
def test_mild_blur_noise_and_jpeg_change_nothing(name: str) -> None:
    """Protects the ruler on pictures that went through a VAE: at most one in 80 misread."""
    scenes = draw_scenes(22, range(80), MIXED, "held_out")
    images = [DISTURBANCES[name](image, scene, i)
              for i, (image, scene) in enumerate(zip(renders(scenes), scenes, strict=True))]
    assert _means(scenes, images)["all"] >= 79 / 80


@pytest.mark.parametrize("shape", SHAPES)
def test_where_and_how_large_is_measured_to_a_pixel(shape: str) -> None:
    """Protects radius, middle and box of every shape, beside the words for them."""
    seen = detect(_picture(_one(shape=shape, x=41.3, y=70.6, radius=32.2)))
    [found] = seen.objects
    assert (seen.background, found.color, found.shape, found.size) == (
        "blue", "red", shape, "large")
    for value, wanted in ((found.x, 41.3), (found.y, 70.6), (found.radius, 32.2)):
        assert value == pytest.approx(wanted, abs=0.5)
    assert found.box[0] < found.x < found.box[2] and found.box[1] < found.y < found.box[3]
    assert found.confidence > 0.8


@pytest.mark.parametrize(("change", "attribute"), [
    ({"color": "orange"}, "color"), ({"color": "purple"}, "color"), ({"shape": "square"}, "shape"),
    ({"shape": "ring"}, "shape"), ({"size": "small", "radius": 18}, "size"), ({"x": 64}, "place"),
    ({"x": 88}, "place"), ({"x": 36, "y": 36}, "place"),
])
def test_a_wrong_attribute_is_seen_and_only_that(change: dict, attribute: str) -> None:
    """Protects against a judge that passes everything: the picture differs in one attribute."""
    result = score(_one(), _picture(_one(**change)))
    wrong = {name for name in COLUMNS if getattr(result, name) != 1}
    assert wrong == {attribute, "all"}


def test_a_wrong_background_and_wrong_numbers_are_seen() -> None:
    """Protects background and count."""
    green = score(_one(), _picture(dataclasses.replace(_one(), background="green")))
    assert green.background == 0 and green.color == 1 and green.all == 0
    [scene] = draw_scenes(1, [0], SceneSettings(counts=1.0))
    for objects in (scene.objects[:1], scene.objects * 2):
        picture = render([Scene(128, 128, "one", scene.background, objects[:1],
                                place="centre")])[0]
        assert score(scene, picture).count == 0
    two = dataclasses.replace(scene, objects=scene.objects[:2])
    assert score(two, _picture(two)).all == 1
    assert score(_one(), _picture(two)).count == 0


def test_a_pair_is_wrong_when_swapped_or_mixed() -> None:
    """Protects relations, and attributes that went to the wrong object."""
    settings = SceneSettings(two=1.0)
    other = {"left": "right", "right": "left", "above": "below", "below": "above"}
    for scene in draw_scenes(3, range(12), settings):
        a, b = scene.objects
        turned = dataclasses.replace(scene, relation=other[scene.relation])
        assert score(turned, _picture(scene)).place == 0
        if a.color != b.color and a.shape != b.shape:
            mixed = dataclasses.replace(scene, objects=(
                dataclasses.replace(a, color=b.color), dataclasses.replace(b, color=a.color)))
            result = score(scene, _picture(mixed))
            assert result.all == 0 and min(result.color, result.shape) < 1


def test_shapes_that_are_none_have_no_name() -> None:
    """Protects the shape score: a thin bar and scattered blots are no shape of ours."""
    image = torch.zeros(3, 128, 128)
    image[0, 60:68, 20:110] = 0.85
    assert [o.shape for o in detect(image).objects] == [None]
    blots = torch.zeros(3, 128, 128)
    blots[:, 30:60, 30:40] = blots[:, 30:36, 30:80] = blots[:, 54:60, 60:90] = 1
    blots[:, 30:60, 74:80] = 1
    assert detect(blots).objects[0].shape is None


@pytest.mark.parametrize("kind", ["noise", "grey", "gradient"])
def test_pictures_of_nothing_score_nothing(kind: str) -> None:
    """Protects the lower end of the scale: what shows no scene is never right."""
    generator = torch.Generator().manual_seed(0)
    scenes = draw_scenes(4, range(24), MIXED)
    images = [{"noise": torch.rand(3, s.height, s.width, generator=generator),
               "grey": torch.full((3, s.height, s.width), 0.5),
               "gradient": torch.linspace(0, 1, s.width).expand(3, s.height, -1)}[kind]
              for s in scenes]
    means = _means(scenes, images)
    assert means["all"] == 0 and means["shape"] <= 0.05 and means["place"] <= 0.3
    assert means["background"] <= 0.25


def test_what_a_caption_leaves_out_is_free() -> None:
    """Protects scores of short prompts: unnamed attributes are neither right nor wrong."""
    picture = _picture(_one(color="green", x=88))
    free = score(_one(), picture, {"count", "shape", "background"})
    assert (free.color, free.place, free.size, free.all) == (None, None, None, 1)
    assert score(_one(), picture).all == 0
    [equal] = draw_scenes(1, [0], SceneSettings(counts=1.0))
    assert score(equal, _picture(equal)).size is None


def test_places_have_one_word_each() -> None:
    """Protects the map from middles to words, also in wide pictures."""
    assert place_word(80, 48, 160, 96) == "centre" and place_word(40, 50, 160, 96) == "left"
    assert place_word(80, 76, 160, 96) == "bottom" and place_word(130, 20, 160, 96) == "top right"


def test_parts_are_connected_also_around_corners() -> None:
    """Protects the labelling: a spiral is one part, diagonal neighbours belong together."""
    mask = torch.zeros(2, 9, 9, dtype=torch.bool)
    mask[0, 0, :] = mask[0, :, 8] = mask[0, 8, :] = mask[0, 2:, 0] = mask[0, 2, :7] = True
    mask[0, 4, 4] = True
    mask[1].diagonal()[:] = True
    labels = connected(mask)
    assert [len(labels[i].unique()) - 1 for i in (0, 1)] == [2, 1]
    assert torch.equal(labels > 0, mask)


def test_shares_have_the_binomial_standard_error() -> None:
    """Protects the ± of every table."""
    assert Share(0.8, 100).error == pytest.approx(0.04)
    scenes = [_one()] * 4
    row = report(scenes, [_picture(_one())] * 3 + [_picture(_one(shape="star"))]).rows["one"]
    assert (row["shape"].mean, row["shape"].count, row["all"].mean) == (0.75, 4, 0.75)
    assert row["shape"].error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    with pytest.raises(ValueError, match="2 pictures"):
        report(scenes, [_picture(_one())] * 2)


def test_edges_agree_with_their_own_outline_and_with_no_other() -> None:
    """Protects the number for ControlNets, at three sizes and for thick lines."""
    for size in (64, 128, 256):
        scenes = draw_scenes(5, range(24), dataclasses.replace(MIXED, image_size=size))
        images, lines = renders(scenes), [outline([s])[0] for s in scenes]
        own = [edge_agreement(*pair).f1 for pair in zip(images, lines, strict=True)]
        assert min(own) > 0.93 and sum(own) / len(own) > 0.97
    thick = outline([_one()], line=6)[0]
    assert edge_agreement(_picture(_one()), thick).f1 > 0.93
    moved = edge_agreement(_picture(_one(x=48)), outline([_one()])[0])
    assert moved.f1 < 0.5
    assert edge_agreement(torch.zeros(3, 128, 128), thick).f1 == 0
    assert edge_agreement(_picture(_one()), torch.zeros(1, 128, 128)).f1 == 0
    with pytest.raises(ValueError, match="one size"):
        edge_agreement(_picture(_one()), torch.zeros(1, 64, 64))


def test_half_an_outline_has_precision_without_recall() -> None:
    """Protects the two halves of F1: lines that are not followed, lines nobody drew."""
    both = dataclasses.replace(_one(), kind="count", place=None, objects=(
        dataclasses.replace(_one().objects[0], x=34, radius=28),
        dataclasses.replace(_one().objects[0], x=96, radius=28)))
    first = dataclasses.replace(_one(), objects=both.objects[:1])
    less = edge_agreement(_picture(first), outline([both])[0])
    more = edge_agreement(_picture(both), outline([first])[0])
    assert less.precision > 0.95 and 0.45 < less.recall < 0.55
    assert more.recall > 0.95 and 0.45 < more.precision < 0.55


class FakePipeline:
    """Draws the scenes that the prompts were made of, or noise; remembers how it was asked."""

    def __init__(self, prompts: list[Prompt], noise: bool = False) -> None:
        self.scenes = {p.caption.text: p.scene for p in prompts}
        self.noise = noise
        self.calls: list[dict] = []

    def generate(self, prompts, height, width, control_image=None, **settings):
        self.calls.append({"count": len(prompts), "size": (width, height), **settings})
        if control_image is not None:
            assert [c.size for c in control_image] == [(width, height)] * len(prompts)
            return [Image.new("RGB", c.size) for c in control_image]
        images = [torch.rand(3, height, width) if self.noise else _picture(self.scenes[text])
                  for text in prompts]
        return [Image.fromarray((i * 255).byte().permute(1, 2, 0).numpy()) for i in images]


def test_a_perfect_model_scores_what_the_judge_scores_and_noise_nothing() -> None:
    """Protects the way from prompts through batches to the report."""
    prompts = held_out_prompts(40, 9, MIXED)
    assert all(held_out(p.scene.key) for p in prompts)
    perfect = FakePipeline(prompts)
    done: list[int] = []
    result = evaluate(perfect, prompts, DrawSettings(steps=7, guidance=3.0, seed=50, batch_size=8),
                      lambda count, total: done.append(count))
    assert result.rows["all"]["all"] == Share(1.0, 40)
    assert {"one", "two", "count"} < set(result.rows)
    assert done[-1] == 40 == sum(call["count"] for call in perfect.calls)
    assert max(call["count"] for call in perfect.calls) == 8
    assert [call["seed"] for call in perfect.calls] == [50 + i for i in range(len(perfect.calls))]
    assert {(call["steps"], call["guidance"]) for call in perfect.calls} == {(7, 3.0)}
    json.dumps(result.to_dict())
    noise = evaluate(FakePipeline(prompts, noise=True), prompts)
    assert noise.rows["all"]["all"].mean == 0


def test_pictures_come_in_the_order_of_their_prompts() -> None:
    """Protects the pairing of prompts and pictures over batches of several sizes."""
    prompts = held_out_prompts(20, 9, MIXED)
    pictures = draw_pictures(FakePipeline(prompts), prompts, DrawSettings(batch_size=3))
    for prompt, picture in zip(prompts, pictures, strict=True):
        assert (picture - _picture(prompt.scene)).abs().max() <= 1.01 / 255


class FakeVAE:
    """Halves the contrast on the way, as a bad VAE would."""

    def encode(self, images):
        return images

    def decode(self, images):
        mean = images.mean((1, 2, 3), keepdim=True)
        return mean + (images - mean) * self.contrast

    contrast = 1.0


def test_the_ceiling_is_what_the_vae_leaves() -> None:
    """Protects the ceiling: perfect for a perfect VAE, lower for a bad one."""
    prompts = held_out_prompts(16, 9, MIXED)
    vae = FakeVAE()
    assert ceiling(vae, prompts).rows["all"]["all"].mean == 1
    vae.contrast = 0.0
    assert ceiling(vae, prompts).rows["all"]["all"].mean == 0


def test_a_strength_sweep_asks_with_and_without_control() -> None:
    """Protects the control table: strength 0 draws without hints, others with each one's own."""
    prompts = held_out_prompts(6, 9, SceneSettings(64), ("background", "color"))
    assert all("place" not in p.caption.named for p in prompts)
    fake = FakePipeline(prompts)
    free, steered = evaluate_control(fake, prompts, strengths=(0.0, 0.7))
    assert ["control_strength" in call for call in fake.calls] == [False, True]
    assert fake.calls[1]["control_strength"] == 0.7
    assert free.f1 > 0.95 and free.report.rows["all"]["all"].mean == 1
    assert steered.f1 == 0 and steered.strength == 0.7
    json.dumps(steered.to_dict())


def _starter_rows(count: int, attributes: tuple[str, ...] | None = None) -> dict[str, Share]:
    """What the starter's base model gets right of held-out prompts in 12 steps."""
    from pixart_core.pipeline import Pipeline
    from pixart_core.starter import find_starter

    starter = find_starter()
    if starter is None:
        pytest.skip("the starter models are not in this installation")
    pipeline = Pipeline.from_files(starter.transformer, starter.t5, starter.vae, device="cpu")
    scenes = SceneSettings(starter.image_size, spread=0.0, grid=True)
    prompts = held_out_prompts(count, 1000, scenes, attributes)
    settings = DrawSettings(steps=12, guidance=starter.guidance)
    return evaluate(pipeline, prompts, settings).rows["all"]


def test_the_present_starter_is_measured_as_it_was() -> None:
    """Protects the judge on real drawings: the starter gets most of its words right."""
    rows = _starter_rows(6)
    assert rows["background"].mean >= 5 / 6 and rows["color"].mean >= 5 / 6
    assert rows["place"].mean >= 5 / 6


def test_the_starter_draws_prompts_that_name_no_place() -> None:
    """Protects a first try: who names no place once got pieces of shapes in several."""
    assert _starter_rows(8, ("background", "color"))["all"].mean >= 6 / 8


def test_wrong_shapes_of_tensors_are_named() -> None:
    """Protects the message for a picture without its batch."""
    with pytest.raises(ValueError, match="N, 3, H, W"):
        detect_all(torch.zeros(3, 64, 64))


def test_the_command_measures_the_judge_alone(tmp_path) -> None:
    """Protects `pixart train evaluate` without a model, and its file of numbers."""
    out = tmp_path / "judge.json"
    result = CliRunner().invoke(app, ["train", "evaluate", "--judge", "6", "--kinds", "one,counts",
                                      "--spread", "0.1", "--grid", "--json", str(out)])
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert (written["spread"], written["grid"], written["corners"]) == (0.1, True, 0.0)
    assert set(written["judge"]) == set(DISTURBANCES)
    assert written["judge"]["clean"]["all"]["all"] == {"mean": 1.0, "error": 0.0, "count": 6}


@pytest.mark.parametrize(("arguments", "words"), [
    (["--judge", "0"], "nothing to do"), (["--kinds", "one,four"], "four"),
    (["--vae", "x.safetensors"], "--transformer"), (["--named", "place"], "--transformer"),
    (["--transformer", __file__, "--named", "colour"], "color"),
    (["--strengths", "0,much"], "much"),
    (["--transformer", "nowhere.safetensors"], "does not exist"),
])
def test_the_command_says_what_is_wrong(arguments: list[str], words: str) -> None:
    """Protects the messages before anything is loaded."""
    result = CliRunner().invoke(app, ["train", "evaluate", *arguments])
    assert result.exit_code != 0
    assert words in result.output + result.stderr
