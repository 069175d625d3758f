"""T5 encoders as llama.cpp stores them: its names for the weights, and the tokenizer inside."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any, TypeVar

T5_ARCHITECTURES = ("t5", "t5encoder")
# a whole SentencePiece model, for kinds that llama.cpp's own entries cannot say; no name of theirs
SPIECE_FIELD = "tokenizer.pixart.spiece_model"

T = TypeVar("T")

_TOP = {"token_embd.weight": "shared.weight",
        "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
_BLOCK = {
    "attn_q": "layer.0.SelfAttention.q", "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v", "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm", "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0", "ffn_down": "layer.1.DenseReluDense.wo",
}
_UP = {True: "layer.1.DenseReluDense.wi_1", False: "layer.1.DenseReluDense.wi"}  # gated or not
_HUGGING_FACE_NAME = re.compile(r"encoder\.block\.(\d+)\.(.+)\.weight")
_NAME = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.weight")

# SentencePiece's piece types are llama.cpp's token types
_UNUSED = 5
_EXTRA = re.compile(r"<extra_id_\d+>|\[PAD\d*\]")
_UNIGRAM = 1


def hugging_face_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """llama.cpp's names as Hugging Face's; the decoder of a whole T5 is left out.

    Names that are neither stay as they are, for whoever reads them to refuse.
    """
    gated = any(".ffn_gate." in name for name in tensors)
    out: dict[str, T] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if name.startswith("dec.") or name == "output.weight":
            continue
        if match is None:
            out[_TOP.get(name, name)] = tensor
            continue
        inner = _UP[gated] if match[2] == "ffn_up" else _BLOCK.get(match[2])
        out[f"encoder.block.{match[1]}.{inner}.weight" if inner else name] = tensor
    return out


def llama_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """Hugging Face's names of a T5 encoder as llama.cpp's, the other way round.

    Raises KeyError for names that a T5 encoder does not have.
    """
    top = {theirs: name for name, theirs in _TOP.items()}
    inner = {theirs: name for name, theirs in _BLOCK.items()} | dict.fromkeys(_UP.values(),
                                                                             "ffn_up")
    out: dict[str, T] = {}
    for name, tensor in tensors.items():
        match = _HUGGING_FACE_NAME.fullmatch(name)
        out[f"enc.blk.{match[1]}.{inner[match[2]]}.weight" if match else top[name]] = tensor
    return out


def spiece_model(fields: Mapping[str, Any]) -> bytes | None:
    """The SentencePiece model of the metadata, as the bytes of a spiece.model; None without one.

    The 100 sentinels and the padding that converters put behind the model's own pieces are left
    out. A file without the table of character normalisation splits text as SentencePiece does
    without it.
    """
    def read(name: str, default: Any = None) -> Any:
        entry = fields.get(f"tokenizer.ggml.{name}")
        return default if entry is None else entry.contents()

    pieces, scores, kinds = read("tokens"), read("scores"), read("token_type")
    if SPIECE_FIELD in fields:
        return bytes(fields[SPIECE_FIELD].contents())
    if read("model") != "t5" or not pieces or len(pieces) != len(scores or ()) \
            or len(pieces) != len(kinds or ()):
        return None
    count = len(pieces)
    while count and (_EXTRA.fullmatch(pieces[count - 1]) or kinds[count - 1] == _UNUSED):
        count -= 1
    model = b"".join(
        _message(1, _text(1, piece) + _float(2, score) + _number(3, kind))
        for piece, score, kind in zip(pieces[:count], scores, kinds, strict=False))
    ids = ((40, "unknown_token_id", 2), (42, "eos_token_id", 1), (43, "padding_token_id", 0))
    trainer = _number(3, _UNIGRAM) + _number(4, count) + _number(41, -1) + b"".join(
        _number(number, read(name, default)) for number, name, default in ids)
    charsmap = bytes(bytearray(v & 255 for v in read("precompiled_charsmap", ())))
    normaliser = (_message(2, charsmap) if charsmap else b"") \
        + _number(3, int(read("add_space_prefix", True))) \
        + _number(4, int(read("remove_extra_whitespaces", True))) + _number(5, 1)
    return model + _message(2, trainer) + _message(3, normaliser)


# protobuf's wire format, as far as sentencepiece_model.proto needs it

def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(tag: int, value: int) -> bytes:
    return _varint(tag << 3) + _varint(value)


def _float(tag: int, value: float) -> bytes:
    return _varint(tag << 3 | 5) + struct.pack("<f", value)


def _message(tag: int, content: bytes) -> bytes:
    return _varint(tag << 3 | 2) + _varint(len(content)) + content


def _text(tag: int, value: str) -> bytes:
    return _message(tag, value.encode("utf-8"))
