"""Templates run by the page's own Run button: previews while sampling, the picture at the end."""

from pathlib import Path

import pytest
from workflow import load

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
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
    seen, nodes = runs(name)
    shown = [address for kind, detail in seen if kind == "shown"
             for node, address in [detail] if node == SAMPLERS[name]]
    assert shown and all(address.startswith("blob:") for address in shown)


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
