"""Train a ControlNet-Transformer beside a frozen model (arXiv 2401.05252, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...checkpoint.write import write_checkpoint
from ...config import METADATA_KEY
from ...load_control import load_controlnet
from ...model import Control, PixArtControlNet, PixArtTransformer
from ...sampling.schedule import NUM_TRAIN_TIMESTEPS, add_noise
from ..batch import Batch, Conditions
from ..diffusion import noise_loss
from ..draws import Draws
from ..ema import averaged_copy, update_average, warmed_decay
from ..initialize import transformer_to_train
from ..recipe import Losses, Samples
from .denoiser import DenoiserRecipe, DenoiserSettings


@dataclass(frozen=True, kw_only=True)
class ControlNetSettings(DenoiserSettings):
    """Attributes beside those of every run:

    model: the checkpoint to steer; it stays as it is.
    depth: blocks to copy (13 of 28 as published).
    controlnet: a ControlNet to train further, in place of new copies.
    projection_scale: of the learning rate, for the projections that start at zero.
    weight_clip: see `noise_loss`.
    """

    model: Path
    depth: int = 13
    controlnet: Path | None = None
    projection_scale: float = 1.0
    weight_clip: float | None = None
    ema_decay: float | None = None


class Controlled(nn.Module):
    """A transformer steered by a ControlNet: one module, for wrappers that follow `forward`."""

    def __init__(self, base: PixArtTransformer, net: PixArtControlNet) -> None:
        super().__init__()
        self.base, self.net = base, net

    def forward(self, x: Tensor, t: Tensor, control: Tensor, **conditions: Any) -> Tensor:
        """As the transformer, with the control latents (B, 4, H, W)."""
        return self.base(x, t, **conditions, control=[Control(self.net, control)])


class ControlNet(DenoiserRecipe):
    """Noise prediction as in the base recipe; only copies and projections are trained."""

    name = "controlnet"
    settings: ControlNetSettings

    def __init__(self, settings: ControlNetSettings, samples: Samples | None = None) -> None:
        self.settings = settings
        base = transformer_to_train(settings.model, seed=settings.seed)
        self.open_samples(base.config, samples)
        self.choose_null(base)
        self.samples.require_control()
        if settings.controlnet is None:
            net = PixArtControlNet.from_base(base, settings.depth)
        else:
            net = load_controlnet(settings.controlnet, base=base.config)
            net.float()
        base.eval().requires_grad_(False)
        net.train().requires_grad_(True)
        self.base, self.net = base, net
        self.trained = Controlled(base, net)
        self.average = averaged_copy(net) if settings.ema_decay is not None else None

    def loss(self, trained: nn.Module, batch: Batch, draws: Draws) -> Losses:
        t = draws.integers(NUM_TRAIN_TIMESTEPS)
        noise = draws.noise(batch.latents)
        conditions = self.conditions(batch, self.dropped(draws)).arguments()
        x = add_noise(batch.latents, noise, t)
        out = trained(x, t, batch.control, **conditions)
        error = noise_loss(out[:, :4], noise, t, self.settings.weight_clip).mean()
        return Losses(error, {"noise": error})

    def parameter_groups(self) -> list[dict[str, Any]]:
        projections, rest = [], []
        for name, parameter in self.net.named_parameters():
            outside = "copied_block" not in name
            (projections if outside else rest).append(parameter)
        return [{"params": projections, "scale": self.settings.projection_scale},
                {"params": rest}]

    def after_step(self, step: int) -> None:
        if self.average is not None:
            update_average(self.average, self.net, warmed_decay(self.settings.ema_decay, step))

    def modules(self) -> dict[str, nn.Module]:
        return {"trained": self.net} | ({"average": self.average} if self.average else {})

    def frozen(self) -> list[nn.Module]:
        return [self.base]

    def metadata(self, name: str) -> dict[str, str]:
        return {METADATA_KEY: self.net.config.to_json()}

    def export(self, folder: Path) -> list[Path]:
        path = folder / "controlnet.safetensors"
        net = self.average or self.net
        write_checkpoint(path, net.state_dict(), self.metadata(path.stem))
        return [path]

    def forward_sample(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        control = self.preview.control
        control = control.repeat(len(x) // len(control), 1, 1, 1)
        net = self.average or self.net
        return self.base(x, t, **conditions.arguments(), control=[Control(net, control)])
