"""The captions of pictures: prompts through T5, or encoded before and saved in a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .memory import explained
from .memory_hints import of_encoding
from .settings import Settings
from .text.embeddings import CaptionEntry, CaptionRow, caption_rows, load_embeddings

if TYPE_CHECKING:
    from .text import LazyT5, T5TextEncoder

logger = logging.getLogger(__name__)

Embeddings = str | Path | Sequence[CaptionEntry]


@dataclass(frozen=True)
class Captions:
    """Where the captions of a model come from: its T5, None where there is none, and their width.

    Every caption is a row without padding, in the order of the pictures.
    """

    encoder: T5TextEncoder | LazyT5 | None
    caption_channels: int

    def check(self, settings: Settings, embeddings: Embeddings | None = None,
              negative_embeddings: Embeddings | None = None) -> None:
        """Raise ValueError where resolved settings ask for a caption that only a T5 could make."""
        if self.encoder is not None:
            return
        if embeddings is None:
            raise ValueError("there is no text encoder, which a prompt needs; load T5, or pass "
                             "embeddings in place of the prompt")
        if settings.guidance > 1 and negative_embeddings is None:
            raise ValueError(f"guidance {settings.guidance:g} needs a negative caption beside the "
                             "embeddings, and there is no text encoder to make one; pass negative "
                             'embeddings too (`pixart encode ""` writes those of the empty '
                             "prompt), load T5, or set guidance to 1")

    def positive(self, prompts: Sequence[str], settings: Settings,
                 embeddings: Embeddings | None = None) -> list[CaptionRow]:
        """The captions of `embeddings`, or else of the prompts, which need the T5 (see `check`).

        Raises ValueError for embeddings that do not fit.
        """
        return self._saved(embeddings) or self._encoded(prompts, settings)

    def negative(self, settings: Settings, count: int,
                 embeddings: Embeddings | None = None) -> list[CaptionRow]:
        """The negative caption of each of `count` pictures; [] without guidance.

        Raises ValueError as `positive` does, and for a number of captions that is not `count`.
        """
        guided = settings.guidance > 1
        if (settings.negative_prompt or embeddings is not None) and not guided:
            logger.warning("guidance is %g, so the negative prompt has no effect; it needs more "
                           "than 1", settings.guidance)
        if not guided:
            return []
        rows = self._saved(embeddings) or self._encoded([settings.negative_prompt], settings)
        if len(rows) not in (1, count):
            raise ValueError(f"there are {len(rows)} negative captions for {count} pictures; use "
                             "one for all, or one for each")
        return rows * count if len(rows) == 1 else rows

    def release(self) -> None:
        """Let a T5 that is not to be kept leave memory: the captions are there."""
        from .text import LazyT5

        if isinstance(self.encoder, LazyT5):
            self.encoder.release()

    def _encoded(self, texts: Sequence[str], settings: Settings) -> list[CaptionRow]:
        """The caption of every text, each encoded by itself, so that none depends on another."""
        with explained(lambda: of_encoding(self.encoder)):
            states = {text: self.encoder.states(text, settings.max_tokens, settings.clean_caption,
                                                settings.weights)
                      for text in dict.fromkeys(texts)}
        return [CaptionRow(states[text]) for text in texts]

    def _saved(self, source: Embeddings | None) -> list[CaptionRow]:
        """The captions of a file of embeddings, or of its entries; [] for None."""
        if source is None:
            return []
        is_file = isinstance(source, str | Path)
        name = Path(source).name if is_file else "the embeddings"
        rows = caption_rows(load_embeddings(source)[0] if is_file else source, name)
        width, expected = rows[0].states.shape[1], self.caption_channels
        if width != expected:
            raise ValueError(f"{name} holds captions {width} wide, the model reads {expected}; "
                             "encode the prompt with the T5 that belongs to the model")
        return rows
