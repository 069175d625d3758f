"""Out of memory in words: which errors count, what is raised, and what pipeline and command say."""

import pytest
import torch

from pixart_core.memory import explained, is_out_of_memory
from pixart_core.starter import find_starter

STARTER = find_starter()
CUDA_WORDS = ("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of "
              "23.64 GiB of which 1.06 GiB is free.")
CPU_WORDS = ("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
             "memory: you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)")
OF_DEVICE = {
    "cuda": torch.cuda.OutOfMemoryError(CUDA_WORDS),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
    "directml": RuntimeError("Could not allocate tensor with 8 bytes. There is not enough GPU "
                             "video memory available!"),
}
OF_MACHINE = {
    "cpu": RuntimeError(CPU_WORDS),
    "python": MemoryError(),
    "mmap": OSError("Cannot allocate memory (os error 12)"),
}


def run(error, words="the test (1 picture)", hints=("a smaller one", "a pause")):
    with explained(lambda: (words, hints)):
        raise error


@pytest.mark.parametrize("name", OF_DEVICE)
def test_a_full_device_is_raised_as_torch_raises_it(name):
    """What frees models after an error, as ComfyUI does, looks for this very class."""
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        run(OF_DEVICE[name])
    assert type(caught.value) is torch.cuda.OutOfMemoryError
    assert caught.value.__cause__ is OF_DEVICE[name]


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="an older PyTorch")
def test_an_accelerator_error_counts_where_it_is_of_memory():
    """PyTorch 2.8 and later raise it for what CUDA itself reports, with CUDA's own number."""
    full, other = torch.AcceleratorError("CUDA error"), torch.AcceleratorError("CUDA error")
    full.error_code, other.error_code = 2, 700
    assert is_out_of_memory(full) and not is_out_of_memory(other)


@pytest.mark.parametrize("name", OF_MACHINE)
def test_a_full_machine_is_a_memory_error(name):
    with pytest.raises(MemoryError) as caught:
        run(OF_MACHINE[name])
    assert str(caught.value).startswith("Not enough memory for the test (1 picture).")


def test_what_this_pytorch_says_counts():
    """The words are this build's own: an allocation that no machine can make."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**16, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_the_message_has_size_and_numbered_hints():
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        run(OF_DEVICE["cuda"])
    assert str(caught.value) == (
        "Not enough memory for the test (1 picture). It tried to allocate 20.00 GiB.\n"
        "What helps, most first:\n1. a smaller one\n2. a pause")


def test_the_innermost_words_stay():
    with (pytest.raises(MemoryError, match="for the inner") as caught,
          explained(lambda: ("the outer", ()))):
        run(MemoryError(), "the inner")
    assert "outer" not in str(caught.value)


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("mat1 and mat2"),
                                   OSError("(os error 120)"), KeyboardInterrupt()],
                         ids=lambda error: type(error).__name__)
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as caught:
        run(error)
    assert caught.value is error


# the pipeline


@pytest.fixture(scope="module")
def pipe():
    pytest.importorskip("diffusers")
    from pixart_core.pipeline import Pipeline

    return Pipeline.from_files(transformer=STARTER.transformer, t5=STARTER.t5, vae=STARTER.vae,
                               device="cpu")


def out_of_memory(*_, **__):
    raise RuntimeError(CPU_WORDS)


def test_the_transformer_says_what_it_was_drawing(pipe, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pipe.transformer, "forward", out_of_memory)
        with pytest.raises(MemoryError) as caught:
            pipe.generate(["a red circle", "a blue star"], width=192, height=256, steps=1)
    message = str(caught.value)
    for words in ("the PixArt-alpha transformer (2 pictures of 192 x 256 px, with and without the "
                  "prompt at once, float32, ", "tried to allocate 4096 bytes",
                  "1. fewer prompts at once than 2\n2. a smaller picture than 192 x 256 px; the "
                  "model was trained at 128 x 128\n3. captions from `pixart encode`"):
        assert words in message, message
    assert pipe.generate("a red circle", steps=1).size == (128, 128)


def test_only_what_would_help_is_named(pipe, monkeypatch):
    """One picture at the trained size, no T5: neither prompts nor T5 are to blame."""
    captions = pipe.encoder(["a red circle"], max_tokens=40)[0]
    monkeypatch.setattr(pipe.transformer, "forward", out_of_memory)
    from pixart_core.text.embeddings import CaptionEntry

    monkeypatch.setattr(pipe, "encoder", None)
    with pytest.raises(MemoryError) as caught:
        pipe.generate("", embeddings=[CaptionEntry(captions)], guidance=1, steps=1)
    message = str(caught.value)
    assert "(1 picture of 128 x 128 px, float32" in message
    assert not any(words in message for words in ("prompt", "T5", "trained"))


@pytest.mark.parametrize(("part", "words"), [
    ("encoder.model", "the text encoder ("),
    ("vae.network", "the VAE (1 picture of 128 x 128 px)")])
def test_the_other_parts_say_so_as_well(pipe, monkeypatch, part, words):
    owner, name = part.split(".")
    module = getattr(getattr(pipe, owner), name)
    monkeypatch.setattr(module, "forward" if name == "model" else "decode", out_of_memory)
    with pytest.raises(MemoryError) as caught:
        pipe.generate("a green ring", steps=1)
    assert words in str(caught.value)


def test_the_command_says_it_in_one_line(monkeypatch, tmp_path):
    typer_testing = pytest.importorskip("typer.testing")
    from pixart_core.cli import app
    from pixart_core.model import PixArtTransformer

    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError(CUDA_WORDS)

    monkeypatch.setattr(PixArtTransformer, "forward", full)
    monkeypatch.setenv("COLUMNS", "200")
    result = typer_testing.CliRunner().invoke(
        app, ["generate", "a red circle", "-o", str(tmp_path / "a.png"), "--device", "cpu"])
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert result.stderr.startswith("error: Not enough memory for the PixArt-alpha transformer (")
    assert result.stderr.count("\n") == 1 and "What helps, most first: 1. " in result.stderr
    assert not (tmp_path / "a.png").exists()
