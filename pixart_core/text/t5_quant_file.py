"""A quantised T5 in a file: written once, read by this program and, in 8 bits, by ComfyUI itself.

Quantised layers have `comfy_quant` beside them, everything else has 16 bits, and the tokenizer is
inside where the source brings a SentencePiece model.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.mapped import release_pages
from ..checkpoint.write_stream import stream_checkpoint
from ..quant.formats import file_tensors
from ..quant.policy import METHODS, T5_METHODS
from .t5_file import SPIECE_KEY, OpenedT5, open_t5
from .t5_quant import check_precision, quantized, sixteen_bit_dtype

_HEADER_ENTRY = 200  # bytes for a tensor's entry beside its name, more than any takes
_TENSORS_PER_LAYER = 4


def write_quantized_t5(path: str | Path, out: str | Path, method: str,
                       spiece_model: bytes | None = None,
                       done: Callable[[str], None] | None = None) -> Counter[str]:
    """Write the T5 encoder of `path` to `out` with its matrices at `method`; how many are what.

    `method` is "int8", "fp8" or "int4". `spiece_model` goes inside in place of the source's own
    tokenizer. `done` is told each tensor's name. Memory holds one matrix at a time.

    Raises ValueError for another method or suffix, else as `check_precision`, and CheckpointError
    for weights that are not finite and a file that cannot be written.
    """
    if method not in T5_METHODS:
        raise ValueError(f"T5 is quantised as {', '.join(T5_METHODS)}; {method!r} was asked for")
    opened = open_t5(path)
    check_precision(opened, method)
    if spiece_model is not None:
        opened = dataclasses.replace(opened, spiece_model=spiece_model)
    kinds: Counter[str] = Counter()
    room = sum((len(name) + _HEADER_ENTRY) * _TENSORS_PER_LAYER for name in opened.weights)
    stream_checkpoint(out, _tensors(opened, method, kinds, done), {"format": "pt"}, room)
    return kinds


def _tensors(opened: OpenedT5, method: str, kinds: Counter[str],
             done: Callable[[str], None] | None) -> Iterator[tuple[str, Tensor]]:
    dtype = sixteen_bit_dtype(opened)
    taken = set()
    for name, weight in quantized(opened, METHODS[method]):
        taken.add(name)
        kinds[weight.packing] += 1
        yield from file_tensors({name: weight}).items()
        if done is not None:
            done(name)
    for name, tensor in opened.weights.items():
        if name not in taken:
            kinds[str(dtype).removeprefix("torch.")] += 1
            yield name, opened.plain(name, dtype)
            if opened.mapped:
                release_pages([tensor])
            if done is not None:
                done(name)
    if opened.spiece_model is not None:
        yield SPIECE_KEY, torch.frombuffer(bytearray(opened.spiece_model), dtype=torch.uint8)
