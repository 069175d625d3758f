"""The captions that a network draws while it is calibrated: encoded here, or before."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer

from ..captions import Captions
from ..checkpoint import sha256_file
from ..config import PixArtConfig
from ..extras import require
from ..quantize.calibrated import CalibrationCaptions, encode_captions
from ..settings import Settings
from ..text.embeddings import CaptionRow
from .quantize_options import CalibrationOptions

PROMPTS = Path(__file__).resolve().parents[1] / "quantize" / "prompts.txt"
AUTO = "auto"
NEEDED = ("svdquant is calibrated while the model draws: name the T5 with --t5 FILE, or prompts "
          "that are encoded already with --embeddings FILE (pixart encode writes them)")


@dataclass(frozen=True)
class CaptionSource:
    """Prompts, or files of encoded ones, and the resolved settings that they are drawn with."""

    settings: Settings
    caption_channels: int
    prompts: tuple[str, ...]
    t5: Path | None
    tokenizer: Path | None
    precision: str
    embeddings: tuple[Path, ...]
    negative: Path | None
    count: int

    def passes(self) -> int:
        """Passes through the network, a guided one counting once."""
        return self.count * len(self.settings.timesteps())

    def fingerprint(self) -> dict[str, Any]:
        """What the captions depend on; reads the files."""
        given = {"t5": self.t5, "tokenizer": self.tokenizer, "negative_embeddings": self.negative}
        return {"prompts": list(self.prompts), "t5_precision": self.precision,
                "embeddings": [sha256_file(path) for path in self.embeddings],
                **{name: sha256_file(path) for name, path in given.items() if path is not None}}

    def encoded(self, device: torch.device) -> CalibrationCaptions:
        """The captions and, with guidance, as many negatives; the T5 is gone again afterwards.

        Raises ValueError for captions of another width than the model's.
        """
        if self.embeddings:
            captions = Captions(None, self.caption_channels)
            positive = _spread(self._saved(captions), self.count)
            return CalibrationCaptions(
                positive, captions.negative(self.settings, len(positive), self.negative))
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return encode_captions(self.t5, self.prompts, self.settings, self.caption_channels,
                               tokenizer=self.tokenizer, precision=self.precision, dtype=dtype,
                               device=device)

    def _saved(self, captions: Captions) -> list[CaptionRow]:
        return [row for path in self.embeddings
                for row in captions.positive((), self.settings, path)]


def choose_captions(options: CalibrationOptions, config: PixArtConfig, size: int,
                    count: int) -> CaptionSource:
    """What to draw for a model of `config`, `count` prompts of many unless told otherwise.

    Raises ValueError where neither a T5 nor encoded prompts were named, for guidance without a
    negative caption, for empty lists of prompts and for settings that no sampler follows.
    """
    settings = Settings("", height=size, width=size, steps=options.steps,
                        guidance=options.guidance, seed=options.seed or 0).resolve(config)
    if settings.sampler == "dpm":
        require("diffusers", "DPM-Solver++")
    if options.count is not None and options.count < 1:
        raise typer.BadParameter(f"--count is {options.count}; use 1 or more")
    if options.t5 is None and not options.embeddings:
        raise ValueError(NEEDED)
    channels = config.caption_channels
    if options.embeddings:
        if options.t5 or options.prompts or options.tokenizer or options.t5_precision:
            raise typer.BadParameter("--embeddings stand in place of a T5 and of --prompts; leave "
                                     "one out")
        captions = Captions(None, channels)
        captions.check(settings, options.embeddings[0], options.negative_embeddings)
        chosen = CaptionSource(settings, channels, (), None, None, AUTO,
                               tuple(options.embeddings), options.negative_embeddings, 0)
        found = len(chosen._saved(captions))
        return dataclasses.replace(chosen, count=min(options.count or found, found))
    if options.negative_embeddings is not None:
        raise typer.BadParameter("--negative-embeddings belong to --embeddings; with --t5 the "
                                 "empty prompt is encoded")
    prompts = _spread(read_prompts(options.prompts), options.count or count)
    return CaptionSource(settings, channels, tuple(prompts), options.t5, options.tokenizer,
                               options.t5_precision or AUTO, (), None, len(prompts))


def read_prompts(path: Path | None) -> list[str]:
    """The prompts of a text file, one a line, or those that come with this program.

    Raises ValueError for files without any, or that are no text.
    """
    try:
        text = (path or PROMPTS).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


def _spread(items: list, count: int) -> list:
    """At most `count` of `items`, evenly from all of them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
