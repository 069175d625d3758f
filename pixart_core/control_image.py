"""Making a control image fit the picture that is to be drawn."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def fit_image(image: Tensor, height: int, width: int) -> Tensor:
    """An image (B, C, H, W) scaled until it covers `height` x `width`, the rest cut off evenly.

    As the demo of PixArt-delta fits its control images: the picture is neither stretched nor
    bordered. Bilinear with antialiasing, so that thin lines survive being made smaller. An image
    of that size comes back as it is.
    """
    rows, columns = image.shape[-2:]
    if (rows, columns) == (height, width):
        return image
    scale = max(height / rows, width / columns)
    size = (max(height, round(rows * scale)), max(width, round(columns * scale)))
    if size != (rows, columns):
        image = F.interpolate(image, size=size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return image[..., top: top + height, left: left + width]
