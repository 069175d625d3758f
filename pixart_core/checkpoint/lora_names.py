"""Which weight a LoRA tensor belongs to, in every naming that trainers and hosts use."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

from .convert import diffusers_module, native_module, native_modules

# in front of a dotted name; several may follow each other
_DOTTED = re.compile(r"(?:(?:unet|base_model|model|transformer|diffusion_model|module|lycoris|lora)"
                     r"\.)+")
# in front of an underscored one; "transformer_" may also begin "transformer_blocks_"
_OUTER = re.compile(r"^(?:lora_transformer|lora_unet|lycoris|lora)_")
_UNDERSCORED = re.compile(_OUTER.pattern + r"(?:base_model_model|diffusion_model|transformer)_")
_UNDERSCORED_BLOCK = re.compile(r"(transformer_blocks|blocks)_(\d+)_(.+)")
_NATIVE_ONLY = re.compile(r"blocks\.\d+\.attn\.(sr|norm)")  # KV compression
_ADAPTER = r"(?:\.(?!weight$|bias$)[^.]+)?"  # PEFT's name of the adapter, usually "default"

_LEAVES: tuple[tuple[str, str], ...] = (
    (rf"\.lora_A{_ADAPTER}(?:\.weight)?", "down"),
    (rf"\.lora_B{_ADAPTER}\.bias", "up_bias"),
    (rf"\.lora_B{_ADAPTER}(?:\.weight)?", "up"),
    (r"(?:\.|_)lora(?:_linear_layer)?[._]down\.weight", "down"),
    (r"(?:\.|_)lora(?:_linear_layer)?[._]up\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"\.(?:network_)?alpha", "alpha"),
    (r"\.scalar", "scalar"),
    (r"\.dora_scale", "dora_scale"),
    (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "magnitude"),
    (r"\.diff", "diff"), (r"\.diff_b", "diff_b"),
    (r"\.w_norm", "diff"), (r"\.b_norm", "diff_b"),
    (r"(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?)?\.weight", "weight"),
    (r"(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?)?\.bias", "bias"),
    *((rf"\.{name}(?:\.(?!weight$)[^.]+)?(?:\.weight)?", name)
      for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
                   "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
                   "lokr_t2")),
)
_LEAF = tuple((re.compile(f"(.+?){pattern}"), leaf) for pattern, leaf in _LEAVES)

WHOLE = ("weight", "bias")  # leaves that hold a value, not a change
_TEXT_ENCODER = re.compile(r"(lora_te\d?_|text_encoders?\.|lora_te\.|t5xxl\.|.*\bSelfAttention\b)")
_OTHER_MODELS: tuple[tuple[str, str], ...] = (
    ("Stable Diffusion 1.x, 2.x or XL", r"(down|up)_blocks|mid_block|(input|output)_blocks|"
                                        r"middle_block"),
    ("Flux", r"single_transformer_blocks|double_blocks|single_blocks"),
    ("Stable Diffusion 3", r"joint_blocks|attn2?[._]add_[qkv]_proj|attn[._]to_add_out"),
    ("SANA", r"conv_inverted|conv_depth"),
    ("LTX-Video or Wan", r"audio_|patchify_proj|self_attn[._]|ffn[._]"),
    ("Lumina, Z-Image or Qwen", r"layers[._]\d+[._]|noise_refiner|img_mlp|txt_mlp"),
)


class Place(NamedTuple):
    """A native module or raw parameter, or one of `parts` equal row groups of it; and its path in
    diffusers names, which PEFT's patterns are matched with."""

    module: str
    part: int
    parts: int
    path: str


def split_key(key: str) -> tuple[str, str]:
    """("transformer_blocks.0.attn1.to_q" with the file's prefixes, "down") of a tensor name.

    The second is "" for a name without a known ending: a raw parameter or a foreign kind.
    """
    for pattern, leaf in _LEAF:
        match = pattern.fullmatch(key)
        if match:
            return match[1], leaf
    return key, ""


@functools.lru_cache(maxsize=4096)
def find_place(module: str) -> Place | None:
    """Where a module's name, as a file has it, leads to; None for what PixArt has not."""
    bare = _DOTTED.sub("", module, count=1) if _DOTTED.match(module) else module
    for name in (module, bare):
        found = _dotted(_old_attention(name))
        if found:
            return found
    names = (_UNDERSCORED.sub("", module, count=1), _OUTER.sub("", module, count=1))
    return next((place for name in names if (place := _underscored(name))), None)


def is_raw_parameter(module: str) -> bool:
    """Whether a native name is a parameter itself, without .weight and .bias."""
    return module.endswith("scale_shift_table")


def is_text_encoder(key: str) -> bool:
    """Whether a tensor name belongs to a text encoder's LoRA."""
    return _TEXT_ENCODER.match(key) is not None


def other_model(keys: Iterable[str]) -> tuple[str, str] | None:
    """(model, the name that shows it) when names that PixArt has not are those of another."""
    for key in keys:
        for model, signs in _OTHER_MODELS:
            if re.search(signs, key):
                return model, key
    return None


def _dotted(name: str) -> Place | None:
    found = native_module(name)
    if found:
        return Place(*found, name)
    paths = diffusers_module(name)
    if paths:
        return Place(name, 0, 1, paths[0] if len(paths) == 1 else name)
    return Place(name, 0, 1, name) if _NATIVE_ONLY.fullmatch(name) else None


def _old_attention(name: str) -> str:
    """diffusers before PEFT put its layers beside the projections, in a "processor"."""
    name = name.replace(".processor.", ".")
    return name + ".0" if name.endswith(".to_out") else name


def _underscored(name: str) -> Place | None:
    match = _UNDERSCORED_BLOCK.fullmatch(name)
    table = _underscored_names()
    if match is None:
        dotted = table.get(name)
    else:
        dotted = table.get(f"{match[1]}_0_{match[3]}")
        dotted = dotted and dotted.replace("blocks.0.", f"blocks.{match[2]}.", 1)
    return _dotted(dotted) if dotted else None


@functools.lru_cache(maxsize=1)
def _underscored_names() -> dict[str, str]:
    native = (*native_modules(0), "blocks.0.attn.sr", "blocks.0.attn.norm")
    names = (*native, *(path for name in native for path in diffusers_module(name) or ()))
    return {name.replace(".", "_"): name for name in names}
