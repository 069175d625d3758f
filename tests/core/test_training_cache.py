"""The training cache: what is stored, going on, what is refused, and reading it back."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from PIL import Image

from pixart_core.checkpoint.read import CheckpointError
from pixart_core.config import PixArtConfig
from pixart_core.load import load_transformer
from pixart_core.model.hed import HEDDetector
from pixart_core.starter import find_starter
from pixart_core.text import T5TextEncoder
from pixart_core.training.data import CachedSamples, CacheSettings, build_cache
from pixart_core.training.data import cache as cache_module
from pixart_core.training.data import samples as samples_module
from pixart_core.training.data.images import load_picture
from pixart_core.vae import load_vae

STARTER = find_starter()
SHAPES = {"wide": (96, 48), "square": (64, 64), "tall": (48, 96)}  # width, height
PLAIN = CacheSettings(variant="alpha", image_size=64, max_tokens=24, dtype="float32",
                      clean_caption=False, batch_size=4, workers=2)


def changed(**options) -> CacheSettings:
    return CacheSettings(**{**vars(PLAIN), **options})


@pytest.fixture(scope="module")
def encoders():
    return (T5TextEncoder.from_path(STARTER.t5_file, dtype=torch.float32),
            load_vae(STARTER.vae, "alpha"))


def draw(path: Path, seed: int = 0, size=(64, 64), caption: str | None = "a red circle") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (40 * seed % 256, 90, 200))
    image.paste((250, 20 * seed % 256, 10), (8, 8, 30, 40))
    image.save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def fill(folder: Path, count: int = 3) -> Path:
    """`count` pictures of each of three shapes; caption and colours say which is which."""
    for number in range(count):
        for shape, size in SHAPES.items():
            draw(folder / f"{shape}{number}.png", number, size,
                 f"a {shape} circle\na {shape} circle {number}")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, encoders):
    """Nine pictures of three shapes and their cache; tests that change it take a copy."""
    root = tmp_path_factory.mktemp("made")
    fill(root / "images")
    build_cache(root / "images", root / "cache", PLAIN, *encoders)
    return root


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def all_rows(samples: CachedSamples, epochs: int = 1) -> list[tuple[str, torch.Tensor]]:
    """Caption and latents of every row of one epoch, or of several."""
    batches = [samples.batch(i, 1) for i in range(epochs * samples.batches_per_epoch(1))]
    return [(batch.texts[0], batch.latents[0]) for batch in batches]


def test_latents_and_captions_are_what_the_encoders_give(made, encoders) -> None:
    encoder, vae = encoders
    samples = CachedSamples(made / "cache")
    for text, latents in all_rows(samples):
        shape = text.split()[1]
        height, width = {"wide": (48, 96), "square": (64, 64), "tall": (96, 48)}[shape]
        paths = [made / "images" / f"{shape}{number}.png" for number in range(3)]
        expected = [vae.encode(load_picture(path, height, width)[None] / 255)[0] for path in paths]
        assert min((latents - each).abs().max() for each in expected) < 1e-4
    batch = samples.batch(0, 4)
    for row, text in enumerate(batch.texts):
        states, mask = encoder([text], 24)
        length = int(mask.sum())
        assert int(batch.mask[row].sum()) == length
        torch.testing.assert_close(batch.caption[row, :length], states[0, :length],
                                   rtol=1e-4, atol=1e-4)
        assert not batch.caption[row, length:].any()


def test_a_batch_says_its_size_and_ratio(made) -> None:
    samples = CachedSamples(made / "cache")
    for index in range(samples.batches_per_epoch(2)):
        batch = samples.batch(index, 2)
        height, width = (8 * side for side in batch.latents.shape[-2:])
        assert batch.image_size.tolist() == [[height, width]] * 2
        assert batch.aspect_ratio.tolist() == [[height / width]] * 2
        assert batch.numbers == (2 * index, 2 * index + 1)
        assert batch.latents.dtype == batch.caption.dtype == torch.float32


def test_the_null_caption_is_t5_of_nothing(made, encoders) -> None:
    null = CachedSamples(made / "cache").null_caption
    states, mask = encoders[0]([""], 24)
    torch.testing.assert_close(null.states, states[0][mask[0]], rtol=1e-4, atol=1e-4)
    assert null.mask.tolist() == [True] * len(null.states)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 30), st.integers(1, 3), st.integers(1, 3))
def test_processes_together_see_the_batch_of_one(made, index, size, world) -> None:
    samples = CachedSamples(made / "cache")
    whole = samples.batch(index, size * world)
    parts = [samples.batch(index, size, rank, world) for rank in range(world)]
    assert sum((part.numbers for part in parts), ()) == whole.numbers
    assert sum((part.texts for part in parts), ()) == whole.texts
    assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)


def test_variants_of_a_caption_take_turns(made) -> None:
    """And the same number always has the same one."""
    samples = CachedSamples(made / "cache")
    texts = [samples.batch(index, 1).texts[0] for index in range(40)]
    assert {len(text.split()) for text in texts} == {3, 4}
    assert texts == [CachedSamples(made / "cache").batch(i, 1).texts[0] for i in range(40)]


def test_the_preview_is_of_the_bucket_with_most_rows(copy, encoders) -> None:
    draw(copy / "images" / "tall9.png", 9, SHAPES["tall"], "a tall one")
    build_cache(copy / "images", copy / "cache", PLAIN, *encoders)
    samples = CachedSamples(copy / "cache")
    assert samples.preview(8).texts == samples.preview(8).texts
    assert len(samples.preview(8)) == 4
    assert all("tall" in text for text in samples.preview(8).texts)


def test_a_second_run_encodes_nothing(made, encoders) -> None:
    def never() -> None:
        raise AssertionError("an encoder was loaded for nothing")

    report = build_cache(made / "images", made / "cache", PLAIN, never, never)
    assert (report.rows, report.kept, report.added) == (9, 9, 0)


def test_only_new_images_are_encoded(copy, encoders) -> None:
    draw(copy / "images" / "new.png", 5, caption="a new one")
    report = build_cache(copy / "images", copy / "cache", PLAIN, *encoders)
    assert (report.kept, report.added, report.captions) == (9, 1, 1)
    assert "a new one" in [text for text, _ in all_rows(CachedSamples(copy / "cache"))]


@pytest.mark.parametrize("change", ["image", "caption"])
def test_what_has_changed_is_encoded_again(copy, encoders, change) -> None:
    if change == "image":
        draw(copy / "images" / "tall0.png", 7, SHAPES["tall"], None)
    else:
        (copy / "images" / "tall0.txt").write_text("something else")
    report = build_cache(copy / "images", copy / "cache", PLAIN, *encoders)
    assert (report.rows, report.kept, report.added, report.dropped) == (9, 8, 1, 1)
    assert len(CachedSamples(copy / "cache")) == 9


def test_rows_of_removed_images_do_not_count(copy, encoders) -> None:
    (copy / "images" / "tall0.png").unlink()
    (copy / "images" / "tall0.txt").unlink()
    report = build_cache(copy / "images", copy / "cache", PLAIN, *encoders)
    assert (report.rows, report.dropped) == (8, 1)
    samples = CachedSamples(copy / "cache")
    assert len(samples) == len(all_rows(samples)) == 8


def test_another_date_alone_encodes_nothing(copy, encoders) -> None:
    """Protects a data set that was copied to another machine."""
    for path in (copy / "images").iterdir():
        os.utime(path, (1, 1))
    assert build_cache(copy / "images", copy / "cache", PLAIN, *encoders).added == 0


def test_images_of_another_folder_do_not_empty_the_cache(copy, tmp_path, encoders) -> None:
    draw(tmp_path / "other" / "x.png")
    with pytest.raises(ValueError, match="holds 9 rows, none of which"):
        build_cache(tmp_path / "other", copy / "cache", PLAIN, *encoders)
    assert len(CachedSamples(copy / "cache")) == 9


@pytest.mark.parametrize(("option", "value", "said"), [
    ("image_size", 128, "image_size is 64, now 128"), ("vae_sha256", "f0", "vae_sha256 is None"),
    ("max_tokens", 12, "max_tokens is 24, now 12"), ("dtype", "float16", "dtype is float32")])
def test_other_settings_are_refused(made, encoders, option, value, said) -> None:
    with pytest.raises(ValueError, match=said):
        build_cache(made / "images", made / "cache", changed(**{option: value}), *encoders)


def test_a_caption_that_occurs_often_is_encoded_once(tmp_path, encoders) -> None:
    for number in range(5):
        draw(tmp_path / "images" / f"{number}.png", number, caption="the same")
    report = build_cache(tmp_path / "images", tmp_path / "cache", changed(shard_rows=2), *encoders)
    assert report.captions == 1
    assert len(CachedSamples(tmp_path / "cache")._shards) == 3


def test_captions_are_cleaned_for_t5_alone(tmp_path, encoders) -> None:
    draw(tmp_path / "images" / "a.png", caption="A RED Circle")
    build_cache(tmp_path / "images", tmp_path / "cache", changed(clean_caption=True), *encoders)
    batch = CachedSamples(tmp_path / "cache").batch(0, 1)
    assert batch.texts == ("A RED Circle",)
    states, mask = encoders[0](["a red circle"], 24)
    torch.testing.assert_close(batch.caption[0], states[0][mask[0]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_are_stored_in_the_dtype_and_read_as_float32(made, tmp_path, encoders, dtype
                                                             ) -> None:
    draw(tmp_path / "images" / "square1.png", 1, SHAPES["square"], "a square circle")
    build_cache(tmp_path / "images", tmp_path / "cache", changed(dtype=dtype), *encoders)
    batch = CachedSamples(tmp_path / "cache").batch(0, 1)
    pixels = load_picture(tmp_path / "images" / "square1.png", 64, 64)[None] / 255
    stored = encoders[1].encode(pixels).to(getattr(torch, dtype)).float()
    assert torch.equal(batch.latents, stored)
    assert batch.caption.dtype == torch.float32
    assert torch.equal(batch.caption, batch.caption.to(getattr(torch, dtype)).float())


def test_shards_end_at_their_size(tmp_path, encoders) -> None:
    """Protects memory: what one shard holds is in memory while it is made."""
    fill(tmp_path / "images", 2)
    build_cache(tmp_path / "images", tmp_path / "cache", changed(shard_bytes=9_000), *encoders)
    samples = CachedSamples(tmp_path / "cache")
    assert [shard.rows for shard in samples._shards] == [1] * 6


def test_taking_turns_on_the_device_gives_the_same_cache(made, tmp_path, encoders) -> None:
    build_cache(made / "images", tmp_path / "cache", changed(low_memory=True, device="cpu"),
                *encoders)
    ours, theirs = CachedSamples(tmp_path / "cache").batch(1, 3), CachedSamples(
        made / "cache").batch(1, 3)
    assert torch.equal(ours.latents, theirs.latents)
    assert ours.texts == theirs.texts


def test_edges_are_encoded_beside_the_pictures(tmp_path, encoders) -> None:
    detector = HEDDetector.from_path(STARTER.hed)
    draw(tmp_path / "images" / "a.png")
    build_cache(tmp_path / "images", tmp_path / "cache", changed(control="hed"), *encoders,
                detector)
    samples = CachedSamples(tmp_path / "cache")
    samples.require_control()
    edges = detector(load_picture(tmp_path / "images" / "a.png", 64, 64)[None] / 255)
    expected = encoders[1].encode(edges.expand(-1, 3, -1, -1))
    torch.testing.assert_close(samples.batch(0, 1).control, expected, rtol=1e-4, atol=1e-4)


def test_control_images_of_the_folder_are_fitted_and_encoded(tmp_path, encoders) -> None:
    draw(tmp_path / "images" / "a.png")
    hint = Image.new("RGB", (128, 128), "black")
    hint.paste("white", (20, 20, 90, 60))
    (tmp_path / "images" / "control").mkdir()
    hint.save(tmp_path / "images" / "control" / "a.png")
    build_cache(tmp_path / "images", tmp_path / "cache", changed(control="folder"), *encoders)
    pixels = load_picture(tmp_path / "images" / "control" / "a.png", 128, 128)[None] / 255
    small = functional.interpolate(pixels, size=(64, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(CachedSamples(tmp_path / "cache").batch(0, 1).control,
                               encoders[1].encode(small), rtol=1e-4, atol=1e-4)


def test_a_control_image_of_another_shape_is_refused(tmp_path, encoders) -> None:
    """Protects pairs from being cut differently, so that lines and picture no longer meet."""
    draw(tmp_path / "images" / "a.png", size=(64, 64))
    draw(tmp_path / "images" / "control" / "a.png", size=(96, 64), caption=None)
    with pytest.raises(ValueError, match=r"control/a\.png is 96 x 64 px.*need the same shape"):
        build_cache(tmp_path / "images", tmp_path / "cache", changed(control="folder"), *encoders)


def test_a_damaged_picture_keeps_no_other_out(tmp_path, encoders) -> None:
    fill(tmp_path / "images", 1)
    Image.effect_noise((64, 64), 90).save(tmp_path / "images" / "bad.jpg")
    (tmp_path / "images" / "bad.txt").write_text("broken")
    path = tmp_path / "images" / "bad.jpg"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"bad\.jpg.*other rows are in the cache \(3\)"):
        build_cache(tmp_path / "images", tmp_path / "cache", PLAIN, *encoders)
    report = build_cache(tmp_path / "images", tmp_path / "cache", changed(skip_bad=True),
                         *encoders)
    assert (report.rows, len(report.left_out)) == (3, 1)


def test_pictures_that_would_grow_much_are_left_out(tmp_path, encoders, caplog) -> None:
    draw(tmp_path / "images" / "small.png", size=(32, 32))
    draw(tmp_path / "images" / "large.png", size=(64, 64))
    report = build_cache(tmp_path / "images", tmp_path / "cache", changed(max_upscale=1.5),
                         *encoders)
    assert (report.rows, report.too_small) == (1, 1)
    assert "1 pictures would grow" in caplog.text


def test_numbers_too_large_for_the_dtype_are_refused(tmp_path, encoders) -> None:
    class Loud:
        device = torch.device("cpu")

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.full((len(pixels), 4, 8, 8), 1e6)

    draw(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match="too large for float16"):
        build_cache(tmp_path / "images", tmp_path / "cache", changed(dtype="float16"),
                    encoders[0], Loud)


def test_an_interrupted_run_leaves_what_is_done(tmp_path, encoders) -> None:
    """Ctrl-C in the middle of a shard: a valid cache, and the next run does the rest."""
    fill(tmp_path / "images", 3)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "images" and done >= 5:
            raise KeyboardInterrupt

    arguments = (tmp_path / "images", tmp_path / "cache", changed(batch_size=1), *encoders)
    with pytest.raises(KeyboardInterrupt):
        build_cache(*arguments, progress=stop)
    assert len(CachedSamples(tmp_path / "cache")) == 5
    report = build_cache(*arguments)
    assert (report.kept, report.added, report.rows) == (5, 4, 9)
    assert len(all_rows(CachedSamples(tmp_path / "cache"))) == 9


def test_a_full_disk_is_one_clear_message(tmp_path, encoders, monkeypatch) -> None:
    draw(tmp_path / "images" / "a.png")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"is full: .* run the same command again"):
        build_cache(tmp_path / "images", tmp_path / "cache", PLAIN, *encoders)


def test_two_runs_do_not_write_one_cache(copy, encoders) -> None:
    pytest.importorskip("fcntl")
    draw(copy / "images" / "new.png")
    inner = []

    def again(stage: str, done: int, total: int) -> None:
        with pytest.raises(ValueError, match="another run writes to") as caught:
            build_cache(copy / "images", copy / "cache", PLAIN, *encoders)
        inner.append(caught)

    build_cache(copy / "images", copy / "cache", PLAIN, *encoders, progress=again)
    assert inner


def test_a_folder_of_other_things_is_not_made_a_cache(tmp_path, encoders) -> None:
    draw(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match=r"holds a\.\w+ and no cache"):
        build_cache(tmp_path / "images", tmp_path / "images", PLAIN, *encoders)


def first_shard(folder: Path) -> Path:
    return sorted((folder / "cache").glob("shard-*"))[0]


def damage(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(raw[:-50])
    else:
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        begin, end = header[how]["data_offsets"]
        raw[start + (begin + end) // 2] ^= 1
        path.write_bytes(raw)


@pytest.mark.parametrize("how", ["missing", "cut short", "latents", "caption", "text",
                                 "variant_offsets", "row_sums"])
def test_a_damaged_shard_is_named_and_made_again(copy, encoders, how) -> None:
    """One flipped bit is enough, wherever it is."""
    path = first_shard(copy)
    damage(path, how)
    samples = CachedSamples(copy / "cache")
    with pytest.raises(CheckpointError, match=rf"{path.name} cannot be used.*pixart train cache"):
        all_rows(samples, epochs=10)  # in which every variant of a caption comes
    report = build_cache(copy / "images", copy / "cache", PLAIN, *encoders)
    assert (report.rows, report.added) == (9, 3)
    assert len(all_rows(CachedSamples(copy / "cache"))) == 9


def test_checks_can_be_left_out(copy) -> None:
    damage(first_shard(copy), "latents")
    assert len(all_rows(CachedSamples(copy / "cache", verify=False))) == 9


def test_a_damaged_null_caption_is_made_again(copy, encoders) -> None:
    path = copy / "cache" / "null.safetensors"
    expected = CachedSamples(copy / "cache").null_caption.states
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CheckpointError, match=r"null\.safetensors.*cannot be used"):
        _ = CachedSamples(copy / "cache").null_caption
    build_cache(copy / "images", copy / "cache", PLAIN, *encoders)
    assert torch.equal(CachedSamples(copy / "cache").null_caption.states, expected)


@pytest.mark.parametrize(("content", "said"), [
    (None, "is not a training cache"), ("{", "is damaged"), ('{"format": 99}', "format 99"),
    ('{"format": 1, "facts": {}}', "is damaged")])
def test_a_bad_index_is_refused(tmp_path, content, said) -> None:
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(CheckpointError, match=said):
        CachedSamples(tmp_path)


def test_samples_can_be_sent_to_another_process(made) -> None:
    samples = CachedSamples(made / "cache", seed=4)
    first = samples.batch(2, 3)
    other = pickle.loads(pickle.dumps(samples))
    assert torch.equal(other.batch(2, 3).latents, first.latents)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_readers_do_not_disturb_each_other(made) -> None:
    """They inherit open files, whose position they would share."""
    samples = CachedSamples(made / "cache")
    all_rows(samples)
    child = os.fork()
    if child == 0:
        try:
            all_rows(samples, epochs=30)
            os._exit(0)
        except BaseException:
            os._exit(1)
    all_rows(samples, epochs=30)
    assert os.waitpid(child, 0)[1] == 0


def test_few_files_are_open_at_once(copy, monkeypatch) -> None:
    monkeypatch.setattr(samples_module, "_OPEN_SHARDS", 2)
    samples = CachedSamples(copy / "cache")
    all_rows(samples)
    assert len(samples._readers) == 2


def test_models_that_do_not_fit_are_refused(made, caplog) -> None:
    samples = CachedSamples(made / "cache")
    config = load_transformer(STARTER.transformer).config
    samples.check_fit(config)
    assert not caplog.text
    with pytest.raises(ValueError, match="captions 128 wide and the model reads 4096"):
        samples.check_fit(PixArtConfig(variant="alpha"))
    with pytest.raises(ValueError, match="latents for alpha"):
        samples.check_fit(config.replace(variant="sigma"))
    samples.check_fit(config.replace(image_size=512))
    assert "of about 64 px and the model was trained at 512" in caplog.text


def test_a_cache_without_control_says_how_to_make_one(made) -> None:
    with pytest.raises(ValueError, match=r"pixart train cache --control"):
        CachedSamples(made / "cache").require_control()


@pytest.fixture
def command(made, tmp_path, monkeypatch):
    """`pixart train cache` on a copy of the images with the starter models."""
    testing = pytest.importorskip("typer.testing")
    from pixart_core.cli import app

    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(made / "images", tmp_path / "images")
    named = ["--t5", STARTER.t5_file, "--vae", STARTER.vae, "--model", STARTER.transformer]
    return lambda *more: testing.CliRunner().invoke(
        app, [str(a) for a in ("train", "cache", tmp_path / "images", tmp_path / "out", *named,
                               *more)])


def test_the_command_makes_a_cache_and_says_what_is_in_it(command, tmp_path) -> None:
    result = command("--control", "hed", "--hed", STARTER.hed)
    assert result.exit_code == 0, result.output
    assert "9 rows" in result.output
    assert "96 x 48" in result.output
    samples = CachedSamples(tmp_path / "out")
    samples.check_fit(load_transformer(STARTER.transformer).config)
    samples.require_control()
    assert len(samples.facts.vae_sha256) == len(samples.facts.t5_sha256) == 64


def test_the_command_names_bad_files_in_one_line(command, tmp_path) -> None:
    (tmp_path / "images" / "tall1.txt").unlink()
    result = command()
    assert result.exit_code == 1
    assert result.stderr.startswith("error: 1 problem in ")
    assert "tall1.png has no caption" in result.stderr
    assert result.stderr.count("\n") == 1
    skipped = command("--skip-bad")
    assert skipped.exit_code == 0
    assert "8 rows" in skipped.output
