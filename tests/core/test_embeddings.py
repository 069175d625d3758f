"""Encoded prompts in files: kept bit for bit, refused when bad, drawn without T5."""

import json
from importlib import import_module

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import pixart_core as pc
from pixart_core.checkpoint import CheckpointError
from pixart_core.starter import find_starter
from pixart_core.text.embeddings import (
    EMBEDDINGS_KEY,
    CaptionEntry,
    caption_rows,
    load_embeddings,
    save_embeddings,
)

pytest.importorskip("diffusers")

STARTER = find_starter()
PROMPT = "a large (red:1.3) circle on a blue background"


def entry(batch=2, **changes):
    states = torch.randn(batch, 5, 8, generator=torch.Generator().manual_seed(batch))
    mask = torch.ones(batch, 5, dtype=torch.int32)
    mask[-1, 3:] = 0
    return CaptionEntry(**{"caption": states, "mask": mask, **changes})


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    """Protects CONDITIONING of any kind: dtypes, masks, sizes, areas, several entries."""
    path = tmp_path / "a.safetensors"
    entries = [entry(options={"width": 1024, "aspect_ratio": 0.1 + 0.2, "pooled_output": None,
                              "area": (8, 16, 0, 4), "set_area_to_bounds": False, "note": "ü"},
                     tensors={"mask": torch.rand(1, 8, 8)}),
               entry(1, caption=torch.randn(1, 3, 8).bfloat16(), mask=None)]
    save_embeddings(path, entries, {"prompt": PROMPT}, {"workflow": "{}"})
    again, info = load_embeddings(path)
    assert info == {"prompt": PROMPT} and len(again) == 2
    for one, other in zip(entries, again, strict=True):
        assert other.caption.dtype is one.caption.dtype and torch.equal(other.caption, one.caption)
        assert one.options == other.options and one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(one.tensors[k], other.tensors[k]) for k in one.tensors)
    assert torch.equal(again[0].mask, entries[0].mask) and again[1].mask is None
    assert isinstance(again[0].options["area"], tuple)
    with safe_open(path, "pt") as file:
        assert file.metadata()["workflow"] == "{}"


@pytest.mark.parametrize(("entries", "message"), [
    ([], "no caption"),
    ([entry(options={"control": object()})], "'control'.*cannot be kept"),
    ([entry(caption=torch.full((2, 5, 8), float("nan")))], "NaN"),
    ([entry(mask=torch.ones(1, 5))], "mask has shape"),
    ([entry(caption=torch.ones(5, 8))], "shape"),
])
def test_what_cannot_be_kept_is_refused(tmp_path, entries, message):
    """Protects from files that lose something: nothing is written."""
    with pytest.raises(ValueError, match=message):
        save_embeddings(tmp_path / "a.safetensors", entries, {})
    assert not list(tmp_path.iterdir())


def described(**changes):
    return {"format": 1, "info": {}, "entries": [{"tensors": [], "options": {}}], **changes}


@pytest.mark.parametrize(("tensors", "header", "message"), [
    ({"emb": torch.ones(2, 8)}, None, "no encoded prompt"),
    ({"0.caption": torch.ones(1, 2, 8)}, "{", "damaged"),
    ({"0.caption": torch.ones(1, 2, 8)}, [], "damaged"),
    ({"0.caption": torch.ones(1, 2, 8)}, described(format=2), "format 2"),
    ({"0.caption": torch.ones(1, 2, 8)}, described(entries=[]), "damaged|no caption"),
    ({"0.caption": torch.ones(1, 2, 8), "1.caption": torch.ones(1, 2, 8)}, described(),
     "damaged.*1.caption"),
    ({"1.caption": torch.ones(1, 2, 8)}, described(), "damaged"),
    ({"0.caption": torch.ones(1, 2, 8)}, described(entries=[{"tensors": ["mask"], "options": {}}]),
     "damaged.*0.mask"),
    ({"0.caption": torch.ones(2, 8)}, described(), "shape"),
    ({"0.caption": torch.ones(1, 2, 8, dtype=torch.int32)}, described(), "int32"),
    ({"0.caption": torch.full((1, 2, 8), float("inf"))}, described(), "infinite"),
])
def test_bad_files_are_refused_with_one_error(tmp_path, tensors, header, message):
    path = tmp_path / "bad.safetensors"
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, None if header is None else {EMBEDDINGS_KEY: text})
    with pytest.raises(CheckpointError, match=message) as error:
        load_embeddings(path)
    assert "bad.safetensors" in str(error.value)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"emb": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        load_embeddings(path)
    path = tmp_path / "cut.safetensors"
    save_embeddings(path, [entry()], {})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cut short"):
        load_embeddings(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_embeddings(tmp_path / "nothing.safetensors")


def test_rows_are_captions_without_padding():
    rows = caption_rows([entry(options={"width": 64, "height": 32, "pooled_output": None})], "a")
    assert [len(row.states) for row in rows] == [5, 3]
    assert rows[0].size == (32, 64) and rows[0].aspect_ratio is None
    for options, tensors in (({"start_percent": 0.5}, {}), ({}, {"mask": torch.ones(1)})):
        with pytest.raises(ValueError, match="only ComfyUI"):
            caption_rows([entry(options=options, tensors=tensors)], "a")
    with pytest.raises(ValueError, match="combines 2"):
        caption_rows([entry(), entry()], "a")


@pytest.fixture
def run(tmp_path, monkeypatch):
    typer_testing = pytest.importorskip("typer.testing")
    from pixart_core.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    runner = typer_testing.CliRunner()

    def call(*arguments, code=0):
        result = runner.invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, result.output
        return result

    return call


def test_a_picture_from_files_is_that_of_the_prompt(run, tmp_path, monkeypatch):
    """Protects small machines: the same bytes, and T5 is not opened."""
    from PIL import Image

    from pixart_core.png import read_settings
    from pixart_core.text import T5TextEncoder

    settings = ("--steps", 3, "--guidance", 3, "--seed", 5)
    run("generate", PROMPT, "-o", "prompt.png", "--negative", "a star", *settings)
    assert "of 40 tokens" in run("encode", PROMPT, "-o", "p.safetensors").stdout
    run("encode", "a star", "-o", "n.safetensors")
    both = ("--embeddings", "p.safetensors", "--negative-embeddings", "n.safetensors")

    def refuse(*_, **__):
        raise AssertionError("T5 was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(T5TextEncoder, "from_path", refuse)
        run("generate", "-o", "files.png", *both, *settings)
        run("generate", "--like", "files.png", "-o", "again.png", *both)
        run("generate", "-o", "alone.png", "--model", STARTER.transformer, "--vae", STARTER.vae,
            *both, *settings)
    wanted = Image.open("prompt.png").tobytes()
    for name in ("files.png", "again.png", "alone.png"):
        assert Image.open(name).tobytes() == wanted, name
    recorded = read_settings("files.png")
    assert recorded["prompt"] == PROMPT and "t5" not in recorded["files"]
    assert recorded == read_settings("again.png")


def test_embeddings_that_do_not_fit_are_refused(run, tmp_path):
    run("encode", PROMPT, "-o", "p.safetensors")
    save_embeddings("wide.safetensors", [CaptionEntry(torch.randn(1, 3, 4096))], {})
    save_embeddings("two.safetensors", [entry()], {})
    named = ("--model", STARTER.transformer, "--vae", STARTER.vae)
    for arguments, code, word in (
        ((PROMPT, "--embeddings", "p.safetensors"), 2, "leave one"),
        (("--embeddings", "p.safetensors", "--max-tokens", 8), 2, "--max-tokens"),
        (("--embeddings", "two.safetensors"), 1, "2 captions"),
        (("--embeddings", STARTER.vae), 1, "no encoded prompt"),
        (("--embeddings", "wide.safetensors", "--guidance", 1), 1, "4096 wide"),
        (("--embeddings", "p.safetensors", *named), 1, "no text encoder"),
    ):
        result = run("generate", *arguments, code=code)
        assert word in result.stderr, (arguments, result.stderr)
    assert "safetensors" in run("encode", PROMPT, "-o", "p.txt", code=2).stderr
    assert "does not exist" in run("encode", PROMPT, "-o", "no/p.safetensors", code=1).stderr


def test_a_missing_negative_is_told_before_a_model_is_loaded(run, monkeypatch):
    """Protects from minutes of loading and hashing for nothing; guidance may be the model's own."""
    from pixart_core import pipeline

    def refuse(*_, **__):
        raise AssertionError("a model was opened")

    run("encode", PROMPT, "-o", "p.safetensors")
    monkeypatch.setattr(pipeline, "load_transformer", refuse)
    monkeypatch.setattr(import_module("pixart_core.commands.generate"), "file_hashes", refuse)
    named = ("--embeddings", "p.safetensors", "--model", STARTER.transformer, "--vae", STARTER.vae)
    for own in ((), ("--guidance", 2)):
        told = " ".join(run("generate", *named, *own, code=1).stderr.split())
        assert "no text encoder to make one" in told and 'pixart encode ""' in told
    assert "a model was opened" in run("generate", *named, "--guidance", 1, code=1).stderr
    student = (*named[:3], STARTER.lcm, *named[4:])
    assert "a model was opened" in run("generate", *student, code=1).stderr


def test_a_pipeline_without_t5_asks_for_what_is_missing(monkeypatch):
    """Protects the same in Python: told before anything is encoded or drawn."""
    pipe = pc.Pipeline.from_files(STARTER.transformer, vae=STARTER.vae, text_encoder=False,
                                  device="cpu")
    monkeypatch.setattr(type(pipe.transformer), "prepare_caption", None)
    saved = [CaptionEntry(torch.randn(1, 3, pipe.config.caption_channels))]
    with pytest.raises(ValueError, match="needs a negative caption"):
        pipe.generate("", embeddings=saved)
    with pytest.raises(ValueError, match="which a prompt needs"):
        pipe.generate("", negative_embeddings=saved)


def test_a_file_of_several_captions_draws_as_many_pictures():
    """Protects batches: row by row what each caption gives, one negative for all."""
    pipe = pc.Pipeline.from_files(STARTER.transformer, STARTER.t5_file, STARTER.vae,
                                  dtype=torch.float32, device="cpu")
    prompts = [PROMPT, "a star"]
    states, mask = pipe.encoder(["a large red circle on a blue background", "a star"], 40)
    pictures = pipe.generate("", embeddings=[CaptionEntry(states, mask)], steps=2, seed=3)
    wanted = pipe.generate([prompts[0], prompts[1]], steps=2, seed=3, weights=True)
    assert len(pictures) == 2
    plain = pipe.generate("a large red circle on a blue background", steps=2, seed=3)
    import numpy

    def apart(a, b):
        return abs(numpy.asarray(a, "int16") - numpy.asarray(b, "int16")).max()

    assert apart(pictures[1], wanted[1]) <= 1 and apart(pictures[0], plain) <= 1
    assert apart(pictures[0], wanted[0]) > 1  # the weight counts
    with pytest.raises(ValueError, match="leave one out"):
        pipe.generate("a star", embeddings=[CaptionEntry(states[:1], mask[:1])])


def test_inspect_tells_prompt_tokens_width_and_t5(run):
    """Protects from guessing which prompt and which T5 a file is from."""
    run("encode", PROMPT, "-o", "p.safetensors")
    shown = run("inspect", "p.safetensors").stdout
    for words in ("prompts encoded by T5", PROMPT, STARTER.t5_file.name, "--embeddings"):
        assert words in shown, (words, shown)
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.split()}
    entries, _ = load_embeddings("p.safetensors")
    assert rows["tokens"][0] == str(entries[0].caption.shape[1])
    assert rows["width"][0] == str(entries[0].caption.shape[2])
    wide = CaptionEntry(torch.randn(1, 3, 4096), None, {"width": 640}, {"area": torch.ones(2)})
    save_embeddings("all.safetensors", [entry(), wide], {}, {"workflow": "{}"})
    shown = " ".join(run("inspect", "all.safetensors").stdout.split())
    for words in ("tokens of conditioning 1 5, 3", "4096, of T5 XXL", "640", "shape (2,)",
                  "metadata workflow"):
        assert words in shown, (words, shown)
    assert "encoded prompts" in run("inspect", "p.safetensors", "--set", "depth=2", code=1).stderr


def test_older_pictures_are_drawn_without_weights(run):
    """Protects --like: without a word on weights, brackets are text."""
    from PIL import Image

    from pixart_core.png import read_settings, write_png

    run("generate", PROMPT, "-o", "old.png", "--no-weights", "--steps", 2)
    record = read_settings("old.png")
    del record["weights"]
    write_png("older.png", Image.open("old.png"), record)
    run("generate", "--like", "older.png", "-o", "again.png")
    run("generate", "--like", "older.png", "-o", "weighted.png", "--weights")
    again, weighted = (Image.open(name).tobytes() for name in ("again.png", "weighted.png"))
    assert again == Image.open("old.png").tobytes() != weighted
