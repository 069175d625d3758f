"""The memory benchmark queues the small cards' templates with other files, and nothing else of them
changes."""

import time

import pytest

from benchmarks.host_memory import API, RECIPES, Recipe, Watch, prompt_of, server_arguments
from benchmarks.host_server import load

NAMES = {"PixArtLoader": "a", "SVDQuant": "b", "PixArtT5Loader": "c", "VAELoader": "d"}
FILES = ("model_name", "t5_name", "vae_name")


def nodes_of(prompt, kind):
    return [node["inputs"] for node in prompt.values() if node["class_type"] == kind]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_its_template_with_full_size_files(name):
    """Protects the figures: no small file of the starter is measured in place of a large one."""
    recipe = RECIPES[name]
    prompt, template = prompt_of(recipe, NAMES, 1024), load(API / f"{recipe.template}.json")
    [model], [t5], [vae], [size] = (nodes_of(prompt, kind) for kind in (
        "PixArtLoader", "PixArtT5Loader", "VAELoader", "EmptyLatentImage"))
    quantized = "SVDQuant" in name
    assert (model["model_name"], t5["t5_name"], vae["vae_name"]) == ("b" if quantized else "a",
                                                                     "c", "d")
    assert (size["width"], size["height"]) == (1024, 1024)
    assert (t5["device"] == "cpu") == ("CPU" in name)
    changed = {(key, slot) for key, node in prompt.items() for slot, value in node["inputs"].items()
               if template[key]["inputs"].get(slot) != value}
    allowed = {slot for changes in recipe.changes.values() for slot in changes}
    assert {slot for _, slot in changed} <= {*FILES, "width", "height", *allowed}


def test_a_large_card_is_made_as_small_as_the_recipes():
    """The host keeps models loaded where it has room; that room is reserved away."""
    card = Recipe("PixArt 8 GB", {}, 8.0, 7.0)
    assert server_arguments(int(80e9), card) == ["--reserve-vram", "67.46"]
    assert server_arguments(int(6e9), card) == []
    assert server_arguments(None, card) == ["--cpu"]


class Server:
    """Answers with the next of some memory readings, in bytes; None is no answer."""

    def __init__(self, *used):
        self.used = list(used)

    def get(self, _):
        used = self.used.pop(0) if len(self.used) > 1 else self.used[0]
        if used is None:
            raise TimeoutError("no answer")
        return {"devices": [{"vram_total": 100, "vram_free": 100 - used + 3,
                             "torch_vram_total": 5, "torch_vram_free": 3}]}


def test_the_peak_is_of_the_whole_card():
    """What torch keeps and does not use is taken, though the host calls it free."""
    with Watch(Server(10, 50, 20), seconds=0.001) as watch:
        while watch.asked < 3:
            time.sleep(0.001)
    assert watch.most == (50, 5, 2)


def test_a_server_that_stops_answering_is_not_a_low_peak():
    with (pytest.raises(RuntimeError, match="stopped answering"),
          Watch(Server(10, None), seconds=0.001) as watch):
        watch.join()
