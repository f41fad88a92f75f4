"""Figures 2, 3, 4, 6, 7 and 11: copying and counting, answered freely and scored by likelihood."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from oversquash_lens.paper.generator import Sampling
from oversquash_lens.paper.prompts import COTS, OURS
from oversquash_lens.paper.published import all_of, grows
from oversquash_lens.paper.reproduce import RunConfig
from oversquash_lens.paper.tasks import NEW_TOKENS, SPIKE, TaskResult, histogram, run_task
from oversquash_lens.viz.chart import Chart, Panel, Series, Verdict

QUICK_TOKENS = 128  # of one answer at most, in a quick run
BIN = 5  # numbers drawn as one bar; the data keeps each
COUNTING = {"sum": "sum", "ones": "count ones", "bernoulli": "count ones, Bernoulli(0.7)", "word": "count a word"}
REASONING = {"none": "no CoT", "zero_shot": "CoT zero-shot", "few_shot": "CoT few-shot"}
COPYING = {
    "copy_first": "first digit of 01…1",
    "copy_last": "last digit of 1…10",
    "copy_last_control": "last digit of 1…11 (control)",
    "copy_last_hint": "last digit, with hint",
    "interleaved_01": "last digit of 01…010",
    "interleaved_10": "last digit of 10…100",
    "type_1": "Type 1, sequence last",
    "type_2": "Type 2, form first",
}
GEMINI = "The paper asked Gemini 1.5; the model under test takes its place."


def figure_2(config: RunConfig) -> Chart:
    """Copying: the first digit against the last, a hint, interleaved digits."""
    groups = {
        "(a) first against last": ("copy_first", "copy_last", "copy_last_control"),
        "(b) a hint": ("copy_last", "copy_last_hint"),
        "(c) interleaved": ("interleaved_01", "interleaved_10"),
    }
    results = _copying(config, "2", [name for group in groups.values() for name in group])
    first, last, control, hint = (
        _right(results[name]) for name in ("copy_first", "copy_last", "copy_last_control", "copy_last_hint")
    )
    both = [_right(results[name]) for name in groups["(c) interleaved"]]
    asked = len(results["copy_last"].lengths)
    verdicts = (
        Verdict(
            "the first digit is copied better than the last",
            f"{first} and {last} right of {asked}; of 1…11, whose answer is not 0, {control}",
            first > last,
        ),
        Verdict("a hint helps", f"{hint} right of {asked} with it, {last} without", hint > last),
        Verdict("interleaved sequences are copied right", f"{sum(both)} right of {2 * asked}", min(both) > asked / 2),
    )
    return _copying_chart(config, "2", "Figure 2: copying", groups, results, verdicts)


def figure_11(config: RunConfig) -> Chart:
    """Copying the last digit under prompt Types 1 and 2."""
    groups = {"prompt Types 1 and 2": ("type_1", "type_2")}
    results = _copying(config, "11", groups["prompt Types 1 and 2"])
    right = {name: _right(result) for name, result in results.items()}
    asked = len(results["type_1"].lengths)
    verdict = Verdict(
        "long sequences are copied wrong under both types",
        ", ".join(f"{COPYING[name]}: {count} right of {asked}" for name, count in right.items()),
        max(right.values()) < asked,
    )
    return _copying_chart(config, "11", "Figure 11: prompt Types 1 and 2", groups, results, (verdict,))


def figure_3(config: RunConfig) -> Chart:
    """Counting: absolute error against length, three ways to reason."""
    return _counting_chart(config, "3", "Figure 3: counting", (GEMINI,))


def figure_6(config: RunConfig) -> Chart:
    """The same on an open model, as the paper does with Gemma 7B; here the same run as figure 3."""
    return _counting_chart(config, "6", "Figure 6: counting, an open model", ("The same answers as figure 3.",))


def figure_4(config: RunConfig) -> Chart:
    """Which numbers are answered: is there a spike at 100?"""
    return _histogram_chart(config, "4", "Figure 4: the numbers answered", (GEMINI,))


def figure_7(config: RunConfig) -> Chart:
    """The same on an open model, from the same answers as figure 4."""
    notes = ("The same answers as figure 4; in the paper's print the two pictures are identical.",)
    return _histogram_chart(config, "7", "Figure 7: the numbers answered, an open model", notes)


def _ask(config: RunConfig, task: str, lengths: Sequence[int], cot: str = "none") -> TaskResult:
    """Answers of one task, kept in the folder as they come; the next figure that asks the same finds them there."""
    options = config.options
    limit = min(NEW_TOKENS[cot], QUICK_TOKENS) if options.quick else NEW_TOKENS[cot]
    sampling = Sampling(options.temperature, options.seed, limit)
    return run_task(
        config.generator,
        task,
        lengths,
        cot=cot,
        samples=options.samples,
        sampling=sampling,
        score=cot == "none",
        out=config.folder / f"answers-{task}-{cot}{'-quick' if options.quick else ''}.parquet",
        progress=options.progress,
    )


def _copying(config: RunConfig, figure: str, names: Sequence[str]) -> dict[str, TaskResult]:
    lengths = config.lengths(figure)
    return {name: _ask(config, name, lengths) for name in dict.fromkeys(names)}


def _right(result: TaskResult) -> int:
    """Lengths at which at least half of the answers, leniently read, are right."""
    return sum(share >= 0.5 for share in result.accuracy("lenient"))


def _copying_chart(
    config: RunConfig,
    name: str,
    title: str,
    groups: Mapping[str, Sequence[str]],
    results: dict[str, TaskResult],
    verdicts: tuple[Verdict, ...],
) -> Chart:
    marks = [_marks_panel(label, [results[task] for task in tasks]) for label, tasks in groups.items()]
    margins = [_margin_panel(label, [results[task] for task in tasks]) for label, tasks in groups.items()]
    return Chart(
        name,
        title,
        (*marks, *margins),
        verdicts,
        config.generator.label,
        setup=(
            "Above: free answers, leniently read (the strict reading wants the asked line to the letter). Below: "
            "log-probability of the right digit less that of the likeliest wrong one, after the line asked for.",
            _how_asked(config),
        ),
        notes=(*_counts(results.values()), GEMINI),
        columns=len(groups),
        data={task: result.to_dict() for task, result in results.items()},
    )


def _marks_panel(title: str, results: Sequence[TaskResult]) -> Panel:
    series = []
    for one in results:
        right = tuple(float(share >= 0.5) for share in one.accuracy())
        series.append(Series(COPYING[one.task], _floats(one.lengths), right, kind="marks"))
    return Panel(title, "length", "", tuple(series))


def _margin_panel(title: str, results: Sequence[TaskResult]) -> Panel:
    series = [Series(COPYING[one.task], _floats(one.lengths), _scored(one, "margin")) for one in results]
    y_label = "margin of the right digit, nats"
    return Panel(f"{title}, likelihood", "length", y_label, tuple(series), reference=(0.0, "even"))


def _counting(config: RunConfig, figure: str) -> dict[tuple[str, str], TaskResult]:
    lengths = config.lengths(figure)
    return {(cot, task): _ask(config, task, lengths, cot) for cot in COTS for task in COUNTING}


def _counting_chart(config: RunConfig, name: str, title: str, notes: tuple[str, ...]) -> Chart:
    results = _counting(config, name)
    panels = [_error_panel(cot, result) for (cot, _), result in results.items()]
    return Chart(
        name,
        title,
        tuple(panels),
        (
            *(_error_verdict(cot, [results[cot, task] for task in COUNTING]) for cot in COTS),
            _likelihood_verdict([results["none", task] for task in COUNTING]),
        ),
        config.generator.label,
        setup=(
            "Absolute error of the answers that can be read, mean and min–max over samples. Likelihood: expected error "
            "when the numbers after the line asked for are weighed by their probability.",
            _how_asked(config),
        ),
        notes=(*notes, *_counts(results.values()), *_examples(results.values())),
        columns=len(COUNTING),
        data={f"{task}, {cot}": result.to_dict() for (cot, task), result in results.items()},
    )


def _error_panel(cot: str, result: TaskResult) -> Panel:
    x = _floats(result.lengths)
    series = [
        Series("read leniently", x, result.error(), result.error_low(), result.error_high()),
        Series("read strictly", x, result.error("strict")),
    ]
    if result.scores is not None:
        series.append(Series("likelihood", x, result.scores.mean("expected_error")))
    return Panel(f"{COUNTING[result.task]}, {REASONING[cot]}", "length", "absolute error", tuple(series))


def _error_verdict(cot: str, results: Sequence[TaskResult]) -> Verdict:
    errors = {COUNTING[one.task]: one.error() for one in results}
    return _growth(f"the error grows with the length, {REASONING[cot]}", results[0].lengths, errors)


def _likelihood_verdict(results: Sequence[TaskResult]) -> Verdict:
    errors = {COUNTING[one.task]: _scored(one, "expected_error") for one in results}
    return _growth("the expected error under the likelihoods grows with the length", results[0].lengths, errors)


def _growth(claim: str, lengths: Sequence[int], errors: dict[str, tuple[float, ...]]) -> Verdict:
    """In every task: one that does not grow refutes it, one that cannot be told leaves it undecided."""
    ends = ", ".join(f"{task} {_size(error[0])} to {_size(error[-1])}" for task, error in errors.items())
    return Verdict(claim, ends, all_of(grows(lengths, error) for error in errors.values()))


def _size(error: float) -> str:
    return "unread" if math.isnan(error) else f"{error:.3g}"


def _histogram_chart(config: RunConfig, name: str, title: str, notes: tuple[str, ...]) -> Chart:
    results = _counting(config, name)
    panels, verdicts = [], []
    for task, label in COUNTING.items():
        plain, thought = results["none", task], [results[cot, task] for cot in COTS[1:]]
        given: dict[str, list[int | None]] = {
            "true answer": [int(answer.truth) for row in plain.answers for answer in row],
            "without CoT": list(plain.given()),
            "with CoT": [answer for one in thought for answer in one.given()],
        }
        panels.append(_bars_panel(label, given))
        verdicts.append(_spike_verdict(label, given["without CoT"]))
    return Chart(
        name,
        title,
        tuple(panels),
        tuple(verdicts),
        config.generator.label,
        setup=(
            f"How often the numbers 0–200 were answered, {BIN} of them to a bar, leniently read.",
            _how_asked(config),
        ),
        notes=(*notes, *_counts(results.values()), *_above(results.values())),
        columns=2,
        data={f"{task}, {cot}": histogram(result.given()).to_dict() for (cot, task), result in results.items()},
    )


def _bars_panel(title: str, given: dict[str, list[int | None]]) -> Panel:
    series = []
    for label, numbers in given.items():
        counts = histogram(numbers).counts
        bins = range(0, len(counts), BIN)
        series.append(Series(label, tuple(bins), tuple(sum(counts[i : i + BIN]) for i in bins), kind="bars"))
    return Panel(title, "number answered", "how often", tuple(series))


def _spike_verdict(label: str, given: Sequence[int | None]) -> Verdict:
    claim = f"{label}: {SPIKE} is the most frequent answer"
    read = Counter(number for number in given if number is not None)
    if not read:
        return Verdict(claim, "no answer could be read", None)
    total, top = read.total(), max(sorted(read), key=read.__getitem__)
    shares = f"{read[SPIKE] / total:.0%} of {total} answers are {SPIKE}; most frequent: {top} ({read[top] / total:.0%})"
    return Verdict(claim, shares, top == SPIKE)


def _how_asked(config: RunConfig) -> str:
    generator, options = config.generator, config.options
    how = "greedy" if options.temperature == 0 else f"sampled at temperature {options.temperature}"
    return (
        f"{how}, {'chat template' if generator.chat else 'plain text, no chat template'}, {options.samples} per length."
    )


def _counts(results: Iterable[TaskResult]) -> tuple[str, ...]:
    """How many answers could not be read, and how many were cut off: shown, never dropped in silence."""
    results = list(results)
    total = sum(len(row) for one in results for row in one.answers)
    strict, lenient = (sum(sum(one.unparsable(how)) for one in results) for how in ("strict", "lenient"))
    cut = sum(sum(one.cut_off) for one in results)
    return (f"Of {total} answers {strict} cannot be read strictly, {lenient} not even leniently; {cut} were cut off.",)


def _above(results: Iterable[TaskResult]) -> tuple[str, ...]:
    """How many answers lie beyond the axis."""
    above = sum(histogram(one.given()).above for one in results)
    return (f"{above} answers are above 200 and not drawn.",) if above else ()


def _examples(results: Iterable[TaskResult]) -> tuple[str, ...]:
    ours = sorted({COUNTING[one.task] for one in results if one.examples == OURS})
    return (f"Few-shot examples of our own, as the paper prints none: {', '.join(ours)}.",) if ours else ()


def _scored(result: TaskResult, measure: str) -> tuple[float, ...]:
    """Per length, of a task that was asked with its likelihoods."""
    assert result.scores is not None
    return result.scores.mean(measure)


def _floats(values: Sequence[int]) -> tuple[float, ...]:
    return tuple(map(float, values))
