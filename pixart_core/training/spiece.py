"""A SentencePiece model for a small vocabulary, made from captions."""

from __future__ import annotations

import io
from collections.abc import Iterable

from ..extras import require


def train_spiece(texts: Iterable[str], pieces: int) -> bytes:
    """The bytes of a BPE model of `pieces` pieces, with T5's ids: pad 0, end 1, unknown 2.

    The same texts give the same model. Raises ValueError where they are too few for so many
    pieces.
    """
    sentencepiece = require("sentencepiece", "making a tokenizer", extra="train")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=pieces,
            model_type="bpe", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0,
            required_chars="".join(map(chr, range(33, 127))), num_threads=1, minloglevel=2)
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {pieces} pieces can be made of these captions: "
                         f"{error}") from error
    return model.getvalue()
