"""Train a small T5 encoder that reads captions of scenes: for the starter family, from nothing.

A real T5 learned from the web; this one learns what the scenes' captions say. Queries that are
thrown away afterwards read each attribute from its states by attention, as the transformer will.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.write import write_checkpoint
from ...text.tokenizer import CaptionTokenizer
from ..draws import Draws
from ..ema import averaged_copy, update_average, warmed_decay
from ..readings import IGNORED, QUESTIONS, Readings, SceneReadings
from ..recipe import Losses, Recipe
from ..scenes import SceneSettings, captions, draw_scene
from ..settings import RunSettings, at_least
from ..spiece import train_spiece

_TOKENIZER_SCENES = 4000


@dataclass(frozen=True, kw_only=True)
class TextSettings(RunSettings):
    """Attributes beside those of every run:

    two, counts, corners: shares of the scenes, see `pixart train scenes`.
    pieces: of the SentencePiece model.
    max_tokens: captions are cut there.
    width, layers, heads, mlp: of the encoder (d_model, num_layers, num_heads, d_ff).
    ema_decay: of the average of the weights that the run hands out.
    """

    two: float = 0.0
    counts: float = 0.0
    corners: float = 0.0
    pieces: int = 256
    max_tokens: int = 40
    width: int = 128
    layers: int = 3
    heads: int = 4
    mlp: int = 256
    ema_decay: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pieces", "max_tokens", "width", "layers", "heads", "mlp"):
            at_least(self, name, 1)


class Reader(nn.Module):
    """An encoder with one attention query and one linear answer for each question."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import T5EncoderModel

        self.encoder = T5EncoderModel(config)
        size = config.d_model
        self.queries = nn.Parameter(torch.randn(len(QUESTIONS), size) / size**0.5)
        self.keys, self.values = nn.Linear(size, size), nn.Linear(size, size)
        self.answers = nn.ModuleList(nn.Linear(size, len(words)) for words in QUESTIONS.values())

    def forward(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Token ids (B, L) and their mask -> logits (B, answers) of each question."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        scores = torch.einsum("qc,blc->bql", self.queries, self.keys(states))
        scores = scores.masked_fill(~mask[:, None].bool(), -torch.inf)
        read = scores.softmax(-1) @ self.values(states)  # (B, questions, C)
        return [answer(read[:, i]) for i, answer in enumerate(self.answers)]


class Text(Recipe):
    """Cross-entropy of every attribute that the caption names."""

    name = "text"
    settings: TextSettings

    def __init__(self, settings: TextSettings) -> None:
        self.settings = settings
        scenes = SceneSettings(two=settings.two, counts=settings.counts, corners=settings.corners)
        self.samples = SceneReadings(scenes, settings.seed)
        drawn = (draw_scene(settings.seed, n, scenes, "all") for n in range(_TOKENIZER_SCENES))
        texts = [c.text for n, scene in enumerate(drawn)
                 for c in captions(scene, settings.seed, n)]
        self.spiece = train_spiece(texts, settings.pieces)
        self.tokenizer = CaptionTokenizer.from_spiece(self.spiece)
        self.config = _t5_config(settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.trained = Reader(self.config)
        self.average = averaged_copy(self.trained)

    def loss(self, trained: nn.Module, batch: Readings, draws: Draws) -> Losses:
        logits = trained(*self._tokens(batch.texts, batch.answers.device))
        asked = batch.answers.unbind(1)
        parts = [F.cross_entropy(own.float(), right, ignore_index=IGNORED, reduction="sum")
                 for own, right in zip(logits, asked, strict=True)]
        count = (batch.answers != IGNORED).sum().clamp(min=1)
        right = sum(((own.argmax(-1) == r) & (r != IGNORED)).sum()
                    for own, r in zip(logits, asked, strict=True))
        return Losses(sum(parts) / count, {"right": right / count})

    def after_step(self, step: int) -> None:
        update_average(self.average, self.trained, warmed_decay(self.settings.ema_decay, step))

    def modules(self) -> dict[str, nn.Module]:
        return {"trained": self.trained, "average": self.average}

    @torch.no_grad()
    def accuracy(self, count: int = 1000) -> dict[str, float]:
        """Share of right answers to each question on held-out captions that say it."""
        batch = self.samples.readings(range(count), "held_out")
        device = next(self.average.parameters()).device
        logits = self.average(*self._tokens(batch.texts, device))
        out = {}
        for name, own, right in zip(QUESTIONS, logits, batch.answers.unbind(1), strict=True):
            asked = right != IGNORED
            if asked.any():
                out[name] = (own.argmax(-1).cpu() == right)[asked].double().mean().item()
        return out

    def export(self, folder: Path) -> list[Path]:
        """The encoder as a Hugging Face folder and as one file with the tokenizer inside."""
        weights = {name: tensor.cpu().clone()
                   for name, tensor in self.average.encoder.state_dict().items()
                   if name != "encoder.embed_tokens.weight"}  # the same as shared.weight
        hf = folder / "t5"
        hf.mkdir(parents=True, exist_ok=True)
        (hf / "config.json").write_text(json.dumps(_hf_config(self.config), indent=1) + "\n")
        (hf / "tokenizer_config.json").write_text(
            json.dumps(_tokenizer_config(self.settings.max_tokens), indent=1) + "\n")
        (hf / "spiece.model").write_bytes(self.spiece)
        write_checkpoint(hf / "model.safetensors", weights, {"format": "pt"})
        spiece = torch.frombuffer(bytearray(self.spiece), dtype=torch.uint8)
        one = folder / "t5.safetensors"
        write_checkpoint(one, {**weights, "spiece_model": spiece}, {"format": "pt"})
        return [hf, one]

    def _tokens(self, texts: tuple[str, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        ids = [self.tokenizer.encode(text, self.settings.max_tokens).ids for text in texts]
        length = max(map(len, ids))
        rows = torch.zeros(len(ids), length, dtype=torch.long)
        mask = torch.zeros(len(ids), length, dtype=torch.long)
        for row, own in enumerate(ids):
            rows[row, : len(own)] = torch.tensor(own)
            mask[row, : len(own)] = 1
        return rows.to(device), mask.to(device)


def _t5_config(settings: TextSettings) -> Any:
    from transformers import T5Config

    return T5Config(d_model=settings.width, d_kv=settings.width // settings.heads,
                    d_ff=settings.mlp, num_heads=settings.heads, num_layers=settings.layers,
                    num_decoder_layers=settings.layers, vocab_size=settings.pieces,
                    feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=False,
                    is_encoder_decoder=False, use_cache=False)


def _hf_config(config: Any) -> dict[str, Any]:
    names = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers",
             "vocab_size", "feed_forward_proj", "relative_attention_num_buckets",
             "relative_attention_max_distance", "layer_norm_epsilon")
    return {"architectures": ["T5EncoderModel"], "model_type": "t5",
            **{name: getattr(config, name) for name in names},
            "is_gated_act": True, "dense_act_fn": "gelu_new", "dropout_rate": 0.0,
            "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
            "tie_word_embeddings": False, "is_encoder_decoder": True, "use_cache": False}


def _tokenizer_config(max_tokens: int) -> dict[str, Any]:
    return {"tokenizer_class": "T5Tokenizer", "model_max_length": max_tokens, "extra_ids": 0,
            "additional_special_tokens": [], "pad_token": "<pad>", "eos_token": "</s>",
            "unk_token": "<unk>", "legacy": False}
