"""Curves and sample grids of a run: a JSON line for each report, and TensorBoard's own files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.header import CheckpointError
from ..extras import how_to_install
from ..whole import whole_file

logger = logging.getLogger(__name__)

_LINES = "curves.jsonl"


class Curves:
    """Writes under a run's folder; a run that goes on from `step` drops what came after it."""

    def __init__(self, out: Path, step: int) -> None:
        self.out = out
        path = out / _LINES
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
        with whole_file(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._board = _tensorboard(out, step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One point of every curve. Raises CheckpointError where it cannot be written."""
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self.out / _LINES} could not be written at step {step}: {error}. Make room and "
                "start again with the same out folder to go on from the last checkpoint") from error
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def pictures(self, step: int, images: Tensor | None) -> None:
        """A grid of samples (B, 3, H, W) in 0..1, as samples/step-N.png and in TensorBoard."""
        if images is None:
            return
        from PIL import Image

        picture = grid(images)
        pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:08d}.png"
        with whole_file(path) as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG")
        if self._board is not None:
            self._board.add_image("samples", picture, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_curves(out: Path) -> list[dict[str, float]]:
    """The points of a run's curves, in the order of its steps."""
    return [json.loads(line) for line in _lines(Path(out) / _LINES)]


def grid(images: Tensor, columns: int = 4, gap: int = 2) -> Tensor:
    """(B, 3, H, W) as one picture (3, rows, columns) with grey lines between."""
    count, _, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    out = torch.full((3, rows * (height + gap) + gap, columns * (width + gap) + gap), 0.5)
    for i, image in enumerate(images.float().cpu()):
        top, left = (gap + n * (side + gap) for n, side in
                     zip(divmod(i, columns), (height, width), strict=True))
        out[:, top:top + height, left:left + width] = image
    return out


def _lines(path: Path) -> list[str]:
    """The whole lines of a file; one that a crash cut off is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def _tensorboard(out: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("curves go to %s only; for TensorBoard %s", _LINES, how_to_install("train"))
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)
