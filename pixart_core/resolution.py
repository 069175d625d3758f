"""The picture sizes PixArt was trained at: one table of aspect-ratio bins per base resolution."""

from __future__ import annotations

# h/w as the published tables spell it, then height and width in steps of base / 16 px: the 256,
# 512, 1024 and 2048 tables are one table.
_SHAPES = {
    0.25: (8, 32), 0.26: (8, 31), 0.27: (8, 30), 0.28: (8, 29), 0.32: (9, 28), 0.33: (9, 27),
    0.35: (9, 26), 0.4: (10, 25), 0.42: (10, 24), 0.48: (11, 23), 0.5: (11, 22), 0.52: (11, 21),
    0.57: (12, 21), 0.6: (12, 20), 0.68: (13, 19), 0.72: (13, 18), 0.78: (14, 18), 0.82: (14, 17),
    0.88: (15, 17), 0.94: (15, 16), 1.0: (16, 16), 1.07: (16, 15), 1.13: (17, 15), 1.21: (17, 14),
    1.29: (18, 14), 1.38: (18, 13), 1.46: (19, 13), 1.67: (20, 12), 1.75: (21, 12), 2.0: (22, 11),
    2.09: (23, 11), 2.4: (24, 10), 2.5: (25, 10), 2.89: (26, 9), 3.0: (27, 9), 3.11: (28, 9),
    3.62: (29, 8), 3.75: (30, 8), 3.88: (31, 8), 4.0: (32, 8),
}

# The 2880 table has keys and sizes of its own, in steps of 64 px.
_SHAPES_2880 = {
    0.25: (22, 90), 0.26: (22, 87), 0.27: (22, 84), 0.28: (22, 81), 0.32: (25, 78), 0.33: (25, 75),
    0.34: (25, 73), 0.4: (28, 70), 0.42: (28, 67), 0.47: (30, 64), 0.49: (30, 61), 0.51: (30, 59),
    0.55: (33, 60), 0.59: (33, 56), 0.68: (36, 53), 0.72: (36, 50), 0.78: (39, 50), 0.83: (39, 47),
    0.89: (42, 47), 0.93: (42, 45), 1.0: (45, 45), 1.07: (45, 42), 1.12: (47, 42), 1.21: (47, 39),
    1.28: (50, 39), 1.39: (50, 36), 1.47: (53, 36), 1.7: (56, 33), 1.82: (60, 33), 2.03: (61, 30),
    2.13: (64, 30), 2.39: (67, 28), 2.5: (70, 28), 2.92: (73, 25), 3.0: (75, 25), 3.12: (78, 25),
    3.68: (81, 22), 3.82: (84, 22), 3.95: (87, 22), 4.0: (90, 22),
}

Bins = dict[float, tuple[int, int]]


def _in_pixels(shapes: Bins, step: int) -> Bins:
    return {ratio: (height * step, width * step) for ratio, (height, width) in shapes.items()}


ASPECT_RATIO_BINS: dict[int, Bins] = {
    **{base: _in_pixels(_SHAPES, base // 16) for base in (256, 512, 1024, 2048)},
    2880: _in_pixels(_SHAPES_2880, 64),
}
"""Base resolution -> {h/w: (height, width) in pixels}, 40 bins each, wide to tall."""

MAX_SIDE = 16384


def nearest_bin(
    base: int,
    height: int | None = None,
    width: int | None = None,
    ratio: float | None = None,
) -> tuple[int, int]:
    """The trained (height, width) in pixels whose aspect ratio is nearest to the one wanted.

    `base` is the model's training size (256, 512, 1024, 2048 or 2880); the shape is given by
    `height` and `width` or by `ratio` = height / width. Nearest is the smallest |key - ratio|, as
    the published scripts choose. Raises ValueError for an unknown base, for sizes that are not
    1 to 16384 px, for a ratio that is not positive, and when both or neither are given.
    """
    if base not in ASPECT_RATIO_BINS:
        raise ValueError(f"base resolution is {base}; there are bins for "
                         f"{', '.join(map(str, ASPECT_RATIO_BINS))}")
    sides = {"height": height, "width": width}
    given = [name for name, side in sides.items() if side is not None]
    if ratio is not None and given:
        raise ValueError(f"both ratio and {' and '.join(given)} are given; give one of the two")
    if ratio is None:
        if len(given) != 2:
            raise ValueError("give height and width, or ratio (height / width)")
        for name, side in sides.items():
            if not 1 <= side <= MAX_SIDE:
                raise ValueError(f"{name} is {side} px; use 1 to {MAX_SIDE}")
        ratio = height / width
    if not 0 < ratio < float("inf"):
        raise ValueError(f"ratio is {ratio}; height / width must be a positive number")
    bins = ASPECT_RATIO_BINS[base]
    return bins[min(bins, key=lambda key: abs(key - ratio))]
