"""A cache for the other variant on the same VAE: the same latents under that variant's factor."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from ...checkpoint.write import write_checkpoint
from ...config import LATENT_SCALE, Variant
from .index import INDEX_NAME, NULL_NAME, CacheIndex, ShardEntry, read_index
from .samples import read_null
from .shard import ShardReader, ShardRow, write_shard


def rescale_cache(source: str | Path, out: str | Path, variant: Variant) -> CacheIndex:
    """Write the cache `source` once more, for a model of `variant`; nothing is encoded again.

    Latents and control latents are multiplied by the ratio of the variants' latent factors
    (0.13025 / 0.18215 from alpha to Sigma), captions stay as they are. Every row is checked while
    it is read. A shard appears when it is whole, and the index comes last, so that a stopped run
    leaves no cache; one that is there is kept. Returns its index.

    Raises CheckpointError for a cache that is damaged or cannot be written, and ValueError for a
    variant that there is not, or where `out` is a cache of other facts or of other rows.
    """
    source, out = Path(source), Path(out)
    if variant not in LATENT_SCALE:
        raise ValueError(f"variant is {variant!r}; use one of {tuple(LATENT_SCALE)}")
    index = read_index(source)
    factor = LATENT_SCALE[variant] / index.facts.latent_scale
    facts = dataclasses.replace(index.facts, variant=variant, latent_scale=LATENT_SCALE[variant])
    if (out / INDEX_NAME).exists():
        found = read_index(out)
        differences = found.facts.differences(facts)
        if differences:
            raise ValueError(f"{out} is another cache ({differences[0]}); delete it, or name "
                             "another folder")
        if _origin(found) != _origin(index):
            raise ValueError(f"{out} was made of another cache than {source}; delete it, or name "
                             "another folder")
        return found
    out.mkdir(parents=True, exist_ok=True)
    write_checkpoint(out / NULL_NAME, {"caption": read_null(source / NULL_NAME,
                                                            index.null_digest)}, {})
    shards = [_rescaled(source, entry, out, factor) for entry in index.shards]
    written = CacheIndex(facts, index.null_digest, shards, index.next_number)
    written.write(out)
    return written


def _origin(index: CacheIndex) -> tuple[object, ...]:
    """What a cache was encoded from, which one that was rescaled from it shares."""
    return index.null_digest, [(entry.file, entry.sources_digest) for entry in index.shards]


def _rescaled(source: Path, entry: ShardEntry, out: Path, factor: float) -> ShardEntry:
    reader = ShardReader(source, entry)
    try:
        sources = reader.sources()
        variants = [reader.variants(row) for row in range(entry.rows)]
        rows = []
        for row in range(entry.rows):
            latents, control = reader.latents(row)
            rows.append(ShardRow(sources[row], _times(latents, factor),
                                 None if control is None else _times(control, factor),
                                 tuple(variants[row])))
        count = 1 + max(number for own in variants for number in own)
        captions = [reader.caption(number) for number in range(count)]
    finally:
        reader.close()
    written = write_shard(out / entry.file, rows, captions, entry.height, entry.width)
    return dataclasses.replace(written, skip=entry.skip)


def _times(latents: Tensor, factor: float) -> Tensor:
    """Rounded once, from float32."""
    return (latents.float() * factor).to(latents.dtype)
