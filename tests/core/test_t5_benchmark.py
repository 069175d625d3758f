"""The benchmark of T5's precisions runs, at small sizes, and its tables say what they should."""

import pytest

pytest.importorskip("diffusers")

from benchmarks import t5_precision
from pixart_core.text.t5_file import T5Config

SMALL = T5Config(d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4, vocab_size=300)


def cells(report, precision):
    line = next(line for line in report.splitlines() if line.startswith(f"| {precision} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_starter(monkeypatch):
    monkeypatch.setattr(t5_precision, "PRECISIONS", ("auto", "fp16", "int4"))
    report = t5_precision.main(["--prompts", "2", "--steps", "2"])
    same, rough = cells(report, "fp16"), cells(report, "int4")
    assert float(rough[2].split()[0]) > float(same[2].split()[0])
    assert float(rough[5]) < float(same[5])


def test_bytes(monkeypatch, tmp_path):
    """The way of --xxl: files written, loaded from 16 bits and from the file; nothing stays."""
    monkeypatch.setattr(t5_precision, "PRECISIONS", ("auto", "int8"))
    monkeypatch.setattr(t5_precision, "_in_a_process",
                        lambda path, precision: t5_precision._child(str(path), precision))
    report = t5_precision.sizes(SMALL, str(tmp_path))
    written, kept = map(int, cells(report, "int8")[1:3])  # 1.3 MB of int8, 0.2 of the rest
    assert 1 <= kept <= written <= 2
    assert not list(tmp_path.iterdir())
