"""Axes that hold no curves: causal paths as a layered graph, a map of shares, the route of a share through layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from oversquash_lens.viz.chart import Heat, Panel, Paths, Route
from oversquash_lens.viz.style import (
    COLOURS,
    FAINT,
    INK,
    LABEL,
    RAMP,
    SMALL,
    SOFT,
    TURNED,
    crowded,
    inches_of,
    printable,
    put,
    put_counts,
    scale,
    short,
    wrapped,
)
from oversquash_lens.viz.words import axis_number, visible_token

if TYPE_CHECKING:
    import matplotlib.axes

STAYS, MOVES, GATHERED = COLOURS[0], COLOURS[1], "#a9afb6"
MOVED = "moves, by layer.head (+: with other heads)"
MOST_COLUMNS = 512  # of one map; of a wider one, each column is the largest of a few
ASIDE = 0.75  # inches of width of what stands beside a map
PIXELS = 2048  # of a map's longer side, about
WIDEST, HAIRLINE = 26.0, 0.3  # points: the line that all of a flow runs through, and the thinnest one
NAME = SMALL - 1.0  # type of the heads' names

# -- causal paths --------------------------------------------------------------------------------------------


def draw_paths(axes: matplotlib.axes.Axes, paths: Paths, size: tuple[float, float]) -> str:
    """Tokens from left to right, layers upwards, each edge as strong as the number of paths over it.

    Returns the sentence that says how many there are. A node holds the number of paths through it, where it fits.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb

    edges = [edge for edge in paths.edges if edge[3] > 0]
    most = max((count for *_, count in edges), default=1.0)
    spacing = 72 * min(size[0] / len(paths.tokens), size[1] / (paths.n_layers + 1))  # of nodes, in points
    lines = LineCollection(
        [((source, layer), (destination, layer + 1)) for layer, source, destination, _ in edges],
        linewidths=[min(1.0, spacing / 25) * (0.5 + 3.0 * count / most) for *_, count in edges],
        colors=[(*to_rgb(COLOURS[0]), 0.25 + 0.65 * count / most) for *_, count in edges],
        capstyle="round",
        zorder=2,
    )
    axes.add_collection(lines, autolim=False)
    _draw_nodes(axes, paths, spacing)
    names = [visible_token(token) for token in paths.tokens]
    put(axes, "x", scale("linear", [-0.45, len(names) - 0.55], margin=0.0), size[0], names)
    axes.set_ylim(-0.4, paths.n_layers + 0.4)
    floors = range(0, paths.n_layers + 1, math.ceil(paths.n_layers / 8))
    axes.set_yticks(floors, ["embeddings" if floor == 0 else f"after layer {floor - 1}" for floor in floors])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return f"{axis_number(paths.total)} paths from {short(names)[paths.token]} to the last token"


def _draw_nodes(axes: matplotlib.axes.Axes, paths: Paths, spacing: float) -> None:
    """`spacing` of the nodes in points; those on no path are small and grey, numbers stand in all others or in none."""
    through = {(paths.token, 0): paths.total}
    for layer, _, destination, count in paths.edges:
        through[destination, layer + 1] = through.get((destination, layer + 1), 0) + count
    diameter = min(17.0, 0.55 * spacing)
    written = diameter > max(SMALL, *(0.62 * SMALL * len(axis_number(count)) for count in through.values()))
    fills = {(paths.token, 0): COLOURS[1], (len(paths.tokens) - 1, paths.n_layers): COLOURS[0]}
    for position in range(len(paths.tokens)):
        for floor in range(paths.n_layers + 1):
            count = through.get((position, floor), 0)
            fill = fills.get((position, floor), "white")
            edge = (INK if count else "#c8ccd0") if fill == "white" else fill
            style: dict[str, Any] = {
                "markerfacecolor": fill,
                "markeredgecolor": edge,
                "markeredgewidth": 0.7,
                "zorder": 3,
            }
            axes.plot(position, floor, "o", markersize=diameter if count else min(4, diameter), clip_on=False, **style)
            if count and written:
                style = {"color": INK if fill == "white" else "white", "fontsize": SMALL - 0.5, "zorder": 4}
                axes.text(position, floor, axis_number(count), ha="center", va="center_baseline", **style)


# -- a map ---------------------------------------------------------------------------------------------------


def draw_heat(axes: matplotlib.axes.Axes, panel: Panel, inches: float) -> list[str]:
    """Draw map, colour bar, and what stands beside it; returns what has to be said of it. `inches` of width, about."""
    heat, figure, place = panel.heat, axes.get_figure(), axes.get_subplotspec()
    assert heat is not None
    assert figure is not None
    assert place is not None
    values, together = _binned(np.asarray(heat.values, float))
    image = _draw_cells(axes, heat, values)
    columns = len(heat.values[0])
    names = short(panel.x_names)
    if names and len(names) * 1.15 * SMALL / 72 <= inches - 1.4:
        axes.set_xticks(range(columns), names, **TURNED if crowded(names, inches - 1.4) else {})
        axes.tick_params(axis="x", length=1.5, pad=2)
    else:
        put_counts(axes, "x", columns)
    put_counts(axes, "y", len(values))
    axes.spines[:].set(visible=True, color=SOFT)
    beside = [axes]
    if panel.series:
        places = place.subgridspec(1, 2, width_ratios=[1, ASIDE / (inches - ASIDE)], wspace=0.02)
        axes.set_subplotspec(places[0])
        beside.append(figure.add_subplot(places[1], sharey=axes))
        one = panel.series[0]
        beside[1].plot(one.y, one.x, color=COLOURS[0], linewidth=1.2, marker="o" if len(one.x) <= 45 else None, ms=1.8)
        put(beside[1], "x", scale("linear", one.y, margin=0.06, from_zero=True), ASIDE)
        beside[1].set_xlabel(wrapped(one.label, ASIDE, LABEL))
        beside[1].grid(axis="x", color=FAINT)
        beside[1].tick_params(axis="y", labelleft=False, length=0)
    tens = [10.0**power for power in range(math.floor(math.log10(1.5 * heat.low)) + 1, 309)]
    inside = [ten for ten in tens if ten < heat.high / 1.5]
    bar = figure.colorbar(image, ax=beside, ticks=[heat.low, *inside, heat.high], aspect=25, fraction=0.1, pad=0.01)
    bar.ax.set_yticklabels(
        [f"≤ {axis_number(float(f'{heat.low:.2g}'))}", *map(axis_number, inside), axis_number(heat.high)]
    )
    bar.ax.minorticks_off()
    bar.outline.set(edgecolor=SOFT, linewidth=0.6)
    bar.set_label(printable(heat.label))
    notes = [f"each column shows the largest of {together} positions"] if together > 1 else []
    return notes + (["grey: not known"] if np.isnan(values).any() else [])


def _binned(values: Float[np.ndarray, "row column"]) -> tuple[Float[np.ndarray, "row bin"], int]:
    """As many columns as paper and screen can show; a bin has its largest number, so that no peak is lost."""
    together = math.ceil(values.shape[1] / MOST_COLUMNS)
    starts = np.arange(0, values.shape[1], together)
    return np.fmax.reduceat(values, starts, axis=1) if together > 1 else values, together


def _draw_cells(axes: matplotlib.axes.Axes, heat: Heat, values: Float[np.ndarray, "row column"]) -> Any:
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


# -- a route -------------------------------------------------------------------------------------------------


def draw_route(axes: matplotlib.axes.Axes, route: Route, inches: float) -> tuple[dict[str, Any], str]:
    """Positions from left to right, layers upwards, lines as wide as the share that runs there, on one scale.

    Returns the legend's entries, and how to read the lines.
    """
    widest = _widest(route, inches)
    legend = _draw_lines(axes, route, widest)
    ends = [(len(route.names) - 1, route.n_layers)] + ([] if route.source is None else [(route.source, 0)])
    for stop, floor in ends:
        axes.plot(stop, floor, "o", color=INK, markersize=5.0, zorder=4, clip_on=False)
    names = [
        printable(name).replace(", ", ",\n", 1) if route.is_gathered(stop) else short([name])[0]
        for stop, name in enumerate(route.names)
    ]
    lines = [max(name.split("\n"), key=len) for name in names]
    axes.set_xticks(range(len(names)), names, **TURNED if crowded(lines, inches) else {})
    for stop, label in enumerate(axes.get_xticklabels()):
        if route.is_gathered(stop) or not any(shares[stop] for shares in route.node):
            label.set_color(SOFT)
    put_counts(axes, "y", route.n_layers + 1)
    axes.set(xlim=(-0.55, len(names) - 0.45), ylim=(-0.35, route.n_layers + 0.35))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    said = f"a line is as wide as its share, or as {HAIRLINE / widest:.1%} where that is less"
    if route.left_out > 0.0005:
        said += f"; shares below {route.least:.1%} are not drawn, together at most {route.left_out:.1%} of a layer"
    return legend, said


def _widest(route: Route, inches: float) -> float:
    return min(WIDEST, 0.6 * 72 * inches / len(route.names))


def _draw_lines(axes: matplotlib.axes.Axes, route: Route, widest: float) -> dict[str, Any]:
    """What moves lies over what stays: a thin line over a wide one is seen, the other way round it is lost."""
    from matplotlib.collections import LineCollection

    seam = 0.02  # layers that lines overlap by, so that no viewer leaves a hair of white between them
    kinds: dict[str, tuple[str, list, list]] = {
        "stays": (STAYS, [], []),
        "stays among the gathered": (GATHERED, [], []),
        MOVED: (MOVES, [], []),
    }
    for layer, shares in enumerate(route.stays):
        for stop, share in enumerate(shares):
            _, lines, widths = kinds["stays among the gathered" if route.is_gathered(stop) else "stays"]
            if share >= route.least:
                lines.append(((stop, layer - seam), (stop, layer + 1 + seam)))
                widths.append(max(HAIRLINE, widest * share))
    for layer, source, to, share, _ in route.moves:
        kinds[MOVED][1].append(((source, layer), (to, layer + 1)))
        kinds[MOVED][2].append(max(HAIRLINE, widest * share))
    legend = {}
    for order, (name, (colour, lines, widths)) in enumerate(kinds.items()):
        if lines:
            drawn = LineCollection(lines, linewidths=widths, colors=colour, zorder=2 + order / 10)
            axes.add_collection(drawn, autolim=False)
            (legend[name],) = axes.plot([], [], color=colour, linewidth=2.0)
    return legend


def name_heads(axes: matplotlib.axes.Axes, route: Route) -> None:
    """Write each move's head (layer.head) on its line, strong moves first, where it covers no other line or name.

    Called when the layout is done. A name interrupts its own line, as in a contour map.
    """
    figure = axes.get_figure()
    assert figure is not None
    points = 72 / figure.dpi
    lines = [(line, half) for each in axes.collections for line, half in _sampled(axes, each, points)]
    moves = lines[len(lines) - len(route.moves) :]  # what moves was drawn last
    taken: list[Float[np.ndarray, " end xy"]] = []
    for i in sorted(range(len(moves)), key=lambda i: -route.moves[i][3]):
        head, (line, _) = route.moves[i][-1], moves[i]
        half = np.array([72 * inches_of(head, NAME) / 2 + 1.0, 0.5 * NAME])
        for part in (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8):
            middle = line[round(part * (len(line) - 1))]
            others = (other for other in lines if other[0] is not line)
            if any(_touches(middle, half, other, width) for other, width in others):
                continue
            if any((np.abs(middle - other) < 2 * half).all() for other in taken):
                continue
            taken.append(middle)
            x, y = axes.transData.inverted().transform(middle / points)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
            axes.text(x, y, head, fontsize=NAME, ha="center", va="center", zorder=5, bbox=box)
            break


def _sampled(
    axes: matplotlib.axes.Axes, lines: Any, points: float
) -> list[tuple[Float[np.ndarray, "sample xy"], float]]:
    """Each line of a collection as 200 places along it, in points, and half its width."""
    along = np.linspace(0, 1, 200)[:, None]
    ends = [points * axes.transData.transform(segment) for segment in lines.get_segments()]
    return [
        (end[0] * (1 - along) + end[1] * along, width / 2)
        for end, width in zip(ends, lines.get_linewidths(), strict=True)
    ]


def _touches(
    middle: Float[np.ndarray, " xy"],
    half: Float[np.ndarray, " xy"],
    line: Float[np.ndarray, "sample xy"],
    width: float,
) -> bool:
    """Whether a box (middle, half its size) meets a line (places along it, half its width)."""
    return bool((np.abs(line - middle) < half + width).all(-1).any())
