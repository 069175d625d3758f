"""Text to caption embeddings: cleaning, weights, tokens, the T5 v1.1 encoder, and their files.

Names are imported when first used, so that `import pixart_core` does not wait for transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import TextCache
    from .caption import clean_caption, simple_caption
    from .embeddings import CaptionEntry, load_embeddings, save_embeddings
    from .encoder import T5TextEncoder
    from .lazy import LazyT5
    from .t5_file import T5Config, T5File, read_t5
    from .t5_quant import PRECISIONS, read_t5_as
    from .tokenizer import CaptionTokenizer, TokenizedCaption
    from .weights import encode_prompt, parse_weights

_HOME = {
    "clean_caption": "caption",
    "simple_caption": "caption",
    "CaptionTokenizer": "tokenizer",
    "TokenizedCaption": "tokenizer",
    "T5Config": "t5_file",
    "T5File": "t5_file",
    "read_t5": "t5_file",
    "T5TextEncoder": "encoder",
    "PRECISIONS": "t5_quant",
    "read_t5_as": "t5_quant",
    "TextCache": "cache",
    "LazyT5": "lazy",
    "CaptionEntry": "embeddings",
    "load_embeddings": "embeddings",
    "save_embeddings": "embeddings",
    "encode_prompt": "weights",
    "parse_weights": "weights",
}

__all__ = [
    "PRECISIONS",
    "CaptionEntry",
    "CaptionTokenizer",
    "LazyT5",
    "T5Config",
    "T5File",
    "T5TextEncoder",
    "TextCache",
    "TokenizedCaption",
    "clean_caption",
    "encode_prompt",
    "load_embeddings",
    "parse_weights",
    "read_t5",
    "read_t5_as",
    "save_embeddings",
    "simple_caption",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
