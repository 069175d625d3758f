"""The help pages in Chinese: one for each node, with the names its Chinese page shows.

The page asks for web/docs/<node id>/<language>.md and takes <node id>.md where there is none. The
English ones are held to the nodes by test_help_pages.py, the texts on the nodes by the host suite.
"""

import json
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = REPOSITORY / "web" / "docs"
ENGLISH, CHINESE = (json.loads((REPOSITORY / "locales" / language / "nodeDefs.json").read_text(
    encoding="utf-8")) for language in ("en", "zh"))
HEADINGS = ["输入", "输出", "如何选择", "示例", "注意事项"]


def page(node, language="zh"):
    path = PAGES / f"{node}.md" if language == "en" else PAGES / node / f"{language}.md"
    return path.read_text(encoding="utf-8")


def numbers(text):
    return set(re.findall(r"\d+(?:\.\d+)?", text))


def test_every_node_has_a_page_and_no_page_is_left_over():
    pages = {path.relative_to(PAGES).as_posix() for path in PAGES.glob("*/*")}
    assert pages == {f"{node}/zh.md" for node in ENGLISH}


@pytest.mark.parametrize("node", ENGLISH)
def test_a_page_is_headed_as_the_node_is_called(node):
    text = page(node)
    assert text.startswith(f"# {CHINESE[node]['display_name']}\n")
    headings = re.findall(r"^## (\S+)", text, re.M)
    assert [heading.removesuffix("文件") for heading in headings] == HEADINGS


@pytest.mark.parametrize("node", ENGLISH)
def test_every_input_and_output_is_in_the_tables(node):
    """By the name on the node and, for workflows and messages, by its id."""
    rows = "".join(line.split("|")[1] for line in page(node).splitlines() if line.startswith("| "))
    missing = [f"{CHINESE[node][kind][key]['name']} `{socket['name']}`"
               for kind in ("inputs", "outputs") for key, socket in ENGLISH[node][kind].items()
               if f"{CHINESE[node][kind][key]['name']} `{socket['name']}`" not in rows]
    assert not missing, f"{node}/zh.md has no table row for {missing}"


@pytest.mark.parametrize("node", ENGLISH)
def test_a_page_has_the_numbers_of_the_english_one(node):
    """A default, a size or a limit that changes in English changes in Chinese too."""
    english, chinese = numbers(page(node, "en")), numbers(page(node))
    assert english == chinese, f"{node}: not in Chinese {english - chinese}, " \
                               f"only in Chinese {chinese - english}"


@pytest.mark.parametrize("node", ENGLISH)
def test_a_page_calls_the_other_nodes_as_they_are_called(node):
    """A node the English page sends the reader to is named in Chinese as on the node itself."""
    english, chinese = page(node, "en"), page(node)
    missing = [CHINESE[other]["display_name"] for other, texts in ENGLISH.items()
               if re.search(rf"\b{re.escape(texts['display_name'])}\b", english)
               and CHINESE[other]["display_name"] not in chinese]
    assert not missing
