"""Remedies: each changes what it says, certainty is a probability, and the verdict is a comparison done by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from small_generators import KINDS, characters, loaded

from oversquash_lens.collapse.curve import CollapseCurve, collapse_curve
from oversquash_lens.errors import InputError
from oversquash_lens.paper import prompts
from oversquash_lens.paper import remedies as recipe
from oversquash_lens.paper.backends import TransformersBackend
from oversquash_lens.paper.generator import Generator
from oversquash_lens.paper.remedies import (
    MODEL_REMEDIES,
    NOTHING,
    PROMPT_REMEDIES,
    WINDOW,
    Remedy,
    RemedyOutcome,
    copying_certainty,
    inner_digits,
    interleaved,
    ones_then,
    remedies,
    try_remedy,
)
from oversquash_lens.paper.reproduce import Options, RunConfig
from oversquash_lens.viz.chart import Chart

HOOKED = KINDS[1:]
BY_NAME = {remedy.name: remedy for remedy in (*PROMPT_REMEDIES, *MODEL_REMEDIES)}
ASKED = f"{prompts.HOW_MANY_ONES} "


def groups_of(text: str, size: int = 3) -> str:
    return ",".join(text[i : i + size] for i in range(0, len(text), size))


# What the two prompts of length k are to say, by remedy.
SEQUENCES: dict[str, Callable[[int], tuple[str, str]]] = {
    NOTHING: lambda k: ("1" * k, "1" * (k + 1)),
    "commas every third": lambda k: (groups_of("1" * k), groups_of("1" * (k + 1))),
    "commas, same place in the group": lambda k: (groups_of("1" * k), groups_of("1" * (k + 3))),
    "spaces": lambda k: (" ".join("1" * k), " ".join("1" * (k + 1))),
    "hint": lambda k: (f"{'1' * k} {prompts.HINT}", f"{'1' * (k + 1)} {prompts.HINT}"),
    "interleaving": lambda k: (("10" * k)[:k], ("10" * k)[: k + 1]),
    "interleaving, same ending": lambda k: (("10" * k)[:k], ("10" * (k + 1))[: k + 2]),
}


# ---------------------------------------------------------------- the table of remedies


def test_every_remedy_stands_once_and_nothing_is_first() -> None:
    names = [remedy.name for remedy in (*PROMPT_REMEDIES, *MODEL_REMEDIES[1:])]
    assert len(names) == len(set(names))
    assert PROMPT_REMEDIES[0] == MODEL_REMEDIES[0] == BY_NAME[NOTHING]
    assert set(SEQUENCES) == {remedy.name for remedy in PROMPT_REMEDIES}
    for word in ("commas", "hint", "interleaving", "precision", "window", "temperature", "dropped", "kept"):
        assert any(word in name for name in names), word


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("k", [1, 2, 3, 11])
def test_the_prompts_say_what_the_remedy_says(name: str, k: int) -> None:
    pair = BY_NAME[name].family(loaded(HOOKED[0]), None).pair(k)
    assert tuple(characters().decode(ids) for ids in pair) == tuple(ASKED + text for text in SEQUENCES[name](k))


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("k", [5, 12, 13])
def test_the_inner_digits_are_all_but_the_ends(name: str, k: int) -> None:
    family = BY_NAME[name].family(loaded(HOOKED[0]), True)
    said = characters().decode(family.pair(k)[0][inner_digits(family, k)])
    assert said == SEQUENCES[name](k)[0].removesuffix(f" {prompts.HINT}")[1:-1]


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("last", ["0", "1"])
@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_the_copying_tasks_digits(name: str, last: str, k: int) -> None:
    spelled = BY_NAME[name].spell(last, k)
    digits = spelled.replace(",", "").replace(" ", "")
    assert len(digits) == k
    assert digits[-1] == last
    if name.startswith("interleaving"):
        assert all(a != b for a, b in pairwise(digits))
    else:
        assert set(digits[:-1]) <= {"1"}
    assert spelled == {"commas": groups_of(digits), "spaces": " ".join(digits)}.get(name.split()[0].rstrip(","), digits)
    assert (ones_then("0", 3), interleaved("1", 4)) == ("110", "0101")


def even(n: int) -> torch.Tensor:
    """Attention shared out evenly: [batch, head, dest, src]."""
    return (torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None])[None, None]


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        (f"sliding window of {WINDOW}", range(8, 40)),
        (f"sliding window of {WINDOW}, first token kept", (0, *range(8, 40))),
        ("first token dropped", range(1, 40)),
    ],
)
def test_the_edits_leave_what_their_names_say(name: str, seen: Sequence[int]) -> None:
    row = BY_NAME[name].edit(even(40))[0, 0, -1]
    assert row.nonzero().flatten().tolist() == list(seen)
    assert torch.allclose(row[list(seen)], torch.tensor(1 / len(seen)))


def test_the_other_model_remedies() -> None:
    assert BY_NAME[NOTHING].edit is None
    uneven = even(8) * torch.arange(1.0, 9.0)
    uneven = uneven / uneven.sum(-1, keepdim=True)
    sharper = BY_NAME["adaptive temperature"].edit(uneven)[0, 0, -1]
    assert sharper[-1] > 1.2 * uneven[0, 0, -1, -1]
    formats = {remedy.name: remedy.dtype for remedy in MODEL_REMEDIES if remedy.edit is None}
    assert list(formats.values()) == ["float32", "bfloat16", "float64"]
    assert all(dtype in name for name, dtype in formats.items() if name != NOTHING)


# ---------------------------------------------------------------- certainty


@pytest.mark.parametrize("kind", HOOKED)
@pytest.mark.parametrize("name", SEQUENCES)
def test_certainty_is_a_softmax_over_the_two_digits(kind: str, name: str) -> None:
    model, remedy = loaded(kind), BY_NAME[name]
    expected = 0.0
    for last, other in ("01", "10"):
        question = prompts.copy_prompt(remedy.spell(last, 7), "last", remedy.hint)
        text = f"[{question}]>{prompts.DIGIT_LINE}"  # as the template of this tokenizer writes it
        ids = characters()(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            likely = model(torch.tensor([ids]))[0, -1].double().softmax(0)
        right, wrong = (likely[characters().convert_tokens_to_ids(digit)].item() for digit in (last, other))
        expected += right / (right + wrong) / 2
    found = copying_certainty(model, remedy, 7)
    assert found == pytest.approx(expected, abs=1e-5)
    assert 0 <= found <= 1


@pytest.mark.parametrize("kind", HOOKED)
def test_who_always_says_the_same_is_half_right(kind: str) -> None:
    """The unembedding reads a constant, whatever came: sure of one digit, and so right at one of the two endings."""
    model = loaded(kind)
    constant = torch.randn(model.cfg.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def deaf(y: torch.Tensor, hook: Any = None) -> torch.Tensor:
        return (9 * constant).to(y).expand_as(y)

    with model.hooks(fwd_hooks=[("unembed.hook_in", deaf)]):
        for remedy in PROMPT_REMEDIES:
            assert copying_certainty(model, remedy, 4) == pytest.approx(0.5, abs=1e-9)
        question = recipe._certainty(model, "1110", "0", False)
    assert abs(question - 0.5) > 0.1


def test_without_a_template_the_line_stands_below_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = loaded(HOOKED[0]), []
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    read = TransformersBackend.read
    monkeypatch.setattr(TransformersBackend, "read", lambda *a: asked.append(a[1]) or read(*a))
    assert 0 <= copying_certainty(model, BY_NAME[NOTHING], 3) <= 1
    texts = [f"{prompts.copy_prompt(digits, 'last', False)}\n{prompts.DIGIT_LINE}" for digits in ("110", "111")]
    assert [model.tokenizer.decode(ids) for ids in asked] == texts


def test_a_tokenizer_that_cannot_tell_digits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generator, "token_ids", lambda self, text: [5] * len(text))
    with pytest.raises(InputError, match="the same token"):
        copying_certainty(loaded(HOOKED[0]), BY_NAME[NOTHING], 3)


# ---------------------------------------------------------------- trying one


@pytest.mark.parametrize("kind", HOOKED)
@pytest.mark.parametrize("name", ["bfloat16 (lower precision)", f"sliding window of {WINDOW}", "first token dropped"])
def test_a_remedy_acts_inside_and_leaves_nothing(
    kind: str, name: str, count_hooks: Callable[[Any], int], tmp_path: Path
) -> None:
    model = loaded(kind)
    config = RunConfig(Options(model, probes=2), tmp_path)
    family = BY_NAME[name].family(model, None)
    plain = try_remedy(config, BY_NAME[NOTHING], family, range(1, 5), (3,))
    hooks, weights = count_hooks(model), {key: value.clone() for key, value in model.state_dict().items()}
    tried = try_remedy(config, BY_NAME[name], family, range(1, 5), (3,))
    again = try_remedy(config, BY_NAME[NOTHING], family, range(1, 5), (3,))
    assert count_hooks(model) == hooks
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) and value.dtype == after[key].dtype for key, value in weights.items())
    assert (again.sensitivity, again.certainty) == (plain.sensitivity, plain.certainty)
    assert (tried.sensitivity, tried.certainty) != (plain.sensitivity, plain.certainty)
    assert tried.sensitivity > 0
    one, other = (outcome.curve.l1[outcome.remedy.dtype] for outcome in (plain, tried))
    assert not torch.allclose(one.double(), other.double(), rtol=1e-6)


# ---------------------------------------------------------------- made-up outcomes


@pytest.fixture(scope="module")
def curve() -> CollapseCurve:
    return collapse_curve(loaded(HOOKED[0]), lambda k: [0, 40] + [7] * k, (11, 101, 501), ("float32",))


def outcome(
    curve: CollapseCurve, name: str, l1: Sequence[float], certainty: Sequence[float] = (0.5, 0.5)
) -> RemedyOutcome:
    made = replace(curve, l1={"float32": torch.tensor(l1)})
    return RemedyOutcome(Remedy(name), made, 1.0, tuple(certainty))


@pytest.mark.parametrize(
    ("l1", "keeps"), [((9.0, 1.0, 9.0), True), ((9.0, 20.0, 8.9), False), ((9.0, 1.0, 30.0), True), ((0.0,) * 3, True)]
)
def test_a_remedy_keeps_what_is_as_large_at_the_end(l1: Sequence[float], keeps: bool, curve: CollapseCurve) -> None:
    assert recipe._keeps(outcome(curve, "some", l1), (11, 101, 501)) is keeps


def test_the_verdicts_flip(curve: CollapseCurve) -> None:
    lengths = (11, 101, 501)
    plain = outcome(curve, NOTHING, (9.0, 3.0, 1.0), (0.9, 0.6))
    bad = outcome(curve, "no help", (9.0, 8.0, 8.0), (0.99, 0.64))
    good = outcome(curve, "help", (1.0, 2.0, 3.0), (0.5, 0.66))
    kept, surer = recipe._verdicts([plain, bad, good], lengths)
    assert (kept.held, surer.held) == (True, True)
    assert kept.number == "help; as it is 9 falls to 1"
    assert surer.number == "help; as it is 0.60"
    kept, surer = recipe._verdicts([plain, bad], lengths)
    assert (kept.held, surer.held) == (False, False)
    assert kept.number.startswith("none;")
    kept, _ = recipe._verdicts([plain, bad, good], (11,))
    assert kept.held is None  # one length has nothing to fall to


def test_the_tables_answers_by_hand(curve: CollapseCurve) -> None:
    plain = outcome(curve, NOTHING, (9.0, 3.0, 1.0))
    table = recipe._table(
        [plain, outcome(curve, "own", (1.0, 2.0, 3.0)), outcome(curve, "both", (5.0, 2.0, 10.0))],
        (11, 101, 501),
        (5, 11),
    )
    assert all(len(row) == len(table.columns) for row in table.rows)
    own, as_it_is = (i for i, column in enumerate(table.columns) if "at least" in column)
    assert "at 501 at least 9," in table.columns[as_it_is]
    assert [(row[0], row[own], row[as_it_is]) for row in table.rows] == [
        (NOTHING, "no", "no"),
        ("own", "yes", "no"),
        ("both", "yes", "yes"),
    ]


# ---------------------------------------------------------------- the figure


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Chart:
    options = Options(loaded(HOOKED[0]), quick=True, longest=11, probes=2)
    return remedies(RunConfig(options, tmp_path_factory.mktemp("remedies")))


def test_every_remedy_is_drawn_beside_nothing(chart: Chart) -> None:
    groups = [PROMPT_REMEDIES, PROMPT_REMEDIES, MODEL_REMEDIES, MODEL_REMEDIES]
    for panel, group in zip(chart.panels, groups, strict=True):
        assert [one.label for one in panel.series] == [remedy.name for remedy in group]
    assert [row[0] for row in chart.tables[0].rows] == list(chart.data) == list(BY_NAME)
    curves, tasks = chart.panels[:2]
    assert {one.x for one in curves.series} == {tuple(map(float, range(1, 12)))}
    assert {one.x for one in tasks.series} == {(5.0, 11.0)}
    assert all(0 <= value <= 1 for panel in (tasks, chart.panels[3]) for one in panel.series for value in one.y)


def test_higher_precision_changes_no_distance(chart: Chart) -> None:
    rows = {one.label: one.y for one in chart.panels[2].series}
    assert rows["float64 (higher precision)"] == pytest.approx(rows[NOTHING], rel=1e-3)
    assert rows["bfloat16 (lower precision)"] != pytest.approx(rows[NOTHING], rel=1e-3)
    relative = {row[0]: float(row[4]) for row in chart.tables[0].rows}
    assert chart.tables[0].columns[4] == "relative distance / epsilon at 11"
    assert relative["bfloat16 (lower precision)"] < relative[NOTHING] < relative["float64 (higher precision)"]


def test_too_short_is_refused_before_the_model_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected at least 11, the shortest of figure remedies, got .* of 5"):
        remedies(RunConfig(Options("no such model", longest=5), tmp_path))
