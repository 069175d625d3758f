"""Control images for the calibration of a ControlNet."""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from torch import Tensor

from ..control_image import fit_image
from ..quantize.network import Network
from ..settings import Settings
from .quantize_options import CalibrationOptions
from .sources import Sources

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def check_control(options: CalibrationOptions, network: Network) -> None:
    """Raise ValueError where a ControlNet lacks what its calibration needs, and BadParameter for
    options of a ControlNet that were given for a transformer."""
    needed = {"--base": options.base, "--control-images": options.control_images,
              "--vae": options.vae}
    if not network.is_controlnet:
        wrong = [name for name, path in {**needed, "--hed": options.hed}.items() if path]
        if wrong:
            raise typer.BadParameter(f"{', '.join(wrong)}: for the calibration of ControlNets, and "
                                     f"{network.source} is a transformer")
        return
    missing = [name for name, path in needed.items() if path is None]
    if missing:
        raise ValueError(f"{network.source} is a ControlNet; svdquant draws with it and needs "
                         f"{', '.join(missing)} too")
    pictures_of(options.control_images)


def control_latents(options: CalibrationOptions, settings: Settings,
                    device: torch.device) -> list[Tensor]:
    """Every control image, encoded in the size of `settings`: (1, 4, H/8, W/8) each."""
    import numpy

    from ..load import read_transformer
    from ..vae import load_vae

    vae = load_vae(options.vae, read_transformer(options.base, {}).config.variant, device=device)
    latents = []
    for path in pictures_of(options.control_images):
        picture = Sources(options.base, None, options.vae, None, None, control_image=path,
                          hed=options.hed).open_control_image()
        pixels = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)[None].float() / 255
        latents.append(vae.encode(fit_image(pixels, settings.height, settings.width)).cpu())
    return latents


def pictures_of(folder: Path) -> list[Path]:
    """The pictures of a folder by name; ValueError where there are none."""
    if not folder.is_dir():
        raise ValueError(f"--control-images {folder} is no folder")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in _PICTURES)
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(_PICTURES)})")
    return found
