"""Emphasis in a prompt, `(word:1.2)`, and caption states that follow it.

The notation is ComfyUI's. `(word:1.2)` gives the word the weight 1.2; `(word)` multiplies the
weight around it by 1.1, so `((word))` has 1.21; a number stands for itself, whatever is around it.
`\\(` and `\\)` are brackets of the text, and so are brackets without a partner.

A weight moves the states of its tokens away from, or towards, what T5 says of padding alone:
state = (state - padding) * weight + padding.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .encoder import T5TextEncoder
    from .tokenizer import CaptionTokenizer

logger = logging.getLogger(__name__)

EMPHASIS = 1.1
MAX_NESTING = 64

_BRACKET = re.compile(r"\\[()]|[()]")
_FIRST_MARK = re.compile(r"\s*([,;:])")
_LAST_MARK = re.compile(r"([,;:])\s*\Z")
_SHOWN_CHARACTERS = 300


class Piece(NamedTuple):
    """Part of a prompt and the weight of its tokens."""

    text: str
    weight: float


def parse_weights(prompt: str) -> list[Piece]:
    """The pieces of a prompt, in order, brackets and escapes resolved; [] for the empty prompt.

    Raises ValueError for a weight that is not finite and for brackets nested deeper than
    MAX_NESTING.
    """
    return [Piece(re.sub(r"\\([()])", r"\1", text), weight)
            for text, weight in _parse(prompt, 1.0, 0)]


def _parse(text: str, weight: float, depth: int) -> Iterator[Piece]:
    for part in _split(text):
        if not _is_group(part):
            yield Piece(part, weight)
            continue
        if depth == MAX_NESTING:
            raise ValueError(f"the prompt nests brackets deeper than {MAX_NESTING}; write the "
                             r"weight as a number, (word:1.2), or brackets of the text as \( \)")
        inside, inner_weight = part[1:-1], weight * EMPHASIS
        colon = inside.rfind(":")
        if colon > 0:
            try:
                inner_weight = float(inside[colon + 1:])
            except ValueError:
                pass  # a colon of the text
            else:
                if not math.isfinite(inner_weight):
                    raise ValueError(f"the prompt gives {inside[:colon]!r} the weight "
                                     f"{inside[colon + 1:].strip()}; use a number such as 1.2")
                inside = inside[:colon]
        yield from _parse(inside, inner_weight, depth + 1)


def _split(text: str) -> Iterator[str]:
    """Text outside of brackets, and whole outermost groups."""
    depth = start = 0
    for bracket in _BRACKET.finditer(text):
        if bracket[0] == "(":
            if depth == 0 and bracket.start() > start:
                yield text[start: bracket.start()]
                start = bracket.start()
            depth += 1
        elif bracket[0] == ")":
            depth -= 1
            if depth == 0:
                yield text[start: bracket.end()]
                start = bracket.end()
    if start < len(text):
        yield text[start:]


def _is_group(part: str) -> bool:
    return len(part) >= 2 and part[0] == "(" and part[-1] == ")" and part[-2] != "\\"


def clean_pieces(pieces: Sequence[Piece], clean: Callable[[str], str]) -> list[Piece]:
    """Pieces whose text went through `clean` one by one; those left empty are dropped.

    `clean` takes marks off both ends of a caption. Between two pieces they are no ends, so commas,
    colons and semicolons are put back there.
    """
    cleaned = []
    for i, (text, weight) in enumerate(pieces):
        result = clean(text)
        first = _FIRST_MARK.match(text) if i else None
        last = _LAST_MARK.search(text) if i < len(pieces) - 1 else None
        if first and not result.startswith(first[1]):
            result = f"{first[1]} {result}".rstrip()
        if last and not result.endswith(last[1]):
            result += last[1]
        if result:
            cleaned.append(Piece(result, weight))
    return cleaned


def render(pieces: Sequence[Piece]) -> str:
    """A prompt that `parse_weights` takes apart into `pieces` again; plain text stays plain."""
    if len(pieces) == 1 and pieces[0].weight == 1.0:
        return escape(pieces[0].text)
    return "".join(f"({escape(text)}:{weight!r})" for text, weight in pieces)


def escape(text: str) -> str:
    r"""`text` with its brackets written as \( and \)."""
    return re.sub(r"([()])", r"\\\1", text)


def prompt_pieces(prompt: str, clean: Callable[[str], str] | None = None,
                  weights: bool = True) -> list[Piece]:
    """What is encoded for a prompt: its pieces, cleaned. Without `weights` it is one piece.

    Never empty: nothing left of a prompt is the empty text.
    """
    pieces = parse_weights(prompt) if weights else [Piece(prompt, 1.0)]
    if clean is not None:
        pieces = clean_pieces(pieces, clean)
    return pieces or [Piece("", 1.0)]


def encode_prompt(encoder: T5TextEncoder, prompt: str, max_tokens: int,
                  clean: Callable[[str], str] | None = None, weights: bool = True) -> Tensor:
    """States (L, D) of one prompt's tokens, at most `max_tokens`, without padding.

    `clean` is what a caption goes through, `clean_caption` for instance; `weights` obeys
    `(word:1.2)`. A prompt that is cut is reported as by the encoder. Raises as `parse_weights`.
    """
    pieces = prompt_pieces(prompt, clean, weights)
    if len(pieces) == 1 and pieces[0].weight == 1.0:
        text = pieces[0].text
        length = len(encoder.tokenizer.encode(text, max_tokens).ids)
        return encoder([text], max_tokens=length)[0][0]
    ids, factors = prompt_tokens(encoder.tokenizer, pieces, max_tokens)
    padding = [encoder.tokenizer.pad_id] * len(ids)
    states, _ = encoder.encode_ids([ids], len(ids))
    if all(factor == 1.0 for factor in factors):
        return states[0]
    neutral, _ = encoder.encode_ids([padding], len(ids))
    factor = torch.tensor(factors, dtype=torch.float32, device=states.device)[:, None]
    state, neutral = states[0].float(), neutral[0].float()
    # tokens of weight 1 stay what they are, to the bit
    weighted = torch.where(factor == 1.0, state, (state - neutral) * factor + neutral)
    return weighted.to(states.dtype)


def prompt_tokens(tokenizer: CaptionTokenizer, pieces: Sequence[Piece], max_tokens: int
                  ) -> tuple[list[int], list[float]]:
    """Ids and weights of all pieces, the end token last with weight 1; warns where it cuts."""
    ids: list[int] = []
    factors: list[float] = []
    total, cut = 1, ""
    for text, weight in pieces:
        room = max_tokens - 1 - len(ids)
        piece = tokenizer.encode(text, room + 1)
        total += piece.total - 1
        cut += piece.cut_text
        ids += piece.ids[:-1]
        factors += [weight] * (len(piece.ids) - 1)
    if total > max_tokens:
        shown = " ".join(cut.split())
        shown = shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "..."
        logger.warning("the prompt has %d tokens and PixArt reads %d; this part is left out: %r",
                       total, max_tokens, shown)
    return [*ids, tokenizer.eos_id], [*factors, 1.0]
