"""Ready families: the prompts are what they say, and spelled as the tokenizer spells the whole text."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import NO_BRIDGE, bridge, has_bridge
from small_readers import Reader

from oversquash_lens.collapse.curve import collapse_curve
from oversquash_lens.collapse.families import (
    Family,
    alternating,
    copying,
    counting,
    followed_by,
    repeats_last,
    sampled_digits,
    separated,
    two_prompts,
    word_list,
)
from oversquash_lens.errors import InputError

LENGTHS = (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 30, 100, 999)
ONES = "How many ones are in the following sequence?"
COPY = "Can you copy the following number?"


def ones(k: int, every: int = 3, separator: str = ",", right: bool = False) -> str:
    """k ones in groups, written by cutting a string: another way than counting breaks."""
    digits = "1" * k
    if right:
        return ones(k, every, separator[::-1])[::-1]
    return separator.join(digits[i : i + every] for i in range(0, k, every))


def drawn(k: int, seed: int) -> str:
    source = random.Random(seed)
    return "".join(str(source.randrange(10)) for _ in range(k - 1))


# Family -> the two texts of length k that it promises.
PROMISES: dict[str, tuple[Callable[[Any], Family], Callable[[int], tuple[str, str]]]] = {
    "counting": (counting, lambda k: (f"{ONES} {'1' * k}", f"{ONES} {'1' * (k + 1)}")),
    "counting, spaced": (
        lambda model: counting(model, spaced=True),
        lambda k: (f"{ONES} {' '.join('1' * k)}", f"{ONES} {' '.join('1' * (k + 1))}"),
    ),
    "counting sequences": (
        lambda model: counting(model, question="How many ones are in the following sequences?"),
        lambda k: tuple(f"How many ones are in the following sequences? {'1' * n}" for n in (k, k + 1)),
    ),
    "copying": (copying, lambda k: (f"{COPY} {'1' * k}", f"{COPY} {'1' * (k + 1)}")),
    "commas from the left": (separated, lambda k: (f"{COPY} {ones(k)}", f"{COPY} {ones(k + 1)}")),
    "commas, k against k+3": (
        lambda model: separated(model, step=3),
        lambda k: (f"{COPY} {ones(k)}", f"{COPY} {ones(k + 3)}"),
    ),
    "commas from the right": (
        lambda model: separated(model, counted_from="right"),
        lambda k: (f"{COPY} {ones(k, right=True)}", f"{COPY} {ones(k + 1, right=True)}"),
    ),
    "dashes every fifth": (
        lambda model: separated(model, separator=" - ", every=5, question=ONES),
        lambda k: (f"{ONES} {ones(k, 5, ' - ')}", f"{ONES} {ones(k + 1, 5, ' - ')}"),
    ),
    "dashes every fifth from the right": (
        lambda model: separated(model, separator="--", every=5, counted_from="right", step=5),
        lambda k: (f"{COPY} {ones(k, 5, '--', right=True)}", f"{COPY} {ones(k + 5, 5, '--', right=True)}"),
    ),
    "sampled digits": (
        lambda model: sampled_digits(model, seed=7),
        lambda k: (f"{ONES} {drawn(k, 7)}1", f"{ONES} {drawn(k, 7)}11"),
    ),
    "alternating": (
        lambda model: alternating(model, step=2),
        lambda k: (f"{ONES} {('10' * k)[:k]}", f"{ONES} {('10' * (k + 2))[: k + 2]}"),
    ),
    "words": (
        lambda model: word_list(model, ("car", "red tree", "car", "x")),
        lambda k: (
            f"How many words are in the following list? {listed(k)}",
            f"How many words are in the following list? {listed(k)} {WORDS[(k - 1) % 4]}",
        ),
    ),
}
WORDS = ("car", "red tree", "car", "x")


def listed(k: int) -> str:
    return " ".join(WORDS[i % 4] for i in range(k))


@pytest.mark.parametrize(("make", "promise"), PROMISES.values(), ids=PROMISES)
@pytest.mark.parametrize("begins", [False, True], ids=["no BOS", "BOS"])
def test_pairs_are_the_texts_they_promise(make: Callable, promise: Callable, begins: bool) -> None:
    """Token by token what the tokenizer makes of the whole text, in any order of asking."""
    reader = Reader(begins=begins)
    family = make(reader)
    for k in random.Random(1).sample(LENGTHS, len(LENGTHS)):
        (pair,) = family.pairs([k])
        assert pair == tuple(map(reader.ids, promise(k))), k
        assert all(ids[0] == 0 for ids in pair) == begins


@pytest.mark.parametrize(("make", "promise"), PROMISES.values(), ids=PROMISES)
def test_the_real_tokenizer_spells_them_so(make: Callable, promise: Callable, smollm2: Any) -> None:
    reader = Reader(tokenizer=smollm2.tokenizer)
    family = make(reader)
    for k in (1, 2, 3, 4, 7, 12, 31, 300):
        (pair,) = family.pairs([k])
        assert pair == tuple(map(reader.ids, promise(k))), k
        assert tuple(map(reader.text, pair)) == promise(k)


def test_only_the_last_token_repeated_is_covered() -> None:
    """Covered are pairs where no separator comes between and the last token is one digit."""
    reader = Reader()
    covered = {
        name: [repeats_last(*family.pairs([k])[0]) for k in range(1, 8)]
        for name, family in {
            "counting": counting(reader),
            "spaced": counting(reader, spaced=True),
            "left": separated(reader),
            "right": separated(reader, counted_from="right"),
            "step": separated(reader, step=3),
            "digits": sampled_digits(reader),
        }.items()
    }
    assert all(covered["counting"])
    assert all(covered["digits"])
    assert not any(covered["spaced"])
    assert not any(covered["step"])
    assert covered["left"] == [True, True, False] * 2 + [True]
    assert covered["right"] == [True, True] + [False] * 5


def test_sampled_digits_of_one_seed_are_the_same_and_of_another_are_not() -> None:
    reader = Reader()
    one, again, other = (sampled_digits(reader, seed=seed) for seed in (3, 3, 4))
    again.pairs([50])  # what was asked before changes nothing
    assert one.pairs(range(1, 60)) == again.pairs(range(1, 60))
    assert one.pairs([40]) != other.pairs([40])
    first, second = one.pairs([60])[0]
    assert first[: len(reader.ids(f"{ONES} ")) + 59] == second[: len(reader.ids(f"{ONES} ")) + 59]
    counts = [reader.text(first)[-60:-1].count(str(digit)) for digit in range(10)]
    assert sum(counts) == 59
    assert min(counts) > 0, "every digit comes"


def test_words_follow_one_another_again_and_again() -> None:
    reader = Reader()
    family = word_list(reader, ["car"], question="Q")
    assert [reader.text(ids) for ids in family.pairs([3])[0]] == ["Q car car car", "Q car car car car"]
    assert family.unit == "words"


def test_bos_is_the_tokenizer_s_way_unless_said() -> None:
    for begins in (False, True):
        reader = Reader(begins=begins)
        for bos in (None, False, True):
            wanted = begins if bos is None else bos
            for make in (counting, copying, separated, sampled_digits, alternating):
                assert (make(reader, bos=bos).pairs([3])[0][0][0] == 0) == wanted
            assert (word_list(reader, ["car"], bos=bos).pairs([1])[0][0][0] == 0) == wanted


def test_text_behind_the_sequence_is_outside_the_theorem() -> None:
    reader = Reader(begins=True)
    inside = counting(reader)
    family = followed_by(reader, inside, " Answer:")
    for k in (1, 2, 9):
        pair = family.pairs([k])[0]
        assert pair == tuple((*ids, *reader.ids(" Answer:")[1:]) for ids in inside.pairs([k])[0])
        assert [reader.text(ids).removeprefix("<s>") for ids in pair] == [
            f"{ONES} {'1' * n} Answer:" for n in (k, k + 1)
        ]
        assert not repeats_last(*pair)
    assert "Answer:" in family.name
    assert family.unit == "ones"


def test_a_curve_marks_pairs_outside_the_theorem() -> None:
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    model = bridge(2, "gpt2")
    inside = Family("inside", lambda k: ([5, *[7] * k], [5, *[7] * (k + 1)]))
    outside = followed_by(model, inside, "w9 w8")
    curve = collapse_curve(model, outside, (1, 2, 3), ("float64",))
    assert not curve.covered.any()
    assert curve.attention_shift["float64"].isnan().all()
    assert [note for note in curve.notes if "outside Theorem B.3" in note]
    assert torch.isfinite(curve.l1["float64"]).all()


def test_a_pair_of_texts() -> None:
    model = bridge(2, "gpt2") if has_bridge() else pytest.skip(NO_BRIDGE)
    family = two_prompts(model, "w5 w6", "w5 w7 w8")
    ((first, second),) = family.pairs([1])
    assert (first, second) == ((1, 5, 6), (1, 5, 7, 8))
    assert two_prompts(model, "w5 w6", "w5 w7 w8", bos=False).pairs([1]) == [((5, 6), (5, 7, 8))]
    curve = collapse_curve(model, family, (1,), ("float64",))
    assert curve.l1["float64"].item() > 0
    assert "'w5 w6' against 'w5 w7 w8'" in curve.notes
    with pytest.raises(InputError, match="two prompts of length 1 are equal"):
        two_prompts(model, "w5 w6", "w5 w6").pairs([1])


# ---------------------------------------------------------------- tokenizers that merge


MERGING: dict[str, tuple[tuple[tuple[str, str], ...], Callable[[Any], Family], str]] = {
    # 24 ones behind a space token: 13 tokens.
    "11": ((("1", "1"),), counting, "0.54 tokens a digit"),
    "1111": ((("1", "1"), ("11", "11")), counting, "0.29 tokens a digit"),
    "11, to be copied": ((("1", "1"),), copying, "0.54 tokens a digit"),
    "11 in groups": ((("1", "1"),), separated, "tokens a digit"),
    "77 among digits": ((("7", "7"),), sampled_digits, "tokens a digit"),
    "90 among digits": ((("9", "0"),), sampled_digits, "tokens a digit"),
    "10 in turn": ((("1", "0"),), alternating, "0.54 tokens a digit"),
}


@pytest.mark.parametrize(("merges", "make", "says"), MERGING.values(), ids=MERGING)
def test_a_tokenizer_that_merges_digits_is_told(merges: tuple, make: Callable[[Any], Family], says: str) -> None:
    with pytest.raises(InputError, match=says) as raised:
        make(Reader(*merges))
    assert "a reader of characters merges the digits of" in str(raised.value)
    assert "spaced=True" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_merging_tokenizers_count_where_digits_stand_apart() -> None:
    reader = Reader(("1", "1"), ("1", "0"))
    family = counting(reader, spaced=True)
    assert [reader.text(ids) for ids in family.pairs([3])[0]] == [f"{ONES} 1 1 1", f"{ONES} 1 1 1 1"]
    every = separated(reader, every=1)
    assert [reader.text(ids) for ids in every.pairs([3])[0]] == [f"{COPY} 1,1,1", f"{COPY} 1,1,1,1"]


@pytest.mark.parametrize("merge", [("c", "e"), ("?", " "), (" ", "1")], ids=["in it", "at its end", "before the digit"])
def test_merges_in_the_question_do_no_harm(merge: tuple[str, str]) -> None:
    reader = Reader(merge)
    for k in (1, 2, 9):
        assert counting(reader).pairs([k])[0] == (
            reader.ids(f"{ONES} {'1' * k}"),
            reader.ids(f"{ONES} {'1' * (k + 1)}"),
        )


def test_a_separator_may_merge_with_the_digit_behind_it() -> None:
    reader = Reader((",", "1"))
    for k in (2, 3, 4, 7, 10):
        pair = separated(reader).pairs([k])[0]
        assert pair == (reader.ids(f"{COPY} {ones(k)}"), reader.ids(f"{COPY} {ones(k + 1)}"))


def test_words_that_merge_beside_one_another_are_told() -> None:
    with pytest.raises(InputError, match="writes these words otherwise"):
        word_list(Reader(("r", " "), ("r ", "t")), ("car", "tree"))


BAD_WORDS = {"none": [], "a text": "car", "an empty one": ["car", ""]}


@pytest.mark.parametrize("words", BAD_WORDS.values(), ids=BAD_WORDS)
def test_word_lists_are_checked(words: Any) -> None:
    with pytest.raises(InputError, match=r"got .* as the words"):
        word_list(Reader(), words)


BAD_GROUPS = {
    "no side": ({"counted_from": "middle"}, "expected 'left' or 'right'"),
    "empty groups": ({"every": 0}, "got every=0, step=1"),
    "no step": ({"step": 0}, "got every=3, step=0"),
}


@pytest.mark.parametrize(("wrong", "says"), BAD_GROUPS.values(), ids=BAD_GROUPS)
def test_groups_are_checked(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        separated(Reader(), **wrong)


def test_a_length_that_fills_the_model_is_the_longest() -> None:
    """The longest pair's second prompt has exactly n_ctx tokens; one more is refused."""
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    model = bridge(2, "gpt2")
    family = Family("ones", lambda k: ([5, *[7] * k], [5, *[7] * (k + 1)]))
    curve = collapse_curve(model, family, range(1, 15), ("float64",))
    assert curve.lengths[-1] == 14
    with pytest.raises(InputError, match=r"at most n_ctx = 16 tokens, .* length 15 makes 17 tokens: 14 is"):
        collapse_curve(model, family, range(1, 16), ("float64",))
