"""The way to comfy-kitchen, ComfyUI's kernel library: is it there, new enough, and what runs where.

It has every operation in plain PyTorch ("eager", any device) and some as CUDA or Triton kernels.
It is imported when a quantised weight is first met, not before.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

PACKAGE = "comfy-kitchen"
VERSION = "0.2.31"  # the oldest that has all the formats and was tested
EAGER = "eager"
_ORDER = ("hip", "ascend", "cuda", "triton", EAGER)  # where the library does not tell its own

_said: set[str] = set()


@dataclass(frozen=True)
class Backend:
    """Which back end of comfy-kitchen runs a format, and why not a faster one ("" for the best)."""

    name: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


def require_kitchen(name: str, functions: Sequence[str] = ()) -> ModuleType:
    """The comfy_kitchen module; ImportError where it is missing or lacks one of `functions`.

    `name` is the format that needs it, for the message.
    """
    try:
        import comfy_kitchen
    except ImportError as error:
        raise ImportError(f"{name} weights need the {PACKAGE} package, which is not installed "
                          f"({error}); install it with: pip install '{PACKAGE}>={VERSION}'"
                          ) from error
    missing = [f for f in functions if not hasattr(comfy_kitchen, f)]
    if missing:
        raise ImportError(f"{name} weights need {PACKAGE} {VERSION} or newer, and "
                          f"{installed_version()} is installed (it has no {missing[0]}); update it "
                          f"with: pip install -U {PACKAGE}")
    return comfy_kitchen


def installed_version() -> str:
    """The version of comfy-kitchen, "none" where it is missing."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def backend_for(name: str, functions: Sequence[str], device: torch.device | str,
                dtype: torch.dtype | None = None) -> Backend:
    """The back end that runs `functions` of the format `name` on `device` for activations of
    `dtype`, None for any.

    Raises ImportError as `require_kitchen` does.
    """
    kitchen = require_kitchen(name, functions)
    device = torch.device(device)
    if device.type != "cuda":
        return Backend(EAGER, f"plain PyTorch on the {device.type.upper()}")
    reasons = []
    for backend in getattr(kitchen.registry, "_priority", _ORDER):
        if backend == EAGER:
            break
        reason = _why_not(kitchen, backend, functions, device, dtype)
        if reason is None:
            return Backend(backend)
        reasons.append(f"{backend}: {reason}")
    return Backend(EAGER, "; ".join(reasons))


def dtype_name(dtype: torch.dtype) -> str:
    """"float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def say_once(sentence: str) -> None:
    """Log one line of a process's life once."""
    if sentence not in _said:
        _said.add(sentence)
        logger.info(sentence)


def _why_not(kitchen: ModuleType, backend: str, functions: Sequence[str],
             device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why a back end cannot run `functions` on a card, None when it can."""
    status = kitchen.list_backends().get(backend)
    if status is None or not status["available"]:
        reason = (status or {}).get("unavailable_reason") or "not part of this installation"
        return " ".join(str(reason).split())[:120]
    if status["disabled"]:
        return "switched off by the host"
    capability = torch.cuda.get_device_capability(device)
    for function in functions:
        if function not in status["capabilities"]:
            return f"has no {function}"
        limits = kitchen.registry.get_constraints(backend, function)
        needed = getattr(limits, "min_compute_capability", None)
        if needed is not None and capability < tuple(needed):
            return (f"needs compute capability {needed[0]}.{needed[1]}, the card has "
                    f"{capability[0]}.{capability[1]}")
        taken = getattr(getattr(limits, "params", {}).get("x"), "dtypes", None)
        if dtype is not None and taken and dtype not in taken:
            return f"takes no {dtype_name(dtype)}"
    return None
