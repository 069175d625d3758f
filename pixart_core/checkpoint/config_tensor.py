"""The config of a model as a tensor among its weights, where a header cannot hold it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import METADATA_KEY
from .header import CheckpointError


def config_tensor(config_json: str) -> Tensor:
    """The text of a config as a tensor (bytes,) uint8, for savers that leave out the header."""
    return torch.tensor(list(config_json.encode()), dtype=torch.uint8)


def with_config_tensor(state_dict: dict[str, Tensor], metadata: Mapping[str, str], source: str
                       ) -> dict[str, str]:
    """`metadata` with the config that stands among the tensors, which is taken out of them.

    ComfyUI's own save nodes write no header entry of ours, so models saved by them hold a
    `config_tensor`. A header that says something itself goes first. Raises CheckpointError when
    the tensor is no text.
    """
    tensor = state_dict.pop(METADATA_KEY, None)
    if tensor is None or METADATA_KEY in metadata:
        return dict(metadata)
    try:
        if tensor.dtype is not torch.uint8:
            raise ValueError(f"it is {tensor.dtype}")
        text = bytes(tensor.flatten().tolist()).decode()
    except ValueError as error:
        raise CheckpointError(f"{source}: the tensor {METADATA_KEY!r} is not text in bytes "
                              f"({error}); the file is damaged") from error
    return {**metadata, METADATA_KEY: text}
