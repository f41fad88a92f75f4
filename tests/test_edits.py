"""Edits of the attention: each against the masked or sharpened softmax that it stands for, and on running models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import tokens_for

from oversquash_lens.capture.edits import (
    ADAPTIVE,
    ADAPTIVE_FROM,
    Edit,
    ablate_head,
    adaptive_temperature,
    edited_attention,
    edited_prompt,
    edited_trace,
    mask_position,
    separators,
    sharpen,
    sliding_window,
    window,
    with_bos,
    without_bos,
    without_first,
)
from oversquash_lens.capture.hooks import attached
from oversquash_lens.capture.recorder import record
from oversquash_lens.capture.tokens import tokenize
from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured import measured_sensitivity

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
        (window(3, keep_first=True), lambda dest, src: dest - 3 < src <= dest or src == 0),
        (without_first(), lambda dest, src: src > 0 or dest == 0),
        (mask_position(3), lambda dest, src: src != 3 or dest == 3),
        (mask_position(N - 1), lambda dest, src: True),
    ],
)
def test_cutting_weights_is_masking_scores(edit: Edit, allowed: Callable[[int, int], bool]) -> None:
    assert torch.allclose(edit(scores().softmax(-1)), masked(allowed), atol=1e-14)


@pytest.mark.parametrize("edit", [sliding_window(3), mask_position(N - 1), mask_position(2)])
def test_with_a_cache_places_count_from_the_end(edit: Edit) -> None:
    whole = scores().softmax(-1)
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


@pytest.mark.parametrize("power", [0.1, 0.5, 1.0, 3.0, 40.0])
def test_sharpening_is_a_softmax_of_scaled_scores(power: float) -> None:
    assert torch.allclose(sharpen(power)(scores().softmax(-1)), (power * scores()).softmax(-1), atol=1e-14)


def test_no_power_empties_a_row() -> None:
    """Even weights to the power 1e6 underflow, all of them: the row stays as even as it was."""
    even = torch.ones(1, 1, N, N).tril() / torch.arange(1, N + 1)[:, None]
    assert torch.allclose(sharpen(1e6)(even), even)


def test_a_head_that_is_off_reads_nothing() -> None:
    pattern = scores().softmax(-1)
    edited = ablate_head(5, 1)(pattern)
    assert torch.equal(edited[:, 1], torch.zeros_like(pattern[:, 1]))
    assert torch.equal(edited[:, ::2], pattern[:, ::2])


@pytest.mark.parametrize("edit", [sliding_window(2), without_first(), adaptive_temperature(), sharpen(2), sharpen(0.5)])
def test_a_row_that_lost_everything_still_sums_to_one(edit: Edit) -> None:
    pattern = torch.zeros(1, 1, 3, 3)
    pattern[..., 0] = 1.0  # every position attends to the first one alone, as to a sink
    assert torch.equal(edit(pattern).sum(-1), torch.ones(1, 1, 3))


@pytest.mark.parametrize("edit", [adaptive_temperature(), sharpen(0.5), sharpen(3), sliding_window(2)])
def test_gradients_through_zeros_are_finite(edit: Edit) -> None:
    pattern = scores().softmax(-1).requires_grad_()
    edit(pattern).square().sum().backward()
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


def outcome(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """y of every position."""
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad(), attached(model, [("unembed.hook_in", lambda y, hook=None: seen.update(y=y.clone()))]):
        model(tokens)
    return seen["y"]


@pytest.mark.parametrize(
    ("edit", "rescored"),
    [
        (window(2), lambda s, dest, src: s.masked_fill(dest - src >= 2, -torch.inf)),
        (mask_position(1), lambda s, dest, src: s.masked_fill((src == 1) & (dest != 1), -torch.inf)),
        (sharpen(3), lambda s, dest, src: 3 * s),
        (sharpen(0.5), lambda s, dest, src: s / 2),
    ],
    ids=lambda edit: getattr(edit, "label", ""),
)
def test_on_a_model_patterns_and_scores_are_edited_alike(
    edit: Edit, rescored: Callable, fresh: tuple[Any, torch.Tensor]
) -> None:
    model, tokens = fresh
    places = torch.arange(tokens.shape[1])

    def rescore(s: torch.Tensor, hook: Any = None) -> torch.Tensor:
        return rescored(s, places[:, None], places)

    plain = outcome(model, tokens)
    with edited_attention(model, edit):
        one = outcome(model, tokens)
    names = [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(model.cfg.n_layers)]
    with attached(model, [(name, rescore) for name in names]):
        other = outcome(model, tokens)
    assert torch.allclose(one, other, rtol=0, atol=1e-5)  # some classes have a float32 softmax
    assert (one - plain).abs().max() > 1e-2


def test_a_head_is_switched_off_in_its_own_layer_only(fresh: tuple[Any, torch.Tensor]) -> None:
    model, tokens = fresh
    plain = record(model, tokens, attention="kept")
    with edited_attention(model, ablate_head(1, 2)):
        seen = record(model, tokens)
    assert torch.equal(seen.attention[0].rows(0, 6), plain.attention[0].rows(0, 6))
    rows, before = seen.attention[1].rows(0, 6), plain.attention[1].rows(0, 6)
    assert not rows[2].any()
    others = [0, 1, 3]
    assert torch.equal(rows[others], before[others])


def test_any_function_of_a_pattern_edits_every_layer(fresh: tuple[Any, torch.Tensor]) -> None:
    model, tokens = fresh
    with edited_attention(model, lambda pattern: torch.eye(6).to(pattern).expand_as(pattern)):
        trace = record(model, tokens)
    for attention in trace.attention:
        assert torch.equal(attention.rows(0, 6), torch.eye(6).to(attention.rows(0, 6)).expand(4, -1, -1))


def test_the_trace_is_told_what_the_scores_are_multiplied_by(make: Callable) -> None:
    trace = record(make("hooked-ln"), tokens_for(1, 5))
    told = edited_trace(trace, sharpen(3)).gains
    assert torch.equal(told.query_norm, 3 * trace.gains.query_norm)
    assert torch.equal(told.key_norm, 3 * trace.gains.key_norm)
    same = edited_trace(trace, window(2)).gains
    assert torch.equal(same.query_norm, trace.gains.query_norm)


# ---------------------------------------------------------------- edits of the tokens


def spelled(edit: Edit, text: str, make: Callable, bos: bool | None = False) -> tuple[str, tuple[int | None, ...]]:
    """The prompt's text under an edit (words for the made-up tokenizer are w0 … w49, w1 is BOS), and the places."""
    model = make("bridge-gpt2")
    edited = edited_prompt(model, tokenize(model, text, bos=bos), edit)
    assert edited.prompt.tokens == tuple(edited_prompt(model, edited.prompt, window(1)).prompt.tokens)
    assert len(edited.prompt.ids) == len(edited.prompt.tokens) == len(edited.places)
    return " ".join(edited.prompt.tokens), edited.places


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (separators(2, "w9"), "w3 w4 w9 w5 w6 w9 w7"),
        (separators(2, "w9", from_right=True), "w3 w9 w4 w5 w9 w6 w7"),
        (separators(3, "w9 w8"), "w3 w4 w5 w9 w8 w6 w7"),
        (separators(4, "w9"), "w3 w4 w5 w6 w9 w7"),
        (separators(1, "w3"), "w3 w3 w4 w3 w5 w3 w6 w3 w7"),
        (with_bos(), "w1 w3 w4 w5 w6 w7"),
        (window(2), "w3 w4 w5 w6 w7"),
    ],
    ids=lambda edit: getattr(edit, "label", ""),
)
def test_tokens_and_the_places_that_they_had(edit: Edit, expected: str, make: Callable) -> None:
    text, places = spelled(edit, "w3 w4 w5 w6 w7", make)
    assert text == expected
    kept = [(text.split()[new], old) for new, old in enumerate(places) if old is not None]
    assert kept == [("w3", 0), ("w4", 1), ("w5", 2), ("w6", 3), ("w7", 4)]


def test_a_bos_in_front_is_not_counted(make: Callable) -> None:
    assert spelled(separators(2, "w9"), "w3 w4 w5", make, bos=True)[0] == "w1 w3 w4 w9 w5"
    assert spelled(separators(2, "w9", from_right=True), "w3 w4 w5", make, bos=True)[0] == "w1 w3 w9 w4 w5"
    assert spelled(separators(3, "w9", from_right=True), "w3 w4 w5 w6", make, bos=True)[0] == "w1 w3 w9 w4 w5 w6"


def test_bos_is_dropped(make: Callable) -> None:
    assert spelled(without_bos(), "w3 w4", make, bos=True) == ("w3 w4", (1, 2))


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: sliding_window(0), "expected at least 1 position, got a window of 0"),
        (lambda: window(-3), "window of -3"),
        (lambda: mask_position(-1), "expected one from 0 on, got position -1"),
        (lambda: ablate_head(-1, 0), "layer -1"),
        (lambda: ablate_head(0, -2), "head -2"),
        (lambda: sharpen(0.0), "expected a positive number, .*, got a power of 0.0"),
        (lambda: sharpen(float("nan")), "power of nan"),
        (lambda: sharpen(float("inf")), "power of inf"),
        (lambda: separators(0), "got separators behind every 0 tokens"),
        (lambda: separators(3, ""), "an empty separator"),
    ],
)
def test_edits_that_nothing_can_do(wrong: Callable, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        wrong()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "text", "said"),
    [
        (ablate_head(2, 0), "w3 w4", "expected 0 … 1, the layers of this model, got layer 2"),
        (ablate_head(1, 4), "w3 w4", "expected 0 … 3, the heads of this model, got head 4"),
        (mask_position(2), "w3 w4", "expected 0 … 1, the positions of this prompt, got position 2"),
        (separators(3), "w3 w4 w5", "got a prompt of 3 tokens, too short to separate"),
        (
            separators(1, "w9 w9 w9"),
            "w3 w4 w5 w6 w7 w8",
            "behind every token: expected at most n_ctx = 16 tokens, got 21 tokens",
        ),
        (without_bos(), "w3 w4", "without BOS: expected one that starts with it, got a prompt without BOS"),
        (with_bos(), "<bos> w3", "with BOS: expected one without, got a prompt that starts with BOS"),
        (without_bos(), "<bos> w3", "without BOS: expected at least two, got a prompt of 1 token"),
    ],
    ids=lambda edit: getattr(edit, "label", ""),
)
def test_edits_that_this_model_or_prompt_cannot_take(edit: Edit, text: str, said: str, make: Callable) -> None:
    model = make("bridge-gpt2")
    with pytest.raises(InputError, match=said) as caught:
        edited_prompt(model, tokenize(model, text.removeprefix("<bos> "), bos="<bos>" in text), edit)
    assert "\n" not in str(caught.value)


def test_a_model_without_tokenizer_or_bos(make: Callable) -> None:
    model = make("hooked-ln")
    model.tokenizer = None
    prompt = tokenize(model, tokens_for(1, 5))
    for edit in (separators(), with_bos()):
        with pytest.raises(InputError, match="tokenizer"):
            edited_prompt(model, prompt, edit)


def test_tokens_are_no_matter_of_attention(fresh: tuple[Any, torch.Tensor], count_hooks: Callable) -> None:
    model, tokens = fresh
    before = count_hooks(model)
    for edit, said in ((separators(), "changes tokens"), (ablate_head(7, 0), "expected 0 … 1, the layers")):
        with pytest.raises(InputError, match=said), edited_attention(model, edit):
            model(tokens)
    with pytest.raises(InputError, match="changes tokens"):
        with_bos()(scores().softmax(-1))
    assert count_hooks(model) == before


def test_half_precision_has_few_small_numbers_and_edits_know_it() -> None:
    """float16 ends at 6e-8: weights near it are not lifted, and a row of little left still sums to 1."""
    row = torch.full((1, 1, 1, 1000), 2e-5, dtype=torch.float16)
    row[..., -1] = 1 - 999 * 2e-5
    assert torch.allclose(sharpen(1)(row).float(), row.float(), rtol=2e-3)
    pattern = torch.tensor([[[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 - 2e-5, 1e-5, 1e-5]]]], dtype=torch.float16)
    assert window(2)(pattern)[0, 0, 2].tolist() == pytest.approx([0, 0.5, 0.5], abs=0.05)
