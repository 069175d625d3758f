"""Plain pictures as training samples: random crops of a folder's images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..vae import DOWNSCALE
from .data.images import find_images, load_picture, picture_size
from .draws import Draws, mix_seed

_ORDER = 1  # what shuffles, so that crops do not follow the order


@dataclass(frozen=True)
class Pictures:
    """Pictures (B, 3, H, W) in 0..1 and each one's place in the whole run."""

    numbers: tuple[int, ...]
    images: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    def to(self, device: torch.device | str) -> Pictures:
        return replace(self, images=self.images.to(device, non_blocking=True))


class PictureSamples:
    """Square crops of `crop` px of every image below a folder, epoch after epoch.

    Images are as large as they are; one that is smaller than the crop is enlarged to it. Crops
    start at multiples of 8 px, so that a VAE's cells fall on them as on the whole image. What is
    cut out follows from the seed and the sample's number. Captions are not needed. Raises
    ValueError for a folder without images or images that cannot be read.
    """

    def __init__(self, folder: str | Path, crop: int, seed: int = 0) -> None:
        if crop < DOWNSCALE or crop % DOWNSCALE:
            raise ValueError(f"crop is {crop}; use a multiple of {DOWNSCALE} px")
        self.folder, self.crop, self.seed = Path(folder), crop, seed
        self.paths = find_images(folder)
        self._epoch: tuple[int, Tensor] | None = None  # the order that was asked for last

    def batch(self, index: int, size: int, rank: int = 0, world: int = 1) -> Pictures:
        """Part `rank` of `world` of batch `index`: `size` of its size * world crops."""
        first = index * size * world + rank * size
        numbers = tuple(range(first, first + size))
        places = Draws(self.seed, numbers)
        fractions = torch.stack([places.uniform(), places.uniform()], 1).tolist()
        crops = [self._crop(self._path(n), *at) for n, at in zip(numbers, fractions, strict=True)]
        return Pictures(numbers, torch.stack(crops))

    def _path(self, number: int) -> Path:
        epoch, place = divmod(number, len(self.paths))
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, _ORDER, epoch))
            self._epoch = epoch, torch.randperm(len(self.paths), generator=generator)
        return self.folder / self.paths[self._epoch[1][place]]

    def _crop(self, path: Path, down: float, right: float) -> Tensor:
        height, width = picture_size(path)
        grow = max(1.0, self.crop / min(height, width))
        height, width = round(height * grow), round(width * grow)
        picture = load_picture(path, height, width).float() / 255
        top, left = (int(part * ((side - self.crop) // DOWNSCALE + 1)) * DOWNSCALE
                     for part, side in ((down, height), (right, width)))
        return picture[:, top:top + self.crop, left:left + self.crop]
