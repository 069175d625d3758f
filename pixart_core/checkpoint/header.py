"""What the first bytes of a file say: a sound safetensors header, or something else altogether."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}


class CheckpointError(ValueError):
    """A weight file cannot be used: missing, damaged, unsafe or of another format."""


def describe_bytes(head: bytes) -> str | None:
    """What a file that begins with `head` is, when that is plainly not safetensors."""
    if head[8:9] == b"{" and head[4:8] == b"\0" * 4:
        return None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return ("a git-LFS pointer of a few lines, not the weights; run `git lfs pull` or download "
                "the file itself")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, probably an error or log-in page saved by the download; get it again"
    if head.startswith(b"GGUF"):
        return "a GGUF file: rename it to .gguf"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive, probably a PyTorch file: rename it to .pth"
    if head.startswith(b"\x80") and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle: rename it to .pth"
    if head.startswith(b"\x1f\x8b"):
        return "gzip-compressed; unpack it first"
    return "a text file, not weights" if text[:1] in (b"{", b"[") else None


def check_header(path: Path) -> None:
    """Raise CheckpointError, in plain words, unless the header agrees with itself and the file.

    The safetensors parser checks most of this as well; here each fault gets a message a user can
    act on, and nothing the header claims is allocated before it is known to be true.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path} is cut short: {size} bytes; download it again")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES or length < 2:
            raise CheckpointError(f"{path} is not a safetensors file: its header claims "
                                  f"{length} bytes")
        raw = file.read(length)
    if len(raw) < length:
        raise CheckpointError(f"{path} is cut short: its header needs {length} bytes and the file "
                              f"has {size}; download it again")
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is damaged: its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    ):
        raise CheckpointError(f"{path} is damaged: its metadata is not a table of strings")
    end = 0
    for name, start, stop in sorted(
        ((name, *_span(path, name, entry)) for name, entry in header.items()), key=lambda s: s[1:]
    ):
        if start != end:
            raise CheckpointError(f"{path} is damaged: tensor {name!r} begins at byte {start} "
                                  f"where {end} was expected")
        end = stop
    have = size - 8 - length
    if end > have:
        raise CheckpointError(f"{path} is cut short: the tensors take {end:,} bytes and "
                              f"{have:,} are there; download it again")
    if end < have:
        raise CheckpointError(f"{path} is damaged: {have - end:,} bytes follow the last tensor")


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """First and last byte of a tensor, once its entry is known to be consistent."""
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path} is damaged: the entry of {name!r} is not a JSON object")
    dtype, shape, span = (entry.get(k) for k in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{path}: tensor {name!r} has the unknown dtype {dtype!r}")
    if not _whole(shape) or not _whole(span) or len(span) != 2:
        raise CheckpointError(f"{path} is damaged: tensor {name!r} has shape {shape!r} and offsets "
                              f"{span!r}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if max(shape, default=0) >= 2**63 or (span[1] - span[0]) * 8 != bits:
        raise CheckpointError(f"{path} is damaged: tensor {name!r}, {dtype} {shape}, does not take "
                              f"the {span[1] - span[0]} bytes that its offsets give it")
    return span[0], span[1]


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
