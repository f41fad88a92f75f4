"""The paper's prompts, word for word, the sequences that they ask about, and its tasks as data.

Everything is a pure function of its arguments: a sequence in, the prompt's text out; a length and a seed in, the
sequence out. `PRINTED` marks what the paper prints (appendix C.1, C.5, figures 2 and 5), `OURS` what it describes
without printing. Where it prints `seq` the sequence goes; one stray quotation mark of its "number of ones" prompt
("where 'xxxx is your answer") is set right here. How the chain-of-thought text and the question are put together it
does not say: here the text stands before the question.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from oversquash_lens.collapse.families import COPY_NUMBER, HOW_MANY_ONES
from oversquash_lens.errors import InputError, one_line, whole_number

PRINTED, OURS = "printed", "ours"

NUMBER_LINE = "The final answer to your maths question is: "
DIGIT_LINE = "The answer to your question is: "
FINAL_LINE = f"Please give the answer on the final line exactly as '{NUMBER_LINE}xxxx', where 'xxxx' is your answer."

SUM = "Please perform the following sum: {seq}"
ONES = "Please count the number of ones in the following sequence: {seq}"
WORD = "Please count the number of times 'car' appears in the following sentence: '{seq}'"
COPY = "Consider the following sequence: {seq}. What is the {which} digit in this sequence?"
EXACTLY = f"Please answer exactly as '{DIGIT_LINE}<ANSWER>'"
HINT = "*Hint* It's not necessarily a 1, check carefully"
TYPE_1 = f"What is the last digit of the following sequence? {EXACTLY}. Here is the sequence: {{seq}}"
TYPE_2 = f"{EXACTLY}. What is the last digit of the following sequence? {{seq}}"

HOW_MANY_ONES_CAPTION = "How many ones are in the following sequences?"  # as the figure's captions print it

THINK = "Let's think step by step, showing me your reasoning."
HERE_ARE_EXAMPLES = "Here are a few examples:"
COTS = ("none", "zero_shot", "few_shot")

WORD_TO_COUNT = "car"


def sum_prompt(seq: str) -> str:
    """Figure 3, first column: the sum of `1 + 1 + …`."""
    return f"{SUM.format(seq=seq)}. {FINAL_LINE}"


def ones_prompt(seq: str) -> str:
    """Figure 3, second and third column: how many ones among the digits."""
    return f"{ONES.format(seq=seq)}. {FINAL_LINE}"


def word_prompt(seq: str) -> str:
    """Figure 3, fourth column: how many times 'car' stands in a sentence."""
    return f"{WORD.format(seq=seq)}. {FINAL_LINE}"


def copy_prompt(seq: str, which: str = "last", hint: bool = False) -> str:
    """Figure 2: the first or last digit; the hint, whose place the paper does not print, stands at the end."""
    if which not in ("first", "last"):
        raise InputError(f"expected 'first' or 'last', got which={which!r}")
    prompt = f"{COPY.format(seq=seq, which=which)} {EXACTLY}"
    return f"{prompt} {HINT}" if hint else prompt


def type_1_prompt(seq: str) -> str:
    """Figures 11 and 12: question, form of the answer, then the sequence, which ends the prompt."""
    return TYPE_1.format(seq=seq)


def type_2_prompt(seq: str) -> str:
    """Figure 11: the form of the answer first."""
    return TYPE_2.format(seq=seq)


def how_many_ones(seq: str, caption: bool = False) -> str:
    """Figure 5 (a), (b); `caption` takes the wording of its caption, "sequences?"."""
    return f"{HOW_MANY_ONES_CAPTION if caption else HOW_MANY_ONES} {seq}"


def copy_number(seq: str) -> str:
    """Figure 5 (c), (d)."""
    return f"{COPY_NUMBER} {seq}"


@dataclass(frozen=True)
class Examples:
    """Worked examples of one question's kind; `source` is PRINTED or OURS."""

    texts: tuple[str, ...]
    source: str


def with_reasoning(prompt: str, cot: str, examples: Examples) -> str:
    """The prompt with chain of thought asked for: not at all, zero-shot, or with worked examples."""
    if cot not in COTS:
        raise InputError(f"expected one of {', '.join(COTS)}, got cot={cot!r}")
    if cot == "none":
        return prompt
    if cot == "zero_shot":
        return f"{THINK}\n\n{prompt}"
    return "\n\n".join([f"{THINK} {HERE_ARE_EXAMPLES}", *examples.texts, prompt])


def _counted(question: str, what: str, items: list[str], joiner: str) -> str:
    """An example in the printed form: groups of 5 in brackets, then `2 * 5 + 2 = 12`, then the final line."""
    fives, rest = divmod(len(items), 5)
    groups = [f"({joiner.join(items[5 * i : 5 * i + 5])})" for i in range(fives)]
    lines = [
        question,
        f"We divide {what} into groups of 5.",
        joiner.join([*groups, *items[5 * fives :]]),
        f"The answer is then {fives} * 5 + {rest} = {len(items)}",
        f"{NUMBER_LINE}{len(items)}",
    ]
    return "\n".join(lines)


def _sum_example(n: int) -> str:
    return _counted(SUM.format(seq=repeated(n, " + ")), "the sum", ["1"] * n, " + ")


def _ones_example(digits: str) -> str:
    return _counted(ONES.format(seq=digits), "the ones", ["1"] * digits.count("1"), ", ")


def _word_example(sentence: str) -> str:
    return _counted(WORD.format(seq=sentence), "the words 'car'", [WORD_TO_COUNT] * count_word(sentence), ", ")


def _copy_example(digits: str, which: str) -> str:
    digit = digits[-1 if which == "last" else 0]
    return "\n".join(
        [
            COPY.format(seq=digits, which=which),
            f"The digits are {', '.join(digits)}. The {which} one is {digit}.",
            f"{DIGIT_LINE}{digit}",
        ]
    )


def repeated(n: int, separator: str = "") -> str:
    """n ones, such as `1 + 1 + 1` with the separator " + ".

    >>> repeated(3, " + ")
    '1 + 1 + 1'
    """
    return separator.join("1" * _at_least(1, n))


def sampled_digits(n: int, seed: int, share: float = 0.7) -> str:
    """n digits, each a 1 with probability `share`, else a 0; the same for the same seed, on every platform."""
    draw = random.Random(seed).random
    return "".join("1" if draw() < share else "0" for _ in range(_at_least(1, n)))


def trailing_zero(n: int) -> str:
    """n digits, 1…10."""
    return "1" * (_at_least(2, n) - 1) + "0"


def leading_zero(n: int) -> str:
    """n digits, 01…1."""
    return "0" + "1" * (_at_least(2, n) - 1)


def interleaved(pairs: int, first: int) -> str:
    """Figure 2 (c): [0, 1] (first = 0) or [1, 0] (first = 1) `pairs` times, then one 0; 2·pairs + 1 digits."""
    if first not in (0, 1):
        raise InputError(f"expected 0 or 1, got first={first}")
    return f"{first}{1 - first}" * _at_least(1, pairs) + "0"


def separated(digits: str, separator: str = ",", every: int = 1, side: str = "left") -> str:
    """A separator after every `every` digits, counted from the left or from the right, as in thousands.

    >>> separated("11111", every=3), separated("11111", every=3, side="right")
    ('111,11', '11,111')
    """
    if side not in ("left", "right"):
        raise InputError(f"expected 'left' or 'right', got side={side!r}")
    odd = len(digits) % _at_least(1, every)
    first = odd if side == "right" else 0
    starts = [0] * bool(first) + list(range(first, len(digits), every))
    return separator.join(digits[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True))


# A sentence's clauses (ours: the paper prints none); each of the first row has one car, of the second none.
_WITH_CAR = (
    "a red car passed",
    "she sold her car",
    "the car was old",
    "my car stopped",
    "they washed the car",
    "no car came",
    "his car hooted",
    "that car won",
)
_WITHOUT_CAR = ("it rained", "two dogs barked", "the train was late", "nobody spoke", "we waited")


def sentence(cars: int, seed: int) -> str:
    """A sentence with the word 'car' exactly `cars` times among other words; about four words to each car."""
    draw = random.Random(seed).random
    clauses = []
    for _ in range(_at_least(1, cars)):
        clauses.append(_WITH_CAR[int(draw() * len(_WITH_CAR))])
        if draw() < 0.3:
            clauses.append(_WITHOUT_CAR[int(draw() * len(_WITHOUT_CAR))])
    return ", ".join(clauses)


def count_word(text: str, word: str = WORD_TO_COUNT) -> int:
    """How many times `word` stands in `text` as a word of its own.

    >>> count_word("a car, a cart and a car park")
    2
    """
    return len(re.findall(rf"\b{re.escape(word)}\b", text))


def _at_least(least: int, n: int) -> int:
    if n < least:
        raise InputError(f"expected at least {least}, got a length of {n}")
    return n


# What few-shot chain of thought shows, by the kind of question. Only the sum's two are printed.
EXAMPLES = {
    "sum": Examples((_sum_example(12), _sum_example(6)), PRINTED),
    "ones": Examples((_ones_example("1" * 12), _ones_example("1" * 6)), OURS),
    "digits": Examples((_ones_example("110111011110111"), _ones_example("01101111")), OURS),
    "word": Examples((_word_example(sentence(7, 1)), _word_example(sentence(6, 2))), OURS),
    "last": Examples((_copy_example("11101", "last"), _copy_example("0110", "last")), OURS),
    "first": Examples((_copy_example("10111", "first"), _copy_example("0110", "first")), OURS),
}


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
        write = partial(separated, separator=separator, every=every, side=side)
        return replace(self, name=f"{self.name} [{separator!r} every {every} from the {side}]", write=write)


def _ones(length: int, seed: int) -> str:
    return repeated(length)


def _count_ones(seq: str) -> int:
    return seq.count("1")


def _last(seq: str) -> int:
    return int(seq[-1])


def _first(seq: str) -> int:
    return int(seq[0])


def _unseeded(make: Callable[[int], str]) -> Callable[[int, int], str]:
    return lambda length, seed: make(length)


def _counting(
    name: str,
    draw: Callable,
    prompt: Callable,
    examples: str,
    varied: bool = False,
    write: Callable[[str], str] = str,
) -> Task:
    return Task(name, "number", draw, prompt, _count_ones, EXAMPLES[examples], COUNTING_LENGTHS, varied, write)


def _copying(name: str, make: Callable, prompt: Callable, lengths: tuple[int, ...] = COPYING_LENGTHS) -> Task:
    return Task(name, "digit", _unseeded(make), prompt, _last, EXAMPLES["last"], lengths)


def _interleaved(first: int) -> Callable[[int], str]:
    """`length` digits if that is odd, one more if it is even: the sequence is pairs and one last 0."""
    return lambda length: interleaved(length // 2, first)


_TASKS = (
    _counting("sum", _ones, sum_prompt, "sum", write=partial(separated, separator=" + ")),
    _counting("ones", _ones, ones_prompt, "ones"),
    _counting("bernoulli", sampled_digits, ones_prompt, "digits", varied=True),
    replace(_counting("word", sentence, word_prompt, "word", varied=True), truth=count_word),
    _copying("copy_last", trailing_zero, copy_prompt),
    replace(
        _copying("copy_first", leading_zero, partial(copy_prompt, which="first")),
        truth=_first,
        examples=EXAMPLES["first"],
    ),
    _copying("copy_last_hint", trailing_zero, partial(copy_prompt, hint=True)),
    _copying("interleaved_01", _interleaved(0), copy_prompt),
    _copying("interleaved_10", _interleaved(1), copy_prompt),
    _copying("type_1", trailing_zero, type_1_prompt, PROMPT_TYPE_LENGTHS),
    _copying("type_2", trailing_zero, type_2_prompt, PROMPT_TYPE_LENGTHS),
    _copying("copy_last_control", repeated, copy_prompt),
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
            prompt = with_reasoning(task.prompt(task.write(seq)), cot, task.examples)
            found.append(Question(task.name, cot, length, sample, prompt, task.truth(seq)))
    return found
