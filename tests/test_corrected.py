"""Estimate and probes together: the posterior against linear algebra, simulation, and the truth."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CASES, case
from small_results import about

import oversquash_lens as osl
from oversquash_lens.analyses.compare import compare
from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured import APART, OFFSET_SPREAD, RANK, MeasuredSensitivity, corrected
from oversquash_lens.paths.recursion import PathProfile


def profile(logs: torch.Tensor) -> PathProfile:
    return PathProfile("mean_field", tuple(map(str, range(len(logs)))), logs[None].repeat(2, 1), 0.0)


def scatter(squares: float) -> tuple[float, float]:
    """Variance and mean of ½ ln(χ²/squares), by integrating over the gamma distribution."""
    t = torch.linspace(-40, 12, 200_001, dtype=torch.float64)  # ln of χ²/2
    density = (squares / 2 * t - t.exp() - math.lgamma(squares / 2)).exp()
    value = (t - math.log(squares / 2)) / 2
    mean = torch.trapezoid(value * density, t).item()
    return torch.trapezoid((value - mean) ** 2 * density, t).item(), mean


def by_matrices(
    prior: torch.Tensor, seen: torch.Tensor, spread: float, own: float, shared: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of x given y = x + noise, x and y jointly normal: whole covariance matrices."""
    eye, ones = torch.eye(len(prior), dtype=torch.float64), prior.new_ones(len(prior), len(prior))
    covariance = OFFSET_SPREAD**2 * ones + spread * eye
    gain = covariance @ torch.linalg.inv(covariance + shared * ones + own * eye)
    return prior + gain @ (seen - prior), ((eye - gain) @ covariance).diagonal()


@settings(deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 12), probes=st.integers(1, 3))
def test_is_the_posterior_of_jointly_normal_logs(seed: int, n: int, probes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    prior, probed = torch.randn(2, n, generator=generator, dtype=torch.float64)
    found = corrected(profile(prior), probed.exp(), about(), probes)
    variance, bias = scatter(RANK * probes)
    own, shared = APART * variance, (1 - APART) * variance
    spread = own * found.weight / (1 - found.weight)
    mean, error = by_matrices(prior, probed - bias, spread, own, shared)
    assert torch.allclose(found.values.log(), mean, rtol=1e-6, atol=1e-6)
    assert torch.allclose(found.standard_error / found.values, error.sqrt(), rtol=1e-6)
    reach = 1.6448536269514722 * error.sqrt()
    assert torch.allclose(found.low.log(), mean - reach, rtol=1e-6, atol=1e-6)
    assert torch.allclose(found.high.log(), mean + reach, rtol=1e-6, atol=1e-6)


def test_intervals_hold_what_they_promise_where_the_model_of_errors_is_true() -> None:
    generator = torch.Generator().manual_seed(0)
    variance, bias = scatter(RANK)
    own, shared = APART * variance, (1 - APART) * variance
    inside = {0.5: 0, 0.9: 0}
    rounds, n = 400, 60
    for _ in range(rounds):
        prior = torch.randn(n, generator=generator, dtype=torch.float64)
        numbers = torch.randn(2, n + 1, generator=generator, dtype=torch.float64)
        truth = prior + OFFSET_SPREAD * numbers[0, 0] + 0.3 * numbers[0, 1:]
        seen = truth + shared**0.5 * numbers[1, 0] + own**0.5 * numbers[1, 1:]
        for level in inside:
            found = corrected(profile(prior), (seen + bias).exp(), about(), 1, level)
            inside[level] += int(((found.low.log() <= truth) & (truth <= found.high.log())).sum())
    for level, count in inside.items():
        assert count / (rounds * n) == pytest.approx(level, abs=0.03)


def test_positions_that_nothing_is_known_of_keep_what_the_probes_say() -> None:
    prior = torch.tensor([-math.inf, 0.0, 0.5, -math.inf], dtype=torch.float64)
    found = corrected(profile(prior), torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64), about(), 1)
    assert found.values[0] == found.low[0] == found.high[0] == 0
    assert found.values[3].item() == pytest.approx(3.0)
    assert torch.isfinite(found.values).all()
    assert 1.0 < found.values[2].item() < 2.5
    unknown = corrected(profile(prior.new_full((3,), -math.inf)), prior.new_ones(3), about(), 1)
    assert torch.equal(unknown.values, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("name", CASES)
def test_many_probes_find_the_truth_on_every_class(name: str) -> None:
    model, tokens = case(name)
    truth = osl.measured_sensitivity(model, tokens, probes=None).values.double()
    many = osl.probe_corrected_sensitivity(model, tokens, probes=400)
    assert (many.values / truth).log().abs().max() < 0.2
    few, measured = (
        function(model, tokens, probes=2, seed=3)
        for function in (osl.probe_corrected_sensitivity, osl.measured_sensitivity)
    )
    assert torch.allclose(few.probed, measured.values.double(), rtol=1e-6)  # the same probes
    assert (few.low < few.values).all()
    assert (few.values < few.high).all()
    assert few.estimate.values.shape == few.values.shape
    assert 0 < few.weight < 1


def test_is_a_measured_sensitivity_for_all_that_take_one() -> None:
    model, tokens = case(CASES[0])
    found = osl.probe_corrected_sensitivity(model, tokens)
    assert isinstance(found, MeasuredSensitivity)
    assert found.probes == 1
    assert not found.exact
    assert -1 <= compare(found.estimate, found).spearman <= 1
    assert "<" in osl.views.positions(found).local_src
    written = json.loads(json.dumps(found.to_dict()))
    assert written["kind"] == "corrected"
    assert written["estimate"]["kind"] == "mean_field"
    assert len(written["low"]) == len(found.tokens)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"probes": 0}, "expected at least 1, as a whole number, got probes=0"),
        ({"level": 1.0}, "expected a share between 0 and 1, got level=1.0"),
    ],
)
def test_bad_input(options: dict, said: str) -> None:
    model, tokens = case(CASES[0])
    with pytest.raises(InputError, match=said):
        osl.probe_corrected_sensitivity(model, tokens, **options)


def test_shows_itself_in_a_few_lines() -> None:
    model, tokens = case(CASES[0])
    for found in (osl.probe_corrected_sensitivity(model, tokens), osl.measured_sensitivity(model, tokens, 4)):
        lines = repr(found).splitlines()
        assert len(lines) <= 12
        assert str(found.about) in lines[0]
        frame = found.to_frame()
        assert frame["value"].tolist() == found.values.tolist()
        assert frame["share"].tolist() == found.share.tolist()
        assert lines[2].split()[0] == str(int(found.share.argmax())), "the largest share first"
        assert found._repr_html_().count("<tr>") == 1 + len(found.tokens)
    assert list(osl.probe_corrected_sensitivity(model, tokens).to_frame().columns[-4:]) == [
        "low",
        "high",
        "probed",
        "estimate",
    ]
