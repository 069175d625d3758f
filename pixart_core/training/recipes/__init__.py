"""The recipes: one module with the algorithm, one file of settings each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..recipe import Recipe
from ..settings import RunSettings, check_paths, read_settings, read_settings_file
from .base import Base, BaseSettings
from .controlnet import ControlNet, ControlNetSettings
from .hed import HED, HEDSettings
from .lcm import LCM, LCMSettings
from .lcm_lora import LCMLoRA, LCMLoRASettings
from .lora import LoRA, LoRASettings
from .text import Text, TextSettings
from .vae import VAE, VAESettings

__all__ = ["RECIPES", "make_recipe", "recipe_defaults", "recipe_settings"]

RECIPES: dict[str, tuple[type[Recipe], type[RunSettings]]] = {
    "base": (Base, BaseSettings),
    "lcm": (LCM, LCMSettings),
    "lcm-lora": (LCMLoRA, LCMLoRASettings),
    "controlnet": (ControlNet, ControlNetSettings),
    "lora": (LoRA, LoRASettings),
    "vae": (VAE, VAESettings),
    "text": (Text, TextSettings),
    "hed": (HED, HEDSettings),
}

_FILES = Path(__file__).resolve().parent.parent / "configs"


def recipe_defaults(name: str) -> dict[str, Any]:
    """The published settings of a recipe, as its file under `configs` has them.

    Raises ValueError for an unknown recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}; use one of {', '.join(RECIPES)}")
    return read_settings_file(_FILES / f"{name}.yaml")


def recipe_settings(name: str, *sources: dict[str, Any]) -> RunSettings:
    """The settings of a run: the recipe's own, then each of `sources`. Raises ValueError."""
    defaults = recipe_defaults(name)
    return read_settings(RECIPES[name][1], defaults, *sources)


def make_recipe(name: str, settings: RunSettings) -> Recipe:
    """Load what a recipe trains and open its data, ready for `train`.

    Raises ValueError for paths that cannot be used before anything is loaded.
    """
    check_paths(settings)
    return RECIPES[name][0](settings)
