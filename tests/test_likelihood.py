"""Many candidates in few batches, against one whole pass for each candidate."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_generators import (
    KINDS,
    characters,
    generator,
    loaded,
    logits,
    other_architecture,
    plain_generator,
)

from oversquash_lens.capture import edits
from oversquash_lens.errors import InputError
from oversquash_lens.models.loading import load_twin
from oversquash_lens.paper.generator import Generator, common_beginning
from oversquash_lens.paper.prompts import DIGIT_LINE, NUMBER_LINE, copy_prompt, ones_prompt, trailing_zero

PROMPT = "How many ones are in 1101?"
CANDIDATES = ["1", "12", "120", "13", "2", "ones: 1", "ones: 12", "ones: 3", "x", "12"]


def by_hand(who: Generator, prompt: str, candidates: Sequence[str]) -> list[float]:
    """One pass for each candidate over prompt and candidate together; log-softmax in float64."""
    found = []
    n = len(who.token_ids(who.render(prompt)))
    for candidate in candidates:
        ids = who.token_ids(who.render(prompt) + candidate)
        rows = logits(who, ids).double().log_softmax(-1)
        found.append(sum(rows[place - 1, ids[place]].item() for place in range(n, len(ids))))
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_log_likelihoods_are_those_of_separate_passes(kind: str, dtype: str) -> None:
    who = generator(kind, dtype)
    found = who.log_likelihoods(PROMPT, CANDIDATES)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.tolist(), by_hand(who, PROMPT, CANDIDATES), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_little_memory_changes_nothing(kind: str) -> None:
    tight = generator(kind, memory=1)
    expected = by_hand(tight, PROMPT, CANDIDATES)
    torch.testing.assert_close(tight.log_likelihoods(PROMPT, CANDIDATES).tolist(), expected, rtol=1e-5, atol=2e-5)


def test_a_sliding_window_is_kept() -> None:
    """Window 12: prompts within it and beyond it."""
    who = plain_generator(sliding_window=12)
    for prompt in ("1", "1010", "10101010", "1" * 30):
        expected = by_hand(who, prompt, CANDIDATES)
        found = who.log_likelihoods(prompt, CANDIDATES).tolist()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["GPT2", "Bloom", "Gemma2", "Gemma3"])
def test_other_architectures(name: str) -> None:
    """Learned positions, ALiBi, sliding windows."""
    who = other_architecture(name)
    for prompt in ("1", "1" * 30):
        expected = by_hand(who, prompt, CANDIDATES)
        torch.testing.assert_close(who.log_likelihoods(prompt, CANDIDATES).tolist(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_edits_of_attention_act_on_likelihoods(kind: str) -> None:
    who = Generator(loaded(kind))
    before = who.log_likelihoods(PROMPT, CANDIDATES)
    with edits.edited_attention(loaded(kind), edits.window(3)):
        found = who.log_likelihoods(PROMPT, CANDIDATES).tolist()
        torch.testing.assert_close(found, by_hand(who, PROMPT, CANDIDATES), rtol=1e-5, atol=2e-5)
    assert (torch.tensor(found) - before).abs().max() > 0.01


def test_newer_versions_name_the_cache_otherwise() -> None:
    """transformers 5.24 calls it `cache`, going in and coming out."""
    who = plain_generator()
    expected = who.log_likelihoods(PROMPT, CANDIDATES)
    forward = who.backend.inner.forward

    def renamed(ids: torch.Tensor, cache: object = None, **options: object) -> SimpleNamespace:
        out = forward(ids, past_key_values=cache, **options)
        return SimpleNamespace(logits=out.logits, cache=out.past_key_values)

    who.backend.inner.forward = renamed
    torch.testing.assert_close(who.log_likelihoods(PROMPT, CANDIDATES), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_add_up_to_what_begins_with_a_digit(kind: str) -> None:
    """0 … 9 and "no digit first" part all replies among themselves: the first digit's ten probabilities are Σ over
    one- and two-digit numbers and the longer ones, which go on from the two-digit ones.
    """
    who = generator(kind, "float64")
    numbers = [str(number) for number in range(10)] + [f"{number:02}" for number in range(100)]
    closed = who.log_likelihoods(PROMPT, numbers, whole_numbers=True).exp()
    opened = who.log_likelihoods(PROMPT, numbers).exp()
    longer = opened[10:].sum() - closed[10:].sum()
    torch.testing.assert_close(closed.sum() + longer, opened[:10].sum(), rtol=1e-5, atol=1e-8)
    assert (closed < opened).all()
    for first in range(10):  # "7" alone is "7" less what goes on to "70" … "79"
        expected = opened[first] - opened[10 + 10 * first : 20 + 10 * first].sum()
        torch.testing.assert_close(closed[first], expected, rtol=1e-4, atol=1e-8)


def test_whole_numbers_leave_words_alone() -> None:
    who = generator()
    words = ["ones: ", "x"]
    assert torch.equal(who.log_likelihoods(PROMPT, words, whole_numbers=True), who.log_likelihoods(PROMPT, words))


def test_which_tokens_go_on_with_a_number() -> None:
    who = plain_generator(tokenizer=characters(merges=("11", "1+", " 1")))
    names = who.tokenizer.convert_ids_to_tokens(who.digit_tokens)
    assert sorted(names) == sorted([*"0123456789", "11", "1+"])


def test_the_probability_of_everything_is_one() -> None:
    """All one-token continuations together, the padded part of the vocabulary included by the model alone."""
    who = generator("twin", "float64")
    texts = [name for name in who.tokenizer.get_vocab() if len(name) == 1]
    found = who.log_likelihoods(PROMPT, texts).exp().sum()
    row = logits(who, who.token_ids(who.render(PROMPT)))[-1].softmax(-1)
    ids = [who.tokenizer.convert_tokens_to_ids(text) for text in texts]
    torch.testing.assert_close(found, row[ids].sum(), rtol=1e-6, atol=1e-9)


def test_a_candidate_that_the_tokenizer_joins_to_the_prompt_is_refused() -> None:
    who = plain_generator(tokenizer=characters(merges=(">1",)))
    with pytest.raises(InputError, match=r"'12' does not begin a token of its own .*'\[11\]>'"):
        who.log_likelihoods("11", ["21", "12"])
    assert len(who.log_likelihoods("11", ["21", " 12"])) == 2
    with pytest.raises(InputError, match="the candidate '' does not begin"):
        who.log_likelihoods("11", [""])
    with pytest.raises(InputError, match="got no candidates"):
        who.log_likelihoods("11", [])


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=4))
def test_a_common_beginning_is_the_longest(rows: list[list[int]]) -> None:
    shared = common_beginning(*rows)
    assert len({tuple(row[:shared]) for row in rows}) == 1
    assert any(len(row) == shared for row in rows) or len({row[shared] for row in rows}) > 1


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 10**7))
def test_batches_hold_every_candidate_once_and_one_length_each(sizes: list[int], memory: int) -> None:
    who = generator(memory=memory)
    batches = list(who._together(sizes, 20))
    assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))
    assert all(len({sizes[index] for index in batch}) == 1 for batch in batches)


def test_numbers_to_200_cost_few_tokens() -> None:
    """The line that all begin with is read once, with the prompt; what each adds is its digits."""
    who, asked = generator(), []
    read, extend = who.backend.read, who.backend.extend
    who.backend.read = lambda ids, keep: asked.append(len(ids)) or read(ids, keep)
    who.backend.extend = lambda memory, rows: asked.append(rows.numel()) or extend(memory, rows)
    who.log_likelihoods("1", [f"{NUMBER_LINE}{number}" for number in range(201)])
    assert sum(asked) == len(who.render("1")) + len(NUMBER_LINE) + 10 + 2 * 90 + 3 * 101


def test_smollm2_one_pass_for_many_candidates_is_right() -> None:
    who = Generator(load_twin(device="cpu"))
    prompt = ones_prompt("1" * 5)
    candidates = [f"{NUMBER_LINE}{number}" for number in (0, 5, 6, 12, 120, 199)]
    found = who.log_likelihoods(prompt, candidates).tolist()
    # float32 rounds otherwise in batches of other shapes, and how is the processor's affair
    torch.testing.assert_close(found, by_hand(who, prompt, candidates), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_smollm2_hooked_is_as_likely_to_say_it(kind: str, request: pytest.FixtureRequest) -> None:
    who = Generator(request.getfixturevalue({"bridge": "smollm2", "hooked": "smollm2_hooked"}[kind]))
    prompt = copy_prompt(trailing_zero(12))
    candidates = [f"{DIGIT_LINE}{digit}" for digit in range(3)]
    torch.testing.assert_close(
        who.log_likelihoods(prompt, candidates).tolist(), by_hand(who, prompt, candidates), rtol=1e-3, atol=2e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_read_stays_as_it_is(kind: str) -> None:
    """The same continuations asked twice after one reading of the prompt."""
    who = generator(kind)
    with torch.no_grad():
        _, memory = who.backend.read(who.token_ids(who.render(PROMPT)), 1)
        rows = torch.tensor([[5, 6], [7, 8], [9, 5]])
        first = who.backend.extend(memory, rows)
        torch.testing.assert_close(who.backend.extend(memory, rows), first, rtol=0, atol=1e-6)
