"""Where the starter models are: a small family that comes with the project and needs no download.

They draw one coloured shape on a coloured background at 128 x 128, 160 x 96 or 96 x 160 px, on a
CPU, along the edges of another picture where they are given some.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# in subfolders that are named as ComfyUI names its own
TRANSFORMER = "diffusion_models/pixart_starter.safetensors"
LCM = "diffusion_models/pixart_starter_lcm.safetensors"
LCM_SVDQUANT = "diffusion_models/pixart_starter_lcm_svdquant.safetensors"
SIGMA = "diffusion_models/pixart_starter_sigma.safetensors"
T5 = "text_encoders/t5"
T5_FILE = "text_encoders/t5_starter.safetensors"
VAE = "vae/vae_starter.safetensors"
CONTROLNET = "controlnet/edges_starter.safetensors"
HED = "controlnet/hed_starter.safetensors"

GUIDANCE = 3.0

_PACKAGE = Path(__file__).resolve().parent
_FOLDERS = (_PACKAGE.parent / "starter", _PACKAGE / "starter_weights")


@dataclass(frozen=True)
class Starter:
    """The files of one starter family and the settings it was made for.

    `t5` is a folder with its tokenizer beside it, `t5_file` the same encoder in one file with the
    tokenizer inside. `guidance` is for `transformer` and `sigma`, a PixArt-Sigma with KV
    compression; `lcm`, the few-step student of the first, runs `lcm_steps` steps without guidance,
    and `lcm_svdquant` is the same in 4 bits. `controlnet` steers all but `sigma` by the edges that
    `hed` finds. One `vae` and one T5 serve them all.
    """

    transformer: Path
    lcm: Path
    lcm_svdquant: Path
    sigma: Path
    t5: Path
    t5_file: Path
    vae: Path
    controlnet: Path
    hed: Path
    image_size: int = 128
    steps: int = 20
    guidance: float = GUIDANCE
    lcm_steps: int = 4


def starter_in(folder: str | Path) -> Starter | None:
    """The starter family of `folder`, or None when any of its files is missing there."""
    folder = Path(folder)
    paths = [folder / name for name in (TRANSFORMER, LCM, LCM_SVDQUANT, SIGMA, T5,
                                        T5_FILE, VAE, CONTROLNET, HED)]
    return Starter(*paths) if all(path.exists() for path in paths) else None


def find_starter() -> Starter | None:
    """The starter family of this installation, or None where it was left out.

    A clone keeps it in `starter/` beside the package, a wheel inside the package.
    """
    for folder in _FOLDERS:
        found = starter_in(folder)
        if found is not None:
            return found
    return None
