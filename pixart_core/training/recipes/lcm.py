"""Distil a consistency model: PixArt-delta's recipe (arXiv 2401.05252, section 3 and figure 1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ...checkpoint.write import write_checkpoint
from ...config import METADATA_KEY
from ...load import load_transformer
from ...sampling.lcm import ANCHORS, lcm_denoise
from ...sampling.schedule import add_noise
from ..batch import Batch, Conditions
from ..consistency import ddim_hop, guided_noise, hop_timesteps, pseudo_huber
from ..draws import Draws
from ..ema import averaged_copy, update_average
from ..initialize import transformer_to_train
from ..recipe import Losses, Samples
from .denoiser import DenoiserRecipe, DenoiserSettings

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LCMSettings(DenoiserSettings):
    """Attributes beside those of every run:

    teacher: the checkpoint that is distilled; student and target start as it is.
    teacher_dtype: what the frozen teacher is kept and run in.
    guidance: the constant w; samplers would call it a guidance scale of 1 + w.
    anchors: timesteps that the student learns, 50 of the 1000.
    huber_c: of the pseudo-Huber distance; null for squared error.
    """

    teacher: Path
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    guidance: float = 4.5
    anchors: int = ANCHORS
    huber_c: float | None = 0.001
    sample_steps: int = 4
    ema_decay: float | None = 0.95


class LCM(DenoiserRecipe):
    """Student, target (the average of students) and frozen teacher, which alone sees guidance."""

    name = "lcm"
    settings: LCMSettings
    sampler = "lcm"

    def __init__(self, settings: LCMSettings, samples: Samples | None = None) -> None:
        self.settings = settings
        self.teacher = load_transformer(settings.teacher, dtype=_DTYPES[settings.teacher_dtype])
        self.teacher.requires_grad_(False)
        self.student = transformer_to_train(settings.teacher, seed=settings.seed)
        self.open_samples(self.student.config, samples)
        self.choose_null(self.student)
        self.prepare_student()

    def prepare_student(self) -> None:
        """Choose what is trained of the student, and what the target is."""
        if self.settings.ema_decay is None:
            raise ValueError("ema_decay is null; the target of distillation is an average of "
                             "students: use 0.95 as published, or 0 for the student itself")
        self.trained, self.target = self.student, averaged_copy(self.student)

    def loss(self, trained: nn.Module, batch: Batch, draws: Draws) -> Losses:
        start, end = hop_timesteps(draws.integers(self.settings.anchors), self.settings.anchors)
        x = add_noise(batch.latents, draws.noise(batch.latents), start)
        with torch.no_grad():
            x_end = ddim_hop(x, self.teach(x, start, batch), start, end)
        # the student too loses captions now and then, in the released code: see caption_dropout
        conditions = self.conditions(batch, self.dropped(draws)).arguments()
        prediction = lcm_denoise(trained(x, start, **conditions)[:, :4], x, start)
        with torch.no_grad():
            eps = self.target_module()(x_end, end, **conditions)[:, :4]
            target = lcm_denoise(eps, x_end, end)
        if self.settings.huber_c is None:
            distance = (prediction - target).square().mean()
        else:
            distance = pseudo_huber(prediction, target, self.settings.huber_c)
        return Losses(distance, {"distance": distance})

    def teach(self, x: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """The teacher's guided noise prediction (B, 4, H, W): with and without the caption."""
        without = torch.ones(len(batch), dtype=torch.bool, device=x.device)
        cond = self.teacher(x, t, **self.conditions(batch).arguments())[:, :4]
        uncond = self.teacher(x, t, **self.conditions(batch, without).arguments())[:, :4]
        return guided_noise(cond, uncond, self.settings.guidance)

    def target_module(self) -> nn.Module:
        return self.target

    def after_step(self, step: int) -> None:
        update_average(self.target, self.trained, self.settings.ema_decay)

    def modules(self) -> dict[str, nn.Module]:
        return {"trained": self.trained, "target": self.target}

    def frozen(self) -> list[nn.Module]:
        return [self.teacher]

    def metadata(self, name: str) -> dict[str, str]:
        return {METADATA_KEY: self.config.replace(distilled="lcm").to_json()}

    def export(self, folder: Path) -> list[Path]:
        path = folder / "transformer_lcm.safetensors"
        write_checkpoint(path, self.target.state_dict(), self.metadata("target"))
        return [path]

    def forward_sample(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return self.target_module()(x, t, **conditions.arguments())
