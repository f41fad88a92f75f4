"""How likely the right answer is against the wrong ones: a curve even for a model that cannot keep to the form.

The reply is taken to begin with the line that the prompt asks for, up to the number; what is scored is the number
after it. A number stands for all replies that go on with anything but one more digit, so the events of different
numbers exclude each other and `mass`, the sum of their probabilities, is at most 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from oversquash_lens.errors import InputError
from oversquash_lens.paper.generator import Answering
from oversquash_lens.paper.prompts import DIGIT_LINE, NUMBER_LINE
from oversquash_lens.paper.questions import Question, Task, find_task, questions
from oversquash_lens.parts import AnswerFile

HIGHEST = 200
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
    with AnswerFile(out, {**generator.settings, "what": "scores"}) as file:
        return score_questions(generator, task, asked, file, highest=highest, progress=progress)


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
