"""Squashing against its definitions: uniform attention by hand, entropies by hand, runs by trying them all."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Reading, brute_force, read
from small_models import NO_HOOKED, has_hooked, hooked, tokens_for
from test_flow import paths_of

import oversquash_lens as osl
from oversquash_lens.capture.attention import UniformAttention
from oversquash_lens.errors import InputError
from oversquash_lens.paths.squashing import maximal_runs

record = partial(osl.record, attention="kept")  # references read the model's own patterns

needs_hooked = pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)


def with_uniform_attention(reading: Reading) -> Reading:
    n = reading.n
    uniform = torch.ones(n, n, dtype=torch.float64).tril() / torch.arange(1, n + 1)[:, None]
    for layer in reading.layers:
        layer.pattern = uniform.expand_as(layer.pattern)
    return reading


def exp_entropy(shares: list[float]) -> float:
    return math.exp(-math.fsum(p * math.log(p) for p in shares if p))


@needs_hooked
@pytest.mark.parametrize("kind", ["mean_field", "proof", "multi_head", "calibrated", "calibrated_full"])
def test_the_null_model_is_the_same_model_with_uniform_attention(kind: str) -> None:
    model, tokens = hooked(7, n_layers=3), tokens_for(7, 6)
    found = osl.squashing(record(model, tokens, node_probes=None), kind)
    power = 0.5 if kind == "mean_field" else 1.0
    for reading, share, flow in (
        (read(model, tokens), found.share, found.flow),
        (with_uniform_attention(read(model, tokens)), found.null_share, found.null),
    ):
        paths = paths_of(kind, reading)
        sums = brute_force(paths.edges, paths.nodes, 6)[0]
        assert torch.allclose(share, sums**power / (sums**power).sum(), rtol=1e-9)
        assert torch.allclose(flow.node[0], sums / sums.sum(), rtol=1e-9)


@needs_hooked
def test_numbers_are_what_they_say() -> None:
    trace = osl.record(hooked(7, n_layers=3), tokens_for(7, 6))
    found = osl.squashing(trace)
    effective, null_effective = exp_entropy(found.share.tolist()), exp_entropy(found.null_share.tolist())
    assert found.effective_tokens == pytest.approx(effective)
    assert found.null_effective_tokens == pytest.approx(null_effective)
    assert found.index == pytest.approx((math.log(null_effective) - math.log(effective)) / math.log(null_effective))
    assert torch.allclose(found.lift * found.null_share, found.share)
    assert torch.allclose(found.relative_width * found.null.effective_width, found.flow.effective_width)
    assert found.relative_width[found.narrowest] == found.relative_width[:-1].min()
    assert f"{found.effective_tokens:.1f}" in found.sentence
    assert f"layer {found.narrowest}" in found.sentence
    assert torch.allclose(
        found.share, osl.mean_field_sensitivity(osl.record(hooked(7, n_layers=3), tokens_for(7, 6))).share
    )
    losses = [span.null_share - span.share for span in found.spans]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] > 0
    for span in found.spans:
        assert span.share == pytest.approx(found.share[span.start : span.stop].sum().item())
        assert span.null_share == pytest.approx(found.null_share[span.start : span.stop].sum().item())


@needs_hooked
def test_a_model_that_attends_uniformly_is_not_squashed() -> None:
    """Keys of zero: every score is 0, so attention is uniform and the model is its own null model."""
    model = hooked(7)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_K.zero_()
            block.attn.b_K.zero_()
    found = osl.squashing(record(model, tokens_for(7, 6)), "proof")
    assert found.index == pytest.approx(0, abs=1e-9)
    assert torch.allclose(found.lift, torch.ones(6, dtype=torch.float64))
    assert torch.allclose(found.relative_width, torch.ones(3, dtype=torch.float64))
    assert sum(span.null_share - span.share for span in found.spans) == pytest.approx(0, abs=1e-9)


@needs_hooked
def test_json_has_every_number() -> None:
    found = osl.squashing(osl.record(hooked(2), tokens_for(2, 4)))
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["effective_tokens"] == found.effective_tokens
    assert written["index"] == found.index
    assert torch.allclose(torch.tensor(written["lift"], dtype=torch.float64), found.lift)
    assert written["flow"]["node"] != written["null_flow"]["node"]


@given(st.lists(st.integers(-4, 4), max_size=9))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_maximal_runs_are_those_of_the_definition(scores: list[int]) -> None:
    """Ruzzo & Tompa's characterisation: all proper parts of a run sum to less, and no run that has this contains it."""
    n = len(scores)

    def total(start: int, stop: int) -> int:
        return sum(scores[start:stop])

    def rises(start: int, stop: int) -> bool:
        """Every prefix and every suffix of the run is positive: none of its ends should be cut off."""
        inside = range(start + 1, stop)
        return total(start, stop) > 0 and all(total(start, middle) > 0 and total(middle, stop) > 0 for middle in inside)

    good = [run for run in itertools.combinations(range(n + 1), 2) if rises(*run)]
    largest = [(a, b) for a, b in good if not any(c <= a and b <= d and (c, d) != (a, b) for c, d in good)]
    assert maximal_runs(scores) == largest


def test_uniform_attention_is_uniform() -> None:
    attention = UniformAttention(5, 2, torch.float64)
    rows = attention.rows(1, 4)
    assert rows.shape == (2, 3, 5)
    assert torch.allclose(rows.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert rows[1, 1].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0])
    assert UniformAttention(5, 2, device="meta").rows(0, 2).device.type == "meta"
    with pytest.raises(InputError, match="expected 0 ≤ start < stop ≤ 5, the number of positions, got rows 3:6"):
        attention.rows(3, 6)


def test_the_real_model_has_as_many_effective_tokens_as_measured(smollm2: object) -> None:
    """Measured once with 32 probes on another occasion: 30.7 of the prompt `meeting`'s 47 tokens."""
    from benchmarks.prompts import seven_prompts

    found = osl.squashing(osl.record(smollm2, seven_prompts()["meeting"]))
    assert found.effective_tokens == pytest.approx(30.7, rel=0.05)
    assert found.null_effective_tokens < 0.9 * found.effective_tokens
    assert 20 <= found.narrowest <= 26
    assert found.spans[0].start == 0
