"""The paper's tasks as data: which sequence, which prompt, which answer is right."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from oversquash_lens.errors import InputError, one_line, whole_number
from oversquash_lens.paper import prompts
from oversquash_lens.paper.prompts import EXAMPLES, Examples

COUNTING_LENGTHS = tuple(range(5, 196, 10))  # figures 3 and 6
COPYING_LENGTHS = tuple(range(100, 501, 50))  # figure 2
PROMPT_TYPE_LENGTHS = tuple(range(100, 1501, 100))  # figure 11


@dataclass(frozen=True)
class Task:
    """One thing to ask about sequences of any length.

    `kind` is the answer's: "number" or "digit". `draw(length, seed)` makes the bare sequence, the same one for every
    seed unless `varied`; `write` puts separators in; `prompt` asks about it; `truth` is the right answer.
    """

    name: str
    kind: str
    draw: Callable[[int, int], str]
    prompt: Callable[[str], str]
    truth: Callable[[str], int]
    examples: Examples
    lengths: tuple[int, ...]
    varied: bool = False
    write: Callable[[str], str] = str

    def separated(self, separator: str, every: int = 1, side: str = "left") -> Task:
        """The same task with a separator after every `every` digits, counted from `side`: one of the remedies."""
        if self.name == "word":
            raise InputError("expected one about digits, got the task 'word': a sentence has no digits to separate")
        write = partial(prompts.separated, separator=separator, every=every, side=side)
        return replace(self, name=f"{self.name} [{separator!r} every {every} from the {side}]", write=write)


def _ones(length: int, seed: int) -> str:
    return prompts.repeated(length)


def _count_ones(seq: str) -> int:
    return seq.count("1")


def _last(seq: str) -> int:
    return int(seq[-1])


def _first(seq: str) -> int:
    return int(seq[0])


def _unseeded(make: Callable[[int], str]) -> Callable[[int, int], str]:
    return lambda length, seed: make(length)


def _counting(name: str, draw: Callable, prompt: Callable, examples: str, **more: object) -> Task:
    return Task(name, "number", draw, prompt, _count_ones, EXAMPLES[examples], COUNTING_LENGTHS, **more)


def _copying(name: str, make: Callable, prompt: Callable, lengths: tuple[int, ...] = COPYING_LENGTHS) -> Task:
    return Task(name, "digit", _unseeded(make), prompt, _last, EXAMPLES["last"], lengths)


def _interleaved(first: int) -> Callable[[int], str]:
    """`length` digits if that is odd, one more if it is even: the sequence is pairs and one last 0."""
    return lambda length: prompts.interleaved(length // 2, first)


_TASKS = (
    _counting("sum", _ones, prompts.sum_prompt, "sum", write=partial(prompts.separated, separator=" + ")),
    _counting("ones", _ones, prompts.ones_prompt, "ones"),
    _counting("bernoulli", prompts.sampled_digits, prompts.ones_prompt, "digits", varied=True),
    replace(_counting("word", prompts.sentence, prompts.word_prompt, "word", varied=True), truth=prompts.count_word),
    _copying("copy_last", prompts.trailing_zero, prompts.copy_prompt),
    replace(
        _copying("copy_first", prompts.leading_zero, partial(prompts.copy_prompt, which="first")),
        truth=_first,
        examples=EXAMPLES["first"],
    ),
    _copying("copy_last_hint", prompts.trailing_zero, partial(prompts.copy_prompt, hint=True)),
    _copying("interleaved_01", _interleaved(0), prompts.copy_prompt),
    _copying("interleaved_10", _interleaved(1), prompts.copy_prompt),
    _copying("type_1", prompts.trailing_zero, prompts.type_1_prompt, PROMPT_TYPE_LENGTHS),
    _copying("type_2", prompts.trailing_zero, prompts.type_2_prompt, PROMPT_TYPE_LENGTHS),
    _copying("copy_last_control", prompts.repeated, prompts.copy_prompt),
)
# sum, ones, bernoulli, word: figures 3, 4, 6, 7 (length: digits, or cars in the sentence). The copying tasks: figure 2
# (a), (b) with the hint, (c) interleaved; Type 1 and 2: figure 11 (length: digits). In all of these 0 is right, so a
# model that always says 0 would seem to copy: the control, ours, ends in 1.
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def find_task(task: str | Task) -> Task:
    """A task by its name, or the user's own."""
    if isinstance(task, Task):
        return task
    if not isinstance(task, str) or task not in TASKS:
        raise InputError(f"expected one of {', '.join(TASKS)}, or a Task, got task {one_line(repr(task), 60)}")
    return TASKS[task]


@dataclass(frozen=True)
class Question:
    """One prompt with its right answer; `sample` numbers the sequences, or else the draws, at one length."""

    task: str
    cot: str
    length: int
    sample: int
    prompt: str
    truth: int

    @property
    def key(self) -> tuple[str | int, ...]:
        """What it is known by in a file of answers; the hash is the prompt's, so no other prompt is taken for it."""
        digest = hashlib.sha256(self.prompt.encode()).hexdigest()[:16]
        return self.task, self.cot, self.length, self.sample, digest


def questions(task: str | Task, lengths: Sequence[int] | None, cot: str, samples: int) -> list[Question]:
    """`samples` questions at each length, shortest first; None takes the lengths of the paper's figure."""
    task = find_task(task)
    whole_number("samples", samples)
    chosen = task.lengths if lengths is None else tuple(lengths) if isinstance(lengths, Iterable) else (lengths,)
    if not chosen or len(set(chosen)) != len(chosen) or not all(type(each) is int for each in chosen):
        raise InputError(f"expected whole numbers, each once, got lengths {one_line(chosen, 60)}: give at least one")
    found = []
    for length in sorted(chosen):
        for sample in range(samples):
            seq = task.draw(length, 1000 * length + sample)
            prompt = prompts.with_reasoning(task.prompt(task.write(seq)), cot, task.examples)
            found.append(Question(task.name, cot, length, sample, prompt, task.truth(seq)))
    return found
