"""Where numbers stand on an axis, and the numbers written beside it: linear, log, and one place for each value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from oversquash_lens.viz.style import SMALL, inches_of, printable

LONGEST_NAME = 16  # characters of a name at an axis
TURNED: dict[str, Any] = {
    "rotation": 90,
    "va": "center",
    "ha": "right",
    "rotation_mode": "anchor",
}  # names below an axis
MOST_DECADES = 7  # labelled on one log axis
LEAST_LENGTH = 1e-290  # of a linear axis: a margin of the smallest float64 would be no margin
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Scale:
    """One axis from `bottom` to `top`. What a number line has no place for stands at its ends.

    A 0 on a log axis and -inf stand at the bottom, inf at the top, nan and what is negative on a log axis nowhere.
    `ticks` are pairs (place, label); empty on a linear axis, where matplotlib finds them (`whole`: at whole numbers).
    """

    kind: str
    bottom: float
    top: float
    ticks: tuple[tuple[float, str], ...] = ()
    places: dict[float, int] = field(default_factory=dict)
    whole: bool = False

    def at(self, values: Sequence[float | int]) -> Float[np.ndarray, " point"]:
        """Places of the values in the axis' own numbers; nan where there is none."""
        if self.kind == "category":
            return np.asarray([self.places.get(value, math.nan) for value in values], float)
        row = np.asarray(values, float)
        row = np.where(self.below(values), self.bottom, np.where(self.above(values), self.top, row))
        return np.where(row <= 0, math.nan, row) if self.kind == "log" else row

    def below(self, values: Sequence[float | int]) -> Bool[np.ndarray, " point"]:
        row = np.asarray(values, float)
        return (row == -math.inf) | ((row == 0) & (self.kind == "log"))

    def above(self, values: Sequence[float | int]) -> Bool[np.ndarray, " point"]:
        return np.asarray(values, float) == math.inf


def scale(kind: str, values: Sequence[float | int], margin: float = 0.05, from_zero: bool = False) -> Scale:
    """The axis that holds all values with a margin on either side (a part of its length).

    `from_zero`: a linear axis starts at 0 where the values, none negative, come near it.

    >>> scale("log", [0.01, 10.0], margin=0.0).ticks
    ((0.01, '0.01'), (0.1, '0.1'), (1.0, '1'), (10.0, '10'))
    """
    finite = [float(value) for value in values if math.isfinite(value)]
    if kind == "category":
        kinds = sorted(set(finite))
        ticks = tuple((float(place), number(value)) for place, value in enumerate(kinds))
        return Scale(kind, -0.4, max(len(kinds), 1) - 0.6, ticks, {value: place for place, value in enumerate(kinds)})
    if kind == "log":
        return _log_scale(finite, margin)
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if from_zero and 0 <= low < 0.3 * high:
        low = 0.0
    length = max(high - low or abs(high) or 1.0, LEAST_LENGTH)
    whole = all(isinstance(value, int) for value in values)
    return Scale(kind, low - margin * length, high + margin * length, whole=whole)


def _log_scale(values: Sequence[float], margin: float) -> Scale:
    """Zeros get a place of their own below everything else, named 0."""
    positive = [value for value in values if value > 0]
    low, high = min(positive, default=0.1), max(positive, default=1.0)
    first, last = math.log10(low), math.log10(high)
    decades = max(last - first, 0.3)

    def place(power: float) -> float:
        return 10.0 ** min(max(power, -307), 308)

    top = place(last + margin * decades)
    if 0 not in values:
        bottom = place(first - margin * decades)
        return Scale("log", bottom, top, tuple(log_ticks(bottom, top)))
    bottom = place(first - 0.16 * decades)
    ticks = log_ticks(place(first - 0.04 * decades), top)
    return Scale("log", bottom, top, ((bottom, "0"), *ticks))


def put(axes: Any, which: str, scale: Scale, inches: float, names: Sequence[str] = ()) -> None:
    """Give matplotlib's axes this scale; `names` stand in place of 0, 1, …; labels make way where space is short.

    `which` is "x" or "y"; `inches` is how long the axis is, about.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axis = getattr(axes, f"{which}axis")
    if scale.kind == "log":
        getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(scale.bottom, scale.top)
    if scale.kind == "linear" and not names:
        room = inches_of(number(float(f"{scale.top:.2g}")) + "00", SMALL)
        most = 3.2 * inches if which == "y" else inches / room
        bins, steps = max(3, min(7, int(most))), [1, 2, 2.5, 5, 10]
        fewest = 1 if scale.whole else 2
        axis.set_major_locator(MaxNLocator(bins, steps=steps, integer=scale.whole, min_n_ticks=fewest))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        return
    ticks = [(float(i), name) for i, name in enumerate(short(names))] or list(scale.ticks)
    turned = {}
    if which == "x" and crowded([label for _, label in ticks], inches):
        ticks = ticks[:: math.ceil(len(ticks) * 1.6 * SMALL / 72 / inches)]
        turned = TURNED if names else {**TURNED, "rotation": 45, "va": "top"}
    axis.set_ticks([place for place, _ in ticks], [label for _, label in ticks], **turned)
    axis.set_minor_locator(NullLocator())


def put_counts(axes: Any, which: str, count: int, inches: float) -> None:
    """Number rows or columns from 0: all of them, or every second, fifth, tenth, … where space is short."""
    most = max(2, min(8, int(5 * inches)))
    step = next(digit * 10**power for power in range(9) for digit in (1, 2, 5) if count <= most * digit * 10**power)
    ticks = range(0, count, step)
    getattr(axes, f"set_{which}ticks")(ticks, map(number, ticks))


def short(names: Sequence[str]) -> list[str]:
    """Names as they stand at an axis, cut after 16 characters.

    >>> short(["a token", "a token that is far too long"])
    ['a token', 'a token that is…']
    """
    shown = map(printable, names)
    return [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in shown]


def crowded(labels: Sequence[str], inches: float) -> bool:
    """Whether labels side by side need more than the width."""
    return inches_of("00".join(labels), SMALL) > inches


def number(value: float | int) -> str:
    """A number on an axis: no exponent unless it is needed, thousands set off from 10,000 on.

    >>> [number(value) for value in (0.0, 1001.0, 10000.0, 0.25, -2.0, 1e-9)]
    ['0', '1001', '10,000', '0.25', '−2', '10⁻⁹']
    """
    if value == 0:
        return "0"  # -0.0 too
    if not 1e-4 < abs(value) < 1e7:
        return _power(value)
    return (f"{value:,.7g}" if abs(value) >= 1e4 else f"{value:.7g}").replace("-", "−")


def _power(value: float | int) -> str:
    digits, exponent = f"{value:.3e}".split("e")
    digits, exponent = digits.rstrip("0").rstrip(".").replace("-", "−"), int(exponent)
    if digits == "1" and exponent in (0, 1):
        return str(10**exponent)
    return f"{digits}·".removeprefix("1·") + "10" + str(exponent).translate(_SUPERSCRIPT)


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Places and labels for a log axis: powers of ten, fewer where there are many, 1-2-5 where there are few.

    >>> [label for _, label in log_ticks(0.002, 3.0)], [label for _, label in log_ticks(1e-5, 1.0)]
    (['0.01', '0.1', '1'], ['10⁻⁵', '10⁻⁴', '10⁻³', '10⁻²', '10⁻¹', '1'])
    """
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = math.ceil((last - first + 1) / MOST_DECADES) or 1
    ticks = [10.0**power for power in range(first, last + 1, step)]
    if len(ticks) < 2:
        fine = [digit * 10.0**power for power in range(first - 1, last + 2) for digit in (1, 2, 5)]
        ticks = [tick for tick in fine if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
    return [(tick, _power(tick) if min(ticks) < 1e-3 or max(ticks) > 1e4 else number(tick)) for tick in ticks]
