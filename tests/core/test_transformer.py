"""The transformer's behaviour beyond the golden tensors: sizes, blocks, compile, bad input."""

import pytest
import torch
from torch.nn import functional

import pixart_core as pc
from pixart_core.model.embedders import position_table
from pixart_core.model.transformer import BlockInputs

SMALL = {"hidden_size": 48, "depth": 4, "num_heads": 2, "caption_channels": 32,
         "mlp_hidden_size": 192, "max_tokens": 12}


def build(**fields):
    torch.manual_seed(0)
    return pc.PixArtTransformer(pc.PixArtConfig(**{**SMALL, **fields})).eval()


def inputs(batch=1, height=8, width=8, tokens=5):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(batch, 4, height, width, generator=generator),
            torch.full((batch,), 400.0), torch.randn(batch, tokens, 32, generator=generator))


def diffusers_twin(model):
    """diffusers' own transformer with the same weights."""
    from diffusers import PixArtTransformer2DModel

    config = model.config
    twin = PixArtTransformer2DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.head_dim,
        num_layers=config.depth, caption_channels=config.caption_channels,
        cross_attention_dim=config.hidden_size, sample_size=128,
        interpolation_scale=config.pe_interpolation,
        use_additional_conditions=config.micro_conditioning).eval()
    twin.load_state_dict(pc.convert_state_dict(model.state_dict(), to="diffusers"))
    return twin


@pytest.mark.parametrize("micro", [False, True], ids=["sigma", "alpha-1024"])
@pytest.mark.parametrize("size", [(128, 128), (32, 32), (36, 100), (24, 16)])
def test_equals_diffusers(size, micro):
    """A second, independent oracle, at sizes the golden tensors do not have."""
    model = build(micro_conditioning=micro, variant="alpha" if micro else "sigma")
    twin = diffusers_twin(model)
    x, t, caption = inputs(2, *size)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    pixels = torch.tensor([[size[0] * 8.0, size[1] * 8.0]] * 2)
    ratio = torch.tensor([[size[0] / size[1]]] * 2)
    with torch.no_grad():
        expected = twin(x, caption, t, {"resolution": pixels, "aspect_ratio": ratio},
                        encoder_attention_mask=mask).sample
        out = model(x, t, caption, mask, pixels, ratio)
    assert (out - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("size", [(7, 9), (1, 1), (33, 8), (2, 31)])
def test_odd_latent_sizes_keep_their_size(size):
    """Every image size that is a multiple of 8 works, padded inside."""
    x, t, caption = inputs(1, *size)
    with torch.no_grad():
        out = build()(x, t, caption)
    assert out.shape == (1, 8, *size)
    assert out.isfinite().all()


def test_odd_size_equals_the_padded_picture_cropped():
    model = build()
    x, t, caption = inputs(1, 7, 9)
    padded = functional.pad(x, (0, 1, 0, 1), mode="replicate")
    with torch.no_grad():
        assert torch.equal(model(x, t, caption), model(padded, t, caption)[..., :7, :9])


@pytest.mark.parametrize("sampling", ["conv", "ave", "uniform"])
@pytest.mark.parametrize(("factor", "size"), [(2, (2, 8)), (3, (10, 16)), (4, (4, 6))])
def test_kv_compression_at_any_size_and_factor(sampling, factor, size):
    """Grids the factor does not divide, and sides shorter than it."""
    model = build(kv_compression={"sampling": sampling, "factor": factor, "layers": (0, 3)})
    x, t, caption = inputs(1, *size)
    with torch.no_grad():
        assert model(x, t, caption).isfinite().all()


def test_positions_run_to_the_trained_range_at_every_size():
    table = position_table(3, 5, 48, 32.0)
    assert table.shape == (1, 15, 48)
    assert table[0, 1, 0] == pytest.approx(torch.tensor(32 / 5).sin().item(), abs=1e-6)
    assert table[0, 5, 24] == pytest.approx(torch.tensor(32 / 3).sin().item(), abs=1e-6)


def test_blocks_can_be_left_and_entered_anywhere():
    """A ControlNet, a cache and a feedback loop will stop after a block and go on from there."""
    model = build()
    x, t, caption = inputs()
    with torch.no_grad():
        tokens, grid = model.embed_latent(x)
        time = model.embed_time(t, None, None)
        context, mask = model.embed_caption(caption, None, x.dtype)
        block_inputs = BlockInputs(model.shared_modulation(time), context, mask, grid,
                                   model.attention)
        tokens = model.run_blocks(tokens, block_inputs, stop=1)
        tokens = model.run_blocks(tokens, block_inputs, start=1, stop=3)
        tokens = model.run_blocks(tokens, block_inputs, start=3)
        out = model.to_latent(tokens, time, grid, x.shape[-2:])
        assert torch.equal(out, model(x, t, caption))


def test_attention_and_layers_are_injected():
    """The host puts its own attention and layers in; nothing may go around them."""
    calls, layers = [], []

    class Operations:
        class Linear(torch.nn.Linear):
            def forward(self, x):
                layers.append(self)
                return super().forward(x)
        Conv2d, LayerNorm = torch.nn.Conv2d, torch.nn.LayerNorm

    def attention(q, k, v, mask):
        calls.append(k.shape[2])
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    model = pc.PixArtTransformer(pc.PixArtConfig(**SMALL), operations=Operations,
                                 attention=attention).eval()
    with torch.no_grad():
        model(*inputs())
    assert calls == [16, 5] * 4
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert {id(m) for m in linears} == {id(m) for m in layers}


def test_compiles_without_a_graph_break():
    """Static shapes, no synchronisation: one graph, for each size and for a changed one."""
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in ((8, 8), (8, 12), (9, 11)):
        x, t, caption = inputs(2, *size)
        mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
        with torch.no_grad():
            out = compiled(x, t, caption, mask)
            assert not model._position_tables  # a CUDA graph would overwrite what is kept of it
            torch.testing.assert_close(out, build()(x, t, caption, mask))


@pytest.mark.parametrize(("change", "message"), [
    ({"x": torch.zeros(1, 16, 8, 8)}, "latent of shape"),
    ({"caption": torch.zeros(1, 5, 64)}, "64 wide"),
    ({"caption": torch.zeros(3, 5, 32)}, "caption of shape"),
    ({"caption_mask": torch.ones(1, 4)}, "caption_mask of shape"),
])
def test_wrong_shapes_are_named(change, message):
    x, t, caption = inputs()
    with pytest.raises(ValueError, match=message):
        build()(**{"x": x, "timestep": t, "caption": caption, **change})


def test_micro_conditioning_is_asked_for():
    with pytest.raises(ValueError, match="image_size"):
        build(micro_conditioning=True)(*inputs())


@pytest.mark.parametrize("name", pc.PRESETS)
def test_presets_build(name):
    """Every released model, on the meta device: the parameter counts the papers give."""
    config = pc.PRESETS[name]
    model = pc.PixArtTransformer(config, device="meta")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    expected = {42: 908.5, 28: 611.3 if config.micro_conditioning else 610.9}[config.depth]
    assert millions == pytest.approx(expected, abs=0.6)


def test_tokens_are_contiguous_from_the_start():
    """Sums keep the order of their first term: else every LayerNorm of every block copies."""
    tokens, _ = build().embed_latent(inputs()[0])
    assert tokens.is_contiguous()


@pytest.mark.parametrize(("fields", "message"), [
    ({"hidden_size": 62, "num_heads": 2}, "hidden_size is 62; the 2-D position table"),
    ({"hidden_size": 64, "num_heads": 2, "micro_conditioning": True}, "a multiple of 12"),
])
def test_widths_that_cannot_be_are_named_with_the_config(fields, message):
    """Protects from a tensor error in the first step: thirds of 64 do not join to 64."""
    with pytest.raises(ValueError, match=message):
        pc.PixArtConfig(**{**SMALL, **fields})
