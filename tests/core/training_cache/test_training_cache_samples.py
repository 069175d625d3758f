"""Reading the training cache back: batches, processes, models that fit."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from training_cache_files import PLAIN, SHAPES, STARTER, all_rows, draw

from pixart_core.config import PixArtConfig
from pixart_core.load import load_transformer
from pixart_core.training.data import CachedSamples, build_cache
from pixart_core.training.data import samples as samples_module
from pixart_core.training.data.images import load_picture


def test_latents_and_captions_are_what_the_encoders_give(made, encoders) -> None:
    encoder, vae = encoders
    samples = CachedSamples(made / "cache")
    for text, latents in all_rows(samples):
        shape = text.split()[1]
        height, width = {"wide": (48, 96), "square": (64, 64), "tall": (96, 48)}[shape]
        paths = [made / "images" / f"{shape}{number}.png" for number in range(3)]
        expected = [vae.encode(load_picture(path, height, width)[None] / 255)[0] for path in paths]
        assert min((latents - each).abs().max() for each in expected) < 1e-4
    batch = samples.batch(0, 4)
    for row, text in enumerate(batch.texts):
        states, mask = encoder([text], 24)
        length = int(mask.sum())
        assert int(batch.mask[row].sum()) == length
        torch.testing.assert_close(batch.caption[row, :length], states[0, :length],
                                   rtol=1e-4, atol=1e-4)
        assert not batch.caption[row, length:].any()


def test_a_batch_says_its_size_and_ratio(made) -> None:
    samples = CachedSamples(made / "cache")
    for index in range(samples.batches_per_epoch(2)):
        batch = samples.batch(index, 2)
        height, width = (8 * side for side in batch.latents.shape[-2:])
        assert batch.image_size.tolist() == [[height, width]] * 2
        assert batch.aspect_ratio.tolist() == [[height / width]] * 2
        assert batch.numbers == (2 * index, 2 * index + 1)
        assert batch.latents.dtype == batch.caption.dtype == torch.float32


def test_the_null_caption_is_t5_of_nothing(made, encoders) -> None:
    null = CachedSamples(made / "cache").null_caption
    states, mask = encoders[0]([""], 24)
    torch.testing.assert_close(null.states, states[0][mask[0]], rtol=1e-4, atol=1e-4)
    assert null.mask.tolist() == [True] * len(null.states)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 30), st.integers(1, 3), st.integers(1, 3))
def test_processes_together_see_the_batch_of_one(made, index, size, world) -> None:
    samples = CachedSamples(made / "cache")
    whole = samples.batch(index, size * world)
    parts = [samples.batch(index, size, rank, world) for rank in range(world)]
    assert sum((part.numbers for part in parts), ()) == whole.numbers
    assert sum((part.texts for part in parts), ()) == whole.texts
    assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)


def test_variants_of_a_caption_take_turns(made) -> None:
    """And the same number always has the same one."""
    samples = CachedSamples(made / "cache")
    texts = [samples.batch(index, 1).texts[0] for index in range(40)]
    assert {len(text.split()) for text in texts} == {3, 4}
    assert texts == [CachedSamples(made / "cache").batch(i, 1).texts[0] for i in range(40)]


def test_the_preview_is_of_the_bucket_with_most_rows(copy, encoders) -> None:
    draw(copy / "images" / "tall9.png", 9, SHAPES["tall"], "a tall one")
    build_cache(copy / "images", copy / "cache", PLAIN, *encoders)
    samples = CachedSamples(copy / "cache")
    assert samples.preview(8).texts == samples.preview(8).texts
    assert len(samples.preview(8)) == 4
    assert all("tall" in text for text in samples.preview(8).texts)


def test_samples_can_be_sent_to_another_process(made) -> None:
    samples = CachedSamples(made / "cache", seed=4)
    first = samples.batch(2, 3)
    other = pickle.loads(pickle.dumps(samples))
    assert torch.equal(other.batch(2, 3).latents, first.latents)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_readers_do_not_disturb_each_other(made) -> None:
    """They inherit open files, whose position they would share."""
    samples = CachedSamples(made / "cache")
    all_rows(samples)
    child = os.fork()
    if child == 0:
        try:
            all_rows(samples, epochs=30)
            os._exit(0)
        except BaseException:
            os._exit(1)
    all_rows(samples, epochs=30)
    assert os.waitpid(child, 0)[1] == 0


def test_few_files_are_open_at_once(copy, monkeypatch) -> None:
    monkeypatch.setattr(samples_module, "_OPEN_SHARDS", 2)
    samples = CachedSamples(copy / "cache")
    all_rows(samples)
    assert len(samples._readers) == 2


def test_models_that_do_not_fit_are_refused(made, caplog) -> None:
    samples = CachedSamples(made / "cache")
    config = load_transformer(STARTER.transformer).config.replace(image_size=64)
    samples.check_fit(config)
    assert not caplog.text
    with pytest.raises(ValueError, match="captions 128 wide and the model reads 4096"):
        samples.check_fit(PixArtConfig(variant="alpha"))
    with pytest.raises(ValueError, match="latents for alpha"):
        samples.check_fit(config.replace(variant="sigma"))
    samples.check_fit(config.replace(image_size=512))
    assert "of about 64 px and the model was trained at 512" in caplog.text


def test_a_cache_without_control_says_how_to_make_one(made) -> None:
    with pytest.raises(ValueError, match=r"pixart train cache --control"):
        CachedSamples(made / "cache").require_control()
