"""What a LoRA does to one weight: LoRA, LoHa, LoKr, DoRA, differences and whole values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .header import CheckpointError

Kind = Literal["lora", "loha", "lokr", "diff", "value"]


@dataclass(frozen=True)
class LoRALayer:
    """How one native parameter, or one of `parts` equal groups of its rows, is changed.

    `tensors` by kind: lora down (r, in), up (out, r), mid; loha hada_*; lokr lokr_*; diff and
    value (out, ...): a change, and a replacement. `scale` multiplies the change; `alpha_from`
    says in words what its alpha was taken from, "" where it has none. DoRA (arXiv 2402.09353) has
    a `magnitude`: (out, 1), or (1, in) for norms over columns; it divides by the norm of the
    changed weight, or of the base (`base_norm`) in files written for ComfyUI.
    """

    target: str
    part: int
    parts: int
    kind: Kind
    tensors: dict[str, Tensor]
    scale: float = 1.0
    magnitude: Tensor | None = None
    base_norm: bool = False
    alpha_from: str = ""

    @property
    def rank(self) -> int | None:
        """The inner dimension that alpha is divided by; None where nothing is factorised."""
        for name, axis in (("down", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
            if name in self.tensors:
                return self.tensors[name].shape[axis]
        return None


@dataclass(frozen=True)
class LoRA:
    """A LoRA in native terms. `unused` are tensor names that no PixArt weight belongs to; `notes`
    say in plain sentences what a user should know, those names among it. `rslora`: alpha was
    divided by the root of the rank."""

    layers: tuple[LoRALayer, ...]
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source: str = "the LoRA"
    rslora: bool = False


def changed(weight: Tensor, layer: LoRALayer) -> Tensor:
    """The weight (rows that the layer is for), float32, as `layer` makes it at strength 1."""
    if layer.kind == "value":
        return layer.tensors["value"].to(weight).reshape(weight.shape)
    out = weight + change(layer, weight.device).reshape(weight.shape)
    if layer.magnitude is None:
        return out
    return normalised(out, layer.magnitude.to(out), weight if layer.base_norm else out)


def normalised(weight: Tensor, magnitude: Tensor, reference: Tensor) -> Tensor:
    """DoRA (arXiv 2402.09353, eq. 5): `weight` over the norms of `reference` times `magnitude`.

    magnitude (out, 1): norms of rows; (1, in): norms of columns, of a convolution over all else.
    """
    by_row = magnitude.shape[0] == weight.shape[0] and magnitude.shape[1] == 1
    axis = 0 if by_row else 1
    norm = row_norms(reference.transpose(0, axis))
    factor = magnitude.reshape(-1).to(weight) / norm
    shape = [1] * weight.ndim
    shape[axis] = -1
    return weight * factor.reshape(shape)


def row_norms(weight: Tensor) -> Tensor:
    """Norm of each row (out,), never quite 0."""
    norms = weight.reshape(weight.shape[0], -1).norm(dim=1)
    return norms + torch.finfo(weight.dtype).eps


def change(layer: LoRALayer, device: torch.device | None = None) -> Tensor:
    """What the layer adds to its rows, (out, ...) in float32, without DoRA; not for values."""
    t = {name: tensor.to(device, torch.float32) for name, tensor in layer.tensors.items()}
    return layer.scale * {"lora": _lora, "loha": _loha, "lokr": _lokr,
                          "diff": lambda t: t["diff"]}[layer.kind](t)


def _lora(t: dict[str, Tensor]) -> Tensor:
    if "mid" in t:
        return torch.einsum("or,rskl,si->oikl", t["up"].flatten(1), t["mid"],
                            t["down"].flatten(1))
    return t["up"].flatten(1) @ t["down"].flatten(1)


def _loha(t: dict[str, Tensor]) -> Tensor:
    """arXiv 2108.06098: the elementwise product of two low-rank matrices."""
    return (_matrix(t.get("hada_t1"), t["hada_w1_a"], t["hada_w1_b"])
            * _matrix(t.get("hada_t2"), t["hada_w2_a"], t["hada_w2_b"]))


def _lokr(t: dict[str, Tensor]) -> Tensor:
    """LoKr (arXiv 2309.14859): the Kronecker product of two matrices, either factorised or not."""
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    second = t.get("lokr_w2")
    if second is None:
        second = _matrix(t.get("lokr_t2"), t["lokr_w2_a"], t["lokr_w2_b"])
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second)


def _matrix(core: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """a b, or Tucker's form around a kernel (r, r, k, k), where a is (r, out)."""
    return a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a)


def change_shape(layer: LoRALayer, source: str) -> tuple[int, int]:
    """Rows and columns of the layer's change; CheckpointError when its tensors do not fit."""
    try:
        if layer.kind == "value":
            shape = layer.tensors["value"].shape
        else:
            shape = change(layer, torch.device("meta")).shape
        return shape[0], shape[1:].numel()
    except (RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{k} {tuple(t.shape)}" for k, t in layer.tensors.items())
        raise CheckpointError(f"{source}: the tensors for {layer.target} do not fit each other: "
                              f"{shapes}") from error
