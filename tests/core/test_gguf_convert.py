"""pixart convert and inspect with GGUF files."""

import pytest
import torch

gguf = pytest.importorskip("gguf")
pytest.importorskip("diffusers")
typer_testing = pytest.importorskip("typer.testing")

import pixart_core as pc  # noqa: E402
from pixart_core.checkpoint import CheckpointError  # noqa: E402
from pixart_core.checkpoint.gguf_t5 import spiece_model  # noqa: E402
from pixart_core.checkpoint.spiece import read_spiece  # noqa: E402
from pixart_core.cli import app  # noqa: E402
from pixart_core.starter import find_starter  # noqa: E402
from pixart_core.text import T5TextEncoder  # noqa: E402
from pixart_core.text.t5_file import T5Config, T5File, inspect_t5, read_t5  # noqa: E402
from pixart_core.text.t5_gguf import write_t5_gguf  # noqa: E402

STARTER = find_starter()
PROMPTS = ["a large red circle on a blue background", "  Ünïcode ﬁligree,  two   spaces </s> x", ""]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    runner = typer_testing.CliRunner()
    return lambda *arguments: runner.invoke(app, [str(a) for a in arguments])


def test_there_and_back(run, tmp_path):
    """The config survives, the head count among it; the default format is Q8_0."""
    done = run("convert", STARTER.transformer, "m.gguf")
    assert done.exit_code == 0 and "Q8_0 (44 tensors)" in done.stdout, done.output
    assert run("convert", "m.gguf", "m.safetensors").exit_code == 0
    assert pc.open_transformer(tmp_path / "m.safetensors")[1] \
        == pc.open_transformer(STARTER.transformer)[1]


def test_to_gguf(run, tmp_path):
    """What one tries first: `--to gguf` beside a .gguf OUT changes nothing, for a T5 either."""
    for source in (STARTER.transformer, STARTER.t5_file):
        assert run("convert", source, "plain.gguf").exit_code == 0
        done = run("convert", source, "said.gguf", "--to", "gguf")
        assert done.exit_code == 0, done.output
        assert (tmp_path / "said.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


@pytest.mark.parametrize(("target", "words"), [
    ("m", "write m.gguf"), ("m.safetensors", "write m.gguf"), ("m-1.0", "write m-1.0.gguf"),
    (".", "write pixart_starter"),
])
def test_to_gguf_needs_a_gguf_file(run, tmp_path, target, words):
    done = run("convert", STARTER.transformer, target, "--to", "gguf")
    text = " ".join(done.stderr.replace("│", " ").split())
    assert done.exit_code == 2 and "one .gguf file" in text and words in text
    assert not list(tmp_path.iterdir())


def test_inspect_says_what_is_packed(run):
    run("convert", STARTER.transformer, "m.gguf", "--quant", "Q4_0")
    shown = run("inspect", "m.gguf").stdout
    assert "a PixArt transformer" in shown and "Q4_0 (3,600,384)" in shown
    assert "metadata pixart_config" in shown and "2.7 MiB" in shown


@pytest.mark.parametrize(("arguments", "words"), [
    (("m.safetensors", "--quant", "Q8_0"), "for GGUF files"),
    (("m.gguf", "--quant", "Q4_K"), "use one of"),
    (("m.gguf", "--to", "diffusers"), "leave out --to"),
    (("m.safetensors", "--to", "ggml"), "native, diffusers, gguf"),
])
def test_usage(run, tmp_path, arguments, words):
    done = run("convert", STARTER.transformer, *arguments)
    assert done.exit_code == 2 and words in done.stderr
    assert not list(tmp_path.iterdir())


def test_neither_transformer_nor_t5(run, tmp_path):
    done = run("convert", STARTER.vae, "m.gguf")
    assert done.exit_code == 2 and "PixArt transformers and T5" in done.stderr
    assert not list(tmp_path.iterdir())


def relative(a, b):
    return ((a.float() - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def reference():
    return T5TextEncoder.from_path(STARTER.t5_file, dtype=torch.float32)


@pytest.mark.parametrize(("quant", "bar"), [("F16", 1e-3), ("BF16", 2e-2), ("Q8_0", 1e-2),
                                            ("Q4_0", 0.15)])
def test_t5_there_and_back(run, tmp_path, reference, quant, bar):
    """The states stay close, in the engine and as the nodes load it (float16); the tokens are the
    same, with no other file beside it."""
    done = run("convert", STARTER.t5_file, "t5.gguf", "--quant", quant)
    assert done.exit_code == 0 and "tokenizer is inside" in done.stdout, done.output
    path = tmp_path / "t5.gguf"
    assert inspect_t5(path) == inspect_t5(STARTER.t5_file)
    for dtype, limit in ((torch.float32, bar), (torch.float16, max(bar, 3e-2))):
        encoder = T5TextEncoder.from_path(path, dtype=dtype)
        states, mask = encoder(PROMPTS[0], 24)
        assert relative(states[mask], reference(PROMPTS[0], 24)[0][mask]) < limit
    for prompt in PROMPTS:
        assert encoder.tokenizer.encode(prompt, 99) == reference.tokenizer.encode(prompt, 99)


@pytest.fixture(scope="module")
def unigram():
    """A spiece.model of T5's own kind with the starter's pieces; the starter's is a BPE model."""
    class Field:
        def __init__(self, value):
            self.contents = lambda: value

    pieces = read_spiece(read_t5(STARTER.t5_file).spiece_model, "it", 999)
    assert not pieces.like_t5
    fields = {"model": "t5", "tokens": pieces.tokens, "scores": pieces.scores,
              "token_type": pieces.types, "precompiled_charsmap": pieces.charsmap}
    return spiece_model({f"tokenizer.ggml.{name}": Field(value) for name, value in fields.items()})


def test_t5_as_llama_cpp_reads_it(run, tmp_path, unigram):
    """Its names, its metadata, a token for every row; norms and position bias in float32."""
    (tmp_path / "spiece.model").write_bytes(unigram)
    run("convert", STARTER.t5, "t5.gguf", "--quant", "Q5_1", "--tokenizer", "spiece.model")
    (tmp_path / "spiece.model").unlink()
    assert read_t5(tmp_path / "t5.gguf").spiece_model == unigram
    reader = gguf.GGUFReader(tmp_path / "t5.gguf")
    config = inspect_t5(STARTER.t5_file)
    field = {name: entry.contents() for name, entry in reader.fields.items()}
    assert field["general.architecture"] == "t5encoder"
    assert field["t5encoder.block_count"] == config.num_layers
    assert field["t5encoder.attention.head_count"] == config.num_heads
    assert field["t5encoder.attention.relative_buckets_count"] == 32
    assert field["t5encoder.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    lists = [field[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")]
    assert {len(one) for one in lists} == {config.vocab_size}
    known = {gguf.TENSOR_NAMES[kind].format(bid=i) + ".weight" for i in range(config.num_layers)
             for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.T5ENCODER]}
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds.keys() <= known and len(kinds) == 3 + 9 * config.num_layers
    assert kinds["token_embd.weight"] in ("F16", "BF16")
    assert kinds["enc.blk.0.attn_rel_b.weight"] == kinds["enc.blk.2.ffn_norm.weight"] == "F32"
    assert kinds["enc.blk.1.ffn_up.weight"] == "Q5_1"


def test_t5_packed_again(run, tmp_path, reference):
    """From one GGUF to another, through its packed weights."""
    run("convert", STARTER.t5_file, "a.gguf")
    assert run("convert", "a.gguf", "b.gguf", "--quant", "Q5_0").exit_code == 0
    states, mask = T5TextEncoder.from_path(tmp_path / "b.gguf", dtype=torch.float32)(PROMPTS[0], 24)
    assert relative(states[mask], reference(PROMPTS[0], 24)[0][mask]) < 0.1


def test_t5_without_a_tokenizer(run, tmp_path):
    """Said in words; --tokenizer puts one inside, of the right kind only."""
    file = read_t5(STARTER.t5_file)
    pc.write_checkpoint(tmp_path / "bare.safetensors", file.state_dict, {})
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "spiece.model").write_bytes(file.spiece_model)
    (tmp_path / "t" / "tokenizer.json").write_text("{}")
    done = run("convert", "bare.safetensors", "t5.gguf")
    assert done.exit_code == 0 and "without a tokenizer" in done.stdout, done.output
    assert read_t5("t5.gguf").spiece_model is None
    assert run("convert", "bare.safetensors", "t5.gguf", "--tokenizer", "t").exit_code == 0
    assert read_t5("t5.gguf").tokenizer().vocab_size == file.tokenizer().vocab_size
    for arguments, code, words in (
        (("bare.safetensors", "x.gguf", "--tokenizer", "t/tokenizer.json"), 2, "spiece.model"),
        (("bare.safetensors", "x.gguf", "--set", "depth=2"), 2, "not for a T5"),
        (("bare.safetensors", "x.gguf", "--to", "native"), 2, "not for a T5"),
        (("bare.safetensors", "x.gguf", "--tokenizer", "bare.safetensors"), 1, "SentencePiece"),
        ((STARTER.transformer, "x.gguf", "--tokenizer", "t"), 2, "for a T5"),
    ):
        done = run("convert", *arguments)
        assert done.exit_code == code and words in done.stderr, (arguments, done.output)
    assert not (tmp_path / "x.gguf").exists()


def test_sentinels_and_padding_fill_the_table(tmp_path, unigram):
    """As in T5's own files: 100 sentinels behind the pieces, then padding; the pieces come back."""
    file = read_t5(STARTER.t5_file)
    pieces = read_spiece(unigram, "it", file.config.vocab_size)
    rows = len(pieces.tokens) + 128
    wide = {**file.state_dict, "shared.weight": torch.zeros(rows, file.config.d_model)}
    config = T5Config(**{**vars(file.config), "vocab_size": rows})
    write_t5_gguf(tmp_path / "t5.gguf",
                  T5File(file.path, wide, config, file.dtype, unigram))
    tokens = gguf.GGUFReader(tmp_path / "t5.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == rows and tokens[len(pieces.tokens)] == "<extra_id_99>"
    assert tokens[-29:-27] == ["<extra_id_0>", f"[PAD{rows - 28}]"]
    again = read_t5(tmp_path / "t5.gguf")
    assert read_spiece(again.spiece_model, "it", rows) == pieces
    assert again.tokenizer().vocabulary["<extra_id_0>"] == len(pieces.tokens) + 99


def test_what_gguf_cannot_say_is_refused(tmp_path):
    """Protects from files that other programs, and this one, would read as something else."""
    file = read_t5(STARTER.t5_file)
    far = T5File(file.path, file.state_dict, T5Config(**{
        **vars(file.config), "relative_attention_max_distance": 256}), file.dtype)
    with pytest.raises(CheckpointError, match="relative_attention_max_distance 256"):
        write_t5_gguf(tmp_path / "t5.gguf", far)
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    large = T5File(file.path, {**file.state_dict, name: file.state_dict[name].float() + 1e5},
                   file.config, torch.float32)
    with pytest.raises(CheckpointError, match="too large for float16"):
        write_t5_gguf(tmp_path / "t5.gguf", large, "F16")
    for model in (b"", b"\x0a\xff", file.spiece_model[:-9]):
        with pytest.raises(CheckpointError, match=r"SentencePiece|T5's"):
            read_spiece(model, "it", 999)
    with pytest.raises(CheckpointError, match="do not belong together"):
        read_spiece(file.spiece_model, "it", 9)
    assert not list(tmp_path.iterdir())
