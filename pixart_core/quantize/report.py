"""What a quantisation cost: errors of each layer, of each kind of layer, and of all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.read import CheckpointError
from ..quant.policy import LAYERS, layer_kind
from ..whole import whole_file

TOTAL = "all"
Errors = Mapping[str, Mapping[str, float]]  # layer -> what was tried -> relative error


def mean_errors(errors: Errors) -> dict[str, dict[str, float]]:
    """The mean over layers by kind ("attn.qkv"), and last over "all" of them."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for name in sorted(errors, key=lambda name: LAYERS.index(layer_kind(name))):
        groups.setdefault(layer_kind(name), []).append(errors[name])
    groups[TOTAL] = list(errors.values())
    return {kind: {what: sum(one[what] for one in group) / len(group) for what in group[0]}
            for kind, group in groups.items()}


def worst_layer(errors: Errors) -> tuple[str, float]:
    """The layer of largest error of the first thing tried, and that error."""
    name = max(errors, key=lambda layer: next(iter(errors[layer].values())))
    return name, next(iter(errors[name].values()))


def write_report(path: Path, said: Mapping[str, Any], errors: Errors) -> None:
    """Write `said` and all errors as JSON, whole or not at all; CheckpointError where it cannot."""
    content = {**said, "mean": mean_errors(errors),
               "layers": {name: dict(found) for name, found in errors.items()}}
    try:
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error
