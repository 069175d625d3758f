"""How often the judge itself is wrong: renders whose content is known, disturbed a little."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..extras import require
from .draws import mix_seed
from .scenes import Scene, color_shifts, render
from .score import Report, report

Disturb = Callable[[Tensor, Scene, int], Tensor]


def renders(scenes: Sequence[Scene], jitter: float = 0.0, seed: int = 0) -> list[Tensor]:
    """The pictures (3, H, W) of scenes of any sizes, in their order; colours moved by `jitter`."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, scene in enumerate(scenes):
        groups.setdefault((scene.width, scene.height), []).append(i)
    pictures: dict[int, Tensor] = {}
    for rows in groups.values():
        shift = color_shifts([mix_seed(seed, i) for i in rows], jitter) if jitter else None
        pictures.update(zip(rows, render([scenes[i] for i in rows], shift), strict=True))
    return [pictures[i] for i in range(len(scenes))]


def blurred(image: Tensor, sigma: float) -> Tensor:
    """A picture (3, H, W) under a Gaussian of `sigma` pixels."""
    reach = max(1, round(3 * sigma))
    x = torch.arange(-reach, reach + 1).float()
    kernel = torch.exp(-x.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(image[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]


def noisy(image: Tensor, deviation: float, seed: int) -> Tensor:
    """A picture in 0..1 with Gaussian noise on every value."""
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return (image + deviation * noise).clamp(0, 1)


def compressed(image: Tensor, quality: int) -> Tensor:
    """A picture (3, H, W) in 0..1 through JPEG."""
    require("PIL", "JPEG")
    import numpy
    from PIL import Image

    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
    return torch.from_numpy(numpy.array(Image.open(file))).permute(2, 0, 1).float() / 255


# pixels of blur are those of a picture of 128 x 128 px
DISTURBANCES: dict[str, Disturb] = {
    "clean": lambda image, scene, seed: image,
    "blur 1 px": lambda image, scene, seed: blurred(image, scene.length / 128),
    "noise 0.05": lambda image, scene, seed: noisy(image, 0.05, seed),
    "blur and noise": lambda image, scene, seed: noisy(blurred(image, scene.length / 128), 0.05,
                                                       seed),
    "JPEG 60": lambda image, scene, seed: compressed(image, 60),
}


def judge_rates(scenes: Sequence[Scene], jitter: float = 4.0, seed: int = 0) -> dict[str, Report]:
    """The judge's scores of true renders, for each of DISTURBANCES; what lacks to 1 is its error.

    Colours are moved by up to `jitter` 255ths.
    """
    true = renders(scenes, jitter, seed)
    return {name: report(scenes, [disturb(image, scene, mix_seed(seed, i))
                                  for i, (image, scene) in enumerate(zip(true, scenes,
                                                                         strict=True))])
            for name, disturb in DISTURBANCES.items()}
