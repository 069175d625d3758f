"""Templates run by the page's own Run button: previews while sampling, the picture at the end."""

from pathlib import Path

import pytest
from workflow import NOTES, load

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
TITLE = 30  # the height of a node's title bar, above its box
SAMPLERS = {"PixArt-alpha text to image": "KSampler",
            "PixArt-delta LCM 4 steps": "PixArtLCMSampler",
            "PixArt-alpha ControlNet HED": "KSampler"}


@pytest.fixture(scope="module")
def runs(page):
    """Name -> (what was seen during the run, the nodes after it), each template run once."""
    made = {}

    def run(name, **widgets):
        if name not in made:
            page.open_template(name)
            for widget, value in widgets.items():
                page.set_widget(SAMPLERS[name], widget, value)
            page.run()
            page.wait_for_picture("SaveImage")
            page.screenshot(f"run {name}")
            made[name] = page.seen(), page.nodes()
        return made[name]

    return run


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_ends_with_the_picture_on_the_page(name, runs):
    seen, nodes = runs(name)
    assert "execution_success" in [kind for kind, _ in seen]
    [[address, width]] = next(n["pictures"] for n in nodes if n["type"] == "SaveImage")
    prefix = next(n["inputs"]["filename_prefix"]
                  for n in load(FOLDER / "api" / f"{name}.json").values()
                  if n["class_type"] == "SaveImage")
    assert prefix.replace(" ", "%20") in address and width == 64


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_sampler_shows_previews(name, runs):
    """Pictures the sampler sent, not files of the server."""
    seen, _ = runs(name)
    shown = [address for kind, detail in seen if kind == "shown"
             for node, address in [detail] if node == SAMPLERS[name]]
    assert shown and all(address.startswith("blob:") for address in shown)


@pytest.mark.parametrize("name", SAMPLERS)
def test_there_is_room_for_what_a_run_adds(name, runs):
    """Nodes grow by previews and token counts; they stay in their groups, beside each other."""
    _, nodes = runs(name)
    groups = [group["bounding"] for group in load(FOLDER / f"{name}.json")["groups"]]
    boxes = [(n["type"], n["box"]) for n in nodes if n["type"] not in NOTES]
    for i, (kind, (x, y, width, height)) in enumerate(boxes):
        assert any(gx <= x and gy <= y and x + width <= gx + gw and y + height <= gy + gh
                   for gx, gy, gw, gh in groups), (kind, height)
        for other, (ox, oy, other_width, other_height) in boxes[i + 1:]:
            assert (x + width <= ox or ox + other_width <= x or y + height <= oy - TITLE
                    or oy + other_height <= y - TITLE), (kind, other)


def test_the_preview_shows_while_sampling_goes_on(page):
    """With more steps than the template has: the starter model is done in a second."""
    name = "PixArt-alpha text to image"
    page.open_template(name)
    page.set_widget("KSampler", "steps", 60)
    page.set_widget("KSampler", "seed", 1)
    seen = page.run()
    decode = next(node["id"] for node in page.nodes() if node["type"] == "VAEDecode")
    shown = [i for i, (kind, detail) in enumerate(seen)
             if kind == "shown" and detail[0] == "KSampler" and detail[1].startswith("blob:")]
    assert shown and shown[0] < seen.index(["executing", decode])


def test_the_console_has_no_error_of_this_pack(page):
    """Last, so that it sees what running them wrote."""
    assert page.our_errors() == []
