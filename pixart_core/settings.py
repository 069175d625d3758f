"""What is asked of the pipeline: checked before anything heavy loads, and kept with a picture."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from .config import PixArtConfig
from .model.controlnet import CONTROL_MODES
from .resolution import MAX_SIDE
from .sampling import DMD_TIMESTEP, dpm_timesteps, lcm_timesteps, uniform_timesteps
from .sampling.schedule import NUM_TRAIN_TIMESTEPS

Sampler = Literal["auto", "dpm", "lcm", "dmd", "sa-solver"]

SAMPLERS = ("auto", "dpm", "lcm", "dmd", "sa-solver")
GRIDS = ("diffusers", "official")
DEFAULT_STEPS = {"dpm": 20, "lcm": 4, "dmd": 1, "sa-solver": 25}
DEFAULT_GUIDANCE = {"dpm": 4.5, "lcm": 1.0, "dmd": 1.0, "sa-solver": 3.0}
PIXELS_PER_LATENT = 8
CONTROL_DEFAULTS = {"control_strength": 1.0, "control_mode": "balanced", "control_start": 0.0,
                    "control_end": 1.0, "control_cond_only": False}
_ROUNDING = 1e-3  # of a timestep


@dataclass(frozen=True)
class Settings:
    """One request for a picture. None stands for "as the model likes it", see `resolve`.

    Raises ValueError when made with values that no model could follow.
    """

    prompt: str
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    sampler: Sampler = "auto"
    lcm_grid: str = "diffusers"
    strength: float = 1.0
    clean_caption: bool = True
    weights: bool = True
    max_tokens: int | None = None
    control_strength: float = 1.0
    control_mode: str = "balanced"
    control_start: float = 0.0
    control_end: float = 1.0
    control_cond_only: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is a {type(getattr(self, name)).__name__}; text was "
                                 "expected")
        for name in ("height", "width"):
            side = getattr(self, name)
            if side is not None and not (
                _is_int(side) and 0 < side <= MAX_SIDE and side % PIXELS_PER_LATENT == 0
            ):
                raise ValueError(f"{name} is {side!r}; it must be a multiple of "
                                 f"{PIXELS_PER_LATENT} from {PIXELS_PER_LATENT} to {MAX_SIDE} px")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}; use one of {SAMPLERS}")
        if self.lcm_grid not in GRIDS:
            raise ValueError(f"lcm_grid is {self.lcm_grid!r}; use one of {GRIDS}")
        if not (_is_int(self.seed) and 0 <= self.seed < 2**64):
            raise ValueError(f"seed is {self.seed!r}; use a whole number from 0 to 2^64 - 1")
        if self.guidance is not None and not (
            _is_number(self.guidance) and 0 <= self.guidance < math.inf
        ):
            raise ValueError(f"guidance is {self.guidance!r}; use 1 (none) or more")
        if self.max_tokens is not None and not (_is_int(self.max_tokens) and self.max_tokens > 0):
            raise ValueError(f"max_tokens is {self.max_tokens!r}; use 1 or more")
        if not (_is_number(self.strength) and 0 < self.strength <= 1):
            raise ValueError(f"strength is {self.strength!r}; use a number above 0 and at most 1")
        if not isinstance(self.control_cond_only, bool):
            raise ValueError(f"control_cond_only is {self.control_cond_only!r}; use True or False")
        if self.control_mode not in CONTROL_MODES:
            raise ValueError(f"control_mode is {self.control_mode!r}; use one of {CONTROL_MODES}")
        if not (_is_number(self.control_strength) and 0 <= self.control_strength < math.inf):
            raise ValueError(f"control_strength is {self.control_strength!r}; use 0 or more")
        span = (self.control_start, self.control_end)
        if not (all(map(_is_number, span)) and 0 <= span[0] <= span[1] <= 1):
            raise ValueError(f"control_start and control_end are {span[0]!r} and {span[1]!r}; use "
                             "two numbers from 0 to 1, the smaller one first")
        if self.sampler == "dmd" and (self.steps not in (None, 1) or self.strength != 1):
            raise ValueError(f"steps is {self.steps!r} and strength {self.strength}; DMD takes 1 "
                             "step from noise alone: leave both out")
        if self.steps is not None:
            if not _is_int(self.steps):
                raise ValueError(f"steps is {self.steps!r}; a whole number was expected")
            self.timesteps()

    def timesteps(self) -> list[int]:
        """The timesteps of the run, noisiest first; `steps` must be known."""
        if self.sampler == "lcm":
            return lcm_timesteps(self.steps, grid=self.lcm_grid, strength=self.strength)
        if self.sampler == "dmd":
            return [DMD_TIMESTEP]
        if self.sampler == "sa-solver":
            return uniform_timesteps(self.steps, strength=self.strength)
        return dpm_timesteps(self.steps, strength=self.strength)

    def names_control(self) -> list[str]:
        """The settings here that only a ControlNet could follow."""
        return [name for name, value in CONTROL_DEFAULTS.items() if getattr(self, name) != value]

    def controls(self, t: int) -> bool:
        """Whether the ControlNet steers at timestep `t`; 0 to 1 runs from 999 down to 0."""
        last = NUM_TRAIN_TIMESTEPS - 1
        # a number that names a timestep is that timestep only up to rounding
        return ((1 - self.control_end) * last - _ROUNDING <= t
                <= (1 - self.control_start) * last + _ROUNDING)

    def resolve(self, config: PixArtConfig) -> Settings:
        """These settings with every None filled in for the model of `config`.

        A consistency-distilled model gets the LCM sampler, 4 steps and no guidance; a DMD student
        its one step without guidance; any other DPM-Solver++, 20 steps and guidance 4.5;
        "sa-solver" has 25 and 3. The size is the model's training size and the token limit its
        own. Raises ValueError for steps or strength that the model's sampler does not take.
        """
        sampler = self.sampler
        if sampler == "auto":
            sampler = config.distilled or "dpm"
        return dataclasses.replace(
            self,
            sampler=sampler,
            steps=DEFAULT_STEPS[sampler] if self.steps is None else self.steps,
            guidance=DEFAULT_GUIDANCE[sampler] if self.guidance is None else self.guidance,
            height=config.image_size if self.height is None else self.height,
            width=config.image_size if self.width is None else self.width,
            max_tokens=config.max_tokens if self.max_tokens is None else self.max_tokens,
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Settings:
        """Settings out of `as_dict`'s result; ValueError for names that are not fields."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown or "prompt" not in fields:
            wrong = ", ".join(unknown) or "no prompt"
            raise ValueError(f"settings hold {wrong}; the fields are {', '.join(sorted(known))}")
        return cls(**fields)

    def to_json(self) -> str:
        return json.dumps(self.as_dict())


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
