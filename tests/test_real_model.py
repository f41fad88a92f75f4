"""SmolLM2-135M-Instruct: both classes give the same numbers, the sound bounds hold, the estimate ranks as the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import oversquash_lens as osl
from oversquash_lens.analyses.compare import compare
from oversquash_lens.paths.kinds import CALIBRATED, VARIANTS

SHORT = "The capital of France is"
AGREED = "The committee met on Tuesday. Alice wanted books, Bob a new roof. They agreed to split the"
COUNTING = "How many ones are in the following sequence? 1 1 1 1 1 Answer:"


@pytest.fixture(scope="module")
def traces(smollm2: Any, smollm2_hooked: Any) -> tuple[osl.Trace, osl.Trace]:
    return osl.record(smollm2, COUNTING), osl.record(smollm2_hooked, COUNTING)


def test_both_classes_give_the_same_numbers(traces: tuple[osl.Trace, osl.Trace]) -> None:
    bridge, hooked = traces
    assert (bridge.about.model_class, hooked.about.model_class) == ("TransformerBridge", "HookedTransformer")
    assert bridge.about.model == hooked.about.model == "SmolLM2-135M-Instruct (Q4_1)"
    assert bridge.tokens == hooked.tokens
    one, two = (osl.mean_field_sensitivity(trace).values for trace in traces)
    apart = (one / two - 1).abs().max().item()
    print(f"\nmean-field values, bridge against hooked: largest relative difference {apart:.2g}")
    assert apart <= 1e-3
    for variant in VARIANTS:
        left, right = (osl.path_bound(trace, variant).log_by_layer[:-1] for trace in traces)
        assert (left - right).abs().max() <= 1e-3, variant
    size = bridge.last_residuals.abs().amax(1, keepdim=True)
    assert ((bridge.last_residuals - hooked.last_residuals).abs() / size).max() <= 1e-3
    for a, b in zip(bridge.attention, hooked.attention, strict=True):
        assert (a.rows(0, a.n_positions) - b.rows(0, b.n_positions)).abs().max() <= 1e-3


def test_a_trace_of_the_real_model_is_whole(smollm2: Any, watch: Callable) -> None:
    trace = osl.record(smollm2, SHORT, attention="kept")
    assert trace.tokens == ("The", " capital", " of", " France", " is")
    assert (trace.about.bos, trace.about.chat, trace.about.dtype) == (False, False, "float32")
    assert trace.last_residuals.shape == (31, 576)
    seen = watch(smollm2, trace.token_ids[None], "unembed.hook_in", "blocks.29.attn.hook_pattern")
    assert torch.equal(trace.prediction_input, seen["unembed.hook_in"][0, -1])
    assert torch.equal(trace.attention[29].rows(0, 5), seen["blocks.29.attn.hook_pattern"][0])
    # y is what the unembedding reads: it predicts what the model predicts.
    with torch.no_grad():
        logits = smollm2(trace.token_ids[None])[0, -1]
    assert smollm2.tokenizer.decode((trace.prediction_input @ smollm2.W_U).argmax().item()) == " Paris"
    assert torch.allclose(trace.prediction_input @ smollm2.W_U, logits, atol=1e-2)


def test_bos_and_chat_on_the_real_model(smollm2: Any) -> None:
    begun = osl.record(smollm2, SHORT, bos=True)
    assert (begun.tokens[0], begun.about.bos) == (smollm2.tokenizer.bos_token, True)
    chat = osl.record(smollm2, "Hi", chat=True)
    assert chat.about.chat
    assert "user" in "".join(chat.tokens)
    assert "".join(chat.tokens).endswith("assistant\n")


def test_the_sound_bounds_hold_on_the_real_model(smollm2: Any) -> None:
    """Exactly, at n = 5: full and attention-frozen spectral norms from 2·576 backward products."""
    audit = osl.audit(smollm2, SHORT)
    rows = {row.name: row for row in audit.rows}
    for name in CALIBRATED:
        row = rows[name]
        print(f"\n{name}: log₁₀ gap from {row.min_log10_ratio:.1f} to {row.max_log10_ratio:.1f}")
        assert row.violations == 0
        assert row.min_log10_ratio > 0
    assert rows["calibrated"].compared_with == "‖J‖₂, attention frozen"
    assert rows["calibrated_full"].compared_with == "‖J‖₂"
    assert rows["mean_field"].spearman > 0.8
    assert abs(rows["mean_field"].median_log10_ratio) < 0.5


def test_the_sound_bounds_hold_on_the_other_class(smollm2_hooked: Any) -> None:
    audit = osl.audit(smollm2_hooked, SHORT, probes=8)
    for row in audit.rows:
        if row.promises_bound:
            assert row.violations == 0
            assert row.min_log10_ratio > 0


def test_the_estimate_ranks_as_the_truth(smollm2: Any) -> None:
    estimate = osl.mean_field_sensitivity(osl.record(smollm2, COUNTING))
    truth = osl.measured_sensitivity(smollm2, COUNTING, probes=16)
    found = compare(estimate, truth)
    print(
        f"\nmean-field against 16 probes: ρ = {found.spearman:.3f}, median log₁₀ ratio {found.median_log10_ratio:.3f}"
    )
    assert found.spearman > 0.8
    assert abs(found.median_log10_ratio) < 0.5


def test_saved_and_loaded_it_gives_the_same_estimate(traces: tuple[osl.Trace, osl.Trace], tmp_path: Any) -> None:
    for trace in traces:
        again = osl.Trace.load(trace.save(tmp_path / "trace.safetensors"))
        one, two = osl.mean_field_sensitivity(trace), osl.mean_field_sensitivity(again)
        assert torch.equal(one.log_by_layer, two.log_by_layer)


def test_one_probe_corrects_the_estimate(smollm2: Any) -> None:
    truth = osl.measured_sensitivity(smollm2, AGREED, probes=64, seed=100)
    found = [osl.probe_corrected_sensitivity(smollm2, AGREED, probes=1, seed=seed) for seed in range(4)]
    alone = [compare(each.estimate, truth) for each in found]
    assert sum(compare(each, truth).spearman for each in found) > sum(each.spearman for each in alone)
    inside = [((each.low <= truth.values) & (truth.values <= each.high)).double().mean().item() for each in found]
    assert sum(inside) / len(inside) > 0.7  # 0.9 is promised, over prompts and probes


def test_an_expected_error_is_said_of_the_real_model(smollm2: Any) -> None:
    expected = osl.expected_error(osl.record(smollm2, AGREED))
    assert 0.05 < expected.softmax_share < 1
    assert 0.3 < expected.size < 1.2
    assert 1.5 < expected.factor() < 3
