"""T5 as a CLIP: the host's own encoder and memory management, for any T5 size."""

from __future__ import annotations

import functools
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.text_encoders.pixart_t5
import comfy.text_encoders.t5
import comfy.utils
import folder_paths
import torch
from server import PromptServer
from torch import Tensor

from ...pixart_core.checkpoint.folder import neighbour_index
from ...pixart_core.quant import pack_linears
from ...pixart_core.text.t5_file import OpenedT5, T5Config, T5File, open_t5, read_t5
from ...pixart_core.text.t5_quant import (
    AUTO,
    SIXTEEN_BITS,
    check_precision,
    read_opened,
    sixteen_bit_dtype,
)
from ...pixart_core.text.tokenizer import CaptionTokenizer
from . import gguf, memory, packed, text_cache
from .files import fingerprint
from .schema import known_arguments

logger = logging.getLogger(__name__)

XXL_WIDTH = 4096
# The host's name for PixArt's text encoder, in token dicts and tokenizer options.
NAME = "t5xxl"
PAD, END = 0, 1
SHOWN = 300  # characters of a cut that are shown


@dataclass(frozen=True)
class TokenReport:
    """How a prompt met its token limit: `cut` is the text that did not fit."""

    used: int
    limit: int
    cut: str

    def __str__(self) -> str:
        if not self.cut:
            return f"{self.used} of {self.limit} tokens"
        cut = self.cut if len(self.cut) <= SHOWN else self.cut[:SHOWN] + "…"
        return f"{self.used} tokens, the limit is {self.limit}; cut: {cut}"


def load_clip(path: str, device: str = "default", disable_dynamic: bool = False,
              precision: str = AUTO) -> comfy.sd.CLIP:
    """A CLIP from a T5 encoder file or folder; `device` "cpu" keeps it off the card.

    `precision` is what the matrices are kept in, see the engine's `read_t5_as`. The released size
    goes through the host's own loader where that reads the file as it is to be; quantised
    weights that it does not know, those made here, and other sizes are built from the same host
    classes. `disable_dynamic` turns the host's dynamic memory management off for this CLIP.
    Raises as `check_t5`.
    """
    with memory.explained(lambda: memory.of_loading(path)):
        clip = _read_clip(path, device, disable_dynamic, precision)
    # how the host loads it once more, for hooks, other devices and without dynamic memory
    clip.patcher.cached_patcher_init = (_load_patcher, (path, device, precision))
    return clip


def load_cached_clip(path: str, device: str, precision: str,
                     node_id: str | None = None) -> text_cache.CachedCLIP:
    """As `load_clip`, but the weights are read when the first prompt is met that is not in the
    text cache, or a node changes or looks into the encoder; `report_clip` tells the node then."""
    def load() -> comfy.sd.CLIP:
        clip = load_clip(path, device, precision=precision)
        report_clip(clip, node_id)
        return clip

    opened = open_t5(path)
    tokenizer = _tokenizer_of(opened, _by_the_host(opened, precision))
    on = "cpu" if device == "cpu" else comfy.model_management.text_encoder_device().type
    return text_cache.CachedCLIP(
        text_cache.Source(path, precision, on, load),
        tokenizer(embedding_directory=folder_paths.get_folder_paths("embeddings")))


def report_clip(clip: comfy.sd.CLIP, node_id: str | None) -> str | None:
    """As `report_packed`; the host computes T5 in float32."""
    return packed.report_packed(clip.cond_stage_model, clip.patcher.load_device, torch.float32,
                                node_id)


def _load_patcher(path: str, device: str, precision: str,
                  disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_clip(path, device, disable_dynamic, precision).patcher


def _read_clip(path: str, device: str, disable_dynamic: bool, precision: str) -> comfy.sd.CLIP:
    options: dict[str, Any] = {}
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    opened = open_t5(path)
    method = check_precision(opened, precision)
    if _by_the_host(opened, precision):
        return _load_by_the_host(opened, options, disable_dynamic, precision)
    embeddings = folder_paths.get_folder_paths("embeddings")
    if method is not None or opened.packed:
        # 16 bits for the embedding table and the norms; the host computes T5 in float32
        dtype = sixteen_bit_dtype(opened) if opened.weights else torch.float16
        file = (read_t5(path, dtype) if method is None
                else read_opened(opened, method, precision, dtype, wide_wo=False))
        options["custom_operations"] = packed.PackedOperations
        return _build_clip(file, embeddings, options, True)
    file = (read_t5(path) if precision == AUTO
            else read_opened(opened, None, precision, wide_wo=False))
    return _build_clip(file, embeddings, options, disable_dynamic)


def _by_the_host(opened: OpenedT5, precision: str) -> bool:
    """Whether the host's own loader takes the file: T5 XXL, no weights quantised in a way that it
    does not know."""
    if opened.config.d_model != XXL_WIDTH or precision not in (AUTO, *SIXTEEN_BITS) \
            or opened.path.suffix.lower() == gguf.SUFFIX:
        return False
    kinds = {weight.packing for weight in opened.packed.values()}
    known = getattr(getattr(comfy, "quant_ops", None), "QUANT_ALGOS", {})
    return not kinds or (_is_one_file(opened.path) and kinds <= set(known))


def _is_one_file(path: Path) -> bool:
    return path.is_file() and neighbour_index(path) is None


def _load_by_the_host(opened: OpenedT5, options: dict[str, Any], disable_dynamic: bool,
                      precision: str) -> comfy.sd.CLIP:
    stock = {"embedding_directory": folder_paths.get_folder_paths("embeddings"),
             "clip_type": comfy.sd.CLIPType.PIXART, "model_options": options,
             **known_arguments(comfy.sd.load_text_encoder_state_dicts,
                               {"disable_dynamic": disable_dynamic})}
    if precision != AUTO and {t.dtype for t in opened.weights.values()} != {
            SIXTEEN_BITS[precision]}:
        file = read_opened(opened, None, precision, wide_wo=False)
        return comfy.sd.load_text_encoder_state_dicts([file.state_dict], **stock)
    if _is_one_file(opened.path):
        return comfy.sd.load_clip(ckpt_paths=[str(opened.path)], **stock)
    return comfy.sd.load_text_encoder_state_dicts([read_t5(opened.path).state_dict], **stock)


def check_t5(path: str, precision: str = AUTO) -> None:
    """Raise CheckpointError when `path` is no usable T5 encoder, ValueError or ImportError when it
    cannot have this precision; reads headers only."""
    _check_once(path, fingerprint(path), precision)


@functools.lru_cache(maxsize=32)
def _check_once(path: str, _fingerprint: str, precision: str) -> None:
    opened = open_t5(path)
    check_precision(opened, precision)
    if opened.config.d_model != XXL_WIDTH:
        _without_weights(opened).tokenizer()  # the host brings that of the released size alone


def encode(clip: comfy.sd.CLIP, text: str, limit: int,
           extra: dict[str, Any]) -> tuple[list, TokenReport]:
    """CONDITIONING of `text` cut at `limit` tokens, the end token kept; `extra` goes along."""
    tokens = clip.tokenize(text)
    tokens, report = cut_tokens(clip, tokens, limit)
    if report.cut:
        logger.warning("prompt: %s", report)
    comfy.model_management.throw_exception_if_processing_interrupted()
    with memory.explained(lambda: memory.of_encoding(
            min(report.used, limit), clip.patcher.load_device)):
        conditioning = clip.encode_from_tokens_scheduled(tokens, add_dict=extra)
    if not all(states.isfinite().all() for states, _ in conditioning):
        raise ValueError("the text encoder gave values that are not finite: its file is damaged, "
                         "or float16 overflowed; load another T5 file (bf16 or fp8)")
    return conditioning, report


def cut_tokens(clip: comfy.sd.CLIP, tokens: dict[str, list], limit: int,
               ) -> tuple[dict[str, list], TokenReport]:
    """Keep the first `limit` tokens, of which the last is the end token."""
    if NAME not in tokens:
        raise ValueError(f"the CLIP is no T5 (its tokens are for {', '.join(tokens)}); load one "
                         'with PixArt T5 Loader or CLIPLoader (type "pixart")')
    pairs = [pair for section in tokens[NAME] for pair in section]
    used = len(pairs)
    while used > 1 and isinstance(pairs[used - 1][0], int) and pairs[used - 1][0] == PAD:
        used -= 1
    if used <= limit:
        return tokens, TokenReport(used, limit, "")
    kept, end, cut = pairs[: limit - 1], pairs[used - 1], pairs[limit - 1: used - 1]
    pieces = [str(piece) for _, piece in clip.tokenizer.untokenize(cut)]
    text = "".join(pieces).replace("▁", " ").strip()
    return {**tokens, NAME: [[*kept, end]]}, TokenReport(used, limit, text)


def report_tokens(report: TokenReport | str, node_id: str | None) -> None:
    """Show the token count on the node."""
    if node_id is not None and PromptServer.instance is not None:
        PromptServer.instance.send_progress_text(str(report), node_id)


def _build_clip(file: T5File, embeddings: list[str], options: dict[str, Any],
                disable_dynamic: bool) -> comfy.sd.CLIP:
    target = comfy.supported_models_base.ClipTarget(_tokenizer_of(file),
                                                    _encoder_class(file.config))
    options = {**options, "dtype": options.get("dtype") or _dtype(file.state_dict)}
    dynamic = known_arguments(comfy.sd.CLIP, {"disable_dynamic": disable_dynamic})
    if file.packed:
        # nothing is allocated, and the host does not load it while it has no weights
        clip = comfy.sd.CLIP(target, embedding_directory=embeddings, **dynamic,
                             model_options={**options, "initial_device": torch.device("meta")})
        _take_packed(clip, file)
        return clip
    # since 0.4 the constructor loads the weights, for dynamic memory management
    loads = known_arguments(comfy.sd.CLIP, {"state_dict": [file.state_dict]})
    clip = comfy.sd.CLIP(
        target, embedding_directory=embeddings, model_options=options,
        parameters=comfy.utils.calculate_parameters(file.state_dict), **loads, **dynamic)
    if not loads:
        clip.load_sd(file.state_dict)
    return clip


def _tokenizer_of(file: T5File | OpenedT5, by_the_host: bool = False) -> type:
    """The host's tokenizer class for a T5: its own for T5 XXL that brings none."""
    brings_none = file.spiece_model is None and file.tokenizer_json is None
    if by_the_host or (brings_none and file.config.d_model == XXL_WIDTH):
        return comfy.text_encoders.pixart_t5.PixArtTokenizer
    return _tokenizer_class(file if isinstance(file, T5File) else _without_weights(file))


def _without_weights(opened: OpenedT5) -> T5File:
    return opened.as_file({}, {}, opened.dtype)


def _take_packed(clip: comfy.sd.CLIP, file: T5File) -> None:
    """Give a CLIP without weights those of a file, some packed, and manage them as such."""
    network = clip.cond_stage_model.t5xxl.transformer
    weights = pack_linears(network, file.packed) | file.state_dict
    network.load_state_dict(weights, strict=True, assign=True)
    network.to(clip.patcher.offload_device)
    clip.patcher = packed.managed_packed(clip.patcher)


def _dtype(state_dict: dict[str, Tensor]) -> torch.dtype:
    return state_dict["encoder.final_layer_norm.weight"].dtype


def _encoder_class(config: T5Config) -> type[comfy.sd1_clip.SD1ClipModel]:
    settings = {
        "d_model": config.d_model, "d_kv": config.d_kv, "d_ff": config.d_ff,
        "num_layers": config.num_layers, "num_heads": config.num_heads,
        "vocab_size": config.vocab_size, "is_gated_act": config.gated,
        "dense_act_fn": "gelu_pytorch_tanh" if config.gated else "relu", "model_type": "t5",
    }

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: torch.dtype | None = None,
                     model_options: dict | None = None, **_: Any) -> None:
            super().__init__(
                device=device, dtype=dtype, layer="last", textmodel_json_config=dict(settings),
                special_tokens={"end": END, "pad": PAD}, model_options=model_options or {},
                model_class=comfy.text_encoders.t5.T5)

        def gen_empty_tokens(self, special_tokens: dict, length: int) -> list[int]:
            """What weights of a prompt refer to: padding alone, as in the host's PixArt T5 XXL."""
            return [special_tokens["pad"]] * length

    class TextModel(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: torch.dtype | None = None,
                     model_options: dict | None = None) -> None:
            super().__init__(device=device, dtype=dtype, model_options=model_options or {},
                             name=NAME, clip_model=Encoder)

    return TextModel


class HostTokenizer:
    """The engine's tokenizer as the host calls one, the end token behind every text.

    Special tokens spelt out in a prompt ("</s>") are those tokens, as in the host's T5 XXL.
    """

    def __init__(self, tokenizer: CaptionTokenizer) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, tokenizer: CaptionTokenizer) -> HostTokenizer:
        return cls(tokenizer)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.tokenizer.encode(text, sys.maxsize).ids}

    def get_vocab(self) -> dict[str, int]:
        return self.tokenizer.vocabulary


def _tokenizer_class(file: T5File) -> type[comfy.sd1_clip.SD1Tokenizer]:
    engine_tokenizer = file.tokenizer()

    class Tokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None,
                     ) -> None:
            super().__init__(
                engine_tokenizer, tokenizer_class=HostTokenizer, pad_with_end=False,
                embedding_directory=embedding_directory, embedding_size=file.config.d_model,
                embedding_key=NAME, has_start_token=False, pad_to_max_length=False,
                max_length=99999999, min_length=1, pad_token=PAD,
                tokenizer_data=tokenizer_data or {})

    class TextTokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None,
                     ) -> None:
            super().__init__(embedding_directory=embedding_directory,
                             tokenizer_data=tokenizer_data or {}, clip_name=NAME,
                             tokenizer=Tokenizer)

    return TextTokenizer
