"""PixArt-Sigma networks that can be timed against each other on the same weights and inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pixart_core as pc

from .comfyui import ComfyUI

Weights = dict[str, Tensor]

PADDED = 300
CAPTION_TOKENS = (40, 1)  # a prompt and the empty one, as in guidance


@dataclass(frozen=True)
class Step:
    """One call of the network: latents (B, 4, H, W), timesteps (B,), one caption per sample.

    `captions` are T5 states (1, L_i, D) without padding.
    """

    x: Tensor
    timestep: Tensor
    captions: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> Step:
        return Step(self.x.to(dtype), self.timestep, tuple(c.to(dtype) for c in self.captions))


# What a contender makes of a step once per prompt; calling it is what is timed. Returns epsilon.
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """`bind` does the work of a whole prompt (padding, preparing), untimed, and returns a step."""

    name: str
    bind: Callable[[Step], Call]


def random_weights(config: pc.PixArtConfig, seed: int = 0) -> Weights:
    """Float32 weights under native names, scaled so that activations neither die nor explode."""
    generator = torch.Generator().manual_seed(seed)
    model = pc.PixArtTransformer(config, device="meta")
    weights = {}
    for name, empty in model.state_dict().items():
        weight = torch.randn(empty.shape, generator=generator)
        fan_in = empty[0].numel() if empty.ndim > 1 else empty.numel()
        if name.endswith(("q_norm.weight", "k_norm.weight", "attn.norm.weight")):
            weights[name] = 1 + 0.1 * weight
        elif name.endswith("y_embedding"):
            weights[name] = weight
        elif name.endswith("bias"):
            weights[name] = 0.02 * weight
        else:
            weights[name] = weight.mul_(fan_in**-0.5)
    return weights


def make_step(config: pc.PixArtConfig, pixels: int, batch: int, device: torch.device,
              seed: int) -> Step:
    """A float32 step of `pixels` squared: batch 1 is a prompt, each further sample alternates."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_channels, pixels // 8, pixels // 8, generator=generator)
    counts = [CAPTION_TOKENS[i % 2] for i in range(batch)]
    captions = tuple(torch.randn(1, n, config.caption_channels, generator=generator).to(device)
                     for n in counts)
    timestep = torch.full((batch,), 900.0 - 100.0 * (seed % 8))
    return Step(x.to(device), timestep.to(device), captions)


def pad(captions: tuple[Tensor, ...], length: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Captions as one batch (B, L, D) and its mask; L is `length` or the longest of them."""
    longest = length or max(c.shape[1] for c in captions)
    if all(c.shape[1] == longest for c in captions):
        return torch.cat(captions), None
    batch = torch.cat([nn.functional.pad(c, (0, 0, 0, longest - c.shape[1])) for c in captions])
    mask = torch.zeros(batch.shape[:2], dtype=torch.bool, device=batch.device)
    for row, caption in zip(mask, captions, strict=True):
        row[: caption.shape[1]] = True
    return batch, mask


def ours(config: pc.PixArtConfig, weights: Weights, dtype: torch.dtype,
         device: torch.device) -> pc.PixArtTransformer:
    """Our network on `weights`, in eval mode."""
    fields = {"num_heads": config.num_heads, "variant": config.variant}
    return pc.load_transformer(dict(weights), dtype=dtype, device=device, **fields)


def our_contenders(model: pc.PixArtTransformer, dtype: torch.dtype,
                   network: nn.Module) -> list[Contender]:
    """Captions trimmed to the longest of the batch, projected in every step or once.

    `network` is `model` or what torch.compile made of it.
    """
    def project_each_step(step: Step) -> Call:
        step = step.to(dtype)
        caption, mask = pad(step.captions)
        return lambda: network(step.x, step.timestep, caption, mask)[:, :4]

    def project_once(step: Step) -> Call:
        step = step.to(dtype)
        prepared = model.prepare_caption(*pad(step.captions))
        return lambda: network(step.x, step.timestep, prepared)[:, :4]

    return [Contender("ours", project_each_step),
            Contender("ours, caption prepared once", project_once)]


def diffusers_network(config: pc.PixArtConfig, weights: Weights, pixels: int, dtype: torch.dtype,
                      device: torch.device) -> nn.Module:
    """diffusers' PixArtTransformer2DModel, its position table made for `pixels` in advance.

    Raises ImportError without diffusers.
    """
    from diffusers import PixArtTransformer2DModel

    side = pixels // 8
    with torch.device("meta"):
        network = PixArtTransformer2DModel(
            num_attention_heads=config.num_heads, attention_head_dim=config.head_dim,
            num_layers=config.depth, caption_channels=config.caption_channels,
            cross_attention_dim=config.hidden_size, sample_size=side,
            interpolation_scale=side / config.patch_size / config.position_range,
            use_additional_conditions=config.micro_conditioning)
    patches = network.pos_embed
    # a buffer that is in no file; made on the meta device it is empty
    table = type(patches)(height=side, width=side, patch_size=config.patch_size,
                          in_channels=config.in_channels, embed_dim=config.hidden_size,
                          interpolation_scale=patches.interpolation_scale).pos_embed
    patches.pos_embed = table.to(device=device, dtype=dtype)
    state = pc.convert_state_dict(weights, to="diffusers")
    network.load_state_dict(_move(state, dtype, device), assign=True)
    return network.eval()


def diffusers_contenders(network: nn.Module, dtype: torch.dtype) -> list[Contender]:
    """As its pipeline calls it (300 tokens and a mask), and with the padding cut off like ours."""
    def bind(length: int | None, step: Step) -> Call:
        step = step.to(dtype)
        caption, mask = pad(step.captions, length)
        unused = {"resolution": None, "aspect_ratio": None}
        return lambda: network(step.x, caption, step.timestep, unused,
                               encoder_attention_mask=mask, return_dict=False)[0][:, :4]

    return [Contender(f"diffusers, {PADDED} tokens and mask", functools.partial(bind, PADDED)),
            Contender("diffusers, caption trimmed", functools.partial(bind, None))]


def comfyui_network(comfyui: ComfyUI, config: pc.PixArtConfig, weights: Weights,
                    dtype: torch.dtype, device: torch.device) -> nn.Module:
    """ComfyUI's own PixArtMS; it has neither masks nor the variance half of the output."""
    network = comfyui.network(
        hidden_size=config.hidden_size, depth=config.depth, num_heads=config.num_heads,
        patch_size=config.patch_size, mlp_ratio=config.mlp_hidden_size / config.hidden_size,
        caption_channels=config.caption_channels, model_max_length=config.max_tokens,
        micro_condition=config.micro_conditioning, qk_norm=config.qk_norm, device="meta",
        dtype=dtype, operations=comfyui.operations)
    state = _move(weights, dtype, device, keep="scale_shift_table")
    network.load_state_dict(state, assign=True)
    return network.eval()


def comfyui_contenders(comfyui: ComfyUI, network: nn.Module, dtype: torch.dtype) -> list[Contender]:
    """One call per caption length, as its sampler does where lengths differ."""
    def bind(attention: Callable, step: Step) -> Call:
        step = step.to(dtype)
        same = len({c.shape for c in step.captions}) == 1
        rows = [slice(None)] if same else [slice(i, i + 1) for i in range(len(step.x))]
        captions = [torch.cat(step.captions[row]) for row in rows]

        def call() -> Tensor:
            comfyui.blocks.optimized_attention = attention
            return torch.cat([network(step.x[row], step.timestep[row], caption)
                              for row, caption in zip(rows, captions, strict=True)])

        return call

    return [Contender(f"ComfyUI's own, {name}", functools.partial(bind, function))
            for name, function in comfyui.attentions.items()]


def all_contenders(config: pc.PixArtConfig, weights: Weights, pixels: int, dtype: torch.dtype,
                   device: torch.device, comfyui: ComfyUI | str,
                   compile_with: Callable[[nn.Module], Any] | None = None,
                   ) -> tuple[list[Contender], dict[str, str]]:
    """Every contender that can be built here, and why the others cannot, by name.

    `comfyui` is the reason where there is none.
    """
    compiled = compile_with or (lambda network: network)
    model = ours(config, weights, dtype, device)
    found, missing = our_contenders(model, dtype, compiled(model)), {}
    try:
        network = diffusers_network(config, weights, pixels, dtype, device)
        found += diffusers_contenders(compiled(network), dtype)
    except ImportError as error:
        missing["diffusers"] = str(error)
    if isinstance(comfyui, str):
        missing["ComfyUI's own"] = comfyui
    else:
        network = comfyui_network(comfyui, config, weights, dtype, device)
        found += comfyui_contenders(comfyui, compiled(network), dtype)
    return found, missing


def _move(weights: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device,
          keep: str = "nothing at all") -> Weights:
    """Weights in `dtype`, except those whose name ends in `keep`."""
    return {name: weight.to(device=device, dtype=None if name.endswith(keep) else dtype)
            for name, weight in weights.items()}
