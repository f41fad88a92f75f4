"""Numbers that decide a claim."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from oversquash_lens.analyses.audit import spearman
from oversquash_lens.viz.chart import Number

COLLAPSES, STAYS = -0.3, -0.1  # decay exponents: at or below the first a curve collapses, above the second it does not


def exponent(x: Sequence[Number], y: Sequence[Number], beyond: Number = 0) -> float:
    """Slope of log y against log x by least squares, over x > `beyond` and 0 < y < ∞; nan for fewer than two points.

    >>> exponent([1, 10, 100], [5.0, 0.5, 0.05])
    -1.0
    """
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a > beyond and 0 < b < math.inf]
    if len(points) < 2:
        return math.nan
    return round(float(np.polyfit(*np.array(points).T, 1)[0]), 12)


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
