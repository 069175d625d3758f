"""Prompt cleaning as PixArt's training captions were cleaned (the DeepFloyd recipe).

PixArt-alpha cleaned every training caption, and cleans every prompt, with the recipe that the
DeepFloyd team published for web captions, applied twice in a row. It was made for scraped alt
texts, so it is rough on prompts: everything is lower case, and "x2", "1920x1080" or "page 3" are
dropped. PixArt-Sigma's own scripts do not clean; diffusers cleans for both by default.

The steps stand in one table, `STEPS`, in the order in which they run. Each pattern reads the text
in time proportional to its length: nothing here backtracks over the same run of characters from
many starting points, so a hostile prompt cannot hang the host.
"""

from __future__ import annotations

import html
import importlib
import re
import urllib.parse
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

PASSES = 2

_TOP_LEVEL_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_CJK = "\u31c0-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff"
_DASHES = (
    "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_BAD_PUNCTUATION = "#®•©™&@·º½¾¿¡§~()\\[\\]{}|\\\\/*"
_DOUBLE_QUOTES, _SINGLE_QUOTES = "`\u00b4«»“”¨", "\u2018\u2019"
_QUOTES = str.maketrans(dict.fromkeys(_DOUBLE_QUOTES, '"') | dict.fromkeys(_SINGLE_QUOTES, "'"))
_TIMES = "x\u0445\u00d7"  # Latin x, Cyrillic ha, multiplication sign
_NUMBER = r"\d+(?:\.\d*)?"
_UNCLOSED_MARKUP_LIMIT = 4_000_000


class Step(NamedTuple):
    """One cleaning step: what it is called, why it is there, and the function that does it."""

    name: str
    why: str
    apply: Callable[[str], str]


def _replace(pattern: str, by: str) -> Callable[[str], str]:
    compiled = re.compile(pattern)
    return lambda text: compiled.sub(by, text)


def _drop_web_addresses(scheme: str) -> Callable[[str], str]:
    """Remove `scheme:/` prefixes and bare domains with their path.

    A run of host-name characters that holds no domain is stepped over whole (up to a scheme
    inside it): no later start within the run could match, and trying them all would be quadratic.
    """
    prefix = rf"{scheme}:(?:/{{1,3}}|[a-z0-9%])"
    domain = rf"[a-z0-9.-]+\.(?:{_TOP_LEVEL_DOMAINS})[\w/-]*\b/?(?!@)"
    step_over = rf"(?P<kept>[a-z0-9.-]+?)(?=\b{prefix}|[^a-z0-9.-]|\Z)"
    return _replace(rf"\b(?:{prefix}|{domain}|{step_over})", r"\g<kept>")


def _unquote(text: str) -> str:
    return urllib.parse.unquote_plus(text).strip().lower().replace("<person>", "person")


def _drop_markup(text: str) -> str:
    if "<" not in text and "&" not in text:
        return text
    tail = text[text.rfind(">") + 1 :]
    if tail.count("<") * len(tail) > _UNCLOSED_MARKUP_LIMIT:
        return text  # the parser would look for the end of each unclosed tag anew, for minutes
    bs4 = _optional("bs4")
    with warnings.catch_warnings():
        # A prompt that looks like a file name or a link is still a prompt.
        warnings.simplefilter("ignore")
        try:
            return bs4.BeautifulSoup(text, features="html.parser").text
        except bs4.exceptions.ParserRejectedMarkup:
            return text


def _split_dashed_words(text: str) -> str:
    if text.count("-") + text.count("_") <= 3:
        return text
    return text.replace("-", " ").replace("_", " ")


def _repair_unicode(text: str) -> str:
    plain = text.replace("\n", " ")
    if not (plain.isascii() and plain.isprintable()):  # ftfy changes nothing else
        text = _optional("ftfy").fix_text(text)
    return html.unescape(html.unescape(text))


STEPS: tuple[Step, ...] = (
    Step("unquote", "alt texts came URL-quoted; case carries no meaning", _unquote),
    Step("links", "links name no picture content", _drop_web_addresses("https?")),
    Step("www", "the same for www: and for domains that are left", _drop_web_addresses("www")),
    Step("markup", "alt texts held HTML", _drop_markup),
    Step("nicknames", "@names are not content", _replace(r"@\w+\b", "")),
    Step("cjk", "T5 v1.1 knows no CJK: these would all be <unk>", _replace(f"[{_CJK}]+", "")),
    Step("dashes", "one dash for all the Unicode ones", _replace(f"[{_DASHES}]+", "-")),
    Step("quotes", "one double and one single quote", lambda text: text.translate(_QUOTES)),
    Step("entities", "entities that were escaped twice", _replace(r"&quot;?|&amp", "")),
    Step("ip", "addresses of machines", _replace(r"\d{1,3}(?:\.\d{1,3}){3}", " ")),
    Step("article_id", "shop ids at the end of a caption", _replace(r"\d:\d\d\s+\Z", "")),
    Step("newlines", "line breaks that were escaped", _replace(r"\\n", " ")),
    Step("short_tags", "#12", _replace(r"#\d{1,3}\b", "")),
    Step("long_tags", "#12345", _replace(r"#\d{5,}\b", "")),
    Step("long_numbers", "123456 is an id", _replace(r"\b\d{6,}\b", "")),
    Step("file_names", "photo.jpg", _replace(rf"(?<!\S)\S+\.(?:{_FILE_TYPES})", "")),
    Step("quote_runs", "several quotes to one", _replace("[\"']{2,}", '"')),
    Step("dot_runs", "an ellipsis to a space", _replace(r"\.{2,}", " ")),
    Step("punctuation", "marks of no meaning", _replace(f"[{_BAD_PUNCTUATION}]+", " ")),
    Step("lone_dots", "a dot between spaces", _replace(r"(?<!\s)\s+\.\s+", " ")),
    Step("dashed_words", "slugs-like-this-one-here", _split_dashed_words),
    Step("unicode", "mojibake, and entities that are left", _repair_unicode),
    Step("ids_abc123", "jc6640", _replace(r"\b[a-zA-Z]{1,3}\d{3,15}\b", "")),
    Step("ids_a1b", "jc6640vc", _replace(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", "")),
    Step("ids_1a2", "6640vc231", _replace(r"\b\d+[a-zA-Z]+\d+\b", "")),
    Step("shipping", "shop talk", _replace(r"(?:worldwide\s+)?(?:free\s+)?shipping", "")),
    Step("download", "shop talk", _replace(r"(?:free\s)?download(?:\sfree)?", "")),
    Step("click", "page talk", _replace(r"\bclick\b\s(?:for|on)\s\w+", "")),
    Step("file_types", "png images", _replace(rf"\b(?:{_FILE_TYPES})(?:\simages?)?", "")),
    Step("pages", "page 12", _replace(r"\bpage\s+\d+\b", "")),
    Step("ids_a1b2", "j2d1a2a", _replace(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " ")),
    Step("sizes", "1920x1080", _replace(rf"\b{_NUMBER}[{_TIMES}]{_NUMBER}\b", "")),
    Step("colons", "no space before a colon", _replace(r"\b\s+:\s+", ": ")),
    Step("commas", "a space after a mark", _replace(r"(\D[,./])\b", r"\1 ")),
    Step("spaces", "one space at a time", _replace(r"\s+", " ")),
    Step("outer_quotes", "a caption quoted whole", _replace("(?s)^[\"'](.+)[\"']\\Z", r"\1")),
    Step("first_mark", "left over by the steps above", _replace(r"^['_,:;-]", "")),
    Step("last_mark", "left over by the steps above", _replace(r"['_,:+-]\Z", "")),
    Step("lone_extension", "a file name whose stem is gone", _replace(r"^\.\S+\Z", "")),
    Step("strip", "no space at the ends", str.strip),
)


def clean_caption(text: str) -> str:
    """`text` cleaned twice as PixArt-alpha's training captions were; "" stays "".

    Equal, character for character, to diffusers' PixArt pipelines with `clean_caption=True`
    (arXiv 2310.00426, appendix; diffusion/model/t5.py in the official code), except that markup
    which the HTML parser refuses, or thousands of tags without an end, are kept as text.

    Raises TypeError if `text` is not a string and RuntimeError if it needs ftfy (letters beyond
    ASCII) or Beautiful Soup (HTML) and the package is not installed.
    """
    if not isinstance(text, str):
        raise TypeError(f"clean_caption takes a string, got {type(text).__name__}")
    text = mend_surrogates(text)
    for _ in range(PASSES):
        for step in STEPS:
            text = step.apply(text)
    return text


def mend_surrogates(text: str) -> str:
    """`text` with halves of a character that JSON split joined again, and lone halves as U+FFFD.

    Neither the HTML parser nor the tokenizer takes a lone half, which has no UTF-8 form.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def simple_caption(text: str) -> str:
    """`text` in lower case without outer white space: PixArt's own fallback, needs no package."""
    if not isinstance(text, str):
        raise TypeError(f"simple_caption takes a string, got {type(text).__name__}")
    return text.lower().strip()


def _optional(module: str) -> ModuleType:
    """Import `module`, one of the two packages that only caption cleaning needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(
            f"cleaning a caption as PixArt was trained needs the Python package {module!r}, which "
            "is not installed: run `pip install ftfy beautifulsoup4`, or leave the prompt as it "
            "is with clean_caption=False (simple_caption lower-cases and strips without a package)"
        ) from error
