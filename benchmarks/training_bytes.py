"""What a training step at full size holds in memory, counted without a card.

`python -m benchmarks.training_bytes` runs two steps of a recipe on tensors that have shapes and no
content (PyTorch's fake tensors) under bfloat16 autocast and counts the bytes of all that is alive:
weights, gradients, the optimiser's state, activations. LCM at batch 12 with gradient checkpointing
is PixArt-delta's own setting (arXiv 2401.05252, table 1: about 32 GB). On a card, add what CUDA
itself takes and the allocator's rounding; `python -m benchmarks.training` measures there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

import pixart_core as pc
from pixart_core.sampling.schedule import add_noise
from pixart_core.training.diffusion import variance_loss
from pixart_core.training.draws import Draws
from pixart_core.training.loop import prepare_modules
from pixart_core.training.optimizers import make_optimizer
from pixart_core.training.recipe import Recipe

from .live_bytes import LiveBytes, fused_attention, weight_bytes
from .measure import GB, command, table, versions
from .training import arguments, described, run_each


class Held(NamedTuple):
    """Bytes: weights of all modules; what was still there after a step; the most at a time."""

    weights: int
    after: int
    peak: int

    def row(self) -> list[str]:
        return [f"{n / GB:.2f}" for n in (self.weights, self.after, self.peak)]


class FusedAttention(torch.autograd.Function):
    """What fused kernels keep and allocate: the output and a float32 for each query; backwards the
    three gradients and, as flash attention does, a float32 copy of the queries' gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = fused_attention(q, k, v, None)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        accumulated = torch.empty_like(q, dtype=torch.float32)
        gradients = torch.empty_like(k), torch.empty_like(v)
        return accumulated.to(q.dtype), *gradients


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The attention function of a counted model."""
    return FusedAttention.apply(q, k, v)


def main(argv: Sequence[str] | None = None) -> str:
    """Count, print and return the report."""
    options = arguments(__doc__).parse_args(argv)
    rows = run_each(options, lambda recipe: count(recipe).row(), steps=2, precision="bf16")
    report = "\n".join([
        f"Counted, not timed; {versions()}.\n", f"Command: `{command()}`\n",
        f"{described(options, 'bf16 autocast')}\n",
        table(["recipe", "batch", "weights, GB", "after a step, GB", "peak, GB"], rows)])
    print(report)
    return report


def count(recipe: Recipe, steps: int = 2) -> Held:
    """What `steps` optimiser steps of `recipe` hold; its own weights are not touched.

    Raises ValueError for fp16, whose loss scaler looks at numbers that are not there.
    """
    if recipe.settings.precision == "fp16":
        raise ValueError("precision is fp16; steps are counted in bf16 or no")
    _make_tables()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(fake):
        recipe = copy.deepcopy(recipe)
    modules = recipe.every_module()
    prepare_modules(recipe)
    for module in modules:  # after it: what counts is a GPU's attention, in the layers' dtype
        for part in module.modules():
            if isinstance(part, pc.PixArtTransformer):
                part.attention = fused
    settings, counter = recipe.settings, LiveBytes()
    with fake, counter:
        optimizer = make_optimizer(settings, recipe.parameter_groups())
        for step in range(steps):
            batch = recipe.samples.batch(step, settings.batch_size)
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
                losses = recipe.loss(recipe.trained, batch, Draws(settings.seed, batch.numbers))
            losses.total.backward()
            if settings.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(recipe.trained.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            recipe.after_step(step)
            del batch, losses
        after = counter.now
    weights = weight_bytes(*modules)
    return Held(weights, weights + after, weights + counter.peak)


def _make_tables() -> None:
    """Let the engine make the noise tables that it keeps, before tensors have no content."""
    out, x, t = torch.zeros(1, 8, 1, 1), torch.zeros(1, 4, 1, 1), torch.zeros(1, dtype=torch.long)
    variance_loss(out, add_noise(x, x, t), x, t)


if __name__ == "__main__":
    main()
