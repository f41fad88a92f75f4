"""A chart's panels on one sheet: grid, titles, notes and legends, measured so that nothing covers anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from oversquash_lens.viz.chart import Chart, Panel
from oversquash_lens.viz.drawings import draw_marks, draw_paths
from oversquash_lens.viz.maps import draw_map, map_width, named_columns
from oversquash_lens.viz.panels import Legend, draw_numbers, is_known
from oversquash_lens.viz.routes import draw_route, names_height
from oversquash_lens.viz.scales import crowded, short
from oversquash_lens.viz.style import HEADING, LABEL, SMALL, SOFT, TITLE, Look, inches_of, looks, printable, wrapped

PANELS = {1: (5.0, 2.4), 2: (3.6, 1.75), 3: (2.9, 1.5), 4: (2.6, 1.3)}  # inches: width with labels, height of the axes
WIDE, MANY = 7.2, 12  # width of a single panel with many names below its axis, and how many these are
BESIDE = 0.6  # inches of a panel's width that its labels take
BELOW = 0.5  # inches that they take below
EDGE = 0.1  # inches of white paper all around
MOST_SHARED = 10  # labels that one legend for all panels may have
LEADING = 1.3  # height of a line over the size of its type


def draw_sheet(chart: Chart) -> Any:
    """The whole figure; called with our style in force."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(chart.panels)
    columns = min(chart.columns or _columns(n), n)
    width, height = _panel_size(chart, columns)
    heights = [
        max(_axes_height(panel, height) for panel in chart.panels[start : start + columns])
        for start in range(0, n, columns)
    ]
    figure = Figure(figsize=(columns * width, sum(heights)), label=printable(chart.title))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    shared = looks(_labels(chart.panels)) if _shares_legend(chart.panels) else None
    legends: Legend = {}
    around = [0.0] * len(heights)  # inches above and below the axes of each row
    for place, panel in enumerate(chart.panels):
        row, column = divmod(place, columns)
        axes = figure.add_subplot(grid[row, column])
        inches = width - BESIDE
        size = (inches if panel.heat is None else map_width(panel, inches), heights[row])
        legend, note = _draw(axes, panel, looks(_labels([panel])) if shared is None else shared, size)
        legends = {**legend, **legends}
        head = _head(axes, panel.title, note, legend if shared is None else {}, size[0])
        _name_axes(axes, chart.panels, place, columns, size)
        around[row] = max(around[row], head / 72 + BELOW + _names_height(panel, size[0]))
    _frame(figure, chart, {} if shared is None else legends, sum(heights) + sum(around))
    return figure


def _columns(n: int) -> int:
    """Panels side by side where the chart does not say: 4 as 2 × 2, 12 as 3 rows of 4."""
    return {1: 1, 2: 2, 4: 2}.get(n, 4 if n % 4 == 0 or n > 9 else 3)


def _panel_size(chart: Chart, columns: int) -> tuple[float, float]:
    width, height = PANELS[min(columns, 4)]
    wide = any(panel.heat is not None or len(_names(panel)) > MANY for panel in chart.panels)
    return (WIDE if columns == 1 and wide else width), height


def _axes_height(panel: Panel, height: float) -> float:
    if panel.paths is not None:
        return max(height, min(5.0, 0.42 * (panel.paths.n_layers + 1)))
    if panel.heat is not None:
        return max(1.2, min(4.0, 0.12 * len(panel.heat.values)))
    if panel.route is not None:
        return max(1.2, min(5.6, 0.42 * (panel.route.n_layers + 1)))
    return 0.12 + 0.24 * len(panel.series) if _is_marks(panel) else height


def _names(panel: Panel) -> tuple[str, ...]:
    if panel.route is not None:
        return panel.route.names
    return panel.paths.tokens if panel.paths is not None else panel.x_names


def _names_height(panel: Panel, inches: float) -> float:
    """What names need below the axis beyond a line of numbers."""
    if panel.route is not None:
        return names_height(panel.route, inches)
    names = short(_names(panel) if panel.heat is None else named_columns(panel, inches))
    return max(inches_of(name, SMALL) for name in names) if crowded(names, inches) else 0.0


def _is_marks(panel: Panel) -> bool:
    return any(one.kind == "marks" for one in panel.series)


def _labels(panels: Sequence[Panel]) -> list[str]:
    """Of what gets a colour of its own; the curve beside a map has a name below it instead."""
    series = [one for panel in panels if panel.heat is None for one in panel.series]
    return [one.label for one in series if one.kind in ("line", "bars")]


def _shares_legend(panels: Sequence[Panel]) -> bool:
    """One legend for all panels that have something to explain, where it stays short."""
    explained = [panel for panel in panels if panel.series and panel.heat is None]
    return len(panels) == 1 or (len(explained) > 1 and len(set(_labels(panels))) <= MOST_SHARED)


def _draw(axes: Any, panel: Panel, look_of: dict[str, Look], size: tuple[float, float]) -> tuple[Legend, str]:
    """Draw what the panel holds; returns its legend and all that is to be said below its title."""
    legend: Legend = {}
    notes = [panel.note] if panel.note else []
    if panel.paths is not None:
        notes.append(draw_paths(axes, panel.paths, size))
    elif panel.heat is not None:
        notes += draw_map(axes, panel, size)
    elif panel.route is not None:
        legend, said = draw_route(axes, panel.route, size)
        notes.append(said)
    elif _is_marks(panel):
        legend = draw_marks(axes, panel, size)
    elif is_known(panel):
        legend, said = draw_numbers(axes, panel, look_of, size)
        notes += said
    else:
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center", va="center", color=SOFT)
        axes.set_xticks([])
        axes.set_yticks([])
    return {label: handle for label, handle in legend.items() if label}, "; ".join(notes)


def _head(axes: Any, title: str, note: str, legend: Legend, inches: float) -> float:
    """Legend, note and title over the axes, one above the other; returns their height in points."""
    height = 4.0
    if legend:
        height += 2 + _legend(
            axes, legend, inches, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3, borderpad=0
        )
    if note:
        text = wrapped(note, inches, SMALL)
        place = {"xycoords": "axes fraction", "xytext": (0, height), "textcoords": "offset points"}
        axes.annotate(text, (0, 1), **place, va="bottom", color=SOFT, fontsize=SMALL, linespacing=LEADING - 0.1)
        height += _height(text, SMALL) + 1
    if title:
        text = wrapped(title, inches, HEADING)
        axes.set_title(text, loc="left", pad=height, fontsize=HEADING)
        height += _height(text, HEADING)
    return height


def _height(text: str, size: float) -> float:
    """Points that lines of text take."""
    return LEADING * size * (text.count("\n") + 1)


def _legend(parent: Any, legend: Legend, inches: float, **where: Any) -> float:
    """Put a legend on axes or figure, in as many columns as the width holds; returns its height in points."""
    dpi = parent.get_figure().dpi
    for rows in range(1, len(legend) + 1):
        columns = math.ceil(len(legend) / rows)
        reading = [i for column in range(columns) for i in range(column, len(legend), columns)]  # row after row
        labels = [wrapped(list(legend)[i], min(inches, 3.2) - 0.4, SMALL) for i in reading]
        drawn = parent.legend([list(legend.values())[i] for i in reading], labels, ncols=columns, **where)
        box = drawn.get_window_extent()
        if box.width <= inches * dpi or columns == 1:
            break
        drawn.remove()
    return box.height * 72 / dpi


def _name_axes(axes: Any, panels: Sequence[Panel], place: int, columns: int, size: tuple[float, float]) -> None:
    """Names of the axes, said once where neighbours share them."""
    panel = panels[place]
    below = panels[place + columns] if place + columns < len(panels) else None
    beside = panels[place - 1] if place % columns else None
    if below is None or below.x_label != panel.x_label:
        axes.set_xlabel(wrapped(panel.x_label, size[0], LABEL))
    if beside is None or beside.y_label != panel.y_label:
        axes.set_ylabel(wrapped(panel.y_label, size[1] + 0.4, LABEL))


def _frame(figure: Any, chart: Chart, legend: Legend, body: float) -> None:
    """Title and model on top, legend at the bottom, and between them the panels, `body` inches high."""
    width = figure.get_figwidth() - 2 * EDGE
    title, model = wrapped(chart.title, width, TITLE, bold=True), wrapped(chart.model, width, SMALL)
    under = EDGE + _height(title, TITLE) / 72
    top = under + (_height(model, SMALL) / 72 if model else 0) + 0.04
    points = 0.0
    if legend:
        points = _legend(figure, legend, width, loc="lower center", bbox_to_anchor=(0.5, 0), borderaxespad=0.4)
    bottom = points / 72 + EDGE / 2
    height = top + body + bottom
    figure.set_figheight(height)
    left = EDGE / figure.get_figwidth()
    figure.text(left, 1 - EDGE / height, title, va="top", fontsize=TITLE, fontweight="bold")
    figure.text(left, 1 - under / height, model, va="top", fontsize=SMALL, color=SOFT)
    panels = (0, bottom / height, 1, 1 - (top + bottom) / height)
    figure.set_layout_engine("constrained", rect=panels, w_pad=0.7 * EDGE, h_pad=EDGE / 2, wspace=0.02, hspace=0.03)
