"""The door from ControlNet files to modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint.controlnet import ControlNetParts, detect_controlnet, split_controlnet
from .checkpoint.identify import require_kind
from .checkpoint.mapped import release_pages
from .checkpoint.read import Checkpoint, CheckpointError, read_checkpoint, unwrap_state_dict
from .config import ControlNetConfig, PixArtConfig
from .load import Source, assign_weights, check_weights, main_dtype
from .model.controlnet import PixArtControlNet
from .quant import StoredWeight, packed_operations, unpacked

CONTROLNET_KINDS = ("controlnet", "controlnet-diffusers")


class OpenedControlNet(NamedTuple):
    """Native control tensors, their config, whether they are mapped to a file, its name.

    `base` holds the tensors of the base model that came in the same file, {} where there was none.
    `packed` are the quantised weights; `state_dict` has placeholders on the meta device in their
    place.
    """

    state_dict: dict[str, Tensor]
    config: ControlNetConfig
    mapped: bool
    source: str
    base: dict[str, Tensor]
    packed: Mapping[str, StoredWeight] = MappingProxyType({})


def load_controlnet(path_or_state_dict: Source, dtype: torch.dtype | None = None,
                    device: torch.device | str | None = None, operations: Any = None,
                    base: PixArtConfig | None = None, **fields: Any) -> PixArtControlNet:
    """A ControlNet-Transformer in eval mode, of any depth and width, for alpha or Sigma.

    Reads the original `.pth` (its `base_model.*` is left out), diffusers' and SimpleTuner's layout,
    files and folders, and what `pixart convert` and `pixart quantize` write. `dtype` None keeps
    the file's own (bfloat16 for quantised ones, whose weights stay as they are stored).
    `fields` are ControlNetConfig fields that the file does not tell, such as `num_heads=2` for a
    width other than 1152; `base` is the transformer it is for, whose head count counts where
    nothing else tells one.

    Raises CheckpointError for unreadable files, other kinds of models, and weights that are
    missing, left over, of the wrong shape or not finite.
    """
    opened = read_controlnet(path_or_state_dict, fields, like=base)
    if dtype is None:
        dtype = torch.bfloat16 if opened.packed else main_dtype(opened.state_dict)
    if opened.packed:
        operations = packed_operations(operations)
    net = PixArtControlNet(opened.config, dtype=dtype, device="meta", operations=operations)
    assign_weights(net, opened, device)
    return net.eval()


def read_controlnet(path_or_state_dict: Source, fields: Mapping[str, Any],
                    keep_base: bool = False, like: PixArtConfig | None = None,
                    ) -> OpenedControlNet:
    """What `load_controlnet` takes, opened but not read: no weight has been looked at.

    Tensors of a base model in the same file leave memory unless `keep_base`. `like` is the config
    of the transformer it is for.
    """
    if isinstance(path_or_state_dict, Mapping):
        source = "the state dict"
        checkpoint = Checkpoint(Path(), unwrap_state_dict(path_or_state_dict, source))
    else:
        path = Path(path_or_state_dict)
        source = path.name
        inner = "controlnet" if (path / "controlnet").is_dir() else None
        checkpoint = read_checkpoint(path, subfolder=inner, keep_packed=True)
    require_kind(checkpoint.state_dict, CONTROLNET_KINDS, source)
    try:
        parts, packed = _split_packed(checkpoint)
        config = detect_controlnet(parts, checkpoint.metadata, checkpoint.config, like, **fields)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    expected = PixArtControlNet(config, device="meta").state_dict()
    check_weights(parts.control, expected, source)
    if checkpoint.mapped:
        kept = {t.data_ptr() for t in (*parts.control.values(), *parts.base.values())}
        release_pages(t for t in checkpoint.state_dict.values() if t.data_ptr() not in kept)
    return OpenedControlNet(parts.control, config, checkpoint.mapped, source,
                            parts.base if keep_base else {}, packed)


def _split_packed(checkpoint: Checkpoint) -> tuple[ControlNetParts, dict[str, StoredWeight]]:
    """The parts of a ControlNet file, and its quantised control weights by native name.

    Those of a base model in the same file and of diffusers' layout become dense.
    """
    tensors, packed = checkpoint.state_dict, checkpoint.packed
    parts = split_controlnet(tensors)
    if not packed:
        return parts, {}
    native = {id(tensor): name for name, tensor in parts.control.items()} \
        if parts.layout == "native" else {}
    kept = {name: native[id(tensors[name])] for name in packed if id(tensors[name]) in native}
    dense = {name: weight for name, weight in packed.items() if name not in kept}
    if dense:
        parts = split_controlnet(tensors | unpacked(dense, tensors))
    return parts, {native_name: packed[name] for name, native_name in kept.items()}
