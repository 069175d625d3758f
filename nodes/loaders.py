"""MODEL and CLIP from files."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..pixart_core.checkpoint import CheckpointError
from ..pixart_core.text.t5_quant import PRECISIONS
from .host import files
from .host.clip import check_t5, load_cached_clip, load_clip, report_clip
from .host.model import check_transformer, load_model
from .host.packed import report_packed
from .host.schema import CATEGORY, advanced, require_option, schema

DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
VARIANTS = ["auto", "alpha", "sigma"]
DEVICES = ["default", "cpu"]


def check_file(check: Any, key: str, name: str | None) -> bool | str:
    """True, or why `check` says the file cannot be loaded, told before the workflow starts."""
    if name is None:
        return True
    try:
        check(files.full_path(key, name))
    except (CheckpointError, ValueError, ImportError) as error:
        return str(error)
    return True


def shown(text: str | None) -> dict[str, list[str]] | None:
    """What a node shows of a text, nothing for None."""
    return None if text is None else {"text": [text]}


class PixArtLoader(io.ComfyNode):
    """MODEL from any PixArt transformer file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtLoader",
            display_name="PixArt Model Loader",
            category=f"{CATEGORY}/loaders",
            description="Loads PixArt-alpha, PixArt-delta (LCM) and PixArt-Sigma: original .pth, "
                        "safetensors and diffusers files and folders, with the right latent scale "
                        "and size conditioning.",
            search_aliases=["pixart", "pixart alpha", "pixart sigma", "pixart delta",
                            "load diffusion model", "unet loader"],
            inputs=[
                io.Combo.Input("model_name", options=files.choices("diffusion_models"),
                               tooltip="A PixArt transformer in models/diffusion_models, quantised "
                                       "ones (pixart quantize, GGUF) too: what runs those here "
                                       "is shown on the node."),
                advanced(io.Combo.Input, "weight_dtype", options=list(DTYPES), default="auto",
                         tooltip="auto lets ComfyUI choose for your card. float16 follows the "
                                 "original more closely than bfloat16; float8 halves the memory."),
                advanced(io.Combo.Input, "variant", options=VARIANTS, default="auto",
                         tooltip="Only for diffusers files without a config.json, which cannot "
                                 "tell alpha 256/512 from Sigma: choose the one it is. Wrong "
                                 "colours are the sign of a wrong choice."),
            ],
            outputs=[io.Model.Output(display_name="model",
                                     tooltip="Works with every stock node that takes a MODEL.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model_name, weight_dtype="auto", variant="auto") -> io.NodeOutput:
        require_option("weight_dtype", weight_dtype, DTYPES)
        require_option("variant", variant, VARIANTS)
        fields = {} if variant == "auto" else {"variant": variant}
        path = files.full_path("diffusion_models", model_name)
        model = load_model(path, DTYPES[weight_dtype], fields)
        text = report_packed(model.model, model.load_device,
                             model.model.manual_cast_dtype or model.model.get_dtype(),
                             cls.hidden.unique_id)
        return io.NodeOutput(model, ui=shown(text))

    @classmethod
    def validate_inputs(cls, model_name=None) -> bool | str:
        return check_file(check_transformer, "diffusion_models", model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name, **_) -> str:
        return files.fingerprint(files.full_path("diffusion_models", model_name))


class PixArtT5Loader(io.ComfyNode):
    """CLIP from any T5 encoder file or folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtT5Loader",
            display_name="PixArt T5 Loader",
            category=f"{CATEGORY}/loaders",
            description="Loads the T5 text encoder of PixArt (T5 v1.1 XXL; the same file SD3 and "
                        "Flux use) or a smaller T5, from one file or a Hugging Face folder.",
            search_aliases=["t5", "t5xxl", "text encoder", "clip loader"],
            inputs=[
                io.Combo.Input("t5_name", options=files.choices("text_encoders"),
                               tooltip="A T5 encoder in models/text_encoders: fp16, bf16, fp8 or "
                                       "scaled fp8."),
                advanced(io.Combo.Input, "device", options=DEVICES, default="default",
                         tooltip="cpu keeps the text encoder out of the card's memory: slower "
                                 "to encode, nothing to unload."),
                advanced(io.Combo.Input, "precision", options=list(PRECISIONS), default="auto",
                         tooltip="auto keeps the weights as the file has them. For T5 XXL bf16 and "
                                 "fp16 take 9.5 GB, fp8 and int8 5 GB, int4 3 GB: fewer bits are "
                                 "made while loading, layer by layer."),
                advanced(io.Boolean.Input, "text_cache", default=False,
                         tooltip="Keeps encoded prompts on disk, in ComfyUI's user folder, so that "
                                 "a repeated prompt loads no T5. On a server that others use, "
                                 "think of privacy: the files tell what was drawn."),
            ],
            outputs=[io.Clip.Output(display_name="clip",
                                    tooltip="For PixArt Text Encode or CLIP Text Encode.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, t5_name, device="default", precision="auto",
                text_cache=False) -> io.NodeOutput:
        require_option("device", device, DEVICES)
        require_option("precision", precision, PRECISIONS)
        path = files.full_path("text_encoders", t5_name)
        check_t5(path, precision)
        if text_cache:
            return io.NodeOutput(load_cached_clip(path, device, precision, cls.hidden.unique_id))
        clip = load_clip(path, device, precision=precision)
        return io.NodeOutput(clip, ui=shown(report_clip(clip, cls.hidden.unique_id)))

    @classmethod
    def validate_inputs(cls, t5_name=None, precision="auto") -> bool | str:
        # a precision that is wired is not known yet
        known = precision if precision in PRECISIONS else "auto"
        return check_file(lambda path: check_t5(path, known), "text_encoders", t5_name)

    @classmethod
    def fingerprint_inputs(cls, t5_name, **_) -> str:
        return files.fingerprint(files.full_path("text_encoders", t5_name))
