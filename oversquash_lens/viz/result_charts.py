"""Results as charts: a collapse curve, a sweep's bands over prompts, a flow by position, by head and by route."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.collapse.curve import CollapseCurve
from oversquash_lens.collapse.precision import number_format
from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured_flow import MeasuredFlow
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.recursion import ROWS
from oversquash_lens.paths.squashing import Squashing
from oversquash_lens.swaps.swap import Swap
from oversquash_lens.sweeps.result import Bands, SweepResult
from oversquash_lens.viz.chart import Chart, Heat, Panel, Route, Series, Verdict
from oversquash_lens.viz.style import short
from oversquash_lens.viz.words import measure_name, place, source_named, visible_token

FEW = 12  # positions that a route draws all of
MOST_ALONE = 12  # positions of a longer prompt that have a column of their own, besides the source and the last token
MATTERS = 0.03  # share at some layer from which on a position may have one
SEEN = 0.005  # share from which on a route draws a line
WIDTH, THROUGH = "effective width", "share of the paths"
LAYERS = 6  # lengths whose way through the layers is drawn
PLACE, LIFT = "place in the prompt: 0 first, 1 last token", "times a uniform share"
MIDDLE, ENDS = "median, band of quartiles", "least and most of any prompt"
BY_LAYER = {  # title, axis, and what the dashed line stands for
    "flow": ("Where it narrows", "effective width, positions", None),
    "squashing": (
        "Where it narrows, beside uniform attention",
        "times the width of uniform attention",
        "uniform attention",
    ),
}


# -- a flow --------------------------------------------------------------------------------------------------


def map_chart(flow: Flow) -> Chart:
    """Layer × position map of node shares, the effective width beside it."""
    return _chart("flow", f"Where the paths run: {_of(flow)}", flow, map_panel(flow))


def heads_chart(flow: Flow) -> Chart:
    """Layer × head map of flow, what stays in the residual stream beside it."""
    return _chart("heads", f"Which heads carry it: {_of(flow)}", flow, heads_panel(flow))


def width_chart(flow: Flow) -> Chart:
    """Effective width by depth."""
    return _chart("width", f"Where it narrows: {_of(flow)}", flow, width_panel(flow))


def squashing_chart(squashing: Squashing) -> Chart:
    """Effective width by depth beside that of uniform attention: what the causal mask alone would make of it."""
    found = squashing.flow
    layer, relative = squashing.narrowest, squashing.relative_width
    said = f"narrowest against uniform attention on entering layer {layer}: {relative[layer].item():.2f} times as wide"
    panel = width_panel(found, squashing.null, note=said)
    return _chart("width", f"Where it narrows: {_of(found)}", found, panel)


def route_chart(flow: Flow) -> Chart:
    """The flow as a diagram of positions and layers, faint positions gathered."""
    return _chart("route", f"The route: {_of(flow)}", flow, route_panel(flow))


def map_panel(flow: Flow, title: str = "") -> Panel:
    _check(flow)
    return Panel(
        title,
        "token",
        "layer",
        (Series(WIDTH, tuple(range(flow.n_layers + 1)), tuple(flow.effective_width.tolist())),),
        heat=Heat(_rows(flow.node), low=0.1 / len(flow.tokens), high=1.0, label=THROUGH),
        x_names=tuple(map(visible_token, flow.tokens)),
    )


def heads_panel(flow: Flow, title: str = "") -> Panel:
    _check(flow)
    heads = flow.head.shape[1]
    most = flow.head.max().item()
    return Panel(
        title,
        "head",
        "layer",
        (Series("residual stream", tuple(range(flow.n_layers)), tuple(flow.residual.tolist())),),
        heat=Heat(
            _rows(flow.head),
            low=0.1 / (heads + 1),  # a uniform share: heads and residual stream together are 1
            high=next((end for end in (0.2, 0.5) if most <= end), 1.0),
            label=THROUGH,
        ),
        x_names=tuple(map(str, range(heads))),
    )


def width_panel(flow: Flow, null: Flow | None = None, title: str = "", note: str = "") -> Panel:
    """`null`: the flow of a null model on the same prompt, as a second line."""
    layers = tuple(range(flow.n_layers + 1))
    flows = {WIDTH: flow} if null is None else {"this model": flow, "uniform attention, all else the same": null}
    for each in flows.values():
        _check(each)
    series = tuple(Series(label, layers, tuple(each.effective_width.tolist())) for label, each in flows.items())
    return Panel(title, "layer", f"{WIDTH}, of {len(flow.tokens)} positions", series, note=note)


def route_panel(flow: Flow, title: str = "") -> Panel:
    return Panel(title, "token", "layer", route=route_of(flow))


def route_of(flow: Flow) -> Route:
    """The flow with faint positions gathered, and its moves split by head."""
    _check(flow)
    spans = _spans(flow)
    belongs = torch.zeros(len(flow.tokens), len(spans), dtype=torch.float64)
    for stop, (start, end) in enumerate(spans):
        belongs[start:end, stop] = 1
    node = flow.node.double() @ belongs
    stays, moves = [], []
    for layer in range(flow.n_layers):
        shares = _moved(flow, layer, belongs)
        whole = shares.sum(0)
        stays.append(flow.residual_at[layer].double() @ belongs + whole.diagonal())
        for to, source in (whole.fill_diagonal_(0) >= SEEN).nonzero().tolist():
            head = int(shares[:, to, source].argmax())
            others = shares[head, to, source] < 0.5 * whole[to, source]
            moves.append((layer, source, to, whole[to, source].item(), f"{layer}.{head}" + "+" * bool(others)))
    names = tuple(_name(flow, span, node[:, i].max().item()) for i, span in enumerate(spans))
    source = None
    if flow.source is not None:
        source = next(i for i, (start, end) in enumerate(spans) if start <= _source_positions(flow)[0] < end)
    return Route(names, tuple(spans), _rows(node), _rows(torch.stack(stays)), tuple(moves), source, SEEN)


def _spans(flow: Flow) -> list[tuple[int, int]]:
    """Runs of positions from left to right: those that matter alone, the others between them together."""
    n = len(flow.tokens)
    peak = flow.node.amax(0)
    alone = set(range(n)) if n <= FEW else {i for i in peak.topk(MOST_ALONE).indices.tolist() if peak[i] >= MATTERS}
    alone |= {n - 1, *_source_positions(flow)}
    runs = [list(run) for _, run in groupby(range(n), key=lambda i: i if i in alone else -1)]
    return [(run[0], run[-1] + 1) for run in runs]


def _name(flow: Flow, span: tuple[int, int], most: float) -> str:
    start, end = span
    if end - start == 1:
        return short([visible_token(flow.tokens[start])])[0]
    return f"… {end - start} others, " + (f"{most:.0%} at most" if most >= 0.005 else "below 1%" if most else "none")


def _moved(flow: Flow, layer: int, belongs: Float[Tensor, "pos stop"]) -> Float[Tensor, "head to stop"]:
    """What each head moves from stop to stop in a layer, a block of rows at a time."""
    n, stops = belongs.shape
    moved = torch.zeros(flow.head_at.shape[1], stops, stops, dtype=torch.float64)
    for start in range(0, n, ROWS):
        end = min(start + ROWS, n)
        moved += belongs[start:end].T @ (flow.edge_rows(layer, start, end) @ belongs[:end])
    return moved


def _chart(name: str, title: str, flow: Flow, panel: Panel) -> Chart:
    source = [*_source_positions(flow)] if isinstance(flow.source, slice) else flow.source
    data = {"paths": flow.kind, "source": source}
    return Chart(name, title, (panel,), (), str(flow.about), notes=flow.notes, data=data)


def _of(flow: Flow) -> str:
    name = measure_name(flow.kind)
    if flow.source is None:
        return f"{name}, from all tokens"
    positions = _source_positions(flow)
    text = short(["".join(visible_token(flow.tokens[i]) for i in positions)])[0]
    return f"{name}, from {text} ({place(positions.start, positions.stop)})"


def _source_positions(flow: Flow) -> range:
    """The positions of a flow's source, none where it is all tokens."""
    if flow.source is None:
        return range(0)
    if isinstance(flow.source, slice):
        return range(flow.source.start, flow.source.stop)
    return range(flow.source, flow.source + 1)


def _check(flow: Flow) -> None:
    for shares in (flow.node, flow.head_at, flow.residual_at):
        if not ((shares >= 0) & (shares <= 1 + 1e-9)).all():
            raise InputError(
                f"this flow ({flow.kind}) has NaN, negative or infinite shares; expected shares from 0 to 1: look for "
                "NaN or infinite values in the model's activations, and record again in float32"
            )


def _rows(values: Float[Tensor, "row column"]) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, values.tolist()))


# -- measured: a flow, and two prompts ---------------------------------------------------------------------------


def measured_flow_chart(found: MeasuredFlow) -> Chart:
    """Layer × position map of a measured flow's shares, and layer × head map of their sizes."""
    n, n_heads = len(found.tokens), max(1, found.head.shape[1])
    layers = tuple(range(len(found.stays)))
    widths = Series("effective width", (*layers, len(layers)), tuple(found.width.tolist()))
    stays = Series("stays", layers, tuple(found.stays.tolist()))
    share = "share of the squared sensitivity"
    names = tuple(map(visible_token, found.tokens))
    maps = [Panel("positions", "token", "layer", (widths,), heat=_sized(found.node, 0.1 / n, share), x_names=names)]
    if found.head.shape[1]:
        heat = _sized(found.head, 0.1 / (n_heads + 1), f"size of the {share}")
        maps.append(Panel("heads", "head", "layer", (stays,), heat=heat, x_names=tuple(map(str, range(n_heads)))))
    most = found.negative.max().item()
    notes = (f"conserved within {found.conservation:.0e}; negative shares sum to at most {most:.0%} of a layer",)
    title = f"Where the sensitivity of the {found.target or 'output'} to {source_named(found)} runs, measured"
    return Chart("measured", title, tuple(maps), (), str(found.about), notes=notes, columns=1)


def swap_chart(found: Swap) -> Chart:
    """Layer × position maps: where two prompts differ, and how much of the effect each patched residual carries."""
    names = tuple(
        visible_token(old if old == new else f"{old}→{new}")
        for old, new in zip(found.tokens, found.swapped, strict=True)
    )
    heads = tuple(range(len(found.patched_heads)))
    largest = found.patched_heads.nan_to_num(0).abs()
    carried = Series(
        "largest head", heads, tuple(largest.amax(-1).tolist()) if largest.numel() else (0.0,) * len(heads)
    )
    sums = Series("sum of the layer", tuple(range(len(found.patched))), tuple(found.additivity.tolist()))
    apart, effect = "‖Δx‖/‖x‖", "size of the share of the effect"
    panels = (
        Panel("where the prompts differ", "token", "layer", heat=_sized(found.spread, 0.01, apart), x_names=names),
        Panel("residuals patched", "token", "layer", (sums,), heat=_sized(found.patched, 0.01, effect), x_names=names),
        Panel(
            "heads patched",
            "head",
            "layer",
            (carried,),
            heat=_sized(found.patched_heads, 0.01, effect),
            x_names=tuple(map(str, range(found.patched_heads.shape[1]))),
        ),
    )
    title = f"A swap: {found.target} {found.before:.3g} → {found.after:.3g}"
    kept = panels if found.patched_heads.numel() else panels[:2]
    return Chart("swap", title, kept, (), str(found.about), columns=1)


def _sized(values: Float[Tensor, "row column"], low: float, label: str) -> Heat:
    """Sizes of signed numbers as a map; what is not known is a gap."""
    return Heat(_rows(values.double().abs()), low=low, high=1.0, label=label)


# -- a collapse curve ------------------------------------------------------------------------------------------


def collapse_chart(curve: CollapseCurve) -> Chart:
    """Everything that a curve holds: l1, per head, by layer, attention; one verdict a format."""
    names = list(curve.l1)
    x_axis = "log" if curve.lengths[-1] > 20 * curve.lengths[0] else "linear"
    panels = [
        Panel(
            "distance of y",
            curve.unit,
            "L1",
            tuple(series for name in names for series in (collapse_series(curve, name), *marks_of(curve, name))),
            x_axis=x_axis,
            y_axis="log",
        ),
        Panel(
            "heads of the last layer",
            curve.unit,
            "L∞ of z",
            tuple(series for name in names for series in head_series(curve, name)),
            x_axis=x_axis,
            y_axis="log",
        ),
        _layers_panel(curve, names[0]),
    ]
    if bool(curve.covered.any()):
        panels.append(_attention_panel(curve, names[0], x_axis))
    return Chart(
        "collapse",
        f"Representational collapse: {curve.family}",
        tuple(panels),
        tuple(_collapse_verdict(curve, name) for name in names),
        str(curve.about),
        notes=curve.notes,
        columns=2,
        data=curve.to_dict(),
    )


def collapse_series(curve: CollapseCurve, name: str, label: str = "") -> Series:
    """L1 of y in one format at every length."""
    shown = label or number_format(name).label
    return Series(shown, tuple(map(float, curve.lengths)), tuple(curve.l1[name].tolist()))


def marks_of(curve: CollapseCurve, name: str) -> list[Series]:
    """The noise floor of one format's L1, where it was measured."""
    return _floor(curve, name, curve.noise_floor[name].tolist())


def head_series(curve: CollapseCurve, name: str) -> list[Series]:
    """Mean over heads of the change of z with its min–max band, and its noise floor."""
    heads = curve.per_head[name]
    x = tuple(map(float, curve.lengths))
    mean, least, most = (tuple(values.tolist()) for values in (heads.mean(1), heads.amin(1), heads.amax(1)))
    return [
        Series(number_format(name).label, x, mean, least, most),
        *_floor(curve, name, curve.head_floor[name].tolist()),
    ]


def curve_numbers(curve: CollapseCurve) -> dict:
    """What a curve says of each length as a whole: all of it but its layers and heads, which are many numbers."""
    many = ("by_layer", "attention_shift", "self_attention", "per_head")
    return {key: value for key, value in curve.to_dict().items() if key not in many}


def _floor(curve: CollapseCurve, name: str, values: list[float]) -> list[Series]:
    points = [(k, value) for k, value in zip(curve.lengths, values, strict=True) if not math.isnan(value)]
    if not points:
        return []
    x, y = zip(*points, strict=True)
    return [Series(f"rounding alone, {number_format(name).label}", tuple(map(float, x)), y, kind="floor")]


def _layers_panel(curve: CollapseCurve, name: str) -> Panel:
    """At which layer they merge: a few lengths' way through the layers, from the shortest to the longest."""
    count = len(curve.lengths)
    some = sorted({round(count ** (i / (LAYERS - 1))) - 1 for i in range(LAYERS)})
    rows = curve.by_layer[name].T.tolist()
    layers = tuple(range(len(curve.by_layer[name])))
    series = [Series(f"{curve.unit}: {curve.lengths[i]}", layers, tuple(rows[i])) for i in some]
    title = f"layer by layer, {number_format(name).label}"
    return Panel(title, "layer", "relative L2 of the residual", tuple(series), y_axis="log")


def _attention_panel(curve: CollapseCurve, name: str, x_axis: str) -> Panel:
    """Theorem B.3's assumption: does the attention of the last token stop moving?"""
    x = tuple(map(float, curve.lengths))
    series = []
    for label, values in (
        ("total variation of the last rows", curve.attention_shift[name]),
        ("weight of the last token on itself", curve.self_attention[name]),
    ):
        mean, least, most = (tuple(row.tolist()) for row in (values.mean(0), values.amin(0), values.amax(0)))
        series.append(Series(label, x, mean, least, most))
    return Panel(
        "B.3's assumption: mean and min–max over layers", curve.unit, "mean over heads", tuple(series), x_axis=x_axis
    )


def _collapse_verdict(curve: CollapseCurve, name: str) -> Verdict:
    first = curve.first_collapsed(name)
    values = curve.relative[name]
    return Verdict(
        f"the two prompts are the same to {number_format(name).label}",
        f"relative distance {values[0]:.3g} at {curve.lengths[0]}, {values[-1]:.3g} at {curve.lengths[-1]}, machine "
        f"epsilon {number_format(name).epsilon:.3g}" + (f", below it from {first} on" if first else ""),
        first is not None,
    )


# -- a sweep ---------------------------------------------------------------------------------------------------


def bands_chart(result: SweepResult, measures: Sequence[str] | None = None) -> Chart:
    """A panel for each measure, and where several have shares one that sets them side by side."""
    found = [result.bands(measure) for measure in (result.measures if measures is None else measures)]
    if not found:
        raise InputError("expected some of the sweep's, got no measure: leave measures= out for all of them")
    shares = [one for one in found if one.by == "position"]
    panels = [_bands_panel(one) for one in shares]
    panels += [_side_by_side(shares)] if len(shares) > 1 else []
    panels += [_bands_panel(one) for one in found if one.by == "layer"]
    n = found[0].n
    refused = f"; {result.refused:,} refused" if result.refused else ""
    title = f"Sensitivity of the last token, over {n:,} prompt{'s' if n != 1 else ''}{refused}"
    return Chart("bands", title, tuple(panels), (), result.model)


def _bands_panel(one: Bands) -> Panel:
    """Median and quartiles of one measure, and its extremes as thin lines."""
    middle = Series(MIDDLE, one.x, one.median, one.lower, one.upper)
    ends = (Series(ENDS, one.x, row, kind="floor") for row in (one.least, one.most))
    return _framed(one, None, (middle, *ends))


def _side_by_side(shares: Sequence[Bands]) -> Panel:
    series = (Series(measure_name(one.measure), one.x, one.median, one.lower, one.upper) for one in shares)
    return _framed(shares[0], "Side by side: medians and quartiles", tuple(series))


def _framed(one: Bands, title: str | None, series: tuple[Series, ...]) -> Panel:
    if one.by == "layer":
        own, axis, uniform = BY_LAYER[one.measure]
        return Panel(own, "layer", axis, series, reference=(1.0, uniform) if uniform else None)
    return Panel(
        title or measure_name(one.measure), PLACE, LIFT, series, y_axis="log", reference=(1.0, "uniform share")
    )
