"""Numbers that decide a claim, against closed forms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oversquash_lens.paper.published import COLLAPSES, STAYS, collapses, exponent, grows

LENGTHS = (1, 2, 6, 11, 51, 101, 501, 1001, 2001)
WITHIN = 1e-9


def power(p: float, scale: float = 1.0) -> list[float]:
    return [scale * k**p for k in LENGTHS]


# ---------------------------------------------------------------- exponent


@pytest.mark.parametrize("p", [-2.0, -1.0, -0.5, -0.25, 0.0, 0.5, 3.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
def test_the_exponent_of_a_power_is_that_power(p: float, scale: float) -> None:
    assert exponent(LENGTHS, power(p, scale)) == pytest.approx(p, abs=WITHIN)


@given(st.lists(st.floats(1e-6, 1e6), min_size=len(LENGTHS), max_size=len(LENGTHS)))
def test_the_exponent_is_covariance_over_variance(y: list[float]) -> None:
    a, b = [math.log(k) for k in LENGTHS], [math.log(each) for each in y]
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    pairs = list(zip(a, b, strict=True))
    slope = math.fsum((x - mean_a) * (z - mean_b) for x, z in pairs) / math.fsum((x - mean_a) ** 2 for x in a)
    assert exponent(LENGTHS, y) == pytest.approx(slope, abs=1e-8)


def test_points_up_to_beyond_do_not_count() -> None:
    bent = [k**-1.0 if k > 10 else 7.0 for k in LENGTHS]
    assert exponent(LENGTHS, bent, beyond=10) == pytest.approx(-1, abs=WITHIN)
    assert exponent(LENGTHS, bent, beyond=11) == pytest.approx(-1, abs=WITHIN)
    assert exponent(LENGTHS, bent) != pytest.approx(-1, abs=0.01)


@pytest.mark.parametrize("gap", [0.0, math.nan, math.inf])
def test_what_has_no_logarithm_is_left_out(gap: float) -> None:
    y = power(-0.5)
    y[3] = y[6] = gap
    assert exponent(LENGTHS, y) == pytest.approx(-0.5, abs=WITHIN)


@pytest.mark.parametrize(("x", "y"), [((), ()), ((5,), (1.0,)), ((5, 10), (0.0, 1.0)), ((1, 2), (math.nan, 1.0))])
def test_fewer_than_two_points_have_no_slope(x: tuple, y: tuple) -> None:
    assert math.isnan(exponent(x, y))


# ---------------------------------------------------------------- collapse


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (-1.0, True),
        (COLLAPSES - 0.001, True),
        (COLLAPSES + 0.001, None),
        (STAYS - 0.001, None),
        (STAYS + 0.001, False),
        (0.0, False),
        (0.4, False),
    ],
)
def test_a_power_collapses_where_it_falls_fast_enough(p: float, expected: bool | None) -> None:
    assert collapses(LENGTHS, power(p, 98.0)) is expected


def test_the_limits_themselves_are_decided() -> None:
    x, fast, slow = [100, 10_000], [1.0, 100**COLLAPSES], [1.0, 100**STAYS]
    assert exponent(x, fast) == COLLAPSES
    assert exponent(x, slow) == STAYS
    assert collapses(x, fast) is True
    assert collapses(x, slow) is False


def test_a_distance_that_has_become_zero_has_collapsed() -> None:
    assert collapses(LENGTHS, [1.0, 1.0, 1.0, *[0.0] * 6]) is True
    assert collapses((1, 2), (1.0, 0.0)) is None  # all within the first steps, that do not count
    assert collapses((1, 2), (1.0, 0.0), beyond=0) is True


def test_too_short_a_curve_decides_nothing() -> None:
    assert collapses((1, 2, 6, 11), (4.0, 3.0, 2.0, 1.0)) is None
    assert collapses((1, 2, 6, 11), (4.0, 3.0, 1.0, 0.1), beyond=0) is True


# ---------------------------------------------------------------- growth


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=12, unique=True))
def test_sorted_values_grow_and_turned_round_they_do_not(values: list[int]) -> None:
    x = range(1, len(values) + 1)
    assert grows(x, sorted(map(float, values))) is True
    assert grows(x, sorted(map(float, values), reverse=True)) is False


def test_gaps_are_no_points_and_a_constant_does_not_grow() -> None:
    assert grows((5, 15, 25, 35), (1.0, math.nan, 2.0, math.nan)) is True
    assert grows((5, 15, 25), (math.nan, 3.0, math.nan)) is None
    assert grows((), ()) is None
    assert grows((5, 15, 25), (0.0, 0.0, 0.0)) is False
