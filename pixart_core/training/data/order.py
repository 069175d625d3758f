"""The order of samples: a pure function of the seed, the size of a batch and its number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..draws import mix_seed

_BATCHES, _ROWS, _FILLING = range(3)  # what a permutation is for


class BatchOrder:
    """Which rows of which bucket make batch `index`, for batches of `size` rows in all.

    In an epoch every bucket's rows come once, in shuffled order; where the last batch of a bucket
    is not full, further rows of the same bucket fill it. The batches of all buckets are shuffled
    among each other. Nothing is drawn from a running generator, so any batch can be asked for at
    any time; the permutations of one epoch are kept.
    """

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        self.counts = tuple(counts)
        self.seed = seed
        self._epoch: _Epoch | None = None

    def batches_per_epoch(self, size: int) -> int:
        """Batches of `size` rows in which every row comes once."""
        return sum(-(-count // size) for count in self.counts)

    def batch(self, index: int, size: int) -> tuple[int, list[int]]:
        """The bucket of batch `index` (from 0, over all epochs) and its `size` rows in there."""
        if index < 0 or size < 1:
            raise ValueError(f"batch {index} of {size} rows; a number from 0 and a size from 1 "
                             "were expected")
        number, place = divmod(index, self.batches_per_epoch(size))
        if self._epoch is None or (self._epoch.number, self._epoch.size) != (number, size):
            self._epoch = _Epoch(self.counts, self.seed, number, size)
        return self._epoch.batch(place)


@dataclass
class _Epoch:
    counts: tuple[int, ...]
    seed: int
    number: int
    size: int

    def __post_init__(self) -> None:
        of_bucket = [torch.full((-(-count // self.size),), bucket)
                     for bucket, count in enumerate(self.counts)]
        within = [torch.arange(len(batches)) for batches in of_bucket]
        shuffled = self._permutation(sum(map(len, of_bucket)), _BATCHES, 0)
        self._buckets = torch.cat(of_bucket)[shuffled]
        self._places = torch.cat(within)[shuffled]
        self._rows: dict[int, Tensor] = {}

    def batch(self, place: int) -> tuple[int, list[int]]:
        bucket, start = int(self._buckets[place]), int(self._places[place]) * self.size
        if bucket not in self._rows:
            self._rows[bucket] = self._order(bucket)
        return bucket, self._rows[bucket][start: start + self.size].tolist()

    def _order(self, bucket: int) -> Tensor:
        """The bucket's rows, and those that fill its last batch."""
        count = self.counts[bucket]
        rows = self._permutation(count, _ROWS, bucket)
        missing = -count % self.size
        if not missing:
            return rows
        last = torch.zeros(count, dtype=torch.bool)
        last[rows[count - count % self.size:]] = True
        again = self._permutation(count, _FILLING, bucket)
        # rows of the last batch come last, so that none is there twice unless it has to be
        again = torch.cat([again[~last[again]], again[last[again]]])
        return torch.cat([rows, again.repeat(-(-missing // count))[:missing]])

    def _permutation(self, count: int, purpose: int, bucket: int) -> Tensor:
        seed = mix_seed(self.seed, self.size, self.number, purpose, bucket)
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
