"""Encoded samples that live in memory: random latents and captions, for tests of training."""

from __future__ import annotations

import torch

from pixart_core.training.batch import Batch, NullCaption


class MemorySamples:
    """`count` random samples of one size, in order, over and over."""

    def __init__(self, count=16, size=(8, 6), tokens=5, channels=24, control=False, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.latents = torch.randn(count, 4, *size, generator=g)
        self.caption = torch.randn(count, tokens, channels, generator=g)
        self.mask = torch.arange(tokens)[None] <= torch.arange(count)[:, None] % tokens
        self.caption *= self.mask[..., None]
        self.control = torch.randn(count, 4, *size, generator=g) if control else None
        states = torch.randn(2, channels, generator=g)
        self.null_caption = NullCaption(states, torch.tensor([True, False]))

    def check_fit(self, config):
        pass

    def require_control(self):
        assert self.control is not None

    def batch(self, index, size, rank=0, world=1):
        first = index * size * world + rank * size
        return self._rows(range(first, first + size))

    def preview(self, count):
        return self._rows(range(count))

    def _rows(self, numbers):
        rows = [n % len(self.latents) for n in numbers]
        h, w = (8 * n for n in self.latents.shape[-2:])
        sizes = torch.tensor([[h, w]] * len(rows)).float()
        control = None if self.control is None else self.control[rows]
        return Batch(tuple(numbers), self.latents[rows], self.caption[rows], self.mask[rows],
                     sizes, sizes[:, :1] / sizes[:, 1:], control, tuple(str(r) for r in rows))
