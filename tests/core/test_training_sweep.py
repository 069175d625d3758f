"""The chart of control strengths: points where the numbers say, and the files beside it."""

from __future__ import annotations

import csv
import io

import pytest
import torch
from PIL import Image, ImageFont
from typer.testing import CliRunner

from pixart_core.commands import app, train_evaluate
from pixart_core.training.chart import BLUE, VERMILION, Axis, Level, Line, line_chart, nice_step
from pixart_core.training.evaluate import ControlRow, control_limits, held_out_prompts
from pixart_core.training.scenes import SceneSettings
from pixart_core.training.score import Report, Share
from pixart_core.training.sweep import sweep_chart, sweep_table

# the plotted area of every chart: x 150..1550 from the left, y 800..100 from the bottom up
X, Y = Axis("strength", 0, 2), Axis("share", 0, 1)


def column(x: float) -> int:
    return round(150 + 700 * x)


def row(y: float) -> int:
    return round(800 - 700 * y)


def near(picture: Image.Image, x: int, y: int, color) -> bool:
    """Whether a pixel has a colour, but for what averaging does to it."""
    return max(abs(a - b) for a, b in zip(picture.getpixel((x, y)), color, strict=True)) <= 3


def rows_of(picture: Image.Image, x: int, color) -> list[int]:
    """The rows of the plotted area where column x has a colour."""
    return [y for y in range(100, 801) if near(picture, x, y, color)]


def shares(strength, f1, accuracy, count=64) -> ControlRow:
    report = Report({"all": {"all": Share(accuracy, count)}})
    return ControlRow(strength, f1 / 2, f1, f1, 0.02, report)


ROWS = [shares(1.0, 0.7, 0.9), shares(0.0, 0.2, 0.4), shares(2.0, 0.6, 0.1)]
LIMITS = {"ground truth": shares(None, 0.97, 1.0), "VAE ceiling": shares(None, 0.85, 0.8)}


def test_points_and_levels_lie_where_the_numbers_say() -> None:
    """Protects the scale: markers, the line between them and the level, each in its column."""
    picture = line_chart("t", X, Y, [Line("a", [(0.5, 0.25), (1.5, 0.75)], BLUE)],
                         [Level("b", 0.9, VERMILION)])
    assert picture.size == (1600, 1100) and picture.mode == "RGB"
    for x, y in ((0.5, 0.25), (1.5, 0.75)):
        found = rows_of(picture, column(x), BLUE)
        assert sum(found) / len(found) == pytest.approx(row(y), abs=1)
    middle = rows_of(picture, column(1.0), BLUE)
    assert sum(middle) / len(middle) == pytest.approx(row(0.5), abs=1) and len(middle) < 12
    assert not rows_of(picture, column(0.4), BLUE) and not rows_of(picture, column(1.6), BLUE)
    level = [rows_of(picture, x, VERMILION) for x in range(150, 1550)]
    drawn = [rows for rows in level if rows]
    assert 0.5 < len(drawn) / len(level) < 0.8  # dashes
    assert all(abs(y - row(0.9)) <= 2 for rows in drawn for y in rows)


def test_standard_errors_reach_as_far_as_they_are() -> None:
    """Protects the whiskers, which stay within the shares that there are."""
    line = Line("a", [(0.5, 0.5), (1.5, 0.95)], BLUE, [0.1, 0.1])
    picture = line_chart("t", X, Y, [line])
    found = rows_of(picture, column(0.5), BLUE)
    assert (found[0], found[-1]) == (pytest.approx(row(0.6), abs=2), pytest.approx(row(0.4), abs=2))
    assert rows_of(picture, column(1.5), BLUE)[0] == pytest.approx(row(1.0), abs=2)


@pytest.mark.parametrize(("length", "step"), [(2, 0.25), (1, 0.2), (5, 1), (99, 20), (0.3, 0.05)])
def test_ticks_are_round_numbers(length: float, step: float) -> None:
    assert nice_step(length) == pytest.approx(step)
    ticks = Axis("", 0, length).ticks()
    assert ticks[0] == 0 and len(ticks) <= 10 and length - ticks[-1] < step


def test_the_sweep_shows_both_curves_and_their_limits() -> None:
    """Protects what the chart is of; strengths may come in any order."""
    picture = sweep_chart(ROWS, LIMITS)
    for strength, f1, accuracy in ((0, 0.2, 0.4), (1, 0.7, 0.9), (2, 0.6, 0.1)):
        assert near(picture, column(strength), row(f1), BLUE)
        assert near(picture, column(strength), row(accuracy), VERMILION)
    for value, color in ((0.97, BLUE), (0.85, BLUE), (1.0, VERMILION), (0.8, VERMILION)):
        assert sum(near(picture, x, row(value), color) for x in range(1200, 1500)) > 50, value
    halfway = rows_of(picture, column(0.5), BLUE)
    assert any(abs(y - row(0.45)) <= 2 for y in halfway)
    wide = sweep_chart([*ROWS, shares(4.0, 0.5, 0.3)], LIMITS)
    assert near(wide, 1550, row(0.5), BLUE) and near(wide, column(0.5), row(0.7), BLUE)


def test_the_table_has_every_number_of_the_chart() -> None:
    lines = list(csv.DictReader(io.StringIO(sweep_table(ROWS, LIMITS))))
    assert [line["pictures"] for line in lines] == ["ground truth", "VAE ceiling", *["model"] * 3]
    assert (lines[0]["strength"], lines[2]["strength"]) == ("", "1.0")
    assert float(lines[2]["edge_f1"]) == 0.7 and float(lines[2]["accuracy"]) == 0.9
    assert float(lines[2]["accuracy_error"]) == pytest.approx((0.9 * 0.1 / 64) ** 0.5)
    assert lines[2]["count"] == "64"


def test_the_limits_are_those_of_true_renders_and_of_the_vae() -> None:
    """Protects the lines across: near 1 for renders, lower for a VAE that loses the shapes."""
    class Grey:
        def encode(self, images):
            return images

        def decode(self, images):
            return torch.full_like(images, 0.5)

    prompts = held_out_prompts(6, 9, SceneSettings(64), ("background", "color"))
    limits = control_limits(Grey(), prompts)
    assert limits["ground truth"].f1 > 0.95 and limits["VAE ceiling"].f1 == 0
    assert limits["ground truth"].report.rows["all"]["all"].mean == 1
    assert limits["VAE ceiling"].report.rows["all"]["all"].mean == 0


def test_chart_and_table_are_written_beside_each_other(tmp_path) -> None:
    """Protects the two files: a whole PNG, its CSV, and nothing half written."""
    train_evaluate._plot(tmp_path / "sweep.png", ROWS, LIMITS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sweep.csv", "sweep.png"]
    with Image.open(tmp_path / "sweep.png") as picture:
        picture.load()
        assert (picture.format, picture.size) == ("PNG", (1600, 1100))
    assert (tmp_path / "sweep.csv").read_text() == sweep_table(ROWS, LIMITS)


def test_a_write_that_fails_leaves_the_old_chart(tmp_path, monkeypatch) -> None:
    (tmp_path / "sweep.png").write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        train_evaluate._plot(tmp_path / "sweep.png", ROWS, LIMITS)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("sweep.png", b"old")]


@pytest.mark.parametrize(("arguments", "words"), [
    (["--plot", "a.png"], "--plot needs --controlnet"),
    (["--controlnet", "{net}", "--plot", "{net}.jpg"], "does not end in .png"),
    (["--controlnet", "{net}", "--plot", "nowhere/a.png"], "nowhere does not exist"),
    (["--controlnet", "{net}", "--plot", "a.png", "--strengths", ""], "--plot needs --strengths"),
])
def test_what_keeps_a_chart_from_being_written_is_said_first(arguments, words, tmp_path) -> None:
    """Protects hours of drawing: nothing is loaded before (the file here is no model)."""
    net = tmp_path / "net.safetensors"
    net.write_bytes(b"")
    given = [part.format(net=net) for part in arguments]
    result = CliRunner().invoke(app, ["train", "evaluate", "--transformer", str(net), *given])
    assert result.exit_code != 0
    assert words in " ".join((result.output + result.stderr).split())


def test_an_old_pillow_is_named(monkeypatch) -> None:
    def old():
        """Pillow before 10.1 has one font of one size."""

    monkeypatch.setattr(ImageFont, "load_default", old)
    with pytest.raises(ImportError, match=r"Pillow 10\.1 or newer"):
        line_chart("t", X, Y, [])
