"""`--t5-precision` and `--text-cache`: how the commands keep T5 small, or do without it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import flag, one_of

if TYPE_CHECKING:
    from ..text import TextCache

Precision = Annotated[str | None, flag(
    "--t5-precision", help="What the matrices of T5 are kept in: auto, bf16, fp16, fp8, int8 or "
                           "int4. 8 bits halve T5, 4 bits halve it again; they need "
                           "comfy-kitchen. [auto: as in its file]", show_default=False)]
CacheFolder = Annotated[Path | None, flag(
    "--text-cache", envvar="PIXART_TEXT_CACHE", show_envvar=False,
    help="A folder that keeps encoded prompts, so that a repeated one needs no T5. They tell of "
         "your prompts: choose a folder of your own. [$PIXART_TEXT_CACHE, else none]")]
CacheLimit = Annotated[float, flag(
    "--text-cache-limit", envvar="PIXART_TEXT_CACHE_GB", show_envvar=False,
    help="Gigabytes of --text-cache; prompts unused for longest leave first. "
         "[$PIXART_TEXT_CACHE_GB, else 1]", show_default=False)]


@dataclass(frozen=True)
class TextOptions:
    """The precision of T5, and where encoded prompts are kept, if anywhere."""

    precision: str
    cache: TextCache | None

    def record(self) -> dict[str, Any]:
        """What a picture says of it: another precision is another picture."""
        return {} if self.precision == "auto" else {"t5_precision": self.precision}


def check_precision_option(precision: str) -> None:
    """BadParameter unless it is one of the precisions."""
    from ..text import PRECISIONS

    one_of("--t5-precision", precision, PRECISIONS)


def open_cache(folder: Path | None, gigabytes: float) -> TextCache | None:
    """The cache that the options name, None for none; BadParameter for a limit of nothing."""
    from ..text import TextCache

    if not 0 < gigabytes < float("inf"):
        raise typer.BadParameter(f"--text-cache-limit is {gigabytes}; use a number above 0")
    return None if folder is None else TextCache(folder, int(gigabytes * 1e9))
