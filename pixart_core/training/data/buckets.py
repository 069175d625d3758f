"""Which size a picture is trained at: the aspect-ratio buckets of an image size."""

from __future__ import annotations

from ...resolution import ASPECT_RATIO_BINS, Bins

SMALLEST_STEP = 16  # pixels of one token: the VAE halves three times, patches once more
_WIDEST = 4.0


def bucket_table(image_size: int, multiple: int | None = None, max_ratio: float = _WIDEST) -> Bins:
    """{h/w: (height, width) in pixels} of about image_size^2 pixels each.

    The published table where there is one (256, 512, 1024, 2048, 2880); otherwise, and where
    `multiple` is given, every shape whose sides are multiples of it (32 px; 16 px below 256).
    `max_ratio` keeps the shapes whose longer side is at most that many times the shorter one.
    Raises ValueError for sizes that give no shape.
    """
    if not 1 <= max_ratio <= _WIDEST:
        raise ValueError(f"max_ratio is {max_ratio}; use 1 (squares) to {_WIDEST:g}")
    if multiple is not None and (multiple < SMALLEST_STEP or multiple % SMALLEST_STEP):
        raise ValueError(f"multiple is {multiple}; use a multiple of {SMALLEST_STEP} px")
    if multiple is None and image_size in ASPECT_RATIO_BINS:
        table = ASPECT_RATIO_BINS[image_size]
    else:
        table = _computed(image_size, multiple or (32 if image_size >= 256 else SMALLEST_STEP))
    return {key: size for key, size in table.items()
            if max(size) <= max_ratio * min(size) * (1 + 1e-9)}


def nearest_bucket(table: Bins, height: int, width: int) -> tuple[int, int]:
    """The shape whose key is nearest to height / width, as the published scripts choose."""
    ratio = height / width
    return table[min(table, key=lambda key: abs(key - ratio))]


def _computed(image_size: int, step: int) -> Bins:
    if image_size < step or image_size % step:
        raise ValueError(f"image_size is {image_size}; use a multiple of {step} px")
    side = image_size // step
    shapes = {(rows, round(side * side / rows)) for rows in range(max(1, side // 2), 2 * side + 1)}
    shapes |= {(columns, rows) for rows, columns in shapes}  # every shape lying and standing
    return {rows / columns: (rows * step, columns * step) for rows, columns in sorted(shapes)
            if max(rows, columns) <= _WIDEST * min(rows, columns)}
