"""Each check at its edge: what just passes, what just does not, and that NaN never passes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from oversquash_lens.capture import checks
from oversquash_lens.capture.checks import TOLERANCE
from oversquash_lens.errors import HookMismatchError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def refused(check: Callable[[], None], words: str) -> None:
    with pytest.raises(HookMismatchError, match=words):
        check()


def test_tolerances_are_what_is_promised() -> None:
    """A hundred times of any of these would let a wrong factor of 1.1 through."""
    most = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
    assert most == TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_routes_may_differ_by_the_tolerance_of_the_largest(dtype: torch.dtype) -> None:
    seen = torch.tensor([3.0, -4.0, 0.0])

    def same(off: float) -> None:
        checks.check_same("here", seen + torch.tensor([0.0, 0.0, off]), seen, "one", "two", dtype)

    same(0.99 * 4 * TOLERANCE[dtype])
    refused(lambda: same(1.01 * 4 * TOLERANCE[dtype]), "one differs from two")
    refused(lambda: same(math.nan), "one differs from two")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_stream_moves_by_the_update(dtype: torch.dtype) -> None:
    before, update = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -1.0]])
    slack = TOLERANCE[dtype] * 1.0 + 16 * torch.finfo(dtype).eps * 1.5

    def moved(off: float) -> None:
        checks.check_sum("here", before, update, before + update + torch.tensor([[0.0, off]]), dtype)

    moved(-0.99 * slack)
    refused(lambda: moved(-1.01 * slack), "off by")


@pytest.mark.parametrize("broken", range(3))
def test_nan_in_any_part_of_the_residual_stream_is_refused(broken: int) -> None:
    parts = [torch.ones(1, 2), torch.ones(1, 2), 2 * torch.ones(1, 2)]
    parts[broken][0, 1] = math.nan
    with pytest.raises(HookMismatchError):
        checks.check_sum("here", *parts, torch.float32)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_ends_where_it_says(window: int) -> None:
    n, rows = 5, torch.tensor([2, 4])
    src = torch.arange(n)
    inside = ((rows[:, None] - src < window) & (src <= rows[:, None])).float()[None]
    checks.check_window("here", inside, rows, window)
    for place, row in enumerate(rows.tolist()):
        one_more = inside.clone()
        one_more[0, place, row - window] = 1e-6
        if row >= window:
            refused(
                lambda seen=one_more: checks.check_window("here", seen, rows, window), f"more than {window - 1} back"
            )
    checks.check_window("here", torch.ones(1, 2, n), rows, None)


def test_rows_sum_to_what_a_sink_leaves() -> None:
    scores = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    sinks, rows = torch.tensor([0.3, -1.0]), torch.arange(4)
    hidden = torch.ones(4, 4).triu(1).bool()
    whole = torch.cat([scores.masked_fill(hidden, -math.inf), sinks[:, None, None].expand(-1, 4, 1)], -1).softmax(-1)
    pattern = whole[..., :-1]
    checks.check_sinks("here", pattern, scores, sinks, rows)
    for wrong in (sinks + 0.01, sinks.flip(0)):
        refused(lambda other=wrong: checks.check_sinks("here", pattern, scores, other, rows), "beside the sink")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_sum_to_one_within_the_tolerance(dtype: torch.dtype) -> None:
    pattern = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]], dtype=dtype)
    for off, passes in ((0.9, True), (1.1, False), (math.nan, False)):
        shifted = pattern.clone()
        shifted[0, 1, 0] += off * TOLERANCE[dtype]
        if passes:
            checks.check_pattern("here", shifted)
        else:
            refused(lambda seen=shifted: checks.check_pattern("here", seen), "rows of the attention pattern sum to")


def test_scores_of_grouped_heads_with_scale_cap_and_bias() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(3, 4, 2, generator=generator), torch.randn(3, 2, 2, generator=generator)
    own = (query * key.repeat_interleave(2, 1)).sum(-1).T * 0.5
    checks.check_scores("here", own, query, key, 0.5)
    capped = 2 * torch.tanh(own / 2)
    checks.check_scores("here", capped, query, key, 0.5, 2.0)
    slopes, places = torch.tensor([[0.5], [0.25], [0.1], [0.0]]), torch.arange(3.0)
    checks.check_scores("here", own + slopes * places + 3, query, key, 0.5, None, places)
    swapped = key.flip(1)
    for scores, keys, scale, cap, bias in (
        (own, key, 0.51, None, None),
        (own, swapped, 0.5, None, None),
        (capped, key, 0.5, None, None),
        (own, key, 0.5, 2.0, None),
        (own + slopes * places.square(), key, 0.5, None, places),
    ):
        refused(
            lambda scores=scores, keys=keys, scale=scale, cap=cap, bias=bias: checks.check_scores(
                "here", scores, query, keys, scale, cap, bias
            ),
            "q · k · scale differs from the score",
        )
