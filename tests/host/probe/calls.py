"""A MODEL that counts its calls, keeps what they gave, and may take long, stop or fail."""

import sys
import time
from unittest import mock

import comfy.latent_formats
import comfy.model_management
import comfy.patcher_extension
import folder_paths
import torch
from safetensors.torch import save_file

import nodes

from .common import ANY, CATEGORY, NO_CACHE, output_path, report

CALLS: dict = {}
WORDS = ("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.64 GiB "
         "of which 1.06 GiB is free.")


def accelerator_error() -> Exception:
    """What CUDA's own error for want of memory is raised as since PyTorch 2.8."""
    error = torch.AcceleratorError("CUDA error: out of memory")
    error.error_code = 2
    return error


def fail(kind: str) -> None:
    """Run out of memory in one of the ways that PyTorch and Python have."""
    if kind == "device":
        raise comfy.model_management.OOM_EXCEPTION(WORDS)
    if kind == "accelerator":
        raise accelerator_error()
    if kind == "machine":
        torch.empty(10**16, dtype=torch.uint8)  # more than any machine has
    if kind == "python":
        raise MemoryError


class ProbeCalls:
    """MODEL -> MODEL with a counter on a clone, from call 1 on; ProbeCallsReport reads it.

    Every call takes `seconds` longer. Call `interrupt_at` sets the host's interrupt once it is
    past everything but the network itself; call `fail_at` runs out of memory in the way `failure`.
    """

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        count = ("INT", {"default": 0, "min": 0, "max": 1000})
        return {"required": {"model": ("MODEL",), "label": ("STRING", {"default": "calls"})},
                "optional": {"seconds": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 10.0}),
                             "interrupt_at": count, "fail_at": count,
                             "failure": ("STRING", {"default": ""})}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    @classmethod
    def IS_CHANGED(cls, **_):  # noqa: N802
        return NO_CACHE

    def run(self, model, label, seconds=0.0, interrupt_at=0, fail_at=0, failure=""):
        record = CALLS[label] = {"calls": 0, "after_interrupt": 0, "blocks": 0, "denoised": []}

        def wrapper(executor, *args, **kwargs):
            record["calls"] += 1
            record["after_interrupt"] += comfy.model_management.processing_interrupted()
            time.sleep(seconds)
            if record["calls"] == interrupt_at:
                nodes.interrupt_processing()
            if record["calls"] == fail_at:
                fail(failure)
            return executor(*args, **kwargs)

        def block(args):
            record["blocks"] += 1
            return args

        def denoised(args):
            record["denoised"].append(args["denoised"].detach().cpu().float().clone())
            return args["denoised"]

        model = model.clone()
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        model.add_wrapper_with_key(kind, f"calls_{label}", wrapper)
        model.set_model_patch(block, "double_block")
        model.set_model_sampler_post_cfg_function(denoised)
        return (model,)


class ProbeCallsReport:
    """The counts of ProbeCalls as JSON; what each call denoised is saved under `label`."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"label": ("STRING", {"default": "calls"})},
                "optional": {"after": (ANY,)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = CATEGORY

    @classmethod
    def IS_CHANGED(cls, **_):  # noqa: N802
        return NO_CACHE

    def run(self, label, after=None):
        record = CALLS[label]
        if record["denoised"]:
            save_file({"denoised": torch.stack(record["denoised"])}, output_path(label))
        return report({name: count for name, count in record.items() if name != "denoised"})


class ProbeFullClip:
    """CLIP -> CLIP that runs out of memory in the way `failure` when it encodes."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"clip": ("CLIP",), "failure": ("STRING", {"default": "device"})}}

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, clip, failure):
        clip = clip.clone()
        clip.encode_from_tokens_scheduled = lambda *_, **__: fail(failure)
        return (clip,)


class ProbeInterruptingClip:
    """CLIP -> CLIP that counts prompts under `label` and interrupts the host after number `at`."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"clip": ("CLIP",), "label": ("STRING", {"default": "clip"}),
                             "at": ("INT", {"default": 1, "min": 1, "max": 1000})}}

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    @classmethod
    def IS_CHANGED(cls, **_):  # noqa: N802
        return NO_CACHE

    def run(self, clip, label, at):
        record = CALLS[label] = {"calls": 0, "denoised": []}
        clip = clip.clone()
        encode = clip.encode_from_tokens_scheduled

        def counted(*args, **kwargs):
            record["calls"] += 1
            encoded = encode(*args, **kwargs)
            if record["calls"] == at:
                nodes.interrupt_processing()
            return encoded

        clip.encode_from_tokens_scheduled = counted
        return (clip,)


class ProbeFullLoader:
    """The pack's own load_model, which runs out of memory in the way `failure`."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model_name": ("STRING", {"default": ""}),
                             "failure": ("STRING", {"default": "python"})}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, model_name, failure):
        loaders = next(module for name, module in sys.modules.items()
                       if name.endswith("nodes.host.model"))
        path = folder_paths.get_full_path_or_raise("diffusion_models", model_name)
        with mock.patch.object(loaders, "assign_weights", lambda *_, **__: fail(failure)):
            return (loaders.load_model(path),)


class ProbeLatentColours:
    """How the host turns the latents of SD 1.5 and of SDXL into colours."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self):
        formats = (comfy.latent_formats.SD15(), comfy.latent_formats.SDXL())
        return report({type(f).__name__: {"factors": f.latent_rgb_factors,
                                          "bias": f.latent_rgb_factors_bias or [0.0] * 3}
                       for f in formats})


NODES = (ProbeCalls, ProbeCallsReport, ProbeFullClip, ProbeFullLoader, ProbeInterruptingClip,
         ProbeLatentColours)
