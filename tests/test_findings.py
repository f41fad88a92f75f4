"""Findings of one recording are those of their parts; each assumption's numbers stand against an independent truth."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from reference import exact_jacobian, frobenius, geometric_mean
from small_findings import findings_result
from small_models import CASES, case, tokens_for
from zoo import zoo

import oversquash_lens as osl
from oversquash_lens.analyses import audit as audit_module
from oversquash_lens.analyses import findings as findings_module
from oversquash_lens.analyses.audit import audit_trace, measure_truths
from oversquash_lens.analyses.compare import compare
from oversquash_lens.analyses.findings import DISTANT, LARGEST, MOST_SQUASHED, assumptions, chosen_sources, findings
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import tokenize
from oversquash_lens.errors import InputError
from oversquash_lens.numerics import effective_number, spearman
from oversquash_lens.paths.heaviest import heaviest_edges, heaviest_paths
from oversquash_lens.paths.squashing import squashing, with_uniform_attention

pytestmark = pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")
SOME = ("ln-plain-learned", "rms-gated-rotary-gqa", "bridge-llama")


@pytest.fixture(scope="module", params=SOME)
def found(request):
    return request.param, findings(*case(request.param))


def test_findings_are_those_of_their_parts(found):
    name, result = found
    trace = osl.record(*case(name))
    squashed, audit = squashing(trace), osl.audit(*case(name))
    assert torch.equal(result.squashing.share, squashed.share)
    assert torch.equal(result.squashing.null.node, squashed.null.node)
    assert result.edges == heaviest_edges(squashed.flow, findings_module.EDGES)
    assert result.paths == heaviest_paths(squashed.flow, findings_module.PATHS)
    assert torch.equal(result.audit.truth.values, audit.truth.values)
    assert [row.spearman for row in result.audit.rows] == [row.spearman for row in audit.rows]
    for flow in result.routes.values():
        assert torch.allclose(flow.node, osl.flow(trace, source=flow.source).node, rtol=1e-10, atol=1e-14)


def test_heard_is_the_entropy_of_the_exact_jacobian(found):
    name, result = found
    share = frobenius(exact_jacobian(*case(name)))
    share = share / share.sum()
    assert result.effective_tokens == pytest.approx(math.exp(-(share * share.log()).sum().item()), rel=1e-4)
    said = f"All outputs are sensitive to {result.effective_tokens:.1f} of 6 tokens (effective number)."
    assert said in result.sentence


def test_the_answer_is_the_gradient_of_the_likeliest_token_s_logit(found):
    name, result = found
    model, tokens = case(name)
    answer, logits = result.answer, model(tokens)[0, -1].double()
    chances, ids = logits.softmax(-1).topk(5)
    assert [chance for _, chance in answer.predicted] == pytest.approx(chances.tolist(), rel=1e-4)
    gradient = osl.measured_sensitivity(model, tokens, target=int(ids[0]))
    assert torch.allclose(answer.sensitivity.values, gradient.values)
    word = answer.words[0]
    assert answer.flow.source == slice(word.start, word.stop)
    own = osl.measured_flow(model, tokens, slice(word.start, word.stop), target=int(ids[0]))
    assert torch.allclose(answer.flow.node, own.node, atol=1e-6)
    assert torch.allclose(answer.flow.norms[0], answer.sensitivity.values.double(), rtol=1e-4)
    assert sum(part.share for part in answer.parts) == pytest.approx(1)
    assert answer.null_share.sum().item() == pytest.approx(1)


def test_null_widths_are_those_of_the_estimate_with_uniform_attention(found):
    name, result = found
    profile = osl.mean_field_sensitivity(with_uniform_attention(osl.record(*case(name))))
    assert torch.allclose(result.answer.null_share, profile.share, rtol=1e-6)
    assert torch.allclose(result.answer.null_width, effective_number(profile.share_by_layer), rtol=1e-6)


def test_replacing_is_what_substitution_measures():
    model, tokens = case("bridge-llama")
    answer = findings(model, tokens, probes=2, draws=3, target=[5, 7], seed=4).answer
    own = osl.substitution(model, tokens, draws=3, target=[5, 7], seed=4)
    assert torch.equal(answer.replaced.distances, own.distances)
    assert answer.sensitivity.target == own.target
    without = findings(model, tokens, probes=2, draws=0).answer
    assert (without.replaced, without.not_replaced) == (None, "it was not asked for (draws=0)")
    unasked = findings(model, tokens, probes=2).answer.replaced
    assert unasked.method == "nodes"
    assert torch.allclose(unasked.distances, osl.substitution(model, tokens, draws=2, method="nodes").distances)


@pytest.mark.parametrize(("how", "message"), [({"target": "no such token at all"}, "target"), ({"draws": -1}, "draws")])
def test_a_bad_target_is_refused_before_anything_is_recorded(monkeypatch, how, message):
    monkeypatch.setattr(audit_module, "record_tokens", lambda *a, **k: pytest.fail("recorded"))
    with pytest.raises(InputError, match=message):
        findings(*case("bridge-llama"), probes=2, **how)


def test_findings_go_into_json_and_back(found):
    values = json.loads(json.dumps(found[1].to_dict(), allow_nan=False))
    assert values["kind"] == "findings"
    assert values["audit"]["kind"] == "audit"
    assert values["answer"]["sensitivity"]["target"] == found[1].answer.sensitivity.target
    assert values["answer"]["flow"]["kind"] == "measured_flow"
    assert values["squashing"]["effective_tokens"] == found[1].squashing.effective_tokens
    assert set(values["routes"]) == set(found[1].routes)
    assert [each["name"] for each in values["assumptions"]] == ["norms", "attention", "heads", "mlp"]
    assert values["assumptions"][0]["frozen"]["spearman"] is not None
    assert values["assumptions"][2]["frozen"] is None


def test_one_prompt_is_recorded_once(monkeypatch):
    recorded = []
    real = audit_module.record_tokens
    monkeypatch.setattr(audit_module, "record_tokens", lambda *a, **k: recorded.append(1) or real(*a, **k))
    findings(*case("ln-one-layer"), probes=2)
    assert recorded == [1]


@pytest.mark.parametrize("name", ["ln-plain-learned", "rms-gated-rotary-gqa"])
def test_frozen_truths_are_those_of_the_reference(name):
    """With attention detached in a reference Jacobian of its own; the divisors by the public measure."""
    model, tokens = case(name)
    result = {each.name: each for each in findings(model, tokens).assumptions}
    full = frobenius(exact_jacobian(model, tokens))
    frozen = frobenius(exact_jacobian(model, tokens, freeze_attention=True))
    ratio = (frozen / full).log10()
    said = result["attention"].frozen
    assert (said.min_log10_ratio, said.max_log10_ratio) == pytest.approx((ratio.min().item(), ratio.max().item()))
    assert said.spearman == pytest.approx(spearman(frozen.log(), full.log()))
    norms = osl.measured_sensitivity(model, tokens, probes=None, freeze=("norms",)).values
    ratio = (norms / full).log10()
    said = result["norms"].frozen
    assert (said.min_log10_ratio, said.max_log10_ratio) == pytest.approx((ratio.min().item(), ratio.max().item()))


@pytest.mark.parametrize("name", CASES)
def test_one_constant_for_a_layer_is_the_geometric_mean(name):
    model, tokens = case(name)
    trace = osl.record(model, tokens)
    truths = measure_truths(Subject.of(model), tokenize(model, tokens), trace.about, probes=3)
    result = {each.name: each for each in assumptions(trace, truths)}
    for assumption, gain in (("norms", "attention_scale"), ("mlp", "node_gain")):
        values = getattr(trace.gains, gain)
        alike = torch.tensor([[geometric_mean(row)] * len(row) for row in values], dtype=values.dtype)
        imposed = osl.mean_field_sensitivity(replace(trace, gains=replace(trace.gains, **{gain: alike})))
        expected = vars(compare(imposed, truths.frobenius))
        assert vars(result[assumption].imposed) == pytest.approx(expected, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", CASES)
def test_what_is_imposed_is_what_is_claimed(name):
    """Where a model keeps an assumption already, imposing it changes nothing; where not, it does."""
    model, tokens = case(name)
    trace = osl.record(model, tokens)
    truths = measure_truths(Subject.of(model), tokenize(model, tokens), trace.about, probes=3)
    gains, weights = trace.gains, trace.gains.weights
    n_heads = trace.about.n_heads
    kept = replace(
        trace,
        gains=replace(
            gains,
            attention_scale=gains.attention_scale[:, :1].expand_as(gains.attention_scale).clone(),
            node_gain=gains.node_gain[:, :1].expand_as(gains.node_gain).clone(),
            key=torch.zeros_like(gains.key),
            key_pull=torch.zeros_like(gains.key_pull),
            weights=replace(
                weights,
                ov_gram=torch.full_like(weights.ov_gram, n_heads**-2),
                ov_trace=torch.full_like(weights.ov_trace, 1 / n_heads),
            ),
        ),
    )
    for each in assumptions(kept, truths):
        assert vars(each.imposed) == pytest.approx(vars(each.estimate), rel=1e-6, nan_ok=True), each.name
        assert each.frozen is None or each.name == "attention"
    for each in assumptions(trace, truths):
        assert each.imposed.median_log10_ratio != pytest.approx(each.estimate.median_log10_ratio, rel=1e-6), each.name
        assert each.estimate == compare(osl.mean_field_sensitivity(trace), truths.frobenius)


def test_ranges_said_are_those_of_the_recording():
    trace = osl.record(*case("ln-plain-learned"))
    truths = measure_truths(
        Subject.of(case("ln-plain-learned")[0]), tokenize(*case("ln-plain-learned")), trace.about, probes=2
    )
    norms, _, heads, _ = assumptions(trace, truths)
    scale = trace.gains.attention_scale
    spread = scale.amax(-1) / scale.amin(-1)
    layer = int(spread.argmax())
    assert (
        f"from {scale[layer].min():.3g} to {scale[layer].max():.3g} over the positions of layer {layer}" in norms.found
    )
    assert f"{trace.gains.weights.ov_norm.max():.3g} over {trace.gains.weights.ov_norm.numel()} heads" in heads.found


def test_what_cannot_be_said_is_a_dash():
    nothing = replace(findings_result().assumptions[0].imposed, spearman=math.nan, median_log10_ratio=math.nan)
    said = replace(findings_result().assumptions[0], imposed=nothing).effect
    assert "from 0.93 to –, and the typical size from 0.81 to – times the truth" in said


def test_sources_are_chosen_once_each_and_for_what_they_are_called(found):
    squashed = found[1].squashing
    chosen = chosen_sources(squashed)
    assert chosen == {why: flow.source for why, flow in found[1].routes.items()}
    assert len(set(chosen.values())) == len(chosen)
    share = squashed.share
    assert chosen[LARGEST] == int(share.argmax())
    half = [i for i in range(len(share) // 2) if i != chosen[LARGEST]]
    assert chosen[DISTANT] == max(half, key=lambda i: share[i].item())
    rest = [i for i in range(len(share)) if i not in (chosen[LARGEST], chosen[DISTANT])]
    assert chosen[MOST_SQUASHED] == min(rest, key=lambda i: (share - squashed.null_share)[i].item())


def test_what_is_not_heard_at_all_has_no_route():
    squashed = findings_result(("a", "b", "c")).squashing
    alone = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    assert chosen_sources(replace(squashed, share=alone)) == {LARGEST: 2}


def test_two_tokens_are_enough():
    model, tokens = case("ln-one-layer")
    result = findings(model, tokens[:, :2], probes=2)
    assert len(result.tokens) == 2
    assert set(result.routes) <= {LARGEST, DISTANT, MOST_SQUASHED}


def test_an_audit_is_that_of_its_parts():
    model, tokens = case("rms-plain-rotary")
    trace = osl.record(model, tokens)
    truths = measure_truths(Subject.of(model), tokenize(model, tokens), trace.about)
    replaced = osl.substitution(model, tokens, draws=4, method="nodes"), ""
    assert audit_trace(trace, truths, replaced=replaced).rows == osl.audit(model, tokens).rows
    assert repr(audit_trace(trace, truths, 2.0).rows) == repr(osl.audit(model, tokens, beta=2.0, draws=0).rows)


def test_bad_input_is_refused_before_anything_is_recorded(monkeypatch):
    monkeypatch.setattr(audit_module, "record_tokens", lambda *a, **k: pytest.fail("recorded"))
    model, _ = case("ln-one-layer")
    with pytest.raises(InputError, match="at least two"):
        findings(model, [1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_have_findings_and_an_exact_spectral_norm(dtype):
    """Their eigenvalues are computed in float32, for torch has none in half precision."""
    model = zoo("mistral", "bridge", 3, dtype=dtype)
    found = findings(model, tokens_for(3, 8))
    wide = findings(zoo("mistral", "bridge", 3, dtype=torch.float32), tokens_for(3, 8))
    assert found.audit.truth.exact
    assert found.effective_tokens == pytest.approx(wide.effective_tokens, rel=0.2)


def test_the_most_squashed_token_loses():
    """Where no other token loses against even attention, none is called squashed."""
    for seed in range(12):
        squashed = squashing(osl.record(zoo("mistral", "bridge", seed), tokens_for(seed, 3)))
        chosen = chosen_sources(squashed)
        if MOST_SQUASHED in chosen:
            assert squashed.lift[chosen[MOST_SQUASHED]] < 1


def test_findings_are_short_and_become_a_frame(found):
    result = found[1]
    assert len(repr(result).splitlines()) <= 12
    assert result.sentence in str(result)
    frame = result.to_frame()
    assert list(frame["token"]) == list(result.tokens)
    assert frame["measured_share"].sum() == pytest.approx(1)
