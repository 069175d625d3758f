"""Batches of a training cache, read row by row."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.header import CheckpointError
from ...config import PixArtConfig
from ..batch import Batch, NullCaption
from ..draws import mix_seed
from .index import NULL_NAME, CacheFacts, ShardEntry, read_index
from .order import BatchOrder
from .shard import REBUILD, EncodedCaption, ShardReader, states_digest

logger = logging.getLogger(__name__)

_OPEN_SHARDS = 128
_FAR = 1.5  # a model trained at a size this many times another is told so


class CachedSamples:
    """What `pixart train cache` wrote, as batches of one bucket.

    `batch` is a function of the seed, the batch's number and its size over all processes: neither
    an interruption nor the number of processes changes what is seen. Rows are read from their
    files when they are asked for and checked then (not with `verify` False); at most 128 files are
    open. Instances can be pickled, for readers in other processes.

    Raises CheckpointError for a folder without a sound index, and ValueError for an empty cache.
    """

    def __init__(self, folder: str | Path, seed: int = 0, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.seed = seed
        self.verify = verify
        index = read_index(self.folder)
        self.facts: CacheFacts = index.facts
        self._null_digest = index.null_digest
        self._shards = index.shards
        self._buckets = _rows_by_bucket(index.shards)
        if not len(self):
            raise ValueError(f"the training cache {self.folder} holds no rows; run `pixart train "
                             "cache` again")
        self._order = BatchOrder([len(rows) for rows in self._buckets.values()], seed)
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._null: NullCaption | None = None

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._buckets.values())

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_readers": OrderedDict()}

    @property
    def buckets(self) -> dict[tuple[int, int], int]:
        """Rows of each (height, width) in pixels."""
        return {size: len(rows) for size, rows in self._buckets.items()}

    @property
    def null_caption(self) -> NullCaption:
        """T5(""): states (L, D) float32 and a mask (L,) that is true everywhere."""
        if self._null is None:
            states = read_null(self.folder / NULL_NAME, self._null_digest)
            self._null = NullCaption(states.float(), torch.ones(len(states), dtype=torch.bool))
        return self._null

    def batches_per_epoch(self, global_size: int) -> int:
        """Batches of `global_size` samples, over all processes, in which every row comes once."""
        return self._order.batches_per_epoch(global_size)

    def batch(self, index: int, size: int, rank: int = 0, world: int = 1) -> Batch:
        """Part `rank` of `world` of batch `index`: `size` of its size * world samples."""
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of {world}; 0 to {world - 1} was expected")
        whole = size * world
        bucket, rows = self._order.batch(index, whole)
        first = rank * size
        numbers = range(index * whole + first, index * whole + first + size)
        return self._read(bucket, rows[first: first + size], numbers)

    def preview(self, count: int) -> Batch:
        """The first rows of the bucket that has most of them, `count` or as many as there are."""
        sizes = [len(rows) for rows in self._buckets.values()]
        bucket = sizes.index(max(sizes))
        rows = range(min(count, sizes[bucket]))
        return self._read(bucket, rows, rows)

    def check_fit(self, config: PixArtConfig) -> None:
        """Raise ValueError unless a model of `config` can be trained on these rows.

        A model of another training size, or of fewer tokens, is warned of.
        """
        facts = self.facts
        if facts.caption_channels != config.caption_channels:
            raise ValueError(
                f"the cache {self.folder} holds captions {facts.caption_channels} wide and the "
                f"model reads {config.caption_channels}; make a cache with the model's T5")
        if facts.variant != config.variant:
            raise ValueError(
                f"the cache {self.folder} holds latents for {facts.variant} (VAE factor "
                f"{facts.latent_scale:g}) and the model is {config.variant} "
                f"({config.latent_scale:g}); make a cache with --variant {config.variant} and its "
                "VAE")
        larger, smaller = sorted((facts.image_size, config.image_size), reverse=True)
        if larger >= _FAR * smaller:
            logger.warning("the cache %s holds pictures of about %d px and the model was trained "
                           "at %d", self.folder, facts.image_size, config.image_size)
        if facts.max_tokens > config.max_tokens:
            logger.warning("the cache %s holds captions of up to %d tokens and the model was "
                           "trained on %d", self.folder, facts.max_tokens, config.max_tokens)

    def require_control(self) -> None:
        """Raise ValueError for a cache without control images."""
        if self.facts.control == "none":
            raise ValueError(f"the cache {self.folder} holds no control images; make one with "
                             "`pixart train cache --control hed --hed FILE` or `--control folder`")

    def close(self) -> None:
        """Close all files; they are opened again when they are needed."""
        while self._readers:
            self._readers.popitem()[1].close()

    def _read(self, bucket: int, rows: Sequence[int], numbers: Sequence[int]) -> Batch:
        (height, width), places = list(self._buckets.items())[bucket]
        latents, controls, captions = [], [], []
        for row, number in zip(rows, numbers, strict=True):
            shard, line = places[row].tolist()
            reader = self._reader(shard)
            latent, control = reader.latents(line)
            latents.append(latent.float())
            if control is not None:
                controls.append(control.float())
            variants = reader.variants(line)
            captions.append(reader.caption(variants[mix_seed(self.seed, number) % len(variants)]))
        caption, mask = _padded(captions)
        count = len(latents)
        return Batch(
            numbers=tuple(numbers),
            latents=torch.stack(latents),
            caption=caption,
            mask=mask,
            image_size=torch.tensor([[height, width]], dtype=torch.float32).repeat(count, 1),
            aspect_ratio=torch.tensor([[height / width]], dtype=torch.float32).repeat(count, 1),
            control=torch.stack(controls) if controls else None,
            texts=tuple(found.text for found in captions),
        )

    def _reader(self, shard: int) -> ShardReader:
        reader = self._readers.get(shard)
        if reader is None:
            reader = ShardReader(self.folder, self._shards[shard], self.verify)
            self._readers[shard] = reader
            if len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)[1].close()
        self._readers.move_to_end(shard)
        return reader


def _rows_by_bucket(shards: Sequence[ShardEntry]) -> dict[tuple[int, int], Tensor]:
    """For each (height, width): shard and row (N, 2) of every row that counts."""
    parts: dict[tuple[int, int], list[Tensor]] = {}
    for number, shard in enumerate(shards):
        counts = torch.ones(shard.rows, dtype=torch.bool)
        counts[list(shard.skip)] = False
        rows = counts.nonzero()[:, 0].to(torch.int32)
        if len(rows):
            place = torch.stack([torch.full_like(rows, number), rows], dim=1)
            parts.setdefault((shard.height, shard.width), []).append(place)
    return {size: torch.cat(found) for size, found in sorted(parts.items())}


def _padded(captions: Sequence[EncodedCaption]) -> tuple[Tensor, Tensor]:
    """States (B, L, D) float32, padded with zeros to the longest, and the mask (B, L)."""
    lengths = torch.tensor([len(caption.states) for caption in captions])
    states = torch.nn.utils.rnn.pad_sequence([c.states.float() for c in captions],
                                             batch_first=True)
    return states, torch.arange(states.shape[1]) < lengths[:, None]


def read_null(path: Path, digest: str) -> Tensor:
    """T5("") of a cache, (L, D) as stored; CheckpointError where it is not as the index says."""
    from safetensors.torch import load

    try:
        states = load(path.read_bytes())["caption"]  # a mapped file could change under the run
        if states_digest(states) != digest:
            raise ValueError("it is not the one that the index names")
    except Exception as error:  # safetensors has an exception of its own
        raise CheckpointError(f"{path}, the caption of nothing, cannot be used: {error}; "
                              f"{REBUILD.replace('this shard', 'it')}") from error
    return states
