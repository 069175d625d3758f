"""One model evaluation through the host's own sampling path, in the network's own terms."""

import json

import comfy.sample
import comfy.samplers
import torch
from safetensors.torch import save_file

from .common import CATEGORY, fingerprint, output_path, read_input, report
from .tensors import conditioning

INPUTS = ("caption", "caption_mask", "mask", "embeds")


class ProbeApplyModel:
    """Epsilon of the network at given inputs, taken through CFGGuider, calc_cond_batch and
    apply_model exactly as a sampler would.

    The file holds `x` (B, C, H, W), the network's input, and `timestep` or `sigma` (B,). The
    captions come from `positive`/`negative`, or from the file's `caption` (B, L, D) with
    `caption_mask` (B, L) or `mask`, and `uncond` (B, L, D), with `options` (JSON: width, height,
    ...) added to both. The host scales its noisy latent itself, so it is given
    x * sqrt(sigma^2 + 1), and epsilon is (noisy - denoised) / sigma. Saves `eps`, `denoised`,
    `noisy`, `sigma` and `timestep` (as the host's model sampling sees it).
    """

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {
            "required": {"model": ("MODEL",), "file": ("STRING", {"default": ""}),
                         "name": ("STRING", {"default": "apply"})},
            "optional": {"cfg": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 100.0}),
                         "positive": ("CONDITIONING",), "negative": ("CONDITIONING",),
                         "options": ("STRING", {"default": "{}"})},
        }

    RETURN_TYPES = ("LATENT",)
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = CATEGORY

    @classmethod
    def IS_CHANGED(cls, file, **_):  # noqa: N802
        return fingerprint(file)

    def run(self, model, file, name, cfg=1.0, positive=None, negative=None, options="{}"):
        tensors = read_input(file)
        extra = json.loads(options)
        if positive is None:
            chosen = {k: v for k, v in tensors.items() if k in INPUTS}
            positive = conditioning(chosen, extra)
        if negative is None:
            negative = (conditioning({"caption": tensors["uncond"]}, extra)
                        if "uncond" in tensors else positive)
        x = tensors["x"].float()
        sigma = _sigmas(model, tensors).expand(x.shape[0])
        noisy = x * (sigma**2 + 1).sqrt().view(-1, 1, 1, 1)
        seen = {}

        def evaluate(wrapped, _x, sigmas, extra_args, callback, disable):
            at = sigma.to(_x.device)
            seen["denoised"] = wrapped(noisy.to(_x.device), at, **extra_args).float().cpu()
            return _x

        comfy.sample.sample_custom(
            model, torch.zeros_like(x), cfg, comfy.samplers.KSAMPLER(evaluate),
            torch.stack([sigma.max(), torch.zeros(())]), positive, negative, torch.zeros_like(x),
            disable_pbar=True, seed=0,
        )
        eps = (noisy - seen["denoised"]) / sigma.view(-1, 1, 1, 1)
        timestep = model.get_model_object("model_sampling").timestep(sigma).float().cpu()
        saved = {"eps": eps, "noisy": noisy, "sigma": sigma, "timestep": timestep, **seen}
        save_file({k: v.clone().contiguous() for k, v in saved.items()}, output_path(name))
        summary = {"timestep": timestep.tolist(), "sigma": sigma.tolist(),
                   "eps_std": eps.std().item()}
        return {**report(summary), "result": ({"samples": eps},)}


def _sigmas(model, tensors: dict) -> torch.Tensor:
    """The file's `sigma`, or what the host's model sampling says for its `timestep`; (B,)."""
    if "sigma" in tensors:
        return tensors["sigma"].float().reshape(-1)
    return model.get_model_object("model_sampling").sigma(
        tensors["timestep"].float().reshape(-1)).float().cpu()


NODES = (ProbeApplyModel,)
