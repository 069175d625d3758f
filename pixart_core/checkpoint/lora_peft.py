"""What an adapter_config.json says: how strong each layer of a PEFT adapter is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .folder import read_json_object
from .header import CheckpointError
from .read import PICKLE_SUFFIXES, SAFETENSORS_SUFFIXES

CONFIG_NAME = "adapter_config.json"
_TYPES = ("LORA", "LOHA", "LOKR")
# these replace the base weights while training, so the saved tensors mean nothing without them
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
_OTHER_FORWARD = ("use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config",
                  "kasa_config", "fan_in_fan_out", "layer_replication")


@dataclass(frozen=True)
class PeftConfig:
    """Rank and alpha of every layer of a PEFT adapter."""

    rank: float
    alpha: float
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    source: str = CONFIG_NAME

    def rank_of(self, path: str) -> float:
        """Rank of the module `path` (diffusers names)."""
        return _matching(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str, rank: float, alpha: float | None = None) -> float:
        """What multiplies B A: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
        if alpha is None:
            alpha = _matching(self.alpha_pattern, path, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = CONFIG_NAME) -> PeftConfig:
        """From an adapter_config.json. Raises CheckpointError for adapters that no merge of
        weights can follow, and for values that are not numbers."""
        kind = str(fields.get("peft_type", "LORA")).upper()
        if kind not in _TYPES:
            raise CheckpointError(f"{source}: peft_type {kind} is not supported; PixArt reads "
                                  f"{', '.join(_TYPES)}")
        init = fields.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_CHANGED_BASES):
            raise CheckpointError(
                f"{source}: this adapter was started with {init!r}, which changes the base "
                "weights; save it again with PEFT's path_initial_model_for_weight_conversion")
        for name in _OTHER_FORWARD:
            if fields.get(name):
                raise CheckpointError(f"{source}: {name} is set, which no change of the weights "
                                      "can stand for; train without it")
        alpha = fields.get("lora_alpha", fields.get("alpha", 8))
        return cls(_number("r", fields.get("r", 8), source), _number("lora_alpha", alpha, source),
                   _pattern("rank_pattern", fields, source),
                   _pattern("alpha_pattern", fields, source),
                   bool(fields.get("use_rslora", False)), source)


def find_config(path: Path) -> Path | None:
    """The PEFT config that belongs to a LoRA file or folder, if there is one.

    For a file: one of its own name, or an adapter_config.json where it is the only weight file or
    has PEFT's name, so that a folder full of LoRAs does not take the config of one of them.
    """
    if path.is_dir():
        config = path / CONFIG_NAME
        return config if config.is_file() else None
    for name in (f"{path.stem}.json", f"{path.stem}.config.json", f"{path.stem}_config.json"):
        own = path.with_name(name)
        if own.is_file() and {"peft_type", "lora_alpha"} & read_json_object(own).keys():
            return own
    beside = path.with_name(CONFIG_NAME)
    if beside.is_file():
        suffixes = SAFETENSORS_SUFFIXES + PICKLE_SUFFIXES
        weights = [p for p in path.parent.iterdir() if p.suffix.lower() in suffixes]
        if path.stem == "adapter_model" or len(weights) == 1:
            return beside
    return None


def config_of_header(metadata: Mapping[str, str], source: str) -> PeftConfig | None:
    """The config that diffusers keeps in the file itself, as "transformer.r" and the like."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return None
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{source}: lora_adapter_metadata in its header is not JSON: "
                              f"{error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{source}: lora_adapter_metadata in its header is no JSON object")
    ours = {name.removeprefix("transformer."): value for name, value in fields.items()
            if name.startswith("transformer.")}
    return PeftConfig.from_dict(ours, f"the header of {source}") if ours else None


def _matching(pattern: Mapping[str, float], path: str, default: float) -> float:
    """The first entry whose key is the path or, from a dot on, its end; keys may be regexes."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", path):
                return value
        except re.error as error:
            raise CheckpointError(f"the pattern {key!r} in {CONFIG_NAME} is not a regular "
                                  f"expression: {error}") from error
    return default


def _pattern(name: str, fields: Mapping[str, Any], source: str) -> dict[str, float]:
    pattern = fields.get(name) or {}
    if not isinstance(pattern, dict):
        raise CheckpointError(f"{source}: {name} is {pattern!r}; a JSON object was expected")
    return {str(key): _number(f"{name}[{key!r}]", value, source)
            for key, value in pattern.items()}


def _number(name: str, value: Any, source: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) \
            or (name != "lora_alpha" and not name.startswith("alpha") and value <= 0):
        raise CheckpointError(f"{source}: {name} is {value!r}; a number was expected")
    return float(value)
