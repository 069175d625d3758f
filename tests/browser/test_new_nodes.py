"""A new node of each kind: its values, and the help behind its info button as it is read."""

import re
from pathlib import Path

import pytest
from workflow import inputs_of

PAGES = Path(__file__).resolve().parents[2] / "web" / "docs"
NODES = sorted(path.stem for path in PAGES.glob("*.md"))


@pytest.fixture(scope="module")
def object_info(server):
    return server.object_info()


def test_every_node_of_the_pack_has_a_page(object_info):
    assert sorted(node for node in object_info if node.startswith("PixArt")
                  and "custom_nodes" in object_info[node]["python_module"]) == NODES


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
    wide = text.evaluate("""panel => [...panel.querySelectorAll("table")]
        .filter(table => table.getBoundingClientRect().width
            > Math.max(panel.clientWidth, 280) + 1)  // hosts of 2025 open it at 200
        .map(table => table.innerText.slice(0, 60))""")
    assert wide == [], "columns are cut off"


@pytest.mark.parametrize("node", NODES)
def test_a_new_node_starts_with_the_defaults(node, page, object_info):
    values = page.add_node(node)
    wanted = {name: options["default"] for name, _, options in inputs_of(object_info[node])
              if "default" in options and not options.get("forceInput")}
    assert {name: values.get(name) for name in wanted} == wanted


def test_the_console_has_no_error_of_this_pack(page):
    """Last, so that it sees what opening them all wrote."""
    assert page.our_errors() == []
