"""Reading GGUF files: PixArt transformers and T5 encoders, their weights as packed as they are.

The container is llama.cpp's; shapes in it are innermost first. ComfyUI-GGUF's convention for
weights that were reshaped to fit a block format (`comfy.gguf.orig_shape.<name>`) is honoured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..extras import require
from ..quant.blocks import PACKINGS
from ..quant.packed import PackedTensor
from .gguf_t5 import T5_ARCHITECTURES, hugging_face_names, spiece_model
from .header import CheckpointError, describe_bytes
from .identify import identify

SUFFIX = ".gguf"
ARCHITECTURE = "pixart"

_MAGIC = b"GGUF"
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
_PLAIN = ("F32", "F16", "F64", "BF16")
_TEXT_LIMIT = 1 << 20  # characters of one metadata entry that are kept


@dataclass
class GGUFFile:
    """Tensors of a GGUF file under the names other formats have for them.

    `packed` holds the weights of linear layers that are stored in a block format; under their
    names `state_dict` has placeholders without memory. Everything else is plain and mapped to the
    file where it is stored plain. `config` is what the metadata says of a T5's sizes.
    """

    state_dict: dict[str, Tensor]
    packed: dict[str, PackedTensor]
    metadata: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    mapped: bool = False


def read_gguf(path: Path, *, keep_packed: bool) -> GGUFFile:
    """Read a GGUF file; without `keep_packed` every weight is unpacked to float32.

    Raises CheckpointError for damaged and cut files, tensor types that cannot be unpacked and
    architectures other than PixArt and T5; ImportError where the gguf package is missing.
    """
    _check_start(path)
    gguf = require("gguf", f"reading {path.name}", extra="gguf")
    try:
        reader = _reader_class(gguf)(path, "c")
        stored = {tensor.name: tensor for tensor in reader.tensors}
        fields = {name: entry.contents() for name, entry in reader.fields.items()
                  if not name.startswith("tokenizer.")}
    except Exception as error:  # the reader follows offsets of a damaged file anywhere
        raise CheckpointError(f"{path} is not a sound GGUF file, it is cut short or damaged "
                              f"({error}); download it again") from error
    if not stored:
        raise CheckpointError(f"{path} holds no tensors")
    if _number(fields.get("split.count")) > 1:
        raise CheckpointError(f"{path.name} is one of {fields['split.count']} parts of a GGUF "
                              "file; merge them with llama.cpp's gguf-split first")
    size = path.stat().st_size
    for tensor in stored.values():
        if tensor.data_offset + tensor.n_bytes > size:
            raise CheckpointError(f"{path} is cut short: {tensor.name} ends at byte "
                                  f"{tensor.data_offset + tensor.n_bytes:,} and the file at "
                                  f"{size:,}; download it again")
    tensors = {name: _tensor(path, tensor, fields) for name, tensor in stored.items()}
    metadata = {name: str(value) for name, value in fields.items()
                if isinstance(value, str | int | float) and not name.startswith("GGUF.")
                and len(str(value)) <= _TEXT_LIMIT}
    found = GGUFFile({}, {}, metadata)
    architecture = fields.get("general.architecture")
    if architecture in T5_ARCHITECTURES:
        tensors = hugging_face_names(tensors)
        found.config = _t5_config(fields, architecture, tensors)
    found.packed = {k: v for k, v in tensors.items() if isinstance(v, PackedTensor)}
    found.state_dict = {k: v.placeholder() if isinstance(v, PackedTensor) else v
                        for k, v in tensors.items()}
    if architecture not in (ARCHITECTURE, *T5_ARCHITECTURES) \
            and identify(found.state_dict) == "unknown":
        raise CheckpointError(f"{path.name} is a GGUF file of the architecture {architecture!r}; "
                              "PixArt needs a PixArt transformer or a T5 encoder")
    _settle(found, keep_packed)
    if architecture in T5_ARCHITECTURES:
        spiece = spiece_model(reader.fields)
        if spiece is not None:
            found.state_dict["spiece_model"] = torch.frombuffer(bytearray(spiece),
                                                                dtype=torch.uint8)
    return found


def _reader_class(gguf: Any) -> type:
    """The package's reader, which takes a quarter of a million numbers of a T5's metadata one by
    one; here an array of numbers is one piece."""
    base = gguf.GGUFReader

    class Reader(base):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple:
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count = self._get(orig_offs, "uint32"), self._get(orig_offs + 4, "uint64")
            dtype = self.gguf_scalar_to_np.get(gguf.GGUFValueType(kind[0]))
            if dtype is None or not count[0]:
                return super()._get_field_parts(orig_offs, raw_type)
            values = self._get(orig_offs + 12, dtype, count[0])
            if len(values) < count[0]:
                raise ValueError("an array of the metadata goes past the end")
            types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(kind[0])]
            return 12 + values.nbytes, [kind, count, values], [2], types

    knows = ("_get_field_parts", "_get", "gguf_scalar_to_np")  # no part of its public face
    return Reader if all(hasattr(base, name) for name in knows) else base


def _check_start(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(512)
    if not head.startswith(_MAGIC):
        what = describe_bytes(head) if head else "empty"
        if head[8:9] == b"{" and head[4:8] == b"\0" * 4:
            what = "a safetensors file: rename it to .safetensors"
        raise CheckpointError(f"{path} is not a GGUF file: it is {what or 'something else'}")


def _tensor(path: Path, tensor: Any, fields: Mapping[str, Any]) -> Tensor | PackedTensor:
    """One stored tensor: mapped where it is plain, packed where that can be kept, else float32."""
    kind = tensor.tensor_type.name
    shape = tuple(int(side) for side in reversed(tensor.shape.tolist()))
    original = fields.get(_ORIGINAL_SHAPE + tensor.name)
    if original is not None:
        if not isinstance(original, list) or math.prod(original) != math.prod(shape):
            raise CheckpointError(f"{path} is damaged: {tensor.name} of shape {shape} cannot have "
                                  f"been {original!r}")
        shape = tuple(original)
    if kind in _PLAIN:
        plain = torch.from_numpy(tensor.data)
        return (plain.view(torch.bfloat16) if kind == "BF16" else plain).reshape(shape)
    if kind in PACKINGS:
        packed = PackedTensor(torch.from_numpy(tensor.data), kind, torch.Size(shape))
        is_matrix = len(shape) == 2 and tensor.name.endswith(".weight")
        return packed if is_matrix else packed.dense()
    return _unpack_elsewhere(path, tensor).reshape(shape)


def _unpack_elsewhere(path: Path, tensor: Any) -> Tensor:
    """A rarer block format, through the gguf package: float32 in memory."""
    from gguf import quants

    try:
        return torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type))
    except NotImplementedError as error:
        raise CheckpointError(f"{path}: {tensor.name} has the type {tensor.tensor_type.name}, "
                              f"which cannot be unpacked; take a file of one of "
                              f"{', '.join((*_PLAIN, *PACKINGS))}") from error


def _settle(found: GGUFFile, keep_packed: bool) -> None:
    """Unpack what is to be dense, and what belongs to no linear layer."""
    for name in list(found.packed):
        is_table = name in ("shared.weight", "encoder.embed_tokens.weight") \
            or "relative_attention_bias" in name
        if is_table or not keep_packed:
            found.state_dict[name] = found.packed.pop(name).dense()


def _t5_config(fields: Mapping[str, Any], architecture: str,
               tensors: Mapping[str, Any]) -> dict[str, Any]:
    epsilon = fields.get(f"{architecture}.attention.layer_norm_rms_epsilon")
    table = tensors.get("shared.weight")
    if table is None or not isinstance(epsilon, float):
        return {}
    return {"d_model": table.shape[-1], "layer_norm_epsilon": float(f"{epsilon:.6g}")}


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
