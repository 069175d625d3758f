"""The one door from transformer files to modules."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint.config_tensor import with_config_tensor
from .checkpoint.convert import convert_state_dict
from .checkpoint.detect import detect_config
from .checkpoint.gguf_native import native_packed
from .checkpoint.identify import require_kind
from .checkpoint.mapped import release_pages
from .checkpoint.read import Checkpoint, CheckpointError, read_checkpoint, unwrap_state_dict
from .config import PixArtConfig
from .model.attention import AttentionFunction
from .model.transformer import PixArtTransformer
from .quant import StoredWeight, pack_linears, packed_operations, unpacked

logger = logging.getLogger(__name__)

Source = str | Path | Mapping[str, Tensor]

_NULL_CAPTION = "y_embedder.y_embedding"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class OpenedTransformer(NamedTuple):
    """Native tensors, the config they belong to, whether they are mapped to a file, its name.

    `packed` are the quantised weights; `state_dict` has placeholders on the meta device in their
    place.
    """

    state_dict: dict[str, Tensor]
    config: PixArtConfig
    mapped: bool
    source: str
    packed: Mapping[str, StoredWeight] = MappingProxyType({})


def open_transformer(path_or_state_dict: Source, *, check_finite: bool = True,
                     **fields: Any) -> tuple[dict[str, Tensor], PixArtConfig]:
    """Tensors under native names, and the config they belong to.

    Takes a file, a diffusers folder or a state dict, in native, diffusers or prefixed names. The
    result has no `pos_embed` (the network computes it) and keeps `y_embedder.y_embedding` where
    there is one. Tensors stay mapped to the file. `fields` as in `detect_config`.

    Raises CheckpointError for unreadable files, other kinds of models, and weights that are
    missing, left over, of the wrong shape, or not finite (skipped with `check_finite=False`, and
    for 8-bit weights); ValueError where the config cannot be known. Quantised weights become
    float32 here.
    """
    opened = read_transformer(path_or_state_dict, fields)
    opened.state_dict.update(unpacked(opened.packed, opened.state_dict))
    if check_finite:
        for name, tensor in opened.state_dict.items():
            require_finite(name, tensor, opened.source)
    return opened.state_dict, opened.config


def load_transformer(path_or_state_dict: Source, dtype: torch.dtype | None = None,
                     device: torch.device | str | None = None, operations: Any = None,
                     attention: AttentionFunction | None = None,
                     **fields: Any) -> PixArtTransformer:
    """A PixArt transformer in eval mode, from anything `open_transformer` takes; raises the same.

    `dtype` None keeps the file's own (bfloat16 for 8-bit float files and for quantised ones).
    There is never a second copy of the weights: the module is built without memory and takes the
    tensors over, converted one by one where dtype or device differ. Quantised weights stay as they
    are stored and are used layer by layer in the forward pass.
    """
    opened = read_transformer(path_or_state_dict, fields)
    if dtype is None:
        dtype = torch.bfloat16 if opened.packed else main_dtype(opened.state_dict)
    if opened.packed:
        operations = packed_operations(operations)
    model = _build(opened.config, opened.state_dict, dtype, operations, attention)
    assign_weights(model, opened, device)
    return model.eval()


def main_dtype(state_dict: Mapping[str, Tensor]) -> torch.dtype:
    """The floating dtype most matrices are stored in; bfloat16 in place of an 8-bit one.

    Raises ValueError when no matrix is floating.
    """
    counts = Counter(t.dtype for t in state_dict.values()
                     if t.ndim > 1 and t.dtype.is_floating_point)
    if not counts:
        raise ValueError("none of the weight matrices is floating; pass dtype=...")
    dtype = counts.most_common(1)[0][0]
    if dtype in _FLOATS:
        return dtype
    logger.info("weights are stored as %s and computed in bfloat16; pass dtype=... for another",
                dtype)
    return torch.bfloat16


def check_weights(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor],
                  source: str) -> None:
    """Raise CheckpointError unless names and shapes are exactly those of `expected`."""
    for problem, names in (("lacks", [k for k in expected if k not in state_dict]),
                           ("has unexpected", [k for k in state_dict if k not in expected])):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise CheckpointError(f"{source} {problem} weights: {', '.join(names[:5])}{more}")
    wrong = [k for k in expected if expected[k].shape != state_dict[k].shape]
    if wrong:
        name = wrong[0]
        raise CheckpointError(f"{source}: {name} has shape {tuple(state_dict[name].shape)}, "
                              f"{tuple(expected[name].shape)} was expected ({len(wrong)} such "
                              "tensors)")


def require_finite(name: str, tensor: Tensor, source: str) -> None:
    """Raise CheckpointError when a weight holds NaN or infinity; 8-bit ones are not looked at."""
    if tensor.dtype not in _FLOATS or tensor.numel() == 0 or tensor.is_meta:
        return
    # the extremes carry NaN and infinity along, without a mask the size of the tensor
    if not torch.stack(tensor.aminmax()).isfinite().all():
        raise CheckpointError(f"{source}: {name} holds NaN or infinite values; the file is "
                              "damaged, or the training that wrote it diverged")


def require_finite_packed(name: str, packed: StoredWeight, source: str) -> None:
    """As `require_finite`, for a packed weight: its scales are looked at."""
    if not packed.is_finite():
        raise CheckpointError(f"{source}: {name} ({packed.packing}) has scales that are NaN or "
                              "infinite; the file is damaged")


def assign_weights(model: torch.nn.Module, opened: OpenedTransformer,
                   device: torch.device | str | None, *, copy: bool = False,
                   dtypes: Mapping[str, torch.dtype] | None = None) -> None:
    """Give `model`, whose own weights hold no memory yet, those of `opened`, which empties it.

    Each tensor is checked, brought to the device and to the dtype of the parameter it becomes
    (some are float32 in any model) and let go before the next one. Mapped tensors that had to be
    converted, or all of them with `copy`, also leave memory, see `release_pages`; the others
    stay mapped to their file. `dtypes` is for models whose layers are empty until they are loaded.
    Packed weights go to the layers of `packed_operations` as they are.
    """
    dtypes = dtypes or {name: tensor.dtype for name, tensor in model.state_dict().items()}
    weights: dict[str, Tensor] = {}
    for name, dtype in dtypes.items():
        tensor = opened.state_dict.pop(name)
        if name in opened.packed:
            packed = opened.packed[name]
            require_finite_packed(name, packed, opened.source)
            weights |= pack_linears(model, {name: packed.to(device, copy=copy)})
            continue
        require_finite(name, tensor, opened.source)
        weights[name] = tensor.to(device=device, dtype=dtype, copy=copy)
        if opened.mapped and weights[name] is not tensor:
            release_pages([tensor])
    model.load_state_dict(weights, strict=True, assign=True)


def read_transformer(path_or_state_dict: Source, fields: Mapping[str, Any]) -> OpenedTransformer:
    """What `open_transformer` takes, opened but not read: no weight has been looked at."""
    source = "the state dict"
    if isinstance(path_or_state_dict, Mapping):
        tensors = unwrap_state_dict(path_or_state_dict, source)
        checkpoint = Checkpoint(Path(), tensors, with_config_tensor(tensors, {}, source))
    else:
        source = Path(path_or_state_dict).name
        checkpoint = read_checkpoint(path_or_state_dict, keep_packed=True)
    require_kind(checkpoint.state_dict, ("pixart", "pixart-diffusers"), source)
    try:
        config = detect_config(checkpoint.state_dict, checkpoint.metadata,
                               config=checkpoint.config,
                               pipeline_class=checkpoint.pipeline_class, **fields)
        if checkpoint.packed:
            state_dict, packed = native_packed(checkpoint.state_dict, checkpoint.packed)
        else:
            state_dict, packed = convert_state_dict(checkpoint.state_dict, to="native"), {}
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    state_dict.pop("pos_embed", None)
    check_weights(state_dict, _build(config, state_dict).state_dict(), source)
    if checkpoint.mapped:
        kept = {tensor.data_ptr() for tensor in state_dict.values()}
        release_pages(t for t in checkpoint.state_dict.values() if t.data_ptr() not in kept)
    return OpenedTransformer(state_dict, config, checkpoint.mapped, source, packed)


def _build(config: PixArtConfig, state_dict: Mapping[str, Tensor],
           dtype: torch.dtype | None = None, operations: Any = None,
           attention: AttentionFunction | None = None) -> PixArtTransformer:
    return PixArtTransformer(config, dtype=dtype, device="meta", operations=operations,
                             attention=attention, null_caption=_NULL_CAPTION in state_dict)

