"""A T5 that is read when a prompt first needs it, and may leave memory again."""

from __future__ import annotations

import gc
import hashlib
import logging
from pathlib import Path

import torch
from torch import Tensor

from .cache import TextCache, cache_key
from .caption import clean_caption
from .encoder import T5TextEncoder
from .t5_file import open_t5
from .t5_quant import AUTO, check_precision
from .tokenizer import CaptionTokenizer, find_tokenizer
from .weights import Piece, prompt_pieces, prompt_tokens

logger = logging.getLogger(__name__)


class LazyT5:
    """The T5 of a file, for prompts; `loaded` is the encoder while it is in memory.

    Arguments as of `T5TextEncoder.from_path`. With `keep` False it leaves memory at `release`.
    With a `cache`, prompts that are in it need no T5 at all; states are the same to the bit.
    Headers are read at once: raises CheckpointError, ValueError and ImportError as `from_path`,
    for damaged weights at the first prompt only.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype | None = None,
                 tokenizer: str | Path | None = None, device: torch.device | str | None = None,
                 precision: str = AUTO, keep: bool = True, cache: TextCache | None = None) -> None:
        opened = open_t5(path)
        check_precision(opened, precision)
        rows = opened.config.vocab_size
        if tokenizer is None:
            self.tokenizer = opened.as_file({}, {}, opened.dtype).tokenizer()
            source = opened.spiece_model or opened.tokenizer_json.read_bytes()
        else:
            self.tokenizer = CaptionTokenizer.from_path(tokenizer, embedding_rows=rows)
            source = find_tokenizer(tokenizer).read_bytes()
        self.path, self.caption_channels = Path(path), opened.config.d_model
        self.dtype, self.device = dtype, torch.device(device or "cpu")
        self.precision, self.keep, self.cache = precision, keep, cache
        self.loaded: T5TextEncoder | None = None
        self._tokenizer_hash = hashlib.sha256(source).hexdigest()
        self._encoder_hash: str | None = None

    def encoder(self) -> T5TextEncoder:
        """The encoder, read from its file where it is not in memory."""
        if self.loaded is None:
            self.loaded = T5TextEncoder.from_path(self.path, self.dtype, self.tokenizer,
                                                  self.device, self.precision)
        return self.loaded

    def release(self) -> None:
        """Let the encoder leave memory, unless it is to be kept."""
        if self.keep or self.loaded is None:
            return
        self.loaded = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def states(self, prompt: str, max_tokens: int, clean: bool = True, weights: bool = True,
               ) -> Tensor:
        """As `T5TextEncoder.states`, from the cache where they are there."""
        if self.cache is None:
            return self.encoder().states(prompt, max_tokens, clean, weights)
        pieces = prompt_pieces(prompt, clean_caption if clean else None, weights)
        key = self._key(pieces, max_tokens)
        found = self.cache.get(key)
        if found is not None:
            prompt_tokens(self.tokenizer, pieces, max_tokens)  # says where the prompt is cut
            return found.to(self.device)
        found = self.encoder().states(prompt, max_tokens, clean, weights)
        self.cache.put(key, found)
        return found

    def _key(self, pieces: list[Piece], max_tokens: int) -> str:
        if self._encoder_hash is None:
            self._encoder_hash = self.cache.encoder_hash(self.path)
        return cache_key(encoder=self._encoder_hash, tokenizer=self._tokenizer_hash,
                         pieces=pieces, max_tokens=max_tokens, precision=self.precision,
                         dtype=str(self.dtype), device=self.device.type)


def loaded_encoder(encoder: T5TextEncoder | LazyT5 | None) -> T5TextEncoder | None:
    """The encoder that is in memory, None where none is."""
    return encoder.loaded if isinstance(encoder, LazyT5) else encoder
