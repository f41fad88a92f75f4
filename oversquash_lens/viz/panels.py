"""One pair of axes full of numbers: lines with their bands, what the paper printed, rounding floors, histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from oversquash_lens.viz.chart import Panel, Series
from oversquash_lens.viz.scales import Scale, put, scale
from oversquash_lens.viz.style import MARKERS, SOFT, Look, printable

MOST_MARKERS = 45  # a line of more points has no markers, but where a point stands alone
Legend = dict[str, Any]  # label -> what it stands for: an artist of matplotlib, or several over one another


def draw_numbers(
    axes: Any, panel: Panel, look_of: dict[str, Look], size: tuple[float, float]
) -> tuple[Legend, list[str]]:
    """Draw every series of the panel; returns the legend's entries, and what has to be said of numbers off the axes.

    `size` of the axes in inches, about: names under the x axis make way where they do not fit into it.
    """
    bars = [one for one in panel.series if one.kind == "bars"]
    x, y, notes = _scales(panel, bars)
    put(axes, "x", x, size[0], panel.x_names)
    put(axes, "y", y, size[1])
    axes.grid(axis="y")
    legend: Legend = {}
    for one in bars:
        legend[printable(one.label)] = _bars(axes, one, x, _bin_width(bars, x), look_of[one.label], one is bars[0])
    for one in panel.series:
        if one.kind != "bars":
            legend[_label(one, look_of)] = _row(axes, one, x, y, _style(one, panel, look_of))
    if panel.reference is not None:
        value, label = panel.reference
        height = float(y.at([value])[0])
        legend[printable(label)] = axes.axhline(height, color="#3a3f45", linewidth=0.9, linestyle=(0, (4, 2.5)))
    return legend, notes


def is_known(panel: Panel) -> bool:
    """Whether there is any number to draw."""
    return any(not math.isnan(value) for one in panel.series for value in one.y)


def _scales(panel: Panel, bars: Sequence[Series]) -> tuple[Scale, Scale, list[str]]:
    """Both axes, and what is to be said of numbers that they have no place for."""
    xs = [value for one in panel.series for value in one.x]
    ys = [value for one in panel.series for row in (one.y, one.low, one.high) if row is not None for value in row]
    log = panel.y_axis == "log"
    said = {
        f"▼ 0 = {panel.zero}": log and 0 in ys,
        "▼ minus infinity": -math.inf in ys,
        "▲ infinity (overflow)": math.inf in ys,
        "negative numbers have no place on a log axis": log and any(value < 0 for value in ys),
    }
    if panel.reference is not None:
        ys.append(panel.reference[0])
    y = scale(panel.y_axis, ys, from_zero=True)
    if bars and not log:
        y = Scale("linear", 0.0, y.top)  # bars stand on the axis
    return scale(panel.x_axis, xs, margin=0.03), y, [note for note, holds in said.items() if holds]


def _label(one: Series, look_of: dict[str, Look]) -> str:
    """In the legend; what belongs to a line carries the line's name and says what it is."""
    label = printable(one.label)
    if one.kind == "published":
        return label if label.startswith("paper") else f"paper ({label})"
    return f"{label}: rounding alone" if one.kind == "floor" and one.label in look_of else label


def _style(one: Series, panel: Panel, look_of: dict[str, Look]) -> dict[str, Any]:
    look = look_of.get(one.label)
    if one.kind == "line":
        width = 1.3 if len(one.x) <= 200 else 0.8
        return {"color": look.colour, "marker": look.marker, "linestyle": look.dashes, "linewidth": width, "zorder": 3}
    place = [each.label for each in panel.series if each.kind == one.kind].index(one.label)
    colour = look.colour if look else SOFT
    if one.kind == "floor":
        dashes = ("solid", "dashdot", "dashed", "dotted")[place % 4]
        return {"color": colour, "alpha": 0.55, "linewidth": 0.8, "linestyle": dashes, "zorder": 2}
    marker = look.marker if look else MARKERS[place % len(MARKERS)]
    open_marker = {"marker": marker, "markerfacecolor": "white", "markeredgewidth": 0.8, "markersize": 3.8}
    return {"color": colour, "linewidth": 0.8, "linestyle": "dotted", "zorder": 2.5, **open_marker}


def _row(axes: Any, one: Series, x: Scale, y: Scale, style: dict[str, Any]) -> Any:
    """A line with gaps where nothing is known, its band, and triangles where a number is off the axis."""
    at, heights = x.at(one.x), y.at(one.y)
    off = y.below(one.y) | y.above(one.y)
    marked = _marked(heights, off)
    (line,) = axes.plot(at, heights, markevery=marked, **style | ({} if marked else {"marker": None}))
    for there, marker in ((y.below(one.y), "v"), (y.above(one.y), "^")):
        if there.any():
            edge = {"color": style["color"], "marker": marker, "markersize": 4.2, "zorder": 4}
            axes.plot(at[there], heights[there], linestyle="none", clip_on=False, **edge)
    if one.low is None or one.high is None:
        return line
    colour = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
    return axes.fill_between(at, y.at(one.low), y.at(one.high), zorder=1.5, **colour), line


def _marked(heights: Float[np.ndarray, " point"], off: Bool[np.ndarray, " point"]) -> list[int]:
    """Points that get a marker: each of a short line; of a long one those that no line reaches."""
    known = np.isfinite(heights)
    beside = np.concatenate(([False], known[:-1])) | np.concatenate((known[1:], [False]))
    return np.flatnonzero(known & ~off & (~beside | (len(heights) <= MOST_MARKERS))).tolist()


def _bin_width(bars: Sequence[Series], x: Scale) -> float:
    """The smallest distance between two bars of the panel."""
    places = np.unique(np.concatenate([x.at(one.x) for one in bars]))
    return float(np.diff(places).min()) if len(places) > 1 else 1.0


def _bars(axes: Any, one: Series, x: Scale, width: float, look: Look, first: bool) -> Any:
    """A histogram as one outline, 0 between bars that do not touch; the first is filled, the others lie over it."""
    values, edges = [], []
    for at, count in sorted(zip(x.at(one.x).tolist(), one.y, strict=True)):
        left, right = at - width / 2, at + width / 2
        if not edges:
            edges.append(left)
        elif left - edges[-1] > width / 4:
            values.append(0.0)
            edges.append(left)
        values.append(float(count))
        edges.append(right)
    if first:
        return axes.stairs(values, edges, fill=True, color=look.colour, alpha=0.35, linewidth=0, zorder=2)
    thin = 1.1 if len(one.x) <= 60 else 0.7
    return axes.stairs(values, edges, edgecolor=look.colour, linewidth=thin, zorder=3)
