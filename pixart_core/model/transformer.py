"""The PixArt transformer: every released alpha, delta and Sigma model from one class."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..config import PixArtConfig
from .attention import AttentionFunction, scaled_dot_product
from .blocks import BlockInputs, FinalLayer, PixArtBlock
from .controlnet import Control, check_controls, check_dtype, control_residuals
from .embedders import CaptionEmbedder, PatchEmbedder, ScalarEmbedder, position_table

KEPT_TABLES = 4  # position tables of the last sizes; one is 75 MB at 2880 px


@dataclass(frozen=True)
class PreparedCaption:
    """A caption after everything that does not change between steps.

    `keys_values` holds, for each block, cross-attention keys and values (B, heads, L, D),
    `projected` (B, L, C) what they were made of; `mask` is None or boolean (B, 1, 1, L).
    """

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    projected: Tensor
    mask: Tensor | None


class PixArtTransformer(nn.Module):
    """PixArt-alpha (arXiv 2310.00426), PixArt-delta (2401.05252) and PixArt-Sigma (2403.04692).

    Parameter names are those of the released `.pth` files. `dtype` is that of the layers which see
    tokens; the time path (embedders, shared adaLN, tables) is always float32. `operations` makes
    every layer with weights (default torch.nn), `attention` is the attention function (default
    PyTorch's). `null_caption` says whether there is a learned null caption (diffusers files drop
    it).
    """

    def __init__(self, config: PixArtConfig, dtype: torch.dtype | None = None,
                 device: torch.device | str | None = None, operations: Any = None,
                 attention: AttentionFunction | None = None, null_caption: bool = True) -> None:
        super().__init__()
        self.config = config
        self.attention = attention or scaled_dot_product
        operations = operations or nn
        factory = {"dtype": dtype, "device": device}
        size = config.hidden_size
        self.x_embedder = PatchEmbedder(config.in_channels, size, config.patch_size, operations,
                                        **factory)
        self.t_embedder = ScalarEmbedder(size, operations, device)
        self.csize_embedder = self.ar_embedder = None
        if config.micro_conditioning:
            self.csize_embedder = ScalarEmbedder(size // 3, operations, device)
            self.ar_embedder = ScalarEmbedder(size // 3, operations, device)
        shared = operations.Linear(size, 6 * size, dtype=torch.float32, device=device)
        self.t_block = nn.Sequential(nn.SiLU(), shared)
        self.y_embedder = CaptionEmbedder(config.caption_channels, size, config.max_tokens,
                                          null_caption, operations, **factory)
        compression = config.kv_compression
        compressed = set(compression.layers) if compression else set()
        self.blocks = nn.ModuleList(
            PixArtBlock(config, compression if i in compressed else None, operations, **factory)
            for i in range(config.depth)
        )
        self.final_layer = FinalLayer(config, operations, **factory)
        self._position_tables: dict[tuple, Tensor] = {}

    @property
    def null_caption(self) -> Tensor | None:
        """The learned null caption (max_tokens, caption_channels), None where the file had none."""
        return self.y_embedder.y_embedding

    def forward(self, x: Tensor, timestep: Tensor, caption: Tensor | PreparedCaption,
                caption_mask: Tensor | None = None, image_size: Tensor | None = None,
                aspect_ratio: Tensor | None = None, control: Sequence[Control] = ()) -> Tensor:
        """Predict the noise in `x`.

        Args:
            x: noisy latents (B, in_channels, H, W), variance-preserving, any H and W.
            timestep: (B,), 0 to 999; fractions are allowed.
            caption: T5 states (B, L, caption_channels), or the result of `prepare_caption`.
            caption_mask: (B, L), non-zero where a token is valid; None when nothing is padded.
            image_size: (B, 2) height and width in pixels, with micro-conditioning only.
            aspect_ratio: (B, 1) height over width, with micro-conditioning only.
            control: ControlNets that steer this pass; several add up.

        Returns:
            (B, out_channels, H, W) in the model's dtype: epsilon, then the learned variance.

        Raises:
            ValueError: shapes that do not fit the config or each other.
        """
        x = x.to(self.compute_dtype(x))
        self._check_inputs(x, caption, caption_mask, image_size, aspect_ratio)
        check_controls(control, self.config, x)
        check_dtype(control, x.dtype)
        size = x.shape[-2:]
        tokens, grid = self.embed_latent(x)
        t = self.embed_time(timestep, image_size, aspect_ratio)
        context, mask = self.embed_caption(caption, caption_mask, x.dtype)
        inputs = BlockInputs(self.shared_modulation(t), context, mask, grid, self.attention)
        if control:
            tokens = self.run_blocks(tokens, inputs, stop=1)
            projected = caption.projected if isinstance(caption, PreparedCaption) else context
            inputs = self.steer(tokens, control, inputs, projected)
            tokens = self.run_blocks(tokens, inputs, start=1)
        else:
            tokens = self.run_blocks(tokens, inputs)
        return self.to_latent(tokens, t, grid, size)

    def steer(self, tokens: Tensor, control: Sequence[Control], inputs: BlockInputs,
              projected: Tensor) -> BlockInputs:
        """`inputs` with the residuals of all ControlNets in it.

        `tokens` (B, N, C) are the output of block 0, `projected` (B, L, C) is the caption before
        any block's keys and values. Everything a ControlNet adds follows from these.
        """
        latents = [self.embed_latent(one.latent.to(tokens.dtype))[0] for one in control]
        shared = dataclasses.replace(inputs, context=projected)
        return dataclasses.replace(
            inputs, residuals=control_residuals(control, latents, tokens, shared))

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype activations run in: the weights' own here; a host that casts decides itself."""
        return self.x_embedder.proj.weight.dtype

    def embed_latent(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Latent (B, in_channels, H, W) -> tokens (B, N, C) with positions, and the token grid."""
        tokens, grid = self.x_embedder(x)
        return tokens + self.positions(grid, tokens.device, tokens.dtype), grid

    def positions(self, grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """The position table (1, N, C) of a token grid, made once per size, device and dtype."""
        sizes = (*grid, self.config.hidden_size, self.config.position_range)
        if torch.compiler.is_compiling():
            # part of the graph: memory of a graph must not outlive it in a cache
            return position_table(*sizes, device=device).to(dtype)
        key = (*grid, device, dtype)
        if key not in self._position_tables:
            while len(self._position_tables) >= KEPT_TABLES:
                self._position_tables.pop(next(iter(self._position_tables)))
            # float64 until the last moment: half-precision positions cost more than all weights
            self._position_tables[key] = position_table(*sizes).to(dtype=dtype, device=device)
        return self._position_tables[key]

    def embed_time(self, timestep: Tensor, image_size: Tensor | None,
                   aspect_ratio: Tensor | None) -> Tensor:
        """Timestep (B,), plus size and ratio where the model has them -> (B, C) float32."""
        t = self.t_embedder(timestep[:, None])
        if self.csize_embedder is not None:
            micro = [self.csize_embedder(image_size), self.ar_embedder(aspect_ratio)]
            t = t + torch.cat(micro, dim=-1)
        return t

    def shared_modulation(self, t: Tensor) -> Tensor:
        """adaLN-single: one projection of the time vector for all blocks, (B, C) -> (B, 6, C)."""
        return rearrange(self.t_block(t), "b (six c) -> b six c", six=6)

    def embed_caption(self, caption: Tensor | PreparedCaption, caption_mask: Tensor | None,
                      dtype: torch.dtype) -> tuple[Any, Tensor | None]:
        """The `context` and `mask` of BlockInputs."""
        if isinstance(caption, PreparedCaption):
            return caption.keys_values, caption.mask
        mask = None if caption_mask is None else caption_mask.bool()[:, None, None, :]
        return self.y_embedder(caption.to(dtype)), mask

    def prepare_caption(self, caption: Tensor, caption_mask: Tensor | None = None,
                        ) -> PreparedCaption:
        """Project a caption (B, L, caption_channels) once for all steps and all blocks."""
        context, mask = self.embed_caption(caption, caption_mask, self.compute_dtype(caption))
        keys_values = tuple(block.cross_attn.keys_values(context) for block in self.blocks)
        return PreparedCaption(keys_values, context, mask)

    def run_blocks(self, tokens: Tensor, inputs: BlockInputs, start: int = 0,
                   stop: int | None = None) -> Tensor:
        """Tokens (B, N, C) through blocks `start` up to, not including, `stop`."""
        for index in range(len(self.blocks))[start:stop]:
            tokens = self.run_block(index, inputs.steered(index, tokens), inputs)
        return tokens

    def run_block(self, index: int, tokens: Tensor, inputs: BlockInputs) -> Tensor:
        """Tokens (B, N, C) through one block."""
        return self.blocks[index](tokens, inputs.t0, inputs.for_block(index), inputs.mask,
                                  inputs.grid, inputs.attention)

    def to_latent(self, tokens: Tensor, t: Tensor, grid: tuple[int, int],
                  size: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) -> (B, out_channels, H, W), cropped to the size that came in."""
        patches = self.final_layer(tokens, t)
        patch = self.config.patch_size
        x = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], p=patch, q=patch)
        return x[..., : size[0], : size[1]]

    def _check_inputs(self, x: Tensor, caption: Tensor | PreparedCaption,
                      caption_mask: Tensor | None, image_size: Tensor | None,
                      aspect_ratio: Tensor | None) -> None:
        config = self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels or 0 in x.shape:
            raise ValueError(f"latent of shape {tuple(x.shape)} given, "
                             f"(batch, {config.in_channels}, height, width) expected")
        if isinstance(caption, Tensor):
            if caption.ndim != 3 or caption.shape[0] != x.shape[0]:
                raise ValueError(f"caption of shape {tuple(caption.shape)} given, ({x.shape[0]}, "
                                 f"tokens, {config.caption_channels}) expected")
            if caption.shape[-1] != config.caption_channels:
                raise ValueError(
                    f"caption states are {caption.shape[-1]} wide, this model was trained on "
                    f"{config.caption_channels}: load the T5 that belongs to it"
                )
            if caption_mask is not None and caption_mask.shape != caption.shape[:2]:
                raise ValueError(f"caption_mask of shape {tuple(caption_mask.shape)} given for a "
                                 f"caption of shape {tuple(caption.shape)}")
        if config.micro_conditioning and (image_size is None or aspect_ratio is None):
            raise ValueError("this model is conditioned on size and ratio: pass image_size (B, 2) "
                             "height and width in pixels, and aspect_ratio (B, 1) height / width")
