"""Out of memory in words: what was running, how large it was, and what to try."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

Description = tuple[str, Sequence[str]]  # what was running, and what helps, most first

_DEVICE_WORDS = ("out of memory", "not enough gpu video memory")
_MACHINE_WORDS = ("defaultcpuallocator", "os error 12)", "os error 1455)")
_CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_WANTED = re.compile(r"tried to allocate (\d+ bytes|[\d.]+ ?[KMGT]?i?B)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device or the machine has no memory left."""
    return isinstance(error, MemoryError) or _of_device(error) or _of_machine(error)


def reworded(error: BaseException, running: str, hints: Sequence[str]) -> Exception:
    """What to raise in place of `error`: one message, and `explained` set.

    torch.OutOfMemoryError where a device ran out, whatever the back end had raised, and
    MemoryError where the machine did.
    """
    wanted = _WANTED.search(str(error))
    text = f"Not enough memory for {running}."
    if wanted:
        text += f" It tried to allocate {wanted[1]}."
    if hints:
        text += "\nWhat helps, most first:"
        text += "".join(f"\n{number}. {hint}" for number, hint in enumerate(hints, 1))
    kind = torch.cuda.OutOfMemoryError if _of_device(error) else MemoryError
    told = kind(text)
    told.explained = True
    return told


@contextmanager
def explained(describe: Callable[[], Description],
              applies: Callable[[BaseException], bool] = is_out_of_memory) -> Iterator[None]:
    """Give an error for want of memory inside the words of `describe`; also a decorator.

    It becomes what `reworded` says. Other errors pass, as do those that have their words already,
    so the innermost `explained` speaks. `describe` is called for such an error alone.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, "explained", False) or not applies(error):
            raise
        raise reworded(error, *describe()) from error


def gigabytes(count: float) -> str:
    """Bytes for people: "9.5 GB", and "15 MB" below a gigabyte."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count / 1e6, 1):.0f} MB"


def weight_bytes(network: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size()
               for tensor in (*network.parameters(), *network.buffers()))


def _of_device(error: BaseException) -> bool:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    if getattr(error, "error_code", None) == _CUDA_OUT_OF_MEMORY:
        return isinstance(error, getattr(torch, "AcceleratorError", ()))
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _DEVICE_WORDS)


def _of_machine(error: BaseException) -> bool:
    return (isinstance(error, RuntimeError | OSError)
            and any(words in str(error).lower() for words in _MACHINE_WORDS))
