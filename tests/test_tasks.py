"""The paper's tasks: questions with their right answers, results per length, scores, and runs that are interrupted."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from small_generators import Parrot, PatienceError, generator

from oversquash_lens.errors import InputError
from oversquash_lens.models.loading import load_twin
from oversquash_lens.paper import prompts
from oversquash_lens.paper.generator import Generator, Sampling
from oversquash_lens.paper.prompts import TASKS, Task, questions
from oversquash_lens.paper.scores import MEASURES, Score, TaskScores, score_task
from oversquash_lens.paper.tasks import TaskAnswer, TaskResult, histogram, run_task

COUNTING = ("sum", "ones", "bernoulli", "word")
COPYING = [name for name in TASKS if name not in (*COUNTING, "copy_last_control")]


def count(prompt: str) -> int:
    """The right number of a counting prompt, read out of its text alone."""
    seq = re.search(r"(?:sum|sequence|sentence): '?([^.']*)", prompt)[1]
    return len(re.findall(r"\bcar\b", seq)) if "car" in seq else seq.count("1")


def right(prompt: str) -> str:
    return f"The final answer to your maths question is: {count(prompt)}"


@pytest.mark.parametrize("name", COUNTING)
def test_counting_questions_have_the_right_answer(name: str) -> None:
    for question in questions(name, None, "none", 3):
        assert question.truth == count(question.prompt)
        if name != "bernoulli":
            assert question.truth == question.length
    assert TASKS[name].kind == "number"
    assert TASKS[name].lengths == tuple(range(5, 200, 10))


@pytest.mark.parametrize("name", COPYING)
def test_copying_questions_ask_for_a_zero(name: str) -> None:
    """Every copying sequence of the paper has 0 as its answer; the digits are as many as the length says."""
    for question in questions(name, None, "none", 1):
        digits = max(re.findall(r"[01]+", question.prompt.replace("a 1,", "")), key=len)
        asked_first = "first digit" in question.prompt
        assert question.truth == int(digits[0 if asked_first else -1]) == 0
        pairs = name.startswith("interleaved")
        assert len(digits) == question.length + (question.length % 2 == 0 if pairs else 0)
        if not pairs:
            assert digits.count("0") == 1
    assert TASKS[name].lengths[0] == 100
    assert TASKS[name].lengths[-1] == (1500 if name.startswith("type") else 500)


def test_the_control_differs_in_the_last_digit_alone() -> None:
    for zero, one in zip(
        *(questions(name, None, "none", 1) for name in ("copy_last", "copy_last_control")), strict=True
    ):
        assert one.prompt == zero.prompt.replace("10. ", "11. ")
        assert (zero.truth, one.truth) == (0, 1)


def test_the_prompts_differ_as_the_tasks_do() -> None:
    found = {name: questions(name, [10], "none", 1)[0].prompt for name in TASKS}
    assert len(set(found.values())) == len(found)
    assert found["sum"].startswith(f"Please perform the following sum: {' + '.join('1' * 10)}. ")
    assert found["ones"].startswith("Please count the number of ones in the following sequence: 1111111111. ")
    assert found["copy_last_hint"] == f"{found['copy_last']} {prompts.HINT}"
    assert "0101010101" in found["interleaved_01"]
    assert "1010101010" in found["interleaved_10"]
    assert found["type_1"].endswith("1111111110")


def test_varied_tasks_have_a_new_sequence_for_every_sample_and_always_the_same() -> None:
    for name in ("bernoulli", "word"):
        asked = questions(name, [30, 31], "none", 10)
        assert len({question.prompt for question in asked}) == 20
        assert asked == questions(name, [31, 30], "none", 10)
        assert len({question.key for question in asked}) == 20


def test_chain_of_thought_prompts() -> None:
    zero, few = (questions("ones", [7], cot, 1)[0].prompt for cot in ("zero_shot", "few_shot"))
    direct = questions("ones", [7], "none", 1)[0].prompt
    assert zero == f"{prompts.THINK}\n\n{direct}"
    assert few.startswith(f"{prompts.THINK} Here are a few examples:\n\n")
    assert few.endswith(f"\n\n{direct}")
    assert few.count("We divide the ones into groups of 5.") == 2


def test_separators_are_written_and_not_counted() -> None:
    task = TASKS["copy_last"].separated(",", 3)
    (question,) = questions(task, [7], "none", 1)
    assert "sequence: 111,111,0. " in question.prompt
    assert question.truth == 0
    assert question.task == task.name == "copy_last [',' every 3 from the left]"
    (question,) = questions(TASKS["ones"].separated(" "), [3], "none", 1)
    assert "sequence: 1 1 1. " in question.prompt
    assert question.truth == 3
    with pytest.raises(InputError, match="a sentence has no digits"):
        TASKS["word"].separated(",")


def test_results_of_a_speaker_that_knows() -> None:
    result = run_task(Parrot(right), "bernoulli", [5, 15, 25], samples=4)
    assert result.lengths == (5, 15, 25)
    assert result.accuracy("strict") == result.accuracy() == (1.0, 1.0, 1.0)
    assert result.error("strict") == result.error() == (0.0, 0.0, 0.0)
    assert result.unparsable("strict") == result.unparsable() == result.cut_off == (0, 0, 0)
    assert result.truths == tuple(sum(a.truth for a in row) / 4 for row in result.answers)
    assert result.examples == ""


def test_both_readings_are_reported() -> None:
    """Below 10 the asked line, below 20 loosely and 2 too many, else nothing."""

    def says(prompt: str) -> str:
        n = count(prompt)
        return right(prompt) if n < 10 else f"There are {n + 2} ones, {n + 2} in all" if n < 20 else "who knows"

    result = run_task(Parrot(says), "ones", [5, 15, 25], score=False)
    assert result.accuracy("strict") == (1.0, 0.0, 0.0)
    assert result.accuracy("lenient") == (1.0, 0.0, 0.0)
    assert result.unparsable("strict") == (0, 1, 1)
    assert result.unparsable("lenient") == (0, 0, 1)
    assert result.error("lenient")[:2] == (0.0, 2.0)
    assert math.isnan(result.error("lenient")[2])
    assert [math.isnan(each) for each in result.error("strict")] == [False, True, True]
    assert result.given() == (5, 17, None)
    assert result.scores is None
    with pytest.raises(InputError, match="expected 'strict' or 'lenient'"):
        result.accuracy("kindly")


@given(st.lists(st.lists(st.one_of(st.none(), st.integers(0, 300)), min_size=1, max_size=6), min_size=1, max_size=5))
def test_numbers_per_length_against_plain_loops(given_: list[list[int | None]]) -> None:
    rows = tuple(
        tuple(TaskAnswer(length, i, 100, "", 1, i % 2 == 0, None, number) for i, number in enumerate(row))
        for length, row in enumerate(given_)
    )
    result = TaskResult("ones", "number", "none", "", {}, tuple(range(len(rows))), rows, None)
    for place, row in enumerate(given_):
        known = [abs(number - 100) for number in row if number is not None]
        assert result.accuracy()[place] == row.count(100) / len(row)
        assert result.unparsable()[place] == row.count(None)
        assert result.unparsable("strict")[place] == len(row)
        assert result.cut_off[place] == len(row) // 2
        assert result.errors()[place] == tuple(known)
        if known:
            assert result.error()[place] == pytest.approx(sum(known) / len(known))
            assert (result.error_low()[place], result.error_high()[place]) == (min(known), max(known))
        else:
            assert math.isnan(result.error()[place])
    json.dumps(result.to_dict(), allow_nan=False)


@given(st.lists(st.one_of(st.none(), st.integers(0, 400))), st.integers(0, 300))
def test_histograms(answers: list[int | None], highest: int) -> None:
    found = histogram(answers, highest)
    assert len(found.counts) == highest + 1
    for number, times in enumerate(found.counts):
        assert times == answers.count(number)
    assert found.above == sum(answer is not None and answer > highest for answer in answers)
    assert found.unparsable == answers.count(None)
    assert found.parsed + found.unparsable == len(answers)
    if highest >= 100 and found.parsed:
        assert found.share() == found.to_dict()["share_at_100"] == answers.count(100) / found.parsed
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_greedy_model_is_asked_the_same_only_once() -> None:
    parrot = Parrot(right)
    result = run_task(parrot, "ones", [5, 15], samples=4, score=False)
    assert [len(row) for row in result.answers] == [1, 1]
    warm = run_task(parrot, "ones", [5, 15], samples=4, sampling=Sampling(temperature=1.0))
    assert [len(row) for row in warm.answers] == [4, 4]
    assert len(parrot.asked) == 2 + 8
    assert len(parrot.scored) == 2  # a likelihood has no draws


def test_room_for_reasoning() -> None:
    for cot, tokens in (("none", 64), ("zero_shot", 512), ("few_shot", 512)):
        assert run_task(Parrot(right), "ones", [5], cot=cot, score=False).settings["max_new_tokens"] == tokens
    assert run_task(Parrot(right), "ones", [5], cot="few_shot").examples == "ours"
    assert run_task(Parrot(right), "sum", [5], cot="few_shot").examples == "printed"


def parrot_scores(task: str, lengths: list[int]) -> TaskScores:
    return score_task(Parrot(right), task, lengths)


def test_scores_of_made_up_likelihoods() -> None:
    """Candidate c has probability 1 / (c + 3), the line ½: a copy of every measure by plain arithmetic."""
    found = parrot_scores("ones", [5, 150])
    weights = [2 / (c + 3) for c in range(301)]  # given the line
    assert {len(score.log_probabilities) for row in found.scores for score in row} == {301}
    for place, truth in enumerate((5, 150)):
        assert found.mean("probability")[place] == pytest.approx(weights[truth] / sum(weights), rel=1e-4)
        assert found.mean("mass")[place] == pytest.approx(sum(weights), rel=1e-4)
        assert found.mean("margin")[place] == pytest.approx(math.log(weights[truth] / weights[0]), abs=1e-5)
        assert found.mean("rank")[place] == truth + 1
        assert found.mean("best")[place] == 0
        assert found.mean("zero_against_one")[place] == pytest.approx(math.log(4 / 3), abs=1e-5)
        assert found.mean("log_line")[place] == pytest.approx(math.log(0.5), abs=1e-5)
        error = sum(weight * abs(c - truth) for c, weight in enumerate(weights)) / sum(weights)
        assert found.mean("expected_error")[place] == pytest.approx(error, rel=1e-4)
    json.dumps(found.to_dict(), allow_nan=False)


@given(st.lists(st.floats(-700, 0), min_size=2, max_size=30), st.data())
def test_scores_keep_their_promises(logs: list[float], data: st.DataObject) -> None:
    truth = data.draw(st.integers(0, len(logs) - 1))
    score = Score(truth, tuple(logs), -1.0)
    assert sum(score.shares) == pytest.approx(1)
    assert 1 <= score.rank <= len(logs)
    assert (score.margin > 0) == (score.rank == 1 and logs.count(max(logs)) == 1)
    assert logs[score.best] == max(logs)
    assert 0 <= score.expected_error <= len(logs) - 1
    shares = torch.tensor(logs, dtype=torch.float64).softmax(0)
    assert score.probability == pytest.approx(shares[truth].item(), abs=1e-12)


def test_digits_are_scored_against_all_ten() -> None:
    found = parrot_scores("copy_last", [10, 20])
    assert {len(score.log_probabilities) for row in found.scores for score in row} == {10}
    assert found.mean("rank") == (1.0, 1.0)
    assert found.mean("margin") == pytest.approx((math.log(4 / 3),) * 2, abs=1e-5)


def test_the_highest_number_can_be_chosen() -> None:
    found = score_task(Parrot(right), "ones", [5], highest=9)
    assert len(found.scores[0][0].log_probabilities) == 10
    with pytest.raises(InputError, match="expected at least 5, the largest right answer, got highest=4"):
        score_task(Parrot(right), "ones", [5], highest=4)
    with pytest.raises(InputError, match="expected one of probability, margin"):
        found.mean("luck")


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: run_task(Parrot(right), "tidy up"), "expected one of sum, ones, .* got task 'tidy up'"),
        (lambda: run_task(Parrot(right), "ones", cot="some"), "cot='some'"),
        (lambda: run_task(Parrot(right), "ones", []), r"got lengths \(\)"),
        (lambda: run_task(Parrot(right), "ones", [5, 5]), r"expected whole numbers, each once, got lengths \(5, 5\)"),
        (lambda: run_task(Parrot(right), "ones", [0]), "got a length of 0"),
        (lambda: run_task(Parrot(right), "bernoulli", [5], samples=0), "samples=0"),
    ],
)
def test_what_cannot_be_is_refused(ask: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ask()


def test_a_result_says_itself_in_a_few_lines_and_as_a_table() -> None:
    result = run_task(Parrot(right), "ones", range(1, 31))
    assert len(repr(result).splitlines()) <= 13
    assert repr(result).startswith("ones, chain of thought none: answers per length, leniently read (model parrot")
    frame = result.to_frame()
    assert list(frame["length"]) == list(range(1, 31))
    assert list(frame["rank"]) == list(result.scores.mean("rank"))
    assert "rank" not in run_task(Parrot(right), "ones", [3], score=False).to_frame()


def test_a_task_of_ones_own() -> None:
    mine = Task(
        name="threes",
        kind="number",
        draw=lambda length, seed: "3" * length,
        prompt=lambda seq: f"How many threes? {seq}",
        truth=len,
        examples=prompts.EXAMPLES["ones"],
        lengths=(2, 4),
    )
    result = run_task(Parrot(lambda prompt: str(prompt.count("3"))), mine)
    assert (result.task, result.lengths, result.accuracy()) == ("threes", (2, 4), (1.0, 1.0))


# Interrupted runs. Lengths and batches are such that batches mix lengths.
LENGTHS, SAMPLES = [5, 9, 2, 14, 7], 2


def whole_run(path: Path) -> TaskResult:
    return run_task(Parrot(right), "bernoulli", LENGTHS, samples=SAMPLES, out=path)


@pytest.mark.parametrize("patience", range(0, 10))
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, patience: int) -> None:
    whole = whole_run(tmp_path / "whole")
    path, tired = tmp_path / "run", Parrot(right, patience=patience)
    with pytest.raises(PatienceError):
        run_task(tired, "bernoulli", LENGTHS, samples=SAMPLES, out=path)
    fresh = Parrot(right)
    assert run_task(fresh, "bernoulli", LENGTHS, samples=SAMPLES, out=path) == whole
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    assert len(tired.asked) + len(fresh.asked) == len(LENGTHS) * SAMPLES  # nothing was asked twice


def test_a_finished_run_asks_nothing(tmp_path: Path) -> None:
    whole = whole_run(tmp_path / "run")
    idle = Parrot(right, patience=0)
    assert run_task(idle, "bernoulli", LENGTHS, samples=SAMPLES, out=tmp_path / "run") == whole
    assert idle.asked == idle.scored == []


def test_more_lengths_later_ask_for_these_alone(tmp_path: Path) -> None:
    run_task(Parrot(right), "ones", [5, 15], out=tmp_path / "run", score=False)
    more = Parrot(right, batch_size=1)
    result = run_task(more, "ones", [5, 15, 25], out=tmp_path / "run", score=False)
    assert [count(prompt) for prompt in more.asked] == [25]
    assert result.accuracy() == (1.0, 1.0, 1.0)


def test_tasks_share_a_file_and_settings_do_not(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = run_task(Parrot(right), "ones", [5], out=path)
    run_task(Parrot(right), "sum", [5], out=path)
    run_task(Parrot(right), TASKS["ones"].separated(","), [5], out=path)
    assert run_task(Parrot(right, patience=0), "ones", [5], out=path) == first
    with pytest.raises(InputError, match=r"temperature: 0\.0 there, 1\.0 now"):
        run_task(Parrot(right), "ones", [5], sampling=Sampling(temperature=1.0), out=path)
    stranger = Parrot(right)
    stranger.settings = {"model": "magpie", "chat": False}
    with pytest.raises(InputError, match="model: 'parrot' there, 'magpie' now"):
        run_task(stranger, "ones", [5], out=path)
    with pytest.raises(InputError, match="what: nothing there, 'scores' now"):
        score_task(Parrot(right), "ones", [5], out=path)


def test_scores_alone_resume_too(tmp_path: Path) -> None:
    first = score_task(Parrot(right), "ones", [5, 7], out=tmp_path / "scores")
    idle = Parrot(right)
    assert score_task(idle, "ones", [7, 5], out=tmp_path / "scores") == first
    assert idle.scored == []


KILLED = """
    import os, signal, sys
    from small_generators import generator
    from oversquash_lens.paper.generator import Sampling
    from oversquash_lens.paper.tasks import run_task
    who, asked = generator(batch_size=2), 0
    completions = who.completions
    def mortal(*arguments, **options):
        global asked
        asked += 1
        if asked == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return completions(*arguments, **options)
    who.completions = mortal
    run_task(who, "bernoulli", [5, 9, 2, 14, 7], samples=2, sampling=Sampling(1.2, 3, 12), out=sys.argv[1])
"""


def test_a_killed_run_of_a_tiny_model_ends_with_the_same_file(tmp_path: Path) -> None:
    """Killed in its third batch of five."""
    who, warm = generator(batch_size=2), Sampling(1.2, 3, 12)
    whole = run_task(who, "bernoulli", LENGTHS, samples=SAMPLES, sampling=warm, out=tmp_path / "whole")
    path = tmp_path / "run"
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    parts = list(Path(f"{path}.parts").glob("*.parquet"))
    assert sum(parquet.read_metadata(part).num_rows for part in parts) == 4
    assert run_task(who, "bernoulli", LENGTHS, samples=SAMPLES, sampling=warm, out=path) == whole
    resumed, uninterrupted = (parquet.read_table(file).to_pylist() for file in (path, tmp_path / "whole"))
    assert sorted(map(str, resumed)) == sorted(map(str, uninterrupted))
    assert len({answer.text for row in whole.answers for answer in row}) > 5


def test_progress_counts_replies(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    whole_run(tmp_path / "run")
    assert capsys.readouterr().err == ""
    run_task(Parrot(right), "bernoulli", LENGTHS, samples=SAMPLES, out=tmp_path / "run", progress=True)
    assert "10/10" in capsys.readouterr().err


def test_smollm2_counts_and_copies_to_the_end(tmp_path: Path) -> None:
    """The real model on short sequences: every number is there, and the file gives the same result again."""
    who = Generator(load_twin(device="cpu"))
    sampling = Sampling(max_new_tokens=8)
    for task, lengths in (("ones", [3]), ("copy_last", [4, 6])):
        result = run_task(who, task, lengths, sampling=sampling, out=tmp_path / "run")
        assert result.settings["model"].startswith("SmolLM2-135M-Instruct")
        assert result == run_task(who, task, lengths, sampling=sampling, out=tmp_path / "run")
        for measure in MEASURES:
            assert all(math.isfinite(value) for value in result.scores.mean(measure))
        assert all(0 < value <= 1 for value in result.scores.mean("mass"))
        assert all(value < 0 for value in result.scores.mean("log_line"))
        json.dumps(result.to_dict(), allow_nan=False)
