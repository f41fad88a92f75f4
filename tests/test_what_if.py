"""What if: every edit against an independent route to the same numbers, on small random models and the real one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import exact_jacobian, frobenius, matrix_product, mean_field, read, reference, spectral
from small_models import CASES, HOOKED_CASES, N_CTX, case, tokens_for

import oversquash_lens as osl
from oversquash_lens.analyses.what_if import MEASURES, OPPOSITE, Change, Outcome, WhatIf, what_if
from oversquash_lens.capture import edits
from oversquash_lens.capture.hooked_model import ACTIVATIONS
from oversquash_lens.capture.hooks import attached
from oversquash_lens.capture.recorder import record
from oversquash_lens.errors import InputError
from oversquash_lens.paths.kinds import CALIBRATED, VARIANTS
from oversquash_lens.paths.profiles import mean_field_sensitivity, path_bound

# Its norms, softmax and rotations are float32 inside.
ROUNDING = {"bridge-llama": 2e-5}
ATTENTION_EDITS = (
    edits.window(2),
    edits.window(3, keep_first=True),
    edits.mask_position(1),
    edits.ablate_head(0, 0),
    edits.sharpen(3),
    edits.sharpen(0.5),
)


def label(edit: Any) -> str:
    return getattr(edit, "label", str(edit))


def close(one: torch.Tensor, two: torch.Tensor, name: str) -> bool:
    """Logs or values, -inf where the other is."""
    rounding = ROUNDING.get(name, 1e-9)
    return torch.allclose(one.double(), two.double(), rtol=rounding, atol=rounding)


@pytest.fixture(scope="module", params=CASES)
def tried(request: pytest.FixtureRequest) -> tuple[str, WhatIf]:
    """Every attention edit on every case, exactly; node gains exact, too."""
    model, tokens = case(request.param)
    return request.param, what_if(model, tokens, *ATTENTION_EDITS, probes=None, node_probes=None)


def after(result: WhatIf, edit: edits.Edit) -> Outcome:
    (found,) = (outcome for outcome in result.after if outcome.label == edit.label)
    return found


# ---------------------------------------------------------------- against scores that are masked or scaled


@contextmanager
def rescored(model: Any, rescore: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """The other route to an edited attention: not the pattern, but the scores before the softmax."""
    names = [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(model.cfg.n_layers)]
    with attached(model, [(name, lambda scores, hook=None: rescore(scores)) for name in names]):
        yield


def masking(allowed: Callable[[int, int], bool], n: int) -> Callable[[torch.Tensor], torch.Tensor]:
    hidden = torch.tensor([[not allowed(dest, src) for src in range(n)] for dest in range(n)])
    return lambda scores: scores.masked_fill(hidden, -torch.inf)


MASKS = {
    "window of 2": lambda dest, src: dest - src < 2,
    "window of 3, position 0 kept": lambda dest, src: dest - src < 3 or src == 0,
    "position 1 masked": lambda dest, src: src != 1 or dest == 1,
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("edit", ATTENTION_EDITS[:3], ids=label)
def test_cutting_weights_gives_the_numbers_of_masked_scores(edit: edits.Edit, name: str) -> None:
    model, tokens = case(name)
    found = what_if(model, tokens, edit, probes=None).after[0]
    with rescored(model, masking(MASKS[edit.label], tokens.shape[1])):
        trace = record(model, tokens)
        truth = frobenius(exact_jacobian(model, tokens))
    assert torch.allclose(found.truth.values, truth, rtol=ROUNDING.get(name, 1e-9), atol=1e-6 * truth.max().item())
    assert close(found.bound.log_values, path_bound(trace).log_values, name)
    assert close(found.calibrated.log_values, path_bound(trace, "calibrated_full").log_values, name)
    assert close(found.estimate.log_values, mean_field_sensitivity(trace).log_values, name)
    unheard = torch.isneginf(found.estimate.log_values)
    assert (truth[unheard] <= 1e-6 * truth.max()).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("power", [0.5, 3.0])
def test_sharpening_gives_the_numbers_of_scaled_scores(power: float, name: str) -> None:
    """The truth by autograd through scaled scores; bound and estimate from formulas whose q and k are scaled."""
    model, tokens = case(name)
    found = what_if(model, tokens, edits.sharpen(power), probes=None, node_probes=None).after[0]
    with rescored(model, lambda scores: power * scores):
        truth = frobenius(exact_jacobian(model, tokens))
        reading = read(model, tokens)
        for layer in reading.layers:
            layer.scale *= power
        estimate = mean_field(reading)
    assert close(found.truth.values, truth, name)
    for variant, profile in (("proof", found.bound), ("calibrated_full", found.calibrated)):
        bound = reference(reading, variant, lipschitz={name: act.lipschitz for name, act in ACTIVATIONS.items()})
        expected = matrix_product(bound.edges, bound.nodes)[0].log() + bound.log_constant
        assert close(profile.log_values, expected, name)
    squares = matrix_product(estimate.edges, estimate.nodes)[0]
    assert close(found.estimate.log_values, (squares.log() + estimate.log_constant) / 2, name)


# ---------------------------------------------------------------- against a head without output weights


@contextmanager
def unwritten(model: Any, layer: int, head: int) -> Iterator[None]:
    """The other route to an ablation: the head's rows of W_O are zero; afterwards they are as before."""
    attn = model.blocks[layer].attn
    heads, d_head = attn.W_O.shape[:2]
    parameters = dict(attn.named_parameters())
    (name,) = (n for n in parameters if n == "W_O" or ("weight" in n and ("o_proj" in n or n.startswith("o."))))
    weight, part = parameters[name], slice(head * d_head, (head + 1) * d_head)
    assert weight.shape[-1] == heads * d_head or weight.shape[0] in (heads, heads * d_head)
    rows = head if name == "W_O" else (slice(None), part) if "o_proj" in name else part
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[rows] = 0
        assert not attn.W_O[head].any()
        assert attn.W_O.any(dim=(1, 2)).sum() == heads - 1
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


@pytest.mark.parametrize("name", CASES)
def test_a_head_that_is_off_is_a_head_that_writes_nothing(name: str) -> None:
    model, tokens = case(name)
    layer, head = model.cfg.n_layers - 1, 1
    found = what_if(model, tokens, edits.ablate_head(layer, head), probes=None).after[0]
    with unwritten(model, layer, head):
        trace = record(model, tokens)
        truth = frobenius(exact_jacobian(model, tokens))
        repeated = record(model, torch.cat([tokens, tokens[:, -1:]], 1)).prediction_input
    assert close(found.truth.values, truth, name)
    assert close(found.calibrated.log_values, path_bound(trace, "calibrated_full").log_values, name)
    assert close(found.estimate.log_values, mean_field_sensitivity(trace).log_values, name)
    assert found.collapse == pytest.approx((repeated - trace.prediction_input).abs().sum().item(), rel=1e-4)


@pytest.mark.parametrize("name", HOOKED_CASES)
def test_the_printed_bound_loses_the_head_that_is_off(name: str) -> None:
    """They see attention alone, so the other route is the formula with that head's pattern crossed out."""
    model, tokens = case(name)
    found = what_if(model, tokens, edits.ablate_head(0, 1), probes=1).after[0]
    with unwritten(model, 0, 1):
        reading = read(model, tokens)
    reading.layers[0].pattern[1] = 0
    bound = reference(reading, "proof")
    expected = matrix_product(bound.edges, bound.nodes)
    assert torch.allclose(found.bound.log_by_layer.exp(), expected, rtol=1e-9)


# ---------------------------------------------------------------- what always holds


def test_the_sound_bound_is_never_below_the_truth(tried: tuple[str, WhatIf]) -> None:
    name, result = tried
    model, tokens = case(name)
    for edit in ATTENTION_EDITS:
        with edits.edited_attention(model, edit):
            truth = spectral(exact_jacobian(model, tokens))
        bound = after(result, edit).calibrated.log_values
        heard = torch.isfinite(bound)
        assert (bound >= truth.log() + math.log1p(-1e-9))[heard].all(), edit.label
        assert (truth[~heard] <= 1e-6 * truth.max()).all(), edit.label


@pytest.mark.parametrize("power", [0.5, 3.0, 10.0])
def test_a_bound_that_is_not_told_of_sharpening_can_be_broken(power: float) -> None:
    """What `edited_trace` is for: with 10 times the scores the untold key and query sides are 10 times too small."""
    model, tokens = case("ln-one-layer")
    with edits.edited_attention(model, edits.sharpen(power)):
        trace = record(model, tokens)
    told = path_bound(edits.edited_trace(trace, edits.sharpen(power)), "calibrated_full").log_values
    untold, frozen = (path_bound(trace, variant).log_values for variant in ("calibrated_full", "calibrated"))
    extra, without = told.exp() - frozen.exp(), untold.exp() - frozen.exp()
    assert torch.allclose(extra, power * without, rtol=1e-6)  # one layer: the derivative's part grows with the power


def test_the_unedited_outcome_is_what_the_measures_say(tried: tuple[str, WhatIf]) -> None:
    name, result = tried
    model, tokens = case(name)
    trace, before = record(model, tokens, node_probes=None), result.before
    assert before.label == "as it is"
    assert result.outcomes[0] is before
    assert [outcome.label for outcome in result.after] == [edit.label for edit in ATTENTION_EDITS]
    assert before.tokens == trace.tokens
    assert torch.equal(before.bound.log_by_layer, path_bound(trace).log_by_layer)
    assert torch.equal(before.calibrated.log_by_layer, path_bound(trace, "calibrated_full").log_by_layer)
    assert torch.equal(before.estimate.log_by_layer, mean_field_sensitivity(trace).log_by_layer)
    assert torch.equal(before.truth.values, osl.measured_sensitivity(model, tokens, probes=None).values)
    assert result.about == before.truth.about == trace.about


def test_the_collapse_distance_is_the_curves(tried: tuple[str, WhatIf]) -> None:
    name, result = tried
    model, tokens = case(name)
    ids = tuple(tokens[0].tolist())
    for outcome, edit in zip(result.outcomes, (None, *ATTENTION_EDITS), strict=True):
        if edit is not None and edit.head is not None:
            continue  # the curve reads attention rows that sum to 1
        with edits.edited_attention(model, edit):
            curve = osl.collapse_curve(model, (ids, (*ids, ids[-1])), (1,), ("float32",), share=False)
        assert outcome.collapse == pytest.approx(curve.l1["float32"].item(), rel=1e-4, abs=1e-5)
        assert outcome.relative_collapse == pytest.approx(curve.relative["float32"].item(), rel=1e-4, abs=1e-6)


def test_probes_are_the_same_under_every_edit() -> None:
    """An edit that changes nothing changes no probed number either: their noise is common."""
    model, tokens = case("ln-gated-rotary")
    nothing = edits.sharpen(1.0)
    result = what_if(model, tokens, nothing, edits.window(N_CTX), probes=2, seed=5)
    assert result.before.truth.probes == 2
    assert result.before.truth.seed == 5
    for outcome, change in zip(result.after, result.changes, strict=True):
        assert torch.allclose(outcome.truth.values, result.before.truth.values, rtol=1e-9)
        assert all(abs(change.median(name)) < 1e-9 for name in MEASURES)
    probed = osl.measured_sensitivity(model, tokens, probes=2, seed=5).values
    assert torch.equal(result.before.truth.values, probed)


# ---------------------------------------------------------------- edits of the tokens


@pytest.mark.parametrize("name", ["bridge-llama", "bridge-gpt2"])
@pytest.mark.parametrize(
    ("edit", "ids", "kept"),
    [
        (edits.separators(2, "w9"), [3, 4, 9, 5, 6, 9, 7], [0, 1, 3, 4, 6]),
        (edits.with_bos(), [1, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5]),
    ],
    ids=label,
)
def test_new_tokens_give_the_numbers_of_a_prompt_of_them(
    edit: edits.Edit, ids: list[int], kept: list[int], name: str
) -> None:
    model, _ = case(name)
    result = what_if(model, "w3 w4 w5 w6 w7", edit, bos=False, probes=None)
    (found,), (change,) = result.after, result.changes
    trace, truth = record(model, ids), osl.measured_sensitivity(model, ids, probes=None)
    assert found.tokens == trace.tokens
    assert found.truth.about == trace.about
    assert torch.equal(found.truth.values, truth.values)
    assert torch.equal(found.bound.log_by_layer, path_bound(trace).log_by_layer)
    assert torch.equal(found.estimate.log_by_layer, mean_field_sensitivity(trace).log_by_layer)
    assert change.places == (0, 1, 2, 3, 4)
    before = osl.measured_sensitivity(model, [3, 4, 5, 6, 7], probes=None).values
    assert torch.allclose(change.truth, (truth.values[kept] / before).log10(), atol=1e-6)
    y, repeated = (record(model, each).prediction_input for each in (ids, [*ids, ids[-1]]))
    assert found.collapse == pytest.approx((y - repeated).abs().sum().item(), rel=1e-4)


def test_dropping_bos_compares_the_tokens_that_stay() -> None:
    model, _ = case("bridge-gpt2")
    result = what_if(model, "w3 w4 w5", edits.without_bos(), bos=True, probes=None)
    assert result.about.bos
    assert not result.after[0].truth.about.bos
    assert result.before.tokens == ("w1", "w3", "w4", "w5")
    assert result.after[0].places == (1, 2, 3) == result.changes[0].places
    with_it, without = (osl.measured_sensitivity(model, ids, probes=None).values for ids in ([1, 3, 4, 5], [3, 4, 5]))
    assert torch.allclose(result.changes[0].truth, (without / with_it[1:]).log10(), atol=1e-9)


# ---------------------------------------------------------------- what changed


def test_changes_are_ratios_token_by_token(tried: tuple[str, WhatIf]) -> None:
    _, result = tried
    for outcome, change in zip(result.after, result.changes, strict=True):
        assert change.label == outcome.label
        for name in ("bound", "calibrated", "estimate"):
            one, two = (getattr(each, name).values for each in (result.before, outcome))
            assert torch.allclose(10 ** getattr(change, name), two / one, rtol=1e-9)
        reached = outcome.calibrated.values > 0
        truth = torch.where(reached, outcome.truth.values, 0.0) / result.before.truth.values
        assert torch.allclose(10**change.truth, truth, rtol=1e-9)
        assert change.cut_off == int((~reached).sum())
        heard = change.truth[reached].tolist()
        middle = sorted(heard)[(len(heard) - 1) // 2], sorted(heard)[len(heard) // 2]
        assert change.median("truth") == pytest.approx(sum(middle) / 2)
        if len(heard) > 2:
            ranks = [each[reached].argsort().argsort().double() for each in (change.estimate, change.truth)]
            expected = torch.corrcoef(torch.stack(ranks))[0, 1].item()
            assert change.spearman == pytest.approx(expected, abs=1e-9)


def test_effective_numbers(tried: tuple[str, WhatIf]) -> None:
    for outcome in tried[1].outcomes:
        for heard, share in (
            (outcome.measured_tokens, outcome.truth.share),
            (outcome.estimated_tokens, outcome.estimate.share),
        ):
            entropy = -sum(s * math.log(s) for s in share.tolist() if s > 0)
            assert heard == pytest.approx(math.exp(entropy), rel=1e-9)
            assert 1 <= heard <= len(outcome.tokens)


def test_tokens_that_a_window_cuts_off() -> None:
    """Two layers of windows of two: only the last three of six tokens are in reach."""
    model, tokens = case("ln-gated-rotary")
    tokens = tokens_for(3, 6)
    result = what_if(model, tokens, edits.window(2), edits.window(1), probes=None)
    change, nothing = result.changes
    assert change.cut_off == 3
    assert torch.isneginf(change.truth[:3]).all()
    assert torch.isneginf(change.estimate[:3]).all()
    assert torch.isfinite(change.truth[3:]).all()
    assert math.isfinite(change.median("estimate"))
    assert nothing.cut_off == 5
    assert math.isnan(nothing.spearman)
    assert result.after[1].measured_tokens == pytest.approx(1)
    assert result.after[1].estimated_tokens == 1
    assert "3 can no longer reach the last one" in result.sentence
    assert "nan" not in result.sentence


def change_of(*rows: list[float]) -> Change:
    return Change("made by hand", tuple(range(len(rows[0]))), *(torch.tensor(row) for row in rows))


def test_a_change_that_nothing_survives() -> None:
    none = [-math.inf, -math.inf]
    change = change_of(none, none, none, none)
    assert change.cut_off == 2
    assert math.isnan(change.spearman)
    assert all(math.isnan(change.median(name)) for name in MEASURES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_can_be_asked_for(variant: str) -> None:
    model, tokens = case("rms-gated-rotary-gqa")
    result = what_if(model, tokens, edits.sharpen(2), variant=variant, probes=1)
    assert result.before.bound.kind == variant
    one, two = (outcome.bound.log_by_layer[0] for outcome in result.outcomes)
    if variant in ("theorem_5_1", "rollout"):  # the constant is open: the path sums alone
        assert torch.allclose(result.changes[0].bound, (two - one) / math.log(10))
    assert torch.isfinite(result.changes[0].bound).all()
    assert variant.split("_")[0] in str(result)
    assert (variant in CALIBRATED) == (variant in ("calibrated", "calibrated_full"))


# ---------------------------------------------------------------- what it says


def test_the_table_holds_the_numbers(tried: tuple[str, WhatIf]) -> None:
    _, result = tried
    text = str(result)
    assert result.about.model in text.splitlines()[0]
    assert max(map(len, text.splitlines())) <= 120
    for outcome, change in zip(result.after, result.changes, strict=True):
        first = outcome.label.split(",")[0]
        (line,) = (line for line in text.splitlines() if line.startswith(f"│ {first}"))
        cells = [cell.strip() for cell in line.strip("│ ").split("│")][1:]
        medians = [change.median(name) for name in MEASURES]
        assert cells[:2] == [str(len(outcome.tokens)), str(change.cut_off)]
        assert [float(cell) for cell in cells[2:6]] == pytest.approx(medians, abs=0.0051)
        assert cells[6] == ("–" if math.isnan(change.spearman) else f"{round(change.spearman, 2) + 0.0:.2f}")
        assert cells[7] == f"{outcome.measured_tokens:.1f} ({outcome.estimated_tokens:.1f})"
        assert cells[8:] == [f"{outcome.collapse:.3g}", f"{outcome.relative_collapse:.2g}"]
    assert " ".join(result.sentence.split()) in " ".join(text.split())
    assert "\n" not in result.sentence


def test_labels_are_no_markup() -> None:
    model, _ = case("bridge-gpt2")
    result = what_if(model, "w3 w4 w5 w6", edits.separators(2, "w9 [bold]"), bos=False, probes=1)
    assert "[bold]" in str(result)


def test_json_there_and_back(tried: tuple[str, WhatIf]) -> None:
    _, result = tried
    back = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert back["kind"] == "what_if"
    assert back["sentence"] == result.sentence
    assert back["about"]["model"] == result.about.model
    for one, two in zip(result.outcomes, (back["before"], *back["after"]), strict=True):
        assert (two["label"], two["tokens"], two["places"]) == (one.label, list(one.tokens), list(one.places))
        assert two["truth"]["values"] == one.truth.values.tolist()
        assert (two["collapse"], two["measured_tokens"]) == (one.collapse, one.measured_tokens)
        assert two["bound"]["kind"] == "proof"
    for one, two in zip(result.changes, back["changes"], strict=True):
        assert two["estimate"]["log10"] == [x if math.isfinite(x) else None for x in one.estimate.tolist()]
        assert two["truth"]["median"] == one.median("truth")
        assert two["cut_off"] == one.cut_off


def test_estimate_and_truth_in_opposite_directions_are_said_to_be() -> None:
    model, tokens = case("ln-one-layer")
    result = what_if(model, tokens, edits.sharpen(3), probes=None, node_probes=None)
    (change,), before = result.changes, result.before
    for shift in (-0.1, 0.1):  # the truth as it was measured, the estimate moved by hand
        rows = before.estimate.log_by_layer + shift * math.log(10)
        told = replace(result.after[0], estimate=replace(before.estimate, log_by_layer=rows))
        notes = replace(result, after=(told,)).notes
        opposite = shift * change.median("truth") < 0 and abs(change.median("truth")) > OPPOSITE
        assert len(notes) == opposite
        for note in notes:
            assert f"by the estimate a typical token's sensitivity {'rises' if shift > 0 else 'falls'}" in note
            assert note in " ".join(str(replace(result, after=(told,))).split())
    assert abs(change.median("truth")) > OPPOSITE
    agreed = replace(result.after[0], estimate=before.estimate, truth=before.truth)
    assert replace(result, after=(agreed,)).notes == ()


def test_results_are_short_and_become_frames(tried: tuple[str, WhatIf]) -> None:
    _, result = tried
    for each in (result, result.before, result.changes[0]):
        assert len(repr(each).splitlines()) <= 12
        assert each._repr_html_().count("<tr>") > 1
    frame = result.to_frame()
    assert list(frame["edit"]) == [outcome.label for outcome in result.outcomes]
    assert frame["truth"][1] == result.changes[0].median("truth")


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("asked", "options", "said"),
    [
        ((), {}, "expected at least one edit, got none"),
        ((edits.window(2), "window"), {}, "expected an edit, got 'window'"),
        ((lambda pattern: pattern,), {}, "expected an edit, got <function"),
        ((edits.adaptive_temperature(),), {}, "expected an edit under which .* is known, got adaptive temperature"),
        ((edits.ablate_head(9, 0),), {}, "expected 0 … 1, the layers of this model, got layer 9"),
        ((edits.window(2), edits.ablate_head(0, 7)), {}, "expected 0 … 3, the heads of this model, got head 7"),
        ((edits.mask_position(6),), {}, "expected 0 … 5, the positions of this prompt, got position 6"),
        ((edits.separators(1, "w9 w9"),), {}, "16 tokens, 17 with the last one repeated"),
        ((edits.separators(1, "w9 w9 w9"),), {}, "n_ctx = 16"),
        ((edits.without_bos(),), {}, "without BOS"),
        ((edits.window(2),), {"variant": "theorem"}, "got variant 'theorem'"),
        ((edits.window(2),), {"probes": 0}, "expected at least 1.*, got probes=0"),
        ((edits.window(2),), {"node_probes": -1}, "got node_probes=-1"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_runs(
    asked: tuple, options: dict, said: str, fresh: tuple[Any, torch.Tensor], count_hooks: Callable
) -> None:
    model, tokens = fresh
    if model.tokenizer is None and any(getattr(edit, "spell", None) for edit in asked):
        said = "without (a )?tokenizer|without BOS"
    before, runs = count_hooks(model), []
    handle = model.embed.register_forward_pre_hook(lambda *arguments: runs.append(1))
    osl.support(model)  # proven once, with this hook; what_if adds no pass
    runs.clear()
    with pytest.raises(InputError, match=said) as caught:
        what_if(model, tokens, *asked, **options)
    handle.remove()
    assert "\n" not in str(caught.value)
    assert not runs
    assert count_hooks(model) == before


def test_a_prompt_without_room_for_a_repeated_token() -> None:
    model, _ = case("ln-one-layer")
    with pytest.raises(InputError, match=f"got the prompt: {N_CTX} tokens, {N_CTX + 1} with"):
        what_if(model, tokens_for(1, N_CTX), edits.window(2))


def test_a_thing_that_is_no_model() -> None:
    with pytest.raises(InputError, match="expected a HookedTransformer or TransformerBridge"):
        what_if(object(), "a prompt", edits.window(2))


def test_no_hook_stays(fresh: tuple[Any, torch.Tensor], count_hooks: Callable) -> None:
    model, tokens = fresh
    hooks, plain = count_hooks(model), record(model, tokens).prediction_input
    what_if(model, tokens, *ATTENTION_EDITS, probes=1)
    assert count_hooks(model) == hooks
    assert torch.equal(record(model, tokens).prediction_input, plain)


# ---------------------------------------------------------------- the real model


def test_every_kind_of_edit_on_the_real_model(smollm2: Any) -> None:
    prompt = "The committee met on Tuesday to discuss the budget. Alice said that the school needed new books"
    tried = edits.separators(3), edits.with_bos(), edits.ablate_head(5, 3), edits.window(4), edits.sharpen(2)
    result = what_if(smollm2, prompt, *tried, probes=4)
    print(f"\n{result}")
    _, _, head, window, sharp = result.changes
    assert len(result.after[0].tokens) == len(result.before.tokens) + (len(result.before.tokens) - 1) // 3
    assert result.after[1].tokens[0] == smollm2.tokenizer.bos_token
    assert result.after[1].places == (None, *range(len(result.before.tokens)))
    # One head of 270 is not heard of; four positions and twice the scores are, and the estimate says so.
    assert abs(head.median("truth")) < 0.1
    assert abs(head.median("estimate")) < 0.1
    for change in (window, sharp):
        assert change.median("truth") > 0.1
        assert change.median("estimate") > 0.1
    for change in result.changes:
        assert change.cut_off == 0
    for outcome in result.outcomes:
        assert (outcome.calibrated.log_values > outcome.truth.values.log()).all()
