"""What the host holds in memory, and what a MODEL, CLIP or VAE is made of."""

import gc
import sys
from unittest import mock

import comfy.model_management
import comfy.sd
import folder_paths
import torch

from .common import ANY, CATEGORY, NO_CACHE, report


class ProbeMemory:
    """Models that the host holds loaded, with their bytes, once `after` has been computed; `dead`
    are those that it counts as loaded and that no patcher answers for any more."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {}, "optional": {"after": (ANY,)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = CATEGORY

    @classmethod
    def IS_CHANGED(cls, **_):  # noqa: N802
        return NO_CACHE

    def run(self, after=None):
        loaded, dead = [], []
        for entry in comfy.model_management.current_loaded_models:
            patcher = entry.model
            if entry.is_dead():
                dead.append(type(entry.real_model()).__name__)
            if patcher is not None:
                loaded.append({
                    "model": type(patcher.model).__name__, "device": str(entry.device),
                    "bytes": entry.model_memory(), "loaded_bytes": entry.model_loaded_memory(),
                })
        return report({"count": len(loaded), "bytes": sum(m["bytes"] for m in loaded),
                       "models": loaded, "dead": dead})


class ProbeConstructedClip:
    """The pack's own load_clip: what the host's constructor of a CLIP allocated and loaded."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"t5_name": ("STRING", {"default": ""})}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, t5_name):
        loaders = next(module for name, module in sys.modules.items()
                       if name.endswith("nodes.host.clip"))
        path = folder_paths.get_full_path_or_raise("text_encoders", t5_name)
        construct, management, found = comfy.sd.CLIP.__init__, comfy.model_management, []

        def watched(clip, *args, **kwargs):
            before = len(management.current_loaded_models)
            construct(clip, *args, **kwargs)
            tensors = [p for p in clip.cond_stage_model.parameters() if not p.is_meta]
            found.append({"bytes": sum(p.nbytes for p in tensors),
                          "loaded": len(management.current_loaded_models) - before})

        with mock.patch.object(comfy.sd.CLIP, "__init__", watched):
            clip = loaders.load_clip(path)
        end = describe_patcher(clip.patcher)
        return report({"constructed": found, "bytes": end["bytes"], "devices": end["devices"]})


class ProbeInstances:
    """How many objects of a class are alive, once `after` has been computed."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"class_name": ("STRING", {"default": ""})},
                "optional": {"after": (ANY,)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, class_name, after=None):
        gc.collect()
        return report(sum(type(thing).__name__ == class_name for thing in gc.get_objects()))


class ProbeModelInfo:
    """A MODEL, CLIP, VAE or CONTROL_NET described as JSON."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": (ANY,)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, model):
        patcher = model if hasattr(model, "model_options") else getattr(model, "patcher", None)
        info = {"class": _name(model)}
        if patcher is None:  # a ControlNet
            controls = getattr(model, "get_models", list)()
            return report(info | {"models": [describe_patcher(p) for p in controls]})
        return report(info | describe_patcher(patcher))


def describe_patcher(patcher: object) -> dict:
    """Classes, dtypes, sizes, devices and patches of a model patcher."""
    module = patcher.model
    info = {
        "patcher": _name(patcher), "model": _name(module),
        "load_device": str(patcher.load_device), "offload_device": str(patcher.offload_device),
        "bytes": patcher.model_size(), "patches": len(patcher.patches),
        "object_patches": sorted(patcher.object_patches),
        "wrappers": {k: sorted(map(str, v)) for k, v in patcher.wrappers.items() if v},
        "parameters": sum(p.numel() for p in module.parameters()),
        "dtypes": sorted({str(p.dtype) for p in module.parameters()}),
        "devices": sorted({str(p.device) for p in module.parameters()}),
        "model_options": sorted(k for k, v in patcher.model_options.items() if v),
        "attachments": sorted(map(str, getattr(patcher, "attachments", {}))),
    }
    network = getattr(module, "diffusion_model", None)
    if network is None:
        return info
    latent_format = module.latent_format
    return info | {
        "network": _name(network), "network_dtype": str(network.dtype),
        "inference_dtype": str(module.get_dtype()),
        "manual_cast_dtype": str(module.manual_cast_dtype),
        "latent_format": type(latent_format).__name__,
        "latent_scale": latent_format.scale_factor,
        "latent_channels": latent_format.latent_channels,
        "model_type": module.model_type.name,
        "model_sampling": [c.__name__ for c in type(module.model_sampling).__mro__[:-1]],
        "memory_required": module.memory_required([2, 4, 64, 64]),
        "linear": sorted({_name(m) for m in network.modules() if isinstance(m, torch.nn.Linear)}),
        "config": _name(module.model_config),
        "adm_channels": getattr(module, "adm_channels", None),
    }


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


NODES = (ProbeConstructedClip, ProbeInstances, ProbeMemory, ProbeModelInfo)
