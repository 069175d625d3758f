"""The random numbers of training: a function of the seed and the sample's number, nothing else.

So neither the number of processes nor an interruption changes what a sample sees, and there is no
generator whose state would have to be saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Draws:
    """What is drawn for the samples of one batch, each from a generator of its own.

    `numbers` are the samples' places in the whole run, counted over all processes. Every method
    takes the next numbers of each generator, so the order of the calls matters. Tensors are drawn
    on the CPU, the same for every device, and moved.
    """

    def __init__(self, seed: int, numbers: Sequence[int],
                 device: torch.device | str | None = None) -> None:
        self.device = device
        self._generators = [torch.Generator().manual_seed(mix_seed(seed, n)) for n in numbers]

    def uniform(self) -> Tensor:
        """One number in [0, 1) for each sample: (B,) float64."""
        drawn = [torch.rand((), generator=g, dtype=torch.float64) for g in self._generators]
        return torch.stack(drawn).to(self.device)

    def integers(self, high: int) -> Tensor:
        """One integer in 0..high - 1 for each sample: (B,) int64."""
        drawn = [torch.randint(high, (), generator=g) for g in self._generators]
        return torch.stack(drawn).to(self.device)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal noise of the shape, dtype and device of `like` (B, ...)."""
        drawn = [torch.randn(like.shape[1:], generator=g) for g in self._generators]
        return torch.stack(drawn).to(like)


def mix_seed(seed: int, *numbers: int) -> int:
    """A 63-bit seed out of a seed and numbers; neighbours give unrelated ones."""
    text = ",".join(map(str, (seed, *numbers))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
