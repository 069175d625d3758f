"""What the commands share: consoles, the one red line of an error, versions, `--set`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from .. import __version__

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

console = Console()
errors = Console(stderr=True)


def version_text() -> str:
    return f"pixart {__version__}"


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what goes wrong inside into one red line on stderr and exit code 1.

    Warnings of the engine are shown on stderr meanwhile.
    """
    handler = RichHandler(console=errors, show_time=False, show_path=False, level=logging.WARNING)
    logger = logging.getLogger(__name__.rpartition(".commands")[0])
    logger.addHandler(handler)
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, KeyboardInterrupt):
        raise
    except Exception as error:
        expected = (isinstance(error, ValueError | OSError | ImportError)
                    or getattr(error, "explained", False))
        message = " ".join(str(error).split())
        if not expected or not message:
            message = f"{type(error).__name__}: {message or 'no details'}"
        errors.print(Text(f"error: {message}", style="red"), soft_wrap=True)
        raise typer.Exit(1) from error
    finally:
        logger.removeHandler(handler)


def parse_fields(pairs: list[str] | None) -> dict[str, Any]:
    """`["num_heads=6", "variant=alpha"]` -> config fields; values are JSON or else text."""
    fields: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"--set takes NAME=VALUE, got {pair!r}")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    return fields


def progress_bars(on: Console, *, hidden: bool = False) -> Progress:
    """Bars with count and time left; `hidden` ones leave nothing behind and need a terminal."""
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                    TimeRemainingColumn(), console=on, transient=hidden,
                    disable=hidden and not on.is_terminal)


def device_of(wanted: str) -> torch.device:
    """The device that --device names; ValueError for a CUDA that PyTorch does not find."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ValueError("--device cuda: this PyTorch finds no CUDA device; use --device cpu")
    return torch.device(wanted if wanted != "auto" else "cuda" if available else "cpu")


def flag(*names: str, help: str, **settings: Any) -> Any:
    """typer.Option whose help is shown as it is written: [words in brackets] are not markup."""
    return typer.Option(*names, help=escape(help), **settings)


def listed(text: str) -> tuple[str, ...]:
    """The parts of a text with commas between them."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def one_of(option: str, value: str, choices: tuple[str, ...]) -> str:
    """`value`, or a usage error that lists the choices."""
    if value not in choices:
        raise typer.BadParameter(f"{option} is {value!r}; use one of {', '.join(choices)}")
    return value
