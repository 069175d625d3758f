"""Emphasis in prompts: what is parsed, how it lives with caption cleaning, what they do."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_core.starter import find_starter
from pixart_core.text import T5TextEncoder, clean_caption
from pixart_core.text.weights import (
    Piece,
    clean_pieces,
    encode_prompt,
    parse_weights,
    prompt_pieces,
    render,
)


@pytest.fixture(scope="module")
def encoder():
    return T5TextEncoder.from_path(find_starter().t5_file, dtype=torch.float32)


@pytest.mark.parametrize(("prompt", "pieces"), [
    ("a cat", [("a cat", 1.0)]),
    ("", []),
    ("a (red:1.5) cat", [("a ", 1.0), ("red", 1.5), (" cat", 1.0)]),
    ("(cat)", [("cat", 1.1)]),
    ("((cat))", [("cat", 1.1 * 1.1)]),
    ("(a (red:0.5) cat:2)", [("a ", 2.0), ("red", 0.5), (" cat", 2.0)]),
    ("(a (red) cat:2)", [("a ", 2.0), ("red", 2.0 * 1.1), (" cat", 2.0)]),
    ("(at 10:30)", [("at 10", 30.0)]),
    ("(a: b)", [("a: b", 1.1)]),
    (r"a cat \(sitting\)", [("a cat (sitting)", 1.0)]),
    (r"(a \(b\):1.3)", [("a (b)", 1.3)]),
    ("a smile :) and (", [("a smile :) and (", 1.0)]),
    ("()", []),
], ids=lambda value: repr(value)[:24])
def test_the_notation(prompt, pieces):
    """Protects prompts that users bring: the notation is ComfyUI's, case by case."""
    assert parse_weights(prompt) == [Piece(*piece) for piece in pieces]


@given(st.text(alphabet="()\\:.125 ab,", max_size=30))
@settings(max_examples=300, deadline=None)
def test_rendering_is_the_inverse_of_parsing(prompt):
    """Protects what is handed to the host: escapes and weights come back as they were."""
    pieces = parse_weights(prompt)
    assert parse_weights(render(pieces)) == pieces


def test_weights_that_cannot_be_followed():
    """Protects from NaN states and endless nesting, with the reason said."""
    with pytest.raises(ValueError, match="'cat' the weight inf"):
        parse_weights("(cat:inf)")
    with pytest.raises(ValueError, match="deeper than 64"):
        parse_weights("(" * 100 + "cat" + ")" * 100)


def test_cleaning_keeps_weights_and_inner_marks():
    """Protects weights from the cleaning, which takes brackets, and commas at both ends, away."""
    prompt = "A LARGE cat, (RED_Fur:1.4), https://x.com (on_a mat)"
    assert prompt_pieces(prompt, clean_caption) == [
        Piece("a large cat,", 1.0), Piece("red_fur", 1.4), Piece(",", 1.0),
        Piece("on_a mat", 1.1)]
    assert clean_pieces([Piece(", a cat,", 1.0)], clean_caption) == [Piece("a cat", 1.0)]
    assert prompt_pieces("(https://x.com:1.2)", clean_caption) == [Piece("", 1.0)]


@pytest.mark.parametrize("prompt", ["A Large RED circle, on blue,", "", "a cat: \"quoted\"."])
def test_a_prompt_without_weights_is_cleaned_as_ever(prompt):
    assert prompt_pieces(prompt, clean_caption) == [Piece(clean_caption(prompt), 1.0)]


def test_without_weights_nothing_changes(encoder):
    """Protects every picture drawn so far: plain prompts give the encoder's own states."""
    prompt = "a large red circle (left)"
    states, mask = encoder(prompt, max_tokens=24)
    alone = encode_prompt(encoder, prompt, 24, weights=False)
    assert torch.allclose(alone, states[0, : int(mask.sum())], atol=1e-5)
    assert torch.equal(encode_prompt(encoder, r"a large red circle \(left\)", 24), alone)


def test_a_weight_moves_its_tokens_alone(encoder):
    """Protects the formula: from the states of padding, by the weight; other tokens stay."""
    def states(prompt):
        return encode_prompt(encoder, prompt, 24)

    one, strong = states("a (red:1.0) circle"), states("a (red:1.7) circle")
    padding, _ = encoder.encode_ids([[encoder.tokenizer.pad_id] * len(one)], len(one))
    changed = (one != strong).any(dim=1)
    length = len(encoder.tokenizer.encode("red", 24).ids) - 1
    assert 0 < int(changed.sum()) == length < len(one)
    wanted = (one - padding[0]) * 1.7 + padding[0]
    assert torch.allclose(strong[changed], wanted[changed], atol=1e-6)
    assert torch.allclose(states("(a red circle:0)")[:-1], padding[0, : len(one) - 1], atol=1e-6)


def test_a_long_weighted_prompt_is_cut_and_said(encoder, caplog):
    """Protects the token limit: the end token stays, and the words left out are named."""
    prompt = "(a large red circle on a blue background, with:1.2) a small lantern there"
    with caplog.at_level(logging.WARNING):
        states = encode_prompt(encoder, prompt, 8)
    assert len(states) == 8
    assert "PixArt reads 8" in caplog.text and "lantern" in caplog.text
    assert encode_prompt(encoder, "(cat:1.5)", 1).shape[0] == 1
