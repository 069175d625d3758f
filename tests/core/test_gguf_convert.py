"""pixart convert and inspect with GGUF files."""

import pytest

pytest.importorskip("gguf")
pytest.importorskip("diffusers")
typer_testing = pytest.importorskip("typer.testing")

import pixart_core as pc  # noqa: E402
from pixart_core.cli import app  # noqa: E402
from pixart_core.starter import find_starter  # noqa: E402

STARTER = find_starter()


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


def test_inspect_says_what_is_packed(run):
    run("convert", STARTER.transformer, "m.gguf", "--quant", "Q4_0")
    shown = run("inspect", "m.gguf").stdout
    assert "a PixArt transformer" in shown and "Q4_0 (3,600,384)" in shown
    assert "metadata pixart_config" in shown and "2.6 MiB" in shown


@pytest.mark.parametrize(("arguments", "words"), [
    (("m.safetensors", "--quant", "Q8_0"), "for GGUF files"),
    (("m.gguf", "--quant", "Q4_K"), "use one of"),
    (("m.gguf", "--to", "diffusers"), "leave out --to"),
])
def test_usage(run, tmp_path, arguments, words):
    done = run("convert", STARTER.transformer, *arguments)
    assert done.exit_code == 2 and words in done.stderr
    assert not list(tmp_path.iterdir())


def test_only_transformers(run, tmp_path):
    done = run("convert", STARTER.vae, "m.gguf")
    assert done.exit_code == 2 and "PixArt transformers" in done.stderr
    assert not list(tmp_path.iterdir())
