"""What the pipeline was doing when memory ran out, and what helps there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .memory import Description, gigabytes, weight_bytes
from .quant import PackedWeight

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .settings import Settings
    from .text import T5TextEncoder

_SMALL_T5 = "T5 from a smaller file: GGUF in Q8_0 is 5 GB for T5 XXL"
_NO_T5 = "captions from `pixart encode` (--embeddings, --negative-embeddings) in place of T5"
_GGUF = "a GGUF file of it (pixart convert IN OUT.gguf): half of 16 bits in Q8_0"
_OTHER_PROGRAMS = "closing other programs that use the same memory"


def of_loading() -> Description:
    """Loading the models of a pipeline."""
    return "loading the models", [f"{_NO_T5}, the largest of them", _SMALL_T5,
                                  "dtype bfloat16 or float16 in place of float32",
                                  f"for the transformer {_GGUF}", _OTHER_PROGRAMS]


def of_encoding(encoder: T5TextEncoder) -> Description:
    """T5 with one prompt."""
    size = gigabytes(weight_bytes(encoder.model))
    return f"the text encoder ({size} of weights)", [_NO_T5, _SMALL_T5, _OTHER_PROGRAMS]


def of_drawing(pipeline: Pipeline, settings: Settings, pictures: int, guided: bool,
               controls: int) -> Description:
    """A call of the transformer for so many pictures, twice as many rows where guided."""
    network, config = pipeline.transformer, pipeline.config
    weights = network.x_embedder.proj.weight
    parts = [_pictures(settings, pictures), "with and without the prompt at once" * guided,
             str(weights.dtype).removeprefix("torch."),
             f"{gigabytes(weight_bytes(network))} of weights", "a ControlNet" * bool(controls)]
    hints = []
    if pictures > 1:
        hints.append(f"fewer prompts at once than {pictures}")
    hints.append(_smaller(settings, config.image_size))
    if pipeline.encoder is not None:
        size = gigabytes(weight_bytes(pipeline.encoder.model))
        hints.append(f"{_NO_T5}, which keeps {size} on the same device; or {_SMALL_T5}")
    if weights.dtype == torch.float32:
        hints.append("dtype bfloat16 or float16 in place of float32")
    if not any(isinstance(layer, PackedWeight) for layer in network.modules()):
        hints.append(f"for the transformer {_GGUF}")
    return (f"the PixArt-{config.variant} transformer ({', '.join(filter(None, parts))})",
            [*hints, _OTHER_PROGRAMS])


def of_decoding(pipeline: Pipeline, settings: Settings, pictures: int) -> Description:
    """The VAE making pictures of latents."""
    hints = [f"fewer prompts at once than {pictures}"] if pictures > 1 else []
    if not pipeline.vae.network.use_tiling:
        hints.append("vae.enable_tiling() of the pipeline, in Python: tiles of 512 px")
    hints.append(_smaller(settings, pipeline.config.image_size))
    if pipeline.encoder is not None:
        hints.append(_NO_T5)
    return f"the VAE ({_pictures(settings, pictures)})", [*hints, _OTHER_PROGRAMS]


def _pictures(settings: Settings, count: int) -> str:
    return f"{count} picture{'s' * (count > 1)} of {settings.width} x {settings.height} px"


def _smaller(settings: Settings, trained: int) -> str:
    large = trained**2 < settings.width * settings.height
    return (f"a smaller picture than {settings.width} x {settings.height} px"
            + f"; the model was trained at {trained} x {trained}" * large)
