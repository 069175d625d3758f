"""What a SentencePiece model holds, without the sentencepiece package, which does not tell."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .header import CheckpointError

_UNIGRAM = 1
_NORMAL = 1
_MODEL_TYPE, _UNKNOWN_ID, _END_ID, _PADDING_ID = 3, 40, 42, 43  # fields of the trainer


@dataclass(frozen=True)
class SentencePieces:
    """Pieces of a model with their scores and types, its special ids and its normalisation.

    `like_t5` says that it is a unigram model with escaped spaces, the only kind GGUF has words for.
    """

    tokens: list[str]
    scores: list[float]
    types: list[int]
    unknown_id: int
    end_id: int
    padding_id: int
    charsmap: bytes
    add_space_prefix: bool
    remove_extra_whitespaces: bool
    like_t5: bool


def read_spiece(model: bytes, source: str, rows: int) -> SentencePieces:
    """The parts of a spiece.model for an embedding table of so many rows.

    Raises CheckpointError, naming `source`, for damaged files, missing special tokens, and more
    pieces than rows.
    """
    try:
        fields = list(_fields(model))
        pieces = [dict(_fields(value)) for number, value in fields if number == 1]
        trainer, normaliser = (dict(_fields(next((v for n, v in fields if n == number), b"")))
                               for number in (2, 3))
        tokens = [piece[1].decode("utf-8") for piece in pieces]
        scores = [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces]
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, struct.error) as error:
        raise CheckpointError(f"{source} is not a SentencePiece model ({len(model)} bytes)"
                              ) from error
    ids = [_signed(trainer.get(number, default)) for number, default in
           ((_UNKNOWN_ID, 0), (_END_ID, 2), (_PADDING_ID, -1))]
    if not tokens or min(ids) < 0 or max(ids) >= len(tokens):
        raise CheckpointError(f"{source} has no unknown, end or padding token, so it is not T5's")
    if len(tokens) > rows:
        raise CheckpointError(f"{source} has {len(tokens)} tokens and the T5 encoder {rows}; they "
                              "do not belong together")
    return SentencePieces(tokens, scores, [piece.get(3, _NORMAL) for piece in pieces], *ids,
                          normaliser.get(2, b""), bool(normaliser.get(3, 1)),
                          bool(normaliser.get(4, 1)),
                          trainer.get(_MODEL_TYPE, _UNIGRAM) == _UNIGRAM and
                          normaliser.get(5, 1) == 1)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of every field of a protobuf message; ValueError where it is cut short."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _varint(message, at)
        if size is None or at + size > len(message):
            raise ValueError("a field goes past the end")
        yield tag >> 3, message[at: at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
