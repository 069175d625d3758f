"""SVDQuant weights of deepcompressor (github.com/mit-han-lab/deepcompressor) in our own form.

Its folder holds, under diffusers' names: `model.pt`, the weights as 4 bits hold them after
smoothing, without the low-rank part; `scale.pt`, their group scales; `smooth.pt`, what inputs are
divided by; `branch.pt`, the low-rank part for smoothed inputs. Query, key and value of
self-attention have one smoothing and one branch, kept under `to_q`.

Behind a GELU it adds a shift to the input of the whole layer, the branch among it, and has taken
the shift out of the bias. Here the branch sees the input as it comes, so that the bias gains
up down^T shift.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.convert import diffusers_module
from ..checkpoint.read import CheckpointError, holds_program, read_checkpoint
from ..quant.policy import METHODS, layer_kind
from ..quant.stored import StoredWeight
from ..quant.svdquant.int4 import GELU_SHIFT, GROUP, pack
from ..quant.svdquant.layer import RANK_MULTIPLE
from ..quant.svdquant_format import SVDQuant

FILES = ("model.pt", "scale.pt", "smooth.pt", "branch.pt")
_SHIFTED, _SHIFT = ".ff.net.2.linear.", ".ff.net.2.shift"
_ROUNDING = 0.1  # of a code, from weights that were kept in bfloat16
_FUSED = "proj.fuse_when_possible"
_ATTENTION_OUT = ("attn.proj", "cross_attn.proj")


class Imported(NamedTuple):
    """diffusers-named tensors without the quantised weights' low-rank part, the quantised weights
    and their biases by native name."""

    state_dict: dict[str, Tensor]
    stored: dict[str, StoredWeight]
    biases: dict[str, Tensor]


class _Folder(NamedTuple):
    model: dict[str, Tensor]
    scale: dict[str, Tensor]
    smooth: dict[str, Any]
    branch: dict[str, Any]


def read_deepcompressor(folder: Path, dtype: torch.dtype) -> Imported:
    """Everything of a deepcompressor folder; `dtype` is that of what is stored beside the codes.

    Raises CheckpointError for files that are missing, damaged or hold more than tensors, for
    layers that are not whole, and for formats other than int4 in groups of 64.
    """
    found = _Folder(*_open(Path(folder)))
    shifts = {name.removesuffix(".shift"): tensor for name, tensor in found.model.items()
              if name.endswith(_SHIFT)}
    plain = {name.replace(_SHIFTED, ".ff.net.2."): tensor for name, tensor in found.model.items()
             if not name.endswith(_SHIFT)}
    found = found._replace(model=plain)
    stored: dict[str, StoredWeight] = {}
    biases: dict[str, Tensor] = {}
    used: set[str] = set()
    for native, parts in _layers(plain):
        if not any(_scale_name(part, found) for part in parts):
            _refuse_orphans(parts, found)
            continue
        used.update(parts)
        weight, bias = _convert(native, parts, found, shifts.get(parts[0]), dtype)
        stored[f"{native}.weight"] = weight
        if bias is not None:
            biases[f"{native}.bias"] = bias
    others = {_module(name) for name in found.scale} - used
    if others or not stored:
        raise CheckpointError(
            f"{folder}: " + (f"scale.pt names {min(others)}, which is kept in 16 bits here"
                             if others else "scale.pt names no layer of a PixArt transformer"))
    return Imported(plain, stored, biases)


def _open(folder: Path) -> list[dict[str, Any]]:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} has no {', '.join(missing)}; a folder of deepcompressor "
                              f"(--save-model) with {', '.join(FILES)} was expected")
    return [read_checkpoint(folder / name).state_dict for name in FILES[:2]] \
        + [_load(folder / name) for name in FILES[2:]]


def _load(path: Path) -> dict[str, Any]:
    """A dictionary of tensors and plain values; nothing in the file can run."""
    try:
        if holds_program(path):
            raise ValueError("it is a TorchScript program")
        loaded = torch.load(str(path), map_location="cpu", weights_only=True)
        if not isinstance(loaded, Mapping):
            raise ValueError(f"it holds a {type(loaded).__name__}")
        return dict(loaded)
    except Exception as error:  # damaged pickles fail with anything
        gist = (str(error).strip().splitlines() or ["no details"])[0][:200]
        raise CheckpointError(f"{path} is no dictionary of tensors (weights_only=True): "
                              f"{type(error).__name__}: {gist}") from error


def _layers(model: Mapping[str, Tensor]) -> list[tuple[str, tuple[str, ...]]]:
    """Native layers of all blocks that 4 bits take, and the diffusers layers each is made of."""
    depth = len({name.split(".")[1] for name in model if name.startswith("transformer_blocks.")})
    names = [f"blocks.{i}.{kind}" for i in range(depth) for kind in METHODS["svdquant"].layers]
    pairs = [(name, diffusers_module(name) or ()) for name in names]
    return [(name, parts) for name, parts in pairs if f"{parts[0]}.weight" in model]


def _convert(native: str, parts: tuple[str, ...], found: _Folder, shift: Tensor | None,
             dtype: torch.dtype) -> tuple[StoredWeight, Tensor | None]:
    codes, scales = zip(*(_codes(part, found) for part in parts), strict=True)
    codes, scales = torch.cat(codes), torch.cat(scales)
    rows, columns = codes.shape
    smooth = _vector(_lookup(found.smooth, parts[0]), columns, f"smooth.pt: {parts[0]}")
    if layer_kind(f"{native}.weight") in _ATTENTION_OUT and found.smooth.get(_FUSED, True):
        smooth = None  # the layer before was divided by it
    smooth = torch.ones(columns) if smooth is None else smooth
    down, up = _branch(parts[0], found, rows, columns)
    down = down / smooth[:, None]
    biases = [found.model.get(f"{part}.bias") for part in parts]
    bias = None if None in biases else torch.cat(biases).float()
    if shift is not None:
        if not torch.allclose(shift.float(), torch.tensor(GELU_SHIFT), atol=1e-3):
            raise CheckpointError(f"{parts[0]}.shift is {shift.flatten()[0].item():g}; the format "
                                  f"has {GELU_SHIFT}")
        added = up @ (down.sum(0) * GELU_SHIFT)
        bias = added if bias is None else bias + added
    fill = -up.shape[1] % RANK_MULTIPLE
    floats = [t.to(dtype) for t in (scales.t().contiguous(), smooth, F.pad(down, (0, fill)),
                                    F.pad(up, (0, fill)))]
    if not all(t.isfinite().all() for t in floats):
        raise CheckpointError(f"{parts[0]} has numbers that are not finite in {dtype}; the folder "
                              "is damaged, or use --dtype bfloat16")
    weight = SVDQuant.from_layer(pack(codes), *floats, shift is not None)
    return weight, None if bias is None else bias.to(dtype)


def _codes(part: str, found: _Folder) -> tuple[Tensor, Tensor]:
    """Codes -8..7 (N, K) and group scales (N, K/64) of one diffusers layer, float32."""
    weight = found.model[f"{part}.weight"].float()
    name = _scale_name(part, found)
    if name is None:
        raise CheckpointError(f"scale.pt has no {part}.weight.scale.0, which the other parts of "
                              "that layer have; the folder is incomplete")
    if f"{name[:-1]}1" in found.scale:
        raise CheckpointError(f"{part} has scales of two levels, as NVFP4 has; int4 in groups of "
                              f"{GROUP} can be read")
    scale = found.scale[name].float()
    rows, columns = weight.shape
    if columns % GROUP or scale.numel() != rows * columns // GROUP:
        groups = scale.numel() / rows
        raise CheckpointError(f"{part} has {groups:g} scales for {columns} inputs; int4 in groups "
                              f"of {GROUP} has {columns / GROUP:g}")
    scale = scale.reshape(rows, columns // GROUP)
    codes = weight.reshape(rows, -1, GROUP) / scale.unsqueeze(-1)
    whole = codes.round()
    if not whole.isfinite().all() or (codes - whole).abs().max() > _ROUNDING \
            or whole.min() < -8 or whole.max() > 7:
        raise CheckpointError(f"{part}.weight divided by its scales is not whole numbers of -8 to "
                              "7; model.pt and scale.pt are not of one run, or not of int4")
    return whole.reshape(rows, columns), scale


def _branch(part: str, found: _Folder, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """down (K, r) for smoothed inputs and up (N, r), float32."""
    branch = _lookup(found.branch, part)
    if not isinstance(branch, Mapping) or not {"a.weight", "b.weight"} <= branch.keys():
        raise CheckpointError(f"branch.pt has no a.weight and b.weight for {part}; the folder is "
                              "incomplete")
    a, b = branch["a.weight"].float(), branch["b.weight"].float()
    if a.shape[1:] != (columns,) or b.shape != (rows, a.shape[0]):
        raise CheckpointError(f"branch.pt: {part} has a of shape {tuple(a.shape)} and b of "
                              f"{tuple(b.shape)}; (rank, {columns}) and ({rows}, rank) were "
                              "expected, one branch for the whole layer")
    return a.t(), b


def _vector(value: Any, size: int, what: str) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.numel() != size or not (value > 0).all():
        raise CheckpointError(f"{what} is not {size} positive numbers")
    return value.float().flatten()


def _lookup(table: Mapping[str, Any], part: str) -> Any:
    return table.get(part, table.get(f"{part}.linear"))


def _scale_name(part: str, found: _Folder) -> str | None:
    names = (f"{part}.weight.scale.0", f"{part}.linear.weight.scale.0")
    return next((name for name in names if name in found.scale), None)


def _module(name: str) -> str:
    """The layer that an entry of scale.pt is of."""
    return name.partition(".weight.")[0].removesuffix(".linear")


def _refuse_orphans(parts: tuple[str, ...], found: _Folder) -> None:
    for part in parts:
        for file, table in (("smooth.pt", found.smooth), ("branch.pt", found.branch)):
            if _lookup(table, part) is not None:
                raise CheckpointError(f"{file} names {part}, whose scale is missing in scale.pt; "
                                      "the folder is incomplete")
