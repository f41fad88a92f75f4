"""Edits of the attention: each against the masked or sharpened softmax that it stands for, and on running models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from oversquash_lens.errors import InputError
from oversquash_lens.measure.jacobian import measured_sensitivity
from oversquash_lens.record.edits import (
    ADAPTIVE,
    ADAPTIVE_FROM,
    Edit,
    adaptive_temperature,
    edited_attention,
    sliding_window,
    without_first,
)
from oversquash_lens.record.recorder import record

N = 7


def scores() -> torch.Tensor:
    causal = torch.ones(N, N).tril().bool()
    drawn = torch.randn(2, 3, N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.masked_fill(~causal, -torch.inf)


def masked(allowed: Callable[[int, int], bool]) -> torch.Tensor:
    """Softmax of the scores where `allowed(dest, src)`, position by position."""
    out = scores()
    for dest in range(N):
        for src in range(N):
            if not allowed(dest, src):
                out[..., dest, src] = -torch.inf
    return out.softmax(-1)


@pytest.mark.parametrize(
    ("edit", "allowed"),
    [
        (sliding_window(1), lambda dest, src: src == dest),
        (sliding_window(3), lambda dest, src: dest - 3 < src <= dest),
        (sliding_window(2, keep_first=True), lambda dest, src: dest - 2 < src <= dest or src == 0),
        (sliding_window(N), lambda dest, src: True),
        (without_first(), lambda dest, src: src > 0 or dest == 0),
    ],
)
def test_cutting_weights_is_masking_scores(edit: Edit, allowed: Callable[[int, int], bool]) -> None:
    assert torch.allclose(edit(scores().softmax(-1)), masked(allowed), atol=1e-14)


def test_with_a_cache_the_window_counts_from_the_end() -> None:
    whole = scores().softmax(-1)
    edit = sliding_window(3)
    assert torch.equal(edit(whole[..., -2:, :]), edit(whole)[..., -2:, :])


def test_adaptive_temperature_is_a_softmax_of_scaled_scores() -> None:
    rows = scores().softmax(-1)
    expected = torch.empty_like(rows)
    changed = 0
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(N)).tolist():
        row = rows[tuple(index)]
        kept = row[row > 0]
        entropy = -(kept * kept.log()).sum().item()
        power = 1.0
        if entropy > ADAPTIVE_FROM:
            a, b, c, d, e = ADAPTIVE
            power = max(1.0, a * entropy**4 + b * entropy**3 + c * entropy**2 + d * entropy + e)
        changed += power > 1
        expected[tuple(index)] = (power * scores()[tuple(index)]).softmax(-1)
    assert changed > 5  # or the test would show nothing
    assert torch.allclose(adaptive_temperature()(rows), expected, atol=1e-12)


@pytest.mark.parametrize("edit", [sliding_window(2), without_first(), adaptive_temperature()])
def test_a_row_that_lost_everything_still_sums_to_one(edit: Edit) -> None:
    pattern = torch.zeros(1, 1, 3, 3)
    pattern[..., 0] = 1.0  # every position attends to the first one alone, as to a sink
    assert torch.equal(edit(pattern).sum(-1), torch.ones(1, 1, 3))


def test_gradients_through_zeros_are_finite() -> None:
    pattern = scores().softmax(-1).requires_grad_()
    adaptive_temperature()(pattern).square().sum().backward()
    assert torch.isfinite(pattern.grad).all()


def test_the_model_attends_by_the_edited_pattern(fresh: tuple[Any, torch.Tensor], count_hooks: Callable) -> None:
    model, tokens = fresh
    plain, hooks = record(model, tokens), count_hooks(model)
    with edited_attention(model, sliding_window(2)):
        seen = record(model, tokens)
        alone = measured_sensitivity(model, tokens, probes=None)
    again = record(model, tokens)
    rows = seen.attention[0].rows(0, 6)
    assert torch.allclose(rows, sliding_window(2)(rows[None])[0])
    assert not torch.allclose(plain.prediction_input, seen.prediction_input)
    assert torch.equal(plain.prediction_input, again.prediction_input)
    assert count_hooks(model) == hooks
    # Two layers of windows of two: what is three positions back is not heard, but for what rounding leaves.
    assert alone.values[:-3].max() < 1e-6 * alone.values[-3:].min()


def test_no_edit_changes_nothing(fresh: tuple[Any, torch.Tensor]) -> None:
    model, tokens = fresh
    with edited_attention(model, None):
        assert torch.equal(record(model, tokens).prediction_input, record(model, tokens).prediction_input)


def test_a_window_without_room_is_refused() -> None:
    with pytest.raises(InputError, match="window of 0"):
        sliding_window(0)
