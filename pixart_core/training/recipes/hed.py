"""Train a small HED edge detector (arXiv 1504.06375) on scenes: for the starter family."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.write import write_checkpoint
from ...model.hed import HEDDetector
from ..draws import Draws
from ..edges_data import Outlined, OutlinedScenes
from ..recipe import Losses, Recipe, Samples
from ..settings import RunSettings

_MEAN = 120.0  # of a colour channel in 0..255
_RARE = -2.0  # logit to start from: few pixels are edges


@dataclass(frozen=True, kw_only=True)
class HEDSettings(RunSettings):
    """Attributes beside those of every run:

    image_size: of the pictures, in pixels.
    widths: channels of the five stages; the released network has 64, 128, 256, 512 and 512.
    side_weight: of each side output's loss beside that of the merged map.
    """

    image_size: int = 64
    widths: tuple[int, ...] = (20, 24, 24, 32, 32)
    side_weight: float = 0.05


class Edges(nn.Module):
    """The detector's side outputs as one `forward`."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.detector = HEDDetector(widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Pictures (B, 3, H, W) in 0..1 -> five maps of logits, each half the size before."""
        return self.detector.side_maps(images)


class HED(Recipe):
    """Cross-entropy of the merged map, and of every side map against the largest edge it covers."""

    name = "hed"
    settings: HEDSettings

    def __init__(self, settings: HEDSettings, samples: Samples | None = None) -> None:
        self.settings = settings
        self.samples = samples or OutlinedScenes(settings.image_size, settings.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.trained = Edges(settings.widths)
            _initialize(self.trained.detector)

    def loss(self, trained: nn.Module, batch: Outlined, draws: Draws) -> Losses:
        sides = trained(batch.images)
        size = batch.edges.shape[-2:]
        merged = torch.stack([F.interpolate(side.float(), size, mode="bilinear",
                                            align_corners=False) for side in sides]).mean(0)
        whole = F.binary_cross_entropy_with_logits(merged, batch.edges, 1 + batch.edges)
        parts = sum(F.binary_cross_entropy_with_logits(
            side.float(), F.adaptive_max_pool2d(batch.edges, side.shape[-2:])) for side in sides)
        return Losses(whole + self.settings.side_weight * parts, {"merged": whole})

    def export(self, folder: Path) -> list[Path]:
        path = folder / "hed.safetensors"
        write_checkpoint(path, self.trained.detector.state_dict(), {})
        return [path]

    def sample(self, step: int) -> Tensor:
        """Pictures and, below them, the edges that are found."""
        batch = self.samples.batch(0, 4).to(next(self.trained.parameters()).device)
        return torch.cat([batch.images, self.trained.detector(batch.images).expand(-1, 3, -1, -1)])


@torch.no_grad()
def _initialize(detector: HEDDetector) -> None:
    detector.norm.fill_(_MEAN).requires_grad_(False)
    for name, parameter in detector.named_parameters():
        if name.endswith("projection.bias"):
            parameter.fill_(_RARE)
        elif name.endswith("projection.weight"):
            parameter.normal_(0, 0.05)
        elif name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 4 and name != "norm":
            nn.init.kaiming_normal_(parameter)
    detector.block1.convs[0].weight.div_(70)  # its inputs are up to 135, not about 1
