"""The benchmark of `pixart quantize` runs every method; sizes are tiny, no timings."""

import pytest

import pixart_core as pc
from benchmarks import quantize


def test_every_method_has_a_row(monkeypatch, tmp_path):
    pytest.importorskip("typer")
    tiny = pc.PixArtConfig(hidden_size=64, num_heads=2, mlp_hidden_size=128, caption_channels=16,
                           depth=1)
    monkeypatch.setattr(quantize.pc, "PRESETS", {"sigma-1024": tiny})
    monkeypatch.setattr(quantize, "in_a_process", quantize.quantize)  # one takes seconds to start
    report = quantize.main(["--depth", "1", "--count", "1", "--pixels", "32", "--steps", "1",
                            "--methods", "int8", "svdquant", "--out", str(tmp_path / "t.md")])
    assert (tmp_path / "t.md").read_text() == report
    rows = [line for line in report.splitlines() if line.startswith(("| int8", "| svdquant"))]
    assert len(rows) == 2 and "round_to_nearest" in rows[1] and "yes" in rows[0]


def test_a_limit_that_is_passed_fails(monkeypatch, tmp_path):
    """Protects the benchmark's purpose: too much memory is no row among others."""
    tiny = pc.PixArtConfig(hidden_size=64, num_heads=2, mlp_hidden_size=128, caption_channels=16,
                           depth=1)
    monkeypatch.setattr(quantize.pc, "PRESETS", {"sigma-1024": tiny})
    monkeypatch.setattr(quantize, "in_a_process", quantize.quantize)
    monkeypatch.setattr(quantize, "BYTES", 1)
    with pytest.raises(SystemExit, match="more time or memory"):
        quantize.main(["--depth", "1", "--methods", "int8"])
