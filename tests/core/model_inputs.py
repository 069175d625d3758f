"""Arguments that tests of several files call a transformer with."""

from __future__ import annotations

import torch
from torch import Tensor


def sizes(x: Tensor) -> dict[str, Tensor]:
    """The size conditioning of latents (B, 4, H, W), for models with and without it."""
    size = torch.tensor([[8.0 * x.shape[-2], 8.0 * x.shape[-1]]]).expand(len(x), 2)
    return {"image_size": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
