"""Training data: a folder of images with captions, encoded once, and read as batches.

What makes a cache is imported when it is first used: reading one needs neither T5 nor a VAE.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .index import CacheFacts
from .samples import CachedSamples

if TYPE_CHECKING:
    from .cache import CacheReport, build_cache
    from .rescale import rescale_cache
    from .settings import CacheSettings

_HOME = {"CacheReport": "cache", "CacheSettings": "settings", "build_cache": "cache",
         "rescale_cache": "rescale"}

__all__ = ["CacheFacts", "CacheReport", "CacheSettings", "CachedSamples", "build_cache",
           "rescale_cache"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
