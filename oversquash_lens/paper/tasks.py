"""Copying and counting, run on a model: free answers read twice, and the likelihood of the right answer beside.

One `TaskResult` is one task under one chain-of-thought variant; every number of it is a tuple with one entry per
length, ready for a chart.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from oversquash_lens.errors import InputError
from oversquash_lens.paper.generator import Answering, Completion, Sampling
from oversquash_lens.paper.prompts import TASKS, Question, Task, find_task, questions
from oversquash_lens.paper.scores import TaskScores, answer_identity, parse_answer, score_questions, score_task
from oversquash_lens.parts import AnswerFile, Key
from oversquash_lens.results import Result

__all__ = ["TASKS", "Histogram", "Task", "TaskAnswer", "TaskResult", "histogram", "run_task", "score_task"]

NEW_TOKENS = {"none": 64, "zero_shot": 512, "few_shot": 512}  # at most, where the caller does not say
READINGS = ("strict", "lenient")
SHOWN = ("probability", "rank")  # of the scores, in a table, besides the expected error
SPIKE = 100  # the number that the paper's models answer so often


@dataclass(frozen=True)
class TaskAnswer:
    """One completion and what was read from it; `finished` False: it was cut off at the limit of tokens."""

    length: int
    sample: int
    truth: int
    text: str
    tokens: int
    finished: bool
    strict: int | None
    lenient: int | None

    def read(self, how: str) -> int | None:
        """The answer as read "strict" or "lenient"; None where it cannot be."""
        if how not in READINGS:
            raise InputError(f"expected 'strict' or 'lenient', got how={how!r}")
        return self.strict if how == "strict" else self.lenient


@dataclass(frozen=True, repr=False)
class TaskResult(Result):
    """Answers of one task, [length][sample]; `settings` name the model and how it was sampled.

    `examples`: whether few-shot examples were "printed" in the paper or are "ours"; empty without examples.
    """

    def _title(self) -> str:
        about = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"{self.task}, chain of thought {self.cot}: answers per length, leniently read ({about})"

    def _table(self) -> dict[str, Sequence[Any]]:
        """One row a length: the right answer, how it was answered, and what the likelihoods say of the numbers."""
        likely = {} if self.scores is None else {name: self.scores.mean(name) for name in ("expected_error", *SHOWN)}
        return {
            **{"length": self.lengths, "truth": self.truths, "accuracy": self.accuracy()},
            **{"strict": self.accuracy("strict"), "error": self.error(), "unparsable": self.unparsable()},
            **likely,
        }

    task: str
    kind: str
    cot: str
    examples: str
    settings: dict[str, Any]
    lengths: tuple[int, ...]
    answers: tuple[tuple[TaskAnswer, ...], ...]
    scores: TaskScores | None

    @property
    def truths(self) -> tuple[float, ...]:
        """The right answer, mean over samples."""
        return tuple(math.fsum(answer.truth for answer in row) / len(row) for row in self.answers)

    def accuracy(self, how: str = "lenient") -> tuple[float, ...]:
        """Share of right answers among all; what cannot be read is not right."""
        return tuple(sum(answer.read(how) == answer.truth for answer in row) / len(row) for row in self.answers)

    def errors(self, how: str = "lenient") -> tuple[tuple[int, ...], ...]:
        """|answer - truth| of every answer that can be read."""
        return tuple(
            tuple(abs(number - answer.truth) for answer in row if (number := answer.read(how)) is not None)
            for row in self.answers
        )

    def error(self, how: str = "lenient") -> tuple[float, ...]:
        """Mean absolute error among the answers that can be read; nan where none can."""
        return self._over(self.errors(how), lambda row: math.fsum(row) / len(row))

    def error_low(self, how: str = "lenient") -> tuple[float, ...]:
        return self._over(self.errors(how), min)

    def error_high(self, how: str = "lenient") -> tuple[float, ...]:
        return self._over(self.errors(how), max)

    def unparsable(self, how: str = "lenient") -> tuple[int, ...]:
        """How many answers cannot be read."""
        return tuple(sum(answer.read(how) is None for answer in row) for row in self.answers)

    @property
    def cut_off(self) -> tuple[int, ...]:
        """How many completions came to the limit of tokens before they ended."""
        return tuple(sum(not answer.finished for answer in row) for row in self.answers)

    def given(self, how: str = "lenient") -> tuple[int | None, ...]:
        """Every answer in order, for `histogram`."""
        return tuple(answer.read(how) for row in self.answers for answer in row)

    @staticmethod
    def _over(rows: Iterable[Sequence[int]], reduce: Callable[[Sequence[int]], float]) -> tuple[float, ...]:
        return tuple(float(reduce(row)) if row else math.nan for row in rows)

    def to_dict(self) -> dict:
        """JSON-able: settings, numbers per length by both readings, every answer, and the scores."""
        readings = {}
        for how in READINGS:
            error = [None if math.isnan(each) else each for each in self.error(how)]
            readings[how] = {
                "accuracy": list(self.accuracy(how)),
                "error": error,
                "unparsable": list(self.unparsable(how)),
                "histogram": histogram(self.given(how)).to_dict(),
            }
        return {
            "kind": "task",
            "answer_kind": self.kind,
            **{name: getattr(self, name) for name in ("task", "cot", "examples", "settings")},
            "lengths": list(self.lengths),
            "truths": list(self.truths),
            "cut_off": list(self.cut_off),
            **readings,
            "answers": [[asdict(answer) for answer in row] for row in self.answers],
            "scores": None if self.scores is None else self.scores.to_dict(),
        }


@dataclass(frozen=True)
class Histogram:
    """How often each number was answered: `counts[number]`, those `above` them, and the `unparsable`."""

    counts: tuple[int, ...]
    above: int
    unparsable: int

    @property
    def parsed(self) -> int:
        return sum(self.counts) + self.above

    def share(self, number: int = SPIKE) -> float:
        """Share of the answers that can be read which are exactly `number`; nan where none can."""
        return self.counts[number] / self.parsed if self.parsed else math.nan

    def to_dict(self) -> dict:
        share = self.share() if len(self.counts) > SPIKE and self.parsed else None
        return {**asdict(self), "counts": list(self.counts), f"share_at_{SPIKE}": share}


def histogram(answers: Iterable[int | None], highest: int = 200) -> Histogram:
    """Figures 4 and 7: the numbers 0 … `highest` and how often each was answered; None is an unparsable answer.

    >>> found = histogram([100, 100, 7, 300, None])
    >>> found.share(100), found.above, found.unparsable
    (0.5, 1, 1)
    """
    found = Counter(answers)
    unparsable = found.pop(None, 0)
    counts = tuple(found.pop(number, 0) for number in range(highest + 1))
    return Histogram(counts, sum(found.values()), unparsable)


def run_task(
    generator: Answering,
    task: str | Task,
    lengths: Sequence[int] | None = None,
    *,
    cot: str = "none",
    samples: int = 1,
    sampling: Sampling | None = None,
    score: bool = True,
    out: str | os.PathLike | None = None,
    progress: bool = False,
) -> TaskResult:
    """Ask `task` at each length and read the answers; lengths None are those of the paper's figure.

    Args:
        generator: what answers, an `oversquash_lens.paper.generator.Generator` of a model.
        task: its name, out of `oversquash_lens.paper.tasks.TASKS`, or a `Task`.
        lengths: of the sequences asked about.
        cot: chain of thought, "none", "zero_shot" or "few_shot".
        samples: at each length, different sequences, or different draws of the same one where the task has only one;
            a greedy model asked the same again would say the same, so then there is one.
        sampling: None is greedy, with tokens enough for an answer (with chain of thought: for reasoning).
        score: add the likelihood of each candidate answer.
        out: a parquet file that keeps every answer as it comes: the same call goes on with it after a crash, batch for
            batch as it would have been.
        progress: show a bar.

    Returns:
        A `TaskResult`: accuracy, error and likelihoods, one of each per length.

    Raises:
        InputError: what cannot be used, a prompt that the model cannot read, or a file of another run.
    """
    task = find_task(task)
    if not isinstance(generator, Answering):
        raise InputError(
            f"expected one that answers, got a {type(generator).__name__} as the generator: wrap a model, "
            "Generator(model)"
        )
    if cot not in NEW_TOKENS:
        raise InputError(f"expected one of {', '.join(NEW_TOKENS)}, got cot={cot!r}")
    sampling = sampling or Sampling(max_new_tokens=NEW_TOKENS[cot])
    samples = samples if task.varied or sampling.temperature > 0 else 1
    asked = questions(task, lengths, cot, samples)
    settings = {**generator.settings, **asdict(sampling)}
    with AnswerFile(out, answer_identity(generator, out, **asdict(sampling))) as file:
        _collect(generator, task, asked, sampling, file, progress)
        scored = asked if task.varied else [question for question in asked if question.sample == 0]
        scores = score_questions(generator, task, scored, file, progress=progress) if score else None
    rows: dict[int, list[TaskAnswer]] = {}
    for question in asked:
        completion = Completion(**file.answers[_completion_key(question)])
        rows.setdefault(question.length, []).append(_read(task, question, completion))
    answers = tuple(tuple(row) for row in rows.values())
    examples = task.examples.source if cot == "few_shot" else ""
    return TaskResult(task.name, task.kind, cot, examples, settings, tuple(rows), answers, scores)


def _collect(
    generator: Answering, task: Task, asked: Sequence[Question], sampling: Sampling, file: AnswerFile, progress: bool
) -> None:
    """Put the missing completions into the file. Batches are those of the whole run, however much of it is done."""
    from tqdm import tqdm

    missing = {question for question in asked if _completion_key(question) not in file.answers}
    bar = tqdm(total=len(asked), initial=len(asked) - len(missing), desc=task.name, unit="answer", disable=not progress)
    with bar:
        for batch in generator.batches([question.prompt for question in asked], sampling):
            some = [asked[index] for index in batch]
            new = [question for question in some if question in missing]
            if new:
                draws = [question.sample for question in some]
                written = generator.completions([question.prompt for question in some], sampling, draws=draws)
                said = dict(zip(some, written, strict=True))
                file.append([(_completion_key(question), asdict(said[question])) for question in new])
                bar.update(len(new))


def _completion_key(question: Question) -> Key:
    return ("completion", *question.key)


def _read(task: Task, question: Question, completion: Completion) -> TaskAnswer:
    found = parse_answer(completion.text, task.kind, completion.finished)
    return TaskAnswer(
        length=question.length,
        sample=question.sample,
        truth=question.truth,
        text=completion.text,
        tokens=completion.tokens,
        finished=completion.finished,
        strict=found.strict,
        lenient=found.lenient,
    )
