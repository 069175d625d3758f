"""A transformer with quantised layers: loading, LoRAs beside them, training through them."""

import pytest
import torch
from quant_layers import FORMATS, quantized
from safetensors.torch import save_file

import pixart_core as pc
from pixart_core.checkpoint.lora_layer import LoRA, LoRALayer
from pixart_core.config import METADATA_KEY
from pixart_core.quant import PackedWeight, file_tensors
from pixart_core.quant.policy import METHODS, transformer_layers

FIELDS = {"hidden_size": 128, "depth": 2, "num_heads": 4, "mlp_hidden_size": 512,
          "caption_channels": 64, "max_tokens": 8}


@pytest.fixture(scope="module")
def weights():
    config = pc.PRESETS["sigma-512"].replace(**FIELDS)
    torch.manual_seed(0)
    model = pc.PixArtTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return config, {name: t.detach() for name, t in model.state_dict().items()}


@pytest.fixture
def file(weights, tmp_path, request):
    """A model file with the layers of a method quantised."""
    config, state_dict = weights
    name = request.param
    layers = transformer_layers({n: t.shape for n, t in state_dict.items()}, METHODS[name])
    stored = {n: quantized(name, state_dict[n]) for n in layers}
    path = tmp_path / f"{name}.safetensors"
    plain = {n: t for n, t in state_dict.items() if n not in stored}
    save_file(plain | file_tensors(stored), path, metadata={METADATA_KEY: config.to_json()})
    return path


every_format = pytest.mark.parametrize("file", FORMATS, indirect=True)


def predict(model):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    caption = torch.randn(2, 6, 64, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([900.0, 300.0]), caption)[:, :4]


def lora(state_dict, target="blocks.0.attn.qkv.weight", part=1, parts=3, rank=4, **changes):
    rows, columns = state_dict[target].shape
    generator = torch.Generator().manual_seed(7)
    tensors = {"down": torch.randn(rank, columns, generator=generator) / 10,
               "up": torch.randn(rows // parts, rank, generator=generator)}
    return LoRA((LoRALayer(target, part, parts, "lora", tensors, **changes),))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@every_format
def test_the_layers_stay_quantised_and_predict_nearly_the_same(file, weights):
    _, state_dict = weights
    model = pc.load_transformer(file, dtype=torch.float32)
    packed = [n for n, m in model.named_modules() if isinstance(m, PackedWeight) and m.packing]
    eight_bits = METHODS[file.stem].bits == 8
    assert len(packed) == 2 * (7 if eight_bits else 6)
    assert ("blocks.0.cross_attn.kv_linear" in packed) is eight_bits
    dense = pc.load_transformer(state_dict, dtype=torch.float32, num_heads=4)
    assert relative(predict(model), predict(dense)) < (0.03 if eight_bits else 0.2)
    opened, _ = pc.open_transformer(file)
    assert opened.keys() == state_dict.keys() - {"pos_embed"}
    assert opened["blocks.1.mlp.fc2.weight"].dtype == torch.float32


@every_format
def test_a_lora_runs_beside_the_stored_weight(file, weights):
    """It changes what it would change in a dense model, and no code of the stored weight."""
    _, state_dict = weights
    model = pc.load_transformer(file, dtype=torch.float32)
    layer = model.blocks[0].attn.qkv
    codes, before = layer.weight.clone(), layer.effective()
    x = torch.randn(5, 128)
    with torch.no_grad():
        plain = layer(x)
        change = lora(state_dict)
        pc.apply_lora(model, change, 0.5)
        now = layer(x)
    assert layer.packing is not None and torch.equal(layer.weight, codes)
    tensors = change.layers[0].tensors
    delta = torch.zeros(384, 128)
    delta[128:256] = 0.5 * tensors["up"] @ tensors["down"]
    torch.testing.assert_close(layer.effective() - before, delta, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(now - plain, x @ delta.t(), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("file", ["svdquant", "int4"], indirect=True)
def test_several_loras_add_up_and_minus_one_takes_one_off(file, weights):
    _, state_dict = weights
    model = pc.load_transformer(file, dtype=torch.float32)
    first, second = lora(state_dict), lora(state_dict, part=2, rank=3)
    alone = predict(pc.apply_lora(pc.load_transformer(file, dtype=torch.float32), first))
    pc.apply_lora(pc.apply_lora(model, first), second)
    assert relative(predict(model), alone) > 1e-3
    pc.apply_lora(model, second, -1.0)
    assert relative(predict(model), alone) < 1e-4


@pytest.mark.parametrize("file", ["svdquant", "int8"], indirect=True)
def test_other_kinds_of_change_make_an_ordinary_layer(file, weights):
    """A difference or DoRA is no low rank: the layer is unpacked once, its bias made whole."""
    _, state_dict = weights
    target = "blocks.0.mlp.fc2.weight"
    model = pc.load_transformer(file, dtype=torch.float32)
    layer = model.blocks[0].mlp.fc2
    before = layer.effective()
    difference = torch.randn_like(state_dict[target]) / 50
    pc.apply_lora(model, LoRA((LoRALayer(target, 0, 1, "diff", {"diff": difference}),)))
    assert layer.packing is None
    torch.testing.assert_close(layer.weight, before + difference)
    assert predict(model).isfinite().all()


@pytest.mark.parametrize("file", ["svdquant"], indirect=True)
@pytest.mark.parametrize("order", [("weight",), ("bias",), ("bias", "weight"), ("weight", "bias")])
def test_a_bias_that_takes_back_a_shift_changes_as_the_dense_one(file, weights, order):
    """Behind the GELU the stored bias is another one than that which a LoRA replaces."""
    _, state_dict = weights
    path = "blocks.0.mlp.fc2"
    model = pc.load_transformer(file, dtype=torch.float32)
    layer = model.blocks[0].mlp.fc2
    layer.pack(quantized("svdquant", state_dict[f"{path}.weight"], unsigned=True))
    before = layer.effective(), layer.effective_bias()
    new = {leaf: torch.randn_like(state_dict[f"{path}.{leaf}"]) for leaf in ("weight", "bias")}
    pc.apply_lora(model, LoRA(tuple(LoRALayer(f"{path}.{leaf}", 0, 1, "value",
                                              {"value": new[leaf]}) for leaf in order)))
    assert (layer.packing is None) is ("weight" in order)
    for leaf, old, now in zip(new, before, (layer.effective, layer.effective_bias), strict=True):
        found = layer.weight if leaf == "weight" and layer.packing is None else now()
        torch.testing.assert_close(found, new[leaf] if leaf in order else old)


@pytest.mark.parametrize("file", ["svdquant"], indirect=True)
def test_gradients_reach_every_plain_parameter(file):
    """A LoRA or ControlNet may be trained over a quantised model."""
    model = pc.load_transformer(file, dtype=torch.float32)
    model.x_embedder.proj.weight.requires_grad_(True)
    out = model(torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 6, 64))
    out.square().mean().backward()
    assert model.x_embedder.proj.weight.grad.abs().max() > 0
