"""What a recipe is: the modules it trains, its loss, and the files it leaves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .batch import Batch
from .draws import Draws
from .settings import RunSettings


class Samples(Protocol):
    """Where a run's batches come from; a function of the batch's number alone."""

    def batch(self, index: int, size: int, rank: int = 0, world: int = 1) -> Any:
        """Part `rank` of `world` of batch `index`: `size` samples, (Batch, or a recipe's own)."""


@dataclass(frozen=True)
class Losses:
    """What a step gives: the number to minimise, and all there is to draw curves of."""

    total: Tensor
    parts: Mapping[str, Tensor]


class Recipe(ABC):
    """One way to train. The loop owns optimiser, devices and files; a recipe owns the algorithm.

    `trained` is the module whose parameters that require gradients are optimised; the loop wraps
    it for several processes and passes the wrapped one to `loss`.
    """

    name: ClassVar[str]
    # settings that a resumed run of this recipe keeps, beside those that every recipe keeps
    fixed: ClassVar[frozenset[str]] = frozenset()
    settings: RunSettings
    trained: nn.Module
    samples: Samples

    @abstractmethod
    def loss(self, trained: nn.Module, batch: Batch, draws: Draws) -> Losses:
        """The loss of one batch; `trained` is the (wrapped) module of that name."""

    @abstractmethod
    def export(self, folder: Path) -> list[Path]:
        """Write what the run has made so far into `folder`, in files our loaders read."""

    def modules(self) -> dict[str, nn.Module]:
        """Every module whose weights a run that goes on needs, by a name for its file."""
        return {"trained": self.trained}

    def metadata(self, name: str) -> dict[str, str]:
        """The safetensors header of module `name` in a checkpoint, so that loaders read it."""
        return {}

    def frozen(self) -> list[nn.Module]:
        """Modules that never change and have to be on the device."""
        return []

    def every_module(self) -> list[nn.Module]:
        """All modules of a run: those that train or are saved, and the frozen ones."""
        return [*self.modules().values(), *self.frozen(), self.trained]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser gets; every group may have a `scale` of the learning rate."""
        return [{"params": [p for p in self.trained.parameters() if p.requires_grad]}]

    def after_step(self, step: int) -> None:  # noqa: B027  (most recipes have nothing to do)
        """What follows optimiser step `step` (from 0), such as an average of the weights."""

    @torch.no_grad()
    def sample(self, step: int) -> Tensor | None:
        """Pictures (B, 3, H, W) in 0..1 that show how far the run is; None where it has none."""
        return None
