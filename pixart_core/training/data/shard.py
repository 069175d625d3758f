"""One file of a cache: rows of one bucket, each checked when it is read.

    latents (N, 4, h, w), control (N, 4, h, w)   row by row
    caption (T, D)                               the states of every caption, one after the other
    caption_offsets (M + 1,)                     where each of the M captions begins
    variants (V,), variant_offsets (N + 1,)      the captions of each row
    text, text_offsets (M + 1,)                  the captions themselves, UTF-8
    sources                                      what each row was made of, JSON
    row_sums (N,), caption_sums (M,)             CRC-32 of what is read of a row, of a caption

The index knows the SHA-256 of the offsets, variants and sums, so a row is followed by checks from
the index down to its bytes, and only bytes that are used are read. Files are read, not mapped:
a mapped file counts as memory of the process, and one that is cut short would end it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ...checkpoint.header import CheckpointError, check_header
from ...checkpoint.write import write_checkpoint
from .index import ShardEntry

_TABLES = ("caption_offsets", "row_sums", "caption_sums", "text_offsets", "variant_offsets",
           "variants")
_FORMAT = {"pixart_cache": "1"}
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64,
           "U8": torch.uint8}
REBUILD = ("run `pixart train cache` again with the same images and options: it makes this shard "
           "again")


@dataclass(frozen=True)
class EncodedCaption:
    """A caption and its T5 states (L, D), without padding."""

    text: str
    states: Tensor


class Source(NamedTuple):
    """What a row was made of; by it a later run knows the row again. `sum` is a CRC-32."""

    path: str
    size: int
    mtime_ns: int
    sum: int
    captions: tuple[str, ...]
    control: tuple[str, int, int, int] | None  # path, size, mtime_ns, sum


@dataclass(frozen=True)
class ShardRow:
    """An encoded picture: latents and control (4, h, w), and which captions are its own."""

    source: Source
    latents: Tensor
    control: Tensor | None
    captions: tuple[int, ...]


def write_shard(path: Path, rows: Sequence[ShardRow], captions: Sequence[EncodedCaption],
                height: int, width: int) -> ShardEntry:
    """Write rows of one bucket, height x width px; their captions are numbers into `captions`."""
    texts = [caption.text.encode("utf-8", "surrogatepass") for caption in captions]
    tensors = {
        "latents": torch.stack([row.latents for row in rows]),
        "caption": torch.cat([caption.states for caption in captions]),
        "caption_offsets": _offsets(len(caption.states) for caption in captions),
        "text": _as_bytes(b"".join(texts)),
        "text_offsets": _offsets(map(len, texts)),
        "variants": torch.tensor([number for row in rows for number in row.captions]),
        "variant_offsets": _offsets(len(row.captions) for row in rows),
        "row_sums": torch.tensor([_row_sum(_raw(row.latents), None if row.control is None
                                           else _raw(row.control)) for row in rows]),
        "caption_sums": torch.tensor([zlib.crc32(text, zlib.crc32(_raw(caption.states)))
                                      for caption, text in zip(captions, texts, strict=True)]),
    }
    if rows[0].control is not None:
        tensors["control"] = torch.stack([row.control for row in rows])
    sources = json.dumps([row.source for row in rows]).encode()
    tensors["sources"] = _as_bytes(sources)
    write_checkpoint(path, tensors, _FORMAT)
    return ShardEntry(path.name, len(rows), height, width, path.stat().st_size,
                      _digest([_raw(tensors[name]) for name in _TABLES]), _digest([sources]))


class _Span(NamedTuple):
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class ShardReader:
    """Reads rows of a shard. Raises CheckpointError for every way in which a file can be bad.

    `verify` False leaves out the sums of rows and captions.
    """

    def __init__(self, folder: Path, entry: ShardEntry, verify: bool = True) -> None:
        self.path = folder / entry.file
        self.entry = entry
        self.verify = verify
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        try:
            check_header(self.path)
            self._file = self.path.open("rb", buffering=0)
            self._spans = _spans(self._file)
            tables = {name: self._whole(name) for name in _TABLES}
            if _digest([tables[name] for name in _TABLES]) != entry.digest:
                raise ValueError("its tables are not those that the index names")
            self._tables = {name: memoryview(raw).cast("q") for name, raw in tables.items()}
        except CheckpointError as error:
            self.close()
            raise self._bad(str(error).partition("; download")[0]) from error
        except FileNotFoundError as error:
            raise self._bad("the file is missing") from error
        except (OSError, ValueError, KeyError) as error:
            self.close()
            raise self._bad(str(error)) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def has_control(self) -> bool:
        return "control" in self._spans

    def latents(self, row: int) -> tuple[Tensor, Tensor | None]:
        """Latents (4, h, w) and control latents of a row, as they are stored."""
        names = ["latents", "control"] if self.has_control else ["latents"]
        raw = [self._rows(name, row, row + 1) for name in names]
        self._check(_row_sum(*raw), "row_sums", row, f"row {row}")
        tensors = [self._tensor(name, part)[0] for name, part in zip(names, raw, strict=True)]
        return tensors[0], tensors[1] if len(tensors) > 1 else None

    def variants(self, row: int) -> list[int]:
        """The numbers of a row's captions."""
        start, stop = self._tables["variant_offsets"][row: row + 2]
        return self._tables["variants"][start:stop].tolist()

    def caption(self, number: int) -> EncodedCaption:
        """A caption of this shard by its number."""
        raw = self._rows("caption", *self._tables["caption_offsets"][number: number + 2])
        text = self._rows("text", *self._tables["text_offsets"][number: number + 2])
        self._check(zlib.crc32(text, zlib.crc32(raw)), "caption_sums", number,
                    f"caption {number}")
        return EncodedCaption(bytes(text).decode("utf-8", "surrogatepass"),
                              self._tensor("caption", raw))

    def sources(self) -> list[Source]:
        """What every row was made of."""
        raw = self._whole("sources")
        if _digest([raw]) != self.entry.sources_digest:
            raise self._bad("its list of images is not the one that the index names")
        return [Source(path, size, mtime, total, tuple(captions),
                       None if control is None else tuple(control))
                for path, size, mtime, total, captions, control in json.loads(raw)]

    def check(self) -> None:
        """Read and check everything."""
        for row in range(self.entry.rows):
            self.latents(row)
        for number in range(len(self._tables["caption_sums"])):
            self.caption(number)
        self.sources()

    def _check(self, total: int, table: str, number: int, what: str) -> None:
        if self.verify and total != self._tables[table][number]:
            raise self._bad(f"{what} has another checksum than when it was written")

    def _whole(self, name: str) -> bytearray:
        return self._rows(name, 0, self._spans[name].shape[0])

    def _rows(self, name: str, start: int, stop: int) -> bytearray:
        span = self._spans[name]
        raw = bytearray((stop - start) * span.row_bytes)
        view, done = memoryview(raw), 0
        try:
            while done < len(raw):
                count = self._read_at(view[done:], span.start + start * span.row_bytes + done)
                if not count:
                    raise self._bad("it is cut short")
                done += count
        except OSError as error:
            raise self._bad(str(error)) from error
        return raw

    def _read_at(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):  # processes that were forked share the position of a file
            return os.preadv(self._file.fileno(), [view], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(view)

    def _tensor(self, name: str, raw: bytearray) -> Tensor:
        span = self._spans[name]
        return torch.frombuffer(raw, dtype=span.dtype).view(-1, *span.shape[1:])

    def _bad(self, reason: str) -> CheckpointError:
        return CheckpointError(f"shard {self.path} cannot be used: {reason}; {REBUILD}")


def _spans(file: BinaryIO) -> dict[str, _Span]:
    """Where each tensor of a safetensors file lies; its header is known to be sound."""
    (length,) = struct.unpack("<Q", file.read(8))
    header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: _Span(8 + length + entry["data_offsets"][0], _DTYPES[entry["dtype"]],
                        tuple(entry["shape"])) for name, entry in header.items()}


def _row_sum(latents: bytes, control: bytes | None = None) -> int:
    total = zlib.crc32(latents)
    return total if control is None else zlib.crc32(control, total)


def _offsets(lengths: Any) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _as_bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(
        0, dtype=torch.uint8)


def _digest(parts: Sequence[Any]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def states_digest(states: Tensor) -> str:
    """SHA-256 of the bytes of caption states."""
    return _digest([_raw(states)])
