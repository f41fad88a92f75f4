"""The bounds that promise to hold, over random architectures, weights, prompts and formats: never below autograd.

OVERSQUASH_LENS_CASES=5000 asks for more cases than the default. What was tried, how many violations there were and
how tight the bounds got is printed at the end of the test run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from bad_days import as_users_run_it
from random_models import DRAWN, DTYPES, PROMPTS, WEIGHTS, Case, architectures, build, draw
from reference import exact_jacobian
from small_models import NO_HOOKED, has_hooked, hooked, random_spec, tokens_for
from soundness import SOUND, Tally, hold, jacobians, judge, spectral_norms

import oversquash_lens as osl

CASES = int(os.environ.get("OVERSQUASH_LENS_CASES", "260"))
BATCH = 20
needs_hooked = pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)


@pytest.mark.parametrize("first", range(0, CASES, BATCH))
def test_bounds_are_never_below_the_exact_jacobian(first: int, record_property: Callable) -> None:
    """At every layer and position; what rounding allows stands in soundness.py."""
    tally, broken = Tally(), []
    with as_users_run_it():  # the type checker is ten times the work of a case
        for seed in range(first, min(first + BATCH, CASES)):
            judged = judge(draw(seed))
            tally.add(judged)
            broken += [] if isinstance(judged, str) else [str(each) for each in judged if each.violations]
    record_property("soundness", json.dumps(tally.figures()))
    assert not broken, broken
    assert tally.unrecorded <= BATCH // 4, "most cases must be held against the truth, not refused by the gate"
    assert tally.compared > 8 * (tally.cases - tally.unrecorded)


def test_the_cases_cover_what_they_are_drawn_from() -> None:
    cases = [draw(seed) for seed in range(260)]
    assert {case.weights for case in cases} == set(WEIGHTS)
    assert {case.prompt for case in cases} == set(PROMPTS)
    assert {case.dtype for case in cases} == set(DTYPES)
    assert {case.n for case in cases} >= {2, 16}
    assert {case.architecture for case in cases} == set(architectures())
    if has_hooked():
        specs = [random_spec(case.seed) for case in cases if case.architecture in DRAWN]
        for key, options in {"norm": 2, "gated": 2, "kv_heads": 3, "positions": 2, "n_layers": 3, "act": 5}.items():
            assert len({spec[key] for spec in specs}) == options, f"not every {key} drawn"


def test_a_case_repeats_from_its_seed() -> None:
    (one, first), (two, second) = (build(draw(3)) for _ in range(2))
    assert torch.equal(first, second)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


# --- the judges judged ---


def some_case() -> Case:
    return replace(draw(1), architecture=architectures()[0], weights="Gaussian", prompt="random", dtype="float64", n=5)


def test_a_bound_that_is_too_small_is_found_at_every_layer() -> None:
    """The truth itself, one layer's row lowered by a millionth: exactly that layer is named."""
    case = some_case()
    model, tokens = build(case)
    truths = [spectral_norms(j) for j in jacobians(model, tokens, freeze_attention=False)]
    bound = osl.path_bound(osl.record(model, tokens), "calibrated_full")
    last = torch.tensor([[-math.inf] * 4 + [0.0]], dtype=torch.float64)
    exact = torch.cat([torch.stack(truths).log() - bound.log_constant, last])
    assert hold(case, replace(bound, log_by_layer=exact), truths).violations == 0
    for layer in range(len(truths)):
        lowered = exact.clone()
        lowered[layer, 2] -= 1e-6
        judged = hold(case, replace(bound, log_by_layer=lowered), truths)
        assert (judged.violations, judged.where) == (1, f"layer {layer}, position 2")


def test_what_is_compared_is_the_jacobian_one_row_at_a_time() -> None:
    model, tokens = build(some_case())
    for frozen in (True, False):
        first = jacobians(model, tokens, freeze_attention=frozen)[0]
        assert torch.equal(first, exact_jacobian(model, tokens, freeze_attention=frozen))


def test_norms_of_tiny_jacobians_do_not_underflow() -> None:
    jacobian = torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.matrix_norm(jacobian, 2)
    assert torch.allclose(spectral_norms(jacobian * 1e-200), expected * 1e-200, rtol=1e-12, atol=0)


# --- cases that random drawing does not reach ---


@needs_hooked
@pytest.mark.parametrize(("dtype", "faint"), [("float64", 1e-9), ("float32", 1e-4)])
def test_what_an_output_matrix_passes_on_faintly_still_counts(dtype: str, faint: float) -> None:
    """W_O nearly singular, W_V writing along its faintest direction alone, attention very sensitive to its keys.

    Then all that reaches y_n from elsewhere is the softmax's derivative times a distance ‖o_k − ō_j‖ that a Gram
    matrix of W_O has lost in rounding.
    """
    tightest = dict.fromkeys(SOUND, math.inf)
    for seed in range(20):
        model = hooked(seed, norm="RMS", n_layers=1, n_heads=1, d_model=4, d_mlp=4, dtype=DTYPES[dtype])
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            attention = model.blocks[0].attn
            basis = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
            scale = torch.tensor([1, 1, 1, faint], dtype=torch.float64)
            attention.W_O.copy_((basis * scale @ basis.T)[None])
            attention.W_V.copy_((torch.randn(4, 1, generator=generator, dtype=torch.float64) @ basis[:, 3:].T)[None])
            for weight in (attention.W_Q, attention.W_K):
                weight.mul_(9)
            attention.b_V.zero_()
            model.blocks[0].mlp.W_out.zero_()
        case = Case(seed, "pre-norm", "nearly singular W_O", "random", 2, dtype)
        tokens = tokens_for(seed, 2)
        trace = osl.record(model, tokens)
        for variant in SOUND:
            truths = [spectral_norms(j) for j in jacobians(model, tokens, freeze_attention=variant == "calibrated")]
            judged = hold(case, osl.path_bound(trace, variant), truths)
            assert judged.violations == 0, judged
            tightest[variant] = min(tightest[variant], judged.tightest)
    assert tightest["calibrated_full"] < 0.01, "these models are meant to bring the bound down to the truth"


# --- probes ---


@pytest.mark.parametrize(("probes", "two_errors"), [(4, 0.84), (16, 0.91), (64, 0.93)])
def test_probes_miss_the_truth_as_often_as_their_standard_error_says(probes: int, two_errors: float) -> None:
    """The truth lies within one standard error in about 68 % of cases, within two in about 95 %.

    From 4 probes the two-sigma interval holds 85 to 91 %, from 16 on 92 to 95 %: the estimate is a root of a χ², which
    is skewed the more, the lower the Jacobian's rank. And the error is as large as stated in the mean square.
    """
    scores, errors, stated = [], [], []
    for seed in range(6):
        case = replace(draw(seed), weights=list(WEIGHTS)[seed % 3], dtype="float64", n=5, prompt="random")
        model, tokens = build(case)
        jacobian = jacobians(model, tokens, freeze_attention=False)[0]
        truth = jacobian.square().sum((1, 2)).sqrt()
        heard = truth > 1e-6 * truth.max()
        for draw_seed in range(25):
            measured = osl.measured_sensitivity(model, tokens, probes=probes, seed=draw_seed)
            error, standard = (measured.values - truth)[heard], measured.standard_error[heard]
            scores.append(error / standard)
            errors.append((error / truth[heard]).square())
            stated.append((standard / truth[heard]).square())
    z = torch.cat(scores).abs()
    assert len(z) > 500
    assert 0.60 < (z < 1).double().mean() < 0.76
    assert two_errors < (z < 2).double().mean() < 0.99
    assert 0.85 < (torch.cat(stated).mean() / torch.cat(errors).mean()).sqrt() < 1.15


def test_one_probe_states_the_largest_error_possible() -> None:
    """A Jacobian of rank 1 makes ‖ωJ‖² a χ² with one degree of freedom: √½ of the value, to first order."""
    model, tokens = build(some_case())
    measured = osl.measured_sensitivity(model, tokens, probes=1)
    assert torch.allclose(measured.standard_error, measured.values * math.sqrt(0.5), rtol=1e-12)
