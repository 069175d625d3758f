"""Optional packages: asked for where they are used, with a message that says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, purpose: str, extra: str = "pipeline") -> ModuleType:
    """Import an optional package; ImportError says what it is for and how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(f"{purpose} needs {error.name}, which is not installed: "
                          f"pip install 'pixart-delta[{extra}]'", name=error.name) from error
