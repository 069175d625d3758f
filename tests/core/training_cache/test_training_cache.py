"""What the training cache stores: numbers, captions, edges; pictures that it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from PIL import Image
from training_cache_files import PLAIN, SHAPES, STARTER, changed, draw, fill

from pixart_core.model.hed import HEDDetector
from pixart_core.training.data import CachedSamples, build_cache
from pixart_core.training.data.images import load_picture
from pixart_core.vae import VAE, load_vae


def test_a_caption_that_occurs_often_is_encoded_once(tmp_path, encoders) -> None:
    for number in range(5):
        draw(tmp_path / "images" / f"{number}.png", number, caption="the same")
    report = build_cache(tmp_path / "images", tmp_path / "cache", changed(shard_rows=2), *encoders)
    assert report.captions == 1
    assert len(CachedSamples(tmp_path / "cache")._shards) == 3


def test_captions_are_cleaned_for_t5_alone(tmp_path, encoders) -> None:
    draw(tmp_path / "images" / "a.png", caption="A RED Circle")
    build_cache(tmp_path / "images", tmp_path / "cache", changed(clean_caption=True), *encoders)
    batch = CachedSamples(tmp_path / "cache").batch(0, 1)
    assert batch.texts == ("A RED Circle",)
    states, mask = encoders[0](["a red circle"], 24)
    torch.testing.assert_close(batch.caption[0], states[0][mask[0]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_are_stored_in_the_dtype_and_read_as_float32(made, tmp_path, encoders, dtype
                                                             ) -> None:
    draw(tmp_path / "images" / "square1.png", 1, SHAPES["square"], "a square circle")
    build_cache(tmp_path / "images", tmp_path / "cache", changed(dtype=dtype), *encoders)
    batch = CachedSamples(tmp_path / "cache").batch(0, 1)
    pixels = load_picture(tmp_path / "images" / "square1.png", 64, 64)[None] / 255
    stored = encoders[1].encode(pixels).to(getattr(torch, dtype)).float()
    assert torch.equal(batch.latents, stored)
    assert batch.caption.dtype == torch.float32
    assert torch.equal(batch.caption, batch.caption.to(getattr(torch, dtype)).float())


def test_shards_end_at_their_size(tmp_path, encoders) -> None:
    """Protects memory: what one shard holds is in memory while it is made."""
    fill(tmp_path / "images", 2)
    build_cache(tmp_path / "images", tmp_path / "cache", changed(shard_bytes=9_000), *encoders)
    samples = CachedSamples(tmp_path / "cache")
    assert [shard.rows for shard in samples._shards] == [1] * 6


def test_taking_turns_on_the_device_gives_the_same_cache(made, tmp_path, encoders) -> None:
    build_cache(made / "images", tmp_path / "cache", changed(low_memory=True, device="cpu"),
                *encoders)
    ours, theirs = CachedSamples(tmp_path / "cache").batch(1, 3), CachedSamples(
        made / "cache").batch(1, 3)
    assert torch.equal(ours.latents, theirs.latents)
    assert ours.texts == theirs.texts


def test_a_vae_that_is_loaded_on_the_cpu_works_in_channels_last(made, tmp_path, encoders) -> None:
    """Faster there, and the same numbers; the VAE of a caller stays as it is."""
    loaded = []

    def load() -> VAE:
        loaded.append(load_vae(STARTER.vae, "alpha"))
        return loaded[0]

    build_cache(made / "images", tmp_path / "cache", PLAIN, encoders[0], load)
    kernels = [p for p in loaded[0].network.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert all(p.is_contiguous() for p in encoders[1].network.parameters())
    ours, theirs = (CachedSamples(root / "cache").batch(1, 3) for root in (tmp_path, made))
    torch.testing.assert_close(ours.latents, theirs.latents, rtol=1e-4, atol=1e-4)


def test_edges_are_encoded_beside_the_pictures(tmp_path, encoders) -> None:
    detector = HEDDetector.from_path(STARTER.hed)
    draw(tmp_path / "images" / "a.png")
    build_cache(tmp_path / "images", tmp_path / "cache", changed(control="hed"), *encoders,
                detector)
    samples = CachedSamples(tmp_path / "cache")
    samples.require_control()
    edges = detector(load_picture(tmp_path / "images" / "a.png", 64, 64)[None] / 255)
    expected = encoders[1].encode(edges.expand(-1, 3, -1, -1))
    torch.testing.assert_close(samples.batch(0, 1).control, expected, rtol=1e-4, atol=1e-4)


def test_control_images_of_the_folder_are_fitted_and_encoded(tmp_path, encoders) -> None:
    draw(tmp_path / "images" / "a.png")
    hint = Image.new("RGB", (128, 128), "black")
    hint.paste("white", (20, 20, 90, 60))
    (tmp_path / "images" / "control").mkdir()
    hint.save(tmp_path / "images" / "control" / "a.png")
    build_cache(tmp_path / "images", tmp_path / "cache", changed(control="folder"), *encoders)
    pixels = load_picture(tmp_path / "images" / "control" / "a.png", 128, 128)[None] / 255
    small = functional.interpolate(pixels, size=(64, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(CachedSamples(tmp_path / "cache").batch(0, 1).control,
                               encoders[1].encode(small), rtol=1e-4, atol=1e-4)


def test_a_control_image_of_another_shape_is_refused(tmp_path, encoders) -> None:
    """Protects pairs from being cut differently, so that lines and picture no longer meet."""
    draw(tmp_path / "images" / "a.png", size=(64, 64))
    draw(tmp_path / "images" / "control" / "a.png", size=(96, 64), caption=None)
    with pytest.raises(ValueError, match=r"control/a\.png is 96 x 64 px.*need the same shape"):
        build_cache(tmp_path / "images", tmp_path / "cache", changed(control="folder"), *encoders)


def test_a_damaged_picture_keeps_no_other_out(tmp_path, encoders) -> None:
    fill(tmp_path / "images", 1)
    Image.effect_noise((64, 64), 90).save(tmp_path / "images" / "bad.jpg")
    (tmp_path / "images" / "bad.txt").write_text("broken")
    path = tmp_path / "images" / "bad.jpg"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"bad\.jpg.*other rows are in the cache \(3\)"):
        build_cache(tmp_path / "images", tmp_path / "cache", PLAIN, *encoders)
    report = build_cache(tmp_path / "images", tmp_path / "cache", changed(skip_bad=True),
                         *encoders)
    assert (report.rows, len(report.left_out)) == (3, 1)


def test_pictures_that_would_grow_much_are_left_out(tmp_path, encoders, caplog) -> None:
    draw(tmp_path / "images" / "small.png", size=(32, 32))
    draw(tmp_path / "images" / "large.png", size=(64, 64))
    report = build_cache(tmp_path / "images", tmp_path / "cache", changed(max_upscale=1.5),
                         *encoders)
    assert (report.rows, report.too_small) == (1, 1)
    assert "1 pictures would grow" in caplog.text


def test_numbers_too_large_for_the_dtype_are_refused(tmp_path, encoders) -> None:
    class Loud:
        device = torch.device("cpu")

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.full((len(pixels), 4, 8, 8), 1e6)

    draw(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match="too large for float16"):
        build_cache(tmp_path / "images", tmp_path / "cache", changed(dtype="float16"),
                    encoders[0], Loud)
