"""Reading a stored position table back: for which image size and stretch it was made."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

VAE_FACTOR = 8


@dataclass(frozen=True)
class Positions:
    """What `pos_embed` was made for: image_size in pixels, base_size in tokens of one side."""

    image_size: int
    base_size: int
    pe_interpolation: float

    @property
    def position_range(self) -> float:
        return self.base_size / self.pe_interpolation


def stored_positions(pos_embed: Tensor | None, facts: Mapping[str, Any]) -> Positions | None:
    """Positions of a table (1, T, C); None where there is no table or it is not a sine table.

    Token 1 is the second column of the first row, at position p = 1 / pe_interpolation. Its first
    channel is sin(p) and the first of the second quarter cos(p), so p is known up to 2 pi.
    """
    width = facts["hidden_size"]
    if pos_embed is None:
        return None
    tokens = pos_embed.shape[-2] if pos_embed.ndim in (2, 3) else 0
    base_size = math.isqrt(tokens)
    if base_size < 2 or base_size**2 != tokens or pos_embed.shape[-1] != width or pos_embed.is_meta:
        logger.info("pos_embed has shape %s, not a square table %d wide; it is not used",
                    tuple(pos_embed.shape), width)
        return None
    second = pos_embed.reshape(-1, tokens, width)[0, 1].double()
    sine, cosine = float(second[0]), float(second[width // 4])
    position = math.atan2(sine, cosine) % (2 * math.pi)
    if not math.isclose(math.hypot(sine, cosine), 1.0, abs_tol=0.02) \
            or not 1e-3 < position < 2 * math.pi - 1e-3:
        logger.warning("pos_embed is not a sine table; it is not used")
        return None
    pixels = base_size * facts["patch_size"] * VAE_FACTOR
    return Positions(pixels, base_size, _snap(1 / position))


def _snap(value: float) -> float:
    """To the nearest sixteenth when that is within half-precision rounding."""
    nearest = round(value * 16) / 16
    return nearest if nearest and abs(nearest - value) < 0.01 * value else round(value, 4)
