"""What a training step is given: encoded pictures and captions, all of one size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of one aspect-ratio bucket, as a cache stores them.

    Attributes:
        numbers: place of each sample in the whole run, over all processes; seeds its noise.
        latents: (B, 4, h, w) model latents, float32, about unit deviation.
        caption: (B, L, D) T5 states, float32, padded with zeros.
        mask: (B, L) bool, true where a token is valid.
        image_size: (B, 2) height and width in pixels, float32.
        aspect_ratio: (B, 1) height over width, float32.
        control: (B, 4, h, w) latents of the control images, None where the cache has none.
        texts: the captions.
    """

    numbers: tuple[int, ...]
    latents: Tensor
    caption: Tensor
    mask: Tensor
    image_size: Tensor
    aspect_ratio: Tensor
    control: Tensor | None
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        moved = {name: getattr(self, name).to(device, non_blocking=True)
                 for name in ("latents", "caption", "mask", "image_size", "aspect_ratio")}
        if self.control is not None:
            moved["control"] = self.control.to(device, non_blocking=True)
        return replace(self, **moved)


@dataclass(frozen=True)
class Conditions:
    """What a transformer is told beside the noisy latents, in the names of its `forward`."""

    caption: Tensor
    caption_mask: Tensor
    image_size: Tensor | None
    aspect_ratio: Tensor | None

    def arguments(self) -> dict[str, Tensor | None]:
        return dict(vars(self))


@dataclass(frozen=True)
class NullCaption:
    """The caption of "nothing": T5 states (L, D) and, for T5(""), the mask (L,) of its tokens.

    `mask` None is the learned null caption of the released files: it takes the place of the
    states and leaves the prompt's own mask, as the released code trains and samples with it.
    """

    states: Tensor
    mask: Tensor | None

    def replace(self, caption: Tensor, mask: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Captions (B, L, D) and masks (B, L) with those of `rows` (B,) bool made null.

        Both grow where the null caption is longer than the batch's captions.
        """
        length = caption.shape[1] if self.mask is None else max(caption.shape[1], len(self.mask))
        caption, mask = _padded(caption, length), _padded(mask, length)
        states = _padded(self.states[None, :length].to(caption), length)
        caption = torch.where(rows[:, None, None], states, caption)
        if self.mask is not None:
            own = _padded(self.mask[None].to(mask), length)
            mask = torch.where(rows[:, None], own, mask)
        return caption, mask


def _padded(x: Tensor, length: int) -> Tensor:
    """(B, L, ...) grown with zeros to (B, length, ...)."""
    missing = length - x.shape[1]
    return x if missing <= 0 else torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], dim=1)
