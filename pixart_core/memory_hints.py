"""What the pipeline was doing when memory ran out, and what helps there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .memory import Description, gigabytes, weight_bytes
from .quant import PackedWeight

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .settings import Settings
    from .text import LazyT5, T5TextEncoder

_SMALL_T5 = ("T5 in fewer bits (--t5-precision, t5_precision): T5 XXL is 5 GB in int8, 3 GB in "
             "int4; or from a GGUF file, 5 GB in Q8_0")
_NO_T5 = "captions from `pixart encode` (--embeddings, --negative-embeddings) in place of T5"
_SMALL = "a quantised file of it (pixart quantize IN OUT --method int8 or svdquant)"
_OTHER_PROGRAMS = "closing other programs that use the same memory"


def of_loading() -> Description:
    """Loading the models of a pipeline."""
    return "loading the models", [f"{_NO_T5}, the largest of them", _SMALL_T5,
                                  "dtype bfloat16 or float16 in place of float32",
                                  f"for the transformer {_SMALL}", _OTHER_PROGRAMS]


def of_encoding(encoder: T5TextEncoder | LazyT5) -> Description:
    """T5 with one prompt, or on its way into memory."""
    held = _held(encoder)
    running = (f"the text encoder ({gigabytes(held)} of weights)" if held
               else "loading the text encoder")
    return running, [_NO_T5, _SMALL_T5, _OTHER_PROGRAMS]


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
    if held := _held(pipeline.encoder):
        hints.append(f"{_NO_T5}, which keeps {gigabytes(held)} on the same device; or "
                     f"keep_t5=False, so that it leaves memory before; or {_SMALL_T5}")
    if weights.dtype == torch.float32:
        hints.append("dtype bfloat16 or float16 in place of float32")
    if not any(isinstance(layer, PackedWeight) for layer in network.modules()):
        hints.append(f"for the transformer {_SMALL}")
    return (f"the PixArt-{config.variant} transformer ({', '.join(filter(None, parts))})",
            [*hints, _OTHER_PROGRAMS])


def of_decoding(pipeline: Pipeline, settings: Settings, pictures: int) -> Description:
    """The VAE making pictures of latents."""
    hints = [f"fewer prompts at once than {pictures}"] if pictures > 1 else []
    if not pipeline.vae.network.use_tiling:
        hints.append("vae.enable_tiling() of the pipeline, in Python: tiles of 512 px")
    hints.append(_smaller(settings, pipeline.config.image_size))
    if _held(pipeline.encoder):
        hints.append(_NO_T5)
    return f"the VAE ({_pictures(settings, pictures)})", [*hints, _OTHER_PROGRAMS]


def _held(encoder: T5TextEncoder | LazyT5 | None) -> int:
    """Bytes of the text encoder, 0 where none is in memory."""
    from .text.lazy import loaded_encoder

    loaded = loaded_encoder(encoder)
    return 0 if loaded is None else weight_bytes(loaded.model)


def _pictures(settings: Settings, count: int) -> str:
    return f"{count} picture{'s' * (count > 1)} of {settings.width} x {settings.height} px"


def _smaller(settings: Settings, trained: int) -> str:
    large = trained**2 < settings.width * settings.height
    return (f"a smaller picture than {settings.width} x {settings.height} px"
            + f"; the model was trained at {trained} x {trained}" * large)
