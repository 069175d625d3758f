"""What a PixArt transformer is made of: one frozen dataclass, one table of released models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Variant = Literal["alpha", "sigma"]
Sampling = Literal["conv", "ave", "uniform"]

METADATA_KEY = "pixart_config"
VARIANTS: tuple[Variant, ...] = ("alpha", "sigma")
KV_SAMPLINGS: tuple[Sampling, ...] = ("conv", "ave", "uniform")
LATENT_SCALE: dict[Variant, float] = {"alpha": 0.18215, "sigma": 0.13025}
MAX_TOKENS: dict[Variant, int] = {"alpha": 120, "sigma": 300}


@dataclass(frozen=True)
class KVCompression:
    """Key/value token compression of PixArt-Sigma (arXiv 2403.04692, section 3.3).

    `sampling` is how the (h, w) token grid of k and v shrinks: "conv" (depthwise convolution, then
    LayerNorm, both shared by k and v), "ave" (nearest neighbour, despite its published name) or
    "uniform" (every `factor`-th row and column). `layers` are the indices of the blocks that do so.
    """

    sampling: Sampling
    factor: int
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.sampling not in KV_SAMPLINGS:
            raise ValueError(f"kv_compression sampling is {self.sampling!r}; "
                             f"use one of {KV_SAMPLINGS}")
        if self.factor < 2:
            raise ValueError(f"kv_compression factor is {self.factor}; it must be 2 or more")
        object.__setattr__(self, "layers", tuple(sorted(int(i) for i in self.layers)))


@dataclass(frozen=True)
class PixArtConfig:
    """Every size and switch of a PixArt transformer; the defaults are PixArt-Sigma XL/2 at 1024 px.

    Positions run over [0, base_size / pe_interpolation) on each axis whatever the token count, so
    only that quotient (`position_range`) reaches the network. `image_size` is the training size in
    pixels, `distilled` says "lcm" or "dmd" for few-step students.
    """

    variant: Variant = "sigma"
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8
    mlp_hidden_size: int = 4608
    caption_channels: int = 4096
    max_tokens: int = 300
    image_size: int = 1024
    base_size: int = 64
    pe_interpolation: float = 2.0
    micro_conditioning: bool = False
    qk_norm: bool = False
    kv_compression: KVCompression | None = None
    distilled: str | None = None

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; use one of {VARIANTS}")
        if isinstance(self.kv_compression, Mapping):
            object.__setattr__(self, "kv_compression", KVCompression(**self.kv_compression))
        for name in ("hidden_size", "depth", "num_heads", "patch_size", "in_channels",
                     "out_channels", "mlp_hidden_size", "caption_channels", "max_tokens",
                     "base_size", "pe_interpolation", "image_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be positive")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be split into num_heads {self.num_heads}"
            )
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size is {self.hidden_size}; the 2-D position table needs a "
                             "multiple of 4")
        if self.micro_conditioning and self.hidden_size % 3:
            raise ValueError(f"hidden_size is {self.hidden_size}; size conditioning joins three "
                             "thirds of it: use a multiple of 12, or micro_conditioning false")
        if self.kv_compression and max(self.kv_compression.layers, default=0) >= self.depth:
            raise ValueError(f"kv_compression layers {self.kv_compression.layers} go past the last "
                             f"block, {self.depth - 1}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def position_range(self) -> float:
        """End of the position axis: 32 for every released model except PixArt-alpha 256 (16)."""
        return self.base_size / self.pe_interpolation

    @property
    def latent_scale(self) -> float:
        """Factor from VAE latents to model latents: SD's VAE for alpha, SDXL's for sigma."""
        return LATENT_SCALE[self.variant]

    def replace(self, **fields: Any) -> PixArtConfig:
        """A copy with `fields` changed; raises ValueError for a name that is not a field."""
        unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            known = ", ".join(f.name for f in dataclasses.fields(self))
            raise ValueError(f"unknown config field {', '.join(unknown)}; the fields are {known}")
        return dataclasses.replace(self, **fields)

    def to_json(self) -> str:
        """The JSON that stands under `pixart_config` in the header of every file we write."""
        return _to_json(self)


@dataclass(frozen=True)
class ControlNetConfig:
    """What a ControlNet-Transformer (arXiv 2401.05252, section 4) is made of.

    `depth` counts the copied blocks. `variant` and `image_size` say what it was trained for, None
    where the file does not tell; the network itself needs neither.
    """

    hidden_size: int = 1152
    depth: int = 13
    num_heads: int = 16
    mlp_hidden_size: int = 4608
    qk_norm: bool = False
    kv_compression: KVCompression | None = None
    variant: Variant | None = None
    image_size: int | None = None

    def to_json(self) -> str:
        """The JSON that stands under `pixart_config` in the header of every file we write."""
        return _to_json(self)


def _to_json(config: PixArtConfig | ControlNetConfig) -> str:
    return json.dumps({k: v for k, v in dataclasses.asdict(config).items() if v is not None})


def fields_from_metadata(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Config fields out of a safetensors header; {} where it carries none.

    Raises ValueError when the entry is there but is not a JSON object. Names that this version
    does not know are left out, so that files of later versions still load.
    """
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"metadata entry {METADATA_KEY!r} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"metadata entry {METADATA_KEY!r} holds {type(fields).__name__}, "
                         "a JSON object was expected")
    known = {f.name for f in dataclasses.fields(PixArtConfig)}
    return {name: value for name, value in fields.items() if name in known}


_ALPHA = PixArtConfig(variant="alpha", max_tokens=120)
_SIGMA = PixArtConfig()

PRESETS: dict[str, PixArtConfig] = {
    "alpha-256": _ALPHA.replace(image_size=256, base_size=16, pe_interpolation=1.0),
    "alpha-512": _ALPHA.replace(image_size=512, base_size=32, pe_interpolation=1.0),
    "alpha-512-dmd": _ALPHA.replace(
        image_size=512, base_size=32, pe_interpolation=1.0, distilled="dmd"
    ),
    "alpha-1024": _ALPHA.replace(micro_conditioning=True),
    "delta-1024-lcm": _ALPHA.replace(micro_conditioning=True, distilled="lcm"),
    "sigma-256": _SIGMA.replace(image_size=256, base_size=16, pe_interpolation=0.5),
    "sigma-512": _SIGMA.replace(image_size=512, base_size=32, pe_interpolation=1.0),
    "sigma-1024": _SIGMA,
    "sigma-2k": _SIGMA.replace(image_size=2048, base_size=128, pe_interpolation=4.0),
    "sigma-1024-900m": _SIGMA.replace(depth=42),
}
