"""Text to caption embeddings: cleaning, tokens, the T5 v1.1 encoder and its files.

Names are imported when first used, so that `import pixart_core` does not wait for transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .caption import clean_caption, simple_caption
    from .encoder import T5TextEncoder
    from .t5_file import T5Config, T5File, read_t5
    from .tokenizer import CaptionTokenizer, TokenizedCaption

_HOME = {
    "clean_caption": "caption",
    "simple_caption": "caption",
    "CaptionTokenizer": "tokenizer",
    "TokenizedCaption": "tokenizer",
    "T5Config": "t5_file",
    "T5File": "t5_file",
    "read_t5": "t5_file",
    "T5TextEncoder": "encoder",
}

__all__ = [
    "CaptionTokenizer",
    "T5Config",
    "T5File",
    "T5TextEncoder",
    "TokenizedCaption",
    "clean_caption",
    "read_t5",
    "simple_caption",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
