"""Every family on every class: recorded or refused as declared, and what is computed holds against the truth."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.metadata import version
from typing import Any

import pytest
import torch
from cells import Cell, judge
from compatibility import CLASSES, COLUMNS, ROOT, TITLES, between_markers, compact_table, full_page
from small_models import tokens_for
from zoo import CELLS, FAMILIES, lacking, transformers_model, zoo

import oversquash_lens as osl
from oversquash_lens.errors import ModelError

BRIDGES = [name for name, family in FAMILIES.items() if family.bridge is not None]
COMPATIBLE = [name for name, family in FAMILIES.items() if family.compatible]
FOLDED = [name for name, family in FAMILIES.items() if family.process]


def made(name: str, kind: str) -> Any:
    """A new model of the cell; skips the test where the installed versions cannot make it."""
    why = lacking(name, kind)
    if why is not None:
        pytest.skip(why)
    return zoo(name, kind)


@cache
def judged(name: str, kind: str) -> Cell:
    return judge(name, kind)


# ---------------------------------------------------------------- the animals are what they are said to be


@pytest.mark.parametrize("name", BRIDGES)
def test_a_bridge_computes_what_transformers_computes(name: str) -> None:
    bridge, tokens = made(name, "bridge"), tokens_for(4, 12)
    with torch.no_grad():
        expected = transformers_model(name)(tokens).logits  # a second one: bridging rewires the first
        assert torch.allclose(bridge(tokens), expected, atol=1e-5)


@pytest.mark.parametrize("name", COMPATIBLE)
def test_compatibility_mode_changes_no_probability(name: str) -> None:
    plain, folded, tokens = made(name, "bridge"), made(name, "compatible"), tokens_for(4, 12)
    with torch.no_grad():
        assert torch.allclose(plain(tokens).log_softmax(-1), folded(tokens).log_softmax(-1), atol=1e-5)


@pytest.mark.parametrize("name", FOLDED)
def test_folding_changes_no_probability(name: str) -> None:
    plain, folded, tokens = made(name.removesuffix("-folded"), "hooked"), made(name, "hooked"), tokens_for(4, 12)
    with torch.no_grad():
        assert torch.allclose(plain(tokens).log_softmax(-1), folded(tokens).log_softmax(-1), atol=1e-9)


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_every_weight_is_drawn_and_activations_stay_near_one(name: str, kind: str, watch: Any) -> None:
    model, tokens = made(name, kind), tokens_for(4, 12)
    if kind == "hooked" and not FAMILIES[name].process:
        assert all((parameter != 0).all() for parameter in model.parameters())
    elif kind == "bridge":
        assert all((parameter != 0).all() for parameter in transformers_model(name).parameters())
    seen = watch(model, tokens, "blocks.1.hook_resid_post", "blocks.0.attn.hook_pattern")
    assert 0.3 < seen["blocks.1.hook_resid_post"].square().mean().sqrt() < 30
    rows = seen["blocks.0.attn.hook_pattern"][0, :, -1]
    rows = rows / rows.sum(-1, keepdim=True)
    assert (rows.amax(-1) > 1.2 / (rows > 0).sum(-1)).all()  # uneven in every head


# ---------------------------------------------------------------- every cell of the compatibility table


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_a_family_is_recorded_or_refused_as_declared_and_its_facts_hold(name: str, kind: str) -> None:
    why = lacking(name, kind)
    if why is not None:
        pytest.skip(why)
    assert judged(name, kind).faults == ()


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_the_published_table_says_what_a_run_finds(name: str, kind: str) -> None:
    why = lacking(name, kind)
    if why is not None:
        pytest.skip(why)
    found = {measure: verdict.state for measure, verdict in judged(name, kind).measures.items()}
    assert published(name, kind) == found


def published(name: str, kind: str) -> dict[str, str]:
    """Measure -> state in docs/compatibility.md, of the installed version or its nearest relative."""
    rows = []
    for line in (ROOT / "docs" / "compatibility.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells[:2] == [TITLES[name], CLASSES[kind]]:
            rows.append((set(cells[2].split(", ")), cells[3:]))
    installed = version("transformer-lens").split(".")
    own = [texts for versions, texts in rows if ".".join(installed[:2]) in versions]
    major = [texts for versions, texts in rows if any(label.startswith(f"{installed[0]}.") for label in versions)]
    return {measure: text.split()[0] for measure, text in zip(COLUMNS, (own or major)[0], strict=True)}


# ---------------------------------------------------------------- and the table can fail


def test_a_bound_below_the_truth_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    name, kind = a_cell()
    path_bound = osl.path_bound

    def too_small(trace: Any, variant: str) -> Any:
        profile = path_bound(trace, variant)
        return replace(profile, log_constant=profile.log_constant - 20)

    monkeypatch.setattr(osl, "path_bound", too_small, raising=False)
    cell = judge(name, kind)
    assert len(cell.faults) == 2
    assert all("below the truth" in fault for fault in cell.faults)
    assert cell.measures["calibrated"].state == "refused"


def test_a_wrong_truth_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    name, kind = a_cell()
    monkeypatch.setattr("cells.Subject.differences", lambda self, freeze: self.truth("fro").values * 1.1)
    faults = judge(name, kind).faults
    assert any("truth: the measured sensitivity is off by 0.1" in fault for fault in faults)


@pytest.mark.parametrize("state", ["supported", "refused"])
def test_a_wrong_declaration_is_a_fault(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, kind = a_cell()
    declared = osl.support(zoo(name, kind))
    if state == "supported":  # declared and computed, but the computation refuses

        def refusing(trace: Any) -> None:
            raise ModelError("not today")

        monkeypatch.setattr(osl, "mean_field_sensitivity", refusing, raising=False)
    else:  # refused, yet a number comes
        declared = declared | {"mean_field": declared["mean_field"]._replace(state="refused", why="no")}
        monkeypatch.setattr(osl, "support", lambda model: declared, raising=False)
    (fault,) = judge(name, kind).faults
    assert fault.startswith(f"{name}, {kind}, mean_field: declared {state}")


def a_cell() -> tuple[str, str]:
    """A cell that every TransformerLens has."""
    return next(("llama", kind) for kind in ("hooked", "bridge") if lacking("llama", kind) is None)


# ---------------------------------------------------------------- rendering


def run_of(number: str, *cells: tuple[str, str, str], gap: float = 1.0) -> dict[str, Any]:
    """A made-up run: (family, kind, state of calibrated)."""
    good = {"state": "supported", "why": "", "numbers": {"tightest_log10_gap": gap}}
    bad = {"state": "refused", "why": "it rains", "numbers": {}}
    estimate = {"state": "approximate", "why": "", "numbers": {"median_abs_log10_ratio": 0.1, "spearman": 0.9}}

    def measures(state: str) -> dict[str, Any]:
        rest = dict.fromkeys(COLUMNS, good)
        return rest | {"calibrated": bad if state == "refused" else good, "mean_field": estimate}

    return {
        "versions": {"transformer-lens": number, "transformers": "5", "torch": "2"},
        "seeds": [0],
        "cells": [{"family": family, "kind": kind, "measures": measures(state)} for family, kind, state in cells],
        "lacking": [],
        "faults": [],
    }


def test_versions_that_agree_share_a_row_with_the_worst_numbers() -> None:
    runs = [
        run_of("2.18.0", ("gpt2", "hooked", "supported"), gap=2.0),
        run_of("3.9.0", ("gpt2", "hooked", "supported"), ("llama", "bridge", "supported")),
        run_of("4.3.0", ("llama", "bridge", "refused")),
    ]
    page = full_page(runs)
    assert "| GPT-2 | HookedTransformer | 2.18, 3.9 | supported (10^1.0) | supported (10^1.0) |" in page
    assert "| Llama | TransformerBridge | 3.9 |" in page
    assert "| Llama | TransformerBridge | 4.3 | supported (10^1.0) | refused [1] |" in page
    assert "approximate (0.10, ρ 0.90)" in page
    assert page.endswith("Notes:\n\n1. it rains\n")


def test_the_compact_table_groups_families_and_names_what_is_refused() -> None:
    runs = [
        run_of(
            "3.9.0", ("gpt2", "hooked", "supported"), ("llama", "hooked", "supported"), ("opt", "hooked", "refused")
        ),
        run_of("4.3.0", ("llama", "bridge", "supported")),
    ]
    lines = compact_table(runs).splitlines()
    assert lines[0].startswith("| family | HookedTransformer (3.9) | TransformerBridge (4.3) |")
    assert "| GPT-2 | all | – | – |" in lines
    assert "| OPT | all but `calibrated` | – | – |" in lines


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    assert between_markers("a\n<!-- x -->\nold\n<!-- /x -->\nb", "new", "x") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb"
    with pytest.raises(ValueError, match="both markers"):
        between_markers("a <!-- x --> b", "new", "x")
