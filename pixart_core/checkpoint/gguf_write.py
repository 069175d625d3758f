"""Writing GGUF files in a block format of the caller's choice, PixArt transformers above all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import METADATA_KEY, PixArtConfig
from ..extras import require
from ..quant.blocks import PACKINGS
from ..quant.packed import PackedTensor
from ..whole import whole_file
from .gguf import ARCHITECTURE, SUFFIX
from .header import CheckpointError

# what the gguf package can write, by falling size
QUANTS = ("BF16", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")

_PLAIN = {"F16": torch.float16, "F32": torch.float32}
_SHARED_MODULATION = "t_block.1.weight"


def storage_type(name: str, tensor: Tensor, quant: str) -> str:
    """How a weight of a PixArt transformer (native name) is stored: GGML's name of the type.

    Matrices of the blocks and of the caption projection are quantised. What every token depends on
    or what is small stays as it is: embedders, tables, norms, biases, null caption, final layer. Of
    that, the matrix of the shared modulation is large enough to be stored in 16 bits.
    """
    kept = {torch.float16: "F16", torch.bfloat16: "BF16"}.get(tensor.dtype, "F32")
    if tensor.ndim != 2 or not name.endswith(".weight"):
        return kept
    if name == _SHARED_MODULATION:
        half = "BF16" if quant == "BF16" or tensor.abs().max() > 65504 else "F16"
        return half if kept == "F32" else kept
    if not name.startswith(("blocks.", "y_embedder.y_proj.")):
        return kept
    if quant in PACKINGS and tensor.shape[1] % PACKINGS[quant].size:
        return "F16" if kept == "F32" else kept
    return quant


def write_gguf(path: str | Path, state_dict: Mapping[str, Tensor], config: PixArtConfig,
               quant: str = "Q8_0") -> None:
    """Write a transformer under native names, replacing a file that is there.

    The file appears under its name only when it is complete. `quant` is one of QUANTS; what it is
    used for, see `storage_type`. The config goes along as `pixart_config`.

    Raises ValueError for another quant or suffix, CheckpointError when the file cannot be written,
    ImportError where the gguf package is missing.
    """
    check_target(path, quant)
    kinds = {name: storage_type(name, tensor, quant) for name, tensor in state_dict.items()}
    write_file(path, ARCHITECTURE, state_dict, kinds, quant,
               lambda writer: writer.add_string(METADATA_KEY, config.to_json()))


def check_target(path: str | Path, quant: str) -> None:
    """Raise ValueError for a quant that cannot be written, or a name that is no GGUF file's."""
    if quant not in QUANTS:
        raise ValueError(f"quant is {quant!r}; use one of {', '.join(QUANTS)}")
    if Path(path).suffix.lower() != SUFFIX:
        raise ValueError(f"{Path(path).name}: a GGUF file ends in {SUFFIX}")


def write_file(path: str | Path, architecture: str, tensors: Mapping[str, Tensor | PackedTensor],
               kinds: Mapping[str, str], quant: str, describe: Callable[[Any], None]) -> None:
    """Write tensors as the types in `kinds`, whole or not at all; packed ones are unpacked first.

    `describe` is given the gguf package's writer, to add metadata. Raises CheckpointError when the
    file cannot be written or a weight is too large for float16, ImportError without the package.
    """
    path = Path(path)
    gguf = require("gguf", "writing GGUF files", extra="gguf")
    try:
        with whole_file(path) as temporary:
            writer = gguf.GGUFWriter(temporary, architecture)
            try:
                writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
                writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{quant}"]))
                describe(writer)
                for name, tensor in tensors.items():
                    raw = gguf.GGMLQuantizationType[kinds[name]]
                    size, nbytes = gguf.GGML_QUANT_SIZES[raw]
                    writer.add_tensor_info(name, tuple(tensor.shape), None,
                                           math.prod(tensor.shape) // size * nbytes, raw_dtype=raw)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for name, tensor in tensors.items():  # one at a time: no second copy of the model
                    writer.write_tensor_data(_encoded(gguf, name, tensor, kinds[name]))
            finally:
                writer.close()
    except Exception as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error


def _encoded(gguf: Any, name: str, tensor: Tensor | PackedTensor, kind: str) -> Any:
    """The numpy array whose bytes are stored."""
    if isinstance(tensor, PackedTensor):
        tensor = tensor.dense()
    tensor = tensor.detach().cpu().contiguous()
    if kind == "BF16":
        return tensor.to(torch.bfloat16).view(torch.int16).numpy()
    if kind in PACKINGS:
        return gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[kind])
    stored = tensor.to(_PLAIN[kind])
    if kind == "F16" and not stored.isfinite().all():
        raise ValueError(f"{name} has numbers that are too large for float16; use BF16 or a "
                         "block format")
    return stored.numpy()
