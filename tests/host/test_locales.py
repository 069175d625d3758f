"""The node pack in the languages of its page: what the host hands the page of locales/.

English comes from the schemas; `python tests/host/locales.py` writes it and lists what is then left
to translate. The messages below name each text by its path in nodeDefs.json.
"""

import json
import re

import pytest

from locales import LOCALES, english, flat, inputs_of, our_nodes

LANGUAGES = ["en", "zh"]
UPDATE = "run `python tests/host/locales.py`, then translate what it lists"

# the page has these categories in every language
STOCK_CATEGORIES = {"loaders", "conditioning", "latent", "sampling", "image"}

# what Chinese users call by its English name, too
SAME_NAME = {"CLIP", "VAE", "Latent", "ControlNet", "Sigmas", "eta", "alpha"}
CHINESE = re.compile(r"[\u4e00-\u9fff]")
NUMBER = re.compile(r"\d+(?:\.\d+)?")

# the page compiles a message: these would be a variable, a link or a plural
MESSAGE_SYNTAX = re.compile(r"[{}@|]")


@pytest.fixture(scope="module")
def wanted(host):
    """{path: English text} of every text of the pack, from the schemas."""
    return flat(english(host.object_info()))


@pytest.fixture(scope="module")
def served(host):
    """{language: what the page gets}; the pack is the only one here that has locales."""
    return host.get("/i18n")


@pytest.fixture(scope="module")
def chinese(served, wanted):
    """{path: Chinese text}, "" where there is none, which the second test says."""
    texts = flat(served["zh"]["nodeDefs"])
    return {path: texts.get(path, "") for path in wanted}


def listed(title, paths, texts=None):
    """`title` and a line for each path, with its text; "" where there is none."""
    if not paths:
        return ""
    lines = [f"  {'.'.join(path)}" + (f": {texts[path]!r}" if texts else "") for path in paths]
    return "\n".join([title, *lines])


def test_the_page_gets_these_languages(served):
    """Were the files not where the host looks, every other test would speak of nothing."""
    assert sorted(served) == sorted(path.name for path in LOCALES.iterdir()) == LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_there_and_none_is_left_over(served, wanted, language):
    texts = flat(served[language]["nodeDefs"])
    missing = [path for path in wanted if not texts.get(path)]
    left_over = [path for path in texts if path not in wanted]
    assert not missing + left_over, "\n".join([
        listed(f"{language} lacks these; {UPDATE}:", missing, wanted),
        listed(f"{language} has these for nothing:", left_over)])


def test_every_node_of_the_pack_is_looked_at(host, wanted):
    """`wanted` is of the pack itself, not of nodes whose names look like it."""
    nodes = our_nodes(host.object_info())
    assert {path[0] for path in wanted} == set(nodes) != set()
    assert all(name.startswith("PixArt") for name in nodes)


def test_english_is_what_the_schemas_say(served, wanted):
    """The page shows the locale in place of the schema: a stale one would hide a new tooltip."""
    texts = flat(served["en"]["nodeDefs"])
    stale = [path for path in wanted if texts.get(path) != wanted[path]]
    assert not stale, listed(f"en differs from the schema; {UPDATE}; the schema says:", stale,
                             wanted)


def test_chinese_is_chinese(chinese):
    english_still = [path for path, text in chinese.items()
                     if not CHINESE.search(text) and text not in SAME_NAME]
    assert not english_still, listed("these are to be translated:", english_still, chinese)


def test_chinese_has_the_same_numbers(chinese, wanted):
    """Limits, defaults and formats are facts: 120 tokens are 120 in every language."""
    other = [path for path, text in chinese.items()
             if set(NUMBER.findall(text)) != set(NUMBER.findall(wanted[path]))]
    assert not other, listed("these have other numbers than the English:", other, chinese)


def test_a_node_is_called_the_same_everywhere(chinese, wanted):
    """A tooltip that sends the reader to another of our nodes uses the name on that node."""
    names = {text: chinese[path] for path, text in wanted.items() if path[1] == "display_name"}
    assert len(set(names.values())) == len(names)
    wrong = [path for path, text in wanted.items() for name, translated in names.items()
             if re.search(rf"\b{re.escape(name)}\b", text) and translated not in chinese[path]]
    assert not wrong, listed("these call one of our nodes by another name:", wrong, chinese)


def test_an_input_is_called_the_same_on_every_node(chinese, wanted):
    """`steps` is not one word here and another there."""
    found = {}
    for path, text in wanted.items():
        if path[-1] == "name":
            found.setdefault(text, set()).add(chinese[path])
    several = {text: words for text, words in found.items() if len(words) > 1}
    # width to height as people say it, but height to width where PixArt is told of it
    assert several == {"aspect_ratio": {"宽高比", "高宽比"}}


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_is_taken_for_message_syntax(served, language):
    """A brace, @ or | makes the page show the English of the schema, or half a text."""
    texts = flat(served[language])
    broken = [path for path, text in texts.items() if MESSAGE_SYNTAX.search(text)]
    assert not broken, listed("the page cannot show these as they are:", broken, texts)


@pytest.mark.parametrize("language", LANGUAGES)
def test_categories_that_are_our_own_have_a_name(host, served, language):
    ours = {part for node in our_nodes(host.object_info()).values()
            for part in node["category"].split("/")} - STOCK_CATEGORIES
    assert served[language]["nodeCategories"].keys() == ours, f"locales/{language}/main.json"


def test_the_files_are_in_the_order_of_the_nodes():
    """So that a change of both languages is read side by side."""
    files = [json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))
             for language in LANGUAGES]
    assert list(flat(files[0])) == list(flat(files[1]))


def test_inputs_behind_a_choice_are_found(host):
    """A dynamic combo brings inputs of its own; seen on a stock node of hosts that have one."""
    nodes = host.object_info()
    dynamic = {name: node for name, node in nodes.items()
               for _, (kind, *_) in node["input"].get("required", {}).items()
               if kind == "COMFY_DYNAMICCOMBO_V3"}
    if not dynamic:
        pytest.skip("this host has no node with a dynamic combo")
    for name, node in dynamic.items():
        assert any("." in found for found, _ in inputs_of(node["input"])), name
