"""Pictures with their exact outlines, disturbed as real ones are: what an edge detector learns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import Draws, mix_seed
from .judge import blurred
from .scenes import SceneSettings, color_shifts, draw_scene, outline, render

_SHADE = 0.3  # of full brightness, how far a gradient over the picture goes at most
_BLUR = 1.2
_NOISE = 0.05
_TINT = 60.0  # 255ths by which colours differ from the eight of the vocabulary


@dataclass(frozen=True)
class Outlined:
    """Pictures (B, 3, H, W) in 0..1 and their outlines (B, 1, H, W) in 0..1."""

    numbers: tuple[int, ...]
    images: Tensor
    edges: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    def to(self, device: torch.device | str) -> Outlined:
        return replace(self, images=self.images.to(device), edges=self.edges.to(device))


class OutlinedScenes:
    """Scenes with other colours, gradients, blur and noise; the outlines stay exact."""

    def __init__(self, image_size: int, seed: int = 0) -> None:
        self.settings = SceneSettings(image_size, two=0.4, counts=0.3, corners=0.2)
        self.seed = seed

    def batch(self, index: int, size: int, rank: int = 0, world: int = 1) -> Outlined:
        """Part `rank` of `world` of batch `index`: `size` of its size * world pictures."""
        first = index * size * world + rank * size
        numbers = tuple(range(first, first + size))
        scenes = [draw_scene(self.seed, n, self.settings) for n in numbers]
        images = render(scenes, color_shifts([mix_seed(self.seed, n) for n in numbers], _TINT))
        draws = Draws(mix_seed(self.seed, 1), numbers)
        shade = draws.noise(images.new_zeros(size, 1, 3, 3))
        images = images + _SHADE * draws.uniform().float().view(-1, 1, 1, 1) * F.interpolate(
            shade, images.shape[-2:], mode="bicubic", align_corners=False)
        sigmas = (_BLUR * draws.uniform()).tolist()
        images = torch.stack([blurred(image, sigma) if sigma > 0.2 else image
                              for image, sigma in zip(images, sigmas, strict=True)])
        noise = draws.noise(images) * (_NOISE * draws.uniform().float().view(-1, 1, 1, 1))
        return Outlined(numbers, (images + noise).clamp(0, 1), outline(scenes))
