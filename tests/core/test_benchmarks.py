"""The benchmarks run, and compare contenders that compute the same: sizes are tiny, no timings."""

import pytest
import torch

import pixart_core as pc

pytest.importorskip("diffusers")

from benchmarks import contenders, full_size, gguf, measure, precision, transformer
from benchmarks.comfyui import ComfyUI, import_comfyui

TINY = {"hidden_size": 48, "num_heads": 2, "mlp_hidden_size": 192, "caption_channels": 32}
PIXELS = 272  # ComfyUI's own has no positions below 264
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def comfyui():
    return import_comfyui()


def built(dtype, comfyui):
    config = pc.PRESETS["sigma-1024"].replace(depth=2, **TINY)
    weights = contenders.random_weights(config)
    found, missing = contenders.all_contenders(config, weights, PIXELS, dtype, CPU, comfyui)
    return config, found, missing


@pytest.mark.parametrize("batch", [1, 2])
def test_contenders_compute_the_same(batch, comfyui):
    """Nobody times a wrong result: masks, padding, weights and positions agree in float32."""
    config, found, missing = built(torch.float32, comfyui)
    step = contenders.make_step(config, PIXELS, batch, CPU, seed=0)
    with torch.inference_mode():
        outputs = {c.name: c.bind(step)() for c in found}
    expected = outputs.pop("ours")
    assert len(outputs) + len(missing) >= 4
    assert expected.std() > 0.1
    for name, out in outputs.items():
        assert (out - expected).norm() < 1e-5 * expected.norm(), name


def test_a_missing_contender_stands_in_the_table(monkeypatch, capsys, tmp_path):
    """A host that is not there is said to be missing, not left out."""
    monkeypatch.setattr(transformer.pc, "PRESETS", {"sigma-1024": pc.PixArtConfig(**TINY)})
    report = transformer.main(["--sizes", "64", "--depth", "1", "--repeats", "2", "--device", "cpu",
                               "--comfyui", str(tmp_path), "--out", str(tmp_path / "table.md")])
    rows = [line for line in report.splitlines() if "ComfyUI's own" in line]
    assert len(rows) == 2
    assert all("not measured: ImportError" in row for row in rows)
    assert "1 of 28 blocks" in report
    assert (tmp_path / "table.md").read_text() == report


def test_a_contender_that_fails_stands_in_the_table(monkeypatch, comfyui):
    """Sizes that other code refuses give its error in place of a time."""
    if not isinstance(comfyui, ComfyUI):
        pytest.skip(comfyui)
    monkeypatch.setattr(transformer.pc, "PRESETS", {"sigma-1024": pc.PixArtConfig(**TINY)})
    report = transformer.main(["--sizes", "64", "--depth", "1", "--repeats", "1", "--device", "cpu",
                               "--batches", "1"])
    assert "not measured: ZeroDivisionError" in report


def test_interleave_rotates_inputs_and_first_turns():
    """No contender is always first, and every input gets its turn."""
    seen = []
    calls = {name: [lambda i=i, name=name: seen.append((name, i)) for i in range(2)]
             for name in ("a", "b")}
    timings = measure.interleave(calls, 4, CPU)
    assert seen == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert [len(t.seconds) for t in timings.values()] == [4, 4]


def test_precision_measures_the_golden_cases(comfyui):
    """Every case has a row, and ComfyUI's own is measured or said why not."""
    names = precision.cases()
    assert len(names) == 11
    assert precision.our_error("sigma_512", torch.float32, CPU) < 1e-5
    if isinstance(comfyui, ComfyUI):
        assert precision.comfyui_error(comfyui, "sigma_512", torch.float32, CPU) < 1e-5


def test_gguf_measures_every_format(monkeypatch, tmp_path):
    """Errors and sizes are those of the format named: fewer bits, smaller file, larger error."""
    pytest.importorskip("gguf")
    tiny = pc.PixArtConfig(hidden_size=64, num_heads=2, mlp_hidden_size=256, caption_channels=64)
    monkeypatch.setattr(gguf.pc, "PRESETS", {"sigma-1024": tiny})
    monkeypatch.setattr(gguf, "TIMESTEPS", gguf.TIMESTEPS[:1])
    monkeypatch.setattr(gguf, "_in_a_process", gguf._child)  # a process takes seconds to start
    monkeypatch.setattr(gguf, "T5_XXL", gguf.T5Config(64, 16, 128, 1, 4, 999))
    report = gguf.main(["--depth", "1", "--pixels", "64", "--repeats", "1", "--quants", "F16",
                        "Q8_0", "Q4_0", "--out", str(tmp_path / "table.md")])
    assert (tmp_path / "table.md").read_text() == report
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines()
            if line.startswith(("| F16", "| Q"))]
    assert [row[0] for row in rows] == ["F16", "Q8_0", "Q4_0"] * 3
    for table in (rows[:3], rows[3:6], rows[6:]):
        size, weights = (2, 3) if len(table[0]) == 6 else (1, 2)  # of the first table
        sizes = [float(row[size].split()[0]) for row in table]
        errors = [float(row[weights].split()[0]) for row in table]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[2]
        assert errors[0] == 0 and 0 < errors[1] < 1 < errors[2] < 20


def test_full_size_loads_in_a_process_of_its_own(tmp_path):
    """The peak is that of the process that loads, not of the one that wrote the file."""
    config = pc.PixArtConfig(**{**TINY, "hidden_size": 1152, "num_heads": 16}, depth=1)
    path, dtype, target = next(full_size.written_files(tmp_path, config))
    assert (path.suffix, dtype, target) == (".safetensors", "bfloat16", None)
    ballast = torch.ones(2**28)  # 1 GiB
    found = full_size.load_elsewhere(path, target, 64)
    assert found["finite"]
    # two bytes a weight, but the time path is float32 in any model
    assert path.stat().st_size < found["weights"] < 2 * path.stat().st_size
    if found["peak"]:  # not every system tells
        assert found["weights"] < found["peak"] < ballast.nbytes


def test_training_steps_are_measured(capsys):
    """Protects the benchmark that waits for a GPU: a step runs, and nothing is written."""
    from benchmarks import training

    training.main(["--recipes", "lora", "--depth", "2", "--size", "64", "--batches", "1",
                   "--steps", "1", "--precision", "no"])
    assert "| lora | 1 |" in capsys.readouterr().out
