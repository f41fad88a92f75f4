"""The audit: every row against numbers computed apart from it, and a table and a sentence that say the same."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from reference import exact_jacobian, frobenius, spectral
from small_models import CASES, NO_BRIDGE, case, has_bridge, tokens_for
from small_results import audit_result
from zoo import zoo

import oversquash_lens as osl
from oversquash_lens.analyses.audit import UNIT_BETA, Audit, AuditRow, audit_trace, measure_truths
from oversquash_lens.analyses.compare import baselines, compare
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import tokenize
from oversquash_lens.errors import InputError, ModelError
from oversquash_lens.numerics import spearman
from oversquash_lens.paths.kinds import CALIBRATED, VARIANTS

NO_CONSTANT = ("theorem_5_1", "rollout")
BASELINES = ("attention", "values", "truth", "vocabulary")
# Its norms, softmax and rotations are float32 inside.
TOLERANCE = {"bridge-llama": 1e-5}


def row(audit: Audit, name: str) -> AuditRow:
    (found,) = (each for each in audit.rows if each.name == name)
    return found


@pytest.fixture(scope="module", params=CASES)
def audited(request: pytest.FixtureRequest) -> tuple[str, Audit]:
    return request.param, osl.audit(*case(request.param))


def test_there_is_a_row_for_every_measure(audited: tuple[str, Audit]) -> None:
    audit = audited[1]
    assert [each.name for each in audit.rows] == ["mean_field", *VARIANTS, UNIT_BETA, *BASELINES]
    assert list(audit.bounds) == [*VARIANTS, UNIT_BETA]
    assert [each.name for each in audit.rows if each.promises_bound] == list(CALIBRATED)


def test_the_truth_is_the_exact_jacobian(audited: tuple[str, Audit]) -> None:
    name, audit = audited
    wanted = frobenius(exact_jacobian(*case(name)))
    assert (audit.truth.exact, audit.truth.norm, audit.truth.freeze, audit.truth.probes) == (True, "fro", (), None)
    assert torch.allclose(audit.truth.values.double(), wanted, rtol=TOLERANCE.get(name, 1e-10), atol=0)


def test_rows_are_against_the_norm_that_they_name(audited: tuple[str, Audit]) -> None:
    """Bounds against ‖J‖₂ of the Jacobian they bound, the estimate against ‖J‖_F; ranks always against ‖J‖_F."""
    name, audit = audited
    model, tokens = case(name)
    full, frozen = (exact_jacobian(model, tokens, freeze_attention=freeze) for freeze in (False, True))
    truths = {"‖J‖_F": frobenius(full), "‖J‖₂": spectral(full), "‖J‖₂, attention frozen": spectral(frozen)}
    profiles = audit.bounds | {"mean_field": audit.mean_field}
    for each in audit.rows[: -len(BASELINES)]:
        profile = profiles[each.name]
        ranks = spearman(profile.log_by_layer[0], truths["‖J‖_F"].log())
        assert each.spearman == pytest.approx(ranks, abs=1e-9)
        if each.name in NO_CONSTANT:
            assert (each.violations, each.compared_with) == (None, "–")
            assert math.isnan(each.median_log10_ratio)
            continue
        expected = {"mean_field": "‖J‖_F", "calibrated": "‖J‖₂, attention frozen"}.get(each.name, "‖J‖₂")
        assert each.compared_with == expected
        ratio = (profile.log_values - truths[expected].log()) / math.log(10)
        assert each.min_log10_ratio == pytest.approx(ratio.min().item(), abs=1e-4)
        assert each.max_log10_ratio == pytest.approx(ratio.max().item(), abs=1e-4)
        assert each.min_log10_ratio <= each.median_log10_ratio <= each.max_log10_ratio
        assert each.violations == (None if each.name == "mean_field" else int((ratio < -1e-9).sum()))


def test_every_measure_is_ranked_against_replacing(audited: tuple[str, Audit]) -> None:
    """By a substitution of its own, and attention as the model's cache has it."""
    name, audit = audited
    model, tokens = case(name)
    own = osl.substitution(model, tokens, draws=4, method="nodes")
    assert torch.allclose(audit.replaced.distances, own.distances, rtol=1e-9)
    effect = own.distance.log()
    for each in audit.rows[: -len(BASELINES)]:
        profile = {**audit.bounds, "mean_field": audit.mean_field}[each.name]
        assert each.finite == pytest.approx(spearman(profile.log_by_layer[0], effect), abs=1e-9)
    assert row(audit, "truth").finite == pytest.approx(spearman(audit.truth.values.double().log(), effect), abs=1e-9)
    assert row(audit, "truth").spearman == pytest.approx(1)
    halves = [own.distances[:, at].log().mean(-1) for at in ([2, 0], [3, 1])]
    assert audit.ceiling == pytest.approx(spearman(*halves))
    assert f"one half of the draws ranks the other at {audit.ceiling:.2f}" in audit.sentence


@pytest.mark.parametrize("name", ["ln-plain-learned", "rms-gated-rotary-gqa"])
def test_baselines_are_what_the_cache_says(name: str) -> None:
    model, tokens = case(name)
    _, cache = model.run_with_cache(tokens)
    found = baselines(osl.record(model, tokens))
    layers, heads = range(model.cfg.n_layers), range(model.cfg.n_heads)
    rows = torch.stack([cache["pattern", layer][0, :, -1] for layer in layers])
    assert torch.allclose(found["attention"], rows.mean((0, 1)).double(), rtol=1e-6)
    written = []
    for layer in layers:
        attn = model.blocks[layer].attn
        values = cache["v", layer][0]
        values = values.repeat_interleave(model.cfg.n_heads // values.shape[1], 1)
        sizes = torch.stack([rows[layer, h] * (values[:, h] @ attn.W_O[h]).norm(dim=-1) for h in heads])
        total = sizes.square().sum(0).sqrt()
        written.append(total / total.sum())
    assert torch.allclose(found["values"], torch.stack(written).mean(0).double(), rtol=1e-6)


def test_nothing_is_replaced_where_nobody_asks() -> None:
    model, tokens = case("bridge-gpt2")
    audit = osl.audit(model, tokens, probes=2, draws=0)
    assert (audit.replaced, audit.not_replaced) == (None, "it was not asked for (draws=0)")
    assert math.isnan(audit.ceiling)
    assert all(math.isnan(each.finite) for each in audit.rows)
    assert "replaced" not in audit.sentence
    assert math.isnan(osl.audit(model, tokens, probes=2, draws=2).ceiling)  # no half has both kinds
    with pytest.raises(InputError, match="draws"):
        osl.audit(model, tokens, draws=-1)


def test_the_calibrated_bounds_are_never_broken(audited: tuple[str, Audit]) -> None:
    for name in CALIBRATED:
        assert row(audited[1], name).violations == 0
        assert row(audited[1], name).min_log10_ratio >= 0


def test_broken_printed_bounds_are_counted() -> None:
    """With β = 1000 given, the printed forms shrink below the truth at every position, and the audit says so."""
    model, tokens = case("bridge-gpt2")
    audit = osl.audit(model, tokens, beta=1000.0)
    assert UNIT_BETA not in audit.bounds
    for name in ("proof", "theorem_b5"):
        assert row(audit, name).violations == len(audit.tokens)
        assert row(audit, name).max_log10_ratio < 0
    assert all(row(audit, name).violations == 0 for name in CALIBRATED)


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_bound_is_broken_from_a_billionth_on(name: str) -> None:
    """By a truth that is made up: the bound itself, a little larger or smaller."""
    model, tokens = case("bridge-gpt2")
    trace = osl.record(model, tokens)
    truths = measure_truths(Subject.of(model), tokenize(model, tokens), trace.about)
    which = "frozen_spectral" if name == "calibrated" else "spectral"
    for larger, broken in ((0.2, True), (1e-6, True), (1e-8, True), (1e-10, False), (0.0, False), (-0.2, False)):
        values = osl.path_bound(trace, name).values * (1 + larger)
        made_up = replace(truths, **{which: replace(getattr(truths, which), values=values)})
        assert row(audit_trace(trace, made_up), name).violations == broken * len(values), larger


def test_an_audit_of_one_pass_is_that_of_its_parts() -> None:
    model, tokens = case("bridge-llama")
    audit = osl.audit(model, tokens, seed=3)
    trace = osl.record(model, tokens, seed=3)
    assert audit.about == trace.about
    assert torch.equal(audit.mean_field.log_by_layer, osl.mean_field_sensitivity(trace).log_by_layer)
    for name in VARIANTS:
        assert torch.equal(audit.bounds[name].log_by_layer, osl.path_bound(trace, name).log_by_layer)
    assert torch.equal(audit.bounds[UNIT_BETA].log_by_layer, osl.path_bound(trace, "proof", 1.0).log_by_layer)
    assert compare(audit.mean_field, audit.truth).spearman == row(audit, "mean_field").spearman


@pytest.mark.parametrize("probes", [1, 2, 16])
@pytest.mark.parametrize("name", ["ln-plain-learned", "rms-gated-rotary-gqa", "bridge-llama"])
def test_probes_find_violations_that_are_certain(name: str, probes: int) -> None:
    """‖ωJ‖/‖ω‖ never passes ‖J‖₂, so ratios from probes are at least those of the exact audit."""
    model, tokens = case(name)
    exact, probed = osl.audit(model, tokens), osl.audit(model, tokens, probes=probes)
    assert not probed.truth.exact
    assert (probed.truth.probes, probed.truth.seed) == (probes, 0)
    assert (probed.truth.standard_error > 0).all()
    for each in probed.rows:
        same = row(exact, each.name)
        if each.name not in ("mean_field", *NO_CONSTANT, *BASELINES):
            assert each.compared_with == f"{same.compared_with}, from below"
            assert each.min_log10_ratio >= same.min_log10_ratio - 1e-6
            assert each.violations <= same.violations


# ---------------------------------------------------------------- what it says


def test_the_sentence_holds_the_tables_numbers(audited: tuple[str, Audit]) -> None:
    audit = audited[1]
    sentence, estimate, paper = audit.sentence, row(audit, "mean_field"), row(audit, "proof")
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert f"Of these {len(audit.tokens)} tokens" in sentence
    assert f"(Spearman ρ = {estimate.spearman:.2f}, typically {10**estimate.median_log10_ratio:.2f} times" in sentence
    assert f"(ρ = {paper.spearman:.2f})" in sentence
    assert "the bounds that promise to hold do" in sentence


def test_the_sentence_promises_no_more_than_the_table(audited: tuple[str, Audit]) -> None:
    """ "At least 10^k above the truth" is true of every position of every bound that promises to hold."""
    (said,) = re.findall(r"at least 10\^(-?\d+) above", audited[1].sentence)
    least = min(row(audited[1], name).min_log10_ratio for name in CALIBRATED)
    assert int(said) <= least + 0.5  # rounded


def test_the_sentence_says_when_a_promise_is_broken() -> None:
    audit = audit_result()
    assert row(audit, "calibrated").violations == row(audit, "calibrated_full").violations == 2
    assert "BROKEN at 4 positions" in audit.sentence


@pytest.mark.skipif(not has_bridge(), reason=NO_BRIDGE)
def test_a_window_that_hides_tokens_hides_no_numbers() -> None:
    """Token 0 is out of a two-layer window's reach: its 0/0 must not make the other five say nothing."""
    audit = osl.audit(zoo("mistral-window", "bridge", sliding_window=3), tokens_for(1, 6))
    assert audit.truth.values[0] == 0
    assert audit.mean_field.log_values[0] == -math.inf
    assert math.isfinite(row(audit, "mean_field").median_log10_ratio)
    assert "nan" not in audit.sentence
    assert row(audit, "calibrated_full").violations == 0


@pytest.mark.skipif(not has_bridge(), reason=NO_BRIDGE)
def test_a_mixture_of_experts_is_audited_without_the_bounds_that_it_refuses() -> None:
    audit = osl.audit(zoo("mixtral", "bridge"), tokens_for(1, 6))
    assert {"calibrated", "calibrated_full"}.isdisjoint(audit.bounds)
    assert "no bound promises to hold on this architecture" in audit.sentence
    assert abs(row(audit, "mean_field").median_log10_ratio) < 1
    assert "mixture of experts" not in str(audit)


@pytest.mark.skipif(not has_bridge(), reason=NO_BRIDGE)
def test_where_attention_cannot_be_frozen_the_rest_is_audited() -> None:
    audit = osl.audit(zoo("gpt-j", "bridge"), tokens_for(1, 6))
    frozen = row(audit, "calibrated")
    assert (frozen.violations, frozen.compared_with) == (None, "–")
    assert row(audit, "calibrated_full").violations == 0
    assert "at least 10^" in audit.sentence
    with (
        pytest.raises(ModelError, match="drop the edit in silence"),
        osl.edited_attention(zoo("gpt-j", "bridge"), osl.edits.window(2)),
    ):
        pass


def test_the_table_holds_every_row(audited: tuple[str, Audit]) -> None:
    audit = audited[1]
    first, *lines = str(audit).splitlines()
    assert audit.about.model in first
    for each in audit.rows:
        (line,) = (text for text in lines if text.partition("│")[2].partition("│")[0].strip() == each.name)
        cells = [cell.strip() for cell in line.strip("│ ").split("│")]
        ratios = (each.median_log10_ratio, each.min_log10_ratio, each.max_log10_ratio)
        numbers = (each.spearman, each.finite, *ratios)
        assert cells[1:6] == ["–" if math.isnan(number) else f"{number:.2f}" for number in numbers]
        assert cells[6] == ("–" if each.violations is None else str(each.violations))
        assert cells[7].split()[0] == each.compared_with.split()[0]
    assert " ".join(audit.sentence.split()) in " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", ["run[v2]", "a[/b]c", "[bold]model", "m" * 300])
def test_a_models_name_is_printed_as_it_is(name: str) -> None:
    audit = audit_result(model=name)
    assert name in "".join(line.strip() for line in str(audit).splitlines())


def test_json_there_and_back(audited: tuple[str, Audit]) -> None:
    audit = audited[1]
    text = json.dumps(audit.to_dict(), allow_nan=False)
    back = json.loads(text)
    assert back["kind"] == "audit"
    assert back["tokens"] == list(audit.tokens)
    assert back["sentence"] == audit.sentence
    assert back["about"] == dataclasses.asdict(audit.about)
    assert list(back["bounds"]) == list(audit.bounds)
    assert back["truth"]["values"] == audit.truth.values.tolist()
    for one, two in zip(audit.rows, back["rows"], strict=True):
        for key, value in dataclasses.asdict(one).items():
            assert two[key] == (None if isinstance(value, float) and math.isnan(value) else value)
    for name, profile in [*audit.bounds.items(), ("mean_field", audit.mean_field)]:
        there = back["bounds"].get(name, back["mean_field"])
        rows = [[-math.inf if cell is None else cell for cell in line] for line in there["log_by_layer"]]
        assert torch.equal(torch.tensor(rows, dtype=torch.float64), profile.log_by_layer)


def test_rows_differ_between_measures(audited: tuple[str, Audit]) -> None:
    """No two bounds with a constant are one and the same (else an audit of one of them would pass for all)."""
    bounds = [b.log_values for name, b in audited[1].bounds.items() if name not in NO_CONSTANT]
    for one, two in itertools.combinations(bounds, 2):
        assert not torch.allclose(one, two, atol=1e-6)


def test_an_audit_is_short_and_becomes_a_frame(audited: tuple[str, Audit]) -> None:
    audit = audited[1]
    assert len(repr(audit).splitlines()) <= 12
    assert audit._repr_html_().count("<tr>") == len(audit.rows) + 1
    assert list(audit.to_frame()["measure"]) == [each.name for each in audit.rows]
