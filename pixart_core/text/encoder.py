"""The text encoder of every PixArt model: T5 v1.1 through transformers, weights from any file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoint.read import CheckpointError
from ..quant.linear import PackedLinear
from .caption import clean_caption
from .t5_file import EMBEDDING, T5Config, T5File, is_wo
from .t5_quant import AUTO, read_t5_as
from .tokenizer import CaptionTokenizer, TokenizedCaption
from .weights import encode_prompt

if TYPE_CHECKING:
    from transformers import PretrainedConfig, T5EncoderModel

logger = logging.getLogger(__name__)

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SHOWN_CHARACTERS = 300


class T5TextEncoder:
    """Prompts to caption embeddings. Make one with `T5TextEncoder.from_path`."""

    def __init__(self, model: T5EncoderModel, tokenizer: CaptionTokenizer) -> None:
        rows = model.config.vocab_size
        if tokenizer.vocab_size > rows:
            raise CheckpointError(f"the tokenizer has {tokenizer.vocab_size} tokens and the T5 "
                                  f"encoder {rows}; they do not belong together")
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_path(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        tokenizer: CaptionTokenizer | str | Path | None = None,
        device: torch.device | str | None = None,
        precision: str = AUTO,
    ) -> T5TextEncoder:
        """Load a T5 encoder from a Hugging Face folder, a pipeline folder or a ComfyUI file.

        `dtype` is what it computes in: by default the dtype of the file, bfloat16 for float8
        files. With float16 the `wo` layers compute in float32, as they do in transformers.
        `tokenizer` is needed only where the weights bring none: a CaptionTokenizer, or the path of
        a spiece.model, a tokenizer.json or a folder with one. `device` is the CPU unless given.
        `precision` is what the matrices are kept in, see `read_t5_as`: "auto", "bf16", "fp16",
        "fp8", "int8" or "int4".

        Raises CheckpointError for files (see `read_t5_as`), ValueError for other dtypes and
        precisions, ImportError where a precision needs a package that is missing.
        """
        if dtype is not None and dtype not in COMPUTE_DTYPES:
            raise ValueError(f"dtype is {dtype}; T5 computes in "
                             f"{', '.join(str(d) for d in COMPUTE_DTYPES)}")
        file = read_t5_as(path, precision, dtype)
        if tokenizer is None:
            tokenizer = file.tokenizer()
        elif not isinstance(tokenizer, CaptionTokenizer):
            tokenizer = CaptionTokenizer.from_path(
                tokenizer, embedding_rows=file.config.vocab_size
            )
        encoder = cls(build_encoder(file), tokenizer)
        return encoder.to(device) if device is not None else encoder

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embeddings."""
        return self.model.shared.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.shared.weight.device

    @property
    def caption_channels(self) -> int:
        """Width of the embeddings, D: 4096 for T5 XXL."""
        return self.model.config.d_model

    def to(self, device: torch.device | str) -> T5TextEncoder:
        """Move the weights to `device`, in place; returns the encoder."""
        self.model.to(device=device)
        return self

    def states(self, prompt: str, max_tokens: int, clean: bool = True, weights: bool = True,
               ) -> Tensor:
        """States (L, D) of one prompt's tokens without padding, see `encode_prompt`.

        `clean` takes the prompt through `clean_caption` first, `weights` obeys (word:1.2).
        """
        return encode_prompt(self, prompt, max_tokens, clean_caption if clean else None, weights)

    @torch.no_grad()
    def __call__(self, prompts: str | Sequence[str], max_tokens: int = 300
                 ) -> tuple[Tensor, Tensor]:
        """Encode prompts, padded to `max_tokens` (120 for PixArt-alpha, 300 for PixArt-Sigma).

        Returns embeddings (B, max_tokens, D) and a mask (B, max_tokens), True where there is a
        token. T5 itself does not look at the padding, so the embeddings of tokens do not depend on
        it. A longer prompt is cut, with a warning that says where. Prompts are taken as they are:
        see `clean_caption`.

        Raises ValueError for no prompts, TypeError for what is not a string.
        """
        return self.encode_ids([c.ids for c in self.tokenize(prompts, max_tokens)], max_tokens)

    @torch.no_grad()
    def encode_ids(self, captions: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
        """Embeddings and mask of token ids, as `__call__` gives them for text; none is cut."""
        ids = torch.full((len(captions), length), self.tokenizer.pad_id)
        mask = torch.zeros(len(captions), length, dtype=torch.bool)
        for row, caption in enumerate(captions):
            ids[row, : len(caption)] = torch.tensor(caption)
            mask[row, : len(caption)] = True
        ids, mask = ids.to(self.device), mask.to(self.device)
        states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return states.to(self.dtype), mask  # (B, L, D), (B, L)

    def tokenize(self, prompts: str | Sequence[str], max_tokens: int) -> list[TokenizedCaption]:
        """The tokens that `__call__` encodes, one entry per prompt; warns where it cuts."""
        if isinstance(prompts, str):
            prompts = [prompts]
        elif not isinstance(prompts, Sequence):
            raise TypeError(f"prompts is a {type(prompts).__name__}; a string or a list of strings "
                            "was expected")
        if not prompts:
            raise ValueError("no prompts were given; for the empty prompt pass [\"\"]")
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise TypeError(f"prompt {index} is a {type(prompt).__name__}; a string was "
                                "expected")
        captions = [self.tokenizer.encode(prompt, max_tokens) for prompt in prompts]
        for index, caption in enumerate(captions):
            if caption.is_cut:
                logger.warning(
                    "prompt %d has %d tokens and PixArt reads %d; this part is left out: %s",
                    index, caption.total, max_tokens, _shorten(caption.cut_text),
                )
        return captions


def build_encoder(file: T5File) -> T5EncoderModel:
    """transformers' T5EncoderModel around the tensors of `file`, which it takes without a copy."""
    from transformers import T5EncoderModel

    with torch.device("meta"):
        model = T5EncoderModel(_transformers_config(file.config))
    weights = dict(file.state_dict)
    if file.packed:
        weights |= _make_room(model, file)
    if file.dtype is torch.float16:
        # from_pretrained does this by itself, hand-loaded weights need it done: see read_t5
        weights = {name: t.float() if is_wo(name) and name not in file.packed else t
                   for name, t in weights.items()}
    weights["encoder.embed_tokens.weight"] = weights[EMBEDDING]
    model.load_state_dict(weights, strict=True, assign=True)
    # one module under both names, or moving to a device would make two of the embedding
    model.encoder.set_input_embeddings(model.shared)
    return model.requires_grad_(False).eval()


def _make_room(model: T5EncoderModel, file: T5File) -> dict[str, Tensor]:
    """Put layers that hold quantised weights where the file has such; their parameters by name."""
    held: dict[str, Tensor] = {}
    for name, packed in file.packed.items():
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        if leaf == "wo":
            # transformers casts the input of wo to the dtype of its weight, except for int8; and
            # in float16, wo computes in float32
            wide = torch.float32 if file.dtype is torch.float16 else None
            layer = PackedLinear.holding(packed.viewed_as(torch.int8), compute_dtype=wide)
        else:
            layer = PackedLinear.holding(packed)
        setattr(model.get_submodule(path), leaf, layer)
        held |= {f"{path}.{leaf}.{part}": getattr(layer, part) for part in layer.names}
    return held


def _transformers_config(config: T5Config) -> PretrainedConfig:
    from transformers import T5Config as TransformersConfig

    gate = "gated-" if config.gated else ""
    built = TransformersConfig(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        d_kv=config.d_kv,
        d_ff=config.d_ff,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        relative_attention_num_buckets=config.relative_attention_num_buckets,
        relative_attention_max_distance=config.relative_attention_max_distance,
        layer_norm_epsilon=config.layer_norm_epsilon,
        feed_forward_proj=gate + config.activation,
        dropout_rate=0.0,
        use_cache=False,
    )
    built.is_gated_act, built.dense_act_fn = config.gated, config.activation
    return built


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")
