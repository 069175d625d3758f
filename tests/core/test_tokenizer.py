"""CaptionTokenizer: the tokens that T5 was trained with, and cuts that the user can see."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest

from pixart_core.text.caption import mend_surrogates
from pixart_core.text.tokenizer import CaptionTokenizer

STARTER = Path(__file__).parents[2] / "starter"
SPECIALS = ["</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_99>", "<extra_id_100>"]
ODD = ["🎨", "漢", "\ufb01", "e\u0301", "\n", "\t", "  ", "\u200b", "Z", "½", "\u3000", "▁", "\x00",
       "\xa0", "<", ">", "\ufeff", "ｱﾞ", "👩‍👩‍👧", "1920x1080"]


def field(message: bytes, number: int) -> bytes:
    """The first length-delimited field `number` of a protobuf message (protobuf is not needed)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 2:
            length = varint()
            if key >> 3 == number:
                return message[at : at + length]
            at += length
        elif key & 7 == 0:
            varint()
        else:
            at += 4 if key & 7 == 5 else 8
    raise AssertionError(f"no field {number}")


@pytest.fixture(scope="module")
def words() -> list[str]:
    rng = random.Random(0)
    syllables = "ka lo mi ter ing au schön re dra go ba é li st un er".split()  # noqa: SIM905
    return ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(400)]


@pytest.fixture(scope="module")
def spiece(words) -> bytes:
    """A small unigram model laid out as T5's: pad 0, end 1, unknown 2, T5's normalisation."""
    import sentencepiece

    rng, out = random.Random(1), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(rng.choices(words, k=8)) for _ in range(1000)),
        model_writer=out, vocab_size=200, model_type="unigram", pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def oracle(spiece):
    """transformers' T5Tokenizer over the same model, built by hand since protobuf is optional."""
    import sentencepiece
    from transformers import T5Tokenizer

    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(spiece)
    vocab = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.vocab_size())]
    vocab += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    try:
        return T5Tokenizer(vocab=vocab, _spm_precompiled_charsmap=field(field(spiece, 3), 2),
                           extra_ids=100)
    except TypeError:
        pytest.skip("this transformers builds its T5 tokenizer in another way")


@pytest.fixture(scope="module")
def tokenizer(spiece, oracle) -> CaptionTokenizer:
    return CaptionTokenizer.from_spiece(spiece, embedding_rows=len(oracle) + 28)


@pytest.fixture(scope="module")
def starter() -> CaptionTokenizer:
    return CaptionTokenizer.from_path(STARTER / "text_encoders" / "t5")


def prompts(words: list[str], count: int) -> list[str]:
    rng = random.Random(2)
    atoms = words * 2 + SPECIALS * 20 + ODD * 10
    made = ["", " ", "🎨" * 50, " ".join(rng.choices(words, k=10_000))]
    for _ in range(count):
        size = rng.choice([1, 2, 5, 20])
        made.append("".join(rng.choice(atoms) + rng.choice(["", " "]) for _ in range(size)))
    return made


@pytest.mark.parametrize("max_tokens", [1, 2, 20, 120])
def test_equals_transformers(tokenizer, oracle, words, max_tokens):
    """Ids, truncation and literal special tokens are those of transformers' T5 tokenizer."""
    for prompt in prompts(words, 400):
        expected = oracle(prompt, truncation=True, max_length=max_tokens).input_ids
        assert tokenizer.encode(prompt, max_tokens).ids == expected, prompt


def test_tokenizer_json_equals_the_sentencepiece_model(tokenizer, oracle, words, tmp_path):
    """The saved tokenizer.json pads and cuts at 4; what it asks for must not come on top."""
    oracle.backend_tokenizer.enable_truncation(4)
    oracle.backend_tokenizer.enable_padding(length=4)
    oracle.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    from_json = CaptionTokenizer.from_path(tmp_path)
    assert (from_json.pad_id, from_json.eos_id, from_json.unk_id) == (0, 1, 2)
    assert from_json.vocab_size == tokenizer.vocab_size
    for prompt in prompts(words, 200):
        assert from_json.encode(prompt, 50) == tokenizer.encode(prompt, 50), prompt


def test_starter_special_ids_and_empty_prompt(starter):
    assert (starter.pad_id, starter.eos_id, starter.unk_id) == (0, 1, 2)
    empty = starter.encode("", 24)
    assert (empty.ids, empty.total, empty.is_cut) == ([1], 1, False)


def test_sentinels_are_plain_text_where_the_embedding_has_no_row_for_them(spiece):
    plain = CaptionTokenizer.from_spiece(spiece)
    assert max(plain.encode("<extra_id_0>", 99).ids) < plain.vocab_size
    assert len(plain.encode("<extra_id_0>", 99).ids) > 2


def test_the_end_token_survives_the_cut(starter):
    caption = starter.encode("a red circle on a blue background", 5)
    whole = starter.encode("a red circle on a blue background", 99)
    assert caption.ids == [*whole.ids[:4], 1]
    assert caption.total == len(whole.ids)
    assert caption.is_cut and not whole.is_cut


def test_cut_text_begins_at_the_first_word_not_kept_whole(starter):
    kept = "a small  red circle "
    room = len(starter.encode(kept, 999).ids) - 1
    prompt = kept + "on a blue background"
    for max_tokens in (room + 1, room + 2):
        caption = starter.encode(prompt, max_tokens)
        whole = starter.encode(caption.kept_text, 999).ids[:-1]
        assert caption.kept_text + caption.cut_text == prompt
        assert caption.ids[: len(whole)] == whole
        assert caption.cut_text.startswith("on a" if max_tokens == room + 1 else ("on", "a"))


def test_ten_thousand_words_and_emoji(starter):
    many = starter.encode("red circle " * 5000, 300)
    assert len(many.ids) == 300 and many.ids[-1] == 1 and many.total > 10_000
    emoji = starter.encode("🎨" * 1000, 120)
    assert set(emoji.ids) <= set(range(starter.vocab_size))


@pytest.mark.parametrize("prompt", ["\ud83d half an emoji", "a\x00b", "\ufffe\uffff"])
def test_broken_text_is_encoded(starter, prompt):
    caption = starter.encode(prompt, 99)
    assert caption.kept_text == prompt and caption.ids[-1] == 1


def test_halves_of_a_character_are_joined():
    assert mend_surrogates("a \ud83c\udfa8 b") == "a 🎨 b"
    assert mend_surrogates("\ufeffa \ud83c b") == "\ufeffa \ufffd b"


def test_wrong_arguments(starter):
    with pytest.raises(TypeError, match="a string, got list"):
        starter.encode(["a"], 5)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        starter.encode("a", 0)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 50])
def test_not_a_sentencepiece_model(tmp_path, content):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"spiece\.model is not a SentencePiece model"):
        CaptionTokenizer.from_path(tmp_path)


def test_another_familys_sentencepiece_model_is_refused():
    """Llama's model has no pad token; T5 would be fed ids that mean something else."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle", "a blue square"] * 20), model_writer=out,
        vocab_size=20, model_type="char", minloglevel=2, hard_vocab_limit=False,
    )
    with pytest.raises(ValueError, match="has no pad token"):
        CaptionTokenizer.from_spiece(out.getvalue())


def test_bad_tokenizer_json_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist; give the path of a spiece\.model"):
        CaptionTokenizer.from_path(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"holds no spiece\.model or tokenizer\.json"):
        CaptionTokenizer.from_path(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        CaptionTokenizer.from_path(tmp_path)
