"""The templates on the page: listed with their thumbnails, and each opens without a complaint."""

from pathlib import Path

import pytest
from workflow import NOTES, load

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


@pytest.fixture(scope="module")
def opened(page):
    """Opens a template once: the page with it."""
    made = []

    def open_template(name):
        if made != [name]:
            page.open_template(name)
            page.screenshot(f"open {name}")
            made[:] = [name]
        return page

    return open_template


def test_the_template_browser_lists_every_template_with_its_thumbnail(page):
    dialog = page.browse_templates()
    listed = [card.get_attribute("data-testid") for card in page.card("").all()]
    assert sorted(listed) == sorted(f"template-workflow-{name}" for name in NAMES)
    for name in NAMES:
        card = page.card(name)
        card.scroll_into_view_if_needed()
        assert name in card.inner_text()
        picture = card.locator("img").first.element_handle()
        page.tab.wait_for_function("img => img.naturalWidth === 400", arg=picture)
    page.screenshot("templates")
    page.tab.keyboard.press("Escape")
    dialog.wait_for(state="detached")


@pytest.mark.parametrize("name", NAMES)
def test_a_template_opens_with_every_node_and_file_found(name, opened):
    page = opened(name)
    nodes = {node["id"]: node for node in page.nodes()}
    assert {i: node["type"] for i, node in nodes.items()} == {
        str(node["id"]): node["type"] for node in load(FOLDER / f"{name}.json")["nodes"]}
    for node in nodes.values():
        assert node["known"] and not node["marked"], node
        for widget, value, values in node["choices"]:
            assert value in values, (node["type"], widget)
    assert page.complaints() == []


@pytest.mark.parametrize("name", NAMES)
def test_the_page_queues_the_api_file(name, opened):
    """Every link and value arrives where it belongs, in the page's own words."""
    queued = opened(name).prompt()
    for prompt in (queued, wanted := load(FOLDER / "api" / f"{name}.json")):
        for node in prompt.values():
            node.pop("_meta", None)
    assert queued == wanted


@pytest.mark.parametrize("name", NAMES)
def test_no_note_is_cut(name, opened):
    """The note is as tall as its text, as the page sets it."""
    page = opened(name)
    assert any(node["type"] in NOTES for node in page.nodes())
    cut = page.tab.evaluate("""() => [...document.querySelectorAll(".comfy-markdown, .tiptap")]
        .filter(e => e.offsetParent && e.scrollHeight > e.clientHeight + 1)
        .map(e => [e.className, e.scrollHeight, e.clientHeight])""")
    assert cut == []


def test_the_console_has_no_error_of_this_pack(page):
    """Last, so that it sees what opening them all wrote."""
    assert page.our_errors() == []
