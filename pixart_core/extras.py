"""Optional packages: asked for where they are used, with a message that says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType

# the extras of pyproject.toml, for those who install packages one by one
PACKAGES = {
    "pipeline": "diffusers pillow",
    "cli": "typer rich diffusers pillow",
    "gguf": "gguf",
    "train": "typer rich diffusers pillow accelerate peft tensorboard pyyaml pyarrow",
    "adamw8bit": "bitsandbytes",
    "came": "came-pytorch",
}


def how_to_install(extra: str) -> str:
    """The end of an error message: the commands that bring an extra's packages."""
    return f"pip install {PACKAGES[extra]} (or, in a clone of the repository, '.[{extra}]')"


def require(module: str, purpose: str, extra: str = "pipeline") -> ModuleType:
    """Import an optional package; ImportError says what it is for and how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(f"{purpose} needs {error.name}, which is not installed: "
                          f"{how_to_install(extra)}", name=error.name) from error
