"""The planted fact: its tokens are where they are said to be, and the U is a ratio that can be done by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_generators import KINDS, characters, loaded

from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured import measured_sensitivity
from oversquash_lens.paper import sensitivity_figures as recipe
from oversquash_lens.paper.reproduce import Options, RunConfig
from oversquash_lens.paper.sensitivity_figures import (
    ANSWER,
    FACT,
    FILLERS,
    OPENING,
    QUESTION,
    ends_over_middle,
    planted,
)

HOOKED = KINDS[1:]


def text_of(sentences: int, before: int) -> str:
    fillers = [FILLERS[i % len(FILLERS)] for i in range(sentences)]
    return "".join([OPENING, *fillers[:before], FACT, *fillers[before:], QUESTION])


class Reader:
    """All of a hooked model that a prompt needs: a tokenizer."""

    cfg = SimpleNamespace(model_name="a reader")
    hook_dict: ClassVar[dict] = {}

    def __init__(self, *merges: str) -> None:
        self.tokenizer = characters(merges=merges)

    def __call__(self) -> None: ...

    def run_with_hooks(self) -> None: ...

    def to_tokens(self, text: str, prepend_bos: bool = False, **options: Any) -> torch.Tensor:
        """[1, pos], by the tokenizer's own rule, BOS where it is asked for."""
        ids = self.tokenizer(text)["input_ids"]
        return torch.tensor([[self.tokenizer.bos_token_id, *ids] if prepend_bos else ids])


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("before", range(15))
def test_the_prompt_is_the_tokenizers_own_and_the_fact_where_it_is_said_to_be(before: int) -> None:
    model = Reader()
    prompt = planted(model, 14, before)
    assert prompt.ids == tuple(model.tokenizer(text_of(14, before))["input_ids"])
    assert model.tokenizer.decode(prompt.ids[prompt.fact]) == FACT
    assert model.tokenizer.decode(prompt.answer) == ANSWER
    assert prompt.depth == before / 14


def test_every_depth_has_the_same_sentences() -> None:
    model = Reader()
    prompts = [planted(model, 8, before) for before in range(9)]
    assert len({len(prompt.ids) for prompt in prompts}) == 1
    assert len({tuple(sorted(prompt.ids)) for prompt in prompts}) == 1
    assert [prompt.depth for prompt in prompts] == [i / 8 for i in range(9)]
    starts = [prompt.fact.start for prompt in prompts]
    assert starts == sorted(set(starts))


@pytest.mark.parametrize("before", [0, 3, 6])
def test_tokens_that_reach_over_the_facts_ends_are_met(before: int) -> None:
    """Where a tokenizer joins a full stop with what follows, the fact's tokens are those that have a part of it."""
    model = Reader(". The", "is 7")
    prompt = planted(model, 6, before)
    assert prompt.ids == tuple(model.tokenizer(text_of(6, before))["input_ids"])
    assert model.tokenizer.decode(prompt.ids[prompt.fact]).startswith(". The code of the blue locker is 7")
    assert model.tokenizer.decode(prompt.answer) == "is 7"  # joined with the question's end


def test_bos_is_put_in_front_and_moves_the_fact() -> None:
    model = Reader()
    plain, begun = planted(model, 4, 2), planted(model, 4, 2, bos=True)
    assert begun.ids == (model.tokenizer.bos_token_id, *plain.ids)
    assert begun.fact == slice(plain.fact.start + 1, plain.fact.stop + 1)
    assert begun.answer == plain.answer


@pytest.mark.parametrize("before", [-1, 5])
def test_a_place_outside_the_prompt_is_refused(before: int) -> None:
    with pytest.raises(InputError, match=f"expected 0 … 4, the number of filler sentences, got before={before}"):
        planted(Reader(), 4, before)


# ---------------------------------------------------------------- the U


def test_ends_over_the_middle_third() -> None:
    depths = [i / 6 for i in range(7)]  # the middle third: 2/6, 3/6, 4/6
    values = [6.0, 9.0, 1.0, 2.0, 3.0, 9.0, 1.0]
    assert ends_over_middle(depths, values) == (3.0, 0.5)


@given(st.floats(-20, 20), st.floats(0.1, 20), st.integers(3, 40))
def test_a_parabola_is_a_u_where_it_opens_upwards(level: float, bend: float, places: int) -> None:
    depths = [i / (places - 1) for i in range(places)]
    if not any(abs(depth - 0.5) <= 1 / 6 for depth in depths):
        return
    up = [math.exp(level) * (1 + bend * (depth - 0.5) ** 2) for depth in depths]
    first, last = ends_over_middle(depths, up)
    assert first == pytest.approx(last)
    assert first > 1
    assert max(ends_over_middle(depths, [1 / value for value in up])) < 1


@pytest.mark.parametrize(
    ("values", "held"),
    [((3.0, 1.0, 2.0), True), ((3.0, 1.0, 0.9), False), ((0.5, 1.0, 3.0), False), ((1.0, 1.0, 1.0), False)],
)
def test_the_verdict_wants_both_ends(values: tuple[float, ...], held: bool) -> None:
    verdict = recipe._verdict((0.0, 0.5, 1.0), values, "measured")
    assert verdict.held is held
    assert f"{values[0]:.2f} at the beginning, {values[2]:.2f} at the end" in verdict.number


# ---------------------------------------------------------------- on a model


@pytest.mark.parametrize("kind", HOOKED)
def test_the_answers_probability_token_by_token(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "ANSWER", " 71")
    model = loaded(kind)
    prompt = planted(model, 2, 1)
    expected, ids = 0.0, list(prompt.ids)
    for token in prompt.answer:
        with torch.no_grad():
            expected += model(torch.tensor([ids]))[0, -1].double().log_softmax(0)[token].item()
        ids.append(token)
    assert len(prompt.answer) == 3
    assert recipe.log_probability(model, prompt) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", HOOKED)
def test_the_chart_holds_what_was_measured(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recipe, "QUICK_FILLED", 2)
    monkeypatch.setattr(recipe, "QUICK_PLACES", 3)
    config = RunConfig(Options(loaded(kind), quick=True, probes=3, seed=5), tmp_path)
    chart = recipe.ushape(config)
    heard, answer = chart.panels
    measured, estimated = heard.series
    assert measured.x == estimated.x == answer.series[0].x == (0.0, 0.5, 1.0)
    prompt = planted(config.model, 2, 1)
    truth = measured_sensitivity(config.model, list(prompt.ids), probes=3, seed=5)
    size = math.sqrt(math.fsum(value**2 for value in truth.values[prompt.fact].tolist()))
    assert measured.y[1] == pytest.approx(size)
    assert all(value < 0 for value in answer.series[0].y)
    assert [verdict.held for verdict in chart.verdicts] == [
        min(ends_over_middle(one.x, one.y)) > 1 for one in (measured, estimated)
    ]
    assert f"{len(prompt.ids)} tokens" in chart.setup[0]
