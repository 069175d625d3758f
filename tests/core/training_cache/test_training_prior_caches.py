"""Two caches for DreamBooth: which pairs are refused, and in which order they are read."""

from __future__ import annotations

import json
import shutil

import pytest

from pixart_core.starter import find_starter
from pixart_core.training.prior import open_with_prior
from pixart_core.training.recipes import make_recipe, recipe_settings


@pytest.fixture
def pair(made, tmp_path):
    """The cache, and a copy of it as that of a class."""
    shutil.copytree(made / "cache", tmp_path / "class")
    return made / "cache", tmp_path / "class"


def change(cache, **facts) -> None:
    index = json.loads((cache / "index.json").read_text())
    index["facts"] |= facts
    (cache / "index.json").write_text(json.dumps(index))


def test_subject_and_class_are_shuffled_apart(pair) -> None:
    """Protects against the same pairs in every epoch, which one seed for both would give."""
    samples = open_with_prior(*pair, seed=2)
    texts = [[half.texts[0].split(", ")[0] for half in (batch.subject, batch.prior)]
             for batch in (samples.batch(i, 1) for i in range(18))]
    assert sum(a != b for a, b in texts) >= 6
    again = open_with_prior(*pair, seed=2).batch(7, 2)
    assert again.subject.texts == samples.batch(7, 2).subject.texts
    assert again.prior.texts == samples.batch(7, 2).prior.texts


def test_one_cache_for_both_is_refused(pair, tmp_path) -> None:
    (tmp_path / "link").symlink_to(pair[0])
    with pytest.raises(ValueError, match="are the same cache"):
        open_with_prior(pair[0], tmp_path / "link", 0)


def test_another_picture_size_is_refused(pair) -> None:
    change(pair[1], image_size=512)
    with pytest.raises(ValueError, match=r"about 512 px and data .* of 64; make both caches"):
        open_with_prior(*pair, 0)


@pytest.mark.parametrize(("facts", "words"), [
    ({"variant": "sigma", "latent_scale": 0.13025}, "class holds latents for sigma"),
    ({"caption_channels": 8}, "class holds captions 8 wide"),
])
def test_a_class_that_does_not_fit_the_model_is_named(pair, facts, words, tmp_path) -> None:
    """Protects the message of the whole recipe: it names the class's cache, not the subject's."""
    change(pair[1], **facts)
    settings = recipe_settings("lora", {"out": tmp_path / "run", "data": pair[0], "rank": 2,
                                        "class_data": pair[1],
                                        "model": find_starter().transformer})
    with pytest.raises(ValueError, match=words):
        make_recipe("lora", settings)
