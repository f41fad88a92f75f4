"""A route as a drawing: positions from left to right, layers upwards, lines as wide as the share that runs there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float

from oversquash_lens.viz.diagrams import Route
from oversquash_lens.viz.scales import TURNED, put_counts, short
from oversquash_lens.viz.style import COLOURS, INK, SMALL, SOFT, inches_of, printable

STAYS, MOVES, GATHERED = COLOURS[0], COLOURS[1], "#a9afb6"
MOVED = "moves, by layer.head (+: with other heads)"
WIDEST = 26.0  # points: the line that all of a flow runs through
TYPE = SMALL - 1.0  # of the heads' names
HAIRLINE = 0.3  # points: the thinnest line
SEAM = 0.02  # layers that lines overlap by, so that no viewer leaves a hair of white between them
POINTS = 120  # at which a line is looked at when a name seeks a place
PLACES = (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8)  # along a line, for its head's name


def draw_route(axes: Any, route: Route, size: tuple[float, float]) -> tuple[dict[str, Any], str]:
    """Draw stops, layers, what stays and what moves; returns the legend's entries, and how to read the lines.

    A line is as wide as its share, on one scale; a move carries its head's name (layer.head) where it covers nothing.
    """
    stops, floors = len(route.names), route.n_layers
    unit = np.array([72 * size[0] / (stops + 0.1), 72 * size[1] / (floors + 0.7)])  # points of one stop, one layer
    widest = min(WIDEST, 0.6 * unit[0])
    legend = _draw_lines(axes, route, widest)
    for stop, floor in _ends(route):
        axes.plot(stop, floor, "o", color=INK, markersize=min(5.0, 0.6 * unit[1]), zorder=4, clip_on=False)
    for x, y, head, inside in head_labels(route, unit, widest):
        colour = "white" if inside else INK
        axes.text(x, y, head, fontsize=TYPE, color=colour, ha="center", va="center_baseline", zorder=5)
    _name_axes(axes, route, size)
    said = f"a line is as wide as its share, or as {HAIRLINE / widest:.1%} where that is less"
    if route.left_out > 0.0005:
        said += f"; shares below {route.least:.1%} are not drawn, together at most {route.left_out:.1%} of a layer"
    return legend, said


def stop_names(route: Route) -> list[str]:
    """One line for a position, two for a run of gathered ones."""
    return [
        printable(name).replace(", ", ",\n", 1) if route.is_gathered(stop) else short([name])[0]
        for stop, name in enumerate(route.names)
    ]


def names_height(route: Route, inches: float) -> float:
    """Inches that the names need below the axis beyond a line."""
    names = stop_names(route)
    if _is_turned(names, inches):
        return max(_inches(name) for name in names)
    return max(name.count("\n") for name in names) * 1.3 * SMALL / 72


def _is_turned(names: Sequence[str], inches: float) -> bool:
    return max(map(_inches, names)) > inches / len(names) - 0.08


def _inches(name: str) -> float:
    return max(inches_of(line, SMALL) for line in name.split("\n"))


def _draw_lines(axes: Any, route: Route, widest: float) -> dict[str, Any]:
    """What moves lies over what stays: a thin line over a wide one is seen, the other way round it is lost."""
    from matplotlib.collections import LineCollection

    kinds: dict[str, tuple[str, list, list]] = {
        "stays": (STAYS, [], []),
        "stays among the gathered": (GATHERED, [], []),
        MOVED: (MOVES, [], []),
    }
    for layer, shares in enumerate(route.stays):
        for stop, share in enumerate(shares):
            _, lines, widths = kinds["stays among the gathered" if route.is_gathered(stop) else "stays"]
            if share >= route.least:
                lines.append(((stop, layer - SEAM), (stop, layer + 1 + SEAM)))
                widths.append(max(HAIRLINE, widest * share))
    for layer, source, to, share, _ in route.moves:
        kinds[MOVED][1].append(((source, layer), (to, layer + 1)))
        kinds[MOVED][2].append(max(HAIRLINE, widest * share))
    legend = {}
    for place, (name, (colour, lines, widths)) in enumerate(kinds.items()):
        if lines:
            drawn = LineCollection(lines, linewidths=widths, colors=colour, zorder=2 + place / 10)
            axes.add_collection(drawn, autolim=False)
            (legend[name],) = axes.plot([], [], color=colour, linewidth=2.0)
    return legend


def head_labels(route: Route, unit: Float[np.ndarray, " xy"], widest: float) -> list[tuple[float, float, str, bool]]:
    """Heads' names and where they stand (stop, layer, name, whether inside the line), those of strong moves first.

    In a line that is wide enough, else beside it, and on no other line.
    """
    lines = np.array([((source, layer), (to, layer + 1)) for layer, source, to, *_ in route.moves], float)
    if not len(lines):
        return []
    along = np.linspace(0, 1, POINTS)[:, None]
    points = (lines[:, None, 0] * (1 - along) + lines[:, None, 1] * along) * unit
    half = np.array([max(HAIRLINE, widest * share) / 2 for *_, share, _ in route.moves])
    layers = np.array([move[0] for move in route.moves])
    bands, names = _bands(route, unit, widest), np.empty((0, 4))
    found = []
    for i in np.argsort(-half, kind="stable"):
        head = route.moves[i][-1]
        near = np.abs(layers - layers[i]) <= 1
        extent = np.array([inches_of(head, TYPE) * 72 / 2 + 0.8, 0.42 * TYPE])
        for middle, inside in _along(lines[i] * unit, half[i], extent):
            others = near & (np.arange(len(near)) != i) if inside else near  # inside it covers its own line, no other
            taken = names if inside else np.vstack([bands, names])
            if _is_free(middle, extent, taken, points[others], half[others]):
                names = np.vstack([names, [*middle, *extent]])
                found.append((*(middle / unit).tolist(), head, inside))
                break
    return found


def _bands(route: Route, unit: Float[np.ndarray, " xy"], widest: float) -> Float[np.ndarray, "box 4"]:
    """Boxes (middle, half the size, in points) that what stays takes, and the rows of marks at both ends."""
    boxes = [
        (stop * unit[0], (layer + 0.5) * unit[1], widest * share / 2 + 0.5, unit[1] / 2)
        for layer, shares in enumerate(route.stays)
        for stop, share in enumerate(shares)
        if share >= route.least
    ]
    ends = [(stop * unit[0], floor * unit[1], 3.5, 3.5) for stop, floor in _ends(route)]
    return np.array([*boxes, *ends], float)


def _along(
    line: Float[np.ndarray, "end xy"], half: float, extent: Float[np.ndarray, " xy"]
) -> Iterator[tuple[Float[np.ndarray, " xy"], bool]]:
    """Middles of boxes, and whether they lie inside the line: there if it is wide enough, else touching it."""
    run = line[1] - line[0]
    normal = np.array([-run[1], run[0]]) / np.hypot(*run)
    away = np.abs(normal) @ extent + half + 0.4
    sides = (0, 1, -1) if half > extent[1] else (1, -1)
    for inside in (True, False):
        for place, side in product(PLACES, sides):
            if inside == (side == 0):
                yield line[0] + place * run + side * away * normal, inside


def _is_free(
    middle: Float[np.ndarray, " xy"],
    extent: Float[np.ndarray, " xy"],
    taken: Float[np.ndarray, "box 4"],
    points: Float[np.ndarray, "line point xy"],
    half: Float[np.ndarray, " line"],
) -> bool:
    """Whether a box touches neither a box that is taken nor a line (points along it, half its width)."""
    boxes = np.abs(taken[:, :2] - middle) < taken[:, 2:] + extent
    lines = np.abs(points - middle) < extent + half[:, None, None]
    return not boxes.all(-1).any() and not lines.all(-1).any()


def _ends(route: Route) -> list[tuple[int, int]]:
    """Stop and floor of the marks: the last token on top, and the source where there is one."""
    last = (len(route.names) - 1, route.n_layers)
    return [last] if route.source is None else [last, (route.source, 0)]


def _name_axes(axes: Any, route: Route, size: tuple[float, float]) -> None:
    names = stop_names(route)
    axes.set_xticks(range(len(names)), names, **TURNED if _is_turned(names, size[0]) else {})
    for stop, label in enumerate(axes.get_xticklabels()):
        if route.is_gathered(stop) or not any(shares[stop] for shares in route.node):
            label.set_color(SOFT)
    put_counts(axes, "y", route.n_layers + 1, size[1])
    axes.set_xlim(-0.55, len(names) - 0.45)
    axes.set_ylim(-0.35, route.n_layers + 0.35)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
