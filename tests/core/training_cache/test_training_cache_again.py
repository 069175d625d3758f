"""The training cache made again: what goes on, what is encoded anew, what is refused."""

from __future__ import annotations

import os
import shutil

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from training_cache_files import PLAIN, SHAPES, all_rows, changed, draw, fill

from pixart_core.checkpoint.read import CheckpointError
from pixart_core.training.data import CachedSamples, build_cache
from pixart_core.training.data import cache as cache_module


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
