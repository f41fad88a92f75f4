"""What the paper prints, read off its figures, and what decides whether the numbers of a run agree with it.

Barbero et al., *Transformers need glasses! Information over-squashing in language tasks* (NeurIPS 2024, arXiv
2406.04267). Read by eye from curves, to the digits given, none of them computed here; where a curve could not be read
at a length, there is no entry. Distances are absolute and have no unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from oversquash_lens.numerics import spearman
from oversquash_lens.viz.chart import Number, Series, Verdict

# The dashed line of figures 5, 8, 9, 10 and 12: bfloat16's precision at 1, drawn as an absolute distance.
PRECISION = (2.0**-7, "bfloat16 precision, 2⁻⁷")

GEMMA = "Gemma 7B, mean over heads in the last layer"
SEEDS = "synthetic, mean over 5 seeds"
ONE_LAYER = "synthetic, one attention layer, d = 64"


@dataclass(frozen=True)
class Printed:
    """One printed curve: `y` at the lengths `x`, and what it was measured on."""

    figure: str
    label: str
    of: str
    points: Mapping[int, float]

    @property
    def x(self) -> tuple[float, ...]:
        return tuple(float(each) for each in self.points)

    @property
    def y(self) -> tuple[float, ...]:
        return tuple(self.points.values())

    def series(self) -> Series:
        """The curve as a figure shows it, named as the paper's."""
        return Series(f"paper: {self.label}", self.x, self.y, kind="published")


def _printed(figure: str, label: str, of: str, x: tuple[int, ...], y: tuple[float, ...]) -> Printed:
    return Printed(figure, label, of, MappingProxyType(dict(zip(x, y, strict=True))))


FIGURE_5_LENGTHS = (1, 2, 6, 11, 51, 101, 501, 1001, 2001)

# Of (a) and (c) the print can be read at the first five lengths and at the last; between, the curves lie on the axis.
FIGURE_5: Mapping[str, Printed] = MappingProxyType(
    {
        "a": _printed("5a", "count ones", GEMMA, (1, 2, 6, 11, 51, 2001), (0.95, 0.35, 0.2, 0.08, 0.04, 0.0)),
        "b": _printed(
            "5b",
            "count ones among sampled digits",
            GEMMA,
            FIGURE_5_LENGTHS,
            (0.32, 0.28, 0.23, 0.26, 0.19, 0.13, 0.11, 0.09, 0.07),
        ),
        "c": _printed("5c", "copy ones", GEMMA, (1, 2, 6, 11, 51, 2001), (0.48, 0.40, 0.14, 0.06, 0.05, 0.01)),
        "d": _printed(
            "5d",
            "copy ones, a comma every third digit",
            GEMMA,
            FIGURE_5_LENGTHS,
            (0.48, 0.42, 0.44, 0.75, 1.0, 1.1, 1.25, 1.3, 1.4),
        ),
    }
)

FIGURE_8 = _printed(
    "8",
    "sinusoidal positions",
    ONE_LAYER,
    (5, 10, 100, 500, 1000, 5000, 10000),
    (0.07, 0.05, 0.018, 0.0075, 0.006, 0.0023, 0.0018),
)

# From 2000 on a value has one digit, 2500 excepted: 0.009 stands for 0.0085 … 0.0095, 0.002 for 0.0015 … 0.0025.
FIGURE_9 = _printed(
    "9",
    "total variation",
    SEEDS,
    (500, 750, 1000, 1500, 2000, 2500, 5000, 10000),
    (0.026, 0.020, 0.017, 0.012, 0.009, 0.0075, 0.004, 0.002),
)
# Lengths that the paper draws but that could not be read: an earlier computation of ours, as a second witness.
FIGURE_9_RECOMPUTED = _printed("9", "total variation, recomputed", SEEDS, (3000, 4000), (0.0065, 0.0049))

_FIGURE_10_LENGTHS = (5, 10, 100, 500, 1000)
_FIGURE_10_VALUES = (1.0, 0.55, 0.07, 0.013, 0.007)
# The four curves lie on one another up to 1000; at 5000 they fan out, ALiBi on top.
FIGURE_10_AT_5000 = (0.0015, 0.004)
FIGURE_10: Mapping[str, Printed] = MappingProxyType(
    {
        **{
            name: _printed("10", "all four encodings", ONE_LAYER, _FIGURE_10_LENGTHS, _FIGURE_10_VALUES)
            for name in ("NoPE", "RoPE", "sinusoidal")
        },
        "ALiBi": _printed(
            "10",
            "ALiBi",
            ONE_LAYER,
            (*_FIGURE_10_LENGTHS, 5000),
            (*_FIGURE_10_VALUES, FIGURE_10_AT_5000[1]),
        ),
    }
)

FIGURE_12 = _printed(
    "12",
    "prompt Type 1",
    "as figure 5, the question before the sequence",
    (2, 5, 10, 100, 500, 1000),
    (0.13, 0.03, 0.015, 0.012, 0.01, 0.01),
)


COLLAPSES, STAYS = -0.3, -0.1  # decay exponents: at or below the first a curve collapses, above the second it does not


def exponent(x: Sequence[Number], y: Sequence[Number], beyond: Number = 0) -> float:
    """Slope of log y against log x by least squares, over x > `beyond` and 0 < y < ∞; nan for fewer than two points.

    >>> exponent([1, 10, 100], [5.0, 0.5, 0.05])
    -1.0
    """
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a > beyond and 0 < b < math.inf]
    if len(points) < 2:
        return math.nan
    log_x, log_y = np.array(points).T
    return round(float(np.polyfit(log_x, log_y, 1)[0]), 12)


def collapses(x: Sequence[Number], y: Sequence[Number], beyond: Number = 10) -> bool | None:
    """Whether a distance goes to 0, or falls as a power of the length; None where the slope says neither."""
    if x[-1] > beyond and y[-1] == 0:
        return True
    slope = exponent(x, y, beyond)
    if math.isnan(slope) or STAYS > slope > COLLAPSES:
        return None
    return slope <= COLLAPSES


def all_of(answers: Iterable[bool | None]) -> bool | None:
    """False if one is False, else None if one is None, else True.

    >>> all_of([True, None]), all_of([None, False]), all_of([True])
    (None, False, True)
    """
    answers = tuple(answers)
    return False if False in answers else None if None in answers else True


def grows(x: Sequence[Number], y: Sequence[Number]) -> bool | None:
    """Whether y rises with x: rank correlation above 0, gaps (nan) left out; None for fewer than two points.

    >>> grows([1, 2, 3], [0.0, 2.0, 1.0]), grows([1, 2, 3], [1.0, 1.0, 1.0])
    (True, False)
    """
    points = [(a, b) for a, b in zip(x, y, strict=True) if not math.isnan(b)]
    if len(points) < 2:
        return None
    first, second = torch.tensor(points, dtype=torch.float64).T
    return spearman(first, second) > 0


EXPONENT_WITHIN = 0.1
LEVEL_WITHIN = 1.5  # a factor, at every length


@dataclass(frozen=True)
class Agreement:
    """Ours against the paper's at the lengths that both have: ratios ours / paper's, exponents by least squares."""

    lengths: tuple[float, ...]
    ratios: tuple[float, ...]
    exponent: float
    printed_exponent: float

    @property
    def worst(self) -> float:
        """The largest factor between the two, whichever is larger; nan without a common length."""
        return max((max(ratio, 1 / ratio) if ratio > 0 else math.inf for ratio in self.ratios), default=math.nan)

    @property
    def level(self) -> float:
        """Geometric mean of ours / paper's."""
        if not self.ratios:
            return math.nan
        return math.exp(sum(math.log(ratio) if ratio > 0 else -math.inf for ratio in self.ratios) / len(self.ratios))

    @property
    def exponent_met(self) -> bool | None:
        """Whether the two exponents differ by at most 0.1; None where fewer than two lengths are common."""
        off = abs(self.exponent - self.printed_exponent)
        return None if math.isnan(off) else off <= EXPONENT_WITHIN

    @property
    def level_met(self) -> bool | None:
        """Whether no length is off by more than a factor 1.5; None without a common length."""
        return None if math.isnan(self.worst) else self.worst <= LEVEL_WITHIN


def agree(x: Sequence[float], y: Sequence[float], printed: Printed) -> Agreement:
    """Set the curve (x, y) beside `printed`, at the lengths that both have.

    >>> agree([5.0, 7.0, 10.0], [0.14, 0.12, 0.1], Printed("8", "", "", {5: 0.07, 10: 0.05})).ratios
    (2.0, 2.0)
    """
    ours = dict(zip(x, y, strict=True))
    lengths = tuple(float(length) for length in printed.points if length in ours)
    here = [ours[length] for length in lengths]
    theirs = [printed.points[int(length)] for length in lengths]
    ratios = tuple(a / b for a, b in zip(here, theirs, strict=True))
    return Agreement(lengths, ratios, exponent(lengths, here), exponent(lengths, theirs))


def decline_verdict(claim: str, curves: Sequence[Series]) -> Verdict:
    """Whether every curve goes to 0 as a power of the length."""
    ends = "; ".join(f"{one.label}: {one.y[0]:.2g} at {one.x[0]:g}, {one.y[-1]:.2g} at {one.x[-1]:g}" for one in curves)
    return Verdict(claim, ends, all_of(collapses(one.x, one.y, beyond=0.0) for one in curves))


def exponent_verdict(agreements: Mapping[str, Agreement]) -> Verdict:
    """Whether every curve falls with the printed power of the length."""
    number = "; ".join(
        f"{name}: {one.exponent:.2f}, printed {one.printed_exponent:.2f}" for name, one in agreements.items()
    )
    claim = f"the power of n is the printed one, within {EXPONENT_WITHIN:g}"
    return Verdict(claim, number, all_of(one.exponent_met for one in agreements.values()))


def level_verdict(agreements: Mapping[str, Agreement]) -> Verdict:
    """Whether every curve has the printed level."""
    number = "; ".join(f"{name}: off by a factor {one.worst:.2f} at most" for name, one in agreements.items())
    claim = f"the level is the printed one, within a factor {LEVEL_WITHIN:g} at every length"
    return Verdict(claim, number, all_of(one.level_met for one in agreements.values()))


def close_verdict(agreements: Sequence[Agreement], within: float) -> Verdict:
    """Whether the printed values are met to `within` (0.1: ten percent) at every length that both have."""
    off = {length: abs(ratio - 1) for one in agreements for length, ratio in zip(one.lengths, one.ratios, strict=True)}
    claim = f"the printed values, within {100 * within:g} % at every length"
    if not off:
        return Verdict(claim, "no printed length was computed", None)
    worst = max(off, key=off.__getitem__)
    number = f"at most {100 * off[worst]:.1f} % off, at n = {worst:g}, of {len(off)} lengths"
    return Verdict(claim, number, off[worst] <= within)


def spread_verdict(values: Mapping[str, float], bounds: tuple[float, float], top: str, at: int) -> Verdict:
    """Whether curves fan out at one length as printed: between `bounds` within a factor, `top` the highest."""
    low, high = bounds
    claim = f"at n = {at} the curves lie between {low:g} and {high:g}, within a factor {LEVEL_WITHIN:g}, {top} on top"
    if not values:
        return Verdict(claim, f"n = {at} was not computed", None)
    inside = all(low / LEVEL_WITHIN <= value <= high * LEVEL_WITHIN for value in values.values())
    number = ", ".join(f"{name} {value:.2g}" for name, value in values.items())
    return Verdict(claim, number, inside and max(values, key=values.__getitem__) == top)
