"""T5 tokens of a prompt, from a SentencePiece model or a Hugging Face tokenizer.json.

transformers' own tokenizer classes are left aside: they need protobuf or tiktoken to read the
SentencePiece model that T5 ships with, and rebuild it as a unigram model whatever it really is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.read import CheckpointError
from .caption import mend_surrogates

SPIECE_NAMES = ("spiece.model", "sentencepiece.model", "tokenizer.model")
JSON_NAME = "tokenizer.json"
EXTRA_IDS = 100


@dataclass(frozen=True)
class TokenizedCaption:
    """Token ids of one prompt, the end token last, and what did not fit.

    `kept_text + cut_text` is the prompt; the cut stands before the first word that was not kept
    whole. `total` counts the prompt's tokens before the cut, with the end token.
    """

    ids: list[int]
    kept_text: str
    cut_text: str
    total: int

    @property
    def is_cut(self) -> bool:
        return len(self.ids) < self.total


class CaptionTokenizer:
    """Turns prompts into T5 tokens; `pad_id`, `eos_id` and `unk_id` are read from the model.

    `vocabulary` holds the id of every piece, `vocab_size` is one past the highest. Make one with
    `from_path`, `from_spiece` or `from_json`.
    """

    def __init__(self, tokens_of: Callable[[str], list[int]], *, pad_id: int, eos_id: int,
                 unk_id: int, vocabulary: dict[str, int]) -> None:
        self._tokens_of = tokens_of
        self.pad_id, self.eos_id, self.unk_id = pad_id, eos_id, unk_id
        self.vocabulary = vocabulary
        self.vocab_size = max(vocabulary.values()) + 1

    @classmethod
    def from_path(cls, path: str | Path, *, embedding_rows: int | None = None) -> CaptionTokenizer:
        """From a SentencePiece model, a tokenizer.json, or a folder that holds one of them.

        In a folder (or its "tokenizer" folder) the SentencePiece model goes first. For
        `embedding_rows` see `from_spiece`. Raises CheckpointError for what is not a T5 tokenizer.
        """
        file = find_tokenizer(path)
        if file.suffix.lower() == ".json":
            return cls.from_json(file)
        try:
            content = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        return cls.from_spiece(content, embedding_rows=embedding_rows, source=str(file))

    @classmethod
    def from_spiece(cls, model: bytes, *, embedding_rows: int | None = None,
                    source: str = "spiece_model") -> CaptionTokenizer:
        """From the bytes of a SentencePiece model; `source` names them in messages.

        T5 adds 100 sentinels, <extra_id_99> to <extra_id_0>, behind the pieces of its model. They
        are known where `embedding_rows`, the height of the embedding table, leaves room for them,
        and are plain text otherwise. Raises CheckpointError.
        """
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        try:
            sound = bool(model) and processor.LoadFromSerializedProto(bytes(model))
        except RuntimeError:
            sound = False
        if not sound:
            raise CheckpointError(f"{source} is not a SentencePiece model ({len(model)} bytes); "
                                  "T5's is called spiece.model and takes about 790 kB")
        size = processor.vocab_size()
        named = {"pad": processor.pad_id(), "eos": processor.eos_id(), "unk": processor.unk_id()}
        _require_special(named, source)
        specials = {processor.id_to_piece(i): i for i in named.values()}
        extra = EXTRA_IDS if (embedding_rows or 0) >= size + EXTRA_IDS else 0
        specials |= {f"<extra_id_{i}>": size + extra - 1 - i for i in range(extra)}
        pieces = {processor.id_to_piece(i): i for i in range(size)}
        return cls(_split_at(specials, processor.EncodeAsIds), pad_id=named["pad"],
                   eos_id=named["eos"], unk_id=named["unk"], vocabulary=pieces | specials)

    @classmethod
    def from_json(cls, path: str | Path) -> CaptionTokenizer:
        """From a tokenizer.json of the `tokenizers` package. Raises CheckpointError."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise CheckpointError(f"{path} is not a tokenizer.json: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        named = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
        ids = {name: tokenizer.token_to_id(token) for name, token in named.items()}
        _require_special(ids, str(path))
        return cls(lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
                   pad_id=ids["pad"], eos_id=ids["eos"], unk_id=ids["unk"],
                   vocabulary=tokenizer.get_vocab(with_added_tokens=True))

    def encode(self, text: str, max_tokens: int) -> TokenizedCaption:
        """At most `max_tokens` ids, unpadded, the last of which is always the end token.

        A special token spelt out in the prompt ("</s>") is that token, as in transformers. Raises
        TypeError for anything but a string and ValueError for `max_tokens` below 1.
        """
        if not isinstance(text, str):
            raise TypeError(f"a prompt is a string, got {type(text).__name__}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; the end token alone needs 1")
        ids = self._ids(text)
        total, room = len(ids) + 1, max_tokens - 1
        if total <= max_tokens:
            return TokenizedCaption([*ids, self.eos_id], text, "", total)
        cut = self._first_word_past(text, room)
        return TokenizedCaption([*ids[:room], self.eos_id], text[:cut], text[cut:], total)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokens_of(mend_surrogates(text)))

    def _first_word_past(self, text: str, room: int) -> int:
        """Where the first word begins whose tokens go past `room`; T5's never span two words."""
        for word in re.finditer(r"\S+", text):
            room -= len(self._ids(word[0]))
            if room < 0:
                return word.start()
        return len(text)


def find_tokenizer(path: str | Path) -> Path:
    """The tokenizer file that `path` is or, being a folder, holds; raises CheckpointError."""
    path = Path(path)
    if path.is_file():
        return path
    for folder in (path, path / "tokenizer"):
        for name in (*SPIECE_NAMES, JSON_NAME):
            if (folder / name).is_file():
                return folder / name
    what = "holds no" if path.is_dir() else "does not exist; give the path of a"
    raise CheckpointError(f"{path} {what} {SPIECE_NAMES[0]} or {JSON_NAME}")


def _require_special(ids: dict[str, int | None], source: str) -> None:
    missing = [name for name, token_id in ids.items() if token_id is None or token_id < 0]
    if missing:
        raise CheckpointError(f"{source} has no {', '.join(missing)} token, so it is not T5's; "
                              "PixArt needs the tokenizer of T5 v1.1")


def _split_at(specials: dict[str, int], encode: Callable[[str], list[int]]
              ) -> Callable[[str], list[int]]:
    """`encode` for the text between special tokens, each of which is one id of its own."""
    pattern = re.compile("(" + "|".join(map(re.escape, specials)) + ")")

    def tokens_of(text: str) -> list[int]:
        ids: list[int] = []
        for part in pattern.split(text):
            ids += [specials[part]] if part in specials else encode(part)
        return ids

    return tokens_of
