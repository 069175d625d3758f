"""What the layers of a network see while it draws: a bounded sample of their inputs.

SVDQuant (arXiv 2411.05007) chooses its smoothing and its branch by the output error on such rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class RowSample:
    """A uniform sample of at most `count` rows of a stream, the same for the same seed.

    Every row draws a number and those with the smallest numbers stay (reservoir sampling), so that
    late timesteps count as much as early ones. Rows are kept on the CPU in the dtype they have.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seen = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._rows: Tensor | None = None

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """More rows: x (..., K)."""
        rows = x.reshape(-1, x.shape[-1])
        self.seen += len(rows)
        keys = torch.rand(len(rows), generator=self._generator, dtype=torch.float64)
        both = torch.cat([self._keys, keys])
        kept = both.argsort(stable=True)[: self.count]
        old, new = kept[kept < len(self._keys)], kept[kept >= len(self._keys)]
        fresh = rows[(new - len(self._keys)).to(rows.device)].cpu()
        before = fresh[:0] if self._rows is None else self._rows[old]
        self._keys = torch.cat([both[old], both[new]])
        self._rows = torch.cat([before, fresh])

    def rows(self) -> Tensor:
        """The sample (rows, K) in random order; ValueError where nothing was seen."""
        if self._rows is None:
            raise ValueError("no rows were seen; the layer did not run")
        return self._rows[self._keys.argsort(stable=True)]


@contextmanager
def sampled_inputs(model: nn.Module, layers: Iterable[str], count: int,
                   seed: int) -> Iterator[dict[str, RowSample]]:
    """Samples of what enters the linear `layers` of `model`, by name, while this is open.

    Raises AttributeError for a layer that is not there.
    """
    samples: dict[str, RowSample] = {}
    handles = []
    try:
        for name in layers:
            sample = samples[name] = RowSample(count, zlib.crc32(f"{seed} {name}".encode()))
            handles.append(model.get_submodule(name).register_forward_pre_hook(_watch(sample)))
        yield samples
    finally:
        for handle in handles:
            handle.remove()


def _watch(sample: RowSample) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        sample.add(arguments[0])
    return hook
