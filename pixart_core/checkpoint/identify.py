"""What kind of model a state dict is, from its names alone, and how to say so to a user."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .convert import PREFIXES
from .header import CheckpointError

# what hosts and pipelines put in front of the names below
_PREFIXES = ("", *PREFIXES, "base_model.", "controlnet.",
             "text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "text_encoder.", "vae.",
             "first_stage_model.", "unet.", "netNetwork.")


@dataclass(frozen=True)
class Kind:
    """One row of the table: names that must all begin some tensor, tried in table order."""

    name: str
    description: str
    advice: str
    signs: tuple[str, ...]


_LORA = (r".*\.(lora_(A|B|down|up)\b|lora_magnitude_vector|dora_scale|hada_w1_a|lokr_w[12]|"
         r"diff$)")
_USE_LORA = "load it with a LoRA loader on top of a PixArt model"
_NO_LORA = "that is not supported; LoRA, LoHa, LoKr and DoRA are"
_USE_CONTROL = "load it with PixArt ControlNet Loader"
_USE_TEXT = "load it as a text encoder"
_USE_VAE = "load it as a VAE"
_OTHER = "PixArt loaders cannot use it; load it with the host's own loaders"

KINDS: tuple[Kind, ...] = (
    Kind("lora", "a LoRA", _USE_LORA, (_LORA,)),
    Kind("oft", "an OFT or BOFT adapter", _NO_LORA, (r".*\.(oft_blocks|oft_diag|b?oft_[rR]\b)",)),
    Kind("glora", "a GLoRA", _NO_LORA, tuple(rf".*\.{part}\.weight$"
                                            for part in ("a1", "a2", "b1", "b2"))),
    Kind("controlnet", "a PixArt ControlNet", _USE_CONTROL, (r"controlnet\.0\.before_proj\.",)),
    Kind("controlnet", "a PixArt ControlNet", _USE_CONTROL, (r"controlnet\.\d+\.copied_block\.",)),
    Kind("controlnet-diffusers", "a PixArt ControlNet in diffusers' layout", _USE_CONTROL,
         (r"controlnet_blocks\.\d+\.(before_proj|transformer_block)\.",)),
    Kind("svdquant", "an SVDQuant-quantised model", "it is not supported; load 16-bit weights",
         (r".*\.qweight$", r".*\.wscales$")),
    Kind("sana", "a SANA transformer", _OTHER, (r"t_block\.1\.", r"blocks\.0\.mlp\.inverted_conv")),
    Kind("pixart", "a PixArt transformer", "load it with PixArt Model Loader",
         (r"t_block\.1\.weight$",)),
    Kind("pixart", "a PixArt transformer", "load it with PixArt Model Loader",
         (r"blocks\.0\.cross_attn\.kv_linear\.", r"blocks\.0\.scale_shift_table$")),
    Kind("pixart-diffusers", "a PixArt transformer in diffusers' layout",
         "load it with PixArt Model Loader", (r"adaln_single\.", r"pos_embed\.proj\.")),
    Kind("ltx", "an LTX-Video transformer", _OTHER, (r"adaln_single\.", r"patchify_proj\.")),
    Kind("ltx", "an LTX-Video transformer", _OTHER,
         (r"proj_in\.", r"time_embed\.", r"caption_projection\.", r"transformer_blocks\.0\.")),
    Kind("pixart-diffusers", "a PixArt transformer in diffusers' layout",
         "load it with PixArt Model Loader", (r"adaln_single\.", r"caption_projection\.")),
    Kind("flux", "a Flux transformer", _OTHER, (r"double_blocks\.0\.", r"single_blocks\.0\.")),
    Kind("flux", "a Flux transformer", _OTHER, (r"single_transformer_blocks\.0\.",)),
    Kind("sd3", "a Stable Diffusion 3 transformer", _OTHER, (r"joint_blocks\.0\.",)),
    Kind("sd3", "a Stable Diffusion 3 transformer", _OTHER,
         (r"context_embedder\.", r"pos_embed\.proj\.")),
    Kind("sdxl", "a Stable Diffusion XL model", _OTHER, (r"label_emb\.", r"input_blocks\.")),
    Kind("sdxl", "a Stable Diffusion XL model", _OTHER, (r"add_embedding\.", r"down_blocks\.")),
    Kind("sd", "a Stable Diffusion model", _OTHER, (r"input_blocks\.0\.",)),
    Kind("sd", "a Stable Diffusion model", _OTHER, (r"down_blocks\.", r"time_embedding\.")),
    Kind("umt5", "a UMT5 text encoder", "PixArt needs T5 v1.1 (T5-XXL) instead",
         (r"encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.",)),
    Kind("t5", "a T5 text encoder", _USE_TEXT, (r"encoder\.block\.0\.layer\.0\.SelfAttention\.",)),
    Kind("clip", "a CLIP text encoder", "PixArt needs T5 v1.1 (T5-XXL) instead",
         (r"text_model\.encoder\.layers\.0\.",)),
    Kind("taesd", "a TAESD preview VAE", _USE_VAE, (r"taesd_(decoder|encoder)\.",)),
    Kind("taesd", "a TAESD preview VAE", _USE_VAE, (r"(decoder|encoder)\.layers\.\d+\.",)),
    Kind("taesd", "a TAESD preview VAE", _USE_VAE, (r"1\.(weight|bias)$", r"3\.conv\.0\.weight$")),
    Kind("taesd", "a TAESD preview VAE", _USE_VAE, (r"0\.weight$", r"1\.conv\.0\.weight$")),
    Kind("vae", "a VAE", _USE_VAE, (r"(decoder|encoder)\.conv_in\.",)),
    Kind("hed", "a HED edge detector", "it makes the edge pictures for a PixArt ControlNet: choose "
         "it on PixArt HED Edges", (r"block1\.convs\.0\.", r"block5\.projection\.")),
)

UNKNOWN = Kind("unknown", "something that is not known to PixArt", _OTHER, ())


def identify(state_dict: Mapping[str, Tensor]) -> str:
    """The kind of model: "pixart", "pixart-diffusers", "controlnet", "lora", "t5", "vae", ...

    "unknown" where no row of KINDS fits. Only names are read; prefixes of hosts and bundles
    (`model.diffusion_model.`) do not matter.
    """
    return _match(state_dict)[0].name


def explain(state_dict: Mapping[str, Tensor]) -> str:
    """The end of an error message: what the tensors are, which name shows it, what to do."""
    kind, evidence = _match(state_dict)
    if kind is UNKNOWN:
        shown = ", ".join(sorted(state_dict)[:3]) or "nothing"
        return f"holds {kind.description} (it begins with {shown}); {kind.advice}"
    return f"holds {kind.description} ({evidence} found); {kind.advice}"


def require_kind(state_dict: Mapping[str, Tensor], kinds: tuple[str, ...], source: str) -> str:
    """The kind, when it is one of `kinds`; otherwise CheckpointError naming `source`."""
    kind = identify(state_dict)
    if kind not in kinds:
        raise CheckpointError(f"{source} {explain(state_dict)}")
    return kind


def _match(state_dict: Mapping[str, Tensor]) -> tuple[Kind, str]:
    names = [name for name in state_dict if isinstance(name, str)]
    bare = {_without_prefix(name): name for name in reversed(names)} | {n: n for n in names}
    for kind in KINDS:
        found = [_first(sign, bare) for sign in kind.signs]
        if all(found):
            return kind, _module(found[0] or "")
    return UNKNOWN, ""


def _without_prefix(name: str) -> str:
    best = max((p for p in _PREFIXES if name.startswith(p)), key=len)
    return name[len(best):]


def _first(sign: str, names: Mapping[str, str]) -> str | None:
    pattern = re.compile(sign)
    return next((full for bare, full in names.items() if pattern.match(bare)), None)


def _module(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")
