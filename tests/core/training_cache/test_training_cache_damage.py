"""Damaged training caches: named, and made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from training_cache_files import PLAIN, all_rows

from pixart_core.checkpoint.read import CheckpointError
from pixart_core.training.data import CachedSamples, build_cache


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
