"""`pixart convert` for ControlNets and the HED network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..checkpoint import convert_state_dict, write_checkpoint
from ..checkpoint.controlnet import join_controlnet
from ..config import METADATA_KEY
from ..export import write_controlnet_folder
from ..load import open_transformer, require_finite
from ..load_control import read_controlnet
from ..model.hed import open_hed
from ..quant import unpacked


class Comparison(NamedTuple):
    """How the base inside a ControlNet file compares with another: tensors of both, those that
    differ, the largest difference and where it is."""

    shared: int
    different: int
    largest: float
    where: str
    missing: int

    def __str__(self) -> str:
        if self.missing:
            return f"lacks or adds {self.missing} tensors"
        if not self.different:
            return f"is equal in all {self.shared} tensors"
        return (f"differs in {self.different} of {self.shared} tensors, by up to "
                f"{self.largest:.3g} in {self.where}")


def write_control(source: Path, target: Path, to: str, cast: Any, base: Path | None,
                  fields: Mapping[str, Any], folder: bool) -> tuple[int, list[str]]:
    """Write the ControlNet of `source` alone; parameters written, and what to say about its base.

    `base` is the transformer that the base inside the file is compared with.
    """
    opened = read_controlnet(source, fields, keep_base=True)
    opened.state_dict.update(unpacked(opened.packed, opened.state_dict))
    for name, tensor in opened.state_dict.items():
        require_finite(name, tensor, opened.source)
    said = []
    if opened.base and base is None:
        said.append(f"left out the base model in {source.name} ({len(opened.base)} tensors); "
                    "--base FILE compares it with the one you use")
    elif opened.base:
        outcome = compare_base(opened.base, open_transformer(base, check_finite=False)[0])
        said.append(f"the base model in {source.name} was left out; against {base.name} it "
                    f"{outcome}")
    elif base is not None:
        said.append(f"{source.name} holds no base model to compare with {base.name}")
    tensors = cast(join_controlnet(opened.state_dict, to=to))
    if folder:
        write_controlnet_folder(target, tensors, opened.config)
    else:
        write_checkpoint(target, tensors,
                         {METADATA_KEY: opened.config.to_json(), "format": "pt"})
    return sum(t.numel() for t in tensors.values()), said


def compare_base(inside: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Comparison:
    """The base of a ControlNet file, in any layout, against native tensors of a transformer.

    Position tables and the null caption, which not every layout keeps, do not count. Tensors of
    unequal dtype are compared in the coarser one.
    """
    left_out = ("pos_embed", "y_embedder.y_embedding")
    mine = {k: v for k, v in convert_state_dict(inside, to="native").items() if k not in left_out}
    theirs = {k: v for k, v in other.items() if k not in left_out}
    shared = [k for k in mine if k in theirs and mine[k].shape == theirs[k].shape]
    different, largest, where = 0, 0.0, ""
    for name in shared:
        a, b = mine[name], theirs[name]
        coarser = min((a.dtype, b.dtype), key=lambda dtype: dtype.itemsize)
        gap = (a.to(coarser).double() - b.to(coarser).double()).abs().max().item()
        different += gap > 0
        if gap > largest:
            largest, where = gap, name
    return Comparison(len(shared), different, largest, where,
                      len(mine.keys() | theirs.keys()) - len(shared))


def write_hed(source: Path, target: Path, cast: Any) -> int:
    """Write a HED edge network as safetensors; parameters written."""
    tensors = cast(open_hed(source))
    write_checkpoint(target, tensors, {"format": "pt"})
    return sum(t.numel() for t in tensors.values())
