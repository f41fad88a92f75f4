"""Reading replies: the exact last line, a patient reader's guess, and replies that say nothing."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oversquash_lens.errors import InputError
from oversquash_lens.paper.scores import LENIENT, STRICT, UNPARSABLE, Answer, parse_answer

NUMBER = "The final answer to your maths question is: "
DIGIT = "The answer to your question is: "

REPLIES = [
    # reply, strict, lenient
    (f"{NUMBER}12", 12, 12),
    (f"5 + 7 = 12\n{NUMBER}12", 12, 12),
    (f"{NUMBER}12\n", 12, 12),
    (f"{NUMBER}0", 0, 0),
    (f"{NUMBER}9999", 9999, 9999),
    (f"{NUMBER}12.", None, 12),
    (f"'{NUMBER}12'", None, 12),
    (f"**{NUMBER}**12**", None, 12),
    (f"{NUMBER.lower()}12", None, 12),
    (f"{NUMBER}12\nI divided them into 3 groups.", None, 12),
    (f"{NUMBER}xxxx\nThere are 7 ones.", None, 7),
    (f"{NUMBER}1 + 1 + 1", None, None),
    (f"{NUMBER}{'1' * 5000}", None, None),
    ("The final answer is 12", None, 12),
    ("There are 3 groups and 17 ones.", None, 17),
    ("17 ones are in 3 groups", None, 3),
    ("2 * 5 + 2 = 12", None, 12),
    ("1 + 1 + 1 + 1", None, None),
    ("1 + 1 = 2 groups", None, 2),
    ("1,234", None, 1234),
    ("It is 12.0", None, 12),
    ("It is 12.5", None, None),
    ("x12 and v1.2 and 3rd", None, None),
    ("11111111111", None, None),
    ("There are twelve ones.", None, 12),
    ("one hundred and five", None, 105),
    ("Twenty-one, or rather ninety nine", None, 99),
    ("two thousand three hundred", None, 2300),
    ("one one one one", None, None),
    ("I see 4, that is five less one", None, 4),
    ("a phone in the tent", None, None),
    ("", None, None),
    ("\n\n", None, None),
    ("I cannot count.", None, None),
    ("٣", None, None),  # an Arabic three: Python's int() would read it
]


@pytest.mark.parametrize(("reply", "strict", "lenient"), REPLIES, ids=[repr(reply[0][:50]) for reply in REPLIES])
def test_numbers(reply: str, strict: int | None, lenient: int | None) -> None:
    assert parse_answer(reply) == Answer(strict, lenient)


@pytest.mark.parametrize(
    ("reply", "strict", "lenient"),
    [
        (f"{DIGIT}0", 0, 0),
        (f"Look closely.\n{DIGIT}1", 1, 1),
        (f"{DIGIT}<0>", None, 0),
        (f"'{DIGIT}0'", None, 0),
        (f"{DIGIT}0.", None, 0),
        (f"{DIGIT}1110", None, None),
        (f"{DIGIT}<ANSWER>", None, None),
        ("The last digit is 1.", None, 1),
        ("It ends in zero", None, 0),
        ("1110", None, None),
        ("12 or twelve", None, None),
        ("Of 300 digits the last is 0", None, 0),
    ],
)
def test_digits(reply: str, strict: int | None, lenient: int | None) -> None:
    assert parse_answer(reply, "digit") == Answer(strict, lenient)


@pytest.mark.parametrize(
    ("reply", "lenient"),
    [
        (f"{NUMBER}12", None),  # perhaps it was to be 120
        (f"{NUMBER}12\n\nPlease count", 12),
        (f"{NUMBER}12 ones", 12),
        ("1 + 1 + 1 + 1", None),
        ("In 3 groups of 5 there", None),
        ("twelve", None),
    ],
)
def test_a_reply_that_was_cut_off_has_no_last_line(reply: str, lenient: int | None) -> None:
    assert parse_answer(reply, finished=False) == Answer(None, lenient)


def test_categories() -> None:
    assert parse_answer(f"{NUMBER}3").category == STRICT
    assert parse_answer("3").category == LENIENT
    assert parse_answer("none").category == UNPARSABLE
    assert parse_answer(f"{DIGIT}0", "digit").category == STRICT  # zero is an answer


@given(st.integers(0, 9999), st.text())
@example(0, "")
def test_the_line_asked_for_is_always_read(number: int, before: str) -> None:
    assert parse_answer(f"{before}\n{NUMBER}{number}") == Answer(number, number)


@given(st.integers(0, 9), st.text(), st.text(max_size=20))
def test_a_strict_digit_stands_alone_on_the_last_line(digit: int, before: str, after: str) -> None:
    found = parse_answer(f"{before}\n{DIGIT}{digit}{after}", "digit").strict
    assert found in (None, digit) or "\n" in after
    if after.strip() == "":
        assert found == digit


@given(st.text(), st.sampled_from(("number", "digit")), st.booleans())
@example("1" * 100_000, "number", True)
@example("one hundred " * 2000, "number", True)
def test_any_text_at_all_is_read_without_complaint(text: str, kind: str, finished: bool) -> None:
    found = parse_answer(text, kind, finished)
    highest = 9 if kind == "digit" else 9999
    for value in (found.strict, found.lenient):
        assert value is None or 0 <= value <= highest
    if found.strict is not None:
        assert found.lenient == found.strict  # the lenient reading never contradicts the strict one


TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)


def in_words(n: int) -> str:
    """An independent speller, by recursion."""
    if n < 20:
        return SMALL[n]
    if n < 100:
        return TENS[n // 10] + (f"-{SMALL[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{SMALL[n // 100]} hundred" + (f" and {in_words(n % 100)}" if n % 100 else "")
    rest = n % 1000
    return f"{in_words(n // 1000)} thousand" + ((" and " if rest < 100 else " ") + in_words(rest) if rest else "")


def test_number_words_are_read() -> None:
    for n in (*range(1200), *range(1200, 10_000, 37)):
        for words in (in_words(n), in_words(n).replace("-", " ").replace(" and ", " ").capitalize()):
            assert parse_answer(f"I count {words}.").lenient == n, words


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="expected 'number' or 'digit'"):
        parse_answer("3", "letter")
