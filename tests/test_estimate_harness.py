"""What an estimate is held against the truth on: the prompts, their halves, and the numbers of one row."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import NO_HOOKED, bridge, has_bridge, has_hooked, hooked, tokens_for

sys.path.insert(0, str(Path(__file__).parent.parent))

import oversquash_lens as osl
from benchmarks import estimate_anatomy as anatomy
from benchmarks import estimate_calibration as calibration
from benchmarks import estimate_vs_truth as harness
from benchmarks import finite_truth as finite
from benchmarks.estimate_prompts import KINDS, REAL, Sample, halves, samples, tokens
from oversquash_lens.numerics import spearman

BYTES = SimpleNamespace(tokenizer=None, cfg=SimpleNamespace(d_vocab=256))  # a model that reads bytes


def small(seed: int) -> Any:
    return bridge(seed) if has_bridge() else hooked(seed)


def made(period: str, length: int = 8) -> list[int]:
    return tokens(Sample("x", "repeated", None, length, seed=3, period=period), BYTES).tolist()


def test_every_kind_has_eight_prompts_and_half_of_them_in_either_half() -> None:
    everything, (first, second) = samples(), halves()
    assert len(everything) == len({each.name for each in everything}) == 96
    assert {kind: sum(each.kind == kind for each in everything) for kind in KINDS} == dict.fromkeys(KINDS, 8)
    for half in (first, second):
        assert {kind: sum(each.kind == kind for each in half) for kind in KINDS} == dict.fromkeys(KINDS, 4)
    assert set(first) | set(second) == set(everything)
    assert not set(first) & set(second)
    assert (first, second) == halves()


def test_real_texts_are_all_different_and_long_enough_for_bytes() -> None:
    real = [each for each in samples() if each.kind in REAL]
    assert len({each.text for each in real}) == len(real) == 80
    for each in samples():
        ids = tokens(each, BYTES)
        assert len(ids) == each.length
        assert 16 <= len(ids) <= 512
        assert 0 <= ids.min() <= ids.max() < 256


def test_made_tokens_repeat_as_their_period_says() -> None:
    a, b, c = made("abc", 3)
    assert len({a, b, c}) == 3
    assert made("abc") == [a, b, c, a, b, c, a, b]
    assert made("a") == [a] * 8
    assert made("a.b") == [a] * 7 + [b]
    assert made("a b") == [a] * 4 + [b] * 4


def test_random_tokens_are_no_special_ones_and_drawn_by_their_seed() -> None:
    model = SimpleNamespace(tokenizer=object(), cfg=SimpleNamespace(d_vocab=40))
    ids = tokens(Sample("x", "random", None, 2000, seed=1), model)
    assert sorted(set(ids.tolist())) == list(range(20, 40))
    assert torch.equal(ids, tokens(Sample("y", "random", None, 2000, seed=1), model))
    assert not torch.equal(ids, tokens(Sample("z", "random", None, 2000, seed=2), model))


def test_a_row_says_how_far_the_estimate_is_and_where_it_is_farthest() -> None:
    truth = harness.Truth(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.zeros(4))
    words, sample = ["a", "b", "c", "d"], samples()[0]
    found = harness.row("m", sample, "first", "e", words, torch.tensor([10.0, 20.0, 40.0, 80.0]), truth)
    assert found.spearman == pytest.approx(1)
    assert found.pearson == pytest.approx(1)
    assert found.median == pytest.approx(1, abs=1e-6)
    assert found.spread == pytest.approx(0, abs=1e-6)
    assert found.exact
    off = harness.row("m", sample, "first", "e", words, torch.tensor([1.0, 2.0, 400.0, 8.0]), truth)
    assert (off.worst_token, off.worst_position) == ("c", 2)
    assert off.worst == pytest.approx(2)
    assert off.median == pytest.approx(0, abs=1e-6)
    assert off.spearman == pytest.approx(0.8)
    assert "m: medians" in harness.table("m", [found])


def test_a_truth_is_measured_once_and_again_for_another_text_or_other_weights(tmp_path, monkeypatch) -> None:
    models = {"m": small(3), "other": small(4)}
    monkeypatch.setattr(harness, "model_of", models.__getitem__)
    harness.mark_of.cache_clear()
    options, ids = Namespace(exact=8, probes=3, out=tmp_path), torch.arange(1, 8)
    first = harness.measured("m", samples()[0], ids, options)
    assert torch.equal(first.values, osl.measured_sensitivity(models["m"], ids, probes=None).values)
    assert not first.error.any()
    measure, calls = osl.measured_sensitivity, []
    monkeypatch.setattr(osl, "measured_sensitivity", lambda *a, **b: calls.append(b["probes"]) or measure(*a, **b))
    assert torch.equal(harness.measured("m", samples()[0], ids, options).values, first.values)
    assert calls == []
    other = harness.measured("m", samples()[0], ids + 1, options)
    assert not torch.equal(other.values, first.values)
    longer = harness.measured("m", samples()[0], torch.arange(1, 12), options)
    assert longer.error.any()
    assert calls == [None, 3]
    models["m"] = models["other"]
    harness.mark_of.cache_clear()
    assert not torch.equal(harness.measured("m", samples()[0], ids, options).values, first.values)
    assert calls == [None, 3, None]


@pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)
def test_true_lengths_of_the_anatomy_are_those_of_autograd() -> None:
    model, ids = hooked(4, n_layers=3, norm="RMS"), tokens_for(4, 7)[0]
    true = anatomy.squares(model, ids, 4000)
    exact = osl.measured_sensitivity(model, ids, probes=None).values.double()
    assert torch.allclose(true.entering[0].sqrt(), exact, rtol=0.1)
    assert true.entering.shape == (4, 7)
    assert true.middle.shape == (3, 7)
    assert (true.entering[-1][:-1] == 0).all()


@pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)
def test_anatomy_ends_with_the_whole_estimate() -> None:
    model, ids = hooked(4, n_layers=3), tokens_for(4, 7)[0]
    trace, true = osl.record(model, ids), anatomy.squares(model, ids, 64)
    last = anatomy.steps(trace, true)[-1]
    estimate = osl.mean_field_sensitivity(trace)
    assert last.rho == pytest.approx(spearman(estimate.values, true.entering[0]))
    # what starts from the true length above the last layer has the estimate's paths, and another constant
    ratio = (2 * estimate.log_by_layer[0]).exp() * true.entering[-1][-1] / true.entering[0]
    assert last.below == pytest.approx((ratio.log10().median().item() / 2, ratio.log10().std().item() / 2))


def test_coefficients_find_the_line_that_errors_were_drawn_from() -> None:
    correction = calibration.Correction(0.9, 0.9, (), 0.1, 0.1, 0.04, 0.0)
    rows = [
        calibration.Row(
            "deep", f"p{i}", "prose", "first", 20, x, 0, 0, 0.5 * x - 0.25, math.exp(x - 2), (), {1: correction}
        )
        for i, x in enumerate((0.0, 0.1, 0.4, 0.5))
    ]
    said = calibration.coefficients(rows)
    assert "OFFSET = (-0.250, 0.500), OFFSET_ERROR = 0.000, SPREAD = (-2.000, 1.000)" in said
    assert "scatters by 0.040" in said
    assert "too few" in calibration.coefficients(rows[:2])


def test_one_row_of_the_calibration_is_what_its_parts_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small(3), tokens_for(3, 9)[0]
    monkeypatch.setattr(calibration, "model_of", lambda name: model)
    exact = osl.measured_sensitivity(model, ids, probes=None).values
    sample = Sample("x-1", "prose", None, 9)
    row = calibration.row("deep", "second", sample, ids, harness.Truth(exact, torch.zeros_like(exact)))
    off = (osl.mean_field_sensitivity(osl.record(model, ids)).values / exact.double()).log10()
    assert row.came == pytest.approx(off.square().mean().sqrt().item())
    assert row.spread == pytest.approx(off.std().item())
    found = osl.probe_corrected_sensitivity(model, ids, probes=2, seed=calibration.SEED)
    inside = ((found.low <= exact) & (exact <= found.high)).double().mean().item()
    assert row.corrections[2].covered[calibration.LEVELS.index(0.9)] == pytest.approx(inside)
    assert list(row.covered) == sorted(row.covered)
    calibration.draw([row], tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").stat().st_size > 10_000
    assert "deep     second real text" in calibration.table([row])


def test_a_kept_exact_truth_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small(3), tokens_for(3, 9)[0]
    monkeypatch.setattr(harness, "model_of", lambda name: model)
    monkeypatch.setattr(harness, "mark_of", lambda name: "mark")
    sample = Sample("x-1", "prose", None, 9)
    exact, probed = Namespace(out=tmp_path, exact=16, probes=4), Namespace(out=tmp_path, exact=0, probes=4)
    first = harness.measured("deep", sample, ids, probed)
    assert (first.error > 0).all()
    best = harness.measured("deep", sample, ids, exact)
    assert (best.error == 0).all()
    assert torch.equal(harness.measured("deep", sample, ids, probed).values, best.values)


def test_average_keys_pull_by_their_frobenius_norm() -> None:
    """What the formula was before: ‖q‖² ‖W_K‖_F²/d_head for each head, and no query side."""
    trace = osl.record(small(3), tokens_for(3, 9)[0])
    gains, weights = trace.gains, trace.gains.weights
    before = harness.with_average_keys(trace)
    factor = weights.key_factor.repeat_interleave(gains.query_norm.shape[1] // weights.key_factor.shape[1], 1)
    square = gains.query_norm.square() * factor.square().sum((2, 3))[..., None] / gains.key.shape[-1]
    by_hand = replace(gains, key_pull=square.sqrt(), key=torch.zeros_like(gains.key))
    wanted = osl.mean_field_sensitivity(replace(trace, gains=by_hand))
    assert torch.allclose(before.log_values, wanted.log_values, rtol=1e-6)
    assert not torch.allclose(before.log_values, osl.mean_field_sensitivity(trace).log_values, rtol=1e-3)


def test_recall_is_of_the_leading_positions_without_the_last() -> None:
    truth = torch.tensor([9.0, 1, 8, 2, 3, 4, 5, 6, 7, 0.5, 0.4, 0.3, 0.2, 99])  # two of thirteen lead: 0 and 2
    assert finite.recall(truth, truth) == 1
    assert finite.recall(-truth, truth) == 0
    assert finite.recall(torch.tensor([1.0, *[0] * 9, 0, 0, 0.5, 5]), truth) == 0.5


def test_a_prompt_of_the_finite_harness_is_what_its_parts_say_and_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = small(5), tokens_for(6, 9)[0]
    monkeypatch.setattr(finite, "model_of", lambda name: model)
    monkeypatch.setattr(finite, "mark_of", lambda name: "mark")
    options = Namespace(out=tmp_path, draws=4, most=5)
    found = finite.kept("small", "one", ids, options)
    assert found["places"] == [0, 2, 4, 6, 8]
    truth = osl.substitution(model, ids, found["places"], 4, "exact")
    assert found["truth"] == pytest.approx(truth.distance.tolist())
    weighted = osl.measured_sensitivity(model, ids, probes=finite.PROBES, norm="vocabulary")
    assert found["values"]["vocabulary"] == pytest.approx(weighted.values[found["places"]].tolist())
    nodes = osl.substitution(model, ids, found["places"], 8, "nodes", seed=finite.OTHER_SEED)
    assert found["values"]["nodes, 8 draws"] == pytest.approx(nodes.distance.tolist())
    monkeypatch.setattr(finite, "judged", lambda *args: pytest.fail("measured again"))
    assert finite.kept("small", "one", ids, options) == found
    assert "nodes, 2 draws" in finite.table("small", [{"half": "first", "kind": "random", **found}])
