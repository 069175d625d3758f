"""PixArt as a MODEL: the host's model classes around our transformer, and the way from a file."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor

from ...pixart_core.checkpoint.config_tensor import config_tensor
from ...pixart_core.config import METADATA_KEY, PixArtConfig
from ...pixart_core.load import (
    OpenedTransformer,
    assign_weights,
    read_transformer,
    require_finite,
)
from ...pixart_core.quant.kitchen_format import require_kernels
from . import memory
from .conds import AreaCond, CaptionCond, CaptionMaskCond, caption_mask
from .files import fingerprint
from .packed import PackedOperations, PackedPatcher, refuse_saving
from .transformer import WRONG_CONTROL, HostTransformer

logger = logging.getLogger(__name__)


class PixArtModel(comfy.model_base.PixArt):
    """The host's PixArt model with our transformer and conditions in it."""

    def __init__(self, model_config: Any, device: Any = None) -> None:
        # past comfy.model_base.PixArt, whose constructor builds the host's own transformer
        super(comfy.model_base.PixArt, self).__init__(
            model_config, comfy.model_base.ModelType.EPS, device=device,
            unet_model=HostTransformer)
        self.pixart_config: PixArtConfig = self.diffusion_model.config

    def apply_model(self, x: Tensor, t: Tensor, c_concat: Tensor | None = None,
                    c_crossattn: Tensor | None = None, control: Any = None,
                    transformer_options: dict[str, Any] | None = None, **kwargs: Any) -> Tensor:
        """One call of the model; an error for want of memory says what it was and what helps."""
        options = {} if transformer_options is None else transformer_options
        with memory.explained(lambda: memory.of_model_call(self, x, control, options)):
            return super().apply_model(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def extra_conds(self, **kwargs: Any) -> dict[str, comfy.conds.CONDRegular]:
        """What a sampler passes for each conditioning, batched by the host."""
        out = super(comfy.model_base.PixArt, self).extra_conds(**kwargs)
        residuals = residual_count(kwargs.get("control"))
        if kwargs.get("noise") is not None:
            out["areas"] = AreaCond(tuple(kwargs["noise"].shape[-2:]),
                                    kwargs.get("prompt_type", "positive") == "positive", residuals)
        caption = kwargs.get("cross_attn")
        if caption is not None:
            self._check_caption(caption)
            mask = caption_mask(caption, kwargs.get("attention_mask"))
            full = mask is None
            if full:
                mask = torch.ones(caption.shape[:2], dtype=torch.int32, device=caption.device)
            out["c_crossattn"] = CaptionCond(caption)
            out["caption_mask"] = CaptionMaskCond(mask, full)
        if self.pixart_config.micro_conditioning:
            height, width = kwargs["height"], kwargs["width"]
            ratio = torch.tensor([[kwargs.get("aspect_ratio", height / width)]])
            # int32, which the host leaves alone: bfloat16 would move the ratio
            out["image_size"] = comfy.conds.CONDRegular(
                torch.tensor([[height, width]], dtype=torch.int32))
            out["aspect_ratio"] = comfy.conds.CONDRegular(ratio.float().view(torch.int32))
        return out

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, list[int]]:
        """Sizes that the host's first memory estimate goes by."""
        return {**super().extra_conds_shapes(**kwargs),
                "areas": [residual_count(kwargs.get("control"))]}

    def memory_required(self, input_shape: list[int],
                        cond_shapes: dict[str, list] | None = None) -> float:
        """Bytes that one call needs, the residuals of ControlNets among them."""
        cond_shapes = cond_shapes or {}
        count = max((size[0] for size in cond_shapes.get("areas", ())), default=0)
        config = self.pixart_config
        tokens = input_shape[0] * math.prod(input_shape[2:]) / config.patch_size**2
        residuals = count * tokens * config.hidden_size * comfy.model_management.dtype_size(
            self.manual_cast_dtype or self.get_dtype())
        return super().memory_required(input_shape, cond_shapes=cond_shapes) + residuals

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What save nodes write; ValueError for packed weights."""
        refuse_saving(self)
        return super().state_dict_for_saving(*args, **kwargs)

    def _check_caption(self, caption: Tensor) -> None:
        expected = self.pixart_config.caption_channels
        if caption.shape[-1] != expected:
            raise ValueError(
                f"the text conditioning is {caption.shape[-1]} wide, this PixArt model was "
                f"trained on {expected}: load the T5 that belongs to it with PixArt T5 Loader "
                "(T5 v1.1 XXL for every released PixArt)")


def residual_count(control: Any) -> int:
    """Token tensors that a chain of ControlNets adds: they share one set, that of the deepest.

    Raises ValueError for a chain that is not of PixArt ControlNets alone, before any of them runs.
    """
    count = 0
    while control is not None:
        own = getattr(control, "residual_count", None)
        if own is None:
            raise ValueError(WRONG_CONTROL)
        count, control = max(count, own), control.previous_controlnet
    return count


class _BuildsOurs:
    def get_model(self, state_dict: dict[str, Tensor], prefix: str = "",
                  device: Any = None) -> PixArtModel:
        return PixArtModel(self, device=device).eval()

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Tensor],
                                           ) -> dict[str, Tensor]:
        """What save nodes write: the weights as any loader knows them, and our config.

        Save nodes choose the file's header by themselves. The tensor stands beside the weights,
        not among them, so that the host's loaders leave it alone.
        """
        out = super().process_unet_state_dict_for_saving(state_dict)
        return {**out, METADATA_KEY: config_tensor(self.unet_config["pixart_config"].to_json())}


class AlphaConfig(_BuildsOurs, comfy.supported_models.PixArtAlpha):
    """PixArt-alpha and delta: latents of the SD 1.5 VAE."""

    latent_format = comfy.latent_formats.SD15


class SigmaConfig(_BuildsOurs, comfy.supported_models.PixArtSigma):
    """PixArt-Sigma: latents of the SDXL VAE."""

    latent_format = comfy.latent_formats.SDXL


def model_config(config: PixArtConfig, null_caption: bool) -> Any:
    """The host's model config for `config`: latent format, schedule and constructor arguments."""
    kind = AlphaConfig if config.variant == "alpha" else SigmaConfig
    return kind({
        "image_model": f"pixart_{config.variant}",
        # read by the host's LoRA key map
        "depth": config.depth, "hidden_size": config.hidden_size,
        "in_channels": config.in_channels,
        "pixart_config": config, "null_caption": null_caption,
    })


def load_model(path: str, dtype: torch.dtype | None = None, fields: dict[str, Any] | None = None,
               disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """A MODEL from any PixArt transformer file or folder.

    `dtype` None lets the host choose for its device and the file; `fields` override what is
    detected. Raises CheckpointError or ValueError that says what the file holds instead, and
    ImportError where what runs a quantised file is missing.
    """
    with memory.explained(lambda: memory.of_loading(path)):
        opened = read_transformer(path, fields or {})
        require_kernels(opened.packed)
        return model_from(opened, dtype, disable_dynamic, (load_model, (path, dtype, fields)))


def model_from(opened: OpenedTransformer, dtype: torch.dtype | None, disable_dynamic: bool,
               reload: tuple) -> comfy.model_patcher.ModelPatcher:
    """A MODEL from an opened transformer; `reload` is how the host may load it by itself."""
    management = comfy.model_management
    state_dict, config = opened.state_dict, opened.config
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    settings = model_config(config, "y_embedder.y_embedding" in state_dict)
    supported = list(settings.supported_inference_dtypes)
    if dtype is None:
        dtype = management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(state_dict),
            supported_dtypes=supported,
            weight_dtype=None if opened.packed else comfy.utils.weight_dtype(state_dict))
    settings.set_inference_dtype(
        dtype, management.unet_manual_cast(dtype, load_device, supported))

    if opened.packed:
        settings.custom_operations = PackedOperations
    model = settings.get_model(state_dict)
    patcher_class = PackedPatcher if opened.packed else _patcher_class(disable_dynamic)
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    if hasattr(patcher, "is_dynamic") and patcher.is_dynamic():
        _map_weights(model, opened)
    else:
        assign_weights(model.diffusion_model, opened, offload_device, copy=True,
                       dtypes=weight_dtypes(model.diffusion_model))
    patcher.cached_patcher_init = reload
    patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_LOAD, _patch_tables)
    patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_DETACH, _drop_positions)
    logger.info("PixArt %s: %d blocks of width %d, %s, positions 0 to %g", config.variant,
                config.depth, config.hidden_size, dtype, config.position_range)
    return patcher


def weight_dtypes(network: torch.nn.Module) -> dict[str, torch.dtype]:
    """The dtype of every weight, also of layers that the host leaves empty until they are loaded.

    With dynamic memory management its layers hold None and only say what dtype they want.
    """
    dtypes = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    for prefix, module in network.named_modules():
        for part in ("weight", "bias"):
            wanted = getattr(module, f"{part}_comfy_model_dtype", None)
            absent = getattr(module, part, None) is None
            has_part = part == "weight" or getattr(module, "comfy_need_lazy_init_bias", True)
            if wanted is not None and absent and has_part:
                dtypes[f"{prefix}.{part}"] = wanted
    return dtypes


def _map_weights(model: PixArtModel, opened: OpenedTransformer) -> None:
    """Leave the weights mapped to their file, which dynamic memory management pages from."""
    for name, dtype in weight_dtypes(model.diffusion_model).items():
        tensor = opened.state_dict[name]
        require_finite(name, tensor, opened.source)
        if dtype == torch.float32:  # the time path, in any model
            opened.state_dict[name] = tensor.float()
    model.load_model_weights(opened.state_dict, "", assign=True)


def _patch_tables(patcher: comfy.model_patcher.ModelPatcher, device_to: Any = None,
                  *_: Any, **__: Any) -> None:
    """Apply merges and LoRAs to the scale-shift tables, which the host leaves out.

    It patches the parameters of modules without children; a table belongs to a whole block.
    """
    for key in patcher.patches:
        if key.endswith("scale_shift_table"):
            if key in patcher.backup:
                comfy.utils.set_attr_param(patcher.model, key, patcher.backup[key].weight)
            patcher.patch_weight_to_device(key, device_to=device_to)


def _drop_positions(patcher: comfy.model_patcher.ModelPatcher, *_: Any) -> None:
    """Position tables are no weights, so the host would leave them on the card."""
    patcher.model.diffusion_model._position_tables.clear()


def _patcher_class(disable_dynamic: bool) -> type[comfy.model_patcher.ModelPatcher]:
    """CoreModelPatcher where the host has it: it may stand for dynamic memory management."""
    plain = comfy.model_patcher.ModelPatcher
    return plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)


def pixart_config(model: comfy.model_patcher.ModelPatcher) -> PixArtConfig | None:
    """The config of a MODEL of ours, None for any other."""
    return getattr(model.model, "pixart_config", None)


def null_caption(model: comfy.model_patcher.ModelPatcher) -> Tensor:
    """The learned null caption (max_tokens, caption_channels), float32 on the CPU.

    Raises ValueError when the MODEL is no PixArt or its file had none.
    """
    embedder = getattr(model.model.diffusion_model, "y_embedder", None)
    if embedder is None or not hasattr(embedder, "y_proj"):
        raise ValueError(f"the model is a {type(model.model).__name__}, not a PixArt; wire the "
                         "model from PixArt Model Loader")
    states = embedder.y_embedding
    if states is None:
        raise ValueError("this PixArt file holds no null caption (diffusers files drop it); "
                         "encode an empty prompt with PixArt Text Encode instead")
    return states.detach().float().cpu()



def check_transformer(path: str) -> None:
    """Raise CheckpointError when `path` is no usable PixArt transformer, ImportError when nothing
    here runs it; reads headers only."""
    _check_once(path, fingerprint(path))


@functools.lru_cache(maxsize=32)
def _check_once(path: str, _fingerprint: str) -> None:
    require_kernels(read_transformer(path, {}).packed)
