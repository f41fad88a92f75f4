"""How figures look: colours that the colour-blind tell apart, axes and their numbers, text that the font can draw."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from oversquash_lens.viz.words import axis_number, power_of_ten

if TYPE_CHECKING:
    import matplotlib.axes

INK, SOFT, FAINT = "#1f2328", "#6e757c", "#e4e6e8"
# Okabe and Ito (2008) without green and yellow: nothing red beside green, nothing too pale for white paper.
COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# From nothing to all: CIELAB lightness falls from 100 to 16 in even steps, hue from 236° to 270°.
RAMP = ("#ffffff", "#cce5f3", "#98cae8", "#61b0dc", "#1f94cc", "#0478ad", "#015c8b", "#024269", "#0c2944")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("solid", (0, (5, 1.6)), (0, (4, 1.4, 1, 1.4)))
RIGHT, WRONG = COLOURS[0], COLOURS[1]
DPI = 200  # of a PNG, as in the style file
TITLE, HEADING, LABEL, SMALL = 9.5, 8.0, 7.5, 6.5  # points, as in the style file: figure, axes, axis, ticks and legend
EM = 0.58  # width of a character over the size of its type, on average
LONGEST_NAME = 16  # characters of a name at an axis
MOST_TICKS = 8  # on one axis
TURNED: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "center", "rotation_mode": "anchor"}
SLANTED: dict[str, Any] = {"rotation": 45, "ha": "right", "va": "top", "rotation_mode": "anchor"}


@contextmanager
def styled() -> Iterator[None]:
    """Our style file over matplotlib's own settings, whatever the user's are; theirs are back afterwards."""
    import matplotlib.style

    with matplotlib.style.context(Path(__file__).with_name("oversquash.mplstyle"), after_reset=True):
        yield


@dataclass(frozen=True)
class Look:
    """Colour, marker and dashes of one series, the same in all axes of a figure."""

    colour: str
    marker: str
    dashes: str | tuple


def looks(labels: Sequence[str]) -> dict[str, Look]:
    """A look for each label, in their order; the dashes change when the colours are used up.

    >>> [look.colour for look in looks(["float32", "bfloat16", "float32"]).values()]
    ['#0072B2', '#D55E00']
    """
    n = len(COLOURS)
    return {
        label: Look(COLOURS[i % n], MARKERS[i % n], DASHES[i // n % len(DASHES)])
        for i, label in enumerate(dict.fromkeys(labels))
    }


# -- text ----------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Text that the figures' font can draw: one line, and the code point of every character it has no shape for.

    >>> printable("a \\n b"), printable("漢 $x$")
    ('a b', '‹U+6F22› $x$')
    """
    known = _characters()
    return "".join(c if ord(c) in known and c.isprintable() else f"‹U+{ord(c):04X}›" for c in " ".join(text.split()))


@cache
def _characters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())


def wrapped(text: str, inches: float, size: float) -> str:
    """The text in lines of about this width in type of this size (points); a word too long for one is cut."""
    most = max(8, int(72 * inches / (EM * size)))
    return "\n".join(textwrap.wrap(printable(text), most, break_on_hyphens=False))


def short(names: Sequence[str]) -> list[str]:
    """Names as they stand at an axis, cut after 16 characters.

    >>> short(["a token", "a token that is far too long"])
    ['a token', 'a token that is…']
    """
    shown = map(printable, names)
    return [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in shown]


def inches_of(text: str, size: float) -> float:
    """About how wide one line of text is in type of a size (points)."""
    return len(text) * EM * size / 72


def crowded(labels: Sequence[str], inches: float) -> bool:
    """Whether labels side by side need more than the width."""
    return len(labels) * (max(map(len, labels), default=0) + 1.5) * EM * SMALL / 72 > inches


# -- axes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """One axis from `bottom` to `top`; what a number line has no place for stands at its ends.

    A 0 on a log axis and -inf stand at the bottom, inf at the top, nan and what is negative on a log axis nowhere.
    `categories` has one place for each value of a "category" axis; `integer`: all values are whole numbers.
    """

    kind: str
    bottom: float
    top: float
    categories: tuple[float, ...] = ()
    has_zero: bool = False
    integer: bool = False

    def at(self, values: Sequence[float | int]) -> Float[np.ndarray, " point"]:
        """Coordinates of the values; nan where there is none."""
        if self.kind == "category":
            places = {value: place for place, value in enumerate(self.categories)}
            return np.asarray([places.get(value, math.nan) for value in values], float)
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

    `from_zero`: a linear axis starts at 0 where the values, none negative, come near it. A 0 on a log axis gets a
    place of its own below everything else.
    """
    finite = [float(value) for value in values if math.isfinite(value)]
    if kind == "category":
        found = tuple(sorted(set(finite)))
        return Scale(kind, -0.4, max(len(found), 1) - 0.6, found)
    if kind == "log":
        positive = [value for value in finite if value > 0]
        first, last = math.log10(min(positive, default=0.1)), math.log10(max(positive, default=1.0))
        decades = max(last - first, 0.3)
        below = 0.16 if 0 in values else margin
        ends = (first - below * decades, last + margin * decades)
        bottom, top = (10.0 ** min(max(power, -307), 308) for power in ends)
        return Scale(kind, bottom, top, has_zero=0 in values)
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if from_zero and 0 <= low < 0.3 * high:
        low = 0.0
    length = max(high - low or abs(high) or 1.0, 1e-290)  # a margin of the smallest float64 would be none
    integer = all(isinstance(value, int) for value in values)
    return Scale(kind, low - margin * length, high + margin * length, integer=integer)


def put(axes: matplotlib.axes.Axes, which: str, scale: Scale, inches: float, names: Sequence[str] = ()) -> None:
    """Give matplotlib's axes this scale, on "x" or "y", about `inches` long; `names` stand in place of 0, 1, ….

    Names and categories turn, and every second, third, … is left out, where there is no space for all.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axis = getattr(axes, f"{which}axis")
    if scale.kind == "log":
        axis._set_axes_scale("log")
    axes.set(**{f"{which}lim": (scale.bottom, scale.top)})
    if scale.kind == "linear" and not names:
        most = min(7, 3 * inches if which == "y" else inches / inches_of(axis_number(scale.top)[:7] + "00", SMALL))
        axis.set_major_locator(
            MaxNLocator(max(3, int(most)), steps=[1, 2, 2.5, 5, 10], integer=scale.integer, min_n_ticks=1)
        )
        axis.set_major_formatter(FuncFormatter(lambda value, _: axis_number(value)))
        return
    if scale.kind == "log":
        ticks = log_ticks(scale.bottom * (scale.top / scale.bottom) ** (0.1 if scale.has_zero else 0), scale.top)
        ticks = [(scale.bottom, "0"), *ticks] if scale.has_zero else ticks
    else:
        shown = short(names) or [axis_number(value) for value in scale.categories]
        ticks = [(float(place), name) for place, name in enumerate(shown)]
    turned = {}
    if which == "x" and crowded([label for _, label in ticks], inches):
        ticks = ticks[:: math.ceil(len(ticks) * 1.6 * SMALL / 72 / inches)]
        turned = TURNED if names else SLANTED
    axis.set_ticks([place for place, _ in ticks], [label for _, label in ticks], **turned)
    axis.set_minor_locator(NullLocator())


def put_counts(axes: matplotlib.axes.Axes, which: str, count: int) -> None:
    """Number rows or columns 0 … count-1 at whole numbers that matplotlib's locator finds."""
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(min(MOST_TICKS, max(1, count - 1)), steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    ticks = [int(tick) for tick in locator.tick_values(0, count - 1) if tick == int(tick) and 0 <= tick < count]
    axes.set(**{f"{which}ticks": ticks, f"{which}ticklabels": list(map(axis_number, ticks))})


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Places and labels for a log axis, from matplotlib's locators: powers of ten, 1-2-5 where these are few.

    >>> [label for _, label in log_ticks(0.002, 3.0)], [label for _, label in log_ticks(1e-5, 1.0)]
    (['0.01', '0.1', '1'], ['10⁻⁵', '10⁻⁴', '10⁻³', '10⁻²', '10⁻¹', '1'])
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    locators = (LogLocator(numticks=MOST_TICKS), LogLocator(subs=(1, 2, 5), numticks=MOST_TICKS), MaxNLocator(4))
    inside: list[float] = []
    with np.errstate(over="ignore"):
        for locator in locators:
            inside = [float(tick) for tick in locator.tick_values(low, high) if 0.999 * low <= tick <= 1.001 * high]
            if len(inside) > 1:
                break
    name = power_of_ten if inside and (min(inside) < 1e-3 or max(inside) > 1e4) else axis_number
    return [(tick, name(tick)) for tick in inside]
