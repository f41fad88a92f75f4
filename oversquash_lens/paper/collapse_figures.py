"""Figures 1, 5 and 12: representational collapse, on a real model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from oversquash_lens.collapse import families
from oversquash_lens.collapse.curve import CollapseCurve, collapse_curve
from oversquash_lens.collapse.families import Family
from oversquash_lens.paper import prompts, published
from oversquash_lens.paper.published import collapses, exponent
from oversquash_lens.paper.reproduce import PAPER_MODEL, RunConfig
from oversquash_lens.paper.synthetic import figure_1_paths
from oversquash_lens.viz.chart import Chart, Panel, Series, Verdict
from oversquash_lens.viz.result_charts import collapse_series, head_series, marks_of

FIGURE_1_LINES = (1, 2, 3, 5, 10)  # of the ten counts: more lines than these cannot be told apart
HEADS = "change of a head's z, L∞"
CHANGE = "change of y, L1"


@dataclass(frozen=True)
class Case:
    """One panel of a collapse figure: a family, what the paper prints for it, whether it says that they stay apart."""

    title: str
    family: Family
    printed: published.Printed
    apart: bool = False


def figure_1(config: RunConfig) -> Chart:
    """(a) The first ten counts, layer by layer; (b) the paths of an early and a late token."""
    lengths = config.lengths("1")
    curve = _curve(config, families.counting(config.model, bos=config.options.bos), lengths, dtypes=("float32",))
    layers = tuple(range(len(curve.by_layer["float32"])))
    rows = curve.by_layer["float32"].T.tolist()
    shown = [
        Series(f"{k} against {k + 1} ones", layers, tuple(row))
        for k, row in zip(lengths, rows, strict=True)
        if k in FIGURE_1_LINES
    ]
    a = Panel("(a) counting ones", "layer", "relative L2 of the last residual", tuple(shown), y_axis="log")
    first, last = (curve.relative["float32"][i].item() for i in (0, -1))
    b = figure_1_paths()
    early, late = (panel.paths for panel in b if panel.paths is not None)
    verdicts = (
        Verdict(
            "the more ones, the closer the last token's representations",
            f"relative distance of y {first:.3g} at 1 one, {last:.3g} at {lengths[-1]}",
            last < first if len(lengths) > 1 else None,
        ),
        Verdict(
            "an early token reaches the last one on more paths than a late one",
            f"{early.total} paths for token {early.token + 1}, {late.total} for token {late.token + 1}",
            early.total > late.total,
        ),
    )
    return Chart(
        "1", "Figure 1: representations converge, early tokens have more paths", (a, *b), verdicts, config.label,
        columns=3, notes=("(b) is computed: every causal path through the layers is counted.",), data=curve.to_dict(),
    )  # fmt: skip


def figure_5(config: RunConfig) -> Chart:
    """Collapse of counting and copying prompts, as printed and for every length; what commas save and what not."""
    wanted = config.lengths("5")
    model, bos = config.model, config.options.bos
    cases = [
        Case("(a) count ones", families.counting(model, bos=bos), published.FIGURE_5["a"]),
        Case(
            "(b) count ones among digits",
            families.sampled_digits(model, seed=config.options.seed, bos=bos),
            published.FIGURE_5["b"],
        ),
        Case("(c) copy ones", families.copying(model, bos=bos), published.FIGURE_5["c"]),
        Case("(d) copy, a comma every third", families.separated(model, bos=bos), published.FIGURE_5["d"], apart=True),
    ]
    marks, left_out = config.readable(wanted, *(case.family for case in cases))
    dense = [_curve(config, case.family, range(1, marks[-1] + 1), floor=marks) for case in cases]
    printed = [curve.at(marks) for curve in dense]
    others = {
        "the same place, k against k+3": families.separated(model, step=3, bos=bos),
        "commas from the right": families.separated(model, counted_from="right", bos=bos),
    }
    commas = {
        name: _curve(config, family, config.readable(marks, family)[0], dtypes=("float32",))
        for name, family in others.items()
    }
    top = list(map(_printed_panel, cases, printed))
    bottom = list(map(_dense_panel, cases, dense))
    beside = tuple(collapse_series(curve, "float32", name) for name, curve in commas.items())
    bottom[3] = replace(bottom[3], series=(*bottom[3].series, *beside))
    return Chart(
        "5",
        "Figure 5: representational collapse",
        (*top, *bottom),
        (*map(_verdict, cases, dense), _count_verdict(commas)),
        config.label,
        setup=(
            "Above: last layer, mean and min–max over heads of the L∞ change of z between the two prompts. "
            f"Grey: read off the paper's print ({PAPER_MODEL}, bfloat16). Below: L1 of y, every length.",
            *_setup(dense),
        ),
        notes=(*dict.fromkeys(note for curve in dense for note in curve.notes), *left_out),
        columns=4,
        data={"curves": [curve.to_dict() for curve in (*printed, *commas.values())]},
    )


def figure_12(config: RunConfig) -> Chart:
    """Collapse under prompt Type 1, whose sequence ends the prompt."""
    wanted = config.lengths("12")
    question = prompts.TYPE_1.format(seq="").rstrip()
    family = families.counting(config.model, question=question, bos=config.options.bos)
    case = Case("prompt Type 1", family, published.FIGURE_12)
    marks, left_out = config.readable(wanted, family)
    dense = _curve(config, family, range(1, marks[-1] + 1), floor=marks)
    printed = dense.at(marks)
    return Chart(
        "12",
        "Figure 12: representational collapse, prompt Type 1",
        (_printed_panel(case, printed), _dense_panel(case, dense)),
        (_verdict(case, dense),),
        config.label,
        setup=_setup([dense]),
        notes=(*dense.notes, *left_out),
        columns=2,
        data={"curves": [printed.to_dict()]},
    )


def _curve(
    config: RunConfig,
    family: Family,
    lengths: Sequence[int],
    *,
    dtypes: Sequence[str] | None = None,
    floor: Sequence[int] = (),
) -> CollapseCurve:
    options = config.options
    formats = dtypes or options.dtypes
    return collapse_curve(config.model, family, lengths, formats, noise_floor=floor, progress=options.progress)


def _printed_panel(case: Case, curve: CollapseCurve) -> Panel:
    """The heads at the lengths that the paper draws, and its print."""
    series = [series for name in curve.l1 for series in head_series(curve, name)]
    series.append(replace(case.printed.series(), label=f"paper ({PAPER_MODEL})"))
    return Panel(case.title, curve.unit, HEADS, tuple(series), x_axis="category", reference=published.PRECISION)


def _dense_panel(case: Case, curve: CollapseCurve) -> Panel:
    """y at every length; what rounding alone makes of it, at the printed ones."""
    series = [series for name in curve.l1 for series in (collapse_series(curve, name), *marks_of(curve, name))]
    title = f"{case.title}, every length"
    return Panel(title, curve.unit, CHANGE, tuple(series), x_axis="log", y_axis="log")


def _verdict(case: Case, curve: CollapseCurve) -> Verdict:
    name = next(iter(curve.l1))
    y = curve.l1[name].tolist()
    found = collapses(curve.lengths, y)
    held = None if found is None else found is not case.apart
    where = ", ".join(
        f"{key}: {'never' if first is None else f'from {first} on'}"
        for key in curve.l1
        for first in [curve.first_collapsed(key)]
    )
    claim = "commas keep the prompts apart" if case.apart else "the two prompts' representations converge"
    return Verdict(
        f"{case.title}: {claim}",
        f"L1 {y[0]:.3g} at {curve.lengths[0]}, {y[-1]:.3g} at {curve.lengths[-1]}, exponent "
        f"{exponent(curve.lengths, y, beyond=10):.2f}; below machine epsilon: {where}",
        held,
    )


def _count_verdict(commas: dict[str, CollapseCurve]) -> Verdict:
    """Whether commas save the count itself, not only the place within its group."""
    name = "the same place, k against k+3"
    curve = commas[name]
    y = curve.l1["float32"].tolist()
    found = collapses(curve.lengths, y, beyond=5)
    right = commas["commas from the right"].l1["float32"].tolist()
    return Verdict(
        "commas save the count, not only the place in the group",
        f"L1 of k against k+3: {y[0]:.3g} at {curve.lengths[0]}, {y[-1]:.3g} at {curve.lengths[-1]}; counted from the "
        f"right: {right[-1]:.3g}",
        None if found is None else not found,
    )


def _setup(curves: Sequence[CollapseCurve]) -> tuple[str, ...]:
    return (
        f"{curves[0].about}; formats: {', '.join(one.label for one in curves[0].formats)}.",
        *dict.fromkeys(f"{curve.family}." for curve in curves),
    )
