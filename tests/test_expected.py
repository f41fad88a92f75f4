"""The error that is expected of the estimate: from what it is predicted, and what it says."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from small_models import CASES, case

import oversquash_lens as osl
from oversquash_lens.errors import InputError
from oversquash_lens.paths.kinds import MEAN_FIELD_FIXED
from oversquash_lens.paths.profiles import OFFSET, OFFSET_ERROR, SPREAD, ExpectedError, paths_of_trace


def without_response(trace: osl.Trace) -> osl.Trace:
    """The recording of a model whose scores nothing moves."""
    gains = trace.gains
    still = replace(gains, key=torch.zeros_like(gains.key), key_pull=torch.zeros_like(gains.key_pull))
    return replace(trace, gains=still)


@pytest.mark.parametrize("name", CASES)
def test_response_is_what_the_softmax_adds(name: str) -> None:
    trace = osl.record(*case(name))
    full, fixed = (osl.mean_field_sensitivity(each) for each in (trace, without_response(trace)))
    expected = osl.expected_error(trace)
    response = ((full.log_values - fixed.log_values) / math.log(10)).nan_to_num(nan=0.0).median().item()
    assert response >= 0
    assert expected.softmax_share == pytest.approx(response, abs=1e-9)
    assert expected.offset == pytest.approx(OFFSET[0] + OFFSET[1] * response)
    assert math.log(expected.spread) == pytest.approx(SPREAD[0] + SPREAD[1] * response)
    assert expected.offset_error == OFFSET_ERROR
    assert osl.expected_error(without_response(trace)).softmax_share == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_edges_of_fixed_attention_are_those_of_scores_that_nothing_moves(name: str) -> None:
    trace = osl.record(*case(name))
    n = trace.n_positions
    fixed, still = paths_of_trace(trace, MEAN_FIELD_FIXED), paths_of_trace(without_response(trace), "mean_field")
    for layer in range(trace.n_layers):
        rows, edges = still.edge_block(layer, 0, n).dense(), fixed.edge_block(layer, 0, n)
        assert torch.allclose(edges.dense(), rows, rtol=1e-6)
        assert torch.allclose(edges.by_head().total(0).double(), rows, rtol=1e-5, atol=1e-9)


def test_a_factor_holds_the_share_it_names() -> None:
    expected = ExpectedError(softmax_share=0.2, offset=-0.3, offset_error=0.1, spread=0.2)
    assert expected.size == pytest.approx(10**-0.3)
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * math.hypot(0.1, 0.2)
    for level in (0.5, 0.9):
        held = (normal.abs() <= math.log10(expected.factor(level))).double().mean().item()
        assert held == pytest.approx(level, abs=0.01)
    assert "0.50 times the true size" in expected.sentence
    assert f"a factor of {expected.factor():.1f}" in expected.sentence
    written = json.loads(json.dumps(expected.to_dict()))
    assert written["size"] == pytest.approx(expected.size)
    assert written["sentence"] == expected.sentence


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, math.nan])
def test_a_level_is_a_share(level: float) -> None:
    expected = ExpectedError(softmax_share=0.2, offset=-0.3, offset_error=0.1, spread=0.2)
    with pytest.raises(InputError, match="expected a share between 0 and 1"):
        expected.factor(level)


def test_of_a_trace_only() -> None:
    with pytest.raises(InputError, match="expected a Trace"):
        osl.expected_error("a prompt")
