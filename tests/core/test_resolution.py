"""Aspect-ratio bins against the tables diffusers carries, and their edges."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixart_core.resolution import ASPECT_RATIO_BINS, nearest_bin

BASES = [256, 512, 1024, 2048, 2880]


@pytest.mark.parametrize("base", BASES)
def test_forty_bins_that_a_model_can_draw(base):
    """Protects the tables from a slipped digit: 40 rows, wide to tall, near the base's area."""
    bins = ASPECT_RATIO_BINS[base]
    assert len(bins) == 40
    assert list(bins) == sorted(bins)
    assert bins[1.0] == (base, base)
    for ratio, (height, width) in bins.items():
        assert height % 16 == width % 16 == 0
        assert abs(height / width - ratio) < 0.011 * max(1, ratio) + 0.06 * (base == 2880)
        assert 0.85 < height * width / base**2 < 1.1


@pytest.mark.parametrize(
    ("base", "module", "rows"),
    [(256, "pixart_alpha", 33), (512, "pixart_alpha", 33), (1024, "pixart_alpha", 33),
     (2048, "pixart_sigma", 40)],
)
def test_published_tables_are_rows_of_ours(base, module, rows):
    """Protects every number against diffusers' copy of the published tables."""
    pytest.importorskip("diffusers")
    import importlib

    pipelines = importlib.import_module(f"diffusers.pipelines.pixart_alpha.pipeline_{module}")
    theirs = getattr(pipelines, f"ASPECT_RATIO_{base}_BIN")
    assert len(theirs) == rows
    for ratio, (height, width) in theirs.items():
        assert ASPECT_RATIO_BINS[base][float(ratio)] == (height, width)


def test_the_2880_table_has_its_own_numbers():
    """Protects the one table that is not a multiple of the others: rows from both ends."""
    bins = ASPECT_RATIO_BINS[2880]
    assert bins[0.25] == (1408, 5760)
    assert bins[0.55] == (2112, 3840)
    assert bins[1.82] == (3840, 2112)
    assert bins[3.95] == (5568, 1408)
    assert bins[0.51] == (1920, 3776) and bins[2.03] == (3904, 1920)  # not mirror images


@pytest.mark.parametrize("base", BASES)
def test_a_bin_finds_itself(base):
    """Protects the choice: asking for a bin's own size gives that bin, by size and by key."""
    for ratio, (height, width) in ASPECT_RATIO_BINS[base].items():
        assert nearest_bin(base, ratio=ratio) == (height, width)
        if base != 2880:  # whose keys are up to 0.06 off the sizes' quotient
            assert nearest_bin(base, height, width) == (height, width)


@given(st.integers(1, 16384), st.integers(1, 16384))
def test_nothing_is_nearer_than_the_answer(height, width):
    """Protects the rule itself: smallest |key - h/w|, for any size."""
    chosen = nearest_bin(1024, height, width)
    keys = {size: key for key, size in ASPECT_RATIO_BINS[1024].items()}
    distance = min(abs(key - height / width) for key in keys.values())
    assert abs(keys[chosen] - height / width) == distance


def test_common_sizes():
    """Protects the axis order: height comes first and tall pictures stay tall."""
    assert nearest_bin(1024, 1080, 1920) == (768, 1344)
    assert nearest_bin(1024, 1920, 1080) == (1344, 768)
    assert nearest_bin(512, height=64, width=64) == (512, 512)
    assert nearest_bin(2048, ratio=100.0) == (4096, 1024)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"base": 768, "ratio": 1.0}, "256, 512, 1024, 2048, 2880"),
     ({"base": 1024, "height": 0, "width": 64}, "height is 0"),
     ({"base": 1024, "height": 64, "width": -8}, "width is -8"),
     ({"base": 1024, "height": 10**6, "width": 64}, "height is 1000000"),
     ({"base": 1024, "height": 64}, "height and width"),
     ({"base": 1024}, "height and width"),
     ({"base": 1024, "height": 64, "width": 64, "ratio": 1.0}, "both"),
     ({"base": 1024, "ratio": 0.0}, "ratio is 0"),
     ({"base": 1024, "ratio": -1.0}, "ratio is -1"),
     ({"base": 1024, "ratio": float("nan")}, "ratio is nan")],
)
def test_sizes_that_make_no_sense_are_named(arguments, message):
    """Protects against a division by zero or an arbitrary bin for a broken input."""
    with pytest.raises(ValueError, match=message):
        nearest_bin(**arguments)
