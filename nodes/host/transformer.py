"""Our transformer in the host's skin: its casting, attention, wrappers and patches apply."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ...pixart_core.config import PixArtConfig
from ...pixart_core.model.attention import AttentionFunction
from ...pixart_core.model.blocks import BlockInputs
from ...pixart_core.model.controlnet import Control, check_controls
from ...pixart_core.model.transformer import PixArtTransformer

WRONG_MODEL = ("a PixArt ControlNet steers models from PixArt Model Loader only; load the model "
               "with it, or take the ControlNet out of the conditioning")
WRONG_CONTROL = ("a ControlNet for another kind of model is wired to this PixArt model and cannot "
                 "steer it; load a PixArt ControlNet with PixArt ControlNet Loader, or take it "
                 "out of the conditioning")


@dataclass(frozen=True)
class HostInputs(BlockInputs):
    """BlockInputs plus the host's `transformer_options` and the latent that came in."""

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    latent: Tensor | None = None

    def of_rows(self, rows: slice) -> HostInputs:
        """As in the engine; what the options say of each part of the batch is cut as well."""
        parts = len(self.options.get("cond_or_uncond", ()))
        options = dict(self.options)
        if parts:
            size = len(self.t0) // parts
            kept = slice(rows.start // size, rows.stop // size)
            for name in ("cond_or_uncond", "uuids"):
                if name in options:
                    options[name] = options[name][kept]
        return dataclasses.replace(super().of_rows(rows), options=options,
                                   attention=host_attention(options))


class Controls(tuple):
    """The PixArt ControlNets of one model call, each a Control.

    Other models look for names in what a ControlNet gives them, and would find none and go on.
    """

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            raise ValueError(WRONG_MODEL)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str):
            raise ValueError(WRONG_MODEL)
        return super().__contains__(key)


def host_attention(options: dict[str, Any]) -> AttentionFunction:
    """The host's attention back end, with its overrides, as an engine attention function."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return optimized_attention(q, k, v, q.shape[1], mask=mask, skip_reshape=True,
                                   skip_output_reshape=True, transformer_options=options)

    return attend


def host_operations(operations: Any) -> Any:
    """The host's layers, plus its way to reach a raw parameter that may be elsewhere."""
    return type("PixArtOperations", (operations,),
                {"cast_parameter": staticmethod(comfy.ops.cast_to_input)})


class HostTransformer(PixArtTransformer):
    """PixArtTransformer behind the host's forward signature.

    Honours the DIFFUSION_MODEL wrapper, `patches` "post_input" and "double_block",
    `patches_replace["dit"]` of ("double_block", i), the block index and type in
    `transformer_options`, and `optimized_attention_override`.
    """

    def __init__(self, pixart_config: PixArtConfig, null_caption: bool = True,
                 dtype: torch.dtype | None = None, device: Any = None, operations: Any = None,
                 **_: Any) -> None:
        super().__init__(pixart_config, dtype=dtype, device=device,
                         operations=host_operations(operations), null_caption=null_caption)
        self.dtype = dtype

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The host has cast the activations already; weights follow them layer by layer."""
        return x.dtype

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None,
                control: Any = None, transformer_options: dict[str, Any] | None = None,
                **extra: Any) -> Tensor:
        """x (B, 4, H, W), timesteps (B,), context (B, L, D) -> (B, 4, H, W): epsilon.

        `extra` is what PixArtModel.extra_conds made: `caption_mask` (B, L) int or None,
        `image_size` (B, 2) int32 and `aspect_ratio` (B, 1), float32 as the bits of an int32.
        """
        options = transformer_options if transformer_options is not None else {}
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward, self, wrappers)
        return executor.execute(x, timesteps, context, control, options, **extra)

    def _forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None, control: Any,
                 transformer_options: dict[str, Any], caption_mask: Tensor | None = None,
                 image_size: Tensor | None = None, aspect_ratio: Tensor | None = None,
                 **_: Any) -> Tensor:
        if control is not None and not isinstance(control, Controls):
            raise ValueError(WRONG_CONTROL)
        if context is None:
            raise ValueError("this PixArt model got no text: wire a PixArt Text Encode or CLIP "
                             "Text Encode node to the sampler")
        options = {**transformer_options, "total_blocks": len(self.blocks),
                   "block_type": "double"}
        if aspect_ratio is not None:
            aspect_ratio = aspect_ratio.view(torch.float32)
        self._check_inputs(x, context, caption_mask, image_size, aspect_ratio)
        check_controls(control or (), self.config, x)

        tokens, grid = self.embed_latent(x)
        t = self.embed_time(timesteps, image_size, aspect_ratio)
        caption, mask = self.embed_caption(context, caption_mask, x.dtype)
        for patch in options.get("patches", {}).get("post_input", ()):
            out = patch({"img": tokens, "txt": caption, "transformer_options": options})
            tokens, caption = out["img"], out["txt"]
        inputs = HostInputs(self.shared_modulation(t), caption, mask, grid,
                            host_attention(options), options=options, latent=x)
        if control:
            tokens, inputs = self._run_range(tokens, inputs, 0, 1)
            inputs = self.steer(tokens, control, inputs, inputs.context)
            tokens, _ = self._run_range(tokens, inputs, 1, None)
        else:
            tokens = self.run_blocks(tokens, inputs)
        return self.to_latent(tokens, t, grid, x.shape[-2:])[:, : self.config.in_channels]

    def steer(self, tokens: Tensor, control: Sequence[Control], inputs: HostInputs,
              projected: Tensor) -> HostInputs:
        """As in the engine; attention overrides of the host see the block type "control"."""
        options = {**inputs.options, "block_type": "control"}
        own = dataclasses.replace(inputs, options=options, attention=host_attention(options))
        residuals = super().steer(tokens, control, own, projected).residuals
        return dataclasses.replace(inputs, residuals=residuals)

    def embed_caption(self, caption: Tensor, caption_mask: Tensor | None,
                      dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """As in the engine, but the mask is a bias: not every attention back end takes booleans."""
        context, mask = super().embed_caption(caption, caption_mask, dtype)
        if mask is not None:
            # half of the lowest number: a score added to the lowest itself would overflow
            low = torch.finfo(dtype).min / 2
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, low)
        return context, mask

    def run_blocks(self, tokens: Tensor, inputs: HostInputs, start: int = 0,
                   stop: int | None = None) -> Tensor:
        return self._run_range(tokens, inputs, start, stop)[0]

    def _run_range(self, tokens: Tensor, inputs: HostInputs, start: int,
                   stop: int | None) -> tuple[Tensor, HostInputs]:
        """Tokens through some blocks, and the inputs as the host's patches left them."""
        options = inputs.options
        replacements = options.get("patches_replace", {}).get("dit", {})
        patches = options.get("patches", {}).get("double_block", ())
        for index in range(len(self.blocks))[start:stop]:
            if not torch.compiler.is_compiling():
                comfy.model_management.throw_exception_if_processing_interrupted()
            options["block_index"] = index
            tokens = inputs.steered(index, tokens)
            replace = replacements.get(("double_block", index))
            if replace is None:
                tokens = self.run_block(index, tokens, inputs)
            else:
                tokens, inputs = self._run_replaced(index, tokens, inputs, replace)
            for patch in patches:
                out = patch({"img": tokens, "txt": inputs.context, "x": inputs.latent,
                             "block_index": index, "transformer_options": options})
                tokens = out["img"]
                inputs = dataclasses.replace(inputs, context=out["txt"])
        return tokens, inputs

    def _run_replaced(self, index: int, tokens: Tensor, inputs: HostInputs,
                      replace: Any) -> tuple[Tensor, HostInputs]:
        """Let a `patches_replace` function run the block, or not."""

        def original_block(args: dict[str, Any]) -> dict[str, Any]:
            options = args.get("transformer_options", inputs.options)
            changed = dataclasses.replace(
                inputs, t0=args["vec"], context=args["txt"], mask=args.get("attn_mask"),
                attention=host_attention(options), options=options)
            return {"img": self.run_block(index, args["img"], changed), "txt": args["txt"]}

        out = replace({"img": tokens, "txt": inputs.context, "vec": inputs.t0, "pe": None,
                       "attn_mask": inputs.mask, "transformer_options": inputs.options},
                      {"original_block": original_block})
        return out["img"], dataclasses.replace(inputs, context=out["txt"])
