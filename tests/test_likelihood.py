"""Many candidates in few passes, against one whole pass for each candidate."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_speakers import KINDS, characters, logits, other_architecture, plain_speaker, speaker

from oversquash_lens.errors import InputError
from oversquash_lens.models.loading import load_twin
from oversquash_lens.paper.likelihood import Continuations, Trie, Trunk, _parts
from oversquash_lens.paper.prompts import DIGIT_LINE, NUMBER_LINE, copy_prompt, ones_prompt, trailing_zero
from oversquash_lens.paper.speakers import Speaker

PROMPT = "How many ones are in 1101?"
CANDIDATES = ["1", "12", "120", "13", "2", "ones: 1", "ones: 12", "ones: 3", "x", "12"]


def by_hand(who: Speaker, prompt: str, candidates: Sequence[str]) -> list[float]:
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
    who = speaker(kind, dtype)
    found = who.log_likelihoods(PROMPT, CANDIDATES)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.tolist(), by_hand(who, PROMPT, CANDIDATES), rtol=1e-5, atol=2e-5)
    assert who.engine.tree is (kind != "hooked")  # one pass for all where the class takes a tree mask


@pytest.mark.parametrize("kind", KINDS)
def test_little_memory_changes_nothing(kind: str) -> None:
    tight = speaker(kind, memory=1)
    expected = by_hand(tight, PROMPT, CANDIDATES)
    torch.testing.assert_close(tight.log_likelihoods(PROMPT, CANDIDATES).tolist(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trunk_changes_nothing(kind: str) -> None:
    """Prompts that share all, much, one token or nothing with the longest."""
    who = speaker(kind)
    prompts = ["1" * 40, "1" * 12, "1" * 12 + "0", "0", "1" * 39]
    trunk = who.trunk(prompts)
    assert [trunk.shared(who.token_ids(who.render(prompt))) for prompt in prompts] == [42, 13, 13, 1, 40]
    for prompt in (*prompts, *prompts):
        expected = by_hand(who, prompt, CANDIDATES)
        found = who.log_likelihoods(prompt, CANDIDATES, trunk=trunk).tolist()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
        if kind == "twin":
            assert trunk.cache.get_seq_length() == 43


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_what_a_trunk_shares_is_the_longest_common_beginning(mine: list[int], theirs: list[int]) -> None:
    shared = Trunk(tuple(mine), None).shared(theirs)
    assert mine[:shared] == theirs[:shared]
    assert shared < len(theirs)
    assert shared in (len(mine), len(theirs) - 1) or mine[shared] != theirs[shared]


def test_a_sliding_window_is_kept_where_a_tree_mask_would_lose_it() -> None:
    """Window 12: beyond it the tree is not used; within it, it is."""
    who = plain_speaker(sliding_window=12)
    who.log_likelihoods("1", ["2", "33"])
    assert who.engine.tree is True
    for prompt in ("1", "1010", "10101010", "1" * 30):
        expected = by_hand(who, prompt, CANDIDATES)
        found = who.log_likelihoods(prompt, CANDIDATES).tolist()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("name", "tree"), [("GPT2", True), ("Bloom", False), ("Gemma2", True), ("Gemma3", True)])
def test_other_architectures(name: str, tree: bool) -> None:
    """ALiBi cannot be told a tree's positions; sliding windows can as long as all fits into them."""
    who = other_architecture(name)
    for prompt in ("1", "1" * 30):
        expected = by_hand(who, prompt, CANDIDATES)
        torch.testing.assert_close(who.log_likelihoods(prompt, CANDIDATES).tolist(), expected, rtol=1e-5, atol=2e-5)
    assert who.engine.tree is tree


def test_a_model_that_reads_tree_masks_otherwise_is_found_out() -> None:
    """One that drops 4-D masks, and one that refuses them: both are then asked leaf by leaf."""
    for drop in (True, False):
        who = plain_speaker()
        forward = who.engine.model.forward

        def stubborn(ids: torch.Tensor, attention_mask: torch.Tensor, forward=forward, drop=drop, **rest: object):
            if attention_mask.ndim == 4 and not drop:
                raise ValueError("masks are [batch, position] here")
            length = attention_mask.shape[-1]
            plain = attention_mask if attention_mask.ndim == 2 else torch.ones(1, length, dtype=torch.long)
            return forward(ids, attention_mask=plain, **rest)

        who.engine.model.forward = stubborn
        found = who.log_likelihoods(PROMPT, CANDIDATES).tolist()
        assert who.engine.tree is False
        who.engine.model.forward = forward
        torch.testing.assert_close(found, by_hand(who, PROMPT, CANDIDATES), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_add_up_to_what_begins_with_a_digit(kind: str) -> None:
    """0 … 9 and "no digit first" part all replies among themselves: the first digit's ten probabilities are Σ over
    one- and two-digit numbers and the longer ones, which go on from the two-digit ones.
    """
    who = speaker(kind, "float64")
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
    who = speaker()
    words = ["ones: ", "x"]
    assert torch.equal(who.log_likelihoods(PROMPT, words, whole_numbers=True), who.log_likelihoods(PROMPT, words))


def test_which_tokens_go_on_with_a_number() -> None:
    who = plain_speaker(tokenizer=characters(merges=("11", "1+", " 1")))
    names = who.tokenizer.convert_ids_to_tokens(who.digit_tokens)
    assert sorted(names) == sorted([*"0123456789", "11", "1+"])


def test_the_probability_of_everything_is_one() -> None:
    """All one-token continuations together, the padded part of the vocabulary included by the model alone."""
    who = speaker("twin", "float64")
    texts = [name for name in who.tokenizer.get_vocab() if len(name) == 1]
    found = who.log_likelihoods(PROMPT, texts).exp().sum()
    row = logits(who, who.token_ids(who.render(PROMPT)))[-1].softmax(-1)
    ids = [who.tokenizer.convert_tokens_to_ids(text) for text in texts]
    torch.testing.assert_close(found, row[ids].sum(), rtol=1e-6, atol=1e-9)


def test_a_candidate_that_the_tokenizer_joins_to_the_prompt_is_refused() -> None:
    who = plain_speaker(tokenizer=characters(merges=(">1",)))
    with pytest.raises(InputError, match=r"'12' does not begin a token of its own .*'\[11\]>'"):
        who.log_likelihoods("11", ["21", "12"])
    assert len(who.log_likelihoods("11", ["21", " 12"])) == 2
    with pytest.raises(InputError, match="the candidate '' does not begin"):
        who.log_likelihoods("11", [""])
    with pytest.raises(InputError, match="got no candidates"):
        who.log_likelihoods("11", [])


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=12))
def test_a_trie_holds_every_sequence_once(sequences: list[list[int]]) -> None:
    trie = Trie.of(sequences)
    assert [trie.branch(end) for end in trie.ends] == sequences
    beginnings = {tuple(sequence[: i + 1]) for sequence in sequences for i in range(len(sequence))}
    assert len(trie.tokens) == len(beginnings)
    assert {tuple(trie.branch(node)) for node in range(len(trie.tokens))} == beginnings
    assert all(parent < node for node, parent in enumerate(trie.parents))
    assert trie.depths == tuple(len(trie.branch(node)) - 1 for node in range(len(trie.tokens)))
    ancestry = trie.ancestry()
    for node in range(len(trie.tokens)):
        assert torch.nonzero(ancestry[node]).flatten().tolist() == sorted(trie.path(node))
    assert {tuple(trie.branch(leaf)) for leaf in trie.leaves()} == {
        each for each in beginnings if not any(other[:-1] == each for other in beginnings)
    }


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=12), st.integers(1, 9))
def test_parts_hold_every_candidate_once(sequences: list[list[int]], most: int) -> None:
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    parts = _parts(order, sequences, most)
    assert [index for part in parts for index in part] == order
    for part in parts:
        assert len(part) == 1 or len(Trie.of([sequences[index] for index in part]).tokens) <= most


def test_numbers_to_200_cost_few_tokens() -> None:
    who = speaker()
    rows, n = who._candidate_ids("1", [f"{NUMBER_LINE}{number}" for number in range(201)])
    assert len(Trie.of([row[n:] for row in rows]).tokens) == len(NUMBER_LINE) + 201


def test_smollm2_one_pass_for_many_candidates_is_right() -> None:
    who = Speaker(load_twin(device="cpu"))
    prompt = ones_prompt("1" * 5)
    candidates = [f"{NUMBER_LINE}{number}" for number in (0, 5, 6, 12, 120, 199)]
    found = who.log_likelihoods(prompt, candidates).tolist()
    assert who.engine.tree is True
    torch.testing.assert_close(found, by_hand(who, prompt, candidates), rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_smollm2_hooked_is_as_likely_to_say_it(kind: str, request: pytest.FixtureRequest) -> None:
    who = Speaker(request.getfixturevalue({"bridge": "smollm2", "hooked": "smollm2_hooked"}[kind]))
    prompt = copy_prompt(trailing_zero(12))
    candidates = [f"{DIGIT_LINE}{digit}" for digit in range(3)]
    torch.testing.assert_close(
        who.log_likelihoods(prompt, candidates).tolist(), by_hand(who, prompt, candidates), rtol=0, atol=2e-4
    )


def test_the_cache_is_left_as_it_was() -> None:
    """The same continuations asked twice after one reading of the prompt."""
    who = speaker()
    rows, n = who._candidate_ids(PROMPT, CANDIDATES)
    with torch.no_grad():
        read = Continuations.of(who.engine, rows[0][:n], 1 << 20)
        asked = ([row[n:] for row in rows], who.digit_tokens, [False] * len(rows))
        first = read.log_likelihoods(*asked)
        assert read.cache.get_seq_length() == n
        torch.testing.assert_close(read.log_likelihoods(*asked), first, rtol=0, atol=1e-6)
