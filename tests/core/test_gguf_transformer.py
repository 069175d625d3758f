"""PixArt transformers in GGUF files: written, read, run with their weights packed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_inputs import sizes
from safetensors import safe_open

import pixart_core as pc
from pixart_core.checkpoint.gguf_write import QUANTS, write_gguf
from pixart_core.quant import PACKINGS, PackedWeight
from pixart_core.starter import find_starter

gguf = pytest.importorskip("gguf")
GOLDEN = Path(__file__).parents[1] / "golden"
STARTER = find_starter()
# relative error of normally distributed weights, as large as it may get
WEIGHT_ERROR = {"BF16": 2.5e-3, "F16": 3e-4, "Q8_0": 6e-3, "Q5_1": 4e-2, "Q5_0": 5e-2,
                "Q4_1": 8e-2, "Q4_0": 1e-1}
# of the starter's and the golden models' predictions
OUTPUT_ERROR = {"BF16": 1e-3, "F16": 5e-4, "Q8_0": 4e-3, "Q5_1": 2.5e-2, "Q5_0": 3e-2,
                "Q4_1": 5e-2, "Q4_0": 5e-2}


@pytest.fixture(scope="module")
def starter():
    return pc.open_transformer(STARTER.transformer)


@pytest.fixture(scope="module")
def written(starter, tmp_path_factory):
    """The starter in every block format: {quant: path}."""
    folder = tmp_path_factory.mktemp("gguf")
    paths = {quant: folder / f"{quant}.gguf" for quant in QUANTS}
    for quant, path in paths.items():
        write_gguf(path, *starter, quant)
    return paths


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def predict(model):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    caption = torch.randn(2, 9, model.config.caption_channels, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([500.0, 20.0]), caption, **sizes(x)).float()


def write_raw(path, tensors, architecture="pixart", metadata=None):
    """A GGUF file as other tools write them: {name: (numpy array, type or None)}."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata or {}).items():
        (writer.add_array if isinstance(value, list) else writer.add_string)(key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantised(tensor, kind):
    type_ = gguf.GGMLQuantizationType[kind]
    return gguf.quants.quantize(tensor.float().numpy(), type_), type_


def plain(tensor):
    return tensor.float().numpy(), None


@pytest.mark.parametrize("quant", QUANTS)
def test_weights_stay_close(quant, tmp_path, make_weights):
    """Every matrix of the blocks within the format's error, everything else as it was."""
    weights = make_weights(hidden_size=64, mlp_hidden_size=128, caption_channels=32)
    config = pc.detect_config(weights, num_heads=4)
    write_gguf(tmp_path / "m.gguf", weights, config, quant)
    found, read_config = pc.open_transformer(tmp_path / "m.gguf")
    assert read_config == config and found.keys() == weights.keys()
    for name, weight in weights.items():
        matrix = weight.ndim == 2 and name.startswith(("blocks.", "y_embedder.y_proj")) \
            and name.endswith(".weight")
        if matrix:
            assert relative(found[name].float(), weight) < WEIGHT_ERROR[quant], name
        elif name == "t_block.1.weight":
            assert relative(found[name].float(), weight) < WEIGHT_ERROR["BF16"]
        else:
            assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("quant", QUANTS)
def test_prediction_stays_close(quant, starter, written):
    reference = predict(pc.load_transformer(STARTER.transformer, dtype=torch.float32))
    model = pc.load_transformer(written[quant], dtype=torch.float32)
    assert model.config == starter[1]
    assert relative(predict(model), reference) < OUTPUT_ERROR[quant]


@pytest.mark.parametrize("case", ["alpha_1024_landscape", "sigma_1024_kv_conv",
                                  "sigma_1024_qknorm_kv"])
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0"])
def test_golden_models(case, quant, tmp_path, golden_weights):
    """Against the official code; of these narrow models only some layers fit the blocks."""
    weights, meta = golden_weights(case)
    opened, config = pc.open_transformer(
        weights, num_heads=meta["num_heads"],
        **({"kv_compression": meta["kv_compression"]} if "kv_compression" in meta else {}))
    write_gguf(tmp_path / "m.gguf", opened, config, quant)
    model = pc.load_transformer(tmp_path / "m.gguf", dtype=torch.float32)
    assert model.config == config
    assert model.blocks[0].mlp.fc2.packing == quant and model.blocks[0].mlp.fc1.packing is None
    with safe_open(GOLDEN / f"{case}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with torch.no_grad():
        out = model(*(tensors.get(f"in.{k}") for k in (
            "x", "timestep", "caption", "caption_mask", "image_size", "aspect_ratio")))
    assert relative(out, tensors["out"]) < OUTPUT_ERROR[quant]


@pytest.mark.parametrize("quant", [q for q in QUANTS if q in PACKINGS])
def test_packed_layers_equal_dense_ones(quant, written):
    """Unpacking in the forward pass is the same as loading the unpacked weights."""
    packed = pc.load_transformer(written[quant], dtype=torch.float32)
    dense = pc.load_transformer(*pc.open_transformer(written[quant])[:1], dtype=torch.float32,
                                num_heads=packed.config.num_heads, variant="alpha", image_size=128,
                                base_size=8, pe_interpolation=1.0)
    assert torch.equal(predict(packed), predict(dense))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_packed_bytes_stay_packed(dtype, written):
    """In any dtype, after a call and a move: the weights take what they take in the file."""
    model = pc.load_transformer(written["Q4_0"], dtype=dtype)
    assert model.x_embedder.proj.weight.dtype == (dtype or torch.bfloat16)
    assert predict(model).isfinite().all()
    model.to("cpu", torch.float32)
    layers = [m for m in model.modules() if isinstance(m, PackedWeight) and m.packing]
    assert len(layers) == 6 * 7 + 2
    count = sum(layer.out_features * layer.in_features for layer in layers)
    assert sum(layer.weight.nbytes for layer in layers) * 8 == count * PACKINGS["Q4_0"].bits
    assert all(layer.weight.dtype == torch.uint8 for layer in layers)


def test_diffusers_names(starter, written, tmp_path):
    """q, k and v are stacked as they are; parts of several formats become dense."""
    tensors = pc.convert_state_dict(starter[0], to="diffusers")
    stored = {name: quantised(t, "Q8_0") if ".attn1.to_" in name and name.endswith("weight")
              else plain(t) for name, t in tensors.items()}
    mixed = "transformer_blocks.1.attn1.to_v.weight"
    stored[mixed] = quantised(tensors[mixed], "Q5_0")
    path = write_raw(tmp_path / "diffusers.gguf", stored,
                     metadata={"pixart_config": starter[1].to_json()})
    model = pc.load_transformer(path, dtype=torch.float32)
    reference = pc.load_transformer(written["Q8_0"], dtype=torch.float32)
    assert torch.equal(model.blocks[0].attn.qkv.weight.flatten(),
                       reference.blocks[0].attn.qkv.weight.flatten())
    assert model.blocks[1].attn.qkv.packing is None
    expected, _ = pc.open_transformer(starter[0], **json.loads(starter[1].to_json()))
    error = relative(model.blocks[1].attn.qkv.weight, expected["blocks.1.attn.qkv.weight"].float())
    assert error < WEIGHT_ERROR["Q5_0"]


def test_reshaped_rows(starter, tmp_path):
    """Weights whose rows no block fits may be stored flat, with their shape in the metadata."""
    weights, config = starter
    name = "blocks.0.mlp.fc2.weight"
    shape = list(weights[name].shape)
    stored = {k: plain(t) for k, t in weights.items()}
    stored[name] = quantised(weights[name].reshape(-1, 512), "Q8_0")
    path = write_raw(tmp_path / "flat.gguf", stored, metadata={
        "pixart_config": config.to_json(), f"comfy.gguf.orig_shape.{name}": shape})
    layer = pc.load_transformer(path).blocks[0].mlp.fc2
    dense = layer.stored().dense()
    assert list(dense.shape) == shape
    assert relative(dense, weights[name].float()) < WEIGHT_ERROR["Q8_0"]


def test_rare_formats_are_unpacked_while_reading(starter, tmp_path):
    """What only the gguf package can unpack becomes dense."""
    weights, config = starter
    name = "blocks.0.mlp.fc2.weight"
    stored = {k: plain(t) for k, t in weights.items()} | {name: quantised(weights[name], "TQ2_0")}
    path = write_raw(tmp_path / "rare.gguf", stored, metadata={"pixart_config": config.to_json()})
    expected = gguf.quants.dequantize(*stored[name])
    weight = pc.load_transformer(path).blocks[0].mlp.fc2.weight
    np.testing.assert_array_equal(weight.detach().float().numpy(), expected)


def test_own_operations_are_kept(written):
    """A host's layers hold packed weights too: the namespace is extended, not replaced."""
    class Ops:
        class Linear(torch.nn.Linear):
            pass
        Conv2d, LayerNorm = torch.nn.Conv2d, torch.nn.LayerNorm

    layer = pc.load_transformer(written["Q8_0"], operations=Ops).blocks[0].attn.proj
    assert isinstance(layer, Ops.Linear) and layer.packing == "Q8_0"


def test_missing_package_in_one_line(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"reading Q8_0.gguf needs gguf.*pip install gguf"):
        pc.load_transformer(written["Q8_0"])


@pytest.mark.parametrize("part", [3, 40, 900, 0.5, 0.999])
def test_cut_files(part, written, tmp_path):
    content = written["Q8_0"].read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[: part if isinstance(part, int) else int(len(content) * part)])
    with pytest.raises(pc.checkpoint.CheckpointError, match=r"cut\.gguf.*(cut short|not a GGUF)"):
        pc.load_transformer(cut)


def test_files_that_are_no_gguf(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(STARTER.transformer.read_bytes())
    with pytest.raises(pc.checkpoint.CheckpointError, match=r"rename it to \.safetensors"):
        pc.load_transformer(path)
    path.write_bytes(b"<html>404")
    with pytest.raises(pc.checkpoint.CheckpointError, match="web page"):
        pc.load_transformer(path)


def test_other_architectures(tmp_path):
    array = np.zeros((4, 32), np.float32)
    path = write_raw(tmp_path / "llama.gguf", {"blk.0.attn_q.weight": (array, None)}, "llama")
    with pytest.raises(pc.checkpoint.CheckpointError, match=r"llama\.gguf.*architecture 'llama'"):
        pc.load_transformer(path)
    path = write_raw(tmp_path / "flux.gguf", {"double_blocks.0.x": (array, None),
                                              "single_blocks.0.x": (array, None)}, "flux")
    with pytest.raises(pc.checkpoint.CheckpointError, match="Flux transformer"):
        pc.load_transformer(path)


def test_unknown_tensor_type(written, tmp_path):
    """A type from a newer ggml; the number after name and shape in the tensor's entry."""
    content = bytearray(written["Q8_0"].read_bytes())
    name = b"blocks.0.attn.qkv.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    assert content[at] == gguf.GGMLQuantizationType.Q8_0
    content[at] = 250
    (tmp_path / "new.gguf").write_bytes(content)
    with pytest.raises(pc.checkpoint.CheckpointError, match=r"new\.gguf.*250"):
        pc.load_transformer(tmp_path / "new.gguf")


def test_damaged_scales(written, tmp_path):
    content = bytearray(written["Q8_0"].read_bytes())
    tensor = next(t for t in gguf.GGUFReader(written["Q8_0"]).tensors
                  if t.name == "blocks.2.mlp.fc1.weight")
    content[tensor.data_offset + 1] = 0x7C
    (tmp_path / "nan.gguf").write_bytes(content)
    with pytest.raises(pc.checkpoint.CheckpointError, match=r"blocks\.2\.mlp\.fc1.*damaged"):
        pc.load_transformer(tmp_path / "nan.gguf")


def test_written_whole_or_not_at_all(starter, tmp_path, monkeypatch):
    """A failure half-way leaves the old file, and nothing else."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"the old one")
    calls = iter(range(20))

    def fails(*args):
        if next(calls) > 10:
            raise OSError("disk full")
        return gguf.GGUFWriter.__dict__["write_tensor_data"](*args)

    class Writer(gguf.GGUFWriter):
        write_tensor_data = fails

    monkeypatch.setattr(gguf, "GGUFWriter", Writer)
    with pytest.raises(pc.checkpoint.CheckpointError, match=r"m\.gguf.*disk full"):
        write_gguf(path, *starter, "Q8_0")
    assert path.read_bytes() == b"the old one" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "quant", "words"), [
    ("m.gguf", "Q3_K", "use one of BF16"), ("m.safetensors", "Q8_0", "ends in .gguf")])
def test_what_cannot_be_written(name, quant, words, starter, tmp_path):
    with pytest.raises(ValueError, match=words):
        write_gguf(tmp_path / name, *starter, quant)
    assert not list(tmp_path.iterdir())
