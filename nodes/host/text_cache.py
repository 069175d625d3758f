"""A CLIP that finds prompts which were encoded before, and is loaded for others only."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
from torch import Tensor

from ...pixart_core.text.cache import (
    FOLDER_VARIABLE,
    TextCache,
    cache_key,
    limit_from_environment,
)

logger = logging.getLogger(__name__)

OWNER, FOLDER = "pixart_delta", "text_cache"
# what nodes change in a patcher; a clone has them equal to the original's until then
_CHANGES = ("patches", "patches_uuid", "object_patches", "weight_wrapper_patches", "hook_patches",
            "forced_hooks", "current_hooks", "callbacks", "wrappers", "injections",
            "additional_models", "attachments", "model_options")


def cache_folder() -> Path:
    """Where encoded prompts are kept: PIXART_TEXT_CACHE, else in the host's user folder.

    Its part for the system is used, which newer hosts keep from being read over the network.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    of_system = getattr(folder_paths, "get_system_user_directory", None)
    home = (of_system(OWNER) if of_system
            else os.path.join(folder_paths.get_user_directory(), f"__{OWNER}"))
    return Path(home, FOLDER)


class Source:
    """A T5 file at a precision, for the device type `on`: what it is called in the cache, and its
    CLIP, which is loaded once, when it is asked for."""

    def __init__(self, path: str, precision: str, on: str,
                 load: Callable[[], comfy.sd.CLIP]) -> None:
        self.cache = TextCache(cache_folder(), limit_from_environment())
        self._path, self._precision, self._on, self._load = path, precision, on, load

    @functools.cached_property
    def clip(self) -> comfy.sd.CLIP:
        return self._load()

    @functools.cached_property
    def _hash(self) -> str:
        return self.cache.encoder_hash(self._path)

    def key(self, tokens: dict[str, list]) -> str | None:
        """The name of an encoded prompt; None for one with embeddings of files in it.

        Tokens and weights are all that the encoder sees of a prompt, so that they stand for its
        text, its cleaning, its length and every option of the tokenizer.
        """
        said = {name: [[[*pair[:2]] for pair in section] for section in sections]
                for name, sections in tokens.items()}
        plain = all(isinstance(token, int) and isinstance(weight, float | int)
                    for sections in said.values() for section in sections
                    for token, weight in section)
        if not plain:
            return None
        return cache_key(encoder=self._hash, tokens=said, precision=self._precision,
                         device=self._on, computed="by the host in float32")


class UnloadedPatcher:
    """Stands for the patcher of a CLIP that is not loaded: newer hosts look at the patcher of all
    that nodes give each other. What anyone takes from it or sets on it loads the CLIP."""

    def __init__(self, load: Callable[[], Any]) -> None:
        vars(self)["_load"] = load

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._load(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._load(), name, value)


class CachedCLIP(comfy.sd.CLIP):
    """A CLIP of the host whose weights are read at the first need.

    The cache stands for the encoder as it was loaded: patches, hooks, another layer or any other
    change that goes through the CLIP or its patcher leave it aside.
    """

    def __init__(self, source: Source, tokenizer: Any) -> None:
        super().__init__(no_init=True)
        self._source, self._patcher = source, None
        self.tokenizer, self.tokenizer_options = tokenizer, {}
        self.layer_idx = self.apply_hooks_to_conds = None
        self.use_clip_schedule = False

    @property
    def patcher(self) -> Any:
        return UnloadedPatcher(self._loaded) if self._patcher is None else self._patcher

    @patcher.setter
    def patcher(self, patcher: Any) -> None:
        self._patcher = patcher

    def _loaded(self) -> Any:
        """The patcher, of the encoder as it was loaded until a node changes it."""
        if self._patcher is None:
            loaded = self._source.clip
            self._patcher = loaded.patcher.clone()
            for name, value in vars(loaded).items():  # of hosts that know more of a CLIP
                if name not in ("patcher", "cond_stage_model"):
                    vars(self).setdefault(name, value)
        return self._patcher

    @property
    def cond_stage_model(self) -> Any:
        return self._loaded().model

    def load_model(self, *arguments: Any, **named: Any) -> Any:
        self._loaded()
        return super().load_model(*arguments, **named)

    def clone(self, **arguments: Any) -> CachedCLIP:
        copy = object.__new__(type(self))
        # functions that a node put into this object are its own
        vars(copy).update((k, v) for k, v in vars(self).items() if not callable(v))
        copy.tokenizer_options = self.tokenizer_options.copy()
        if self._patcher is not None or any(arguments.values()):
            copy._patcher = self._loaded().clone(**arguments)
        return copy

    def get_ram_usage(self) -> int:
        """What older hosts ask of everything that nodes give each other."""
        return self._patcher.get_ram_usage() if self._patcher is not None else 0

    def encode_from_tokens(self, tokens: dict[str, list], return_pooled: bool | str = False,
                           return_dict: bool = False) -> Any:
        key = self._key(tokens)
        states = None if key is None else self._find(key)
        if states is None:
            found = super().encode_from_tokens(tokens, return_pooled=return_pooled or True,
                                               return_dict=True)
            if key is not None and set(found) == {"cond", "pooled_output"} \
                    and found["pooled_output"] is None:
                self._source.cache.put(key, found["cond"])
        else:
            found = {"cond": states, "pooled_output": None}
        if return_dict:
            return found
        return (found["cond"], found["pooled_output"]) if return_pooled else found["cond"]

    def encode_from_tokens_scheduled(self, tokens: dict[str, list], unprojected: bool = False,
                                     add_dict: dict[str, Any] | None = None,
                                     show_pbar: bool = True) -> list:
        key = self._key(tokens)
        states = None if key is None else self._find(key)
        if states is not None:
            return [[states, {"pooled_output": None, **(add_dict or {})}]]
        return super().encode_from_tokens_scheduled(tokens, unprojected, add_dict or {}, show_pbar)

    def _key(self, tokens: dict[str, list]) -> str | None:
        changed = (self.layer_idx is not None or self.apply_hooks_to_conds is not None
                   or self.use_clip_schedule)
        if not changed and self._patcher is not None:
            original = self._source.clip.patcher
            changed = any(getattr(self._patcher, name, None) != getattr(original, name, None)
                          for name in _CHANGES)
        return None if changed else self._source.key(tokens)

    def _find(self, key: str) -> Tensor | None:
        states = self._source.cache.get(key)
        if states is None:
            return None
        logger.debug("text cache: a prompt that was encoded before")
        return states.to(comfy.model_management.intermediate_device())
