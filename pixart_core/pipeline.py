"""From a prompt to a picture, without a host: T5, transformer, sampler, VAE."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from .captions import Captions, Embeddings
from .checkpoint.lora_apply import apply_loras
from .checkpoint.lora_layer import LoRA
from .control_image import fit_image
from .load import load_transformer
from .load_control import load_controlnet
from .memory import explained
from .memory_hints import of_decoding, of_drawing, of_loading
from .model import Control, PixArtControlNet, PixArtTransformer
from .model.controlnet import check_fit, mode_weights, trained_for_another
from .sampling import add_noise, sample_dmd, sample_dpm, sample_lcm, sample_sa, step_noise
from .settings import PIXELS_PER_LATENT, Settings
from .text.embeddings import CaptionRow, stack_rows
from .vae import LATENT_CHANNELS, VAE, load_vae

if TYPE_CHECKING:
    from PIL.Image import Image

    from .text import LazyT5, T5TextEncoder, TextCache

logger = logging.getLogger(__name__)

Callback = Callable[[int, int, Tensor], None]


class Pipeline:
    """The modules of one model family, each on the device it was put on.

    Make one with `from_files`, or from modules that are loaded already.
    """

    def __init__(self, transformer: PixArtTransformer, encoder: T5TextEncoder | LazyT5 | None,
                 vae: VAE, controlnet: PixArtControlNet | None = None) -> None:
        self.transformer = transformer
        self.encoder = encoder
        self.vae = vae
        self.controlnet = controlnet
        if controlnet is not None:
            check_fit(controlnet.config, transformer.config)
            warning = trained_for_another(controlnet.config, transformer.config)
            if warning:
                logger.warning("%s", warning)

    @classmethod
    @explained(of_loading)
    def from_files(
        cls,
        transformer: str | Path,
        t5: str | Path | None = None,
        vae: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tokenizer: str | Path | None = None,
        controlnet: str | Path | None = None,
        loras: Sequence[tuple[LoRA | str | Path, float]] = (),
        text_encoder: bool = True,
        t5_precision: str = "auto",
        keep_t5: bool = True,
        text_cache: str | Path | TextCache | None = None,
        **fields: Any,
    ) -> Pipeline:
        """Load transformer, T5 and VAE from files or folders; nothing is downloaded.

        `t5` and `vae` may be left out when `transformer` is a diffusers pipeline folder that holds
        them. `dtype` is what transformer and T5 compute in: float32 on the CPU and bfloat16
        elsewhere unless given; the VAE is always float32, for SDXL's overflows in float16.
        `device` is CUDA where there is one. `tokenizer` (a spiece.model, a tokenizer.json or a
        folder with one) is for T5 files that bring none. `controlnet` is a ControlNet for the
        transformer, which `generate` gives a control image. `loras` are files or PEFT folders, or
        what `read_lora` made of them, and their strengths, merged into the transformer one after
        the other. `text_encoder` False loads no T5, for pictures from saved embeddings.
        `t5_precision` is what the matrices of T5 are kept in, see `text.read_t5_as`: "auto",
        "bf16", "fp16", "fp8", "int8" or "int4". `keep_t5` False reads T5 when prompts are to be
        encoded and lets it leave memory before the first step. `text_cache`, a folder or a
        `text.TextCache`, keeps encoded prompts, so that one that was encoded before needs no T5;
        then, too, T5 is read at the first prompt that is not there. `fields` override the model's
        config (`num_heads=6`, `variant="alpha"`).

        Raises CheckpointError (a ValueError) for files that cannot be used, ValueError for
        missing ones, ImportError where diffusers is not installed.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        whole = (Path(transformer) / "model_index.json").is_file()
        for name, path in (("t5", t5 or not text_encoder), ("vae", vae)):
            if not path and not whole:
                raise ValueError(f"no {name} was given, and {Path(transformer).name} is not a "
                                 "diffusers pipeline folder that could hold one")
        model = load_transformer(transformer, dtype=dtype, device=device, **fields)
        apply_loras(model, loras)
        autoencoder = load_vae(vae or transformer, model.config.variant, device=device)
        encoder = None
        if text_encoder:
            encoder = _open_encoder(t5 or transformer, dtype, tokenizer, device, t5_precision,
                                    keep_t5, text_cache)
        if encoder is not None and encoder.caption_channels != model.config.caption_channels:
            raise ValueError(f"{Path(t5 or transformer).name} gives captions "
                             f"{encoder.caption_channels} wide, {Path(transformer).name} reads "
                             f"{model.config.caption_channels}; load the T5 that belongs to it")
        control = None
        if controlnet is not None:
            control = load_controlnet(controlnet, dtype=dtype, device=device, base=model.config)
        return cls(model, encoder, autoencoder, control)

    @property
    def config(self):
        """The transformer's PixArtConfig."""
        return self.transformer.config

    @overload
    def generate(self, prompt: str, **settings: Any) -> Image: ...
    @overload
    def generate(self, prompt: Sequence[str], **settings: Any) -> list[Image]: ...
    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        sampler: str = "auto",
        lcm_grid: str = "diffusers",
        strength: float = 1.0,
        image: Image | None = None,
        clean_caption: bool = True,
        max_tokens: int | None = None,
        control_image: Image | Sequence[Image] | None = None,
        control_strength: float = 1.0,
        control_mode: str = "balanced",
        control_start: float = 0.0,
        control_end: float = 1.0,
        control_cond_only: bool = False,
        callback: Callback | None = None,
        weights: bool = True,
        embeddings: Embeddings | None = None,
        negative_embeddings: Embeddings | None = None,
    ) -> Image | list[Image]:
        """Draw one picture per prompt: a PIL image for a string, a list for a list.

        Size in pixels (multiples of 8), steps, guidance, sampler and token limit are the model's
        own where not given: 20 steps of DPM-Solver++ ("dpm") at guidance 4.5, or 4 steps of LCM
        ("lcm") or one of DMD ("dmd") without guidance for a model distilled so; "sa-solver" is
        SA-Solver, 25 steps at guidance 3. Guidance above 1 runs the negative prompt (by default the
        empty one) beside the prompt, in one batch. `image` with `strength` below 1 starts from a
        picture, cropped and resized to the size. The noise is drawn on the CPU, so a seed gives the
        same picture as ComfyUI's KSampler with "dpmpp_2m" and "simple". `control_image` (white
        edges on black for the released ControlNets; one for all prompts, or a list with one for
        each) steers the part of the schedule from `control_start` to `control_end`, 0 to 1, where
        the pipeline has a ControlNet;
        `control_mode` as in `mode_weights`; `control_cond_only` leaves the negative half of
        guidance alone in any mode. `callback(step, total, denoised latents)` follows
        every step, from 1. `weights` obeys
        (word:1.2) in prompts. `embeddings` (a file of `save_embeddings`, or its entries) take the
        place of the prompt, which is "" then, and `negative_embeddings` that of the negative
        prompt: with both, no T5 is needed.

        Raises ValueError for settings that cannot be followed.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("no prompts were given; for the empty prompt pass [\"\"]")
        for name, text, other in (("prompt", prompt, embeddings),
                                  ("negative_prompt", negative_prompt, negative_embeddings)):
            if text and other is not None:
                raise ValueError(f"a {name} and embeddings in its place were given; leave one out")
        requests = [
            Settings(text, negative_prompt, height, width, steps, guidance, seed, sampler,
                     lcm_grid, strength, clean_caption, weights, max_tokens, control_strength,
                     control_mode, control_start, control_end, control_cond_only)
            for text in prompts
        ]
        pictures = self.run(requests[0].resolve(self.config), prompts, image, callback,
                            control_image, embeddings, negative_embeddings)
        return pictures[0] if isinstance(prompt, str) and len(pictures) == 1 else pictures

    @torch.inference_mode()
    def run(self, settings: Settings, prompts: list[str] | None = None,
            image: Image | None = None, callback: Callback | None = None,
            control_image: Image | Sequence[Image] | None = None,
            embeddings: Embeddings | None = None,
            negative_embeddings: Embeddings | None = None,
            ) -> list[Image]:
        """Draw resolved settings: one picture for each of `prompts` (or for settings.prompt), or
        for each caption of `embeddings`, which go first."""
        if settings.strength < 1 and image is None:
            raise ValueError(f"strength {settings.strength} needs an image to start from")
        if settings.sampler == "dmd" and image is not None:
            raise ValueError("DMD draws from noise alone and cannot start from an image; leave it "
                             "out, or name another sampler")
        captions = self._captions()
        captions.check(settings, embeddings, negative_embeddings)
        prompts = prompts or [settings.prompt]
        timesteps = settings.timesteps()
        positive = captions.positive(prompts, settings, embeddings)
        negative = captions.negative(settings, len(positive), negative_embeddings)
        captions.release()
        x = self._start(settings, len(positive), timesteps[0], image)
        predict = self._guided(settings, positive, negative,
                               self._control(settings, control_image, len(positive)))
        total = len(timesteps)

        def report(i: int, denoised: Tensor) -> None:
            if callback is not None:
                callback(i + 1, total, denoised)

        if settings.sampler == "lcm":
            latents = sample_lcm(predict, x, timesteps, step_noise(x.shape, settings.seed), report)
        elif settings.sampler == "sa-solver":
            latents = sample_sa(predict, x, timesteps, step_noise(x.shape, settings.seed), report)
        elif settings.sampler == "dmd":
            latents = sample_dmd(predict, x, report)
        else:
            latents = sample_dpm(predict, x, timesteps, report)
        with explained(lambda: of_decoding(self, settings, len(latents))):
            return _to_pictures(self.vae.decode(latents))

    def _captions(self) -> Captions:
        return Captions(self.encoder, self.config.caption_channels)

    def _device(self) -> torch.device:
        return self.transformer.x_embedder.proj.weight.device

    def _start(self, settings: Settings, batch: int, t: int, image: Image | None) -> Tensor:
        """Noise at the first timestep, float32 (B, 4, H/8, W/8); with the picture in it, if any."""
        shape = (batch, LATENT_CHANNELS, settings.height // PIXELS_PER_LATENT,
                 settings.width // PIXELS_PER_LATENT)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed))
        noise = noise.to(self._device())
        if image is None:
            return noise
        pixels = _to_pixels(image, settings.height, settings.width)
        return add_noise(self.vae.encode(pixels).to(noise).expand(shape), noise, t)

    def _control(self, settings: Settings, image: Image | Sequence[Image] | None,
                 count: int) -> Control | None:
        """The ControlNet with its encoded image, or one for each of `count` pictures."""
        if image is None:
            if settings.names_control():
                raise ValueError(f"{', '.join(settings.names_control())} given without a control "
                                 "image; pass control_image=..., or leave them out")
            return None
        if self.controlnet is None:
            raise ValueError("a control image was given, but this pipeline has no ControlNet; load "
                             "one with controlnet=...")
        images = list(image) if isinstance(image, list | tuple) else [image]
        if len(images) not in (1, count):
            raise ValueError(f"there are {len(images)} control images for {count} pictures; use "
                             "one for all, or one for each")
        pixels = torch.cat([fit_image(_pixels(one), settings.height, settings.width)
                            for one in images])
        latent = self.vae.encode(pixels).to(self._device())
        weights = mode_weights(settings.control_mode, self.controlnet.config.depth)
        return Control(self.controlnet, latent, settings.control_strength, weights)

    def _predictor(self, settings: Settings, prompts: list[str],
                   control: Control | None = None) -> Callable[[Tensor, int], Tensor]:
        """eps(x, t) of prompts, guided where guidance is above 1."""
        captions = self._captions()
        return self._guided(settings, captions.positive(prompts, settings),
                            captions.negative(settings, len(prompts)), control)

    def _guided(self, settings: Settings, positive: list[CaptionRow], negative: list[CaptionRow],
                control: Control | None) -> Callable[[Tensor, int], Tensor]:
        """eps(x, t), guided where there are negatives (classifier-free, arXiv 2207.12598)."""
        rows, guided, device = [*negative, *positive], bool(negative), self._device()
        prepared = self.transformer.prepare_caption(*stack_rows(rows, device))
        batch = len(rows)
        size = torch.tensor([row.size or (settings.height, settings.width) for row in rows],
                            dtype=torch.float32, device=device)
        own = [row.aspect_ratio or float("nan") for row in rows]
        ratio = torch.tensor(own, dtype=torch.float32, device=device)[:, None]
        ratio = torch.where(ratio.isnan(), size[:, :1] / size[:, 1:], ratio)
        if control is not None and guided and len(control.latent) > 1:
            control = dataclasses.replace(control, latent=torch.cat([control.latent] * 2))
        half = settings.control_cond_only or settings.control_mode == "control"
        if control is not None and guided and half:
            control = dataclasses.replace(control, rows=slice(len(negative), None))

        def predict(x: Tensor, t: int) -> Tensor:
            batched = torch.cat([x, x]) if guided else x
            timestep = torch.full((batch,), t, device=device)
            steered = (control,) if control is not None and settings.controls(t) else ()
            with explained(lambda: of_drawing(self, settings, len(x), guided, len(steered))):
                out = self.transformer(batched, timestep, prepared, image_size=size,
                                       aspect_ratio=ratio, control=steered)
            eps = out[:, :LATENT_CHANNELS].float()
            if not guided:
                return eps
            without, with_prompt = eps.chunk(2)
            return without + settings.guidance * (with_prompt - without)

        return predict


def _open_encoder(path: str | Path, dtype: torch.dtype, tokenizer: str | Path | None,
                  device: torch.device, precision: str, keep: bool,
                  cache: str | Path | TextCache | None) -> T5TextEncoder | LazyT5:
    """The T5, read at once where it is to stay and prompts are not kept."""
    from .text import LazyT5, T5TextEncoder, TextCache

    if keep and cache is None:
        return T5TextEncoder.from_path(path, dtype, tokenizer, device, precision)
    if cache is not None and not isinstance(cache, TextCache):
        cache = TextCache(cache)
    return LazyT5(path, dtype, tokenizer, device, precision, keep, cache)


def _to_pixels(image: Image, height: int, width: int) -> Tensor:
    """A PIL image, centre-cropped and resized, as (1, 3, H, W) in 0..1."""
    from PIL import Image as PILImage
    from PIL import ImageOps

    fitted = ImageOps.fit(_checked(image), (width, height), PILImage.Resampling.LANCZOS)
    return _pixels(fitted)


def _pixels(image: Image) -> Tensor:
    """A PIL image as (1, 3, H, W) in 0..1."""
    import numpy

    return torch.from_numpy(numpy.array(_checked(image))).permute(2, 0, 1)[None].float() / 255


def _checked(image: Image) -> Image:
    """The picture in RGB; ValueError for anything that is no PIL image."""
    from PIL import Image as PILImage

    if not isinstance(image, PILImage.Image):
        raise ValueError(f"image is a {type(image).__name__}; a PIL image was expected")
    return image.convert("RGB")


def _to_pictures(images: Tensor) -> list[Image]:
    """(B, 3, H, W) in 0..1 -> PIL images, cut off to 8 bits as ComfyUI's SaveImage does."""
    from PIL import Image as PILImage

    pixels = (images * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [PILImage.fromarray(picture) for picture in pixels]
