"""Writing a safetensors file tensor by tensor, for models that memory does not hold at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..whole import whole_file
from .header import CheckpointError

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
          torch.bool: "BOOL"}
_ALIGNMENT = 8


def stream_checkpoint(path: str | Path, tensors: Iterable[tuple[str, Tensor]],
                      metadata: Mapping[str, str], room: int) -> int:
    """Write named tensors in the order they come, none kept; the bytes of all of them.

    The header stands before the tensors and is known after them, so `room` bytes are left for it
    and filled up with spaces, as the format allows. The file appears under its name only when it is
    complete, replacing one that is there.

    Raises ValueError for a wrong suffix, a dtype or name that a file cannot hold twice, and too
    little room; CheckpointError when the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".safetensors", ".sft"):
        raise ValueError(f"{path.name}: weights are written as .safetensors files only")
    room = -(-room // _ALIGNMENT) * _ALIGNMENT
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    try:
        with whole_file(path) as temporary, temporary.open("wb") as file:
            file.seek(8 + room)
            for name, tensor in tensors:
                if name in header or tensor.dtype not in _NAMES:
                    raise ValueError(f"{path.name}: {name} ({tensor.dtype}) cannot be written, "
                                     "or was written before")
                data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                file.write(memoryview(data))
                header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape),
                                "data_offsets": [end, end + data.nbytes]}
                end += data.nbytes
            text = json.dumps(header, separators=(",", ":")).encode()
            if len(text) > room:
                raise ValueError(f"{path.name}: the header takes {len(text)} bytes, {room} were "
                                 "left for it")
            file.seek(0)
            file.write(room.to_bytes(8, "little") + text.ljust(room))
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error
    return end
