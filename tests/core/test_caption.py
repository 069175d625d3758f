"""Caption cleaning: equal to the training-time recipe, and safe on any prompt."""

# ruff: noqa: RUF001 - look-alike characters are what is tested

from __future__ import annotations

import builtins
import random
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_core.text.caption import STEPS, clean_caption, simple_caption

PIECES = re.findall(
    r"\S+",
    """
http:// https: https:// www: www. www:/ http x.com foo.co.uk/a-b/c?d=e a.ru b.net/ c.org@ me@d.edu
-.it é.com ab. .com .comx / @ @nick @a.b <b> </b> <br/> <a\u00a0href='x'> < & &amp; &lt; &quot;
&amp;quot; &amp;amp; &nbsp; &#65; <person> <!-- --> 漢字 ㆙ ㌀ 㐀 ䷀ — -- - _ 〜 - ‐ ' " “ ” ‘ ’ ` ´
« » ¨ „ 1.2.3.4 127.0.0.1 1:45 \\n #1 #12 #1234 #12345 123456 1234567 12 3 a B abc Z photo.png x.JPG
a.jpeg.y .pdf webp mp4 png jpg image images .. ... . , : ; + %20 %41 % # ® • © ™ · º ½ ¿ ¡ § ~ ( )
[ ] { } | \\ * jc6640 jc6640vc 6640vc231 j2d1a2a a1 1a worldwide free shipping download click for on
page 1920x1080 3.5×2.25 10х20 10x x 🎨 😀 schÃ¶n â€œ â€™ Ã© Â ﬁ Ａ １ ٣ É İ ß ſ Ⅳ cat red _a é
""",
)
PIECES += ["\n", "\t", " ", "  ", " 1:23 ", " . ", " : ", "click on", "page 12", "free shipping",
           "a photo of", "png images", "\u200b", "\ufeff", "\x00", "\x85", "\x93", "\x1c", "\u2028"]

CLEANED = {
    "": "",
    "  A Small RED Circle  ": "a small red circle",
    "see https://example.com/a-b now": "see now",
    "a <b>bold</b> cat&nbsp;": "a bold cat",
    "by @someone — a “quoted” word": 'by - a "quoted" word',
    "a 漢字 cat 🎨": "a cat 🎨",
    "cat 1920x1080 photo.jpg, free shipping": "cat",
    "a â€œcat": 'a "cat',
    "one-two-three-four-five": "one two three four five",
    "red,blue.green": "red, blue. green",
    "https://a.b": "a. b",
    "'a cat'": "a cat",
}


@pytest.fixture(scope="module")
def oracle():
    """diffusers' PixArt caption cleaning, which is the official recipe, as a function."""
    pipelines = pytest.importorskip("diffusers")
    pipeline = pipelines.PixArtAlphaPipeline
    bare = pipeline.__new__(pipeline)
    return lambda text: pipeline._text_preprocessing(bare, text, clean_caption=True)[0]


def random_prompt(rng: random.Random) -> str:
    glue = rng.choice(["", " ", None])
    parts = []
    for _ in range(rng.choice([1, 2, 3, 5, 8, 15, 30])):
        parts += [rng.choice(PIECES), rng.choice(["", " "]) if glue is None else glue]
    prompt = "".join(parts)
    return "".join(rng.sample(prompt, len(prompt))) if rng.random() < 0.2 else prompt


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(8))
def test_equals_the_official_cleaning_on_web_captions(oracle, seed):
    rng = random.Random(seed)
    for _ in range(750):
        prompt = random_prompt(rng)
        assert clean_caption(prompt) == oracle(prompt), prompt


@pytest.mark.filterwarnings("ignore")
def test_equals_the_official_cleaning_on_any_text(oracle):
    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(st.text(max_size=80))
    def check(prompt):
        assert clean_caption(prompt) == oracle(prompt)

    check()


def test_half_an_emoji_is_cleaned_too():
    """The web page can send one; the HTML parser cannot take it."""
    assert clean_caption("cat &\ud83d x") == "cat \ufffd x"
    assert clean_caption("cat &\ud83d\ude00") == "cat 😀"


@pytest.mark.parametrize("prompt", CLEANED)
def test_known_results(prompt):
    """Holds the recipe where diffusers is not installed."""
    assert clean_caption(prompt) == CLEANED[prompt]


@pytest.mark.parametrize(
    "prompt",
    ["a." * 30_000, "<a " * 30_000, "x" * 60_000, " \n" * 30_000, "1." * 30_000, "a1" * 30_000,
     "🎨" * 20_000, "a red circle " * 3_400, "\"'" * 30_000, "<![" * 1000],
    ids=lambda prompt: repr(prompt[:5]),
)
def test_long_and_hostile_prompts_come_back(prompt):
    """A pattern that backtracks quadratically would hold the host for minutes here."""
    assert isinstance(clean_caption(prompt), str)


def test_each_step_has_a_name_and_a_reason():
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert all(step.why for step in STEPS)


@pytest.mark.parametrize(("missing", "text"), [("bs4", "a <b>cat</b>"), ("ftfy", "a caf\u00e9")])
def test_missing_package_names_what_to_install(monkeypatch, missing, text):
    """Plain prompts need neither; the others say what is wanted instead of coming out wrong."""
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == missing:
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(RuntimeError, match=r"pip install ftfy beautifulsoup4.*clean_caption=False"):
        clean_caption(text)
    assert clean_caption("A cat,\non a mat") == "a cat, on a mat"
    assert simple_caption("  A Cat ") == "a cat"


@pytest.mark.parametrize("function", [clean_caption, simple_caption])
def test_only_strings_are_captions(function):
    with pytest.raises(TypeError, match="takes a string, got list"):
        function(["a cat"])
