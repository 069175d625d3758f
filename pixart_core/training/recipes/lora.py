"""Teach a model a subject or a style: a LoRA on a few pictures (DreamBooth, arXiv 2208.12242)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from ...sampling.schedule import NUM_TRAIN_TIMESTEPS, add_noise
from ..adapters import TARGETS, Adapters
from ..batch import Batch, Conditions
from ..diffusion import noise_loss
from ..draws import Draws
from ..initialize import transformer_to_train
from ..prior import PriorBatch, open_with_prior, prior_draws
from ..recipe import Losses, Samples
from .denoiser import DenoiserRecipe, DenoiserSettings


@dataclass(frozen=True, kw_only=True)
class LoRASettings(DenoiserSettings):
    """Attributes beside those of every run:

    model: the checkpoint that the LoRA is for; it stays as it is.
    rank, alpha: of the LoRA; alpha null is the rank, a strength of 1.
    targets: "attention", "blocks" (with the MLPs) or "everywhere" (embedders and last layer too).
    weight_clip: see `noise_loss`.
    class_data: a second cache, of pictures of the subject's class, whose loss is added so that
        the model keeps what it knows of them (prior preservation); null for none.
    prior_loss_weight: of that loss; null is 1.
    """

    model: Path
    rank: int = 16
    alpha: float | None = None
    targets: Literal["attention", "blocks", "everywhere"] = "attention"
    weight_clip: float | None = None
    class_data: Path | None = None
    prior_loss_weight: float | None = None
    caption_dropout: float = 0.0
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank, self.alpha)
        if self.ema_decay is not None:
            raise ValueError("a LoRA is handed out as it was trained; leave ema_decay null")
        weight = self.prior_loss_weight
        if weight is not None and self.class_data is None:
            raise ValueError(f"prior_loss_weight is {weight:g}, but there are no class pictures to "
                             "weigh; name their cache as class_data, or leave the weight out")
        if weight is not None and not 0 < weight < math.inf:
            raise ValueError(f"prior_loss_weight is {weight!r}; use a number above 0 (1 is usual), "
                             "or leave class_data out")


class LoRA(DenoiserRecipe):
    """Noise prediction as in the base recipe; only the adapters are trained.

    With class pictures the loss is that of the subject's samples plus `prior_loss_weight` times
    that of as many of the class (equation 2 of DreamBooth), each with its own t and noise.
    """

    name = "lora"
    settings: LoRASettings

    def __init__(self, settings: LoRASettings, samples: Samples | None = None) -> None:
        self.settings = settings
        if samples is None and settings.class_data is not None:
            samples = open_with_prior(settings.data, settings.class_data, settings.seed)
        model = transformer_to_train(settings.model, seed=settings.seed)
        self.open_samples(model.config, samples)
        self.choose_null(model)
        self.adapters = Adapters(model, TARGETS[settings.targets], settings.rank, settings.alpha,
                                 settings.seed)
        self.trained = model

    def loss(self, trained: nn.Module, batch: Batch | PriorBatch, draws: Draws) -> Losses:
        if not isinstance(batch, PriorBatch):
            error = self.noise_error(trained, batch, draws)
            return Losses(error, {"noise": error})
        error = self.noise_error(trained, batch.subject, draws)
        prior = self.noise_error(trained, batch.prior,
                                 prior_draws(self.settings.seed, batch, draws.device))
        weight = 1.0 if self.settings.prior_loss_weight is None else self.settings.prior_loss_weight
        return Losses(error + weight * prior, {"noise": error, "prior": prior})

    def noise_error(self, trained: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """The mean error of the noise prediction for a batch, 0-d."""
        t = draws.integers(NUM_TRAIN_TIMESTEPS)
        noise = draws.noise(batch.latents)
        conditions = self.conditions(batch, self.dropped(draws)).arguments()
        out = trained(add_noise(batch.latents, noise, t), t, **conditions)
        return noise_loss(out[:, :4], noise, t, self.settings.weight_clip).mean()

    def modules(self) -> dict[str, nn.Module]:
        return {"adapters": self.adapters}

    def export(self, folder: Path) -> list[Path]:
        path = folder / "lora.safetensors"
        self.adapters.write(path)
        return [path]

    def forward_sample(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return self.trained(x, t, **conditions.arguments())


def check_rank(rank: int, alpha: float | None) -> None:
    """Raise ValueError for a rank that no LoRA has, and for an alpha under which none learns."""
    if rank < 1:
        raise ValueError(f"rank is {rank}; use 1 or more (4 to 64 are usual)")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha!r}; use a number above 0, or null for the rank")
