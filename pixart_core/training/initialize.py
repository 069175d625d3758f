"""Transformers to train: from a file, from scratch, or with KV compression switched on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import PRESETS, KVCompression, PixArtConfig
from ..load import load_transformer
from ..model import PixArtTransformer

_STD = 0.02  # of the embedders and the shared adaLN layer, arXiv 2310.00426's code


def transformer_to_train(source: str | Path | Mapping[str, Any],
                         kv_compression: Mapping[str, Any] | None = None,
                         seed: int = 0) -> PixArtTransformer:
    """A float32 transformer: the weights of a file, or random ones for the fields of a config.

    `source` is a checkpoint, or config fields (`hidden_size: 192`), beside which `preset:
    sigma-512` names a released model to take the others from. `kv_compression` (sampling, factor,
    layers) switches compression on in a model that has none, see `compress`. Raises what
    `load_transformer` raises, and ValueError for fields that do not fit.
    """
    if isinstance(source, Mapping):
        fields = dict(source)
        preset = fields.pop("preset", "sigma-1024")
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}; use one of {', '.join(PRESETS)}")
        try:
            config = PRESETS[preset].replace(**fields)
        except TypeError as error:  # text where a number belongs, or the like
            raise ValueError(f"model {dict(source)} is no config: {error}") from error
        model = from_scratch(config, seed)
    else:
        model = load_transformer(source, dtype=torch.float32)
        # mapped to its file until here
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    if kv_compression is not None:
        try:
            compression = KVCompression(**kv_compression)
        except TypeError as error:
            raise ValueError(f"kv_compression is {dict(kv_compression)}; sampling (conv, ave or "
                             f"uniform), factor and layers were expected: {error}") from error
        model = compress(model, compression)
    return model.train().requires_grad_(True)


def from_scratch(config: PixArtConfig, seed: int = 0) -> PixArtTransformer:
    """Random weights as PixArt starts from (the released `initialize_weights`).

    Linear layers are Xavier-uniform, embedders normal with deviation 0.02, and what closes a
    cross-attention or the model is zero, so that an untrained block ignores the caption.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PixArtTransformer(config, dtype=torch.float32)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(model.x_embedder.proj.weight.view(config.hidden_size, -1))
        embedders = [model.t_embedder, model.t_block, model.y_embedder.y_proj]
        for embedder in filter(None, [*embedders, model.csize_embedder, model.ar_embedder]):
            for module in embedder.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=_STD)
        closing = [block.cross_attn.proj for block in model.blocks] + [model.final_layer.linear]
        for layer in closing:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for block in model.blocks:
            _average(block.attn)
    return model


def compress(model: PixArtTransformer, compression: KVCompression) -> PixArtTransformer:
    """The model with KV compression in some blocks (arXiv 2403.04692, section 3.3).

    The new convolutions average ("conv avg init": weights 1 / factor^2, bias 0), all other
    weights stay. Raises ValueError for a model that compresses already.
    """
    if model.config.kv_compression is not None:
        raise ValueError("the model has KV compression already; leave kv_compression out")
    out = PixArtTransformer(model.config.replace(kv_compression=compression),
                            dtype=torch.float32, null_caption=model.null_caption is not None)
    for index in compression.layers:
        _average(out.blocks[index].attn)
    missing, unexpected = out.load_state_dict(model.state_dict(), strict=False)
    own = (".attn.sr.", ".attn.norm.")
    if unexpected or any(not any(part in name for part in own) for name in missing):
        raise ValueError(f"the model cannot be compressed: {[*missing, *unexpected][:3]} differ")
    return out


@torch.no_grad()
def _average(attention: nn.Module) -> None:
    """A compressing convolution that averages its window, and a norm that starts plain."""
    convolution = getattr(attention, "sr", None)
    if convolution is not None:
        convolution.weight.fill_(1.0 / convolution.kernel_size[0] ** 2)
        convolution.bias.zero_()
        attention.norm.weight.fill_(1.0)
        attention.norm.bias.zero_()
