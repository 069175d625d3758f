"""Distil a consistency model into a LoRA (arXiv 2311.05556; PixArt-delta's LCM-LoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from ..adapters import TARGETS, Adapters
from .lcm import LCM, LCMSettings
from .lora import check_rank


@dataclass(frozen=True, kw_only=True)
class LCMLoRASettings(LCMSettings):
    """Attributes beside those of the LCM recipe: rank, alpha and targets as in the LoRA recipe."""

    rank: int = 32
    alpha: float | None = None
    targets: Literal["attention", "blocks", "everywhere"] = "everywhere"
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank, self.alpha)
        if self.ema_decay is not None:
            raise ValueError("the target of LCM-LoRA is the student itself; leave ema_decay null")


class LCMLoRA(LCM):
    """The student is the teacher with adapters, and its own target."""

    name = "lcm-lora"
    settings: LCMLoRASettings

    def prepare_student(self) -> None:
        settings = self.settings
        self.adapters = Adapters(self.student, TARGETS[settings.targets], settings.rank,
                                 settings.alpha, settings.seed)
        self.trained = self.student

    def target_module(self) -> nn.Module:
        return self.student

    def after_step(self, step: int) -> None:
        pass

    def modules(self) -> dict[str, nn.Module]:
        return {"adapters": self.adapters}

    def metadata(self, name: str) -> dict[str, str]:
        return {}

    def export(self, folder: Path) -> list[Path]:
        path = folder / "lcm_lora.safetensors"
        self.adapters.write(path)
        return [path]
