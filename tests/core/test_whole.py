"""Files that appear whole or not at all."""

import os

import pytest

from pixart_core.whole import whole_file


@pytest.mark.parametrize("sync", [True, False])
def test_the_new_file_takes_the_place_of_the_old_one_at_the_end(tmp_path, sync):
    path = tmp_path / "weights.bin"
    path.write_text("old")
    with whole_file(path, sync=sync) as temporary:
        assert temporary.parent == tmp_path  # one file system, or it could not be moved at once
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, error):
    path = tmp_path / "weights.bin"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_take_its_place_is_removed(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError), whole_file(tmp_path / "folder") as temporary:
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_is_missing_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "none" / "file"):
        raise AssertionError("there is nothing to write to")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_the_mode_is_the_one_given_or_that_of_a_new_file(tmp_path):
    """Some writers make files that nobody but the owner can read."""
    plain, ours, chosen = (tmp_path / name for name in ("plain", "ours", "chosen"))
    plain.touch()
    with whole_file(ours) as temporary:
        temporary.chmod(0o600)
    with whole_file(chosen, mode=0o440):
        pass
    assert ours.stat().st_mode == plain.stat().st_mode
    assert chosen.stat().st_mode & 0o777 == 0o440
