"""The templates on the page: listed with their thumbnails, opened, and four run by the page's own
Run button, with previews while sampling and the picture at the end."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from checks import has_kitchen, require_kitchen
from workflow import NOTES, load

from pixart_core.starter import find_starter

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
TITLE = 30  # the height of a node's title bar, above its box
SLOW = "PixArt-alpha text to image"  # runs with more steps: the starter is done in a second
QUANTIZED = "PixArt 4 GB"
SAMPLERS = {SLOW: "KSampler",
            "PixArt-delta LCM 4 steps": "PixArtLCMSampler",
            QUANTIZED: "PixArtLCMSampler",
            "PixArt-alpha ControlNet HED": "KSampler"}


@dataclass
class Visit:
    """What the page showed of a template."""

    nodes: list[dict]
    complaints: list[str]
    text_shows: bool
    queued: dict[str, dict]
    unseen_of_the_note: list[int] = field(default_factory=list)
    seen: list[list] = field(default_factory=list)  # during the run
    nodes_after: list[dict] = field(default_factory=list)


@pytest.fixture(scope="module")
def visit(page, installation):
    """Name -> Visit. Each template is opened once, and run if SAMPLERS has it."""
    made = {}

    def visit(name):
        runs = name in SAMPLERS and (name != QUANTIZED or has_kitchen(installation))
        if name not in made:
            made[name] = None
            made[name] = _visit(page, name, runs)
        assert made[name], "the first test of this template says what went wrong"
        return made[name]

    return visit


@pytest.fixture
def run_of(visit, installation):
    """Name -> Visit of a template that was run."""
    def run_of(name):
        if name == QUANTIZED:
            require_kitchen(installation)
        return visit(name)

    return run_of


def _visit(page, name, runs):
    page.open_template(name)
    page.screenshot(f"open {name}")
    seen = Visit(page.nodes(), page.complaints(), page.text_shows(), page.prompt())
    if runs:
        if name == SLOW:
            page.set_widget("KSampler", "steps", 60)
        page.run()
        page.wait_for_picture("SaveImage")
        page.screenshot(f"run {name}")
        seen.seen, seen.nodes_after = page.seen(), page.nodes()
    seen.unseen_of_the_note = page.unseen_of_the_note()  # last: it takes the nodes out of sight
    return seen


def test_the_template_browser_lists_every_template_with_its_thumbnail(page):
    page.browse_templates()
    listed = [card.get_attribute("data-testid") for card in page.card("").all()]
    assert sorted(listed) == sorted(f"template-workflow-{name}" for name in NAMES)
    for name in NAMES:
        assert name in page.card(name).inner_text()
        assert page.thumbnail_width(name) == 400
    page.screenshot("templates")


@pytest.mark.parametrize("name", NAMES)
def test_a_template_opens_with_every_node_and_file_found(name, visit):
    nodes = {node["id"]: node for node in visit(name).nodes}
    assert {i: node["type"] for i, node in nodes.items()} == {
        str(node["id"]): node["type"] for node in load(FOLDER / f"{name}.json")["nodes"]}
    for node in nodes.values():
        assert node["known"] and not node["marked"], node
        for widget, value, values in node["choices"]:
            assert value in values, (node["type"], widget)
    assert visit(name).complaints == []


@pytest.mark.parametrize("name", NAMES)
def test_the_page_queues_the_api_file(name, visit):
    """Every link and value arrives where it belongs, in the page's own words."""
    wanted = load(FOLDER / "api" / f"{name}.json")
    without_titles = [{i: {**node, "_meta": None} for i, node in prompt.items()}
                      for prompt in (visit(name).queued, wanted)]
    assert without_titles[0] == without_titles[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_text_of_the_nodes_shows_at_once(name, visit):
    """The page fits a template into the window; a wide or tall one would open as empty boxes."""
    assert visit(name).text_shows


@pytest.mark.parametrize("name", NAMES)
def test_the_note_is_not_cut(name, visit):
    """The note is as tall as its text, as the page sets it."""
    unseen = visit(name).unseen_of_the_note
    assert unseen and max(unseen) <= 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_ends_with_the_picture_on_the_page(name, run_of):
    seen, nodes = run_of(name).seen, run_of(name).nodes_after
    assert "execution_success" in [kind for kind, _ in seen]
    [[address, width]] = next(n["pictures"] for n in nodes if n["type"] == "SaveImage")
    prefix = next(n["inputs"]["filename_prefix"]
                  for n in load(FOLDER / "api" / f"{name}.json").values()
                  if n["class_type"] == "SaveImage")
    assert prefix.replace(" ", "%20") in address and width == find_starter().image_size


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_sampler_shows_previews(name, run_of):
    """Pictures the sampler sent, not files of the server."""
    shown = [address for kind, detail in run_of(name).seen if kind == "shown"
             for node, address in [detail] if node == SAMPLERS[name]]
    assert shown and all(address.startswith("blob:") for address in shown)


def test_the_preview_shows_while_sampling_goes_on(visit):
    seen, nodes = visit(SLOW).seen, visit(SLOW).nodes_after
    decode = next(node["id"] for node in nodes if node["type"] == "VAEDecode")
    shown = [i for i, (kind, detail) in enumerate(seen)
             if kind == "shown" and detail[0] == "KSampler" and detail[1].startswith("blob:")]
    assert shown and shown[0] < seen.index(["executing", decode])


@pytest.mark.parametrize("name", SAMPLERS)
def test_there_is_room_for_what_a_run_adds(name, run_of):
    """Nodes grow by previews and token counts; they stay in their groups, beside each other."""
    groups = [group["bounding"] for group in load(FOLDER / f"{name}.json")["groups"]]
    boxes = [(n["type"], n["box"]) for n in run_of(name).nodes_after if n["type"] not in NOTES]
    for i, (kind, (x, y, width, height)) in enumerate(boxes):
        assert any(gx <= x and gy <= y and x + width <= gx + gw and y + height <= gy + gh
                   for gx, gy, gw, gh in groups), (kind, height)
        for other, (ox, oy, other_width, other_height) in boxes[i + 1:]:
            assert (x + width <= ox or ox + other_width <= x or y + height <= oy - TITLE
                    or oy + other_height <= y - TITLE), (kind, other)


def test_the_console_has_no_error_of_this_pack(page):
    """Last, so that it sees what opening and running them wrote."""
    assert page.our_errors() == []
