"""The recipes beside the transformer: VAE, text encoder, edge detector."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pixart_core as pc
from pixart_core.commands.train_run import _ABOUT
from pixart_core.text import T5TextEncoder
from pixart_core.training.curves import read_curves
from pixart_core.training.draws import Draws
from pixart_core.training.edges_data import OutlinedScenes
from pixart_core.training.loop import train
from pixart_core.training.pictures import PictureSamples
from pixart_core.training.readings import IGNORED, QUESTIONS, SceneReadings, answers
from pixart_core.training.recipes import RECIPES, recipe_defaults, recipe_settings
from pixart_core.training.recipes.vae import anchor_of
from pixart_core.training.scenes import SceneSettings, captions, draw_scene
from pixart_core.training.spiece import train_spiece
from pixart_core.vae import load_vae
from pixart_core.vae_layout import taesd_state_dict, tiny_state_dict

QUICK = {"log_every": 1, "sample_every": 0}
SMALL_TEXT = {"width": 32, "layers": 1, "heads": 2, "mlp": 32, "pieces": 200, "batch_size": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures of different sizes, each of one colour left and another right."""
    path = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        picture = Image.new("RGB", (40 + 8 * i, 48), (40 * i, 200 - 30 * i, 90))
        picture.paste((250 - 40 * i, 20, 30 * i), (0, 0, 20, 48))
        picture.save(path / f"{i}.png")
    return path


def run(name, out, **settings):
    recipe = RECIPES[name][0](recipe_settings(name, QUICK | {"out": out} | settings))
    return recipe, train(recipe)


def test_every_recipe_has_a_file_of_settings_and_a_command():
    """Protects completeness: code, settings and command line know the same recipes."""
    assert set(_ABOUT) == set(RECIPES)
    for name in RECIPES:
        assert recipe_defaults(name)["steps"] > 0


def test_crops_follow_seed_and_number(folder):
    """Protects resuming: the same crop for the same number, every image once an epoch."""
    samples = PictureSamples(folder, 32, seed=3)
    whole = samples.batch(0, 6)
    parts = [PictureSamples(folder, 32, seed=3).batch(0, 3, rank, 2) for rank in (0, 1)]
    assert torch.equal(whole.images, torch.cat([p.images for p in parts]))
    assert len({str(samples._path(n)) for n in range(6, 12)}) == 6
    assert whole.images.shape == (6, 3, 32, 32) and 0 <= whole.images.min() <= 1
    assert not torch.equal(whole.images, PictureSamples(folder, 32, seed=4).batch(0, 6).images)


def test_crops_start_on_latent_cells(tmp_path):
    """Protects shapes of aligned scenes: a VAE sees them on its cells as in whole pictures."""
    columns = torch.arange(100).expand(60, 100)
    rows = torch.arange(60)[:, None].expand(60, 100)
    pixels = torch.stack([columns, rows, columns], 2).byte()
    Image.fromarray(pixels.numpy()).save(tmp_path / "places.png")
    crops = PictureSamples(tmp_path, 32).batch(0, 24).images
    starts = (crops[:, :2, 0, 0] * 255).round()  # (24, 2): right, down
    assert not (starts % 8).any()
    assert set(starts[:, 0].tolist()) == {8.0 * k for k in range(9)}  # all of 0 to 68


def test_crops_that_no_picture_can_give_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="crop is 30"):
        PictureSamples(folder, 30)
    with pytest.raises(ValueError, match="holds no images"):
        PictureSamples(tmp_path, 32)


def test_a_vae_learns_and_loads_where_vaes_do(folder, tmp_path):
    """Protects the VAE recipe: its error falls, `load_vae` reads the file, latents have its scale,
    and it can be trained further."""
    _, outcome = run("vae", tmp_path / "a", data=folder, crop=16, batch_size=4, steps=12,
                     learning_rate=1e-3, warmup_steps=0)
    curve = [point["error"] for point in read_curves(tmp_path / "a")]
    assert curve[-1] < 0.8 * curve[0]
    vae = load_vae(outcome.files[0], "alpha")
    assert vae.scale == pytest.approx(1.0)
    images = PictureSamples(folder, 16).batch(0, 2).images
    assert vae.decode(vae.encode(images)).shape == images.shape
    recipe, _ = run("vae", tmp_path / "b", data=folder, crop=16, steps=1, learning_rate=1e-9,
                    vae=outcome.files[0], ema_decay=None, warmup_steps=0)
    mine, theirs = recipe.trained.network.state_dict(), vae.network.state_dict()
    assert all(torch.allclose(mine[n], theirs[n], atol=1e-7) for n in theirs)


@torch.no_grad()
def test_latent_noise_reaches_the_decoder_and_nothing_else(folder, tmp_path):
    """Protects the robustness of latents: the decoder reads noisy ones, the moments are of clean
    ones, every sample's noise is its own number's, and 0 means none."""
    losses = {}
    for noise in (0.0, 0.5):
        recipe = RECIPES["vae"][0](recipe_settings("vae", QUICK | {
            "out": tmp_path, "data": folder, "crop": 16, "latent_noise": noise}))
        batch = recipe.samples.batch(0, 4)
        losses[noise] = [recipe.loss(recipe.trained, batch, Draws(0, numbers)).parts
                         for numbers in (range(4), range(4), range(4, 8))]
    first, again, other = losses[0.5]
    assert torch.equal(first["error"], again["error"])
    assert not torch.equal(first["error"], other["error"])
    assert torch.equal(first["moments"], other["moments"])
    plain, _, same = losses[0.0]
    assert torch.equal(plain["error"], same["error"])
    assert torch.equal(plain["moments"], first["moments"])
    assert not torch.equal(plain["error"], first["error"])


@torch.no_grad()
def test_edge_noise_lies_where_latents_change(folder, tmp_path):
    """Protects the decoder's training on what models get wrong: no noise where nothing changes,
    more where more does, and the clean latents as they are."""
    recipe = RECIPES["vae"][0](recipe_settings("vae", QUICK | {
        "out": tmp_path, "data": folder, "crop": 16, "edge_noise": 0.5}))
    network, read = recipe.trained.network, []
    latents = torch.zeros(1, 4, 8, 8)
    latents[:, :, :, 4:] = 2.0
    network.encode = lambda images: SimpleNamespace(latents=latents)
    network.decode = lambda z: read.append(z) or SimpleNamespace(sample=images)
    images, noise = torch.zeros(1, 3, 64, 64), torch.ones_like(latents)
    _, clean = recipe.trained(images, noise, 0.0, 0.5)
    added = (read[0] - latents)[0, 0, 0]
    assert torch.equal(clean, latents)
    # a third of the neighbourhood differs by 2: deviation 2 * sqrt(1/3 * 2/3)
    edge = 0.5 * 2 * (2 / 9) ** 0.5
    assert torch.allclose(added, torch.tensor([0, 0, 0, edge, edge, 0, 0, 0]), atol=1e-5)
    recipe.trained(images, noise, 0.1, 0.5)
    assert torch.allclose(read[1] - read[0], torch.full_like(latents, 0.1))
    batch = recipe.samples.batch(0, 4)
    first, second = (recipe._noise(batch.images, Draws(0, range(4))) for _ in range(2))
    assert torch.equal(first, second) and first.std() > 0.1


def test_the_anchor_is_a_small_picture():
    """Protects what latents are pulled to: colours where they are plain, and edges between the
    cells, as windows of each channel that lie elsewhere see them."""
    images = torch.zeros(1, 3, 16, 24)
    images[:, 0, :, 12:] = 1.0  # red from the middle of the second cell
    red, green, blue, grey = anchor_of(images)[0]
    ends = {share: (-1.5, 1.5 * (2 * share - 1)) for share in (0.7, 0.15, 1 / 3)}

    def row(share: float, covered: tuple[float, ...]) -> torch.Tensor:
        off, on = ends[share]
        return torch.tensor([off + (on - off) * part for part in covered]).expand(2, 3)

    assert torch.allclose(red, row(0.7, (0, 0.5, 1)))
    assert torch.allclose(green, row(0.15, (0, 1, 1)))  # 4 px to the right
    assert torch.allclose(blue, row(0.15, (0, 0.5, 1)))  # 4 px down
    assert torch.allclose(grey, row(1 / 3, (0, 1, 1)))
    below = anchor_of(images.transpose(2, 3))[0]
    assert torch.allclose(below[1], row(0.15, (0, 0.5, 1))[:2].T)
    assert torch.allclose(below[2], row(0.15, (0, 1, 1))[:2].T)


def test_an_anchored_vae_has_latents_that_follow_the_picture(folder, tmp_path):
    """Protects the anchor's pull: the same steps with it end nearer to the small picture."""
    distances = []
    for anchor in (0.0, 10.0):
        outcome = run("vae", tmp_path / str(anchor), data=folder, crop=16, steps=12, anchor=anchor,
                      learning_rate=1e-3, warmup_steps=0, ema_decay=None)[1]
        images = PictureSamples(folder, 16).batch(0, 4).images
        latents = load_vae(outcome.files[0], "alpha").encode(images)
        distances.append((latents - anchor_of(images)).square().mean())
    assert distances[1] < 0.75 * distances[0]


def test_a_decoder_trains_alone(folder, tmp_path):
    """Protects caches and models of a VAE: its encoder stays bit by bit, its decoder does not."""
    first = run("vae", tmp_path / "a", data=folder, crop=16, steps=1)[1].files[0]
    second = run("vae", tmp_path / "b", data=folder, crop=16, steps=3, vae=first,
                 learning_rate=1e-3, warmup_steps=0, decoder_only=True)[1].files[0]
    before, after = (load_file(path) for path in (first, second))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if "encoder" in name} <= same
    assert not any("decoder" in name and name.endswith("weight") for name in same)


def test_a_decoder_alone_wants_an_encoder_of_its_scale(folder, tmp_path):
    """Protects caches: what would change latents under them is refused."""
    alone = {"out": tmp_path, "data": folder, "crop": 16, "decoder_only": True}
    with pytest.raises(ValueError, match="decoder_only is true without a vae"):
        recipe_settings("vae", alone)
    with pytest.raises(ValueError, match=r"decoder_only is true and anchor 1\.0"):
        recipe_settings("vae", alone | {"vae": tmp_path / "vae.safetensors", "anchor": 1.0})
    file = run("vae", tmp_path / "a", data=folder, crop=16, steps=1)[1].files[0]
    with pytest.raises(ValueError, match=r"of scale 0\.18215 and shift 0, and variant sigma"):
        run("vae", **alone | {"vae": file, "variant": "sigma", "out": tmp_path / "b"})


def test_a_vae_run_goes_on_exactly_and_from_the_same_file(folder, tmp_path):
    """Protects resuming where weights are channels-last: losses as without the stop; another
    file to start from is another run."""
    files = [run("vae", tmp_path / str(seed), data=folder, crop=16, steps=1, seed=seed)[1].files[0]
             for seed in (0, 1)]
    same = {"data": folder, "crop": 16, "vae": files[0], "warmup_steps": 0, "schedule": "constant"}
    whole = run("vae", tmp_path / "whole", steps=4, **same)[1].files[0]
    run("vae", tmp_path / "parts", steps=2, **same)
    parts = run("vae", tmp_path / "parts", steps=4, **same)[1].files[0]
    assert [p["loss"] for p in read_curves(tmp_path / "whole")] == [
        p["loss"] for p in read_curves(tmp_path / "parts")]
    one, other = load_file(whole), load_file(parts)
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match="holds a run with other settings: vae is"):
        run("vae", tmp_path / "parts", steps=5, **same | {"vae": files[1]})


@pytest.mark.parametrize("name", ["latent_noise", "edge_noise", "moments", "anchor"])
def test_strengths_below_zero_are_refused(name, folder, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is -0.1; use 0 or more"):
        recipe_settings("vae", {"out": tmp_path, "data": folder, name: -0.1})


def test_taesd_names_go_there_and_back():
    names = ["encoder.layers.0.weight", "decoder.layers.0.weight", "decoder.layers.3.conv.0.bias"]
    weights = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    written = taesd_state_dict(weights)
    assert "taesd_decoder.1.weight" in written
    assert tiny_state_dict(written) == weights


def test_answers_are_what_the_caption_says():
    """Protects the text encoder's lessons: each attribute where it is named, else ignored."""
    settings = SceneSettings(two=0.5, counts=0.2, corners=0.2)
    kinds = set()
    for number in range(60):
        scene = draw_scene(5, number, settings)
        for caption in captions(scene, 5, number):
            said = {name: QUESTIONS[name][right]
                    for name, right in answers(scene, caption).items() if right != IGNORED}
            kinds.add(scene.kind)
            assert said["kind"] == scene.kind and said["count"] == str(len(scene.objects))
            assert ("background" in said) == ("background" in caption.named)
            if "background" in said:
                assert said["background"] in caption.text
            if scene.kind == "two" and "shape 1" in said:
                first = min(scene.objects, key=lambda o: o.x if scene.relation in
                            ("left", "right") else o.y)
                assert said["shape 1"] == first.shape
                assert said["axis"] == ("across" if scene.relation in ("left", "right") else "down")
            if scene.kind == "one":
                assert "shape 2" not in said and said["shape 1"] == scene.objects[0].shape
    assert kinds == {"one", "two", "count"}


def test_readings_follow_seed_and_number():
    samples = SceneReadings(SceneSettings(), seed=1)
    whole, parts = samples.batch(2, 4), [samples.batch(2, 2, rank, 2) for rank in (0, 1)]
    assert whole.texts == parts[0].texts + parts[1].texts
    assert torch.equal(whole.answers, torch.cat([p.answers for p in parts]))


def test_a_tokenizer_is_made_of_captions():
    """Protects T5's ids and that the same captions give the same model."""
    texts = [f"a {a} {b} on {c}" for a in ("red", "blue", "green") for b in ("ring", "star")
             for c in ("white", "black")] * 3
    model = train_spiece(texts, 130)
    assert model == train_spiece(texts, 130)
    with pytest.raises(ValueError, match="no tokenizer of 5000 pieces"):
        train_spiece(texts, 5000)


def test_a_text_encoder_learns_and_loads(tmp_path):
    """Protects the text recipe: it answers better, and folder and file are the same encoder."""
    recipe, outcome = run("text", tmp_path, steps=30, learning_rate=3e-3, warmup_steps=0,
                          **SMALL_TEXT)
    curve = [point["loss"] for point in read_curves(tmp_path)]
    assert sum(curve[-3:]) < 0.9 * sum(curve[:3])
    assert set(recipe.accuracy(20)) >= {"kind", "background", "color 1", "shape 1"}
    encoders = [T5TextEncoder.from_path(path, dtype=torch.float32) for path in outcome.files]
    states = [encoder(["a red circle"], max_tokens=40) for encoder in encoders]
    assert torch.equal(states[0][0], states[1][0]) and torch.equal(states[0][1], states[1][1])
    ids, mask = recipe._tokens(("a red circle",), torch.device("cpu"))
    own = recipe.average.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    count = int(mask.sum())
    assert torch.allclose(states[0][0][0, :count], own[0, :count], atol=1e-5)


def test_a_text_run_goes_on_exactly(tmp_path):
    for steps in (2, 4):
        run("text", tmp_path / "parts", steps=steps, schedule="constant", **SMALL_TEXT)
    run("text", tmp_path / "whole", steps=4, schedule="constant", **SMALL_TEXT)
    parts, whole = (read_curves(tmp_path / name) for name in ("parts", "whole"))
    assert [p["loss"] for p in parts] == [p["loss"] for p in whole]


def test_an_edge_detector_learns_and_loads(tmp_path):
    """Protects the HED recipe: its loss falls and `HEDDetector` reads the file."""
    recipe, outcome = run("hed", tmp_path, steps=10, batch_size=4, warmup_steps=0,
                          learning_rate=3e-3)
    curve = [point["merged"] for point in read_curves(tmp_path)]
    assert curve[-1] < curve[0]
    detector = pc.HEDDetector.from_path(outcome.files[0])
    image = OutlinedScenes(64).batch(0, 1).images
    assert torch.allclose(detector(image), recipe.trained.detector(image), atol=1e-6)


def test_outlines_stay_where_the_shapes_are():
    """Protects the detector's truth: disturbance changes pictures, not outlines."""
    batch = OutlinedScenes(64, seed=2).batch(0, 4)
    again = OutlinedScenes(64, seed=2).batch(1, 2, rank=0, world=1)
    assert torch.equal(again.images, OutlinedScenes(64, seed=2).batch(0, 2, rank=1, world=2).images)
    steep = (batch.images[..., 1:] - batch.images[..., :-1]).abs().amax(1, keepdim=True)
    on, off = steep[batch.edges[..., 1:] > 0.9].mean(), steep[batch.edges[..., 1:] == 0].mean()
    assert on > 2 * off
