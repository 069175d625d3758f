"""Pictures of a class beside those of a subject: DreamBooth's prior preservation (2208.12242, 3.3).

A model that sees one dog again and again forgets the others. So every batch has as many pictures
of the class, drawn by the model itself before training, and their loss is added.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..config import PixArtConfig
from .batch import Batch, NullCaption
from .data import CachedSamples
from .draws import Draws, mix_seed

_CLASS = 1  # tells the class's order and noise from the subject's


@dataclass(frozen=True)
class PriorBatch:
    """As many samples of the class as of the subject, maybe of another bucket."""

    subject: Batch
    prior: Batch

    @property
    def numbers(self) -> tuple[int, ...]:
        """The places of the subject's samples in the run, which the class's share."""
        return self.subject.numbers

    def __len__(self) -> int:
        return len(self.subject)

    def to(self, device: torch.device | str) -> PriorBatch:
        return PriorBatch(self.subject.to(device), self.prior.to(device))


class PairedSource(Protocol):
    """Encoded samples, as `CachedSamples` gives them."""

    null_caption: NullCaption

    def batch(self, index: int, size: int, rank: int = 0, world: int = 1) -> Batch: ...

    def preview(self, count: int) -> Batch: ...

    def check_fit(self, config: PixArtConfig) -> None: ...


class PriorSamples:
    """Batches of a subject's samples with as many of its class; all else is the subject's."""

    def __init__(self, subject: PairedSource, prior: PairedSource) -> None:
        self.subject, self.prior = subject, prior
        self.null_caption = subject.null_caption

    def batch(self, index: int, size: int, rank: int = 0, world: int = 1) -> PriorBatch:
        """Part `rank` of `world` of batch `index` of both: `size` samples each."""
        return PriorBatch(self.subject.batch(index, size, rank, world),
                          self.prior.batch(index, size, rank, world))

    def preview(self, count: int) -> Batch:
        """The subject's."""
        return self.subject.preview(count)

    def check_fit(self, config: PixArtConfig) -> None:
        """Raise ValueError where either does not fit a model of `config`."""
        self.subject.check_fit(config)
        self.prior.check_fit(config)


def open_with_prior(data: Path, class_data: Path, seed: int) -> PriorSamples:
    """The caches of a subject and of its class, each in an order of its own.

    Raises ValueError for one and the same cache and for caches of different picture sizes, and
    what `CachedSamples` raises.
    """
    if os.path.realpath(data) == os.path.realpath(class_data):
        raise ValueError(f"data and class_data are the same cache ({data}); class_data is one of "
                         "pictures that show the class without the subject")
    subject = CachedSamples(data, seed=seed)
    # with one seed two caches of as many rows would pair the same pictures in every epoch
    prior = CachedSamples(class_data, seed=mix_seed(seed, _CLASS))
    if subject.facts.image_size != prior.facts.image_size:
        raise ValueError(
            f"class_data {class_data} holds pictures of about {prior.facts.image_size} px and data "
            f"{data} of {subject.facts.image_size}; make both caches with one --image-size")
    return PriorSamples(subject, prior)


def prior_draws(seed: int, batch: PriorBatch, device: torch.device | str | None = None) -> Draws:
    """The random numbers of the class's samples: functions of seed and number, as all are."""
    return Draws(mix_seed(seed, _CLASS), batch.prior.numbers, device)
