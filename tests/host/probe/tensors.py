"""Tensors in and out of a graph, as safetensors files in the input and output folders."""

import json

import torch
from safetensors.torch import save_file

from .common import ANY, CATEGORY, fingerprint, output_path, read_input, report


def flatten(value: object, name: str = "value") -> dict:
    """{dotted name: leaf} of nested dicts and lists; CONDITIONING, LATENT and the like."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {name: value}
    leaves = {}
    for key, item in items:
        leaves |= flatten(item, f"{name}.{key}")
    return leaves


class ProbeSaveTensors:
    """Saves every tensor in `value` under its dotted name ("value", "value.samples",
    "value.0.0", "value.0.1.pooled_output"); shows the shapes and everything that is no tensor."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"value": (ANY,), "name": ("STRING", {"default": "probe"})}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, value, name):
        leaves = flatten(value)
        tensors = {k: v.detach().cpu().clone().contiguous()
                   for k, v in leaves.items() if isinstance(v, torch.Tensor)}
        save_file(tensors, output_path(name))
        return report({
            "tensors": {k: [list(v.shape), str(v.dtype)] for k, v in tensors.items()},
            "values": {k: v for k, v in leaves.items() if not isinstance(v, torch.Tensor)},
        })


class ProbeLoadConditioning:
    """CONDITIONING from a file: `embeds` or `caption` (B, L, D) is the embedding, `mask` or
    `caption_mask` becomes "attention_mask", every other tensor keeps its name; `options` is a
    JSON object of further entries."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"file": ("STRING", {"default": ""})},
                "optional": {"options": ("STRING", {"default": "{}"})}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    @classmethod
    def IS_CHANGED(cls, file, options="{}"):  # noqa: N802
        return fingerprint(file)

    def run(self, file, options="{}"):
        return (conditioning(read_input(file), json.loads(options)),)


class ProbeLoadLatent:
    """LATENT from the tensor `samples` (B, C, H, W) of a file; other tensors keep their names."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"file": ("STRING", {"default": ""})}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    @classmethod
    def IS_CHANGED(cls, file):  # noqa: N802
        return fingerprint(file)

    def run(self, file):
        return (read_input(file),)


class FixedNoise:
    """A NOISE object that hands out the same tensor whatever the seed."""

    seed = 0

    def __init__(self, noise: torch.Tensor) -> None:
        self.noise = noise

    def generate_noise(self, latent: dict) -> torch.Tensor:
        if self.noise.shape != latent["samples"].shape:
            raise ValueError(f"the noise is {tuple(self.noise.shape)}, "
                             f"the latent {tuple(latent['samples'].shape)}")
        return self.noise


class ProbeNoise:
    """NOISE for SamplerCustomAdvanced: the tensor `noise` (B, C, H, W) of a file."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"file": ("STRING", {"default": ""})}}

    RETURN_TYPES = ("NOISE",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    @classmethod
    def IS_CHANGED(cls, file):  # noqa: N802
        return fingerprint(file)

    def run(self, file):
        return (FixedNoise(read_input(file)["noise"]),)


def conditioning(tensors: dict, options: dict) -> list:
    """CONDITIONING of one entry from named tensors (see ProbeLoadConditioning)."""
    entries = {{"mask": "attention_mask", "caption_mask": "attention_mask"}.get(k, k): v
               for k, v in tensors.items() if k not in ("embeds", "caption")}
    embeds = tensors["embeds"] if "embeds" in tensors else tensors["caption"]
    return [[embeds, entries | options]]


NODES = (ProbeSaveTensors, ProbeLoadConditioning, ProbeLoadLatent, ProbeNoise)
