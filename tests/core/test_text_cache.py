"""Encoded prompts on disk: a repeated one reads no weight, another one is never taken for it."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pixart_core.checkpoint.read import CheckpointError
from pixart_core.starter import find_starter
from pixart_core.text import LazyT5, T5TextEncoder, TextCache
from pixart_core.text import cache as cache_module
from pixart_core.text.cache import cache_key, encoder_files, limit_from_environment

STARTER = find_starter()
PROMPT = "a large red circle on a blue background"


@pytest.fixture
def loads(monkeypatch):
    """How often a T5 is read."""
    calls = []
    original = T5TextEncoder.from_path.__func__

    def counted(cls, *args, **kwargs):
        calls.append(args)
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(T5TextEncoder, "from_path", classmethod(counted))
    return calls


def lazy(folder, path=STARTER.t5_file, **settings):
    return LazyT5(path, torch.float32, cache=TextCache(folder), **settings)


def entries(folder):
    return sorted(Path(folder).glob("*.safetensors"))


def states(value):
    return torch.full((3, 4), float(value))


def test_a_repeated_prompt_reads_no_weight(tmp_path, loads):
    first = lazy(tmp_path).states(PROMPT, 24)
    again = lazy(tmp_path)
    found = again.states(PROMPT, 24)
    assert torch.equal(found, first) and found.dtype == first.dtype
    assert len(loads) == 1 and again.loaded is None


def test_states_are_those_without_a_cache(tmp_path):
    text = "a (large:1.3) red circle"
    lazy(tmp_path).states(text, 24)
    plain = T5TextEncoder.from_path(STARTER.t5_file, torch.float32)
    assert torch.equal(lazy(tmp_path).states(text, 24), plain.states(text, 24))


def test_whatever_changes_the_states_is_another_entry(tmp_path, loads):
    base = {"max_tokens": 24, "clean": True, "weights": True}
    text = "A (large:1.3) Red Circle"
    lazy(tmp_path).states(text, **base)
    others = [{"max_tokens": 5}, {"clean": False}, {"weights": False}]
    for i, change in enumerate(others, 2):
        lazy(tmp_path).states(text, **{**base, **change})
        assert len(loads) == len(entries(tmp_path)) == i, change
    lazy(tmp_path, precision="bf16").states(text, **base)
    LazyT5(STARTER.t5_file, torch.bfloat16, cache=TextCache(tmp_path)).states(text, **base)
    lazy(tmp_path).states("a blue circle", **base)
    assert len(loads) == len(entries(tmp_path)) == len(others) + 4


def test_another_encoder_is_another_entry(tmp_path, loads):
    """Known by its bytes: a copy under another name is the same one."""
    copy, other = tmp_path / "copy.safetensors", tmp_path / "other.safetensors"
    content = STARTER.t5_file.read_bytes()
    copy.write_bytes(content)
    changed = bytearray(content)
    changed[8 + int.from_bytes(content[:8], "little")] ^= 1  # of the first number
    other.write_bytes(changed)
    for path, expected in ((STARTER.t5_file, 1), (copy, 1), (other, 2)):
        lazy(tmp_path / "cache", path).states(PROMPT, 24)
        assert len(loads) == expected, path


def test_prompts_that_clean_to_the_same_text_share_an_entry(tmp_path, loads):
    lazy(tmp_path).states("a red circle", 24)
    lazy(tmp_path).states("  A RED circle", 24)
    assert len(loads) == 1


def test_a_cut_prompt_is_said_to_be_cut_each_time(tmp_path, caplog):
    for _ in range(2):
        caplog.clear()
        lazy(tmp_path).states(PROMPT, 5)
        assert "is left out" in caplog.text


def test_the_encoder_is_hashed_once(tmp_path, monkeypatch):
    file = tmp_path / "t5.safetensors"
    file.write_bytes(b"weights")
    cache = TextCache(tmp_path / "cache")
    first = cache.encoder_hash(file)
    monkeypatch.setattr(cache_module, "sha256_file", lambda _: pytest.fail("read again"))
    assert cache.encoder_hash(file) == first
    monkeypatch.undo()
    file.write_bytes(b"Weights")
    os.utime(file, ns=(1, 1))
    assert cache.encoder_hash(file) != first


def test_a_folder_is_known_by_all_its_files(tmp_path):
    files = encoder_files(STARTER.t5) if STARTER.t5.is_dir() else None
    if files is not None:
        assert {"config.json"} < {file.name for file in files}
    with pytest.raises(CheckpointError, match="does not exist"):
        encoder_files(tmp_path / "none.safetensors")


def test_the_least_used_entry_leaves(tmp_path):
    cache = TextCache(tmp_path)
    keys = [cache_key(n=n) for n in range(4)]
    for n, key in enumerate(keys[:3]):
        cache.put(key, states(n))
        os.utime(tmp_path / f"{key}.safetensors", ns=(n, n))
    size = (tmp_path / f"{keys[0]}.safetensors").stat().st_size
    assert torch.equal(cache.get(keys[0]), states(0))  # used now, so 1 is the oldest
    TextCache(tmp_path, 3 * size + 8).put(keys[3], states(3))
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True]


@pytest.mark.parametrize("damage", [lambda c: c[:-5], lambda c: b"", lambda c: b"x" * len(c)],
                         ids=["cut", "empty", "garbage"])
def test_a_damaged_entry_is_removed_and_made_again(tmp_path, loads, caplog, damage):
    expected = lazy(tmp_path).states(PROMPT, 24)
    path, = entries(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    caplog.set_level(logging.WARNING)
    assert TextCache(tmp_path).get(path.stem) is None and not path.exists()
    assert len(caplog.records) == 1 and "damaged" in caplog.text
    assert torch.equal(lazy(tmp_path).states(PROMPT, 24), expected) and len(loads) == 2
    assert entries(tmp_path) == [path]


def test_an_entry_under_another_name_is_not_taken(tmp_path):
    cache = TextCache(tmp_path)
    one, other = cache_key(n=1), cache_key(n=2)
    cache.put(one, states(1))
    (tmp_path / f"{one}.safetensors").rename(tmp_path / f"{other}.safetensors")
    assert cache.get(other) is None


def test_a_folder_that_cannot_be_written_costs_the_cache_alone(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    encoder = lazy(tmp_path / "file" / "cache")
    assert encoder.states(PROMPT, 24).isfinite().all()
    assert "does not keep" in caplog.text


WRITERS = """
import sys, torch
from pixart_core.text.cache import TextCache, cache_key
cache = TextCache(sys.argv[1], 40_000)
for n in range(60):
    key = cache_key(n=n % 7)
    found = cache.get(key)
    if found is not None and not (found == n % 7).all():
        sys.exit(f"{n}: {found}")
    cache.put(key, torch.full((40, 16), float(n % 7)))
"""


def test_processes_share_a_folder(tmp_path):
    """Writing, reading and making room at once: whole entries, no errors, nothing left over."""
    running = [subprocess.Popen([sys.executable, "-c", WRITERS, str(tmp_path)],
                                stderr=subprocess.PIPE, text=True,
                                cwd=Path(__file__).parents[2]) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert not any("damaged" in text for text in said), said
    assert entries(tmp_path) and not list(tmp_path.glob("*.part"))
    cache = TextCache(tmp_path)
    assert all(cache.get(path.stem) is not None for path in entries(tmp_path))


def test_limits(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="limit"):
        TextCache(tmp_path, 0)
    monkeypatch.setenv("PIXART_TEXT_CACHE_GB", "0.5")
    assert limit_from_environment() == 500_000_000
    for wrong in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("PIXART_TEXT_CACHE_GB", wrong)
        with pytest.raises(ValueError, match=wrong):
            limit_from_environment()


def test_only_the_owner_can_look_into_a_new_folder(tmp_path):
    if os.name != "posix":
        pytest.skip("folders have other rights there")
    lazy(tmp_path / "cache").states(PROMPT, 24)
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_an_entry_that_cannot_be_deleted_is_named_and_the_next_one_leaves(tmp_path, caplog,
                                                                          monkeypatch):
    """Windows keeps files that another program has open."""
    cache = TextCache(tmp_path, 3 * 5000)
    unlink = Path.unlink

    def locked(path, missing_ok=False):
        if path.stem == "a":
            raise PermissionError("in use")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", locked)
    for time, key in enumerate("abcd"):
        cache.put(key, torch.zeros(4, 256))
        os.utime(tmp_path / f"{key}.safetensors", (time, time))
    assert [key for key in "abcd" if cache.get(key) is not None] == ["a", "c", "d"]
    assert "a.safetensors" in caplog.text and "does not keep" not in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_was_found_keeps_no_file_open(tmp_path):
    """Or Windows could not evict it while the prompt is in use."""
    cache = TextCache(tmp_path)
    cache.put("key", torch.zeros(300, 4096))
    states = cache.get("key")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text() and states.shape == (300, 4096)
