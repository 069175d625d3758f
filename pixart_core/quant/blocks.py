"""The block formats of GGML in plain PyTorch, on any device and without a host synchronisation.

A row of weights is cut into blocks of 32 or 256; each block is a few bytes with its own scales in
float16. The byte layouts are those of ggml's `ggml-common.h`; the arithmetic is float32 and in the
order of its reference, so that results are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """One block format: `size` values in `nbytes` bytes, float16 scales at the offsets `scales`.

    `unpack` takes blocks (n, nbytes) uint8 to values (n, size) float32.
    """

    name: str
    size: int
    nbytes: int
    scales: tuple[int, ...]
    unpack: Callable[[Tensor], Tensor]

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.nbytes / self.size


def dequantize(data: Tensor, packing: str, shape: Sequence[int],
               dtype: torch.dtype = torch.float32) -> Tensor:
    """Packed bytes (uint8 or int8, any shape) as weights of `shape` in `dtype`."""
    kind = PACKINGS[packing]
    blocks = data.view(torch.uint8).reshape(-1, kind.nbytes)
    return kind.unpack(blocks).reshape(shape).to(dtype)


def finite_scales(data: Tensor, packing: str) -> Tensor:
    """One boolean: whether every scale, and with them every weight, is finite."""
    kind = PACKINGS[packing]
    blocks = data.view(torch.uint8).reshape(-1, kind.nbytes)
    return torch.stack([_half(blocks, at).isfinite().all() for at in kind.scales]).all()


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 number at byte `at` of each block, (n, 1) float32."""
    # a copy, because a view as float16 needs an even address
    return blocks[:, at: at + 2].clone().view(torch.float16).float()


def _fields(x: Tensor, bits: int, dim: int) -> Tensor:
    """The 8 / bits numbers in every byte, lowest bits first, along a new dimension."""
    mask = (1 << bits) - 1
    return torch.stack([(x >> shift) & mask for shift in range(0, 8, bits)], dim)


def _half_bytes(blocks: Tensor, at: int) -> Tensor:
    """32 four-bit numbers: the low halves of 16 bytes, then their high halves."""
    return _fields(blocks[:, at: at + 16], 4, 1).flatten(1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """32 bits from four bytes, as 0 or 16."""
    return _fields(blocks[:, at: at + 4], 1, 2).flatten(1) << 4


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_half_bytes(b, 2).to(torch.int8) - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _half_bytes(b, 4) + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return _half(b, 0) * ((_half_bytes(b, 6) | _fifth_bits(b, 2)).to(torch.int8) - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _half(b, 0) * (_half_bytes(b, 8) | _fifth_bits(b, 4)) + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return _half(b, 0) * b[:, 2:].view(torch.int8)


_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _iq4_nl(b: Tensor) -> Tensor:
    levels = torch.tensor(_IQ4_LEVELS, dtype=torch.float32, device=b.device)
    return _half(b, 0) * levels[_half_bytes(b, 2).long()]


# 256 values in 16 groups of 16 or 8 groups of 32, each with a small integer scale of its own

def _q2_k(b: Tensor) -> Tensor:
    scales = b[:, :16]
    step = (_half(b, 80) * (scales & 15)).unsqueeze(-1)
    low = (_half(b, 82) * (scales >> 4)).unsqueeze(-1)
    q = _fields(b[:, 16:80].reshape(-1, 2, 32), 2, 2).reshape(-1, 16, 16)
    return (step * q - low).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    low = _fields(b[:, 96:104], 4, 1).flatten(1)
    high = _fields(b[:, 104:108], 2, 1).flatten(1)
    scales = (low | high << 4).to(torch.int8) - 32
    step = (_half(b, 108) * scales).unsqueeze(-1)
    q = _fields(b[:, 32:96].reshape(-1, 2, 32), 2, 2).reshape(-1, 16, 16).to(torch.int8)
    unset = 1 - _fields(b[:, :32], 1, 1).reshape(-1, 16, 16).to(torch.int8)
    return (step * (q - 4 * unset)).flatten(1)


def _scales_and_lows(b: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset (n, 8, 1) of the groups of Q4_K and Q5_K, six bits each in bytes 4 to 16."""
    first, second, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat([first & 63, rest & 15 | first >> 2 & 48], dim=1)
    lows = torch.cat([second & 63, rest >> 4 | second >> 2 & 48], dim=1)
    return (_half(b, 0) * scales).unsqueeze(-1), (_half(b, 2) * lows).unsqueeze(-1)


def _q4_k(b: Tensor) -> Tensor:
    step, low = _scales_and_lows(b)
    q = _fields(b[:, 16:].reshape(-1, 4, 32), 4, 2).reshape(-1, 8, 32)
    return (step * q - low).flatten(1)


def _q5_k(b: Tensor) -> Tensor:
    step, low = _scales_and_lows(b)
    q = _fields(b[:, 48:].reshape(-1, 4, 32), 4, 2).reshape(-1, 8, 32)
    return (step * (q | _fields(b[:, 16:48], 1, 1) << 4) - low).flatten(1)


def _q6_k(b: Tensor) -> Tensor:
    step = (_half(b, 208) * b[:, 192:208].view(torch.int8)).unsqueeze(-1)
    low = _fields(b[:, :128].reshape(-1, 2, 64), 4, 2).reshape(-1, 8, 32)
    high = _fields(b[:, 128:192].reshape(-1, 2, 32), 2, 2).reshape(-1, 8, 32)
    q = (low | high << 4).to(torch.int8) - 32
    return (step * q.reshape(-1, 16, 16)).flatten(1)


PACKINGS: dict[str, Packing] = {p.name: p for p in (
    Packing("Q8_0", 32, 34, (0,), _q8_0),
    Packing("Q5_1", 32, 24, (0, 2), _q5_1),
    Packing("Q5_0", 32, 22, (0,), _q5_0),
    Packing("Q4_1", 32, 20, (0, 2), _q4_1),
    Packing("Q4_0", 32, 18, (0,), _q4_0),
    Packing("IQ4_NL", 32, 18, (0,), _iq4_nl),
    Packing("Q2_K", 256, 84, (80, 82), _q2_k),
    Packing("Q3_K", 256, 110, (108,), _q3_k),
    Packing("Q4_K", 256, 144, (0, 2), _q4_k),
    Packing("Q5_K", 256, 176, (0, 2), _q5_k),
    Packing("Q6_K", 256, 210, (208,), _q6_k),
)}
