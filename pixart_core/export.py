"""Writing transformers and ControlNets as the folders diffusers' `from_pretrained` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import write_checkpoint
from .config import METADATA_KEY, ControlNetConfig, PixArtConfig
from .whole import whole_file

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def diffusers_config(config: PixArtConfig) -> dict[str, Any]:
    """The config.json of diffusers' PixArtTransformer2DModel for `config`.

    Raises ValueError for what that class does not have: KV compression, q/k normalisation and a
    middle width other than four times the width.
    """
    lacking = [
        what for what, has in (
            ("KV compression", config.kv_compression is not None),
            ("q/k normalisation", config.qk_norm),
            (f"an MLP {config.mlp_hidden_size} wide in the middle",
             config.mlp_hidden_size != 4 * config.hidden_size),
        ) if has
    ]
    if lacking:
        raise ValueError(f"diffusers has no form for {' and '.join(lacking)}; keep the native "
                         "layout")
    return {
        "_class_name": "PixArtTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.head_dim,
        "attention_type": "default",
        "caption_channels": config.caption_channels,
        "cross_attention_dim": config.hidden_size,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "interpolation_scale": config.pe_interpolation,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_single",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": 1000,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.base_size * config.patch_size,
        "upcast_attention": False,
        "use_additional_conditions": config.micro_conditioning,
    }


def write_diffusers_folder(folder: str | Path, state_dict: Mapping[str, Tensor],
                           config: PixArtConfig) -> None:
    """Write weights under diffusers' names and their config.json; the weights appear last.

    Raises ValueError as `diffusers_config` does, CheckpointError when the folder cannot be
    written.
    """
    _write_folder(Path(folder), state_dict, diffusers_config(config), config.to_json())


def write_controlnet_folder(folder: str | Path, state_dict: Mapping[str, Tensor],
                            config: ControlNetConfig) -> None:
    """Write a ControlNet under diffusers' names, as its research adapter reads it.

    Raises CheckpointError when the folder cannot be written.
    """
    beside = {"_class_name": "PixArtControlNetAdapterModel", "num_layers": config.depth}
    _write_folder(Path(folder), state_dict, beside, config.to_json())


def _write_folder(folder: Path, state_dict: Mapping[str, Tensor], beside: Mapping[str, Any],
                  header: str) -> None:
    text = json.dumps(beside, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "config.json") as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_checkpoint(folder / WEIGHTS_NAME, state_dict, {METADATA_KEY: header, "format": "pt"})
