"""Train or fine-tune a base model: noise prediction and learned variance (IDDPM, 2102.09672)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ...checkpoint.write import write_checkpoint
from ...config import METADATA_KEY
from ...model import PixArtTransformer
from ...sampling.schedule import NUM_TRAIN_TIMESTEPS, add_noise
from ..batch import Batch, Conditions
from ..diffusion import focused_timesteps, noise_loss, variance_loss
from ..draws import Draws
from ..ema import averaged_copy, update_average, warmed_decay
from ..initialize import transformer_to_train
from ..recipe import Losses, Samples
from .denoiser import DenoiserRecipe, DenoiserSettings


@dataclass(frozen=True, kw_only=True)
class BaseSettings(DenoiserSettings):
    """Attributes beside those of every run:

    model: a checkpoint to fine-tune, or config fields (and `preset`) for one from scratch.
    kv_compression: sampling, factor and layers of KV compression to switch on.
    learn_variance: train the other half of the output too.
    weight_clip, weight_floor: see `noise_loss`; null weighs all timesteps the same.
    timestep_focus: mean and deviation of the logit of t / 1000, see `focused_timesteps`; null
        draws all timesteps as often, as the released code does.
    """

    model: dict | Path
    kv_compression: dict | None = None
    learn_variance: bool = True
    weight_clip: float | None = None
    weight_floor: float = 1.0
    timestep_focus: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timestep_focus is not None and not self.timestep_focus[1] > 0:
            raise ValueError(f"timestep_focus is {list(self.timestep_focus)}; its second number, "
                             "the deviation, must be above 0")
        if self.weight_floor < 0:
            raise ValueError(f"weight_floor is {self.weight_floor}; use 0 or more")
        if self.weight_floor != 1 and self.weight_clip is None:
            raise ValueError(f"weight_floor is {self.weight_floor}, but weight_clip is null, which "
                             "weighs all timesteps the same; set it too, 100 for example")


class Base(DenoiserRecipe):
    """epsilon and variance of x_t = sqrt(alpha-bar) x0 + sqrt(1 - alpha-bar) noise.

    t is uniform unless `timestep_focus` says otherwise.
    """

    name = "base"
    settings: BaseSettings

    def __init__(self, settings: BaseSettings, samples: Samples | None = None) -> None:
        self.settings = settings
        model = transformer_to_train(settings.model, settings.kv_compression, settings.seed)
        self.open_samples(model.config, samples)
        if isinstance(settings.model, dict):
            self._store_null(model)
        self.choose_null(model)
        self.trained = model
        self.average = averaged_copy(model) if settings.ema_decay is not None else None

    def loss(self, trained: nn.Module, batch: Batch, draws: Draws) -> Losses:
        t = self._timesteps(draws)
        noise = draws.noise(batch.latents)
        conditions = self.conditions(batch, self.dropped(draws))
        x = add_noise(batch.latents, noise, t)
        out = trained(x, t, **conditions.arguments())
        error = noise_loss(out[:, :4], noise, t, self.settings.weight_clip,
                           self.settings.weight_floor).mean()
        if not self.settings.learn_variance or out.shape[1] == 4:
            return Losses(error, {"noise": error})
        bound = variance_loss(out, batch.latents, x, t).mean()
        return Losses(error + bound, {"noise": error, "variance": bound})

    def _timesteps(self, draws: Draws) -> Tensor:
        focus = self.settings.timestep_focus
        if focus is None:
            return draws.integers(NUM_TRAIN_TIMESTEPS)
        return focused_timesteps(draws.uniform(), *focus)

    def after_step(self, step: int) -> None:
        if self.average is not None:
            decay = warmed_decay(self.settings.ema_decay, step)
            update_average(self.average, self.trained, decay)

    def modules(self) -> dict[str, nn.Module]:
        return {"trained": self.trained} | ({"average": self.average} if self.average else {})

    def metadata(self, name: str) -> dict[str, str]:
        return {METADATA_KEY: self.config.to_json()}

    def export(self, folder: Path) -> list[Path]:
        path = folder / "transformer.safetensors"
        model = self.average or self.trained
        write_checkpoint(path, model.state_dict(), self.metadata(path.stem))
        return [path]

    def forward_sample(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return (self.average or self.trained)(x, t, **conditions.arguments())

    def _store_null(self, model: PixArtTransformer) -> None:
        """Put T5("") where files keep the null caption, for a model that starts from nothing."""
        empty = self.samples.null_caption
        count = min(len(empty.states), int(empty.mask.sum()))
        table = model.y_embedder.y_embedding
        table.copy_(empty.states[count - 1].expand_as(table))
        table[:count] = empty.states[:count]
