"""What an estimate is held against the truth on: the prompts, their halves, and the numbers of one row."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import bridge, has_bridge, hooked

sys.path.insert(0, str(Path(__file__).parent.parent))

import oversquash_lens as osl
from benchmarks import estimate_vs_truth as harness
from benchmarks.estimate_prompts import KINDS, REAL, Sample, halves, samples, tokens

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
