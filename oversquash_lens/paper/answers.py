"""What a reply answers: read strictly, as the prompt demands its last line, and leniently, as a patient reader would.

A reply from which nobody can read an answer is no zero and no error: it is UNPARSABLE, a category that is counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from oversquash_lens.errors import InputError
from oversquash_lens.paper.prompts import DIGIT_LINE, NUMBER_LINE

STRICT, LENIENT, UNPARSABLE = "strict", "lenient", "unparsable"
MOST_DIGITS = 4  # a longer run of digits is the sequence repeated, not a count

# kind of answer -> the line asked for, the form of what stands after it, the most digits that it may have
_KINDS = {"number": (NUMBER_LINE, r"\d+", MOST_DIGITS), "digit": (DIGIT_LINE, r"\d", 1)}
_NUMBER = re.compile(r"(?<![\w.,])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.0+)?(?![\w]|[.,]\d)", re.ASCII)
_TERMS = frozenset("+*/×^")  # beside a number they make it a part of working written out, not its result

# fmt: off
_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on
_VALUES = dict(zip(_UNITS, range(20), strict=True)) | dict(zip(_TENS, range(20, 100, 10), strict=True))
_WORD = "|".join(sorted([*_VALUES, "hundred", "thousand"], key=len, reverse=True))
_WORDS = re.compile(rf"\b(?:{_WORD})(?:(?:\s+and\s+|[\s-]+)(?:{_WORD}))*\b", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """A whole number ≥ 0 as read strictly and leniently, None where there is none to read."""

    strict: int | None
    lenient: int | None

    @property
    def category(self) -> str:
        """How far one has to meet it: STRICT, LENIENT or UNPARSABLE."""
        if self.strict is not None:
            return STRICT
        return UNPARSABLE if self.lenient is None else LENIENT


def parse_answer(text: str, kind: str = "number", finished: bool = True) -> Answer:
    """Read a reply's answer; `kind` is "number" (a count, up to 9999) or "digit" (0 … 9).

    Strictly: the last line is the line asked for and nothing else. Leniently, the first of these that is there: the
    number after the last such line's words; the last number in the text that is no term of working written out
    (`1 + 1 + …`); the last number in words. A reply that was cut off (`finished` False) has no last line and no last
    number, so of it only the first counts, and only where the number itself is whole.

    >>> parse_answer("5 + 7 = 12\\nThe final answer to your maths question is: 12")
    Answer(strict=12, lenient=12)
    >>> parse_answer("There are twelve ones.")
    Answer(strict=None, lenient=12)
    """
    if kind not in _KINDS:
        raise InputError(f"expected 'number' or 'digit', got kind={kind!r}")
    plain = text.replace("**", "")  # without Markdown's bold
    if not finished:
        return Answer(None, _after_the_words(re.sub(r"[\d.,]+$", "", plain), kind))
    strict = _strict(text, kind)
    readings = [strict, *(read(plain, kind) for read in (_after_the_words, _last_number, _last_number_in_words))]
    return Answer(strict, next((each for each in readings if each is not None), None))


def _strict(text: str, kind: str) -> int | None:
    line, form, most = _KINDS[kind]
    last = text.rstrip().rsplit("\n", 1)[-1]
    found = re.fullmatch(re.escape(line) + f"({form})", last, re.ASCII)
    return int(found[1]) if found and len(found[1]) <= most else None


def _after_the_words(text: str, kind: str) -> int | None:
    """The number that follows the last occurrence of the words asked for, in any case and quotes."""
    words = _KINDS[kind][0].rstrip(": ")
    for found in reversed(list(re.finditer(re.escape(words), text, re.IGNORECASE))):
        rest = text[found.end() :].split("\n", 1)[0].lstrip(" :'\"*<`")
        first = _NUMBER.match(rest)
        if first and not _is_term(rest, first):
            return _last([_whole(first[0])], kind)
    return None


def _last_number(text: str, kind: str) -> int | None:
    return _last([_whole(found[0]) for found in _NUMBER.finditer(text) if not _is_term(text, found)], kind)


def _last_number_in_words(text: str, kind: str) -> int | None:
    return _last([_value_of(found[0]) for found in _WORDS.finditer(text)], kind)


def _is_term(text: str, found: re.Match) -> bool:
    before, after = text[: found.start()].rstrip(" ")[-1:], text[found.end() :].lstrip(" ")[:1]
    return before in _TERMS or after in _TERMS


def _whole(number: str) -> int | None:
    """`1,000`, `12.0` -> 1000, 12; None for a run of digits that is the sequence itself."""
    digits = number.split(".")[0].replace(",", "")
    return int(digits) if len(digits) <= MOST_DIGITS else None


def _last(numbers: list[int | None], kind: str) -> int | None:
    limit = 10 ** _KINDS[kind][2]
    fitting = [number for number in numbers if number is not None and number < limit]
    return fitting[-1] if fitting else None


def _value_of(words: str) -> int | None:
    """`one hundred and five` -> 105; None for words that make no one number, such as `one one one`.

    >>> _value_of("one hundred and five"), _value_of("twenty-one"), _value_of("one one")
    (105, 21, None)
    """
    total, part, room = 0, 0, 10**9  # `room`: the next word's value must be smaller
    for word in re.findall(_WORD, words.lower()):
        if word in _VALUES:
            if _VALUES[word] >= room:
                return None
            part += _VALUES[word]
            room = 10 if word in _TENS else 0
        elif word == "hundred" and part < 10:
            part, room = max(part, 1) * 100, 100
        elif word == "thousand" and total == 0:
            total, part, room = max(part, 1) * 1000, 0, 1000
        else:
            return None
    return total + part
