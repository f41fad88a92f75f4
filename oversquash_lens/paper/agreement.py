"""How a computed curve sits beside a printed one, and the verdicts that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from oversquash_lens.paper.judging import all_of, collapses, exponent
from oversquash_lens.paper.published import Printed
from oversquash_lens.viz.chart import Series, Verdict

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
