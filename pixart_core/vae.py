"""Between pictures and the latents a PixArt model works on, through diffusers' autoencoders."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint.identify import require_kind
from .checkpoint.read import Checkpoint, CheckpointError, read_checkpoint
from .config import LATENT_SCALE, Variant
from .extras import require
from .load import check_weights
from .vae_layout import kl_config, kl_state_dict, tiny_scale, tiny_state_dict

logger = logging.getLogger(__name__)

LATENT_CHANNELS = 4
DOWNSCALE = 8
TILE_ABOVE = 2048 * 2048

_WHOLE = "first_stage_model."


class VAE:
    """An autoencoder that speaks model latents: (B, 4, H/8, W/8), about unit deviation.

    The network underneath sees latents * `scale` - `shift`.
    """

    def __init__(self, network: nn.Module, scale: float, shift: float = 0.0) -> None:
        self.network = network
        self.scale = scale
        self.shift = shift

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def to(self, device: torch.device | str) -> VAE:
        """Move the network to `device`, in place; returns the VAE."""
        self.network.to(device)
        return self

    def enable_tiling(self, enabled: bool = True) -> None:
        """Work in overlapping tiles of 512 px: less memory, faint seams.

        Pictures of more than 2048 x 2048 px are tiled without being asked.
        """
        self.network.enable_tiling() if enabled else self.network.disable_tiling()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Model latents (B, 4, h, w) -> pictures (B, 3, 8h, 8w), float32 in 0..1."""
        self._tile_if_large(latents.shape[-2] * latents.shape[-1] * DOWNSCALE**2)
        latents = latents.to(self.device, torch.float32) * self.scale - self.shift
        image = self.network.decode(latents.to(self.dtype)).sample
        return (image.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in 0..1 -> model latents (B, 4, H/8, W/8), float32.

        The mean of the latent distribution, so the same picture always gives the same latents.
        Raises ValueError unless H and W are multiples of 8.
        """
        if image.ndim != 4 or image.shape[1] != 3 or any(n % DOWNSCALE for n in image.shape[-2:]):
            raise ValueError(f"image of shape {tuple(image.shape)} given, (batch, 3, height, width)"
                             f" with multiples of {DOWNSCALE} expected")
        if getattr(self.network, "encoder", None) is None:
            raise ValueError("this VAE has a decoder only; image-to-image needs its encoder: put "
                             "taesd_encoder.safetensors beside it, or use another VAE")
        self._tile_if_large(image.shape[-2] * image.shape[-1])
        encoded = self.network.encode((image * 2 - 1).to(self.device, self.dtype))
        kl = hasattr(encoded, "latent_dist")
        latents = encoded.latent_dist.mode() if kl else encoded.latents
        return (latents.float() + self.shift) / self.scale

    def _tile_if_large(self, pixels: int) -> None:
        if pixels > TILE_ABOVE and not self.network.use_tiling:
            logger.info("the picture is large (%.1f megapixels): the VAE works in tiles",
                        pixels / 1e6)
            self.enable_tiling()


def load_vae(path: str | Path, variant: Variant, dtype: torch.dtype = torch.float32,
             device: torch.device | str | None = None) -> VAE:
    """A VAE for a PixArt model of `variant`, from a file or a diffusers folder, without downloads.

    Takes AutoencoderKL (diffusers folder or file, or the original single file) and TAESD (one file
    with `taesd_encoder.*` and `taesd_decoder.*`, a taesd_decoder / taesd_encoder pair, or
    diffusers' AutoencoderTiny). The latent scale is the variant's (0.18215 alpha, 0.13025 Sigma).
    float32 is the default because SDXL's VAE overflows in float16.

    Raises CheckpointError for anything that is not a 4-channel VAE; ImportError without diffusers.
    """
    if variant not in LATENT_SCALE:
        raise ValueError(f"variant is {variant!r}; use one of {tuple(LATENT_SCALE)}")
    checkpoint = read_checkpoint(path, subfolder="vae")
    source = Path(path).name
    if any(name.startswith(_WHOLE) for name in checkpoint.state_dict):
        kind = "vae"  # a whole Stable Diffusion checkpoint carries one
    else:
        kind = require_kind(checkpoint.state_dict, ("vae", "taesd"), source)
    build = _tiny if kind == "taesd" else _kl
    network, state_dict, scale, shift = build(checkpoint, LATENT_SCALE[variant], source)
    check_weights(state_dict, network.state_dict(), source)
    for name, tensor in state_dict.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{source}: {name} holds NaN or infinite values; the file is "
                                  "damaged")
    state_dict = {name: tensor.to(device, dtype) for name, tensor in state_dict.items()}
    network.load_state_dict(state_dict, assign=True)
    return VAE(network.eval().requires_grad_(False), scale, shift)


_Built = tuple[nn.Module, dict[str, Tensor], float, float]


def _kl(checkpoint: Checkpoint, latent_scale: float, source: str) -> _Built:
    state_dict = kl_state_dict(checkpoint.state_dict)
    for part in ("encoder", "decoder"):
        if f"{part}.conv_in.weight" not in state_dict:
            raise CheckpointError(f"{source} holds a VAE without its {part} ({part}.conv_in is "
                                  "missing); use the whole VAE")
    _check_channels(state_dict["decoder.conv_in.weight"].shape[1], source)
    config = kl_config(state_dict)
    stored = checkpoint.config if checkpoint.config.get("_class_name") == "AutoencoderKL" else {}
    groups = stored.get("norm_num_groups")
    if isinstance(groups, int) and groups > 0:  # the one size that no shape shows
        config["norm_num_groups"] = groups
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if factor != DOWNSCALE:
        raise CheckpointError(f"{source} is a VAE that shrinks pictures {factor} times; PixArt "
                              f"works on latents {DOWNSCALE} times smaller")
    scale = stored.get("scaling_factor")
    if isinstance(scale, float) and not math.isclose(scale, latent_scale, rel_tol=1e-3):
        logger.warning("%s says its latents are scaled by %g, the model expects %g: it may be the "
                       "VAE of another model (alpha takes SD's, Sigma takes SDXL's)",
                       source, scale, latent_scale)
    network = _on_meta("AutoencoderKL", config, source)
    return network, state_dict, 1.0 / latent_scale, 0.0


def _tiny(checkpoint: Checkpoint, latent_scale: float, source: str) -> _Built:
    tensors = checkpoint.state_dict
    if "1.weight" in tensors or "0.weight" in tensors:
        tensors = _tiny_pair(checkpoint)
    state_dict = tiny_state_dict(tensors)
    first = state_dict.get("decoder.layers.0.weight")
    if first is None:
        raise CheckpointError(f"{source} holds a TAESD encoder without a decoder; use the whole "
                              "TAESD")
    _check_channels(first.shape[1], source)
    network = _on_meta("AutoencoderTiny", {}, source)
    if "encoder.layers.0.weight" not in state_dict:
        network.encoder = None
    # A plain TAESD works on the model's own latents; one that carries a scale, on the VAE's.
    scale, shift = tiny_scale(tensors, latent_scale)
    shift *= scale
    if scale == 0 or not math.isfinite(scale + shift):
        raise CheckpointError(f"{source}: vae_scale {scale} and vae_shift {shift} are no scale")
    return network, state_dict, scale / latent_scale, shift


def _tiny_pair(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """Both halves of a TAESD that is stored as taesd_decoder and taesd_encoder files."""
    first = {"encoder": "0.weight", "decoder": "1.weight"}
    own = "encoder" if "0.weight" in checkpoint.state_dict else "decoder"
    other = "decoder" if own == "encoder" else "encoder"
    path = checkpoint.path
    result = {f"taesd_{own}.{name}": tensor for name, tensor in checkpoint.state_dict.items()}
    neighbour = path.with_name(path.name.replace(own, other))
    if neighbour != path and neighbour.is_file():
        half = read_checkpoint(neighbour).state_dict
        if first[other] not in half:
            raise CheckpointError(f"{neighbour.name} beside {path.name} is not a TAESD {other}")
        result.update((f"taesd_{other}.{name}", tensor) for name, tensor in half.items())
    elif other == "decoder":
        raise CheckpointError(f"{path.name} holds a TAESD encoder; its decoder ({neighbour.name}) "
                              "is not beside it")
    return result


def _check_channels(channels: int, source: str) -> None:
    if channels != LATENT_CHANNELS:
        raise CheckpointError(f"{source} is a VAE with {channels} latent channels; PixArt needs "
                              f"{LATENT_CHANNELS}: Stable Diffusion's for alpha, SDXL's for Sigma")


def _on_meta(name: str, config: dict[str, Any], source: str) -> nn.Module:
    diffusers = require("diffusers", "decoding pictures")
    try:
        with torch.device("meta"):
            return getattr(diffusers, name)(**config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source}: {name} cannot be built from {config}: {error}") from error
