"""What was read off the paper's print, as the text gives it: no value added, none lost."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest

from oversquash_lens.paper import published
from oversquash_lens.paper.published import Printed

EVERY = {
    **{f"5{panel}": curve for panel, curve in published.FIGURE_5.items()},
    "8": published.FIGURE_8,
    "9": published.FIGURE_9,
    **{f"10, {name}": curve for name, curve in published.FIGURE_10.items()},
    "12": published.FIGURE_12,
}


@pytest.mark.parametrize("name", EVERY)
def test_a_curve_is_frozen_and_in_order(name: str) -> None:
    curve = EVERY[name]
    assert list(curve.x) == sorted(set(curve.x))
    assert len(curve.x) == len(curve.y) > 4
    assert all(value >= 0 for value in curve.y)
    assert name.startswith(curve.figure)
    assert curve.of
    with pytest.raises(FrozenInstanceError):
        curve.label = "another"
    with pytest.raises(TypeError):
        curve.points[1] = 0.0


@pytest.mark.parametrize("name", EVERY)
def test_a_curve_becomes_a_published_series(name: str) -> None:
    curve = EVERY[name]
    series = curve.series()
    assert (series.x, series.y, series.kind) == (curve.x, curve.y, "published")
    assert series.label == f"paper: {curve.label}"
    assert series.low is None


def test_the_collections_cannot_be_changed() -> None:
    for collection in (published.FIGURE_5, published.FIGURE_10):
        with pytest.raises(TypeError):
            collection["new"] = published.FIGURE_8


def test_gaps_are_left_out_rather_than_filled() -> None:
    """Of panels (a) and (c) of figure 5 the print gives five lengths and the last one; of (b) and (d) all nine."""
    assert {name: len(curve.x) for name, curve in published.FIGURE_5.items()} == {"a": 6, "b": 9, "c": 6, "d": 9}
    assert published.FIGURE_5["b"].x == tuple(map(float, published.FIGURE_5_LENGTHS))
    assert not set(published.FIGURE_9.x) & set(published.FIGURE_9_RECOMPUTED.x)
    assert 3000 in published.FIGURE_9_RECOMPUTED.points


def falls(curve: Printed) -> bool:
    return all(after < before for before, after in pairwise(curve.y))


def test_the_print_says_what_the_paper_says() -> None:
    """Counting and copying collapse; with commas copying grows apart; the synthetic curves fall throughout."""
    assert all(falls(EVERY[name]) for name in ("5a", "5c", "8", "9", "10, NoPE", "10, ALiBi"))
    assert published.FIGURE_5["d"].y[-1] > 2 * published.FIGURE_5["d"].y[0]
    assert published.FIGURE_12.y[-1] < published.FIGURE_12.y[0] / 10


def test_dashed_line() -> None:
    assert published.PRECISION[0] == 0.0078125


def test_figure_10_is_one_curve_until_it_fans_out() -> None:
    low, high = published.FIGURE_10_AT_5000
    assert low < high == published.FIGURE_10["ALiBi"].points[5000]
    shared = {tuple(list(curve.points.items())[:5]) for curve in published.FIGURE_10.values()}
    assert len(shared) == 1
    assert 5000 not in published.FIGURE_10["NoPE"].points
