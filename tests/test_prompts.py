"""The prompts, character for character, and the sequences they ask about."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oversquash_lens.errors import InputError
from oversquash_lens.paper import prompts

ENDING = (
    "Please give the answer on the final line exactly as 'The final answer to your maths question is: xxxx', where "
    "'xxxx' is your answer."
)
# What the paper prints, typed out anew: appendix C.1, figure 2, figure 5, appendix C.5.
PRINTED = {
    "sum": (prompts.sum_prompt, "1 + 1", f"Please perform the following sum: 1 + 1. {ENDING}"),
    "ones": (
        prompts.ones_prompt,
        "101",
        f"Please count the number of ones in the following sequence: 101. {ENDING}",
    ),
    "word": (
        prompts.word_prompt,
        "a car",
        f"Please count the number of times 'car' appears in the following sentence: 'a car'. {ENDING}",
    ),
    "last": (
        prompts.copy_prompt,
        "110",
        "Consider the following sequence: 110. What is the last digit in this sequence? Please answer exactly as 'The "
        "answer to your question is: <ANSWER>'",
    ),
    "first": (
        lambda seq: prompts.copy_prompt(seq, "first"),
        "011",
        "Consider the following sequence: 011. What is the first digit in this sequence? Please answer exactly as 'The "
        "answer to your question is: <ANSWER>'",
    ),
    "hint": (
        lambda seq: prompts.copy_prompt(seq, hint=True),
        "110",
        "Consider the following sequence: 110. What is the last digit in this sequence? Please answer exactly as 'The "
        "answer to your question is: <ANSWER>' *Hint* It's not necessarily a 1, check carefully",
    ),
    "type 1": (
        prompts.type_1_prompt,
        "110",
        "What is the last digit of the following sequence? Please answer exactly as 'The answer to your question is: "
        "<ANSWER>'. Here is the sequence: 110",
    ),
    "type 2": (
        prompts.type_2_prompt,
        "110",
        "Please answer exactly as 'The answer to your question is: <ANSWER>'. What is the last digit of the following "
        "sequence? 110",
    ),
    "figure 5 a": (prompts.how_many_ones, "11", "How many ones are in the following sequence? 11"),
    "figure 5 caption": (
        lambda seq: prompts.how_many_ones(seq, caption=True),
        "11",
        "How many ones are in the following sequences? 11",
    ),
    "figure 5 c": (prompts.copy_number, "11", "Can you copy the following number? 11"),
}


@pytest.mark.parametrize("name", PRINTED)
def test_prompts_are_the_papers_word_for_word(name: str) -> None:
    prompt, seq, expected = PRINTED[name]
    assert prompt(seq) == expected


def test_the_sums_examples_are_those_that_the_paper_prints() -> None:
    found = prompts.EXAMPLES["sum"]
    assert found.source == prompts.PRINTED
    assert found.texts == (
        "Please perform the following sum: 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1\n"
        "We divide the sum into groups of 5.\n"
        "(1 + 1 + 1 + 1 + 1) + (1 + 1 + 1 + 1 + 1) + 1 + 1\n"
        "The answer is then 2 * 5 + 2 = 12\n"
        "The final answer to your maths question is: 12",
        "Please perform the following sum: 1 + 1 + 1 + 1 + 1 + 1\n"
        "We divide the sum into groups of 5.\n"
        "(1 + 1 + 1 + 1 + 1) + 1\n"
        "The answer is then 1 * 5 + 1 = 6\n"
        "The final answer to your maths question is: 6",
    )


@pytest.mark.parametrize("name", [name for name in prompts.EXAMPLES if name != "sum"])
def test_our_examples_are_said_to_be_ours_and_are_right(name: str) -> None:
    found = prompts.EXAMPLES[name]
    assert found.source == prompts.OURS
    assert len(found.texts) == 2
    for text in found.texts:
        asked, *_, last = text.split("\n")
        seq = re.search(r"(?:sequence|sentence): '?([^'.]*)'?", asked)[1]
        if name in ("last", "first"):
            assert last == f"The answer to your question is: {seq[-1 if name == 'last' else 0]}"
        else:
            truth = len(re.findall(r"\bcar\b", seq)) if name == "word" else seq.count("1")
            assert last == f"The final answer to your maths question is: {truth}"
            fives, rest, total = map(int, re.search(r"then (\d+) \* 5 \+ (\d+) = (\d+)", text).groups())
            assert 5 * fives + rest == total == truth
            assert len(re.findall(r"\b(?:1|car)\b", text.split("\n")[2])) == truth  # the groups hold every one of them


def test_our_copying_examples_have_both_answers() -> None:
    for name in ("last", "first"):
        assert {text[-1] for text in prompts.EXAMPLES[name].texts} == {"0", "1"}


def test_chain_of_thought() -> None:
    examples = prompts.Examples(("Q: 1\nA: 1", "Q: 2\nA: 2"), prompts.OURS)
    assert prompts.with_reasoning("Q: 3", "none", examples) == "Q: 3"
    think = "Let's think step by step, showing me your reasoning."
    assert prompts.with_reasoning("Q: 3", "zero_shot", examples) == f"{think}\n\nQ: 3"
    assert prompts.with_reasoning("Q: 3", "few_shot", examples) == (
        f"{think} Here are a few examples:\n\nQ: 1\nA: 1\n\nQ: 2\nA: 2\n\nQ: 3"
    )
    with pytest.raises(InputError, match="expected one of none, zero_shot, few_shot"):
        prompts.with_reasoning("Q: 3", "two_shot", examples)


def test_sequences() -> None:
    assert prompts.repeated(4) == "1111"
    assert prompts.repeated(3, "+") == "1+1+1"
    assert prompts.trailing_zero(4) == "1110"
    assert prompts.leading_zero(4) == "0111"
    assert prompts.interleaved(3, 0) == "0101010"
    assert prompts.interleaved(3, 1) == "1010100"


@given(st.integers(1, 400), st.integers(0, 2**40))
def test_sampled_digits_are_as_many_as_asked_and_follow_the_seed(n: int, seed: int) -> None:
    digits = prompts.sampled_digits(n, seed)
    assert len(digits) == n
    assert set(digits) <= {"0", "1"}
    assert digits == prompts.sampled_digits(n, seed)
    assert digits == prompts.sampled_digits(n + 1, seed)[:n]


def test_sampled_digits_are_ones_seven_times_in_ten() -> None:
    n = 100_000
    share = prompts.sampled_digits(n, 5).count("1") / n
    assert abs(share - 0.7) < 5 * (0.7 * 0.3 / n) ** 0.5  # five standard errors


def test_different_seeds_give_different_digits_and_sentences() -> None:
    assert len({prompts.sampled_digits(60, seed) for seed in range(50)}) == 50
    assert len({prompts.sentence(12, seed) for seed in range(50)}) == 50


@given(st.integers(1, 60), st.integers(0, 10**6))
def test_a_sentence_has_exactly_as_many_cars_as_asked(cars: int, seed: int) -> None:
    text = prompts.sentence(cars, seed)
    words = re.findall(r"[a-z]+", text)
    assert words.count("car") == cars == prompts.count_word(text)
    assert text.count("car") == cars  # no cart, scar or care: counting by letters is right too
    assert len(words) >= 3 * cars
    assert "'" not in text  # it stands in quotation marks


@given(st.text("01", min_size=1, max_size=40), st.integers(1, 6), st.sampled_from(("left", "right")))
def test_separators_keep_the_digits_and_their_groups(digits: str, every: int, side: str) -> None:
    parts = prompts.separated(digits, ",", every, side).split(",")
    assert "".join(parts) == digits
    odd, whole = (parts[-1], parts[:-1]) if side == "left" else (parts[0], parts[1:])
    assert {len(part) for part in whole} <= {every}
    assert 1 <= len(odd) <= every


def test_thousands() -> None:
    assert prompts.separated("1111111", ",", 3, "right") == f"{1111111:,}"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: prompts.repeated(0), "expected at least 1, got a length of 0"),
        (lambda: prompts.trailing_zero(1), "expected at least 2, got a length of 1"),
        (lambda: prompts.leading_zero(-3), "got a length of -3"),
        (lambda: prompts.sentence(0, 0), "got a length of 0"),
        (lambda: prompts.interleaved(2, 2), "expected 0 or 1"),
        (lambda: prompts.interleaved(0, 1), "got a length of 0"),
        (lambda: prompts.separated("11", every=0), "got a length of 0"),
        (lambda: prompts.separated("11", side="middle"), "expected 'left' or 'right'"),
        (lambda: prompts.copy_prompt("1", "second"), "expected 'first' or 'last'"),
    ],
)
def test_what_cannot_be_is_refused(make: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()
