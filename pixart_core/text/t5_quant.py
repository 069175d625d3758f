"""T5 at a chosen precision: its matrices in 16, 8 or 4 bits, made while the file is read.

One matrix is read, rounded and let go of after the other, so that memory holds what is kept and
little more. Embedding, relative positions and norms keep 16 bits or more; activations are never
quantised, for a token of T5 has a few values that are far larger than all others.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..checkpoint.mapped import release_pages
from ..checkpoint.read import CheckpointError
from ..quant.eight_bit import Float8E4M3
from ..quant.kitchen_format import KitchenFormat
from ..quant.policy import METHODS, T5_METHODS, Method, t5_layers, t5_options
from ..quant.stored import StoredWeight, Tensors, WeightFormat
from .fp8 import FP8_DTYPES, plain_weight
from .t5_file import OpenedT5, T5File, is_wo, open_t5, read_t5, wo_dtype

logger = logging.getLogger(__name__)

AUTO = "auto"
SIXTEEN_BITS = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = (AUTO, *SIXTEEN_BITS, *T5_METHODS)

_PIECE = 1 << 18  # numbers that are rounded at once; larger temporaries stay with the C library


@dataclass(frozen=True)
class SixteenBit(WeightFormat):
    """A weight in 16 bits whose layer computes in another dtype, which it is cast to in each call.

    The bytes may be looked at as another dtype.
    """

    shape: torch.Size
    dtype: torch.dtype

    name: ClassVar[str] = "16 bits"

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        return tensors["weight"].view(self.dtype).to(dtype)


def require_precision(precision: str) -> None:
    """ValueError unless `precision` is one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; use one of {', '.join(PRECISIONS)}")


def check_precision(opened: OpenedT5, precision: str) -> Method | None:
    """The method that gives a T5 this precision, None where nothing is quantised.

    Raises ValueError for an unknown precision, CheckpointError for a file that is quantised
    already, and ImportError where comfy-kitchen is missing, which quantises, and runs the products
    of int4.
    """
    require_precision(precision)
    for form in {weight.packing: weight.format for weight in opened.packed.values()}.values():
        if isinstance(form, KitchenFormat) and not form.full_precision:
            form.kitchen()
    if precision == AUTO:
        return None
    name = opened.path.name
    if opened.packed:
        said = ", ".join(sorted({weight.packing for weight in opened.packed.values()}))
        raise CheckpointError(f"{name} is quantised already ({said}), so precision {precision!r} "
                              "cannot be made of it; choose 'auto', or the 16-bit file it was made "
                              "from")
    eight = {tensor.dtype for tensor in opened.weights.values()} & set(FP8_DTYPES)
    if eight and precision == "fp8":
        raise CheckpointError(f"{name} is float8 already; choose precision 'auto'")
    if precision in SIXTEEN_BITS:
        return None
    if eight:
        logger.warning("%s is float8, and precision %s rounds it a second time; the 16-bit file "
                       "gives better captions", name, precision)
    method = METHODS[precision]
    method.format(torch.Size((0, 0))).kitchen()
    return method


def read_t5_as(path: str | Path, precision: str = AUTO, dtype: torch.dtype | None = None, *,
               wide_wo: bool = True) -> T5File:
    """Read a T5 encoder as `read_t5` does, with its matrices at `precision`.

    "auto" leaves them as the file has them. "bf16" and "fp16" store them so; where `dtype`, which
    the encoder computes in, is another, they are cast in each call. "fp8" has one scale for a
    matrix, "int8" one for a row, "int4" a scale and a zero for 64 inputs. `dtype` is by default
    that of a 16-bit precision, else that of the file, bfloat16 for files with more bits or fewer.
    `wide_wo` False leaves the `wo` weights in float16 where `dtype` is that, for an encoder that
    computes in float32 whatever its weights are.

    Layers with a number of inputs that int4 cannot divide by 64 stay as they are, with a warning.
    Raises as `read_t5` and `check_precision` do.
    """
    require_precision(precision)
    if precision == AUTO:
        return read_t5(path, dtype)
    opened = open_t5(path)
    return read_opened(opened, check_precision(opened, precision), precision, dtype, wide_wo)


def read_opened(opened: OpenedT5, method: Method | None, precision: str,
                dtype: torch.dtype | None = None, wide_wo: bool = True) -> T5File:
    """`read_t5_as` for a file that is open, with what `check_precision` said."""
    stored_as = SIXTEEN_BITS.get(precision)
    if dtype is None:
        dtype = stored_as or opened.dtype
        dtype = dtype if dtype.itemsize == 2 else torch.bfloat16
    packed: dict[str, StoredWeight] = {}
    if method is not None:
        packed = dict(quantized(opened, method))
    elif stored_as is not dtype:
        packed = dict(_cast(opened, stored_as))
    weights: dict[str, Tensor] = {}
    for name, tensor in opened.weights.items():
        if name not in packed:
            wanted = wo_dtype(name, tensor, dtype) if wide_wo else dtype
            weights[name] = _kept(opened, name, opened.plain(name, wanted))
    return opened.as_file(weights, packed, dtype)


def quantized(opened: OpenedT5, method: Method) -> Iterator[tuple[str, StoredWeight]]:
    """Every matrix that `method` takes, rounded to nearest, one after the other.

    Raises CheckpointError for weights that are not finite.
    """
    shapes = {name: tensor.shape for name, tensor in opened.weights.items()}
    names = t5_layers(shapes, method)
    _warn_of_others(opened, shapes, names, method)
    options = t5_options(method)
    for name in names:
        quantize = method.format.quantize
        if issubclass(method.format, Float8E4M3):
            largest = max(piece.abs().amax() for piece in _pieces(opened, name))
            quantize = functools.partial(quantize, largest=largest)
        pieces = [quantize(piece, options) for piece in _pieces(opened, name)]
        if opened.mapped:
            release_pages([opened.weights[name]])
        yield name, StoredWeight.joined(pieces)


def sixteen_bit_dtype(opened: OpenedT5) -> torch.dtype:
    """What embedding, positions and norms are stored in beside quantised matrices.

    That of the file, where it has 16 bits; else float16, which has more of them for the digits,
    unless a number is too large for it.
    """
    dtypes = {tensor.dtype for name, tensor in opened.weights.items() if not is_wo(name)}
    if len(dtypes) == 1 and (dtype := dtypes.pop()) in SIXTEEN_BITS.values():
        return dtype
    shapes = {name: tensor.shape for name, tensor in opened.weights.items()}
    layers = set(t5_layers(shapes, METHODS["int8"]))
    largest = torch.finfo(torch.float16).max
    fits = all(opened.plain(name, torch.float32).abs().max() <= largest
               for name in opened.weights if name not in layers)
    return torch.float16 if fits else torch.bfloat16


def _cast(opened: OpenedT5, dtype: torch.dtype) -> Iterator[tuple[str, StoredWeight]]:
    shapes = {name: tensor.shape for name, tensor in opened.weights.items()}
    for name in t5_layers(shapes, METHODS["int8"]):
        tensor = _kept(opened, name, opened.plain(name, dtype))
        yield name, StoredWeight(SixteenBit(tensor.shape, dtype), {"weight": tensor})


def _kept(opened: OpenedT5, name: str, tensor: Tensor) -> Tensor:
    """`tensor`, once the pages of the weight that it is a copy of are let go of."""
    source = opened.weights[name]
    if opened.mapped and tensor.data_ptr() != source.data_ptr():
        release_pages([source])
    return tensor


def _pieces(opened: OpenedT5, name: str) -> Iterator[Tensor]:
    """Some rows of a weight after the other, in float32."""
    tensor, scale = opened.weights[name], opened.scales.get(name)
    rows = max(_PIECE // tensor.shape[1], 1)
    for start in range(0, tensor.shape[0], rows):
        part = tensor[start: start + rows]
        own = scale if scale is None or scale.numel() == 1 else scale.flatten()[start: start + rows]
        piece = plain_weight(name, part, own, torch.float32)
        opened.require_finite(name, piece)
        yield piece


def _warn_of_others(opened: OpenedT5, shapes: Mapping[str, torch.Size], names: list[str],
                    method: Method) -> None:
    left = [name for name in t5_layers(shapes, METHODS["int8"]) if name not in set(names)]
    if left:
        logger.warning("%s: %d layers stay as they are, for %s packs 64 inputs at a time: %s has "
                       "%d inputs", opened.path.name, len(left), method.name, left[0],
                       shapes[left[0]][1])
