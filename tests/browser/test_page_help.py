"""The help of every node, behind the info button on it: the pages of web/docs as they are read."""

import re
from pathlib import Path

import pytest

PAGES = Path(__file__).resolve().parents[2] / "web" / "docs"
NODES = sorted(path.stem for path in PAGES.glob("*.md"))


@pytest.mark.parametrize("node", NODES)
def test_the_info_button_opens_the_page(node, page):
    """With its headings, and with tables as wide as the panel at most."""
    source = (PAGES / f"{node}.md").read_text(encoding="utf-8")
    title, *headings = re.findall(r"^##? (.+)$", source, re.M)
    text = page.help_of(node)
    text.get_by_role("heading", name=title, exact=True, level=1).wait_for()
    page.screenshot(f"help {node}")
    assert text.get_by_role("heading", level=2).all_inner_texts() == headings
    rows = len(re.findall(r"^\| ", source, re.M))
    assert text.locator("tr").count() == rows


def test_the_console_has_no_error_of_this_pack(page):
    """Last, so that it sees what opening them all wrote."""
    assert page.our_errors() == []
