"""Out of memory in the host: what was running, and what helps there.

The host frees all models after an error that it knows as one of memory, and puts words of its own
behind the message; it does so only where the error reaches it as what it looks for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ...pixart_core import memory
from ...pixart_core.memory import Description, gigabytes
from .gguf import SUFFIX

LATENT_PIXELS = 8
NOT_WORTH_NAMING = 0.1  # of what models hold
_LOW = ("NO_VRAM", "LOW_VRAM")
_SMALLER_WEIGHTS = ("a smaller file of the transformer, which is {bytes} here: pixart quantize IN "
                    "OUT.safetensors --method int8 or svdquant (4 bits), a GGUF one (pixart "
                    "convert IN OUT.gguf), or weight_dtype float8_e4m3fn in PixArt Model Loader")
_WITHOUT_T5 = ("no text encoder, with prompts from PixArt Load Embeddings that PixArt Save "
               "Embeddings wrote once; or precision int8 (5 GB for T5 XXL) or int4 (3 GB) in "
               "PixArt T5 Loader")
_OTHER_PROGRAMS = "closing other programs that use the same memory"


def explained(describe: Callable[[], Description]) -> AbstractContextManager[None]:
    """As the engine's."""
    return memory.explained(describe, is_out_of_memory)


def is_out_of_memory(error: BaseException) -> bool:
    """As the engine's; newer hosts are asked first, who then clear the device's own record."""
    is_oom = getattr(comfy.model_management, "is_oom", None)
    return (is_oom is not None and is_oom(error)) or memory.is_out_of_memory(error)


def of_model_call(model: Any, x: Tensor, control: Any, options: dict[str, Any]) -> Description:
    """A call of the transformer of `model` with latents x (B, 4, H, W)."""
    config, network = model.pixart_config, model.diffusion_model
    conditions = max(len(options.get("cond_or_uncond", ())), 1)
    pictures = max(len(x) // conditions, 1)
    height, width = (side * LATENT_PIXELS for side in x.shape[-2:])
    controls = len(control) if isinstance(control, tuple) else 0
    weights = comfy.model_management.module_size(network)
    dtype = str(model.manual_cast_dtype or model.get_dtype()).removeprefix("torch.")
    parts = [f"{pictures} picture{'s' * (pictures > 1)} of {width} x {height} px",
             f"{conditions} condition{'s' * (conditions > 1)} at once", dtype,
             f"{gigabytes(weights)} of weights", optimized_attention.__name__]
    if controls:
        parts.append(f"{controls} ControlNet{'s' * (controls > 1)}")
    running = f"the PixArt-{config.variant} transformer ({', '.join(parts)})"

    hints = []
    if pictures > 1:
        hints.append(f"batch_size 1 on the latent node instead of {pictures}, and more runs")
    trained = config.image_size
    large = trained**2 < height * width
    hints.append(f"a smaller picture than {width} x {height} px"
                 + f"; the model was trained at {trained} x {trained}" * large)
    if controls:
        hints.append(f"fewer ControlNets than {controls}")
    return running, [*hints, *_about_weights(model, weights, x.device)]


def of_loading(path: str) -> Description:
    """Loading a transformer or a text encoder from a file or a folder."""
    hints = [] if path.lower().endswith(SUFFIX) else [
        "a smaller file of the same model: pixart quantize IN OUT --method int8 halves 16 bits"]
    return f"loading {os.path.basename(path)} ({_size_of(path)})", _general(
        comfy.model_management.unet_offload_device(), hints)


def of_edges(height: int, width: int, tile: int) -> Description:
    """HED edges in tiles of `tile` pixels."""
    device = comfy.model_management.get_torch_device()
    return (f"HED edges of a {width} x {height} px image in tiles of {tile} px, the smallest",
            _general(device, ["a smaller image", *_about_others(device)]))


def of_encoding(tokens: int, device: torch.device) -> Description:
    """The text encoder on `device` with a prompt of `tokens` tokens."""
    off = "device: cpu on PixArt T5 Loader, which keeps T5 off the card"
    on_card = not comfy.model_management.is_device_cpu(device)
    return f"the text encoder ({tokens} tokens)", _general(
        device, [off] * on_card + [_WITHOUT_T5])


def _about_weights(model: Any, weights: int, device: torch.device) -> list[str]:
    hints = _about_others(device, model)
    if model.get_dtype().itemsize > 1 and not _is_packed(model):
        hints.append(_SMALLER_WEIGHTS.format(bytes=gigabytes(weights)))
    return _general(device, hints)


def _is_packed(model: Any) -> bool:
    return any(getattr(layer, "packing", None) is not None for layer in model.modules())


def _about_others(device: torch.device, model: Any = None) -> list[str]:
    """What to do about models on `device` beside `model`, where they hold much."""
    held: dict[str, int] = {}
    for entry in comfy.model_management.current_loaded_models:
        if entry.model is None or entry.device != device:
            continue
        if entry.model.model is not model:
            name = type(entry.model.model).__name__
            held[name] = held.get(name, 0) + entry.model_loaded_memory()
    own = 0 if model is None else comfy.model_management.module_size(model)
    total = sum(held.values())
    if total <= NOT_WORTH_NAMING * (total + own):
        return []
    names = ", ".join(f"{name} {gigabytes(size)}" for name, size in held.items())
    return [f"fewer other models, which hold {names} here; for the text encoder: {_WITHOUT_T5}"]


def _general(device: torch.device, hints: list[str]) -> list[str]:
    management = comfy.model_management
    low = management.vram_state.name in _LOW
    if not management.is_device_cpu(device) and not low and not _is_dynamic():
        hints = [*hints, "starting ComfyUI with --lowvram: slower, and weights wait in RAM"]
    return [*hints, _OTHER_PROGRAMS]


def _is_dynamic() -> bool:
    """Whether the host pages weights by itself, which --lowvram adds nothing to."""
    return getattr(getattr(comfy, "memory_management", None), "aimdo_enabled", False)


def _size_of(path: str) -> str:
    if os.path.isfile(path):
        return gigabytes(os.path.getsize(path))
    files = (os.path.join(root, name) for root, _, names in os.walk(path) for name in names)
    return gigabytes(sum(map(os.path.getsize, files)))
