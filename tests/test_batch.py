"""Many prompts in one pass: what is recorded of each is what `record` records of it alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from elsewhere import Elsewhere, is_there
from small_models import tokenizer, tokens_for
from zoo import CELLS, lacking, zoo

import oversquash_lens as osl
from oversquash_lens.capture import batch
from oversquash_lens.capture.batch import batch_bytes, record_batch, unpadded
from oversquash_lens.capture.hooked_model import size_of
from oversquash_lens.capture.tokens import TokenizedPrompt
from oversquash_lens.capture.trace import Gains, Trace
from oversquash_lens.errors import HookMismatchError, InputError, ModelError
from oversquash_lens.memory import record_bytes

LENGTHS = (3, 12, 7, 12, 2)
SAME = {torch.float64: 1e-6, torch.float32: 2e-5}  # relative; bridges of float64 weights compute norms in float32


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    return [tokens_for(seed, n)[0] for seed, n in enumerate(lengths)]


def numbers(trace: Trace) -> dict[str, torch.Tensor]:
    """All that a trace holds, as tensors."""
    found = {name: getattr(trace, name) for name in ("token_ids", "last_residuals", "prediction_input")}
    found |= {f"attention {i}": rows.rows(0, trace.n_positions) for i, rows in enumerate(trace.attention)}
    gains = {f.name: getattr(trace.gains, f.name) for f in fields(Gains) if f.name != "weights"}
    return found | {name: torch.as_tensor(value) for name, value in gains.items()}


def largest_difference(batched: Trace, alone: Trace) -> float:
    """Largest relative difference of any number in two traces."""
    assert (batched.tokens, batched.about, batched.support) == (alone.tokens, alone.about, alone.support)
    there, here = numbers(batched), numbers(alone)
    assert there.keys() == here.keys()
    worst = 0.0
    for name, expected in here.items():
        assert there[name].shape == expected.shape, name
        assert there[name].dtype == expected.dtype, name
        assert torch.equal(there[name].isnan(), expected.isnan()), name
        known = ~expected.isnan()
        size = expected[known].abs().max().item() if known.any() else 1.0
        if known.any():
            worst = max(worst, (there[name] - expected)[known].abs().max().item() / max(size, 1e-30))
    return worst


def alone(model: Any, prompt: Any, **options: Any) -> Trace:
    """What `record` makes of one prompt with the model's own patterns, as a batch keeps them."""
    return osl.record(model, prompt, attention="kept", **options)


def cell(name: str, kind: str, **options: Any) -> Any:
    why = lacking(name, kind)
    if why is not None:
        pytest.skip(why)
    return zoo(name, kind, **options)


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_a_batch_is_each_prompt_by_itself(name: str, kind: str) -> None:
    model = cell(name, kind)
    try:
        single = [alone(model, each) for each in prompts()]
    except ModelError as refused:
        if "kept patterns" in str(refused):  # Llama 4: recorded one by one, on another route
            single = [osl.record(model, each) for each in prompts()]
        else:
            with pytest.raises(ModelError, match=str(refused)[:60]):
                record_batch(model, prompts())
            return
    for batched, expected in zip(record_batch(model, prompts()), single, strict=True):
        assert largest_difference(batched, expected) < SAME[torch.float64]


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("llama", "bridge"), ("opt", "bridge")])
def test_a_batch_in_single_precision(name: str, kind: str) -> None:
    model = cell(name, kind, dtype=torch.float32)
    for batched, row in zip(record_batch(model, prompts()), prompts(), strict=True):
        assert largest_difference(batched, alone(model, row)) < SAME[torch.float32]


@pytest.mark.parametrize(
    ("name", "kind"), [("gpt2", "hooked"), ("opt", "bridge"), ("gemma2", "bridge"), ("qwen3", "bridge")]
)
def test_what_stands_behind_a_prompt_changes_no_bit_of_it(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = cell(name, kind), prompts()
    whole = batch.padded

    def otherwise(tokenized: list[TokenizedPrompt]) -> torch.Tensor:
        ids, other = whole(tokenized), tokens_for(99, max(LENGTHS))[0]
        for row, each in zip(ids, tokenized, strict=True):
            row[len(each.ids) :] = other[len(each.ids) :]
        return ids

    expected = record_batch(model, rows)
    monkeypatch.setattr(batch, "padded", otherwise)
    for one, other in zip(expected, record_batch(model, rows), strict=True):
        here, there = numbers(one), numbers(other)
        assert all(torch.equal(here[key].nan_to_num(), there[key].nan_to_num()) for key in here)


def test_options_are_records_own(make: Callable[[str], Any]) -> None:
    model = make("hooked-ln")
    options = {"node_probes": None, "seed": 7, "verify": True}
    for batched, row in zip(record_batch(model, prompts(), **options), prompts(), strict=True):
        assert largest_difference(batched, alone(model, row, **options)) < SAME[torch.float64]
    assert batched.gains.node_probes == 16


def test_texts_and_ids_in_any_mixture(tiny: Any) -> None:
    mixed = ["w5 w9 w30", [4, 9, 8, 7], torch.tensor([[3, 6]]), "w7 w8"]
    for batched, prompt in zip(osl.record_batch(tiny, mixed), mixed, strict=True):
        assert largest_difference(batched, alone(tiny, prompt)) < SAME[torch.float64]
    for batched, prompt in zip(osl.record_batch(tiny, mixed[::3], bos=False), mixed[::3], strict=True):
        assert largest_difference(batched, alone(tiny, prompt, bos=False)) < SAME[torch.float64]
    (one,) = osl.record_batch(tiny, ["w5 w9 w30"])
    assert largest_difference(one, alone(tiny, "w5 w9 w30")) < SAME[torch.float64]


def padded_on(side: str, rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows)) + 1
    ids, mask = torch.full((len(rows), width), 2), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, at], mask[i, at] = row, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_ids_that_are_padded_already(side: str, tiny: Any) -> None:
    rows = prompts()
    ids, mask = padded_on(side, rows)
    for batched, row in zip(record_batch(tiny, ids, attention_mask=mask), rows, strict=True):
        assert torch.equal(batched.token_ids, row)
        assert largest_difference(batched, alone(tiny, row)) < SAME[torch.float64]
    assert [row.tolist() for row in unpadded(ids, mask.bool())] == [row.tolist() for row in rows]


def test_a_tokenizer_that_pads_on_the_left_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cell("llama", "hooked")
    model.set_tokenizer(tokenizer())
    monkeypatch.setattr(model.tokenizer, "padding_side", "left")
    for batched, row in zip(record_batch(model, prompts()), prompts(), strict=True):
        assert largest_difference(batched, alone(model, row)) < SAME[torch.float64]


@pytest.mark.parametrize(
    ("ids", "mask", "said"),
    [
        ([[5, 6, 7]], [[1, 0, 1]], "prompt 0: its attention_mask has a hole between positions 0 and 2"),
        ([[5, 6], [5, 6]], [[1, 1], [0, 0]], "prompt 1: its attention_mask is all 0"),
        ([[5, 6]], [[1, 1, 1]], r"got ids of shape \(1, 2\) with an attention_mask of shape \(1, 3\)"),
        ([5, 6], [1, 1], r"ids of shape \(2,\)"),
        ([[5, 6]], [[1, 2]], "other numbers than 0 and 1"),
        (["w5 w6"], [[1, 1]], "got an attention_mask with list"),
        ([[5, 6, 7], [5, 6, 7]], [[1, 1, 1], [0, 0, 1]], "prompt 1: expected .* got a prompt of 1 token"),
    ],
)
def test_masks_that_say_nothing(ids: Any, mask: Any, said: str, tiny: Any) -> None:
    with pytest.raises(InputError, match=said):
        record_batch(tiny, ids, attention_mask=mask)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("w5 w6", "got prompts of type str"),
        (7, "prompts of type int"),
        ([], "got no prompt"),
        ([5, 6, 7], "prompt 0: "),
        (["w5 w6", "w5 " * 20], "prompt 1: expected at most n_ctx = 16 tokens, got 2"),
        (["w5 w6", ""], "prompt 1: expected .* got an empty prompt"),
        (torch.tensor([5, 6]), "prompts of type Tensor"),
    ],
)
def test_prompts_that_are_none(rows: Any, said: str, tiny: Any) -> None:
    with pytest.raises(InputError, match=said):
        record_batch(tiny, rows)


def test_other_peoples_hooks_stay_and_ours_go(fresh: tuple[Any, torch.Tensor], count_hooks: Callable) -> None:
    model, _ = fresh
    before, calls = count_hooks(model), []
    record_batch(model, prompts())
    assert count_hooks(model) == before
    with pytest.raises(InputError, match="node_probes"):
        record_batch(model, prompts(), node_probes=0)

    def fail(value: torch.Tensor, hook: Any = None) -> None:
        calls.append(tuple(value.shape[:2]))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.run_with_hooks(tokens_for(1, 5), fwd_hooks=[("blocks.1.hook_resid_pre", fail)])
    model.add_hook("blocks.1.hook_resid_pre", fail)
    with pytest.raises(ZeroDivisionError):
        record_batch(model, prompts())
    assert calls == [(1, 5), (1, 8), (len(LENGTHS), max(LENGTHS))]  # the proof's tokens, too, go through this hook
    model.reset_hooks()
    assert count_hooks(model) == before


def test_what_does_not_describe_the_model_is_found_out(tiny: Any) -> None:
    def edit(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
        value = value.clone()
        value[2] *= 1.5  # in one prompt of the batch only
        return value

    tiny.add_hook("blocks.0.hook_resid_mid", edit)
    try:
        with pytest.raises(HookMismatchError, match="layer 0"):
            record_batch(tiny, prompts())
    finally:
        tiny.reset_hooks()
    assert len(record_batch(tiny, prompts())) == len(LENGTHS)


def test_room_is_asked_for_before_the_pass(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    size = size_of(tiny)
    one, five = (sum(batch_bytes(size, lengths).values()) for lengths in ((12,), (12,) * 5))
    assert one == sum(record_bytes(size, 12).values())
    assert one < five < 5 * one
    monkeypatch.setenv("OVERSQUASH_LENS_MEMORY", str(five - 1))
    with pytest.raises(InputError, match="recording 5 prompts of up to 12 tokens"):
        record_batch(tiny, prompts((12,) * 5))
    assert len(record_batch(tiny, prompts((12,) * 4))) == 4


@pytest.mark.parametrize(("name", "kind"), [("llama", "hooked"), ("gpt2", "bridge"), ("llama", "bridge")])
def test_a_batch_is_recorded_where_the_model_is(name: str, kind: str) -> None:
    model = cell(name, kind, dtype=torch.float32)
    with Elsewhere() as there:
        there.move(model)
        traces = record_batch(model, prompts())
        assert all(is_there(trace.attention[0].rows(0, trace.n_positions)) for trace in traces)
    assert not there.mixed, sorted(there.mixed)


def test_a_batch_in_half_precision() -> None:
    model = cell("llama", "bridge", dtype=torch.bfloat16)
    for batched, row in zip(record_batch(model, prompts()), prompts(), strict=True):
        assert largest_difference(batched, alone(model, row)) < 0.05
