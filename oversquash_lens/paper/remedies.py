"""What helps: remedies of the paper and of the works that cite it, before and after, on one page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oversquash_lens as osl
from oversquash_lens.capture.edits import Edit
from oversquash_lens.collapse import families
from oversquash_lens.collapse.curve import CollapseCurve, collapse_curve
from oversquash_lens.collapse.families import Family
from oversquash_lens.collapse.precision import computing_in, number_format
from oversquash_lens.errors import InputError
from oversquash_lens.paper import prompts
from oversquash_lens.paper.generator import Generator, common_beginning
from oversquash_lens.paper.reproduce import RunConfig
from oversquash_lens.viz.chart import Chart, Panel, Series, Table, Verdict
from oversquash_lens.viz.result_charts import curve_numbers

TASK_LENGTHS, QUICK_TASKS = (5, 11, 26, 51, 101, 251, 501), (5, 11, 51)
WINDOW = 32
PROBED_AT = 51  # ones in the prompt whose measured sensitivity is compared

MakeFamily = Callable[[Any, bool | None], Family]


def ones_then(last: str, k: int) -> str:
    """The copying task of figure 2: k − 1 ones, then the digit that is asked for."""
    return "1" * (k - 1) + last


def interleaved(last: str, k: int) -> str:
    """k digits, ones and zeros in turn, such that the last is as asked."""
    return "".join(last if i % 2 == 0 else _other(last) for i in reversed(range(k)))


@dataclass(frozen=True)
class Remedy:
    """What is done: to the prompt (`family`, `spell`, `hint`), to the number format, or to the attention (`edit`)."""

    name: str
    family: MakeFamily = lambda model, bos: families.counting(model, bos=bos)
    spell: Callable[[str, int], str] = ones_then
    hint: bool = False
    dtype: str = "float32"
    edit: Edit | None = None


def _commas(model: Any, bos: bool | None) -> Family:
    return families.separated(model, question=prompts.HOW_MANY_ONES, bos=bos)


def _hinted(model: Any, bos: bool | None) -> Family:
    return families.followed_by(model, families.counting(model, bos=bos), f" {prompts.HINT}")


NOTHING = "as it is"
PROMPT_REMEDIES = (
    Remedy(NOTHING),
    Remedy("commas every third", _commas, lambda last, k: _grouped(ones_then(last, k))),
    Remedy(
        "commas, same place in the group",
        lambda model, bos: families.separated(model, question=prompts.HOW_MANY_ONES, step=3, bos=bos),
        lambda last, k: _grouped(ones_then(last, k)),
    ),
    Remedy(
        "spaces",
        lambda model, bos: families.counting(model, spaced=True, bos=bos),
        lambda last, k: " ".join(ones_then(last, k)),
    ),
    Remedy("hint", _hinted, hint=True),
    Remedy("interleaving", lambda model, bos: families.alternating(model, bos=bos), interleaved),
    Remedy("interleaving, same ending", lambda model, bos: families.alternating(model, step=2, bos=bos), interleaved),
)
MODEL_REMEDIES = (
    Remedy(NOTHING),
    Remedy("bfloat16 (lower precision)", dtype="bfloat16"),
    Remedy("float64 (higher precision)", dtype="float64"),
    Remedy(f"sliding window of {WINDOW}", edit=osl.edits.window(WINDOW)),
    Remedy(f"sliding window of {WINDOW}, first token kept", edit=osl.edits.window(WINDOW, keep_first=True)),
    Remedy("first token dropped", edit=osl.edits.without_first()),
    Remedy("adaptive temperature", edit=osl.edits.adaptive_temperature()),
)


@dataclass(frozen=True)
class RemedyOutcome:
    """One remedy's curve, the mean sensitivity to the sequence's tokens, and how sure the right digit is."""

    remedy: Remedy
    curve: CollapseCurve
    sensitivity: float
    certainty: tuple[float, ...]


def remedies(config: RunConfig) -> Chart:
    """Collapse distance, measured sensitivity and the copying task under every remedy."""
    wanted = config.lengths("remedies")
    everything = (*PROMPT_REMEDIES, *MODEL_REMEDIES[1:])
    made = [remedy.family(config.model, config.options.bos) for remedy in everything]
    lengths, left_out = config.readable(wanted, *made)
    tasks = tuple(k for k in (QUICK_TASKS if config.options.quick else TASK_LENGTHS) if k <= lengths[-1])
    done: dict[str, RemedyOutcome] = {}
    for remedy, family in zip(everything, made, strict=True):
        done[remedy.name] = try_remedy(config, remedy, family, range(1, lengths[-1] + 1), tasks)
    panels = []
    for title, group in (("the prompt", PROMPT_REMEDIES), ("the model", MODEL_REMEDIES)):
        outcomes = [done[remedy.name] for remedy in group]
        panels += [_curves(title, outcomes), _tasks(title, outcomes, tasks)]
    return Chart(
        "remedies",
        "Remedies, before and after",
        tuple(panels),
        _verdicts(list(done.values()), lengths),
        config.label,
        setup=_setup(),
        notes=left_out,
        tables=(_table(list(done.values()), lengths, tasks),),
        columns=2,
        data={name: curve_numbers(outcome.curve) for name, outcome in done.items()},
    )


def try_remedy(
    config: RunConfig, remedy: Remedy, family: Family, lengths: range, tasks: tuple[int, ...]
) -> RemedyOutcome:
    """What a remedy makes of its family's curve, of the sensitivity to the digits, and of the copying task."""
    model, options = config.model, config.options
    probed_at = min(PROBED_AT, lengths[-1])
    with osl.edited_attention(model, remedy.edit):
        curve = collapse_curve(model, family, lengths, (remedy.dtype,), progress=options.progress)
        with computing_in(model, number_format(remedy.dtype)):
            certainty = tuple(copying_certainty(model, remedy, k) for k in tasks)
            prompt = list(family.pair(probed_at)[0])
            measured = osl.measured_sensitivity(model, prompt, probes=options.probes, seed=options.seed)
    return RemedyOutcome(remedy, curve, measured.values[inner_digits(family, probed_at)].mean().item(), certainty)


def inner_digits(family: Family, k: int) -> slice:
    """Where the first prompt of length k > 1 has its digits and separators, without the first digit and the last.

    They stand between what it shares with the shortest prompt, question and first digit, and the text behind.
    """
    shortest, prompt = family.pair(1)[0], family.pair(k)[0]
    begin = common_beginning(shortest, prompt)
    behind = len(shortest) - begin
    return slice(begin, len(prompt) - behind - 1)


def copying_certainty(model: Any, remedy: Remedy, k: int) -> float:
    """How sure the model is of the last of k digits: p(right)/(p(right) + p(wrong)), 0 against 1; in [0, 1].

    The mean over both endings, so that a model which always says the same has ½. Read behind the beginning of the
    line asked for, after the chat template where the tokenizer has one, else on a line of its own.
    """
    return sum(_certainty(model, remedy.spell(last, k), last, remedy.hint) for last in "01") / 2


def _certainty(model: Any, digits: str, last: str, hint: bool) -> float:
    generator = Generator(model)
    question = prompts.copy_prompt(digits, "last", hint)
    right, wrong = (prompts.DIGIT_LINE + digit for digit in (last, _other(last)))
    asked = generator.render(question)
    if generator.token_ids(asked + right) == generator.token_ids(asked + wrong):
        raise InputError(
            f"the tokenizer of {generator.label} writes 0 and 1 as the same token; expected one that tells digits apart"
        )
    return generator.log_likelihoods(question, [right, wrong]).softmax(0)[0].item()


def _other(digit: str) -> str:
    return "1" if digit == "0" else "0"


def _grouped(digits: str) -> str:
    return ",".join(digits[i : i + 3] for i in range(0, len(digits), 3))


def _at(outcome: RemedyOutcome, k: int) -> float:
    curve = outcome.curve
    return curve.l1[outcome.remedy.dtype][curve.lengths.index(k)].item()


def _keeps(outcome: RemedyOutcome, lengths: tuple[int, ...]) -> bool:
    """Whether the prompts stay as far apart at the longest length as they are at the shortest asked."""
    return _at(outcome, lengths[-1]) >= _at(outcome, lengths[0])


def _curves(title: str, outcomes: list[RemedyOutcome]) -> Panel:
    series = [
        Series(o.remedy.name, tuple(map(float, o.curve.lengths)), tuple(o.curve.l1[o.remedy.dtype].tolist()))
        for o in outcomes
    ]
    return Panel(f"remedies in {title}: collapse", "length", "change of y, L1", tuple(series), "log", "log")


def _tasks(title: str, outcomes: list[RemedyOutcome], tasks: tuple[int, ...]) -> Panel:
    x = tuple(map(float, tasks))
    return Panel(
        f"remedies in {title}: copying the last digit",
        "length",
        "certainty of the right digit",
        tuple(Series(o.remedy.name, x, o.certainty) for o in outcomes),
        x_axis="log",
        reference=(0.5, "guessing"),
    )


def _table(outcomes: list[RemedyOutcome], lengths: tuple[int, ...], tasks: tuple[int, ...]) -> Table:
    columns = (
        "remedy",
        *(f"L1 at {k}" for k in lengths),
        f"at {lengths[-1]} at least its own at {lengths[0]}",
        f"at {lengths[-1]} at least {_at(outcomes[0], lengths[0]):.3g}, that as it is at {lengths[0]}",
        f"relative distance / epsilon at {lengths[-1]}",
        f"mean sensitivity to the digits at {min(PROBED_AT, lengths[-1])}",
        *(f"certainty at {k}" for k in tasks),
    )
    rows = []
    for o in outcomes:
        relative = o.curve.relative[o.remedy.dtype][-1].item() / number_format(o.remedy.dtype).epsilon
        numbers = (
            *(_at(o, k) for k in lengths),
            "yes" if _keeps(o, lengths) else "no",
            "yes" if _at(o, lengths[-1]) >= _at(outcomes[0], lengths[0]) else "no",
            relative,
            o.sensitivity,
            *o.certainty,
        )
        rows.append((o.remedy.name, *(f"{n:.3g}" if isinstance(n, float) else n for n in numbers)))
    return Table("before and after", columns, tuple(rows))


def _verdicts(outcomes: list[RemedyOutcome], lengths: tuple[int, ...]) -> tuple[Verdict, ...]:
    keep = [o.remedy.name for o in outcomes if _keeps(o, lengths)]
    baseline = outcomes[0]
    better = [o.remedy.name for o in outcomes[1:] if o.certainty[-1] > baseline.certainty[-1] + 0.05]
    return (
        Verdict(
            f"some remedy keeps L1 at {lengths[-1]} above its own value at {lengths[0]}",
            f"{', '.join(keep) or 'none'}; as it is {_at(baseline, lengths[0]):.3g} falls to "
            f"{_at(baseline, lengths[-1]):.3g}",
            bool(keep) if len(lengths) > 1 else None,
        ),
        Verdict(
            "some remedy makes the right digit surer where the sequence is longest",
            f"{', '.join(better) or 'none'}; as it is {baseline.certainty[-1]:.2f}",
            bool(better),
        ),
    )


def _setup() -> tuple[str, ...]:
    return (
        f"L1 of y between k and k + 1 ones after {prompts.HOW_MANY_ONES!r} (interleaving: digits; same place: k + 3; "
        "same ending: k + 2).",
        "Copying: the last of k digits, 0 against 1, both endings; prompt of figure 2.",
        "The edits act on every layer's attention; weights that are cut away are shared out over the rest of the row.",
        "Float64 changes no distance, only what rounding leaves of it: see the column relative distance / epsilon.",
    )
