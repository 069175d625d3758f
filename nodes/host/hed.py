"""The HED edge detector on the host's device, one image and one tile after the other."""

from __future__ import annotations

import functools
import logging

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...pixart_core.memory import reworded
from ...pixart_core.model.hed import STRIDE, HEDDetector, read_hed, spans
from .files import fingerprint
from .memory import is_out_of_memory, of_edges

logger = logging.getLogger(__name__)

AUTO = 0
AUTO_ABOVE = 2048
TILES = (1024, 512, 256)  # what is tried when memory does not suffice; the first is for AUTO


def check_hed(path: str) -> None:
    """Raise CheckpointError when `path` is no HED edge detector; reads headers only."""
    _check_once(path, fingerprint(path))


@functools.lru_cache(maxsize=32)
def _check_once(path: str, _fingerprint: str) -> None:
    read_hed(path)


def require_tile(tile: int) -> None:
    """Raise ValueError unless `tile` is 0 (automatic) or a size that the detector can work in."""
    if tile != AUTO:
        spans(STRIDE, tile)


def detect_edges(path: str, images: Tensor, tile: int = AUTO) -> Tensor:
    """Edges (B, H, W, 1) in 0..1, float32 on the CPU, of RGB images (B, H, W, 3) in 0..1.

    The detector is on the host's device for the time of this call. `tile` 0 takes tiles for images
    of more than 2048 pixels; where memory runs out, smaller ones are tried down to 256. Raises
    CheckpointError as `HEDDetector.from_path` does, and the host's interrupt between tiles.
    """
    management = comfy.model_management
    require_tile(tile)
    longest = max(images.shape[1:3])
    if tile == AUTO:
        tile = TILES[0] if longest > AUTO_ABOVE else -(-longest // STRIDE) * STRIDE
        tile = max(tile, TILES[-1])
    device = management.get_torch_device()
    management.free_memory(_memory_needed(images, tile), device)
    detector = HEDDetector.from_path(path, dtype=torch.float32, device=device)

    bar = comfy.utils.ProgressBar(len(images))
    edges: list[Tensor] = []

    def progress(done: int, tiles: int) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(len(edges) * tiles + done, len(images) * tiles)

    while len(edges) < len(images):
        image = images[len(edges)].movedim(-1, 0)[None].float().cpu()
        try:
            edges.append(detector(image, tile, progress)[0].movedim(0, -1))
            continue
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            smaller = next((size for size in TILES if size < min(tile, longest)), None)
            if smaller is None:
                raise reworded(error, *of_edges(*images.shape[1:3], tile)) from error
        # past the handler, which holds on to what the failed try had made
        logger.warning("not enough memory for HED edges in tiles of %d pixels, now in tiles of %d",
                       min(tile, longest), smaller)
        tile = smaller
        management.soft_empty_cache()
    return torch.stack(edges)


def to_image(values: Tensor) -> Tensor:
    """Values (B, H, W, 1) as an IMAGE of three equal channels, where and as the host wants it."""
    management = comfy.model_management
    dtype = getattr(management, "intermediate_dtype", lambda: torch.float32)()
    return values.repeat(1, 1, 1, 3).to(management.intermediate_device(), dtype)


def _memory_needed(images: Tensor, tile: int) -> float:
    """Bytes: the weights, and three times the largest features (64 channels) of a tile."""
    height, width = (min(size, tile) for size in images.shape[1:3])
    weights = sum(p.numel() for p in HEDDetector(device="meta").parameters())
    return 4 * (weights + 3 * 64 * height * width)
