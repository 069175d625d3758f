"""Images with captions as training rows: folders, pictures, buckets and the order of batches."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_core.resolution import ASPECT_RATIO_BINS, nearest_bin

pytest.importorskip("PIL")
from PIL import Image

from pixart_core.training.data.buckets import bucket_table, nearest_bucket
from pixart_core.training.data.images import (
    ImageRow,
    load_hint,
    load_picture,
    picture_size,
    read_folder,
)
from pixart_core.training.data.order import BatchOrder
from pixart_core.training.data.problems import Problems


def picture(path: Path, size=(8, 6), colour=(255, 0, 0), text: str | None = None, **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **save)
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
    return path


def rows_of(folder: Path, **options) -> list[ImageRow]:
    problems = Problems()
    rows = read_folder(folder, problems, **options)
    assert not problems.lines
    return rows


def problems_of(folder: Path, **options) -> list[str]:
    problems = Problems()
    read_folder(folder, problems, **options)
    return problems.lines


def test_each_line_beside_an_image_is_a_caption(tmp_path) -> None:
    picture(tmp_path / "b.png", text="one\n\n  two \none\n")
    picture(tmp_path / "deep" / "a.jpg", text="\ufeffthree")
    assert rows_of(tmp_path) == [ImageRow("b.png", ("one", "two")),
                                 ImageRow("deep/a.jpg", ("three",))]


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
def test_tables_name_images_beside_them(tmp_path, name) -> None:
    for file in ("a", "b", "c"):
        picture(tmp_path / "set" / f"{file}.png")
    lines = [{"file_name": "a.png", "text": "one"}, {"image": "b.png", "caption": ["two", "too"]},
             {"path": "c.png", "prompt": "three"}, {"path": "c.png", "prompt": "also"}]
    table = tmp_path / "set" / name
    table.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    assert [row.captions for row in rows_of(tmp_path)] == [("one",), ("two", "too"),
                                                           ("three", "also")]


def test_parquet_is_a_table_too(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    table = pyarrow.table({"file_name": ["a.png", "b.png"], "text": ["one", "two"]})
    parquet.write_table(table, tmp_path / "train.parquet")
    assert [row.captions for row in rows_of(tmp_path)] == [("one",), ("two",)]


def test_what_cannot_be_used_is_named_with_file_and_line(tmp_path) -> None:
    picture(tmp_path / "bare.png")
    picture(tmp_path / "a.png")
    (tmp_path / "lone.txt").write_text("nothing beside it")
    lines = ['{"file_name": "a.png", "text": "fine"}', "{broken", '{"file_name": "gone.png", '
             '"text": "x"}', '{"file_name": "a.png"}', '{"text": "x"}', "[1]"]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    found = "\n".join(problems_of(tmp_path))
    for said in ("line 2 is not JSON", "line 3: there is no image", "line 4: a.png has no caption",
                 "line 5: no image is named", "line 6: list found", "bare.png has no caption",
                 "lone.txt has no image"):
        assert said in found


def test_control_images_are_paired_and_not_trained_on(tmp_path) -> None:
    picture(tmp_path / "a.png", text="one")
    picture(tmp_path / "b.png")
    picture(tmp_path / "control" / "a.jpg")
    picture(tmp_path / "edges" / "of_b.png")
    (tmp_path / "captions.jsonl").write_text(
        '{"file_name": "b.png", "text": "two", "control": "edges/of_b.png"}')
    with_control = rows_of(tmp_path, with_control=True)
    assert [row.control for row in with_control] == ["control/a.jpg", "edges/of_b.png"]
    assert [row.path for row in rows_of(tmp_path)] == ["a.png", "b.png"]


def test_a_missing_control_image_is_named(tmp_path) -> None:
    picture(tmp_path / "a.png", text="one")
    assert "a.png has no control image" in problems_of(tmp_path, with_control=True)[0]


def test_a_folder_without_images_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        read_folder(tmp_path, Problems())


def test_problems_stop_a_run_unless_they_are_skipped(caplog) -> None:
    problems = Problems([f"file {i}" for i in range(7)])
    with pytest.raises(ValueError, match=r"7 problems.*file 4; and 2 more\. Mend them"):
        problems.settle("here", False, "Mend them")
    problems.settle("here", True, "Mend them")
    assert "left out" in caplog.text


def test_a_picture_is_turned_as_its_exif_says(tmp_path) -> None:
    """Protects portraits from lying on their side: orientation 6 is a quarter turn."""
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))  # the left half, which is to be the upper one
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    image.save(path, exif=exif, quality=100)
    assert picture_size(path) == (40, 20)
    pixels = load_picture(path, 40, 20).float()
    assert pixels[:, 2:16].mean() > 240
    assert pixels[:, 24:].mean() < 15


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white_in_pictures_and_black_in_hints(tmp_path, mode) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    path = tmp_path / "a.png"
    image.convert(mode).save(path)
    pixels = load_picture(path, 8, 8)
    assert pixels[:, :, 6:].min() == 255
    assert pixels[:, :, :4].max() == 0
    assert load_hint(path, 8, 8).max() == 0


def test_sixteen_bit_grey_keeps_its_range(tmp_path) -> None:
    """Pillow by itself would cut everything above 255 of 65535 off to white."""
    import numpy

    values = numpy.array([[0, 257 * 100], [257 * 200, 65535]], dtype=numpy.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert load_picture(tmp_path / "a.png", 2, 2)[0].tolist() == [[0, 100], [200, 255]]


def test_a_picture_is_cut_evenly_and_not_stretched(tmp_path) -> None:
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    image.save(tmp_path / "a.png")
    pixels = load_picture(tmp_path / "a.png", 10, 10)
    assert pixels[2].min() == 255  # the blue middle alone
    assert pixels[0].max() == 0


def test_a_truncated_picture_is_named(tmp_path) -> None:
    path = tmp_path / "a.jpg"
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    assert picture_size(path) == (64, 64)
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read as a picture.*truncated"):
        load_picture(path, 8, 8)


@pytest.mark.parametrize("size", [256, 512, 1024, 2048])
def test_published_sizes_have_the_published_buckets(size) -> None:
    table = bucket_table(size)
    assert table == ASPECT_RATIO_BINS[size]
    assert nearest_bucket(table, 700, 1000) == nearest_bin(size, 700, 1000)


@given(st.sampled_from([64, 128, 320, 768]))
def test_computed_buckets_have_about_the_same_area(size) -> None:
    """Also: lying and standing shapes come in pairs, on the grid of tokens."""
    shapes = set(bucket_table(size).values())
    assert (size, size) in shapes
    for height, width in shapes:
        assert (width, height) in shapes
        assert height % 16 == width % 16 == 0
        assert 0.75 <= height * width / size**2 <= 1.25
        assert 0.25 <= height / width <= 4


def test_the_longest_shape_can_be_limited() -> None:
    shapes = bucket_table(512, max_ratio=2.0).values()
    assert max(max(shape) / min(shape) for shape in shapes) == 2


@pytest.mark.parametrize(("size", "options"), [
    (100, {}), (8, {}), (512, {"multiple": 24}), (512, {"max_ratio": 5})])
def test_sizes_that_give_no_tokens_are_refused(size, options) -> None:
    with pytest.raises(ValueError, match="is"):
        bucket_table(size, **options)


counts = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(counts, st.integers(1, 6), st.integers(0, 3), st.integers(0, 2**40))
def test_every_row_comes_in_every_epoch(rows, size, epoch, seed) -> None:
    """And no more rows than it takes to fill the last batch of each bucket."""
    order = BatchOrder(rows, seed)
    batches = order.batches_per_epoch(size)
    seen: Counter[tuple[int, int]] = Counter()
    for index in range(epoch * batches, (epoch + 1) * batches):
        bucket, chosen = order.batch(index, size)
        assert len(chosen) == size
        seen.update((bucket, row) for row in chosen)
    assert set(seen) == {(b, row) for b, count in enumerate(rows) for row in range(count)}
    assert batches == sum(-(-count // size) for count in rows)


@settings(max_examples=30, deadline=None)
@given(counts, st.integers(1, 6), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_batch_does_not_depend_on_what_was_asked_before(rows, size, indices) -> None:
    """Protects resuming: a run that goes on asks for a batch in the middle first."""
    order = BatchOrder(rows, seed=3)
    for index in indices:
        assert order.batch(index, size) == BatchOrder(rows, seed=3).batch(index, size)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 20))
def test_a_filled_batch_has_no_row_twice_where_there_are_enough(count, size, index) -> None:
    chosen = BatchOrder([count], seed=1).batch(index, size)[1]
    assert len(set(chosen)) == min(count, size)


def test_epochs_seeds_and_sizes_are_shuffled_apart() -> None:
    def epoch(number: int, seed: int = 0) -> list[int]:
        order = BatchOrder([64], seed)
        return [row for i in range(8) for row in order.batch(8 * number + i, 8)[1]]

    orders = [epoch(0), epoch(1), epoch(0, seed=1), list(range(64))]
    assert len({tuple(order) for order in orders}) == 4


def test_buckets_take_turns_within_an_epoch() -> None:
    """Protects against training on one shape for hours, then on the next."""
    order = BatchOrder([64, 64], seed=0)
    buckets = torch.tensor([order.batch(index, 4)[0] for index in range(32)])
    assert 4 <= buckets[:16].sum() <= 12
