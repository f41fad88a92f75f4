"""Effective width by depth as a small SVG that takes its colours from the page: right in the dark and on paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import InputError
from oversquash_lens.paths.squashing import Squashing
from oversquash_lens.viz.html import escape

WIDTH, HEIGHT = 720, 400  # of the curve, in its own units
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 18, 56


def width_curve(squashing: Squashing) -> str:
    """Effective width on entering each layer and the null model's beside it, on a logarithmic scale, as SVG."""
    widths = _checked(squashing.flow.effective_width, "effective widths")
    nulls = _checked(squashing.null.effective_width, "the null model's effective widths")
    n, last, narrowest = len(squashing.tokens), len(widths) - 1, squashing.narrowest
    top = max(2.0, *widths, *nulls)
    across = [LEFT + (WIDTH - LEFT - RIGHT) * layer / max(last, 1) for layer in range(last + 1)]

    def height(width: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(max(width, 1.0)) / math.log(top)

    lines = [("null", nulls), ("real", widths)]
    paths = "".join(
        f'<polyline class="{name}" points="{" ".join(map(_point, across, map(height, values)))}"/>\n'
        for name, values in lines
    )
    dots = "".join(
        f'<circle class="{"narrowest" if layer == narrowest else "dot"}" cx="{x:.1f}" cy="{height(real):.1f}" r="4">'
        f"<title>{escape(_entering(layer, last))}: {real:.4g} positions; even attention {null:.4g}</title></circle>\n"
        for layer, (x, real, null) in enumerate(zip(across, widths, nulls, strict=True))
    )
    label = (
        f"Effective width by depth, {n} tokens: narrowest {_entering(narrowest, last)}, {widths[narrowest]:.3g} "
        f"positions, where even attention has {nulls[narrowest]:.3g}."
    )
    return (
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">\n'
        f"{_axes(across, top, height)}{paths}{dots}</svg>\n"
    )


def _axes(across: Sequence[float], top: float, height: Callable[[float], float]) -> str:
    ticks = [(value, height(value)) for value in _ticks(top)]
    rows = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="y" x="{LEFT - 8}" y="{y + 5:.1f}">{value:g}</text>\n'
        for value, y in ticks
    )
    last = len(across) - 1
    shown = sorted({round(last * part / 4) for part in range(5)})
    columns = "".join(f'<text x="{across[i]:.1f}" y="{HEIGHT - BOTTOM + 22}">{i}</text>\n' for i in shown)
    middle = (LEFT + WIDTH - RIGHT) / 2
    return f'<g class="axes">{rows}{columns}<text x="{middle:.0f}" y="{HEIGHT - 6}">layer</text></g>\n'


def _ticks(top: float) -> list[float]:
    """1, 2, 5, 10, … up to `top`; of many decades the tens alone.

    >>> _ticks(12.0), _ticks(2000.0)
    ([1.0, 2.0, 5.0, 10.0], [1.0, 10.0, 100.0, 1000.0])
    """
    steps = (1, 2, 5) if top < 200 else (1,)
    ticks = [step * 10.0**power for power in range(7) for step in steps]
    return [tick for tick in ticks if tick <= top]


def _point(x: float, y: float) -> str:
    return f"{x:.1f},{y:.1f}"


def _entering(layer: int, last: int) -> str:
    return f"entering layer {layer}" if layer < last else "leaving the last layer"


def _checked(values: Float[Tensor, " any"], what: str) -> list[float]:
    if not torch.isfinite(values).all():
        raise InputError(
            f"expected finite numbers, got {what} that are not all finite: look for NaN or infinite values in the "
            "result, and measure again in float32"
        )
    return values.tolist()
