"""Figures 8, 9, 10 and 1(b): curves against the print, verdicts against data that contradict them, paths by count."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch

from oversquash_lens.errors import InputError
from oversquash_lens.paper import gaussian_layer, published, synthetic
from oversquash_lens.paths.squashing import count_paths
from oversquash_lens.viz.chart import Chart, Series, Verdict


@pytest.fixture(scope="module")
def figures() -> dict[str, Chart]:
    return {"8": synthetic.figure_8(), "9": synthetic.figure_9(), "10": synthetic.figure_10()}


@pytest.mark.parametrize("name", ["8", "9", "10"])
def test_every_claim_holds_and_the_figure_is_whole(figures: dict[str, Chart], name: str) -> None:
    chart = figures[name]
    assert chart.name == name
    assert [verdict.held for verdict in chart.verdicts] == [True] * len(chart.verdicts)
    (panel,) = chart.panels
    assert panel.reference == (2**-7, "bfloat16 precision, 2⁻⁷")
    assert panel.x_axis == "category"
    assert {one.kind for one in panel.series} == {"line", "published"}
    for one in panel.series:
        if one.kind == "line":
            assert all(low < mean < high for low, mean, high in zip(one.low, one.y, one.high, strict=True))
    assert chart.setup
    assert chart.to_csv().count("\n") > 10


def test_figure_8_has_the_printed_slope_and_level(figures: dict[str, Chart]) -> None:
    curve = figures["8"].panels[0].series[0]
    x, y = torch.tensor(curve.x).log(), torch.tensor(curve.y).log()
    fitted = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert fitted.item() == pytest.approx(-0.5, abs=0.1)
    printed = dict(zip(published.FIGURE_8.x, published.FIGURE_8.y, strict=True))
    assert all(2 / 3 < y / printed[x] < 3 / 2 for x, y in zip(curve.x, curve.y, strict=True))


def test_figure_9_is_within_a_tenth_of_the_paper_at_every_point(figures: dict[str, Chart]) -> None:
    curve = figures["9"].panels[0].series[0]
    ours = dict(zip(curve.x, curve.y, strict=True))
    expected = {
        500: 0.026, 750: 0.020, 1000: 0.017, 1500: 0.012, 2000: 0.009, 2500: 0.0075,
        3000: 0.0065, 4000: 0.0049, 5000: 0.004, 10000: 0.002,
    }  # fmt: skip
    assert ours == pytest.approx(expected, rel=0.1)


def test_figure_9_is_its_own_expectation() -> None:
    """E Σ|p - p*| to first order: noise e on k of n entries moves mass k/n · E e^x e / E e^x and thins all others."""
    n, seeds = 10000, 5
    mass = 200 / n * 0.05  # of the noisy entries: mean noise 0.05
    values = torch.stack([synthetic.total_variations((n,), seed) for seed in range(seeds)])
    assert values.mean().item() == pytest.approx(2 * mass * (1 - 200 / n), rel=0.1)


def test_figure_9_below_200_entries_has_noise_everywhere() -> None:
    (value,) = synthetic.total_variations((50,), seed=0)
    assert 0 < value < 2 * math.tanh(synthetic.NOISE / 4)  # the sharp bound for differences that range over 0.1


def test_figure_10_is_about_seven_over_n(figures: dict[str, Chart]) -> None:
    for one in figures["10"].panels[0].series:
        if one.kind == "line":
            scaled = [n * y for n, y in zip(one.x, one.y, strict=True) if 10 <= n <= 1000]
            assert all(7 / 1.5 < value < 7 * 1.5 for value in scaled), one.label


def test_tables_show_the_stated_reading_first_and_which_others_meet(figures: dict[str, Chart]) -> None:
    for name, stated, norm, others in (
        ("8", gaussian_layer.LAYER_8, "L∞", gaussian_layer.OTHERS_8),
        ("10", gaussian_layer.LAYER_10, "L1", gaussian_layer.OTHERS_10),
    ):
        (table,) = figures[name].tables
        assert table.rows[0][:2] == (stated.name, norm)
        assert [row[-1] for row in table.rows[:4]] == ["yes", "no", "no", "no"]
        assert {row[0] for row in table.rows} == {stated.name, *(reading.name for reading in others)}
        assert len(table.rows) == 4 + len(others)
        assert {len(row) for row in table.rows} == {len(table.columns)}
        met = {row[0] for row in table.rows if row[-1] == "yes"}
        assert 1 < len(met) < len(table.rows)


def test_alibi_inside_and_outside_the_division(figures: dict[str, Chart]) -> None:
    (table,) = figures["10"].tables
    (row,) = [row for row in table.rows if row[0].startswith("ALiBi's bias after")]
    assert row[-1] == "no"
    assert row[table.columns.index("exponent, ALiBi")] > -0.7


def test_few_lengths_leave_what_they_cannot_decide_open() -> None:
    chart = synthetic.figure_10(seeds=1, lengths=(7,))
    assert [verdict.held for verdict in chart.verdicts] == [None] * 4
    assert chart.tables == ()
    assert [verdict.held for verdict in synthetic.figure_9(seeds=1, lengths=(600, 6000)).verdicts] == [True, None]
    assert synthetic.figure_8(seeds=2, lengths=(5, 100)).panels[0].series[0].x == (5.0, 100.0)


@pytest.mark.parametrize("lengths", [(), (0, 5), (5, 5), (10, 5)])
def test_lengths_that_are_none_are_refused(lengths: tuple) -> None:
    for figure in (synthetic.figure_8, synthetic.figure_9, synthetic.figure_10):
        with pytest.raises(InputError, match="expected whole numbers"):
            figure(lengths=lengths)


def test_no_seeds_are_refused() -> None:
    with pytest.raises(InputError, match="expected at least 1"):
        synthetic.figure_9(seeds=0)


# --- verdicts come from the data ---

PRINTED = published.FIGURE_8
X = PRINTED.x


def verdicts_of(y: list[float]) -> list[Verdict]:
    one = {"curve": published.agree(X, y, PRINTED)}
    curve = Series("curve", X, tuple(y))
    return [
        published.decline_verdict("converges", (curve,)),
        published.exponent_verdict(one),
        published.level_verdict(one),
        published.close_verdict(tuple(one.values()), 0.1),
    ]


def test_verdicts_turn_on_data_that_contradict_them() -> None:
    assert [verdict.held for verdict in verdicts_of(list(PRINTED.y))] == [True] * 4
    flat = verdicts_of([0.05] * len(X))
    assert [verdict.held for verdict in flat] == [False] * 4
    assert str(flat[0]).startswith("did not hold: converges")
    twice = verdicts_of([2 * y for y in PRINTED.y])
    assert [verdict.held for verdict in twice] == [True, True, False, False]
    steeper = verdicts_of([y * (x / 200) ** -0.11 for x, y in zip(X, PRINTED.y, strict=True)])
    assert steeper[1].held is False
    assert "factor 2.00" in twice[2].number
    assert "100.0 % off" in twice[3].number


def test_one_curve_of_several_is_enough_to_fail() -> None:
    good, bad = published.agree(X, PRINTED.y, PRINTED), published.agree(X, [1.0] * len(X), PRINTED)
    assert published.level_verdict({"good": good, "bad": bad}).held is False
    assert published.exponent_verdict({"good": good, "bad": bad}).held is False
    assert published.level_verdict({"good": good}).held is True


def test_the_fan_is_judged_by_its_ends_and_its_top() -> None:
    def judged(**values: float) -> bool | None:
        return published.spread_verdict(values, (0.0015, 0.004), "ALiBi", 5000).held

    assert judged(NoPE=0.0014, ALiBi=0.0035) is True
    assert judged(NoPE=0.0035, ALiBi=0.0034) is False
    assert judged(NoPE=0.0005, ALiBi=0.0034) is False
    assert judged(NoPE=0.0014, ALiBi=0.02) is False
    assert judged() is None


def test_agreement_of_a_zero_and_of_nothing() -> None:
    zero = published.agree(X, [0.0] * len(X), PRINTED)
    assert zero.worst == math.inf
    assert zero.level == 0
    assert zero.level_met is False
    nothing = published.agree((6.0,), (1.0,), PRINTED)
    assert nothing.ratios == ()
    assert math.isnan(nothing.worst)
    assert math.isnan(nothing.level)
    assert nothing.level_met is None
    assert nothing.exponent_met is None


# --- figure 1(b) ---


def brute_force_edges(n: int, n_layers: int, token: int) -> dict[tuple[int, int, int], int]:
    """Every path of positions token = p0 ≤ p1 ≤ … ≤ pL = n-1, its edges counted one by one."""
    counted: dict[tuple[int, int, int], int] = {}
    for middle in product(range(n), repeat=n_layers - 1):
        path = (token, *middle, n - 1)
        if list(path) == sorted(path):
            for layer, (source, destination) in enumerate(pairwise(path)):
                edge = (layer, source, destination)
                counted[edge] = counted.get(edge, 0) + 1
    return counted


@pytest.mark.parametrize(("n", "n_layers"), [(1, 1), (2, 4), (5, 1), (5, 3), (4, 5), (6, 4)])
def test_edges_count_the_paths_that_brute_force_finds(n: int, n_layers: int) -> None:
    totals = count_paths(n, n_layers).values
    for token in range(n):
        edges = synthetic.counted_edges(n, n_layers, token)
        assert {edge[:3]: edge[3] for edge in edges} == brute_force_edges(n, n_layers, token)
        assert len({edge[:3] for edge in edges}) == len(edges)
        for layer in range(n_layers):  # every path crosses every layer once
            through = sum(count for where, _, _, count in edges if where == layer)
            assert through == math.comb(n - 1 - token + n_layers - 1, n_layers - 1)
            assert through == pytest.approx(totals[token].item(), rel=1e-12)


def test_figure_1_counts_an_early_and_a_late_token() -> None:
    early, late = synthetic.figure_1_paths()
    assert (early.paths.token, late.paths.token) == (0, 3)
    assert (early.paths.total, late.paths.total) == (15, 3)
    assert early.paths.tokens == ("v₁", "v₂", "v₃", "v₄", "v₅")
    assert early.paths.n_layers == 3


@pytest.mark.parametrize("wrong", [{"tokens": (0,)}, {"tokens": (1, 6)}, {"n_layers": 0}, {"n": 3}])
def test_tokens_that_are_not_there_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match="expected tokens 1 … n"):
        synthetic.figure_1_paths(**wrong)
