"""Train a small autoencoder of TAESD's architecture on plain pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.read import read_checkpoint
from ...checkpoint.write import write_checkpoint
from ...config import LATENT_SCALE, Variant
from ...extras import require
from ...vae import DOWNSCALE, LATENT_CHANNELS
from ...vae_layout import taesd_state_dict, tiny_scale, tiny_state_dict
from ..draws import Draws
from ..ema import averaged_copy, update_average, warmed_decay
from ..pictures import Pictures, PictureSamples
from ..recipe import Losses, Recipe, Samples
from ..settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class VAESettings(RunSettings):
    """Attributes beside those of every run:

    data: folder of images; captions are not needed.
    crop: side of the squares that are cut out of them, in pixels.
    variant: the models it is for, alpha or sigma; says the scale that hosts apply to its latents.
    vae: a TAESD to train further, in place of random weights.
    moments: weight of the penalty that keeps latents at mean 0 and deviation 1.
    latent_noise: the decoder reads latents with noise of up to this deviation, drawn anew for
        every picture, so that what a model gets slightly wrong still decodes; 0 for none. Wants
        `anchor`, `decoder_only` or `moments` of 0.1, or latents grow out of the noise.
    edge_noise: more of that noise where latents change: up to this share of their deviation in
        each neighbourhood of 3 x 3, as small models are wrong about edges first. The decoder then
        draws the outline that fits best. Wants the same company.
    anchor: weight of the squared distance between the latents and `anchor_of` the picture. Latents
        that follow the picture are learnt quickly by small models: free ones carry edges in codes
        as wild as noise. 0 for free latents.
    decoder_only: leave the encoder of `vae` as it is, so that caches and models made with it stay
        good.
    ema_decay: of the average of the weights that the run hands out; null for none.
    """

    data: Path
    crop: int = 128
    variant: Variant = "alpha"
    vae: Path | None = None
    moments: float = 0.01
    latent_noise: float = 0.0
    edge_noise: float = 0.0
    anchor: float = 0.0
    decoder_only: bool = False
    ema_decay: float | None = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("moments", "latent_noise", "edge_noise", "anchor"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 or more")
        if self.decoder_only and self.vae is None:
            raise ValueError("decoder_only is true without a vae; name the file whose "
                             "encoder is to stay")
        if self.decoder_only and self.anchor:
            raise ValueError(f"decoder_only is true and anchor {self.anchor}; latents stay as they "
                             "are then: leave one of them out")


_GAIN = 1.5  # brings plain colours in -1..1 to about unit deviation
_HALF = DOWNSCALE // 2
# how much of red, green and blue a channel is, and where its windows lie, in px down and right
_WINDOWS = (((0.7, 0.15, 0.15), (0, 0)), ((0.15, 0.7, 0.15), (0, _HALF)),
            ((0.15, 0.15, 0.7), (_HALF, 0)), ((1 / 3, 1 / 3, 1 / 3), (_HALF, _HALF)))


def anchor_of(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in 0..1, sides multiples of 8 -> small pictures (B, 4, H/8, W/8).

    Means over windows of 8 x 8 px of colours in -1..1, times 1.5. Each channel has windows of its
    own, shifted by half of one from the others', with edges repeated, and a mixture of its own:
    mostly red, mostly green, mostly blue, and grey. So colours are told apart where they are plain,
    and an edge is seen from windows 4 px apart: twice the resolution of the latents.
    """
    signed = (images * 2 - 1) * _GAIN
    height, width = images.shape[-2:]
    mixed = torch.einsum("kc,bchw->bkhw", signed.new_tensor([mix for mix, _ in _WINDOWS]), signed)
    mixed = F.pad(mixed, (0, _HALF, 0, _HALF), mode="replicate")
    return torch.cat([
        F.avg_pool2d(mixed[:, k:k + 1, down:down + height, right:right + width], DOWNSCALE)
        for k, (_, (down, right)) in enumerate(_WINDOWS)], 1)


def local_deviation(latents: Tensor) -> Tensor:
    """Deviation in each neighbourhood of 3 x 3, the root of the channels' mean variance.

    (B, C, h, w) -> (B, 1, h, w); beyond the rim lies what is on it.
    """
    padded = F.pad(latents, (1, 1, 1, 1), mode="replicate")
    mean = F.avg_pool2d(padded, 3, 1)
    variance = F.avg_pool2d(padded.square(), 3, 1) - mean.square()
    return variance.mean(1, keepdim=True).clamp(min=0).sqrt()


class Autoencoder(nn.Module):
    """diffusers' AutoencoderTiny from pictures to pictures, as one `forward`."""

    def __init__(self) -> None:
        super().__init__()
        diffusers = require("diffusers", "training a VAE", extra="train")
        # channels last: a fifth faster on the CPU, and what tensor cores want
        self.network = diffusers.AutoencoderTiny().to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, noise: Tensor | None = None, everywhere: float = 1.0,
                at_edges: float = 0.0) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) in 0..1 -> pictures of the same range, and latents.

        What is decoded has `noise` (B, 4, H/8, W/8) in it, times `everywhere` plus `at_edges`
        times the latents' deviation around each cell.
        """
        images = images.contiguous(memory_format=torch.channels_last)
        latents = self.network.encode(images * 2 - 1).latents
        decoded = latents
        if noise is not None:
            around = local_deviation(latents.detach().float())
            decoded = latents + noise * (everywhere + at_edges * around)
        return self.network.decode(decoded).sample.float() / 2 + 0.5, latents


class VAE(Recipe):
    """Mean absolute error of the pictures; latents held at unit deviation without a scale."""

    name = "vae"
    fixed = frozenset({"vae"})  # what it starts from; elsewhere it only draws samples
    settings: VAESettings

    def __init__(self, settings: VAESettings, samples: Samples | None = None) -> None:
        self.settings = settings
        self.samples = samples or PictureSamples(settings.data, settings.crop, settings.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.trained = Autoencoder()
        if settings.vae is not None:
            stored = read_checkpoint(settings.vae).state_dict
            tensors = tiny_state_dict(stored)
            if tensors.keys() != self.trained.network.state_dict().keys():
                raise ValueError(f"vae is {settings.vae}, which holds no whole VAE of TAESD's "
                                 "architecture; name one of `pixart train vae`, or leave it out")
            self.trained.network.load_state_dict({n: t.float() for n, t in tensors.items()})
            if settings.decoder_only:
                _require_scale(stored, settings)
        self.trained.network.encoder.requires_grad_(not settings.decoder_only)
        self.average = averaged_copy(self.trained) if settings.ema_decay is not None else None

    def loss(self, trained: nn.Module, batch: Pictures, draws: Draws) -> Losses:
        images, latents = trained(batch.images, self._noise(batch.images, draws),
                                  self.settings.latent_noise, self.settings.edge_noise)
        error = (images - batch.images).abs().mean()
        channels = latents.float().transpose(0, 1).flatten(1)  # (4, everything else)
        moments = channels.mean(1).square().mean() + (channels.std(1) - 1).square().mean()
        parts = {"error": error, "moments": moments}
        total = error if self.settings.decoder_only else error + self.settings.moments * moments
        if self.settings.anchor:
            parts["anchor"] = (latents.float() - anchor_of(batch.images)).square().mean()
            total = total + self.settings.anchor * parts["anchor"]
        return Losses(total, parts)

    def _noise(self, images: Tensor, draws: Draws) -> Tensor | None:
        """Noise of a strength of its own for every picture, up to 1."""
        if not (self.settings.latent_noise or self.settings.edge_noise):
            return None
        count, _, height, width = images.shape
        shape = (count, LATENT_CHANNELS, height // DOWNSCALE, width // DOWNSCALE)
        strength = draws.uniform().to(images)
        return strength.view(-1, 1, 1, 1) * draws.noise(images.new_empty(shape))

    def after_step(self, step: int) -> None:
        if self.average is not None:
            decay = warmed_decay(self.settings.ema_decay, step)
            update_average(self.average, self.trained, decay)

    def modules(self) -> dict[str, nn.Module]:
        return {"trained": self.trained} | ({"average": self.average} if self.average else {})

    def export(self, folder: Path) -> list[Path]:
        """One file in ComfyUI's names, with the scale that makes its VAE latents ours."""
        path = folder / "vae.safetensors"
        network = (self.average or self.trained).network
        tensors = taesd_state_dict(network.state_dict())
        tensors["vae_scale"] = torch.tensor(LATENT_SCALE[self.settings.variant])
        tensors["vae_shift"] = torch.tensor(0.0)
        write_checkpoint(path, tensors, {})
        return [path]

    def sample(self, step: int) -> Tensor:
        """Crops and, below them, what comes back."""
        batch = self.samples.batch(0, 4).to(next(self.trained.parameters()).device)
        images, _ = (self.average or self.trained)(batch.images)
        return torch.cat([batch.images, images.clamp(0, 1)])


def _require_scale(stored: Mapping[str, Tensor], settings: VAESettings) -> None:
    """Raise ValueError where the file to be written would say another scale than `stored`."""
    own = LATENT_SCALE[settings.variant]
    scale, shift = tiny_scale(stored, own)
    if not math.isclose(scale, own, rel_tol=1e-3) or shift:
        raise ValueError(f"decoder_only is true, but {settings.vae} has latents of scale "
                         f"{scale:g} and shift {shift:g}, and variant {settings.variant} would be "
                         f"written with {own:g} and 0; choose the variant it was made for")
