"""A collapse curve as a chart: the distance of y, the heads, the layers, and B.3's own assumption."""

from __future__ import annotations

import math

from oversquash_lens.collapse.curve import CollapseCurve
from oversquash_lens.collapse.precision import number_format
from oversquash_lens.viz.chart import Chart, Panel, Series, Verdict

LAYERS = 6  # lengths whose way through the layers is drawn


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
        tuple(_verdict(curve, name) for name in names),
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
    rows = [tuple(values.tolist()) for values in (heads.mean(1), heads.amin(1), heads.amax(1))]
    return [
        Series(number_format(name).label, x, *rows),
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
        series.append(
            Series(label, x, *(tuple(row.tolist()) for row in (values.mean(0), values.amin(0), values.amax(0))))
        )
    return Panel(
        "B.3's assumption: mean and min–max over layers", curve.unit, "mean over heads", tuple(series), x_axis=x_axis
    )


def _verdict(curve: CollapseCurve, name: str) -> Verdict:
    first = curve.first_collapsed(name)
    values = curve.relative[name]
    return Verdict(
        f"the two prompts are the same to {number_format(name).label}",
        f"relative distance {values[0]:.3g} at {curve.lengths[0]}, {values[-1]:.3g} at {curve.lengths[-1]}, machine "
        f"epsilon {number_format(name).epsilon:.3g}" + (f", below it from {first} on" if first else ""),
        first is not None,
    )
