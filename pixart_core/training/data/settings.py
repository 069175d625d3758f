"""What a cache is made with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...config import LATENT_SCALE, MAX_TOKENS, VARIANTS, Variant
from ...resolution import Bins
from .buckets import bucket_table
from .index import CONTROLS, CacheFacts, ControlKind

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

StoredDtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What `build_cache` is told.

    Attributes:
        variant: alpha or sigma: whose latents.
        image_size: in pixels, of a square picture; other shapes have about as many pixels.
        max_tokens: of a caption; None for the variant's 120 or 300.
        control: "hed" finds edges, "folder" takes the control images of the folder.
        dtype: what latents and captions are stored in.
        clean_caption: clean captions as the released models' were.
        multiple, max_ratio: of the buckets, see `bucket_table`.
        max_upscale: pictures that would have to grow by more than this factor are left out; None
            takes them and says how many grow.
        batch_size: pictures per pass of the VAE.
        shard_rows, shard_bytes: a shard ends at either.
        low_memory: T5 and VAE take turns on the device.
        device: where they work; None for where they are.
        skip_bad: go on without rows that cannot be used.
        verify: read every finished shard of an earlier run, to make damaged ones again.
        workers: threads that read pictures.
        vae_sha256, t5_sha256, hed_sha256: of the files, kept so that a later run can compare.
    """

    variant: Variant
    image_size: int
    max_tokens: int | None = None
    control: ControlKind = "none"
    dtype: StoredDtype = "float16"
    clean_caption: bool = True
    multiple: int | None = None
    max_ratio: float = 4.0
    max_upscale: float | None = None
    batch_size: int = 8
    shard_rows: int = 1024
    shard_bytes: int = 1 << 28
    low_memory: bool = False
    device: torch.device | str | None = None
    skip_bad: bool = False
    verify: bool = True
    workers: int = 4
    vae_sha256: str | None = None
    t5_sha256: str | None = None
    hed_sha256: str | None = None

    def __post_init__(self) -> None:
        for name, choices in (("variant", VARIANTS), ("control", CONTROLS),
                              ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of "
                                 f"{', '.join(choices)}")
        for name in ("batch_size", "shard_rows", "shard_bytes", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; use 1 or more")
        if self.max_upscale is not None and not self.max_upscale >= 1:
            raise ValueError(f"max_upscale is {self.max_upscale}; use 1 (pictures never grow) or "
                             "more")
        self.bins()

    @property
    def tokens(self) -> int:
        """Tokens of a caption at most."""
        return self.max_tokens or MAX_TOKENS[self.variant]

    def bins(self) -> Bins:
        return bucket_table(self.image_size, self.multiple, self.max_ratio)

    def facts(self, caption_channels: int) -> CacheFacts:
        """What the index says of a cache that these settings make."""
        return CacheFacts(
            variant=self.variant, latent_scale=LATENT_SCALE[self.variant],
            image_size=self.image_size, buckets=tuple(sorted(set(self.bins().values()))),
            caption_channels=caption_channels, max_tokens=self.tokens,
            clean_caption=self.clean_caption, dtype=self.dtype, control=self.control,
            max_upscale=self.max_upscale, vae_sha256=self.vae_sha256,
            t5_sha256=self.t5_sha256,
            hed_sha256=self.hed_sha256 if self.control == "hed" else None)
