"""T5 encoders in GGUF files as llama.cpp writes them: weights packed, tokenizer inside."""

import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pixart_core.checkpoint import CheckpointError, read_checkpoint
from pixart_core.checkpoint.gguf_t5 import hugging_face_names, spiece_model
from pixart_core.quant import PACKINGS, PackedWeight
from pixart_core.starter import find_starter
from pixart_core.text import T5TextEncoder
from pixart_core.text.t5_file import inspect_t5, read_t5
from pixart_core.text.tokenizer import CaptionTokenizer

gguf = pytest.importorskip("gguf")
STARTER = find_starter()
PROMPTS = ["a large red circle on a blue background", "  Ünïcode ﬁligree,  two   spaces </s> x", ""]
NAMES = {"layer.0.SelfAttention.q": "attn_q", "layer.0.SelfAttention.k": "attn_k",
         "layer.0.SelfAttention.v": "attn_v", "layer.0.SelfAttention.o": "attn_o",
         "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
         "layer.0.layer_norm": "attn_norm", "layer.1.layer_norm": "ffn_norm",
         "layer.1.DenseReluDense.wi_0": "ffn_gate", "layer.1.DenseReluDense.wi_1": "ffn_up",
         "layer.1.DenseReluDense.wo": "ffn_down"}
TOP = {"shared.weight": "token_embd.weight",
       "encoder.final_layer_norm.weight": "enc.output_norm.weight"}


def fields_of(message):
    """(number, value) of every field of a protobuf message: bytes, or a number."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        tag = varint()
        size = {0: None, 5: 4, 1: 8}.get(tag & 7, "length")
        if size is None:
            yield tag >> 3, varint()
            continue
        size = varint() if size == "length" else size
        yield tag >> 3, message[at: at + size]
        at += size


@pytest.fixture(scope="module")
def tokenizer_metadata():
    """What llama.cpp's converter stores of the starter's tokenizer."""
    model = list(fields_of(read_t5(STARTER.t5_file).spiece_model))
    pieces = [dict(fields_of(value)) for number, value in model if number == 1]
    normaliser = dict(fields_of(next(value for number, value in model if number == 3)))
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": [piece[1].decode() for piece in pieces],
        "tokenizer.ggml.scores": [struct.unpack("<f", p.get(2, b"\0" * 4))[0] for p in pieces],
        "tokenizer.ggml.token_type": [piece.get(3, 1) for piece in pieces],
        "tokenizer.ggml.precompiled_charsmap": list(normaliser.get(2, b"")),
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": True,
        "tokenizer.ggml.unknown_token_id": 2, "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
    }


def llama_name(name):
    if name in TOP:
        return TOP[name]
    index, inner = name.removeprefix("encoder.block.").removesuffix(".weight").split(".", 1)
    return f"enc.blk.{index}.{NAMES[inner]}.weight"


def write_t5(path, quant, metadata, architecture="t5encoder", change=None):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_layer_norm_rms_eps(1e-6)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string,
               list: writer.add_array}[type(value)]
        if value != []:
            add(key, value)
    tensors = {llama_name(k): t.float().numpy() for k, t in
               read_t5(STARTER.t5_file).state_dict.items()}
    for name, array in (change or (lambda t: t))(tensors).items():
        kind = None
        if quant and isinstance(array, np.ndarray) and array.ndim == 2 and "rel_b" not in name:
            kind = gguf.GGMLQuantizationType[quant]
            array = gguf.quants.quantize(array, kind)
        elif isinstance(array, tuple):
            array, kind = array[0], gguf.GGMLQuantizationType[array[1]]
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def reference():
    return T5TextEncoder.from_path(STARTER.t5_file, dtype=torch.float32)


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory, tokenizer_metadata):
    return write_t5(tmp_path_factory.mktemp("t5") / "t5.gguf", "Q8_0", tokenizer_metadata)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("quant", "bar"), [(None, 1e-6), ("Q8_0", 2e-2),
                                            ("Q4_0", 0.15)])
def test_embeddings_stay_close(quant, bar, tmp_path, tokenizer_metadata, reference):
    path = write_t5(tmp_path / "t5.gguf", quant, tokenizer_metadata)
    assert inspect_t5(path) == inspect_t5(STARTER.t5_file)
    encoder = T5TextEncoder.from_path(path, dtype=torch.float32)
    for prompt in (PROMPTS[0], PROMPTS[2]):
        (found, mask), (expected, known) = encoder(prompt, 24), reference(prompt, 24)
        assert torch.equal(mask, known)
        assert relative(found[mask], expected[mask]) < bar


def test_packed_layers_equal_dense_ones(packed_file, tmp_path, reference):
    """Unpacking in the forward pass is the same as loading the unpacked weights."""
    tensors = read_checkpoint(packed_file).state_dict
    save_file(tensors, tmp_path / "dense.safetensors")
    packed, dense = (T5TextEncoder.from_path(path, dtype=torch.float32)
                     for path in (packed_file, tmp_path / "dense.safetensors"))
    assert torch.equal(packed(PROMPTS[0], 24)[0], dense(PROMPTS[0], 24)[0])


@pytest.mark.parametrize(("dtype", "bar"), [(None, 5e-2), (torch.float16, 3e-2)])
def test_half_precision_and_memory(dtype, bar, packed_file, reference):
    """Packed in any dtype; wo keeps float32's range in float16, as without packing."""
    encoder = T5TextEncoder.from_path(packed_file, dtype=dtype)
    assert encoder.dtype == (dtype or torch.bfloat16)
    states, mask = encoder(PROMPTS[0], 24)
    assert relative(states[mask].float(), reference(PROMPTS[0], 24)[0][mask]) < bar
    layers = [m for m in encoder.model.modules() if isinstance(m, PackedWeight)]
    count = sum(layer.in_features * layer.out_features for layer in layers)
    assert len(layers) == 3 * 7
    assert sum(m.weight.nbytes for m in layers) * 8 == count * PACKINGS["Q8_0"].bits
    if dtype is torch.float16:
        wo = encoder.model.encoder.block[0].layer[1].DenseReluDense.wo
        assert wo(torch.ones(1, 256, dtype=dtype)).dtype == torch.float32


def test_k_quants(tmp_path, tokenizer_metadata):
    """Rows of 256 and more, as in T5 XXL, may be in the larger blocks."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (128, 210), dtype=np.uint8)
    blocks[:, 208:] = np.full((128, 1), 1e-4, np.float16).view(np.uint8)

    def change(tensors):
        return {**tensors, "enc.blk.1.ffn_down.weight": (blocks, "Q6_K")}

    path = write_t5(tmp_path / "k.gguf", "Q8_0", tokenizer_metadata, change=change)
    encoder = T5TextEncoder.from_path(path, dtype=torch.float32)
    layer = encoder.model.encoder.block[1].layer[1].DenseReluDense.wo
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q6_K)
    x = torch.eye(256)
    assert torch.equal(layer(x), torch.from_numpy(expected).T)
    assert encoder(PROMPTS[0], 24)[0].isfinite().all()


def test_tokenizer_is_the_one_inside(packed_file, reference):
    tokenizer = read_t5(packed_file).tokenizer()
    for prompt in PROMPTS:
        assert tokenizer.encode(prompt, 99) == reference.tokenizer.encode(prompt, 99)


def test_sentinels_and_padding_behind_the_pieces(tokenizer_metadata):
    """T5's own GGUF files list 100 sentinels and 28 rows of padding behind 32000 pieces."""
    class Field:
        def __init__(self, value):
            self.contents = lambda: value

    extended = dict(tokenizer_metadata)
    more = [*(f"<extra_id_{i}>" for i in reversed(range(100))), *(f"[PAD{i}]" for i in range(28))]
    extended["tokenizer.ggml.tokens"] = extended["tokenizer.ggml.tokens"] + more
    extended["tokenizer.ggml.scores"] = extended["tokenizer.ggml.scores"] + [-1e4] * 128
    extended["tokenizer.ggml.token_type"] = \
        extended["tokenizer.ggml.token_type"] + [4] * 100 + [5] * 28
    plain, longer = (spiece_model({k: Field(v) for k, v in m.items()})
                     for m in (tokenizer_metadata, extended))
    assert longer == plain
    tokenizer = CaptionTokenizer.from_spiece(longer, embedding_rows=256 + 128)
    assert tokenizer.vocabulary["<extra_id_0>"] == 256 + 99


def test_without_a_tokenizer(tmp_path, reference):
    """One message that names the ways out; with the caller's tokenizer it works."""
    path = write_t5(tmp_path / "bare.gguf", "Q8_0", {})
    with pytest.raises(CheckpointError, match=r"bare\.gguf brings no tokenizer.*tokenizer="):
        T5TextEncoder.from_path(path)
    encoder = T5TextEncoder.from_path(path, tokenizer=reference.tokenizer)
    assert encoder(PROMPTS[0], 24)[0].isfinite().all()


def test_decoders_are_left_out():
    names = ["dec.blk.0.attn_q.weight", "output.weight", "enc.blk.3.ffn_up.weight",
             "token_embd.weight"]
    assert sorted(hugging_face_names(dict.fromkeys(names, 0))) == [
        "encoder.block.3.layer.1.DenseReluDense.wi.weight", "shared.weight"]


def test_incomplete_and_damaged(tmp_path, tokenizer_metadata, packed_file):
    def without(tensors):
        return {k: t for k, t in tensors.items() if k != "enc.blk.2.attn_o.weight"}

    path = write_t5(tmp_path / "part.gguf", "Q8_0", tokenizer_metadata, change=without)
    with pytest.raises(CheckpointError, match=r"part\.gguf lacks encoder\.block\.2.*\.o\.weight"):
        read_t5(path)
    content = bytearray(packed_file.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(packed_file).tensors
                  if t.name == "enc.blk.1.attn_v.weight")
    content[tensor.data_offset + 1] = 0x7C
    (tmp_path / "nan.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"SelfAttention\.v.*not finite"):
        read_t5(tmp_path / "nan.gguf")


def test_a_transformer_is_no_text_encoder(tmp_path):
    import pixart_core as pc
    from pixart_core.checkpoint.gguf_write import write_gguf

    write_gguf(tmp_path / "m.gguf", *pc.open_transformer(STARTER.transformer), "Q8_0")
    with pytest.raises(CheckpointError, match=r"m\.gguf holds a PixArt transformer"):
        read_t5(tmp_path / "m.gguf")
