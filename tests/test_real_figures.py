"""SmolLM2-135M-Instruct: its collapse as docs/theory.md, section 6, has it, and every recipe of a model, short."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

import oversquash_lens as osl
from oversquash_lens.collapse import families
from oversquash_lens.paper.remedies import MODEL_REMEDIES, PROMPT_REMEDIES, inner_digits
from oversquash_lens.paper.reproduce import Reproduced
from oversquash_lens.paper.sensitivity_figures import ANSWER, FACT, FILLERS, OPENING, QUESTION, planted
from oversquash_lens.viz.chart import Panel, Series

NAME = "SmolLM2-135M-Instruct (Q4_1)"
LONGEST = 11
OF_PROMPTS, OF_MODELS = PROMPT_REMEDIES[:2], (MODEL_REMEDIES[0], *MODEL_REMEDIES[2:4])  # commas; float64, a window


@pytest.fixture(scope="module")
def made(smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reproduced]:
    folder = tmp_path_factory.mktemp("figures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oversquash_lens.paper.remedies.PROMPT_REMEDIES", OF_PROMPTS)
        patch.setattr("oversquash_lens.paper.remedies.MODEL_REMEDIES", OF_MODELS)
        patch.setattr("oversquash_lens.paper.sensitivity_figures.QUICK_FILLED", 2)
        patch.setattr("oversquash_lens.paper.sensitivity_figures.QUICK_PLACES", 3)
        patch.setattr("oversquash_lens.paper.sensitivity_figures.QUICK_WIDTHS", (4, None))
        found = osl.reproduce(
            ["1", "5", "12", "ushape", "window", "remedies"], smollm2, folder, quick=True, longest=LONGEST, probes=2
        )
    assert (folder / "index.html").stat().st_size > 100_000  # the pictures are in it
    return {one.name: one for one in found}


def line(panel: Panel, label: str) -> Series:
    (found,) = (one for one in panel.series if one.label == label)
    return found


def test_every_figure_is_there_and_names_the_model(made: dict[str, Reproduced]) -> None:
    for name, one in made.items():
        assert one.chart.model == NAME
        assert json.loads(one.files["json"].read_text("utf-8"))["name"] == name
        assert all(path.stat().st_size > 500 for path in one.files.values())
        for panel in one.chart.panels:
            assert all(math.isfinite(y) for series in panel.series if series.kind == "line" for y in series.y)


def test_figure_5_starts_where_it_was_measured(made: dict[str, Reproduced]) -> None:
    """L1 of y: 296 at 1 one, 98 at 11; copying with commas 308 at 1, k against k + 3 about 94 at 9."""
    count, _, _, commas = made["5"].chart.panels[4:]
    ones = line(count, "float32").y
    assert ones[0] == pytest.approx(296, rel=0.01)
    assert ones[10] == pytest.approx(98, rel=0.01)
    assert line(commas, "float32").y[0] == pytest.approx(308, rel=0.01)
    coarse = line(count, "bfloat16").y
    assert coarse == pytest.approx(ones, rel=0.2)
    assert coarse != pytest.approx(ones, rel=1e-4)
    top = line(made["5"].chart.panels[0], "float32")
    assert (top.x, len(top.low), len(top.high)) == ((1, 2, 6, 11), 4, 4)
    assert all(low < y < high for low, y, high in zip(top.low, top.y, top.high, strict=True))


def test_figure_1_merges_layer_by_layer(made: dict[str, Reproduced]) -> None:
    assert all(len(one.y) == 31 for one in made["1"].chart.panels[0].series)
    assert [verdict.held for verdict in made["1"].chart.verdicts] == [True, True]


def test_a_window_of_four_collapses_sooner(made: dict[str, Reproduced]) -> None:
    collapse, _, heard, _ = made["window"].chart.panels
    assert line(collapse, "window of 4").y[:3] != pytest.approx(line(collapse, "whole prompt").y[:3], rel=1e-3)
    assert len(line(heard, "whole prompt").y) == 9 + 1 + LONGEST  # the question, " ", the ones


def test_the_remedies_table(made: dict[str, Reproduced]) -> None:
    (table,) = made["remedies"].chart.tables
    at_11 = {row[0]: float(row[1]) for row in table.rows}
    assert set(at_11) == {remedy.name for remedy in (*OF_PROMPTS, *OF_MODELS)}
    assert at_11["as it is"] == pytest.approx(98, rel=0.01)
    assert at_11["float64 (higher precision)"] == pytest.approx(at_11["as it is"], rel=0.01)
    assert at_11["commas every third"] > 2 * at_11["as it is"]
    for panel in made["remedies"].chart.panels[1::2]:
        assert all(0 <= y <= 1 for series in panel.series for y in series.y)


def test_the_estimate_is_near_the_measured_sensitivity_of_the_fact(made: dict[str, Reproduced]) -> None:
    measured, estimated = made["ushape"].chart.panels[0].series
    for truth, estimate in zip(measured.y, estimated.y, strict=True):
        assert abs(math.log10(estimate / truth)) < 0.5


@pytest.mark.parametrize("before", [0, 1, 5])
def test_the_planted_fact_on_a_real_tokenizer(before: int, smollm2: Any) -> None:
    prompt = planted(smollm2, 5, before)
    text = "".join([OPENING, *FILLERS[:before], FACT, *FILLERS[before:5], QUESTION])
    assert prompt.ids == tuple(smollm2.tokenizer(text)["input_ids"])
    assert smollm2.tokenizer.decode(prompt.ids[prompt.fact]) == FACT
    assert smollm2.tokenizer.decode(prompt.answer) == ANSWER


@pytest.mark.parametrize("name", ["commas every third", "hint"])
def test_inner_digits_on_a_real_tokenizer(name: str, smollm2: Any) -> None:
    (remedy,) = (remedy for remedy in PROMPT_REMEDIES if remedy.name == name)
    family = remedy.family(smollm2, None)
    said = smollm2.tokenizer.decode(family.pair(9)[0][inner_digits(family, 9)])
    assert len([digit for digit in said if digit in "01"]) == 7
    assert set(said) <= set("01, ")


def test_the_question_costs_what_the_families_say(smollm2: Any) -> None:
    first, second = families.counting(smollm2).pair(LONGEST)
    assert len(second) == len(first) + 1 == 9 + 1 + LONGEST + 1
