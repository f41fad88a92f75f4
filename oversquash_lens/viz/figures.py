"""Figures for print: any `Chart`, and result objects, as matplotlib figures; `save` writes them as files.

Each function gives a `matplotlib.figure.Figure` that stands alone: no pyplot, nothing to close, and nothing of the
user's settings in it. A notebook shows it.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from oversquash_lens.collapse.curve import CollapseCurve
from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured import MeasuredSensitivity
from oversquash_lens.jacobian.measured_flow import MeasuredFlow
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.paths.squashing import Squashing
from oversquash_lens.storage import check_place, write_atomically
from oversquash_lens.swaps.swap import Swap
from oversquash_lens.sweeps.result import SweepResult
from oversquash_lens.viz import result_charts
from oversquash_lens.viz.chart import Chart, Panel, Series
from oversquash_lens.viz.draw import draw
from oversquash_lens.viz.style import styled
from oversquash_lens.viz.words import GLOSSES, NAMES, measure_name, visible_token

if TYPE_CHECKING:
    import matplotlib.figure

FORMATS = ("pdf", "svg", "png")
VALUES = {"share": "share in the last token’s sensitivity", "log10": "log₁₀ of the sensitivity"}
_NO_DATE = {"pdf": "CreationDate", "svg": "Date"}


def chart(chart: Chart | object) -> matplotlib.figure.Figure:
    """Draw a chart as a matplotlib Figure: panels in a grid, title and model on top, the legend below.

    Where the panels have little in common (more than ten labels in all), each has a legend of its own.
    """
    if not isinstance(chart, Chart) or not chart.panels:
        raise InputError(f"a figure was asked of a {type(chart).__name__}; expected a Chart with at least one panel")
    with styled():
        figure = draw(chart)
    # matplotlib teaches IPython only pyplot's figures
    vars(figure)["_repr_png_"] = partial(_for_notebooks, figure)
    vars(figure)["savefig"] = partial(_savefig, figure)
    return figure


def profile(profile: PathProfile | object, value: str = "share") -> matplotlib.figure.Figure:
    """Share of each position in the last token’s sensitivity, by a bound, an estimate or a null model, as a Figure.

    `value` "share": dimensionless, sums to 1, on a log axis. "log10": log₁₀ of the sensitivity itself, constant
    included, for a kind that has one.
    """
    if not isinstance(profile, PathProfile):
        raise InputError(f"expected a PathProfile, got a {type(profile).__name__}: call path_bound or the like first")
    _check_value(value)
    if value == "log10" and math.isnan(profile.log_constant):
        raise InputError(
            f"expected a kind that has one, got value='log10' for {profile.kind!r}, whose constant C is unspecified: "
            "draw value='share'"
        )
    row = profile.share if value == "share" else profile.log_values / math.log(10)
    name = measure_name(profile.kind)
    gloss = GLOSSES.get(profile.kind, "")
    zero = "no path, or less than 10⁻³⁰⁸"
    return _by_position(profile, f"{name}: {gloss}" if gloss else name, name, zero, value, row)


def sensitivity(measured: MeasuredSensitivity | object, value: str = "share") -> matplotlib.figure.Figure:
    """Share of each position in the last token’s sensitivity, measured by autograd, as a matplotlib Figure.

    `value` as in `profile`. Where probes measured, the band is one standard error to either side.
    """
    if not isinstance(measured, MeasuredSensitivity):
        raise InputError(f"expected what measured_sensitivity returns, got a {type(measured).__name__}: call it first")
    _check_value(value)
    rows = [measured.values, measured.values - measured.standard_error, measured.values + measured.standard_error]
    rows = [row.clamp(min=0) / measured.values.sum() if value == "share" else row.clamp(min=0).log10() for row in rows]
    how = "exact" if measured.exact else f"{measured.probes} probes, band of one standard error"
    frozen = f", {' and '.join(measured.freeze)} frozen" if measured.freeze else ""
    norm = {"fro": "Frobenius norm", "spectral": "spectral norm"}.get(measured.norm, measured.norm)
    title = f"{NAMES['truth']}: {norm} of the derivative by each token’s embedding"
    label = f"measured ({how}{frozen})"
    return _by_position(measured, title, label, "no sensitivity", value, *(rows[:1] if measured.exact else rows))


def collapse(curve: CollapseCurve | object) -> matplotlib.figure.Figure:
    """How far apart a family's two prompts end, as a matplotlib Figure: y, heads, layers, and B.3's assumption."""
    if not isinstance(curve, CollapseCurve):
        raise InputError(f"expected what collapse_curve returns, got a {type(curve).__name__}: call it first")
    return chart(result_charts.collapse_chart(curve))


def flow(flow: Flow | object) -> matplotlib.figure.Figure:
    """Where the paths run, as a matplotlib Figure: share by layer and position, and the effective width beside it.

    Layer 0 (the embeddings) is at the bottom. The colour is logarithmic as in the views: white at a tenth of a uniform
    share or less, darkest at 1.
    """
    return chart(result_charts.map_chart(_checked_flow(flow)))


def measured_flow(found: MeasuredFlow | object) -> matplotlib.figure.Figure:
    """Where the sensitivity runs as measured, as a matplotlib Figure: positions and heads by layer.

    The colour is the size of a share, logarithmic; what is negative is shown by its size.
    """
    if not isinstance(found, MeasuredFlow):
        raise InputError(f"expected what measured_flow returns, got a {type(found).__name__}: call it first")
    return chart(result_charts.measured_flow_chart(found))


def swap(found: Swap | object) -> matplotlib.figure.Figure:
    """A swap as a matplotlib Figure: where the prompts differ, and what patched residuals and heads carry, by layer.

    The colour is the size of a number, logarithmic from 0.01 to 1; nodes that were not patched are gaps.
    """
    if not isinstance(found, Swap):
        raise InputError(f"expected what swap returns, got a {type(found).__name__}: call it first")
    return chart(result_charts.swap_chart(found))


def heads(flow: Flow | object) -> matplotlib.figure.Figure:
    """Which heads carry a flow, as a matplotlib Figure: share that each moves, and what stays in the residual stream.

    In each layer both together are 1; the colour is white at a tenth of a uniform share or less.
    """
    return chart(result_charts.heads_chart(_checked_flow(flow)))


def width(result: Flow | Squashing | object) -> matplotlib.figure.Figure:
    """How many positions the paths pass through at each layer, as a matplotlib Figure.

    Of a `Squashing` also the same with uniform attention: what the causal mask alone would make of it.
    """
    if isinstance(result, Squashing):
        return chart(result_charts.squashing_chart(result))
    return chart(result_charts.width_chart(_checked_flow(result)))


def route(flow: Flow | object) -> matplotlib.figure.Figure:
    """The route of a flow through positions and layers, as a matplotlib Figure: lines as wide as their shares.

    Positions that carry at least 3 % at some layer stand alone (12 of them at most, besides the source and the last
    token), runs of others are gathered.
    """
    return chart(result_charts.route_chart(_checked_flow(flow)))


def bands(result: SweepResult | object, measures: Sequence[str] | None = None) -> matplotlib.figure.Figure:
    """Bands over the prompts of a sweep, as a matplotlib Figure: median, quartiles and extremes of each measure.

    Shares by relative position, as multiples of a uniform share, and with several such measures axes that set them
    side by side; "flow" and "squashing" by layer. `measures` None draws all of the sweep's.
    """
    if not isinstance(result, SweepResult):
        raise InputError(f"expected what sweep returns, got a {type(result).__name__}: call it, or SweepResult.load")
    return chart(result_charts.bands_chart(result, measures))


def _checked_flow(flow: object) -> Flow:
    if not isinstance(flow, Flow):
        raise InputError(f"expected a Flow, got a {type(flow).__name__}: call flow(trace) first")
    return flow


def _check_value(value: str) -> None:
    if value not in VALUES:
        raise InputError(f"expected one of {', '.join(map(repr, VALUES))}, got value={value!r}")


def _numbers(row: Float[Tensor, " pos"]) -> Any:
    return tuple(row.tolist())


def _by_position(
    result: PathProfile | MeasuredSensitivity,
    title: str,
    label: str,
    zero: str,
    value: str,
    *rows: Float[Tensor, " pos"],
) -> matplotlib.figure.Figure:
    """`rows` are the values, and where there is a band its ends."""
    n = len(result.tokens)
    panel = Panel(
        title="",
        x_label="token",
        y_label=VALUES[value],
        series=(Series(label, tuple(range(n)), *map(_numbers, rows)),),
        y_axis="log" if value == "share" else "linear",
        reference=(1 / n, f"uniform share, 1/{n}") if value == "share" else None,
        zero=zero,
        x_names=tuple(visible_token(token) for token in result.tokens),
    )
    about = getattr(result, "about", None)
    return chart(Chart(result.__class__.__name__, title, (panel,), (), model=str(about) if about else ""))


def save(
    figure: Chart | matplotlib.figure.Figure | object,
    folder: str | os.PathLike,
    name: str,
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Write a figure, or a chart, as `folder`/`name`.pdf, .svg and .png (200 dpi); returns the absolute paths.

    Each file appears whole or not at all; the same figure and matplotlib give the same bytes. The folder is made
    where there is none.
    """
    targets = [check_place(folder, f"{name}.{kind}") for kind in formats]
    if unknown := set(formats) - set(FORMATS):
        raise InputError(f"expected some of {', '.join(FORMATS)}, got formats {', '.join(sorted(unknown))}")
    from matplotlib.figure import Figure

    drawn = chart(figure) if isinstance(figure, Chart) else figure
    if not isinstance(drawn, Figure):
        raise InputError(f"expected a Chart or a matplotlib Figure, got a {type(figure).__name__}: draw one first")
    payloads = [_as_bytes(drawn, kind, name) for kind in formats]
    return [write_atomically(target, payload) for target, payload in zip(targets, payloads, strict=True)]


def _as_bytes(figure: matplotlib.figure.Figure, kind: str, name: str) -> bytes:
    out = io.BytesIO()
    _savefig(figure, out, format=kind, metadata={"Title": figure.get_label() or name})
    return out.getvalue()


def _savefig(figure: matplotlib.figure.Figure, target: Any, **options: Any) -> None:
    """matplotlib's own `savefig`, but the same bytes every time: no date, no random names, nothing of the user's."""
    kind = options.get("format") or Path(target if isinstance(target, str | os.PathLike) else "").suffix[1:]
    undated = {_NO_DATE[kind]: None} if kind in _NO_DATE else {}
    with styled():
        type(figure).savefig(figure, target, **options | {"metadata": undated | (options.get("metadata") or {})})


def _for_notebooks(figure: matplotlib.figure.Figure) -> tuple[bytes, dict[str, int]]:
    """PNG in the density of a good screen, with the size at which it is to be shown (CSS pixels)."""
    width, height = figure.get_size_inches() * 110
    return _as_bytes(figure, "png", "figure"), {"width": int(width), "height": int(height)}
