"""What a completion answers, and how likely the right answer is against the wrong ones.

Answers are read strictly, as the prompt demands its last line, and leniently, as a patient reader would. A completion
from which nobody can read an answer is no zero and no error: it is UNPARSABLE, a category that is counted.

Likelihoods give a curve even for a model that cannot keep to the form: the completion is taken to begin with the line
that the prompt asks for, up to the number; what is scored is the number after it. A number stands for all completions
that go on with anything but one more digit, so the events of different numbers exclude each other and `mass`, the sum
of their probabilities, is at most 1.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from oversquash_lens.errors import InputError
from oversquash_lens.paper.generator import Answering
from oversquash_lens.paper.prompts import DIGIT_LINE, NUMBER_LINE, Question, Task, find_task, questions
from oversquash_lens.parts import AnswerFile

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


HIGHEST = 200
DEFINITION = 1  # of answers and scores, counts up when the same questions give others: two are never mixed
DECIMALS = 6  # of a log-probability that is kept


@dataclass(frozen=True)
class Score:
    """One question's candidates 0, 1, 2, …: log-probability of each after the line asked for, natural log.

    `log_line` is that of the line itself, up to the number, as the beginning of the reply.
    """

    truth: int
    log_probabilities: tuple[float, ...]
    log_line: float

    @property
    def shares(self) -> tuple[float, ...]:
        """The candidates' probabilities made to sum to 1."""
        top = max(self.log_probabilities)
        weights = [math.exp(each - top) for each in self.log_probabilities]
        return tuple(each / math.fsum(weights) for each in weights)

    @property
    def mass(self) -> float:
        """How much of what the model would say after the line is one of the candidates, 0 … 1."""
        return math.fsum(math.exp(each) for each in self.log_probabilities)

    @property
    def probability(self) -> float:
        """Of the right answer among the candidates, 0 … 1."""
        return self.shares[self.truth]

    @property
    def margin(self) -> float:
        """Log-probability of the right answer less that of the likeliest wrong one, in nats; right if > 0."""
        wrong = (each for number, each in enumerate(self.log_probabilities) if number != self.truth)
        return self.log_probabilities[self.truth] - max(wrong)

    @property
    def zero_against_one(self) -> float:
        """Log-probability of 0 less that of 1, in nats: copying's own question."""
        return self.log_probabilities[0] - self.log_probabilities[1]

    @property
    def rank(self) -> int:
        """1 if the right answer is the likeliest, 2 if one is likelier, …"""
        right = self.log_probabilities[self.truth]
        return 1 + sum(each > right for each in self.log_probabilities)

    @property
    def best(self) -> int:
        """The likeliest candidate."""
        return max(range(len(self.log_probabilities)), key=self.log_probabilities.__getitem__)

    @property
    def expected_error(self) -> float:
        """Mean |candidate - truth| under `shares`."""
        return math.fsum(share * abs(number - self.truth) for number, share in enumerate(self.shares))


MEASURES = ("probability", "margin", "zero_against_one", "rank", "best", "expected_error", "mass", "log_line")


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task, [length][sample]."""

    task: str
    cot: str
    lengths: tuple[int, ...]
    scores: tuple[tuple[Score, ...], ...]

    def mean(self, measure: str) -> tuple[float, ...]:
        """Per length the mean over samples of one of MEASURES."""
        return self._over_samples(measure, lambda values: math.fsum(values) / len(values))

    def low(self, measure: str) -> tuple[float, ...]:
        return self._over_samples(measure, min)

    def high(self, measure: str) -> tuple[float, ...]:
        return self._over_samples(measure, max)

    def _over_samples(self, measure: str, reduce: Callable[[list[float]], float]) -> tuple[float, ...]:
        if measure not in MEASURES:
            raise InputError(f"expected one of {', '.join(MEASURES)}, got measure {measure!r}")
        return tuple(float(reduce([getattr(score, measure) for score in row])) for row in self.scores)

    def to_dict(self) -> dict:
        """JSON-able: every measure's mean per length, and all log-probabilities."""
        means = {measure: [_finite(value) for value in self.mean(measure)] for measure in MEASURES}
        rows = [[[_finite(value) for value in score.log_probabilities] for score in row] for row in self.scores]
        truths = [[score.truth for score in row] for row in self.scores]
        names = {"kind": "task_scores", "task": self.task, "cot": self.cot, "lengths": list(self.lengths)}
        return {**names, "truths": truths, **means, "log_probabilities": rows}


def score_task(
    generator: Answering,
    task: str | Task,
    lengths: Sequence[int] | None = None,
    *,
    cot: str = "none",
    samples: int = 1,
    highest: int | None = None,
    out: str | os.PathLike | None = None,
    progress: bool = False,
) -> TaskScores:
    """Score every candidate answer: the ten digits, or the numbers from 0 to `highest`.

    `highest` None: 200, as in figures 4 and 7, or twice the largest true count if that is more.

    With `cot` the prompt asks for reasoning, but what is scored is the final line straight away. `out` is a file of
    results that an interrupted run goes on with.
    """
    task = find_task(task)
    asked = questions(task, lengths, cot, samples if task.varied else 1)
    with AnswerFile(out, answer_identity(generator, out, what="scores")) as file:
        return score_questions(generator, task, asked, file, highest=highest, progress=progress)


def answer_identity(generator: Answering, out: Any, **settings: Any) -> dict[str, Any]:
    """What kept answers and scores depend on; `out` None keeps nothing, and nothing is looked at."""
    identity = getattr(generator, "identity", {}) if out is not None else {}
    return {**generator.settings, **settings, "definition": DEFINITION, "identity": identity}


def score_questions(
    generator: Answering,
    task: Task,
    asked: Sequence[Question],
    file: AnswerFile,
    *,
    highest: int | None = None,
    progress: bool = False,
) -> TaskScores:
    """As `score_task`, for questions already made and a file already open."""
    from tqdm import tqdm

    line = NUMBER_LINE if task.kind == "number" else DIGIT_LINE
    candidates = [f"{line}{number}" for number in range(_highest(task, asked, highest) + 1)]
    scores: dict[int, list[Score]] = {}
    for question in tqdm(asked, desc=f"{task.name}: likelihoods", unit="prompt", disable=not progress, leave=False):
        key = ("score", *question.key, len(candidates))
        if key not in file.answers:
            found = generator.log_likelihoods(question.prompt, [line.rstrip(), *candidates], whole_numbers=True)
            file.append([(key, [_finite(round(value, DECIMALS)) for value in found.tolist()])])
        log_line, *logs = [-math.inf if value is None else value for value in file.answers[key]]
        score = Score(question.truth, tuple(value - log_line for value in logs), log_line)
        scores.setdefault(question.length, []).append(score)
    return TaskScores(task.name, asked[0].cot, tuple(scores), tuple(tuple(row) for row in scores.values()))


def _highest(task: Task, asked: Sequence[Question], chosen: int | None) -> int:
    """The largest candidate; the right answer must be among them."""
    if task.kind == "digit":
        return 9
    truth = max(question.truth for question in asked)
    if chosen is not None and chosen < max(truth, 1):
        raise InputError(f"expected at least {max(truth, 1)}, the largest right answer, got highest={chosen}")
    return max(HIGHEST, 2 * truth) if chosen is None else chosen


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
