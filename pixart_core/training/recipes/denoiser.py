"""What the recipes that train on encoded pictures share: data, null caption, samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...config import PixArtConfig
from ...model import PixArtTransformer
from ...vae import VAE, load_vae
from ..batch import Batch, Conditions, NullCaption
from ..data import CachedSamples
from ..draws import Draws
from ..recipe import Recipe, Samples
from ..sampling import conditions_of, sample_batch
from ..settings import RunSettings, at_least


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings(RunSettings):
    """What every recipe on cached latents takes.

    Attributes:
        data: folder that `pixart train cache` wrote.
        caption_dropout: share of captions that are replaced by the null caption.
        null_caption: "learned" is the model's own `y_embedding` under the prompt's mask, as the
            released code trains; "empty" is T5(""); "auto" is learned where the model has it.
        ema_decay: of the average of the weights that the run hands out; null for none.
        vae: decodes the sample grids; without one there are none.
        sample_count, sample_steps, sample_guidance: of a grid.
    """

    data: Path
    caption_dropout: float = 0.1
    null_caption: Literal["auto", "learned", "empty"] = "auto"
    ema_decay: float | None = 0.9999
    vae: Path | None = None
    sample_count: int = 8
    sample_steps: int = 20
    sample_guidance: float = 4.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sample_count", "sample_steps"):
            at_least(self, name, 1)
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout is {self.caption_dropout!r}; use 0 to 1")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay!r}; use 0 up to, not including, 1, or "
                             "null for no average")


class DenoiserRecipe(Recipe):
    """A recipe whose batches are cached latents and captions of a transformer of `config`."""

    settings: DenoiserSettings
    config: PixArtConfig
    sampler = "dpm"

    def open_samples(self, config: PixArtConfig, samples: Samples | None) -> None:
        """Take `samples`, or open the cache; ValueError where it does not fit a model of `config`.
        """
        self.config = config
        self.samples = samples or CachedSamples(self.settings.data, seed=self.settings.seed)
        self.samples.check_fit(config)
        self._vae: VAE | None = None

    def choose_null(self, model: PixArtTransformer) -> None:
        """Set the null caption that the settings want; ValueError where `model` has none."""
        learned, wanted = model.null_caption, self.settings.null_caption
        if wanted == "learned" and learned is None:
            raise ValueError("null_caption is learned, but the model's file has no learned null "
                             "caption (y_embedder.y_embedding); use null_caption=empty")
        if wanted == "empty" or learned is None:
            self.null = self.samples.null_caption
        else:
            self.null = NullCaption(learned.detach().float().clone(), None)

    def conditions(self, batch: Batch, dropped: Tensor | None = None) -> Conditions:
        """What the model is told, with the captions of `dropped` (B,) bool made null."""
        return conditions_of(batch, self.config, self.null, dropped)

    def dropped(self, draws: Draws) -> Tensor | None:
        """Which samples lose their caption, (B,) bool; None when no recipe of this run does so."""
        share = self.settings.caption_dropout
        return draws.uniform() < share if share > 0 else None

    def forward_sample(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The model that samples are drawn from."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(self, step: int) -> Tensor | None:
        settings = self.settings
        if settings.vae is None:
            return None
        batch = self.samples.preview(settings.sample_count).to(self.device())
        if self._vae is None:
            self._vae = load_vae(settings.vae, self.config.variant, device=self.device())
        self.preview = batch
        latents = sample_batch(self.forward_sample, batch, self.config, self.null, self.sampler,
                               settings.sample_steps, settings.sample_guidance, settings.seed)
        return self._vae.decode(latents)

    def device(self) -> torch.device:
        return next(self.trained.parameters()).device
