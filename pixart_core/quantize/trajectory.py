"""Pictures drawn without a VAE, for what happens inside the network on the way to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model import Control, PixArtTransformer
from ..sampling import sample_dmd, sample_dpm, sample_lcm, step_noise
from ..settings import PIXELS_PER_LATENT, Settings
from ..text.embeddings import CaptionRow, stack_rows


@torch.no_grad()
def draw(model: PixArtTransformer, settings: Settings, caption: CaptionRow,
         negative: CaptionRow | None = None, control: Control | None = None,
         done: Callable[[], None] | None = None) -> Tensor:
    """Latents (1, 4, H/8, W/8) of one caption, by resolved `settings` from noise of their seed.

    The sampler is the model's own: DPM-Solver++, or LCM or DMD for models distilled so. With
    `negative` every step runs both in one batch and guides (arXiv 2207.12598). `done` is called
    after each step.
    """
    device = model.x_embedder.proj.weight.device
    rows = [caption] if negative is None else [negative, caption]
    prepared = model.prepare_caption(*stack_rows(rows, device))
    size = torch.tensor([[settings.height, settings.width]] * len(rows), dtype=torch.float32,
                        device=device)
    if control is not None:
        control = dataclasses.replace(control, latent=control.latent.to(device))

    def predict(x: Tensor, t: int) -> Tensor:
        timestep = torch.full((len(rows),), t, device=device)
        out = model(x.expand(len(rows), -1, -1, -1), timestep, prepared, image_size=size,
                    aspect_ratio=size[:, :1] / size[:, 1:],
                    control=() if control is None else (control,))
        eps = out[:, :x.shape[1]].float()
        if done is not None:
            done()
        if negative is None:
            return eps
        without, with_caption = eps.chunk(2)
        return without + settings.guidance * (with_caption - without)

    shape = (1, model.config.in_channels, settings.height // PIXELS_PER_LATENT,
             settings.width // PIXELS_PER_LATENT)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed)).to(device)
    return _sample(predict, x, settings)


def _sample(predict: Callable[[Tensor, int], Tensor], x: Tensor, settings: Settings) -> Tensor:
    if settings.sampler == "dmd":
        return sample_dmd(predict, x)
    timesteps = settings.timesteps()
    if settings.sampler == "dpm":
        return sample_dpm(predict, x, timesteps)
    return sample_lcm(predict, x, timesteps, step_noise(x.shape, settings.seed))


def draw_all(model: PixArtTransformer, settings: Settings, captions: Sequence[CaptionRow],
             negatives: Sequence[CaptionRow], controls: Sequence[Control] = (),
             done: Callable[[], None] | None = None) -> None:
    """Draw every caption after the other, each from noise of its own.

    `negatives` are [] without guidance; `controls` are taken in turn.
    """
    for i, caption in enumerate(captions):
        draw(model, dataclasses.replace(settings, seed=(settings.seed + i) % 2**64), caption,
             negatives[i] if negatives else None, controls[i % len(controls)] if controls else None,
             done)
