"""A map of shares as one picture with its colour bar, and a narrow pair of axes beside it for a number per row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from oversquash_lens.viz.chart import Panel, Series
from oversquash_lens.viz.diagrams import Heat
from oversquash_lens.viz.panels import MOST_MARKERS
from oversquash_lens.viz.scales import TURNED, crowded, number, put, put_counts, scale, short
from oversquash_lens.viz.style import COLOURS, FAINT, LABEL, RAMP, SMALL, SOFT, wrapped

ASIDE, BAR = 0.75, 0.1  # inches: width of the axes beside a map, and of its colour bar
AROUND = 0.55  # inches that the colour bar's labels take
MOST_COLUMNS = 512  # of one map; of a wider one, each column is the largest of a few
PIXELS = 2048  # of a picture's longer side, about
LINE = 1.15  # height of a turned name over the size of its type


def map_width(panel: Panel, inches: float) -> float:
    """What is left for the map itself."""
    return inches - BAR - AROUND - (ASIDE + 0.1 if panel.series else 0.0)


def draw_map(axes: Any, panel: Panel, size: tuple[float, float]) -> list[str]:
    """Draw map, colour bar, and what stands beside it; returns what has to be said of it. `size` is the map's own."""
    figure, heat = axes.get_figure(), panel.heat
    widths = [size[0], ASIDE, BAR] if panel.series else [size[0], BAR]
    places = axes.get_subplotspec().subgridspec(1, len(widths), width_ratios=widths, wspace=0.02)
    axes.set_subplotspec(places[0])
    values, together = _binned(np.asarray(heat.values, float))
    image = _draw_cells(axes, heat, values)
    _name_columns(axes, panel, len(heat.values[0]), size[0])
    put_counts(axes, "y", len(values), size[1])
    axes.spines[:].set(visible=True, color=SOFT)
    if panel.series:
        _draw_beside(figure.add_subplot(places[1], sharey=axes), panel.series[0])
    _draw_bar(figure.add_subplot(places[len(widths) - 1]), image, heat, size[1])
    notes = [f"each column shows the largest of {together} positions"] if together > 1 else []
    return notes + (["grey: not known"] if np.isnan(values).any() else [])


def named_columns(panel: Panel, inches: float) -> tuple[str, ...]:
    """Names of the columns where all of them fit below the map, else none: numbers stand there."""
    names = panel.x_names
    return names if len(names) * LINE * SMALL / 72 <= inches else ()


def _binned(values: Float[np.ndarray, "row column"]) -> tuple[Float[np.ndarray, "row bin"], int]:
    """As many columns as paper and screen can show; a bin has its largest number, so that no peak is lost."""
    together = math.ceil(values.shape[1] / MOST_COLUMNS)
    starts = np.arange(0, values.shape[1], together)
    return np.fmax.reduceat(values, starts, axis=1) if together > 1 else values, together


def _draw_cells(axes: Any, heat: Heat, values: Float[np.ndarray, "row column"]) -> Any:
    """All cells as one picture, each of many pixels: a viewer that smooths pictures then blurs no more than edges."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    times = max(1, min(16, PIXELS // max(values.shape)))
    rows, columns = len(values), len(heat.values[0])
    return axes.imshow(
        np.clip(values, heat.low, heat.high).repeat(times, 0).repeat(times, 1),
        cmap=LinearSegmentedColormap.from_list("shares", RAMP).with_extremes(bad="#b9bdc2"),
        norm=LogNorm(heat.low, heat.high),
        origin="lower",
        extent=(-0.5, columns - 0.5, -0.5, rows - 0.5),
        aspect="auto",
        interpolation="none",
    )


def _name_columns(axes: Any, panel: Panel, columns: int, inches: float) -> None:
    names = short(named_columns(panel, inches))
    if names:
        axes.set_xticks(range(columns), names, **TURNED if crowded(names, inches) else {})
        axes.tick_params(axis="x", length=1.5, pad=2)
    else:
        put_counts(axes, "x", columns, inches)


def _draw_beside(axes: Any, one: Series) -> None:
    """One number per row, on the map's own rows."""
    marker = "o" if len(one.x) <= MOST_MARKERS else None
    axes.plot(one.y, one.x, color=COLOURS[0], linewidth=1.2, marker=marker, markersize=1.8)
    put(axes, "x", scale("linear", one.y, margin=0.06, from_zero=True), ASIDE)
    axes.set_xlabel(wrapped(one.label, ASIDE, LABEL))
    axes.grid(axis="x", color=FAINT)
    axes.tick_params(axis="y", labelleft=False, length=0)


def _draw_bar(axes: Any, image: Any, heat: Heat, inches: float) -> None:
    """The key to the colours: both ends, and every power of ten between them."""
    powers = [10.0**power for power in range(math.floor(math.log10(1.5 * heat.low)) + 1, 309)]
    inside = [ten for ten in powers if ten < heat.high / 1.5]
    bar = axes.get_figure().colorbar(image, cax=axes, ticks=[heat.low, *inside, heat.high])
    bar.ax.set_yticklabels([f"≤ {number(float(f'{heat.low:.2g}'))}", *map(number, inside), number(heat.high)])
    bar.ax.minorticks_off()
    bar.outline.set(edgecolor=SOFT, linewidth=0.6)
    bar.set_label(wrapped(heat.label, inches + 0.2, LABEL))
