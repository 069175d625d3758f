"""`pixart train cache`: what it writes and says."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from training_cache_files import STARTER

from pixart_core.load import load_transformer
from pixart_core.training.data import CachedSamples


@pytest.fixture
def command(made, tmp_path, monkeypatch):
    """`pixart train cache` on a copy of the images with the starter models."""
    testing = pytest.importorskip("typer.testing")
    from pixart_core.cli import app

    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(made / "images", tmp_path / "images")
    named = ["--t5", STARTER.t5_file, "--vae", STARTER.vae, "--model", STARTER.transformer,
             "--image-size", 64]
    return lambda *more: testing.CliRunner().invoke(
        app, [str(a) for a in ("train", "cache", tmp_path / "images", tmp_path / "out", *named,
                               *more)])


def test_the_command_makes_a_cache_and_says_what_is_in_it(command, tmp_path) -> None:
    result = command("--control", "hed", "--hed", STARTER.hed)
    assert result.exit_code == 0, result.output
    assert "9 rows" in result.output
    assert "96 x 48" in result.output
    samples = CachedSamples(tmp_path / "out")
    samples.check_fit(load_transformer(STARTER.transformer).config)
    samples.require_control()
    assert len(samples.facts.vae_sha256) == len(samples.facts.t5_sha256) == 64


def test_the_command_names_bad_files_in_one_line(command, tmp_path) -> None:
    (tmp_path / "images" / "tall1.txt").unlink()
    result = command()
    assert result.exit_code == 1
    assert result.stderr.startswith("error: 1 problem in ")
    assert "tall1.png has no caption" in result.stderr
    assert result.stderr.count("\n") == 1
    skipped = command("--skip-bad")
    assert skipped.exit_code == 0
    assert "8 rows" in skipped.output
