"""HED, the edge detector whose pictures the PixArt-delta ControlNet was trained on.

Holistically-nested edge detection (Xie and Tu, arXiv 1504.06375) as PixArt-delta uses it: five
stages of 3x3 convolutions, halved in size from one to the next; a side map of logits from each;
their mean, at the picture's size, through a sigmoid. Edges are white on black.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checkpoint.identify import require_kind
from ..checkpoint.read import CheckpointError, read_checkpoint, unwrap_state_dict
from ..load import Source, check_weights, require_finite

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = (2, 2, 3, 3, 3)
STRIDE = 16  # pixels from one cell of the last stage to the next
# A cell of stage 5 sees 196 pixels: the 16 it stands for and, to each side, 3 convolutions of
# stage 5, 3 of stage 4, 3, 2 and 2 of the others: 3 * 16 + 3 * 8 + 3 * 4 + 2 * 2 + 2 = 90.
OVERLAP = 96  # the next multiple of STRIDE, so that the 2x2 pools of a tile fall where they would
MIN_TILE = 256

_FIRST = "block1.convs.0.weight"

Progress = Callable[[int, int], None]


class HEDStage(nn.Module):
    """3x3 convolutions with ReLU, and the 1x1 projection to this stage's side map."""

    def __init__(self, channels: int, width: int, convolutions: int,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None,
                 ) -> None:
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.convs = nn.ModuleList(nn.Conv2d(channels if i == 0 else width, width, 3, padding=1,
                                             **place) for i in range(convolutions))
        self.projection = nn.Conv2d(width, 1, 1, **place)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> features (B, width, H, W) and side map (B, 1, H, W)."""
        for conv in self.convs:
            x = functional.relu(conv(x), inplace=True)
        return x, self.projection(x)


class HEDDetector(nn.Module):
    """Edges of pictures, white on black: (B, 3, H, W) in 0..1 -> (B, 1, H, W) in 0..1.

    Parameter names are those of the released `ControlNetHED.pth`. The maps and the result are
    float32 (float64 for a float64 network) whatever the weights are, and lie on the image's
    device; the network may be on another one, to which it takes one tile at a time.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, dtype: torch.dtype | None = None,
                 device: torch.device | str | None = None) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        # colours are up to 255 and the offset about 120: 16 bits would move both
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1, dtype=_wide(dtype), device=device))
        for i, (width, convolutions) in enumerate(zip(widths, CONVOLUTIONS, strict=True)):
            stage = HEDStage(3 if i == 0 else widths[i - 1], width, convolutions, dtype, device)
            setattr(self, f"block{i + 1}", stage)

    @classmethod
    def from_path(cls, path_or_state_dict: Source, dtype: torch.dtype | None = None,
                  device: torch.device | str | None = None) -> HEDDetector:
        """A detector in eval mode, without gradients, from anything `open_hed` takes.

        `dtype` None is float32, as the official detector computes from a file of any dtype.
        Raises as `open_hed` does.
        """
        weights = open_hed(path_or_state_dict)
        detector = cls(_widths(weights), dtype or torch.float32, device="meta")
        detector.load_state_dict(
            {name: weights[name].to(device=device, dtype=tensor.dtype)
             for name, tensor in detector.state_dict().items()}, assign=True)
        return detector.eval().requires_grad_(False)

    @property
    def stages(self) -> list[HEDStage]:
        return [getattr(self, f"block{i + 1}") for i in range(len(CONVOLUTIONS))]

    def forward(self, image: Tensor, tile: int | None = None,
                progress: Progress | None = None) -> Tensor:
        """Edges (B, 1, H, W) in 0..1 of an image (B, 3, H, W) in 0..1; see `side_outputs`."""
        height, width = image.shape[-2:]
        sides = self.side_outputs(image, tile, progress)
        return merge(sides, sides[0].shape[-2:])[..., :height, :width]

    def side_outputs(self, image: Tensor, tile: int | None = None,
                     progress: Progress | None = None) -> list[Tensor]:
        """The five maps of logits (B, 1, H/2^n, W/2^n), n = 0..4, rounded down.

        An image of fewer than 16 pixels in a direction has no fifth map: its last row or column
        is repeated up to 16 first, and the maps are those of that larger image.

        With `tile`, a multiple of 16 from 256 on, the network sees squares of at most that many
        pixels, so that its memory is that of a tile whatever the image; the maps of one channel
        are put together from them. Tiles begin at multiples of 16 and overlap by more than the
        receptive field, and zeros surround the whole image only: every value of every map is
        computed from the same pixels as without tiles, and differs by rounding alone. So does the
        edge map, which is resized from whole maps.

        `progress` is called as progress(tiles done, tiles) after each one; what it raises ends
        the run. Raises ValueError for an image or a tile that is not as said.
        """
        _check_image(image)
        height, width = (max(size, STRIDE) for size in image.shape[-2:])
        image = functional.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]),
                               mode="replicate")
        maps = [torch.empty(image.shape[0], 1, height >> n, width >> n, dtype=self.norm.dtype,
                            device=image.device) for n in range(len(CONVOLUTIONS))]
        tiles = [(rows, columns) for rows in spans(height, tile) for columns in spans(width, tile)]
        for done, (rows, columns) in enumerate(tiles, 1):
            sides = self.side_maps(image[..., rows.seen, columns.seen])
            for n, side in enumerate(sides):
                maps[n][..., rows.kept(n), columns.kept(n)] = side[
                    ..., rows.within(n), columns.within(n)].to(maps[n])
            if progress is not None:
                progress(done, len(tiles))
        return maps

    def side_maps(self, image: Tensor) -> list[Tensor]:
        """`side_outputs` of an image that is large enough, whole, in the network's dtype."""
        x = image.to(self.norm) * 255 - self.norm
        x = x.to(self.block1.projection.weight.dtype)
        maps = []
        for i, stage in enumerate(self.stages):
            if i > 0:
                x = functional.max_pool2d(x, 2)
            x, side = stage(x)
            maps.append(side)
        return maps


class Span(NamedTuple):
    """A tile in one direction: it is the authority on start..stop and sees low..high."""

    start: int
    stop: int
    low: int
    high: int

    @property
    def seen(self) -> slice:
        return slice(self.low, self.high)

    def kept(self, n: int) -> slice:
        """Where its cells go in the whole map that was halved `n` times."""
        return slice(self.start >> n, self.stop >> n)

    def within(self, n: int) -> slice:
        """The same cells in the tile's own map."""
        return slice(self.start - self.low >> n, self.stop - self.low >> n)


def spans(length: int, tile: int | None) -> list[Span]:
    """Tiles of at most `tile` pixels, about equal, that cover `length`; one where it fits."""
    if tile is not None and (tile < MIN_TILE or tile % STRIDE):
        raise ValueError(f"tile is {tile}; a multiple of {STRIDE} from {MIN_TILE} on was expected")
    if tile is None or length <= tile:
        return [Span(0, length, 0, length)]
    count = -(-length // (tile - 2 * OVERLAP))
    step = -(-length // (count * STRIDE)) * STRIDE
    return [Span(start, min(start + step, length),
                 max(start - OVERLAP, 0), min(start + step + OVERLAP, length))
            for start in range(0, length, step)]


def merge(sides: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Edges (B, 1, H, W) in 0..1 from maps of logits, each resized to `size` (H, W)."""
    total = torch.zeros_like(sides[0])
    for side in sides:
        total += functional.interpolate(side, size=tuple(size), mode="bilinear",
                                        align_corners=False)
    return (total / len(sides)).sigmoid()


def open_hed(path_or_state_dict: Source) -> dict[str, Tensor]:
    """The checked tensors of a HED detector, named as in `ControlNetHED.pth`.

    Takes a file or a state dict. What training or a pipeline put in front of every name
    (`module.`, `netNetwork.`) is removed; widths are read from the shapes. Raises CheckpointError
    for unreadable files, other kinds of models, and weights that are missing, left over, of the
    wrong shape or type, or not finite.
    """
    weights, source = read_hed(path_or_state_dict)
    for name, tensor in weights.items():
        require_finite(name, tensor, source)
    return weights


def read_hed(path_or_state_dict: Source) -> tuple[dict[str, Tensor], str]:
    """What `open_hed` takes, with names, shapes and types checked but no value looked at."""
    if isinstance(path_or_state_dict, Mapping):
        source = "the state dict"
        weights = unwrap_state_dict(path_or_state_dict, source)
    else:
        checkpoint = read_checkpoint(path_or_state_dict)
        source, weights = checkpoint.path.name, checkpoint.state_dict
    first = next((name for name in weights if name.endswith(_FIRST)), "")
    prefix = first.removesuffix(_FIRST)
    if all(name.startswith(prefix) for name in weights):
        weights = {name[len(prefix):]: tensor for name, tensor in weights.items()}
    require_kind(weights, ("hed",), source)
    check_weights(weights, HEDDetector(_widths(weights), device="meta").state_dict(), source)
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{source}: {name} is {tensor.dtype}; floating weights were "
                                  "expected")
    return weights, source


def _widths(weights: Mapping[str, Tensor]) -> list[int]:
    """Channels of each stage; the released ones where a weight is missing."""
    biases = [weights.get(f"block{i + 1}.convs.0.bias") for i in range(len(WIDTHS))]
    return [usual if bias is None else max(bias.numel(), 1)
            for usual, bias in zip(WIDTHS, biases, strict=True)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_image(image: Tensor) -> None:
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
        raise ValueError(f"the image is {tuple(image.shape)}; (B, 3, H, W) was expected")
    if not image.is_floating_point():
        raise ValueError(f"the image is {image.dtype}; floating values in 0..1 were expected")
