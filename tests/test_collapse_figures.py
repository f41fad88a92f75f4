"""Figures 1, 5 and 12: the numbers drawn are the curve's, lengths those asked for, verdicts flip where they must."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_generators import KINDS, N_CTX, loaded

from oversquash_lens.collapse import families
from oversquash_lens.collapse.curve import CollapseCurve, collapse_curve
from oversquash_lens.collapse.families import Family
from oversquash_lens.errors import InputError
from oversquash_lens.paper import collapse_figures as recipe
from oversquash_lens.paper import prompts, published
from oversquash_lens.paper.collapse_figures import FIGURE_1_LINES, Case, figure_1, figure_5, figure_12
from oversquash_lens.paper.reproduce import LENGTHS, Options, RunConfig
from oversquash_lens.viz.chart import Chart, Panel
from oversquash_lens.viz.result_charts import (
    collapse_chart,
    collapse_series,
    curve_numbers,
    head_series,
    marks_of,
)

HOOKED = KINDS[1:]
LONGEST = 11
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return RunConfig(Options(loaded(HOOKED[0]), longest=LONGEST), tmp_path_factory.mktemp("figures"))


@pytest.fixture(scope="module")
def figure5(config: RunConfig) -> Chart:
    return figure_5(config)


def counted(config: RunConfig, family: Family, lengths: Sequence[int], dtypes: Sequence[str] = DTYPES) -> CollapseCurve:
    return collapse_curve(config.model, family, lengths, dtypes, noise_floor=True)


def line(panel: Panel, label: str) -> tuple[tuple, tuple]:
    (found,) = ((one.x, one.y) for one in panel.series if one.label == label)
    return found


# ---------------------------------------------------------------- figure 1


@pytest.mark.parametrize("kind", HOOKED)
def test_figure_1_is_the_way_through_the_layers(kind: str, tmp_path: Path) -> None:
    model = loaded(kind)
    chart = figure_1(RunConfig(Options(model), tmp_path))
    curve = collapse_curve(model, families.counting(model), range(1, 11), ("float32",))
    a, early, late = chart.panels
    assert [one.label for one in a.series] == [f"{k} against {k + 1} ones" for k in FIGURE_1_LINES]
    for k, one in zip(FIGURE_1_LINES, a.series, strict=True):
        assert one.x == (0, 1, 2)
        assert one.y == pytest.approx(curve.by_layer["float32"][:, k - 1].tolist(), rel=1e-4)
    assert (early.paths.token, late.paths.token) == (0, 3)
    # Three layers over five tokens: binomial(n - i + L - 1, L - 1) paths from token i.
    assert (early.paths.total, late.paths.total) == (math.comb(4 + 2, 2), math.comb(1 + 2, 2))
    first, last = (curve.relative["float32"][at].item() for at in (0, -1))
    assert [verdict.held for verdict in chart.verdicts] == [last < first, True]
    assert chart.verdicts[0].number == f"relative distance of y {first:.3g} at 1 one, {last:.3g} at 10"


def test_figure_1_of_one_length_decides_nothing_about_length(tmp_path: Path) -> None:
    chart = figure_1(RunConfig(Options(loaded(HOOKED[0]), longest=1), tmp_path))
    assert [verdict.held for verdict in chart.verdicts] == [None, True]


# ---------------------------------------------------------------- figures 5 and 12


def test_figure_5_draws_the_curves_of_its_four_families(figure5: Chart, config: RunConfig) -> None:
    model = config.model
    cases = (
        families.counting(model),
        families.sampled_digits(model, seed=0),
        families.copying(model),
        families.separated(model),
    )
    marks = (1, 2, 6, 11)
    for place, family in enumerate(cases):
        curve = counted(config, family, range(1, LONGEST + 1))
        top, bottom = figure5.panels[place], figure5.panels[place + 4]
        for dtype in DTYPES:
            x, y = line(bottom, dtype)
            assert x == tuple(map(float, range(1, 12)))
            assert y == pytest.approx(curve.l1[dtype].tolist(), rel=1e-4)
            (heads,) = (one for one in top.series if one.label == dtype)
            rows = curve.per_head[dtype][[k - 1 for k in marks]]
            assert heads.x == marks
            for drawn, expected in ((heads.y, rows.mean(1)), (heads.low, rows.amin(1)), (heads.high, rows.amax(1))):
                assert drawn == pytest.approx(expected.tolist(), rel=1e-4)
        assert top.reference == published.PRECISION


def test_figure_5_draws_the_print_beside_it(figure5: Chart) -> None:
    for panel, letter in zip(figure5.panels[:4], "abcd", strict=True):
        (paper,) = (one for one in panel.series if one.kind == "published")
        assert dict(zip(paper.x, paper.y, strict=True)) == dict(published.FIGURE_5[letter].points)
        assert "Gemma 7B" in paper.label
        floors = [one for one in panel.series if one.kind == "floor"]
        assert [one.x for one in floors] == [(1, 2, 6, 11)] * 2  # no lengths of its own on an axis of categories


def test_figure_5_says_what_commas_save(figure5: Chart, config: RunConfig) -> None:
    same = families.separated(config.model, step=3)
    right = families.separated(config.model, counted_from="right")
    for label, family in (("the same place, k against k+3", same), ("commas from the right", right)):
        curve = counted(config, family, (1, 2, 6, 11), ("float32",))
        x, y = line(figure5.panels[7], label)
        assert x == (1, 2, 6, 11)
        assert y == pytest.approx(curve.l1["float32"].tolist(), rel=1e-4)
    assert len(figure5.verdicts) == 5
    assert figure5.verdicts[4].claim == "commas save the count, not only the place in the group"
    assert len(figure5.data["curves"]) == 6


def test_figure_12_asks_first(tmp_path: Path) -> None:
    config = RunConfig(Options(loaded(HOOKED[0]), longest=10, dtypes=("float32",)), tmp_path)
    chart = figure_12(config)
    question = prompts.TYPE_1.format(seq="").rstrip()
    curve = counted(config, families.counting(config.model, question=question), range(1, 11), ("float32",))
    assert chart.panels[0].series[0].x == (2, 5, 10)
    assert line(chart.panels[1], "float32")[1] == pytest.approx(curve.l1["float32"].tolist(), rel=1e-4)
    assert chart.verdicts[0].held is None  # too short for a slope
    assert "prompt Type 1" in chart.verdicts[0].claim


def test_what_the_model_cannot_read_is_left_out_and_said(tmp_path: Path) -> None:
    config = RunConfig(Options(loaded(HOOKED[0])), tmp_path)
    family = families.counting(config.model)
    over = N_CTX - len(family.pair(1)[1])  # ones more than the first pair may have
    lengths, note = config.readable((1, over, over + 1, over + 2, 5000), family)
    assert (len(family.pair(over + 1)[1]), lengths) == (N_CTX, (1, over, over + 1))
    assert note == (f"Lengths beyond {over + 1} are left out: this model reads n_ctx = {N_CTX} tokens.",)
    assert config.readable((1, 2), family) == ((1, 2), ())
    nothing, _ = config.readable((5000, 6000), family)
    with pytest.raises(
        InputError, match=f"expected at most n_ctx = {N_CTX} tokens, .*: no length that fits came before it"
    ):
        collapse_curve(config.model, family, nothing)


def test_a_figure_says_what_it_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = RunConfig(Options(loaded(HOOKED[0]), dtypes=("float32",)), tmp_path)
    monkeypatch.setattr(config.model.cfg, "n_ctx", 200)
    chart = figure_12(config)
    assert "Lengths beyond 10 are left out: this model reads n_ctx = 200 tokens." in chart.notes
    assert chart.panels[0].series[0].x == (2, 5, 10)


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize("figure", LENGTHS)
def test_quick_is_shorter_and_longest_cuts(figure: str, tmp_path: Path) -> None:
    full, quick = (RunConfig(Options(quick=each), tmp_path).lengths(figure) for each in (False, True))
    assert list(full) == sorted(set(full))
    assert list(quick) == sorted(set(quick))
    assert quick[-1] <= full[-1]
    middle = full[len(full) // 2]
    assert RunConfig(Options(longest=middle), tmp_path).lengths(figure) == tuple(k for k in full if k <= middle)
    assert RunConfig(Options(longest=full[0]), tmp_path).lengths(figure) == full[:1]
    with pytest.raises(InputError, match=f"expected at least {full[0]}, the shortest of figure {figure}"):
        RunConfig(Options(longest=full[0] - 1), tmp_path).lengths(figure)


def test_the_papers_lengths() -> None:
    assert LENGTHS["5"][0] == (1, 2, 6, 11, 51, 101, 501, 1001, 2001)
    assert LENGTHS["12"][0] == (2, 5, 10, 100, 500, 1000)
    assert LENGTHS["2"][0] == tuple(range(100, 501, 50))
    assert LENGTHS["11"][0] == tuple(range(100, 1501, 100))
    assert LENGTHS["3"][0] == LENGTHS["7"][0] == tuple(range(5, 196, 10))
    assert tuple(LENGTHS["remedies"][0]) == (11, 101, 501)


# ---------------------------------------------------------------- verdicts on made-up curves


@pytest.fixture(scope="module")
def measured() -> CollapseCurve:
    return collapse_curve(loaded(HOOKED[0]), lambda k: [0, 40] + [7] * k, range(1, 41), DTYPES)


def made_up(curve: CollapseCurve, power: float) -> CollapseCurve:
    l1 = torch.tensor([300 * k**power for k in curve.lengths])
    return replace(curve, l1=dict.fromkeys(DTYPES, l1))


@pytest.mark.parametrize(
    ("power", "converges", "stays_apart"), [(-1.0, True, False), (-0.2, None, None), (0.05, False, True)]
)
def test_the_verdict_on_a_curve(
    power: float, converges: bool | None, stays_apart: bool | None, measured: CollapseCurve
) -> None:
    curve = made_up(measured, power)
    for apart, held in ((False, converges), (True, stays_apart)):
        verdict = recipe._verdict(Case("(x) some", Family("some", lambda k: ()), published.FIGURE_12, apart), curve)
        assert verdict.held is held
        assert f"L1 300 at 1, {300 * 40**power:.3g} at 40, exponent {power:.2f}" in verdict.number
        assert ("commas keep" in verdict.claim) is apart


@pytest.mark.parametrize(("power", "held"), [(-1.0, False), (-0.2, None), (0.0, True)])
def test_the_verdict_on_the_count(power: float, held: bool | None, measured: CollapseCurve) -> None:
    curves = {"the same place, k against k+3": made_up(measured, power), "commas from the right": measured}
    assert recipe._count_verdict(curves).held is held


def test_the_verdict_says_from_where_on_they_are_the_same(measured: CollapseCurve) -> None:
    relative = torch.tensor([1.0] * 20 + [2.0**-9] * 20)
    curve = replace(made_up(measured, -1.0), relative=dict.fromkeys(DTYPES, relative))
    verdict = recipe._verdict(Case("(x)", Family("some", lambda k: ()), published.FIGURE_12), curve)
    assert verdict.number.endswith("below machine epsilon: float32: never, bfloat16: from 21 on")


# ---------------------------------------------------------------- any curve as a chart


def test_a_curve_as_a_chart_holds_the_curve(measured: CollapseCurve) -> None:
    chart = collapse_chart(measured)
    y, heads, layers, attention = chart.panels
    for dtype in DTYPES:
        assert line(y, dtype) == (tuple(map(float, measured.lengths)), tuple(measured.l1[dtype].tolist()))
        assert line(heads, dtype)[1] == tuple(measured.per_head[dtype].mean(1).tolist())
    shown = (1, 2, 4, 9, 19, 40)  # each about 40^(1/5) = 2.1 times the one before
    assert [one.label for one in layers.series] == [f"length: {k}" for k in shown]
    for k, one in zip(shown, layers.series, strict=True):
        assert one.y == tuple(measured.by_layer["float32"][:, k - 1].tolist())
    shift, own = attention.series
    assert shift.y == tuple(measured.attention_shift["float32"].mean(0).tolist())
    assert own.high == tuple(measured.self_attention["float32"].amax(0).tolist())
    assert [verdict.held for verdict in chart.verdicts] == [
        measured.first_collapsed(dtype) is not None for dtype in DTYPES
    ]
    assert chart.data == measured.to_dict()


def test_a_curves_numbers_without_layers_and_heads(measured: CollapseCurve) -> None:
    numbers = curve_numbers(measured)
    whole = measured.to_dict()
    assert set(whole) - set(numbers) == {"by_layer", "attention_shift", "self_attention", "per_head"}
    assert all(whole[key] == value for key, value in numbers.items())


def test_a_pair_outside_b3_has_no_attention_panel() -> None:
    model = loaded(HOOKED[0])
    curve = collapse_curve(model, families.alternating(model), (1, 2, 3), ("float32",))
    assert not curve.covered.any()
    assert len(collapse_chart(curve).panels) == 3


def test_floors_are_drawn_where_they_were_measured(measured: CollapseCurve) -> None:
    assert marks_of(measured, "float32") == []
    assert len(head_series(measured, "float32")) == 1
    floor = torch.full((40,), math.nan, dtype=torch.float64)
    floor[[0, 9, 39]] = torch.tensor([0.0, 0.5, 0.25], dtype=torch.float64)
    curve = replace(measured, noise_floor={"float32": floor}, head_floor={"float32": 2 * floor})
    (mark,) = marks_of(curve, "float32")
    assert (mark.kind, mark.x, mark.y) == ("floor", (1.0, 10.0, 40.0), (0.0, 0.5, 0.25))
    heads, mark = head_series(curve, "float32")
    assert (len(heads.x), mark.x, mark.y) == (40, (1.0, 10.0, 40.0), (0.0, 1.0, 0.5))
    assert collapse_series(curve, "float32", "mine").label == "mine"
