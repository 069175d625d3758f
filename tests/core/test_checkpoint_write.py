"""Files appear whole or not at all, and hold exactly what was given."""

from __future__ import annotations

import hashlib

import pytest
import torch

from pixart_core.checkpoint.header import CheckpointError
from pixart_core.checkpoint.read import read_checkpoint
from pixart_core.checkpoint.write import sha256_file, write_checkpoint


def test_bits_and_metadata_come_back(tmp_path) -> None:
    tensors = {f"t.{dtype}".replace("torch.", ""): torch.randn(3, 5).to(dtype)
               for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
                             torch.int64, torch.uint8, torch.bool)}
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4)}
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, tensors, {"pixart_config": "{}", "note": "π"})
    found = read_checkpoint(path)
    assert found.metadata == {"pixart_config": "{}", "note": "π"}
    assert found.state_dict.keys() == tensors.keys()
    for name, tensor in tensors.items():
        other = found.state_dict[name]
        assert other.dtype == tensor.dtype and other.shape == tensor.shape
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (other, tensor)))


def test_nothing_is_added(tmp_path) -> None:
    write_checkpoint(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {})
    assert read_checkpoint(tmp_path / "a.safetensors").metadata == {}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_views_transposes_and_shared_memory(tmp_path) -> None:
    base = torch.arange(24.0).reshape(6, 4)
    q, k = base.chunk(2)
    tensors = {"base": base, "same": base, "q": q, "k": k, "transposed": base.T,
               "expanded": base[:1].expand(3, 4), "parameter": torch.nn.Parameter(base)}
    write_checkpoint(tmp_path / "a.safetensors", tensors, {})
    found = read_checkpoint(tmp_path / "a.safetensors").state_dict
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_replacing_the_file_that_is_mapped(tmp_path) -> None:
    """Load, change, save under the same name: the tensors in use stay what they were."""
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, {"a": torch.ones(5000)}, {})
    mapped = read_checkpoint(path).state_dict["a"]
    write_checkpoint(path, {"a": mapped * 2}, {})
    assert mapped.sum() == 5000
    assert read_checkpoint(path).state_dict["a"].sum() == 10000


def test_a_failure_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, {"a": torch.ones(1)}, {})
    before = path.read_bytes()

    def half(tensors, filename, metadata=None):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(CheckpointError, match="disk full"):
        write_checkpoint(path, {"a": torch.zeros(1)}, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_refusals(tmp_path) -> None:
    one = {"a": torch.ones(1)}
    with pytest.raises(ValueError, match="no tensors"):
        write_checkpoint(tmp_path / "a.safetensors", {}, {})
    with pytest.raises(ValueError, match=r"\.safetensors files only"):
        write_checkpoint(tmp_path / "a.pth", one, {})
    with pytest.raises(ValueError, match="'steps' is not text"):
        write_checkpoint(tmp_path / "a.safetensors", one, {"steps": 4})
    with pytest.raises(CheckpointError, match="could not be written"):
        write_checkpoint(tmp_path / "no" / "a.safetensors", one, {})
    assert list(tmp_path.iterdir()) == []


def test_fingerprint(tmp_path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"x" * 5_000_000)
    assert sha256_file(file) == hashlib.sha256(b"x" * 5_000_000).hexdigest()
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "b").write_bytes(b"1")
    (folder / "inner" / "a").write_bytes(b"2")
    first = sha256_file(folder)
    assert len(first) == 64 and first == sha256_file(str(folder))
    (folder / "b").rename(folder / "c")
    assert sha256_file(folder) != first
    with pytest.raises(CheckpointError, match="nowhere"):
        sha256_file(tmp_path / "nowhere")


def test_written_files_have_the_usual_mode(tmp_path):
    """Protects shared model folders: a server under another account must be able to read them."""
    plain = tmp_path / "plain"
    plain.touch()
    path = tmp_path / "weights.safetensors"
    write_checkpoint(path, {"a": torch.zeros(2)}, {})
    assert path.stat().st_mode == plain.stat().st_mode
