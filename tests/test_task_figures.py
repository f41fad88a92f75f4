"""Figures 2, 3, 4, 6, 7 and 11 from made-up answers: what is drawn, what is counted, and verdicts that flip."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oversquash_lens.paper import task_figures as recipe
from oversquash_lens.paper.generator import Sampling
from oversquash_lens.paper.prompts import DIGIT_LINE, NUMBER_LINE, TASKS, questions
from oversquash_lens.paper.reproduce import Options, RunConfig
from oversquash_lens.paper.scores import Score, TaskScores, parse_answer
from oversquash_lens.paper.task_figures import BIN, QUICK_TOKENS
from oversquash_lens.paper.tasks import NEW_TOKENS, TaskAnswer, TaskResult
from oversquash_lens.viz.chart import Chart, Panel, Series

Answer = Callable[[str, str, int, int], str]  # task, chain of thought, length, right answer -> reply
FIGURES = {name: getattr(recipe, f"figure_{name}") for name in ("2", "3", "4", "6", "7", "11")}


@dataclass
class Stage:
    """A setting whose generator says what `answer` says; `asked` is what run_task was called with."""

    answer: Answer
    options: Options
    folder: Path
    asked: list[dict[str, Any]] = field(default_factory=list)

    def chart(self, figure: str) -> Chart:
        config = RunConfig(self.options, self.folder)
        config.__dict__["generator"] = SimpleNamespace(label="a parrot", chat=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recipe, "run_task", self.run_task)
            return FIGURES[figure](config)

    def run_task(self, generator: Any, name: str, lengths: Any, **options: Any) -> TaskResult:
        self.asked.append({"task": name, "lengths": tuple(lengths), **options})
        task, cot = TASKS[name], options["cot"]
        answers: dict[int, list[TaskAnswer]] = {}
        scores: dict[int, list[Score]] = {}
        for one in questions(task, lengths, cot, options["samples"]):
            text = self.answer(name, cot, one.length, one.truth)
            found = parse_answer(text, task.kind)
            made = TaskAnswer(one.length, one.sample, one.truth, text, 1, True, found.strict, found.lenient)
            answers.setdefault(one.length, []).append(made)
            logs = [-3.0] * (10 if task.kind == "digit" else 201)
            logs[one.truth] = -1.0
            scores.setdefault(one.length, []).append(Score(one.truth, tuple(logs), -0.5))
        rows = tuple(map(tuple, answers.values()))
        scored = TaskScores(name, cot, tuple(scores), tuple(map(tuple, scores.values()))) if options["score"] else None
        examples = task.examples.source if cot == "few_shot" else ""
        return TaskResult(name, task.kind, cot, examples, {}, tuple(answers), rows, scored)


def stage(answer: Answer, tmp_path: Path, **options: Any) -> Stage:
    return Stage(answer, Options(quick=True, **options), tmp_path)


def digits(answer: Callable[[str, int, int], object]) -> Answer:
    """The line asked for, with what `answer(task, length, right answer)` says."""
    return lambda task, cot, length, truth: f"{DIGIT_LINE}{answer(task, length, truth)}"


def numbers(answer: Callable[[str, int, int], object]) -> Answer:
    return lambda task, cot, length, truth: f"{NUMBER_LINE}{answer(cot, length, truth)}"


def rows(panel: Panel) -> dict[str, Series]:
    return {one.label: one for one in panel.series}


def bars(one: Series) -> dict[float, float]:
    """Those that are not empty."""
    return {x: y for x, y in zip(one.x, one.y, strict=True) if y}


def held(chart: Chart) -> list[bool | None]:
    return [verdict.held for verdict in chart.verdicts]


# ---------------------------------------------------------------- copying


def test_figure_2_draws_right_and_wrong(tmp_path: Path) -> None:
    chart = stage(digits(lambda task, k, truth: truth if task == "copy_first" or k < 50 else 1 - truth), tmp_path)
    chart = chart.chart("2")
    a, b, c, *likelihoods = chart.panels
    assert rows(a)["first digit of 01…1"].y == (1, 1, 1)
    assert rows(a)["last digit of 1…10"].y == rows(a)["last digit of 1…11 (control)"].y == (1, 0, 0)
    assert list(rows(b)) == ["last digit of 1…10", "last digit, with hint"]
    assert list(rows(c)) == ["last digit of 01…010", "last digit of 10…100"]
    for panel in chart.panels[:3]:
        assert {(one.kind, one.x) for one in panel.series} == {("marks", (10, 50, 100))}
    for panel in likelihoods:
        assert all(one.y == (2.0,) * 3 for one in panel.series)  # the right digit at -1, all others at -3
    assert held(chart) == [True, False, False]
    assert [verdict.number for verdict in chart.verdicts] == [
        "3 and 1 right of 3; of 1…11, whose answer is not 0, 1",
        "1 right of 3 with it, 1 without",
        "2 right of 6",
    ]


@pytest.mark.parametrize(
    ("right", "expected"),
    [
        ({"copy_first", "interleaved_01", "interleaved_10"}, [True, False, True]),
        ({"copy_last_hint", "interleaved_01"}, [False, True, False]),
        ({"copy_first", "copy_last", "copy_last_hint"}, [False, False, False]),
    ],
)
def test_the_verdicts_of_figure_2_flip(right: set[str], expected: list[bool], tmp_path: Path) -> None:
    chart = stage(digits(lambda task, k, truth: truth if task in right else 7), tmp_path).chart("2")
    assert held(chart) == expected


@pytest.mark.parametrize(
    ("answer", "expected", "said"),
    [
        (lambda task, k, truth: truth, False, "Type 1, sequence last: 3 right of 3, Type 2, form first: 3 right of 3"),
        (lambda task, k, truth: truth if k < 100 else 1, True, "sequence last: 2 right of 3, Type 2, form first: 2"),
        (lambda task, k, truth: truth if task == "type_2" else 1, False, "0 right of 3, Type 2, form first: 3"),
    ],
)
def test_figure_11(answer: Callable, expected: bool, said: str, tmp_path: Path) -> None:
    chart = stage(digits(answer), tmp_path).chart("11")
    assert held(chart) == [expected]
    assert said in chart.verdicts[0].number
    assert list(chart.data) == ["type_1", "type_2"]


def test_answers_in_the_wrong_form_are_read_leniently_and_counted(tmp_path: Path) -> None:
    """Half right is right; what cannot be read is wrong, and is counted in a note."""
    said = {10: "It is 0.", 50: "I would rather not say.", 100: f"{DIGIT_LINE}0"}
    chart = stage(lambda task, cot, k, truth: said[k], tmp_path).chart("11")
    assert rows(chart.panels[0])["Type 1, sequence last"].y == (1, 0, 1)
    assert chart.notes[0] == "Of 6 answers 4 cannot be read strictly, 2 not even leniently; 0 were cut off."


# ---------------------------------------------------------------- counting


def test_figure_3_draws_errors_in_four_columns_and_three_rows(tmp_path: Path) -> None:
    chart = stage(numbers(lambda cot, k, truth: truth + {5: 0, 15: 2, 45: 7}[k]), tmp_path).chart("3")
    assert (chart.columns, len(chart.panels)) == (4, 12)
    titles = [panel.title for panel in chart.panels]
    assert titles[0] == "sum, no CoT"
    assert titles[5] == "count ones, CoT zero-shot"
    assert titles[11] == "count a word, CoT few-shot"
    for place, panel in enumerate(chart.panels):
        drawn = rows(panel)
        assert drawn["read leniently"].y == drawn["read strictly"].y == drawn["read leniently"].low == (0, 2, 7)
        assert drawn["read leniently"].x == (5, 15, 45)
        assert ("likelihood" in drawn) is (place < 4)  # scored without reasoning only
    assert held(chart)[:3] == [True, True, True]
    assert chart.verdicts[0].number.startswith("sum 0 to 7, count ones 0 to 7,")
    assert "Few-shot examples of our own, as the paper prints none: count a word, count ones" in " ".join(chart.notes)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda cot, k, truth: truth, [False] * 3),
        (lambda cot, k, truth: truth + 100 - k, [False] * 3),
        (lambda cot, k, truth: truth + (k if cot == "few_shot" else 0), [False, False, True]),
        (lambda cot, k, truth: truth if k == 5 else "many", [None] * 3),
    ],
)
def test_the_verdicts_of_figures_3_and_6_flip(answer: Callable, expected: list[bool | None], tmp_path: Path) -> None:
    one, other = (stage(numbers(answer), tmp_path).chart(figure) for figure in ("3", "6"))
    assert held(one)[:3] == held(other)[:3] == expected
    assert one.data == other.data
    assert (one.name, other.name) == ("3", "6")


def test_the_likelihoods_have_a_verdict_where_no_answer_can_be_read(tmp_path: Path) -> None:
    """Nearly even over 0 … 200, so the expected error falls as the truth, 5 to 45, comes nearer the middle."""
    verdict = stage(lambda task, cot, k, truth: "no idea", tmp_path).chart("3").verdicts[3]
    assert verdict.claim.startswith("the expected error")
    assert verdict.held is False
    sizes = [float(number) for number in re.findall(r"(?<=ones )([\d.]+) to ([\d.]+)", verdict.number)[0]]
    even = [sum(abs(i - truth) for i in range(201)) / 200 for truth in (5, 45)]
    assert sizes == pytest.approx([each * 200 / (200 + math.e**2) for each in even], rel=0.01)


@pytest.mark.parametrize(
    ("errors", "expected"),
    [((1.0, 2.0, 3.0), True), ((3.0, 2.0, 1.0), False), ((math.nan, 2.0, math.nan), None)],
)
def test_one_task_that_does_not_grow_refutes(errors: tuple[float, ...], expected: bool | None) -> None:
    assert recipe._growth("it grows", (5, 15, 45), {"grows": (1.0, 2.0, 3.0), "told": errors}).held is expected


def test_an_unreadable_task_leaves_gaps(tmp_path: Path) -> None:
    chart = stage(lambda task, cot, k, truth: "no idea", tmp_path).chart("6")
    assert all(math.isnan(y) for y in rows(chart.panels[0])["read leniently"].y)
    assert held(chart)[:3] == [None, None, None]
    assert chart.verdicts[0].number == "sum unread to unread, count ones unread to unread, " + (
        "count ones, Bernoulli(0.7) unread to unread, count a word unread to unread"
    )


# ---------------------------------------------------------------- histograms


def test_figure_4_counts_answers(tmp_path: Path) -> None:
    said = {"none": 100, "zero_shot": 7, "few_shot": 300}
    chart = stage(numbers(lambda cot, k, truth: said[cot]), tmp_path, samples=2).chart("4")
    assert len(chart.panels) == len(chart.verdicts) == 4
    for panel in chart.panels:
        drawn = rows(panel)
        assert list(drawn) == ["true answer", "without CoT", "with CoT"]
        assert {one.kind for one in panel.series} == {"bars"}
        assert all(one.x == tuple(range(0, 201, BIN)) for one in panel.series)
        assert bars(drawn["without CoT"]) == {100: 6}
        assert bars(drawn["with CoT"]) == {5: 6}  # 7 is among 5 … 9, 300 above the axis
    assert bars(rows(chart.panels[0])["true answer"]) == {5: 2, 15: 2, 45: 2}
    assert f"{4 * 6} answers are above 200 and not drawn." in chart.notes
    assert held(chart) == [True] * 4
    assert chart.verdicts[0].number == "100% of 6 answers are 100; most frequent: 100 (100%)"
    assert chart.data["sum, few_shot"]["above"] == 6


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda cot, k, truth: 100 if k > 5 else 12, True),
        (lambda cot, k, truth: 12 if k > 5 else 100, False),
        (lambda cot, k, truth: truth, False),
        (lambda cot, k, truth: "many", None),
    ],
)
def test_the_spike_is_there_or_not(answer: Callable, expected: bool | None, tmp_path: Path) -> None:
    for figure in ("4", "7"):
        assert held(stage(numbers(answer), tmp_path).chart(figure)) == [expected] * 4


def test_the_spike_when_every_answer_is_above_the_axis(tmp_path: Path) -> None:
    chart = stage(numbers(lambda cot, k, truth: 500), tmp_path).chart("7")
    assert held(chart) == [False] * 4
    assert chart.verdicts[0].number == "0% of 3 answers are 100; most frequent: 500 (100%)"


# ---------------------------------------------------------------- what is asked


def test_what_the_user_chose_reaches_the_task(tmp_path: Path) -> None:
    made = stage(numbers(lambda cot, k, truth: truth), tmp_path, samples=3, temperature=0.7, seed=4, longest=20)
    chart = made.chart("3")
    assert len(made.asked) == 12
    for one in made.asked:
        assert one["lengths"] == (5, 15)
        assert one["samples"] == 3
        assert one["sampling"] == Sampling(0.7, 4, min(NEW_TOKENS[one["cot"]], QUICK_TOKENS))
        assert one["score"] is (one["cot"] == "none")
        assert one["out"] == tmp_path / f"answers-{one['task']}-{one['cot']}-quick.parquet"
    assert "sampled at temperature 0.7, chat template, 3 per length." in chart.setup
    assert chart.model == "a parrot"


def test_a_whole_run_has_room_for_long_answers(tmp_path: Path) -> None:
    """… in files of their own: where a quick answer was cut off, theirs goes on."""
    made = stage(numbers(lambda cot, k, truth: truth), tmp_path, longest=20)
    made.options = replace(made.options, quick=False)
    made.chart("3")
    assert {one["sampling"].max_new_tokens for one in made.asked} == set(NEW_TOKENS.values())
    assert made.asked[0]["out"] == tmp_path / "answers-sum-none.parquet"


@pytest.mark.parametrize("figure", ["3", "6", "4", "7"])
def test_counting_figures_ask_for_the_same_answers(figure: str, tmp_path: Path) -> None:
    made = stage(numbers(lambda cot, k, truth: truth), tmp_path)
    made.chart(figure)
    assert [(one["cot"], one["task"]) for one in made.asked] == [
        (cot, task) for cot in NEW_TOKENS for task in ("sum", "ones", "bernoulli", "word")
    ]


@pytest.mark.parametrize(
    ("figure", "said"), [("2", "Gemini 1.5"), ("3", "Gemini 1.5"), ("4", "Gemini 1.5"), ("6", "figure 3")]
)
def test_whose_place_the_model_takes_is_said(figure: str, said: str, tmp_path: Path) -> None:
    chart = stage(lambda task, cot, k, truth: "1", tmp_path).chart(figure)
    assert any(said in note for note in chart.notes)
