"""The memory benchmark queues the small cards' templates with other files, and nothing else of them
changes."""

import pytest

from benchmarks import host_memory
from benchmarks.host_memory import API, RECIPES, Recipe, prompt_of
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


def test_a_large_card_is_made_as_small_as_the_recipes(monkeypatch):
    """The host keeps models loaded where it has room; that room is reserved away."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (70e9, 80e9))
    card = Recipe("PixArt 8 GB", {}, 8.0, 7.0)
    assert host_memory.server_arguments(False, card) == ["--reserve-vram", "67.06"]
    assert host_memory.server_arguments(True, card) == ["--cpu"]
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (5e9, 6e9))
    assert host_memory.server_arguments(False, card) == []
