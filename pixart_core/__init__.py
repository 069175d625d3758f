"""The engine of PixArt-Delta: every PixArt model in plain PyTorch, without a host.

What is imported here needs torch, safetensors and einops alone; text, pipeline and command line
are imported where they are used.
"""

from . import sampling
from .checkpoint import (
    CheckpointError,
    convert_state_dict,
    detect_config,
    read_checkpoint,
    write_checkpoint,
)
from .checkpoint.lora import read_lora
from .checkpoint.lora_apply import apply_lora, apply_loras
from .config import PRESETS, ControlNetConfig, KVCompression, PixArtConfig
from .load import load_transformer, open_transformer
from .load_control import load_controlnet
from .model import Control, PixArtControlNet, PixArtTransformer, PreparedCaption
from .model.hed import HEDDetector
from .resolution import nearest_bin

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Control",
    "ControlNetConfig",
    "HEDDetector",
    "KVCompression",
    "Pipeline",
    "PixArtConfig",
    "PixArtControlNet",
    "PixArtTransformer",
    "PreparedCaption",
    "apply_lora",
    "apply_loras",
    "convert_state_dict",
    "detect_config",
    "load_controlnet",
    "load_transformer",
    "nearest_bin",
    "open_transformer",
    "read_checkpoint",
    "read_lora",
    "sampling",
    "text",
    "write_checkpoint",
]


def __getattr__(name: str):
    """Pipeline and text on first use: they pull in diffusers and transformers."""
    from importlib import import_module

    if name == "Pipeline":
        return import_module(".pipeline", __name__).Pipeline
    if name == "text":
        return import_module(".text", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
