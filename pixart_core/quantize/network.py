"""Transformers and ControlNets on their way to a quantised file: opened, rounded, written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.mapped import release_pages
from ..checkpoint.read import CheckpointError, read_checkpoint
from ..checkpoint.write import write_checkpoint
from ..config import METADATA_KEY, ControlNetConfig, PixArtConfig
from ..load import main_dtype, read_transformer, require_finite
from ..load_control import CONTROLNET_KINDS, read_controlnet
from ..quant.formats import file_tensors
from ..quant.policy import Method, quantize_weights, transformer_layers, unfit_layers
from ..quant.stored import StoredWeight
from ..quant.svdquant.layer import relative_error

QUANTIZATION_KEY = "pixart_quantization"
HALF_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Network:
    """A model to quantise: native tensors, mapped to their file, its config and file name."""

    state_dict: Mapping[str, Tensor]
    config: PixArtConfig | ControlNetConfig
    source: str
    mapped: bool = False

    @property
    def is_controlnet(self) -> bool:
        return isinstance(self.config, ControlNetConfig)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.state_dict.items()}

    def layers(self, method: Method) -> list[str]:
        """The weights that `method` quantises; ValueError where there are none."""
        names = transformer_layers(self.shapes, method)
        if not names:
            raise ValueError(f"no layer of {self.source} has sides that {method.name} can store; "
                             "use another method")
        return names

    def left(self, method: Method) -> list[str]:
        """The weights that stay as they are only because their sides do not fit the format."""
        return unfit_layers(self.shapes, method)


def open_network(path: Path, kind: str, fields: Mapping[str, Any]) -> Network:
    """What a file or folder of `kind` (as `identify` says it) holds; no weight is looked at.

    Raises CheckpointError for files that cannot be used, and for weights that are quantised
    already: rounding twice loses more than either.
    """
    inner = "controlnet" if (path / "controlnet").is_dir() else None
    refuse_quantized(path, subfolder=inner if kind in CONTROLNET_KINDS else None)
    if kind in CONTROLNET_KINDS:
        opened = read_controlnet(path, fields)
    else:
        opened = read_transformer(path, fields)
    return Network(opened.state_dict, opened.config, opened.source, opened.mapped)


def refuse_quantized(path: Path, subfolder: str | None = None) -> None:
    """CheckpointError for a file with quantised weights; only its header is read."""
    checkpoint = read_checkpoint(path, subfolder=subfolder, keep_packed=True)
    found = sorted({weight.packing for weight in checkpoint.packed.values()})
    found += sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.state_dict.values()
                     if t.is_floating_point() and t.dtype.itemsize == 1})
    if found:
        raise CheckpointError(f"{path.name} is quantised already ({', '.join(found)}); quantise "
                              "from the original file in 16 or 32 bits")


def storage_dtype(network: Network, wanted: torch.dtype | None = None) -> torch.dtype:
    """The 16-bit dtype of what is not quantised: `wanted`, or the file's own, or bfloat16."""
    if wanted is not None:
        return wanted
    own = main_dtype(network.state_dict)
    return own if own in HALF_DTYPES else torch.bfloat16


def round_network(network: Network, method: Method,
                  done: Callable[[str], None] | None = None) -> dict[str, StoredWeight]:
    """Every weight that `method` takes, rounded to nearest by itself; `done` is told each name.

    Raises ValueError for a calibrated method, for weights that are not finite and for a network
    without layers that fit.
    """
    def finished(name: str) -> None:
        if network.mapped:
            release_pages([network.state_dict[name]])
        if done is not None:
            done(name)

    return quantize_weights(network.state_dict, network.layers(method), method, done=finished)


def write_network(path: Path, network: Network, stored: Mapping[str, StoredWeight],
                  dtype: torch.dtype, said: Mapping[str, Any],
                  biases: Mapping[str, Tensor] | None = None) -> int:
    """Write a network with `stored` in place of its weights; bytes of the file.

    `biases` take the place of the network's own, `said` (JSON) goes into the header beside the
    config. The other floating tensors become `dtype`; the file appears when it is complete.
    Raises CheckpointError where a tensor is not finite, there or in `dtype`.
    """
    biases = biases or {}
    tensors = file_tensors(stored)
    for name, tensor in network.state_dict.items():
        if name not in stored:
            tensors[name] = _as(name, biases.get(name, tensor), dtype, network.source)
    write_checkpoint(path, tensors, {METADATA_KEY: network.config.to_json(), "format": "pt",
                                     QUANTIZATION_KEY: json.dumps(dict(said))})
    return path.stat().st_size


def weight_errors(network: Network, stored: Mapping[str, StoredWeight],
                  names: Iterable[str] | None = None) -> dict[str, float]:
    """|stored - weight| / |weight| of each quantised weight, in the Frobenius norm."""
    errors = {}
    for name in names or stored:
        weight = network.state_dict[name].float()
        errors[name] = relative_error(stored[name].dense(), weight)
    return errors


def _as(name: str, tensor: Tensor, dtype: torch.dtype, source: str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    require_finite(name, tensor, source)
    cast = tensor.to(dtype)
    if dtype == torch.float16 and not cast.isfinite().all():
        raise CheckpointError(f"{source}: {name} has numbers too large for float16; use --dtype "
                              "bfloat16")
    return cast
