"""The templates on the page: listed with their thumbnails, and each opens without a complaint."""

from pathlib import Path

import pytest
from workflow import load

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


@pytest.fixture(scope="module", params=NAMES)
def template(request, page):
    """The name of a template that was just opened; each is opened once for all its tests."""
    page.open_template(request.param)
    page.screenshot(f"open {request.param}")
    return request.param


def test_the_template_browser_lists_every_template_with_its_thumbnail(page):
    page.browse_templates()
    listed = [card.get_attribute("data-testid") for card in page.card("").all()]
    assert sorted(listed) == sorted(f"template-workflow-{name}" for name in NAMES)
    for name in NAMES:
        assert name in page.card(name).inner_text()
        assert page.thumbnail_width(name) == 400
    page.screenshot("templates")


def test_a_template_opens_with_every_node_and_file_found(template, page):
    nodes = {node["id"]: node for node in page.nodes()}
    assert {i: node["type"] for i, node in nodes.items()} == {
        str(node["id"]): node["type"] for node in load(FOLDER / f"{template}.json")["nodes"]}
    for node in nodes.values():
        assert node["known"] and not node["marked"], node
        for widget, value, values in node["choices"]:
            assert value in values, (node["type"], widget)
    assert page.complaints() == []


def test_the_page_queues_the_api_file(template, page):
    """Every link and value arrives where it belongs, in the page's own words."""
    queued = page.prompt()
    for prompt in (queued, wanted := load(FOLDER / "api" / f"{template}.json")):
        for node in prompt.values():
            node.pop("_meta", None)
    assert queued == wanted


def test_the_note_is_not_cut(template, page):
    """The note is as tall as its text, as the page sets it."""
    unseen = page.unseen_of_the_note()
    assert unseen and max(unseen) <= 1


def test_the_console_has_no_error_of_this_pack(page):
    """Last, so that it sees what opening them all wrote."""
    assert page.our_errors() == []
