"""T5 in fewer bits: what is stored, what is encoded, files, memory, clear errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pixart_core.checkpoint.read import CheckpointError
from pixart_core.checkpoint.write import write_checkpoint
from pixart_core.checkpoint.write_stream import stream_checkpoint
from pixart_core.commands.quantize_t5 import quantize_t5
from pixart_core.pipeline import Pipeline
from pixart_core.quant.policy import METHODS, T5_METHODS
from pixart_core.starter import find_starter
from pixart_core.text import PRECISIONS, LazyT5, T5TextEncoder, read_t5_as
from pixart_core.text.t5_file import EMBEDDING, T5Config, expected_shapes, is_wo, open_t5, read_t5
from pixart_core.text.t5_quant_file import write_quantized_t5

STARTER = find_starter()
PROMPT = "a large red circle on a blue background"
PACKINGS = {"fp8": "float8_e4m3fn", "int8": "int8_tensorwise", "int4": "awq_w4a16"}
# relative error of the states: a step of the format, with room for other starters
ERRORS = {"bf16": 0.005, "fp16": 0.001, "fp8": 0.05, "int8": 0.02, "int4": 0.15}


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.fixture(scope="module")
def reference():
    return T5TextEncoder.from_path(STARTER.t5_file, torch.float32).states(PROMPT, 24)


def small_t5(path, dtype=torch.float16, **sizes):
    """A random T5 with the starter's tokenizer; its weights."""
    config = T5Config(**{"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
                         "vocab_size": 256, **sizes})
    generator = torch.Generator().manual_seed(0)
    weights = {name: (torch.randn(shape, generator=generator) * 0.1).to(dtype)
               for name, shape in expected_shapes(config).items()}
    spiece = torch.frombuffer(bytearray(read_t5(STARTER.t5_file).spiece_model), dtype=torch.uint8)
    write_checkpoint(path, {**weights, "spiece_model": spiece}, {})
    return weights


@pytest.mark.parametrize("precision", ERRORS)
def test_states_are_close(reference, precision):
    encoder = T5TextEncoder.from_path(STARTER.t5_file, torch.float32, precision=precision)
    states = encoder.states(PROMPT, 24)
    assert states.dtype == torch.float32
    assert relative(states, reference) < ERRORS[precision]


@pytest.mark.parametrize("precision", T5_METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_wo_wide_enough(reference, precision, dtype):
    """float16 overflows in T5's wo, so that layer's input is widened; states keep the dtype."""
    encoder = T5TextEncoder.from_path(STARTER.t5_file, dtype, precision=precision)
    wo = encoder.model.encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.compute_dtype == (torch.float32 if dtype is torch.float16 else None)
    states = encoder.states(PROMPT, 24)
    assert states.dtype == dtype and relative(states, reference) < ERRORS[precision]


def test_sixteen_bits_under_a_float32_encoder():
    """Half the memory where float32 computes: the matrices stay 16 bits, and are the same."""
    file = read_t5_as(STARTER.t5_file, "fp16", torch.float32)
    plain = read_t5(STARTER.t5_file, torch.float32)
    assert set(plain.state_dict) == {*file.state_dict, *file.packed}
    assert all(w.nbytes == 2 * w.shape.numel() for w in file.packed.values())
    for name, weight in file.packed.items():
        assert torch.equal(weight.dense(), plain.state_dict[name])


@pytest.mark.parametrize("method", T5_METHODS)
def test_matrices_alone_are_quantised_as_their_format_does(method):
    """Layer by layer and in pieces, to the bit what the format makes of a whole weight."""
    weights = read_t5(STARTER.t5_file).state_dict
    file = read_t5_as(STARTER.t5_file, method)
    kept = {name for name in weights if name not in file.packed}
    assert EMBEDDING in kept and all(weights[name].ndim == 1 or "relative" in name
                                     for name in kept - {EMBEDDING})
    for name, stored in file.packed.items():
        whole = METHODS[method].format.quantize(weights[name])
        assert all(torch.equal(stored.tensors[part].float(), tensor.float())
                   for part, tensor in whole.tensors.items()), name


def test_pieces_join(tmp_path, monkeypatch):
    small_t5(tmp_path / "t5.safetensors")
    whole = {m: read_t5_as(tmp_path / "t5.safetensors", m).packed for m in T5_METHODS}
    monkeypatch.setattr("pixart_core.text.t5_quant._PIECE", 64 * 5)
    for method, packed in whole.items():
        pieces = read_t5_as(tmp_path / "t5.safetensors", method).packed
        assert pieces.keys() == packed.keys()
        for name, weight in pieces.items():
            assert weight.shape == packed[name].shape
            assert torch.equal(weight.dense(), packed[name].dense()), (method, name)


@pytest.mark.parametrize("method", T5_METHODS)
def test_a_file_written_once_reads_the_same(tmp_path, method):
    path = tmp_path / "out.safetensors"
    said = quantize_t5(STARTER.t5_file, path, method)
    assert PACKINGS[method] in said[0] and len(said) == 1  # the tokenizer is inside
    loaded = T5TextEncoder.from_path(STARTER.t5_file, torch.float32, precision=method)
    read = T5TextEncoder.from_path(path, torch.float32)
    assert torch.equal(read.states(PROMPT, 24), loaded.states(PROMPT, 24))


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_eight_bit_files_ask_for_full_precision_products(tmp_path, method):
    """Or ComfyUI would round T5's activations, whose outliers 8 bits cannot hold."""
    write_quantized_t5(STARTER.t5_file, tmp_path / "t5.safetensors", method)
    with safe_open(tmp_path / "t5.safetensors", "pt") as file:
        notes = [n for n in file.keys() if n.endswith(".comfy_quant")]  # noqa: SIM118
        assert len(notes) == len(read_t5_as(STARTER.t5_file, method).packed)
        assert all(b'"full_precision_matrix_mult":true' in bytes(file.get_tensor(n).tolist())
                   for n in notes)


def test_everything_else_of_a_file_has_16_bits(tmp_path):
    """T5 XXL is 4.9 GB in int8 and 2.9 GB in int4 with its embedding in 16 bits."""
    small_t5(tmp_path / "wide.safetensors", torch.float32)
    write_quantized_t5(tmp_path / "wide.safetensors", tmp_path / "t5.safetensors", "int4")
    opened = open_t5(tmp_path / "t5.safetensors")
    assert {tensor.dtype for tensor in opened.weights.values()} == {torch.float16}


def test_memory_holds_the_result_and_little_more(tmp_path):
    """The file is four times what is kept, and mapped: pages that were read are let go of."""
    if sys.platform != "linux":
        pytest.skip("pages of mapped files are let go of on Linux alone")
    config = T5Config(d_model=1024, d_kv=64, d_ff=2048, num_layers=6, num_heads=16, vocab_size=100)
    shapes = expected_shapes(config)
    base = torch.randn(2048 * 1024, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "t5.safetensors"
    written = stream_checkpoint(path, ((n, base[:torch.Size(s).numel()].reshape(s))
                                       for n, s in shapes.items()), {}, 300 * len(shapes))
    run = subprocess.run([sys.executable, "-c", PEAK, path, "int8"], capture_output=True, text=True,
                         check=True, cwd=Path(__file__).parents[2])
    peak, kept = map(int, run.stdout.split())
    assert kept < written / 3.5
    assert peak - kept < 60e6 < written / 3


PEAK = """
import sys, torch
from benchmarks.measure import peak_memory
from pixart_core.quant.policy import METHODS
from pixart_core.text.t5_quant import read_t5_as
METHODS[sys.argv[2]].format.quantize(torch.randn(64, 64))  # comfy-kitchen is there
before = peak_memory()
file = read_t5_as(sys.argv[1], sys.argv[2], torch.bfloat16)
kept = sum(t.nbytes for t in (*file.state_dict.values(), *file.packed.values()))
print(peak_memory() - before, kept)
"""


def test_layers_that_int4_cannot_divide_stay(tmp_path, caplog):
    small_t5(tmp_path / "t5.safetensors", d_ff=100)
    file = read_t5_as(tmp_path / "t5.safetensors", "int4")
    assert not any(is_wo(name) for name in file.packed) and len(file.packed) == 2 * 6
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "2 layers" in caplog.text and "100 inputs" in caplog.text


def test_a_precision_of_a_quantised_file(tmp_path):
    write_quantized_t5(STARTER.t5_file, tmp_path / "small.safetensors", "int8")
    for precision in set(PRECISIONS) - {"auto"}:
        with pytest.raises(CheckpointError, match=r"quantised already .int8_tensorwise.*'auto'"):
            read_t5_as(tmp_path / "small.safetensors", precision)


def test_float8_files_round_once_more_with_a_warning(tmp_path, caplog):
    weights = small_t5(tmp_path / "plain.safetensors")
    write_checkpoint(tmp_path / "fp8.safetensors",
                     {n: t.to(torch.float8_e4m3fn) for n, t in weights.items()}, {})
    assert len(read_t5_as(tmp_path / "fp8.safetensors", "int4").packed) == 2 * 7
    assert "a second time" in caplog.text
    with pytest.raises(CheckpointError, match="float8 already"):
        read_t5_as(tmp_path / "fp8.safetensors", "fp8")


def test_unknown_precisions():
    with pytest.raises(ValueError, match="'int3'; use one of auto, bf16"):
        T5TextEncoder.from_path(STARTER.t5_file, precision="int3")


def test_damaged_weights(tmp_path):
    weights = small_t5(tmp_path / "t5.safetensors")
    name = "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"
    weights[name][3, 4] = torch.nan
    write_checkpoint(tmp_path / "nan.safetensors", weights, {})
    for precision in ("bf16", "int8", "int4"):
        with pytest.raises(CheckpointError, match=f"{name}.*not finite"):
            read_t5_as(tmp_path / "nan.safetensors", precision)
    with pytest.raises(CheckpointError, match="not finite"):
        write_quantized_t5(tmp_path / "nan.safetensors", tmp_path / "out.safetensors", "fp8")
    assert not list(tmp_path.glob("*out.safetensors*"))  # nothing half-written stays


def test_without_comfy_kitchen_the_package_is_named(monkeypatch):
    """Before a weight is read, and 16 bits need no package."""
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    monkeypatch.setattr("pixart_core.text.t5_quant.read_opened", None)
    for precision in T5_METHODS:
        with pytest.raises(ImportError, match="comfy-kitchen"):
            read_t5_as(STARTER.t5_file, precision)
    monkeypatch.undo()
    assert read_t5_as(STARTER.t5_file, "bf16").dtype == torch.bfloat16


def test_the_pipeline_lets_t5_go_before_the_first_step():
    settings = {"steps": 2, "seed": 1, "max_tokens": 24}
    files = {"transformer": STARTER.transformer, "t5": STARTER.t5_file, "vae": STARTER.vae}
    kept = Pipeline.from_files(**files, t5_precision="int8")
    lazy = Pipeline.from_files(**files, t5_precision="int8", keep_t5=False)
    assert isinstance(lazy.encoder, LazyT5) and lazy.encoder.loaded is None
    seen = []
    picture = lazy.generate(PROMPT, callback=lambda *_: seen.append(lazy.encoder.loaded),
                            **settings)
    assert seen == [None, None]
    assert picture.tobytes() == kept.generate(PROMPT, **settings).tobytes()
