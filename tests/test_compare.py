"""compare(): Spearman's ρ against an independent reference, log ratios by hand, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import case
from small_results import about, profile, truth

import oversquash_lens as osl
from oversquash_lens.analyses.compare import compare, compare_flows
from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured import MeasuredSensitivity
from oversquash_lens.numerics import spearman
from oversquash_lens.paths.recursion import PathProfile


def sized(logs: list[float], constant: float = 0.0, gain: str = "model") -> PathProfile:
    """A profile of one layer whose log_values are `logs` + `constant`."""
    rows = torch.full((2, len(logs)), -math.inf, dtype=torch.float64)
    rows[0], rows[1, -1] = torch.tensor(logs), 0.0
    named = dataclasses.replace(about(), final_gain=gain, folded=gain != "model")
    return PathProfile("proof", tuple(map(str, range(len(logs)))), rows, constant, named)


def measured(values: list[float]) -> MeasuredSensitivity:
    tokens = tuple(map(str, range(len(values))))
    return dataclasses.replace(
        truth(tokens), values=torch.tensor(values, dtype=torch.float64), standard_error=torch.zeros(len(values))
    )


def slow_spearman(first: list[float], second: list[float]) -> float:
    """Pearson's correlation of mean ranks, written out."""

    def ranks(values: list[float]) -> list[float]:
        return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]

    a, b = ranks(first), ranks(second)
    mean = (len(a) + 1) / 2
    top = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    size = math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))
    return top / size if size else math.nan


few_levels = st.lists(st.integers(-3, 3), min_size=2, max_size=12)


@given(data=st.data(), first=few_levels)
@settings(max_examples=200, deadline=None)
def test_spearman_with_ties_is_pearson_of_mean_ranks(data: st.DataObject, first: list[int]) -> None:
    second = data.draw(st.lists(st.integers(-3, 3), min_size=len(first), max_size=len(first)))
    got = spearman(torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64))
    wanted = slow_spearman(first, second)
    assert math.isnan(got) == math.isnan(wanted)
    assert math.isnan(got) or got == pytest.approx(wanted, abs=1e-12)


def test_spearman_does_not_change_with_the_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    rho = spearman(x, y)
    assert -1 <= rho <= 1
    assert spearman(x.exp(), 3 * y - 7) == pytest.approx(rho, abs=1e-12)
    assert spearman(-x, y) == pytest.approx(-rho, abs=1e-12)
    assert spearman(y, x) == pytest.approx(rho, abs=1e-12)
    assert spearman(x, x) == pytest.approx(1)


def test_ranks_of_what_no_path_reaches() -> None:
    """-inf is the lowest rank, whatever it is compared with."""
    assert spearman(torch.tensor([-math.inf, 0.0, 1.0]), torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(1)


def test_ratios_are_of_the_first_over_the_second() -> None:
    ten = math.log(10)
    found = compare(sized([ten, 2 * ten, 3 * ten], constant=ten), measured([1.0, 1.0, 1.0]))
    assert found.min_log10_ratio == pytest.approx(2)
    assert found.median_log10_ratio == pytest.approx(3)
    assert found.max_log10_ratio == pytest.approx(4)
    back = compare(measured([1.0, 1.0, 1.0]), sized([ten, 2 * ten, 3 * ten], constant=ten))
    assert (back.min_log10_ratio, back.max_log10_ratio) == pytest.approx((-4, -2))


def test_the_median_of_an_even_number_lies_between_the_middle_two() -> None:
    ten = math.log(10)
    found = compare(sized([0.0, ten, 3 * ten, 4 * ten]), measured([1.0] * 4))
    assert found.median_log10_ratio == pytest.approx(2)


def test_a_position_that_neither_hears_does_not_hide_the_others() -> None:
    """A sliding window reaches not every token: 0 against 0 says nothing, the other ratios stay."""
    ten = math.log(10)
    found = compare(sized([-math.inf, ten, 2 * ten]), measured([0.0, 1.0, 1.0]))
    assert (found.min_log10_ratio, found.max_log10_ratio) == pytest.approx((1, 2))


def test_shares_alone_have_no_ratio() -> None:
    found = compare(profile("theorem_5_1", constant=math.nan), truth())
    assert -1 <= found.spearman <= 1
    assert all(
        math.isnan(number) for number in (found.median_log10_ratio, found.min_log10_ratio, found.max_log10_ratio)
    )


def test_other_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="same tokens"):
        compare(sized([0.0, 1.0]), sized([0.0, 1.0, 2.0]))
    with pytest.raises(InputError, match="same tokens"):
        compare(sized([0.0, 1.0]), dataclasses.replace(sized([0.0, 1.0]), tokens=("a", "b")))


@pytest.mark.parametrize(("mine", "theirs"), itertools.product(("model", "restored", "unknown"), repeat=2))
def test_an_unknown_gain_goes_with_nothing_but_itself(mine: str, theirs: str) -> None:
    one, two = sized([0.0, 1.0, 2.0], gain=mine), sized([0.5, 1.0, 3.0], gain=theirs)
    if (mine == "unknown") == (theirs == "unknown"):
        assert compare(one, two).spearman == pytest.approx(1)
    else:
        with pytest.raises(InputError, match=r"fold_ln=False"):
            compare(one, two)


@pytest.mark.parametrize("name", ["ln-plain-learned", "bridge-llama"])
def test_the_estimated_flow_against_the_measured_one_number_by_number(name: str) -> None:
    model, tokens = case(name)
    audit = osl.audit(model, tokens, probes=2, draws=0, where=[1, slice(0, 2)])
    trace = osl.record(model, tokens)
    for found, source in zip(audit.where, (1, slice(0, 2)), strict=True):
        estimated, measured = osl.flow(trace, source=source), osl.measured_flow(model, tokens, source)
        rows = zip(estimated.node.tolist(), measured.node.tolist(), strict=True)
        apart = [sum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2 for one, other in rows]
        assert found.total_variation.tolist() == pytest.approx(apart, abs=1e-6)
        assert found.total_variation[-1] == pytest.approx(0, abs=1e-5)  # all of it leaves at the last position
        rho = [slow_spearman(*pair) for pair in zip(estimated.head.tolist(), measured.head.tolist(), strict=True)]
        assert found.heads.tolist() == pytest.approx(rho, abs=1e-9, nan_ok=True)
        for leading, flow in ((found.estimated, estimated), (found.measured, measured)):
            by_share = sorted(
                itertools.product(*map(range, flow.head.shape)), key=lambda at, flow=flow: -flow.head[at].item()
            )
            assert leading == tuple(by_share[:3])
        assert found.shared == len({*found.estimated} & {*found.measured})
        assert f"flow of {found.text}: total variation" in str(audit)
    assert audit.to_dict()["where"][0]["total_variation"] == pytest.approx(audit.where[0].total_variation.tolist())


def test_flows_of_different_sources_are_not_compared() -> None:
    model, tokens = case("ln-plain-learned")
    with pytest.raises(InputError, match="one source"):
        compare_flows(osl.flow(osl.record(model, tokens), source=1), osl.measured_flow(model, tokens, 2))
