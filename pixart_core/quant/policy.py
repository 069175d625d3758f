"""Which layers of a PixArt transformer, ControlNet or T5 are quantised, and how.

Four bits: self-attention, the query and output of cross-attention, and the feed-forward layers, as
deepcompressor does it for PixArt-Sigma. Keys and values of the caption, the time path, the
embedders and the last layer stay as they are; with eight bits keys and values are quantised too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .eight_bit import MXFP8, Float8E4M3, Int8
from .four_bit import GROUP, NVFP4, Int4
from .kitchen_format import FULL_PRECISION, KitchenFormat
from .stored import StoredWeight

_BLOCK = re.compile(r"(?:blocks\.\d+|controlnet\.\d+\.copied_block)\.(?P<layer>.+)\.weight")
# the linear layers of a block in the order they run
LAYERS = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear",
          "cross_attn.proj", "mlp.fc1", "mlp.fc2")
_EIGHT_BITS = LAYERS
_FOUR_BITS = tuple(name for name in LAYERS if name != "cross_attn.kv_linear")
_T5_LAYER = re.compile(r"encoder\.block\.\d+\.layer\.\d\.(SelfAttention\.[qkvo]"
                       r"|DenseReluDense\.w[io](_\d)?)\.weight")


@dataclass(frozen=True)
class Method:
    """A way to quantise: its name on the command line, the format it writes, bits per weight.

    `calibrated` methods look at activations; the others round each weight by itself.
    """

    name: str
    format: type[KitchenFormat] | None
    bits: int
    divisor: int = 1  # of both sides of a weight
    calibrated: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        """The linear layers of a block that it takes."""
        return _EIGHT_BITS if self.bits == 8 else _FOUR_BITS

    def fits(self, shape: torch.Size) -> bool:
        """Whether a weight (out, in) can be stored; it stays as it is otherwise."""
        columns_of = GROUP if self.format is Int4 or self.calibrated else self.divisor
        return len(shape) == 2 and shape[1] % columns_of == 0 and shape[0] % self.divisor == 0


METHODS: dict[str, Method] = {m.name: m for m in (
    Method("svdquant", None, 4, calibrated=True),
    Method("int8", Int8, 8),
    Method("fp8", Float8E4M3, 8),
    Method("mxfp8", MXFP8, 8, MXFP8.block),
    Method("nvfp4", NVFP4, 4, NVFP4.block),
    Method("int4", Int4, 4),
)}
# activations of a text encoder have outliers that 8 bits for a whole token cannot hold
T5_METHODS = ("int8", "fp8", "int4")


def transformer_layers(shapes: Mapping[str, torch.Size], method: Method) -> list[str]:
    """The weights ("blocks.0.attn.qkv.weight") of a transformer or ControlNet in native names."""
    return [name for name in _candidates(shapes, method) if method.fits(shapes[name])]


def unfit_layers(shapes: Mapping[str, torch.Size], method: Method) -> list[str]:
    """The weights that `method` would take, were their sides divisible as its format needs."""
    return [name for name in _candidates(shapes, method) if not method.fits(shapes[name])]


def layer_kind(name: str) -> str:
    """What a layer is in its block: "attn.qkv" of "blocks.3.attn.qkv.weight"."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no linear layer of a PixArt block")
    return match["layer"]


def behind_gelu(name: str) -> bool:
    """Whether a layer's input comes out of a GELU, so that its 4-bit activations have no sign."""
    return layer_kind(name) == "mlp.fc2"


def _candidates(shapes: Mapping[str, torch.Size], method: Method) -> list[str]:
    return [name for name in shapes
            if (match := _BLOCK.fullmatch(name)) and match["layer"] in method.layers]


def t5_layers(shapes: Mapping[str, torch.Size], method: Method) -> list[str]:
    """The weights of a T5 encoder in Hugging Face's names; its tables and norms stay."""
    return [name for name, shape in shapes.items()
            if _T5_LAYER.fullmatch(name) and method.fits(shape)]


def quantize_weights(state_dict: Mapping[str, Tensor], names: Iterable[str], method: Method,
                     options: Mapping[str, Any] | None = None,
                     done: Callable[[str], None] | None = None) -> dict[str, StoredWeight]:
    """Round the weights `names` to nearest, one after the other; `done` is told each name.

    Raises ValueError for a calibrated method and for weights that are not finite.
    """
    if method.format is None:
        raise ValueError(f"{method.name} needs calibration, it cannot round a weight by itself")
    stored: dict[str, StoredWeight] = {}
    for name in names:
        weight = state_dict[name].float()
        if not weight.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite values; the file is damaged")
        stored[name] = method.format.quantize(weight, options)
        if done is not None:
            done(name)
    return stored


def t5_options(method: Method) -> dict[str, Any]:
    """What `comfy_quant` says in a T5: its activations are never quantised."""
    return {FULL_PRECISION: True} if method.bits == 8 else {}
