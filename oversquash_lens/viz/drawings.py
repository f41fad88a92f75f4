"""Panels that are no curves: right and wrong answers as ✓ and ✗, and causal paths as a layered graph."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from oversquash_lens.viz.chart import Panel
from oversquash_lens.viz.diagrams import Paths
from oversquash_lens.viz.html import visible_token
from oversquash_lens.viz.scales import number, put, scale, short
from oversquash_lens.viz.style import COLOURS, INK, RIGHT, SMALL, WRONG, wrapped


def draw_marks(axes: Any, panel: Panel, size: tuple[float, float]) -> dict[str, Any]:
    """A row of ✓ and ✗ for each series, the first on top; nan leaves its place empty. Returns the legend's entries."""
    x = scale(panel.x_axis, [value for one in panel.series for value in one.x], margin=0.04)
    put(axes, "x", x, size[0], panel.x_names)
    most = max(len(set(one.x)) for one in panel.series)
    glyph = max(3.5, min(7.5, 0.8 * 72 * size[0] / max(most, 1)))
    legend: dict[str, Any] = {}
    for row, one in enumerate(panel.series):
        for mark, label, colour in ((1, "right", RIGHT), (0, "wrong", WRONG)):
            at = x.at([value for value, each in zip(one.x, one.y, strict=True) if each == mark])
            if len(at):
                style = {"marker": _glyph("✓" if mark else "✗"), "color": colour, "markeredgewidth": 0}
                style |= {"linestyle": "none", "markersize": glyph, "clip_on": False}
                (legend[label],) = axes.plot(at, [row] * len(at), **style)
    names = [wrapped(one.label, 1.3, SMALL) for one in panel.series]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.hlines(range(len(names)), 0, 1, transform=axes.get_yaxis_transform(), color="#eceef0", linewidth=0.5, zorder=0)
    return legend


@cache
def _glyph(character: str) -> Any:
    """The character's outline around its middle, as a marker."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    path = TextPath((0, 0), character, size=10, prop=FontProperties(family="DejaVu Sans", weight="bold"))
    box = path.get_extents()
    return path.transformed(Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2))


def draw_paths(axes: Any, paths: Paths, size: tuple[float, float]) -> str:
    """Tokens from left to right, layers upwards, each edge as strong as the number of paths over it.

    Returns the sentence that says how many there are. A node holds the number of paths through it, where it fits.
    """
    from matplotlib.collections import LineCollection

    edges = [edge for edge in paths.edges if edge[3] > 0]
    most = max((count for *_, count in edges), default=1.0)
    spacing = 72 * min(size[0] / len(paths.tokens), size[1] / (paths.n_layers + 1))  # of nodes, in points
    lines = LineCollection(
        [((source, layer), (destination, layer + 1)) for layer, source, destination, _ in edges],
        linewidths=[min(1.0, spacing / 25) * (0.5 + 3.0 * count / most) for *_, count in edges],
        colors=[(*_rgb(COLOURS[0]), 0.25 + 0.65 * count / most) for *_, count in edges],
        capstyle="round",
        zorder=2,
    )
    axes.add_collection(lines, autolim=False)
    _draw_nodes(axes, paths, spacing)
    names = [visible_token(token) for token in paths.tokens]
    put(axes, "x", scale("linear", [-0.45, len(names) - 0.55], margin=0.0), size[0], names)
    axes.set_ylim(-0.4, paths.n_layers + 0.4)
    step = math.ceil(paths.n_layers / 8)
    floors = range(0, paths.n_layers + 1, step)
    axes.set_yticks(floors, ["embeddings" if floor == 0 else f"after layer {floor - 1}" for floor in floors])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return f"{number(paths.total)} paths from {short(names)[paths.token]} to the last token"


def _draw_nodes(axes: Any, paths: Paths, spacing: float) -> None:
    """`spacing` of the nodes in points; those on no path are small and grey, numbers stand in all others or in none."""
    through = {(paths.token, 0): paths.total}
    for layer, _, destination, count in paths.edges:
        through[destination, layer + 1] = through.get((destination, layer + 1), 0) + count
    diameter = min(17.0, 0.55 * spacing)
    written = diameter > max(SMALL, *(0.62 * SMALL * len(number(count)) for count in through.values()))
    fills = {(paths.token, 0): COLOURS[1], (len(paths.tokens) - 1, paths.n_layers): COLOURS[0]}
    for place in range(len(paths.tokens)):
        for floor in range(paths.n_layers + 1):
            count = through.get((place, floor), 0)
            fill = fills.get((place, floor), "white")
            edge = (INK if count else "#c8ccd0") if fill == "white" else fill
            style = {"markerfacecolor": fill, "markeredgecolor": edge, "markeredgewidth": 0.7, "zorder": 3}
            axes.plot(place, floor, "o", markersize=diameter if count else min(4, diameter), clip_on=False, **style)
            if count and written:
                style = {"color": INK if fill == "white" else "white", "fontsize": SMALL - 0.5, "zorder": 4}
                axes.text(place, floor, number(count), ha="center", va="center_baseline", **style)


def _rgb(colour: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)
