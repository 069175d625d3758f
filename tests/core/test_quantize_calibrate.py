"""Samples of what enters the layers of a network while it draws."""

import pytest
import torch
from quantize_models import make_model

import pixart_core as pc
from pixart_core.quant.policy import METHODS, transformer_layers
from pixart_core.quantize.calibrate import RowSample, sampled_inputs
from pixart_core.quantize.trajectory import draw, draw_all
from pixart_core.settings import Settings
from pixart_core.text.embeddings import CaptionRow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = make_model(tmp_path_factory.mktemp("model") / "model.safetensors")
    return pc.load_transformer(path, dtype=torch.float32)


def layers(model):
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    return [n.removesuffix(".weight") for n in transformer_layers(shapes, METHODS["svdquant"])]


def captions(count=2):
    generator = torch.Generator().manual_seed(1)
    return [CaptionRow(torch.randn(3 + i, 16, generator=generator)) for i in range(count)]


def test_a_sample_is_of_the_whole_stream():
    """Rows of the first and of the last call are as likely; no row comes twice."""
    numbers = torch.arange(4000.0).unsqueeze(1)
    sample = RowSample(1000, seed=3)
    for part in numbers.split(333):
        sample.add(part)
    rows = sample.rows().flatten()
    assert len(rows.unique()) == 1000 and sample.seen == 4000
    assert abs(rows.mean().item() - 2000) < 100
    assert not torch.equal(rows, rows.sort().values)  # a part of it is a sample as well


def test_a_short_stream_is_kept_whole():
    sample = RowSample(100, seed=0)
    sample.add(torch.ones(2, 5, 8))
    assert sample.rows().shape == (10, 8)


def test_a_sample_does_not_grow():
    sample = RowSample(16, seed=0)
    for _ in range(50):
        sample.add(torch.randn(100, 8))
    assert sample._rows.shape == (16, 8) and sample._keys.shape == (16,)


def test_the_seed_decides_which_rows():
    def rows(seed):
        sample = RowSample(10, seed)
        sample.add(torch.arange(1000.0).unsqueeze(1))
        return sample.rows()

    assert torch.equal(rows(1), rows(1)) and not torch.equal(rows(1), rows(2))


def test_every_layer_of_every_block_is_seen(model):
    """With the input it really gets: that of fc2 comes out of a GELU, so it is hardly negative."""
    settings = Settings("", steps=2).resolve(model.config)
    with sampled_inputs(model, layers(model), 12, seed=0) as samples:
        draw(model, settings, *captions(1))
    assert list(samples) == layers(model) and len(samples) == 12
    # 2 steps of 4 tokens
    assert {s.seen for s in samples.values()} == {8}
    assert samples["blocks.1.mlp.fc2"].rows().min() > -0.171875
    assert samples["blocks.1.mlp.fc1"].rows().min() < -0.5


def test_nothing_is_watched_afterwards(model):
    with sampled_inputs(model, layers(model), 12, seed=0):
        pass
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_drawing_is_what_the_pipeline_does(model):
    """Same noise, steps and guidance: the trajectory is the sampler's own."""
    from pixart_core.pipeline import Pipeline
    from pixart_core.text.embeddings import CaptionEntry

    class Latents:
        def decode(self, latents):
            self.found = latents
            return torch.zeros(1, 3, 32, 32)

    vae = Latents()
    settings = Settings("", steps=3, guidance=2.0, seed=4).resolve(model.config)
    caption, negative = captions()
    Pipeline(model, None, vae).run(
        settings, embeddings=[CaptionEntry(caption.states[None])],
        negative_embeddings=[CaptionEntry(negative.states[None])])
    assert torch.allclose(draw(model, settings, caption, negative), vae.found, atol=1e-5)


def test_every_caption_has_noise_of_its_own(model):
    """Two equal captions do not give the same rows twice."""
    settings = Settings("", steps=1).resolve(model.config)
    caption, = captions(1)
    with sampled_inputs(model, ["blocks.0.attn.qkv"], 100, seed=0) as samples:
        draw_all(model, settings, [caption, caption], [])
    rows = samples["blocks.0.attn.qkv"].rows()
    assert len(rows) == 8 and len(rows.unique(dim=0)) == 8
