"""Pictures that carry their settings, written whole or not at all."""

import os

import pytest

PIL = pytest.importorskip("PIL.Image")

from PIL.PngImagePlugin import PngInfo  # noqa: E402

from pixart_core.png import read_settings, write_png  # noqa: E402


@pytest.fixture
def image():
    return PIL.linear_gradient("L").convert("RGB")


def test_settings_and_pixels_come_back(image, tmp_path):
    """Protects --like: every value, also outside Latin-1, and every pixel."""
    settings = {"prompt": "un été 雪 🎨 \"quoted\"\nline", "seed": 2**64 - 1, "guidance": 4.5,
                "clean": False, "files": {"t5": {"sha256": "00"}}, "width": None}
    write_png(tmp_path / "a.png", image, settings)
    assert read_settings(tmp_path / "a.png") == settings
    with PIL.open(tmp_path / "a.png") as again:
        assert again.tobytes() == image.tobytes()
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_failed_write_leaves_the_old_picture(image, tmp_path, monkeypatch):
    """Protects an existing picture from a crash half-way: nothing partial, nothing left over."""
    target = tmp_path / "a.png"
    write_png(target, image, {"seed": 1})
    before = target.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_png(target, image, {"seed": 2})
    with pytest.raises(ValueError, match="JSON"):
        write_png(target, image, {"seed": object()})
    assert target.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("name", ["a.jpg", "a", "missing/a.png"])
def test_places_where_no_png_can_go(image, tmp_path, name):
    """Protects against a minute of drawing that cannot be saved."""
    with pytest.raises(ValueError, match=r"\.png|folder"):
        write_png(tmp_path / name, image, {})


def test_pictures_without_settings_are_named(image, tmp_path):
    """Protects --like from other programs' pictures and from broken files."""
    image.save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match=r"plain\.png carries no settings"):
        read_settings(tmp_path / "plain.png")
    for content, message in (("not json", "not JSON"), ("[1]", "list")):
        chunks = PngInfo()
        chunks.add_text("pixart", content)
        image.save(tmp_path / "odd.png", pnginfo=chunks)
        with pytest.raises(ValueError, match=message):
            read_settings(tmp_path / "odd.png")
    write_png(tmp_path / "cut.png", image, {"seed": 1})
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("hello")
    for name in ("cut.png", "text.png"):
        with pytest.raises(ValueError, match=f"{name} is not a sound PNG"):
            read_settings(tmp_path / name)
    with pytest.raises(ValueError, match="does not exist"):
        read_settings(tmp_path / "nowhere.png")
