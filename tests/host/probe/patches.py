"""Patches of every kind that other packs put on a transformer; they count, record and may act."""

import comfy.hooks
import comfy.patcher_extension
import torch

from .common import ANY, CATEGORY, NO_CACHE, report

RECORDS: dict = {}


def describe(value: object) -> object:
    """Shapes instead of tensors, so that a record can be shown."""
    if isinstance(value, torch.Tensor):
        return list(value.shape)
    if isinstance(value, dict):
        return {str(k): "options" if k == "transformer_options" else describe(v)
                for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [describe(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__


class ProbePatches:
    """MODEL -> MODEL with recorders on a clone: the DIFFUSION_MODEL wrapper,
    patches_replace["dit"][("double_block", i)] for every block, optimized_attention_override, and
    patches "post_input", "double_block", "attn1_patch", "attn1_output_patch".

    `block_scale` multiplies the change that each block makes, `attention_scale` what attention
    returns; at 1.0 nothing changes. ProbeReport reads the record named `label`.
    """

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        scale = ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0})
        return {
            "required": {"model": ("MODEL",), "label": ("STRING", {"default": "patches"})},
            "optional": {"blocks": ("INT", {"default": 0, "min": 0, "max": 1000}),
                         "block_scale": scale, "attention_scale": scale},
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    @classmethod
    def IS_CHANGED(cls, **_):  # noqa: N802
        return NO_CACHE

    def run(self, model, label, blocks=0, block_scale=1.0, attention_scale=1.0):
        record = RECORDS[label] = {
            "wrapper": 0, "attention": 0, "attention_masks": 0, "blocks": {}, "patches": {},
            "calls": [],
        }
        model = model.clone()
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL,
                                   f"probe_{label}", _wrapper(record))
        if not blocks:
            blocks = _block_count(model.model.diffusion_model)
        for i in range(blocks):
            model.set_model_patch_replace(_block(record, i, block_scale), "dit", "double_block", i)
        model.model_options["transformer_options"]["optimized_attention_override"] = _attention(
            record, attention_scale)
        for name in ("post_input", "double_block", "attn1_patch", "attn1_output_patch"):
            model.set_model_patch(_patch(record, name), name)
        return (model,)


def _block_count(network: torch.nn.Module) -> int:
    for name in ("blocks", "double_blocks", "transformer_blocks", "layers"):
        if hasattr(network, name):
            return len(getattr(network, name))
    raise ValueError(f"{type(network).__name__} has no list of blocks; give `blocks`")


def _wrapper(record: dict):
    def wrapper(executor, *args, **kwargs):
        record["wrapper"] += 1
        options = next((a for a in (*args, *kwargs.values())
                        if isinstance(a, dict) and "cond_or_uncond" in a), {})
        record["calls"].append({
            "args": ["options" if a is options else describe(a) for a in args],
            "kwargs": describe(kwargs),
            "cond_or_uncond": list(options.get("cond_or_uncond", [])),
            "transformer_options": sorted(options),
        })
        return executor(*args, **kwargs)
    return wrapper


def _block(record: dict, index: int, scale: float):
    def replace(args, extra):
        seen = record["blocks"].setdefault(index, {"calls": 0})
        options = args.get("transformer_options") or {}
        seen["calls"] += 1
        seen["args"] = describe({k: v for k, v in args.items() if k != "transformer_options"})
        seen["block_index"] = options.get("block_index")
        seen["block_type"] = options.get("block_type")
        seen["total_blocks"] = options.get("total_blocks")
        seen["extra"] = sorted(extra)
        before = args["img"]
        out = extra["original_block"](args)
        seen["out"] = describe(out)
        return out if scale == 1.0 else {**out, "img": before + (out["img"] - before) * scale}
    return replace


def _attention(record: dict, scale: float):
    def override(func, *args, **kwargs):
        record["attention"] += 1
        mask = kwargs.get("mask", args[4] if len(args) > 4 else None)
        record["attention_masks"] += mask is not None
        record["attention_function"] = func.__name__
        out = func(*args, **kwargs)
        return out if scale == 1.0 else out * scale
    return override


def _patch(record: dict, name: str):
    """A transformer patch that changes nothing, in whichever style the model calls it: one dict,
    or positional tensors with the options last."""
    def patch(*args, **kwargs):
        seen = record["patches"].setdefault(name, {"calls": 0})
        seen["calls"] += 1
        seen["args"] = describe(args)
        seen["kwargs"] = sorted(kwargs)
        if len(args) == 1 and isinstance(args[0], dict):
            return args[0]
        if name == "attn1_patch" and kwargs:
            return dict(zip(("q", "k", "v"), args, strict=False)) | kwargs
        return args[0] if name == "attn1_output_patch" else args[:3]
    return patch


class ProbeReport:
    """The record of ProbePatches named `label`, as JSON, once `after` has been computed."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"after": (ANY,), "label": ("STRING", {"default": "patches"})}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = CATEGORY

    @classmethod
    def IS_CHANGED(cls, **_):  # noqa: N802
        return NO_CACHE

    def run(self, after, label):
        return report(RECORDS[label])


class ProbeModelAsLora:
    """HOOKS as Create Hook Model as LoRA makes them of a checkpoint, of a MODEL."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",)}}

    RETURN_TYPES = ("HOOKS",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, model):
        weights = comfy.hooks.get_patch_weights_from_model(model)
        return (comfy.hooks.create_hook_model_as_lora(weights, None, 1.0, 1.0),)


NODES = (ProbePatches, ProbeReport, ProbeModelAsLora)
