"""Damaged and hostile files: always one CheckpointError, never code, never another exception."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from pixart_core.checkpoint.read import CheckpointError, read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, on damaged pickles

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(3, dtype=torch.bfloat16)}
SOUND = save(TENSORS, metadata={"pixart_config": "{}"})
QUICK = settings(max_examples=150, deadline=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])


def pickled(as_zip: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": TENSORS, "epoch": 3}, buffer, _use_new_zipfile_serialization=as_zip)
    return buffer.getvalue()


PICKLES = {True: pickled(True), False: pickled(False)}


def safetensors_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read_bytes(folder, content: bytes, suffix: str = ".safetensors") -> dict:
    path = folder / f"m{suffix}"
    path.write_bytes(content)
    return read_checkpoint(path).state_dict


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"),
    (b"abc", "cut short"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git-LFS pointer"),
    (b"<!DOCTYPE html><html><body>404", "web page"),
    (b"\n <html>", "web page"),
    (b'{"error": "not found"}', "text file"),
    (b"GGUF\x03\0\0\0" + b"\0" * 40, "GGUF"),
    (PICKLES[True], "rename it to .pth"),
    (PICKLES[False], "rename it to .pth"),
    (SOUND[:-1], "cut short"),
    (SOUND[:60], "cut short"),
    (SOUND + b"\0", "follow the last tensor"),
    (struct.pack("<Q", 2**63) + b"{}", "header claims"),
    (struct.pack("<Q", 2**40) + b"{}", "header claims"),
    (struct.pack("<Q", 0), "header claims"),
    (safetensors_bytes(b"{]"), "not JSON"),
    (safetensors_bytes(b"[]"), "JSON object"),
    (safetensors_bytes(b"\xff\xfe"), "not JSON"),
    (safetensors_bytes(b"[" * 100_000), "damaged"),
    (safetensors_bytes({"__metadata__": {"a": 3}, "t": entry()}, b"\0" * 4), "table of strings"),
    (safetensors_bytes({"t": entry(offsets=(0, 8))}, b"\0" * 8), "does not take"),
    (safetensors_bytes({"t": entry(offsets=(4, 0))}, b"\0" * 4), "does not take"),
    (safetensors_bytes({"t": entry(offsets=(0, 4))}, b"\0" * 2), "cut short"),
    (safetensors_bytes({"t": entry(offsets=(4, 8))}, b"\0" * 8), "begins at byte 4"),
    (safetensors_bytes({"t": entry(), "u": entry()}, b"\0" * 4), "begins at byte 0"),
    (safetensors_bytes({"t": entry(shape=(2**62, 4), offsets=(0, 2**66))}), "damaged|cut short"),
    (safetensors_bytes({"t": entry(shape=(2**64, 0), offsets=(0, 0))}), "does not take"),
    (safetensors_bytes({"t": entry(shape=(-1,))}, b"\0" * 4), "has shape"),
    (safetensors_bytes({"t": entry(shape=(1.0,))}, b"\0" * 4), "has shape"),
    (safetensors_bytes({"t": entry(shape=(True,))}, b"\0" * 4), "has shape"),
    (safetensors_bytes({"t": entry(shape="1")}, b"\0" * 4), "has shape"),
    (safetensors_bytes({"t": entry(offsets=(0,))}, b"\0" * 4), "has shape"),
    (safetensors_bytes({"t": entry("F33")}, b"\0" * 4), "unknown dtype"),
    (safetensors_bytes({"t": entry([])}, b"\0" * 4), "unknown dtype"),
    (safetensors_bytes({"t": 3}), "not a JSON object"),
    (safetensors_bytes({"__metadata__": {}}), "no tensors"),
])
def test_damaged_safetensors(content, words, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_bytes(tmp_path, content)


def test_a_length_that_looks_like_another_format(tmp_path) -> None:
    """The first bytes of a sound file may be the magic number of gzip or of a pickle."""
    for magic in (b"\x1f\x8b", b"\x80\x02"):
        length = int.from_bytes(magic, "little")
        raw = json.dumps({"t": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
        content = safetensors_bytes(raw.ljust(length))
        assert content.startswith(magic)
        assert read_bytes(tmp_path, content)["t"].numel() == 0


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
@pytest.mark.parametrize("content", [
    b"", b"abc", b"\x80", b"\x80\x02", b"PK\x03\x04", PICKLES[True][:-30], PICKLES[True][:500],
    PICKLES[False][:-5], PICKLES[False][:100], b"<html>", b"version https://git-lfs.github.com/",
    SOUND, pickle.dumps(3), pickle.dumps([1, 2]), pickle.dumps({"a": 1}),
])
def test_damaged_pickles(suffix, content, tmp_path) -> None:
    with pytest.raises(CheckpointError):
        read_bytes(tmp_path, content, suffix)


def _flip(content: bytes, changes: list[tuple[int, int]]) -> bytes:
    mutable = bytearray(content)
    for position, value in changes:
        mutable[position % len(mutable)] = value
    return bytes(mutable)


CHANGES = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=8)


@QUICK
@given(changes=CHANGES)
def test_mutated_safetensors(tmp_path, changes) -> None:
    _reads_or_refuses(tmp_path, _flip(SOUND, changes), ".safetensors")


@QUICK
@given(header=st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**65) | st.text(max_size=4)
    | st.sampled_from(["F32", "F16", "F4", "F6_E2M3", "F8_E8M0", "BOOL", "C64"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "t"]), inner,
        max_size=4), max_leaves=9), data=st.binary(max_size=24))
def test_invented_safetensors_headers(tmp_path, header, data) -> None:
    _reads_or_refuses(tmp_path, safetensors_bytes(header, data), ".safetensors")


@QUICK
@given(dtype=st.sampled_from(["F32", "F16", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3",
                              "F8_E5M2", "F8_E4M3FNUZ", "BOOL", "C64", "U16", "U64", "I8"]),
       shape=st.lists(st.integers(0, 5), max_size=4), pad=st.integers(0, 9))
def test_every_dtype_and_any_alignment(tmp_path, dtype, shape, pad) -> None:
    """A header of any length is allowed, so tensors may begin at odd addresses."""
    from pixart_core.checkpoint.header import DTYPE_BITS

    size = torch.Size(shape).numel() * DTYPE_BITS[dtype]
    raw = json.dumps({"t": entry(dtype, shape, (0, size // 8))}).encode() + b" " * pad
    _reads_or_refuses(tmp_path, safetensors_bytes(raw, b"\0" * (size // 8)), ".safetensors")


@QUICK
@given(cut=st.integers(0, 2**16), as_zip=st.booleans())
def test_truncated_anywhere(tmp_path, cut, as_zip) -> None:
    for content, suffix in ((SOUND, ".safetensors"), (PICKLES[as_zip], ".pth")):
        with pytest.raises(CheckpointError):
            read_bytes(tmp_path, content[: cut % len(content)], suffix)


@QUICK
@given(changes=CHANGES, as_zip=st.booleans())
def test_mutated_pickles(tmp_path, changes, as_zip) -> None:
    _reads_or_refuses(tmp_path, _flip(PICKLES[as_zip], changes), ".pth")


@QUICK
@given(changes=CHANGES)
def test_mutated_program_inside_a_sound_zip(tmp_path, changes) -> None:
    """Past the zip's check sums: the unpickler itself is driven."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(PICKLES[True])) as source, \
            zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as target:
        for item in source.infolist():
            content = source.read(item)
            target.writestr(item.filename, _flip(content, changes)
                            if item.filename.endswith("data.pkl") else content)
    _reads_or_refuses(tmp_path, buffer.getvalue(), ".pth")


def _reads_or_refuses(folder, content: bytes, suffix: str) -> None:
    try:
        tensors = read_bytes(folder, content, suffix)
    except CheckpointError:
        return
    assert all(isinstance(t, torch.Tensor) for t in tensors.values())
    for tensor in tensors.values():
        tensor.clone()  # the memory behind it is there


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("as_zip", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(as_zip, tmp_path) -> None:
    target = tmp_path / "sprung"
    path = tmp_path / "m.pth"
    torch.save({"state_dict": TENSORS, "x": Trap(str(target))}, path,
               _use_new_zipfile_serialization=as_zip)
    with pytest.raises(CheckpointError, match=r"weights_only.*safetensors\.torch\.save_file"):
        read_checkpoint(path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # the trap works where it is let
    assert target.exists()


def test_plain_pickle_with_code(tmp_path) -> None:
    target = tmp_path / "sprung"
    with pytest.raises(CheckpointError):
        read_bytes(tmp_path, pickle.dumps(Trap(str(target)), protocol=2), ".bin")
    assert not target.exists()


def test_tar_archive_is_refused(tmp_path) -> None:
    """PyTorch's oldest container slipped past weights_only before version 2.6."""
    import tarfile

    path = tmp_path / "m.pth"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("\x80pickle")
        archive.addfile(info)
    with pytest.raises(CheckpointError, match="not a PyTorch file"):
        read_checkpoint(path)


def test_torchscript_is_refused(tmp_path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")])
def test_tensors_that_are_not_plain(tensor, tmp_path) -> None:
    torch.save({"odd": tensor}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="odd"):
        read_checkpoint(tmp_path / "m.pth")
