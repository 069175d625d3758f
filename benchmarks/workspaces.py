"""What comfy-kitchen's kernels hold beside what they return, by the source of its version 0.2.40.

On the meta device each of its operations is one call that shows its outputs alone. This is the
CUDA back end's part that cannot be seen there; where a card has a kernel that needs less, and one
that needs more, it is the latter's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

CUBLAS = 32 << 20  # bytes of the one workspace that all of its cuBLAS products share
MATRIX_TOKENS = 256  # the most for which int4 products unpack nothing
GROUP = 64


class Workspace(NamedTuple):
    """Bytes of one call.

    `passing` are freed with it. `kept` stay for later calls that say the same key, and
    `returned`: the outputs are views of what is kept.
    """

    passing: int = 0
    kept: Mapping[Hashable, int] = {}
    returned: bool = False


def int8_linear(x: Any, weight: Any, **_: Any) -> Workspace:
    """x (M, K) as int8 with a float32 for each row; where no fused epilogue takes the shape, the
    product (M, N) in int32, and cuBLAS's workspace."""
    rows, columns = _rows(x), x.shape[-1]
    return Workspace(rows * (columns + 4) + 4 * rows * weight.shape[0], {"cublas": CUBLAS})


def quantize_svdquant_w4a4(x: Any, lora_down: Any, pad_size: int = 256, **_: Any) -> Workspace:
    """x (M, K) as int4, its scales and its low-rank part in 16 bits: buffers for each size, which
    all layers share and nothing frees."""
    rows, columns, rank = -(-_rows(x) // pad_size) * pad_size, x.shape[-1], lora_down.shape[1]
    size = rows * columns // 2 + x.itemsize * rows * (columns // GROUP + rank)
    return Workspace(0, {("svdquant", x.dtype, rows, columns, rank): size}, returned=True)


def gemv_awq_w4a16(x: Any, qweight: Any, wscales: Any, **_: Any) -> Workspace:
    """Nothing for up to 256 rows; for more the weight (N, K) is unpacked: codes as int32 and as
    int8, then three of its size in 16 bits at a time, of which two are left for the product."""
    rows, numbers = _rows(x), 2 * qweight.numel()
    if rows <= MATRIX_TOKENS:
        return Workspace()
    out, codes = wscales.itemsize * rows * qweight.shape[0], 3 * numbers
    return Workspace(max(codes + 3 * wscales.itemsize * numbers - out,
                         codes + 2 * wscales.itemsize * numbers))


WORKSPACES: Mapping[str, Callable[..., Workspace]] = {
    f"comfy_kitchen::{f.__name__}": f
    for f in (int8_linear, quantize_svdquant_w4a4, gemv_awq_w4a16)}
# operations whose outputs are all that they allocate
PLAIN = ("comfy_kitchen::scaled_mm_svdquant_w4a4",)


def workspace_of(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Workspace:
    """What a call of `function` holds beside its outputs; nothing for PyTorch's own operations.

    Raises ValueError for an operation of comfy-kitchen that is not known here.
    """
    name = function._schema.name
    if not name.startswith("comfy_kitchen::") or name in PLAIN:
        return Workspace()
    if name not in WORKSPACES:
        raise ValueError(f"{name} has no entry in benchmarks/workspaces.py; count what its kernel "
                         "allocates and add it")
    names = [argument.name for argument in function._schema.arguments]
    return WORKSPACES[name](**dict(zip(names, args, strict=False)), **kwargs)


def _rows(x: Any) -> int:
    return x.numel() // x.shape[-1]
