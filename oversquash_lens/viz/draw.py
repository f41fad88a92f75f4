"""Any chart as a matplotlib figure: axes in a grid with titles, notes and legends; lines, bands, bars, marks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from oversquash_lens.viz.chart import Chart, Panel, Route, Series
from oversquash_lens.viz.diagrams import draw_heat, draw_paths, draw_route, name_heads
from oversquash_lens.viz.style import (
    HEADING,
    LABEL,
    MARKERS,
    RIGHT,
    SMALL,
    SOFT,
    TITLE,
    WRONG,
    Look,
    Scale,
    crowded,
    inches_of,
    looks,
    printable,
    put,
    scale,
    short,
    wrapped,
)

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure
    import matplotlib.path

PANELS = {1: (5.0, 2.4), 2: (3.6, 1.75), 3: (2.9, 1.5), 4: (2.6, 1.3)}  # inches: width with labels, height of the axes
WIDE, MANY = 7.2, 12  # width of single axes with many names below them, and how many these are
BESIDE = 0.6  # inches of width that labels at the left take
OWN_LEGEND = 1.2  # inches that a legend at the right of its axes takes
BELOW = 0.5  # inches of height that labels below take
LINE = 1.3  # height of a line over the size of its type
MOST_SHARED = 10  # labels that one legend for all axes may have
MOST_MARKERS = 45  # a line of more points has no markers, but where a point stands alone
Legend = dict[str, Any]  # label -> what it stands for: an artist of matplotlib, or several over one another


def draw(chart: Chart) -> matplotlib.figure.Figure:
    """The figure of a chart; called with our style in force."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(chart.columns or _columns(len(chart.panels)), len(chart.panels))
    width, height = _panel_size(chart, columns)
    shared = looks(_labels(chart.panels)) if _shares_legend(chart.panels) else None
    rows = [chart.panels[start : start + columns] for start in range(0, len(chart.panels), columns)]
    heights = [max(_axes_height(panel, height) for panel in row) for row in rows]
    inches = width - BESIDE - (OWN_LEGEND if shared is None else 0)
    around = [max(_around(panel, inches) for panel in row) for row in rows]
    title, model = wrapped(chart.title, columns * width, 1.1 * TITLE), wrapped(chart.model, columns * width, SMALL)
    top = 0.1 + (_points(title, TITLE) + (_points(model, SMALL) if model else 0)) / 72
    figure = Figure(figsize=(columns * width, top + sum(heights) + sum(around)), label=printable(chart.title))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
    legend: Legend = {}
    routes: list[tuple[matplotlib.axes.Axes, Route]] = []
    for place, panel in enumerate(chart.panels):
        row, column = divmod(place, columns)
        axes = figure.add_subplot(grid[row, column])
        look_of = looks(_labels([panel])) if shared is None else shared
        own, notes = _draw_panel(axes, panel, look_of, (inches, heights[row]))
        _name_axes(axes, chart.panels, place, columns, (inches, heights[row]))
        _head(axes, panel.title, "; ".join(notes), inches)
        if shared is None and own:
            axes.legend(
                list(own.values()),
                [wrapped(label, OWN_LEGEND, SMALL) for label in own],
                loc="upper left",
                bbox_to_anchor=(1, 1),
            )
        legend = {**own, **legend}
        routes += [] if panel.route is None else [(axes, panel.route)]
    _frame(figure, title, model, top, legend if shared is not None else {})
    if routes:
        figure.draw_without_rendering()  # where the axes lie, which the names have to know
    for axes, route in routes:
        name_heads(axes, route)
    return figure


# -- the grid ------------------------------------------------------------------------------------------------


def _columns(n: int) -> int:
    """Axes side by side where the chart does not say: 4 as 2 × 2, 12 as 3 rows of 4."""
    return {1: 1, 2: 2, 4: 2}.get(n, 4 if n % 4 == 0 or n > 9 else 3)


def _panel_size(chart: Chart, columns: int) -> tuple[float, float]:
    width, height = PANELS[min(columns, 4)]
    wide = any(panel.heat is not None or len(_names(panel)) > MANY for panel in chart.panels)
    width = WIDE if columns == 1 and wide else width
    return width + (0 if _shares_legend(chart.panels) else OWN_LEGEND), height


def _axes_height(panel: Panel, height: float) -> float:
    if panel.paths is not None:
        return max(height, min(5.0, 0.42 * (panel.paths.n_layers + 1)))
    if panel.heat is not None:
        return max(1.2, min(4.0, 0.12 * len(panel.heat.values)))
    if panel.route is not None:
        return max(1.2, min(5.6, 0.42 * (panel.route.n_layers + 1)))
    return 0.12 + 0.24 * len(panel.series) if _is_marks(panel) else height


def _around(panel: Panel, inches: float) -> float:
    """Inches above and below the axes, about: title, a note, numbers or names, the axis' name."""
    names = short(_names(panel))
    if panel.heat is not None and len(names) * LINE * SMALL / 72 > inches:
        names = []
    turned = max(inches_of(name, SMALL) for name in names) if crowded(names, inches) else 0.0
    return BELOW + turned + _points(wrapped(panel.title, inches, HEADING), HEADING) / 72 + LINE * SMALL / 72


def _names(panel: Panel) -> tuple[str, ...]:
    if panel.route is not None:
        return panel.route.names
    return panel.paths.tokens if panel.paths is not None else panel.x_names


def _is_marks(panel: Panel) -> bool:
    return any(one.kind == "marks" for one in panel.series)


def _labels(panels: Sequence[Panel]) -> list[str]:
    """Of what gets a colour of its own; the curve beside a map has a name below it instead."""
    series = [one for panel in panels if panel.heat is None for one in panel.series]
    return [one.label for one in series if one.kind in ("line", "bars")]


def _shares_legend(panels: Sequence[Panel]) -> bool:
    """One legend for all axes that have something to explain, where it stays short."""
    explained = [panel for panel in panels if panel.series and panel.heat is None]
    return len(panels) == 1 or (len(explained) > 1 and len(set(_labels(panels))) <= MOST_SHARED)


def _points(text: str, size: float) -> float:
    """Points that lines of text take."""
    return LINE * size * (text.count("\n") + 1) if text else 0.0


def _frame(figure: matplotlib.figure.Figure, title: str, model: str, top: float, legend: Legend) -> None:
    """Title and model on top, the legend below, between them the axes as matplotlib's own layout places them."""
    width, height = figure.get_size_inches()
    if legend:
        labels = [wrapped(label, width - 0.5, SMALL) for label in legend]
        longest = 0.45 + max(inches_of(line, SMALL) for label in labels for line in label.split("\n"))
        columns = max(1, min(len(legend), int(width / longest)))
        height += math.ceil(len(legend) / columns) * max(_points(label, SMALL) for label in labels) / 72
        figure.set_figheight(height)
        figure.legend(list(legend.values()), labels, loc="outside lower center", ncols=columns)
    left = 0.1 / width
    figure.text(left, 1 - 0.1 / height, title, va="top", fontsize=TITLE, fontweight="bold")
    below = 0.1 + _points(title, TITLE) / 72
    figure.text(left, 1 - below / height, model, va="top", fontsize=SMALL, color=SOFT)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - top / height), w_pad=0.07, h_pad=0.05)


def _head(axes: matplotlib.axes.Axes, title: str, note: str, inches: float) -> None:
    """Title and note over the axes, one above the other."""
    height = 4.0
    if note:
        text = wrapped(note, inches, SMALL)
        place: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (0, height), "textcoords": "offset points"}
        axes.annotate(text, (0, 1), **place, va="bottom", color=SOFT, fontsize=SMALL)
        height += _points(text, SMALL) + 2  # a title stands on its baseline: letters reach below it
    axes.set_title(wrapped(title, inches, HEADING), loc="left", pad=height)


def _name_axes(
    axes: matplotlib.axes.Axes, panels: Sequence[Panel], place: int, columns: int, size: tuple[float, float]
) -> None:
    """Names of the axes, said once where neighbours share them."""
    panel = panels[place]
    below = panels[place + columns] if place + columns < len(panels) else None
    beside = panels[place - 1] if place % columns else None
    if below is None or below.x_label != panel.x_label:
        axes.set_xlabel(wrapped(panel.x_label, size[0], LABEL))
    if beside is None or beside.y_label != panel.y_label:
        axes.set_ylabel(wrapped(panel.y_label, size[1] + 0.4, LABEL))


# -- what the axes hold --------------------------------------------------------------------------------------


def _draw_panel(
    axes: matplotlib.axes.Axes, panel: Panel, look_of: dict[str, Look], size: tuple[float, float]
) -> tuple[Legend, list[str]]:
    """Draw what the panel holds; returns its legend and all that is to be said below its title."""
    said = [panel.note] if panel.note else []
    if panel.paths is not None:
        return {}, [*said, draw_paths(axes, panel.paths, size)]
    if panel.heat is not None:
        return {}, [*said, *draw_heat(axes, panel, size[0])]
    if panel.route is not None:
        legend, note = draw_route(axes, panel.route, size[0])
        return legend, [*said, note]
    if _is_marks(panel):
        return _draw_marks(axes, panel, size), said
    if all(math.isnan(value) for one in panel.series for value in one.y):
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center", va="center", color=SOFT)
        axes.set(xticks=[], yticks=[])
        return {}, said
    legend, notes = _draw_numbers(axes, panel, look_of, size)
    return {label: handle for label, handle in legend.items() if label}, said + notes


def _draw_numbers(
    axes: matplotlib.axes.Axes, panel: Panel, look_of: dict[str, Look], size: tuple[float, float]
) -> tuple[Legend, list[str]]:
    """Draw every series; returns the legend's entries, and what has to be said of numbers off the axes."""
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
            legend[_label(one, look_of)] = _line(axes, one, x, y, _line_style(one, panel, look_of))
    if panel.reference is not None:
        value, label = panel.reference
        height = float(y.at([value])[0])
        legend[printable(label)] = axes.axhline(height, color="#3a3f45", linewidth=0.9, linestyle=(0, (4, 2.5)))
    return legend, notes


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
        y = Scale("linear", 0.0, y.top, integer=y.integer)  # bars stand on the axis
    return scale(panel.x_axis, xs, margin=0.03), y, [note for note, holds in said.items() if holds]


def _label(one: Series, look_of: dict[str, Look]) -> str:
    """In the legend; what belongs to a line carries the line's name and says what it is."""
    label = printable(one.label)
    if one.kind == "published":
        return label if label.startswith("paper") else f"paper ({label})"
    return f"{label}: rounding alone" if one.kind == "floor" and one.label in look_of else label


def _line_style(one: Series, panel: Panel, look_of: dict[str, Look]) -> dict[str, Any]:
    look = look_of.get(one.label)
    if one.kind == "line" and look is not None:
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


def _line(axes: matplotlib.axes.Axes, one: Series, x: Scale, y: Scale, style: dict[str, Any]) -> Any:
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


def _bars(axes: matplotlib.axes.Axes, one: Series, x: Scale, width: float, look: Look, first: bool) -> Any:
    """A histogram as one outline, 0 between bars that do not touch; the first is filled, the others lie over it."""
    values: list[float] = []
    edges: list[float] = []
    for at, height in sorted(zip(x.at(one.x).tolist(), one.y, strict=True)):
        left, right = at - width / 2, at + width / 2
        if not edges:
            edges.append(left)
        elif left - edges[-1] > width / 4:
            values.append(0.0)
            edges.append(left)
        values.append(float(height))
        edges.append(right)
    if first:
        return axes.stairs(values, edges, fill=True, color=look.colour, alpha=0.35, linewidth=0, zorder=2)
    return axes.stairs(values, edges, edgecolor=look.colour, linewidth=1.1 if len(one.x) <= 60 else 0.7, zorder=3)


def _draw_marks(axes: matplotlib.axes.Axes, panel: Panel, size: tuple[float, float]) -> Legend:
    """A row of ✓ and ✗ for each series, the first on top; nan leaves its place empty. Returns the legend's entries."""
    x = scale(panel.x_axis, [value for one in panel.series for value in one.x], margin=0.04)
    put(axes, "x", x, size[0], panel.x_names)
    most = max(len(set(one.x)) for one in panel.series)
    legend: Legend = {}
    for row, one in enumerate(panel.series):
        for mark, label, colour in ((1, "right", RIGHT), (0, "wrong", WRONG)):
            at = x.at([value for value, each in zip(one.x, one.y, strict=True) if each == mark])
            if len(at):
                style: dict[str, Any] = {"marker": _glyph("✓" if mark else "✗"), "color": colour, "markeredgewidth": 0}
                style |= {"linestyle": "none", "clip_on": False, "markersize": min(7.5, 58 * size[0] / max(most, 8))}
                (legend[label],) = axes.plot(at, [row] * len(at), **style)
    names = [wrapped(one.label, 1.3, SMALL) for one in panel.series]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.hlines(range(len(names)), 0, 1, transform=axes.get_yaxis_transform(), color="#eceef0", linewidth=0.5, zorder=0)
    return legend


@cache
def _glyph(character: str) -> matplotlib.path.Path:
    """The character's outline around its middle, as a marker."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    path = TextPath((0, 0), character, size=10, prop=FontProperties(family="DejaVu Sans", weight="bold"))
    box = path.get_extents()
    return path.transformed(Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2))
