"""VAE files under one set of names: diffusers'. From the original layout (SD, SDXL) and TAESD's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_KL_PREFIXES = ("first_stage_model.", "vae.")
_KL_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

# original name -> diffusers' name, applied in order to every name of the original layout
_RULES = (
    (re.compile(r"\.mid\.block_1\."), ".mid_block.resnets.0."),
    (re.compile(r"\.mid\.block_2\."), ".mid_block.resnets.1."),
    (re.compile(r"\.mid\.attn_1\.norm\."), ".mid_block.attentions.0.group_norm."),
    (re.compile(r"\.mid\.attn_1\.([qkv])\."), r".mid_block.attentions.0.to_\1."),
    (re.compile(r"\.mid\.attn_1\.proj_out\."), ".mid_block.attentions.0.to_out.0."),
    (re.compile(r"^encoder\.down\.(\d+)\.block\."), r"encoder.down_blocks.\1.resnets."),
    (re.compile(r"^encoder\.down\.(\d+)\.downsample\."), r"encoder.down_blocks.\1.downsamplers.0."),
    (re.compile(r"\.nin_shortcut\."), ".conv_shortcut."),
    (re.compile(r"\.norm_out\."), ".conv_norm_out."),
)
_UP = re.compile(r"^decoder\.up\.(\d+)\.(block|upsample)\.")
_UP_NAMES = {"block": "resnets", "upsample": "upsamplers.0"}
# what diffusers called the attention layers before 2023; sd-vae-ft-ema is still stored so
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD = re.compile(r"\.attentions\.0\.(query|key|value|proj_attn)\.")


def kl_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a KL VAE under diffusers' names, from either layout, prefixed or not.

    What is not part of the autoencoder (its training loss, the rest of a whole checkpoint) is left
    out. 1 x 1 convolutions of the middle attention become linear layers.
    """
    for prefix in _KL_PREFIXES:
        if any(name.startswith(prefix) for name in state_dict):
            state_dict = {name[len(prefix):]: tensor for name, tensor in state_dict.items()
                          if name.startswith(prefix)}
    ups = {int(match[1]) for name in state_dict if (match := _UP.match(name))}
    result = {}
    for name, tensor in state_dict.items():
        if not name.startswith(_KL_PARTS):
            continue
        for pattern, replacement in _RULES:
            name = pattern.sub(replacement, name)
        # the original counts its up blocks from the output, diffusers from the latents
        name = _UP.sub(
            lambda m: f"decoder.up_blocks.{max(ups) - int(m[1])}.{_UP_NAMES[m[2]]}.", name)
        name = _OLD.sub(lambda m: f".attentions.0.{_OLD_ATTENTION[m[1]]}.", name)
        if ".attentions.0.to_" in name and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        result[name] = tensor
    return result


def kl_config(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """AutoencoderKL's arguments, read from the shapes of `kl_state_dict`'s result.

    SD's and SDXL's VAEs are one architecture: widths 128, 256, 512, 512, two layers per block.
    """
    widths = []
    while (name := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in state_dict:
        widths.append(state_dict[name].shape[0])
    layers = 1
    while f"encoder.down_blocks.0.resnets.{layers}.conv1.weight" in state_dict:
        layers += 1
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "latent_channels": state_dict["decoder.conv_in.weight"].shape[1],
        "act_fn": "silu",
        "norm_num_groups": 32,
        "sample_size": 512,
        "use_quant_conv": "quant_conv.weight" in state_dict,
        "use_post_quant_conv": "post_quant_conv.weight" in state_dict,
        "mid_block_add_attention": any(".mid_block.attentions.0." in name for name in state_dict),
    }


_TINY = re.compile(r"^(?:taesd_)?(encoder|decoder)\.(?:layers\.)?(\d+)\.(.+)$")


def tiny_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a TAESD under diffusers' names: `encoder.layers.N`, `decoder.layers.N`.

    Takes `taesd_encoder.N` / `taesd_decoder.N` names too. There the decoder's layer 0 is the clamp
    of the latents, which diffusers keeps outside the list, so its numbers are one less.
    """
    result = {}
    for name, tensor in state_dict.items():
        match = _TINY.match(name)
        if match is None:
            continue
        part, number, rest = match.groups()
        shift = part == "decoder" and name.startswith("taesd_")
        result[f"{part}.layers.{int(number) - shift}.{rest}"] = tensor
    return result


def taesd_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: diffusers' AutoencoderTiny weights under `taesd_encoder` / `taesd_decoder`."""
    result = {}
    for name, tensor in state_dict.items():
        match = _TINY.match(name)
        if match is not None:
            part, number, rest = match.groups()
            result[f"taesd_{part}.{int(number) + (part == 'decoder')}.{rest}"] = tensor
    return result


def tiny_scale(state_dict: Mapping[str, Any], latent_scale: float) -> tuple[float, float]:
    """`vae_scale` and `vae_shift` of a TAESD's file; `latent_scale` and 0 where it names none."""
    return (float(state_dict.get("vae_scale", latent_scale)),
            float(state_dict.get("vae_shift", 0.0)))
