"""record() and recording(): what a trace holds is what the model computed, on both classes by one code path."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CASES, NO_HOOKED, bridge, case, has_bridge, has_hooked, hooked, tokenizer, tokens_for

import oversquash_lens as osl
from oversquash_lens.analyses.compare import compare
from oversquash_lens.errors import HookMismatchError, InputError
from oversquash_lens.paths.kinds import VARIANTS

needs_hooked = pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)
needs_both = pytest.mark.skipif(
    not (has_hooked() and has_bridge()), reason="this TransformerLens has no HookedTransformer beside a bridge"
)

Model = Any
Tokens = torch.Tensor


def measures(trace: osl.Trace) -> dict[str, torch.Tensor]:
    """Everything that a trace is turned into, constants included where there are any."""
    profiles = {variant: osl.path_bound(trace, variant) for variant in VARIANTS}
    profiles["mean_field"] = osl.mean_field_sensitivity(trace)
    return {
        name: profile.log_by_layer + (0 if profile.log_constant != profile.log_constant else profile.log_constant)
        for name, profile in profiles.items()
    }


def furthest(one: osl.Trace, two: osl.Trace) -> float:
    """Largest difference of any measure's logarithm at any layer and position."""
    left, right = measures(one), measures(two)
    differences = [(left[name][:-1] - right[name][:-1]).abs().max().item() for name in left]
    differences += [abs((left[name][-1, -1] - right[name][-1, -1]).item()) for name in left]
    return max(differences)


# ---------------------------------------------------------------- what a trace holds


@pytest.mark.parametrize("name", CASES)
def test_residuals_are_those_of_run_with_cache(name: str) -> None:
    model, tokens = case(name)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    n_layers = model.cfg.n_layers
    names = [f"blocks.{i}.hook_resid_pre" for i in range(n_layers)] + [f"blocks.{n_layers - 1}.hook_resid_post"]
    trace = osl.record(model, tokens, attention="kept")
    assert torch.equal(trace.last_residuals, torch.stack([cache[name][0, -1] for name in names]).double())


@pytest.mark.parametrize("name", CASES)
def test_a_trace_holds_what_the_hooks_see(name: str, watch: Callable) -> None:
    model, tokens = case(name)
    layers = range(model.cfg.n_layers)
    parts = ("attn.hook_pattern", "attn.hook_v", "ln1.hook_scale", "ln2.hook_scale", "attn.hook_q", "attn.hook_k")
    seen = watch(
        model,
        tokens,
        "unembed.hook_in",
        "ln_final.hook_scale",
        *(f"blocks.{i}.{part}" for i in layers for part in parts),
    )
    trace = osl.record(model, tokens, attention="kept")
    n, gains = tokens.shape[1], trace.gains
    assert torch.equal(trace.prediction_input, seen["unembed.hook_in"][0, -1].double())
    assert gains.final_scale == seen["ln_final.hook_scale"][0, -1, 0].item()
    for i in layers:
        at = {part: seen[f"blocks.{i}.{part}"][0] for part in parts}
        assert torch.equal(trace.attention[i].rows(0, n), at["attn.hook_pattern"])
        assert torch.equal(trace.attention[i].rows(1, 3), at["attn.hook_pattern"][:, 1:3])
        assert torch.equal(gains.attention_scale[i], at["ln1.hook_scale"][:, 0].double())
        assert torch.equal(gains.mlp_scale[i], at["ln2.hook_scale"][:, 0].double())
        assert torch.equal(gains.value[i], at["attn.hook_v"].transpose(0, 1).double())
        # A rotation changes no norm, so before it and after it are the same.
        assert torch.allclose(gains.query_norm[i], at["attn.hook_q"].double().norm(dim=-1).T, rtol=1e-6)
        assert torch.allclose(gains.key_norm[i], at["attn.hook_k"].double().norm(dim=-1).T, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_trace_has_the_promised_shapes_and_label(name: str) -> None:
    model, tokens = case(name)
    trace = osl.record(model, tokens, node_probes=3, seed=7)
    n, n_layers, d_model = tokens.shape[1], model.cfg.n_layers, model.cfg.d_model
    assert trace.last_residuals.shape == (n_layers + 1, d_model)
    assert trace.prediction_input.shape == (d_model,)
    assert (trace.n_positions, trace.n_layers, len(trace.attention)) == (n, n_layers, n_layers)
    assert torch.equal(trace.token_ids, tokens[0])
    assert trace.token_ids.dtype == torch.long
    assert (trace.gains.node_probes, trace.gains.seed) == (3, 7)
    about = trace.about
    assert (about.n_layers, about.n_heads, about.d_model) == (n_layers, model.cfg.n_heads, d_model)
    assert (about.model_class, about.dtype) == (type(model).__name__, "float64")
    assert (about.folded, about.final_gain, about.bos, about.chat) == (False, "model", False, False)
    assert about.versions["torch"] == torch.__version__.split("+")[0] or about.versions["torch"] == torch.__version__


def test_rows_outside_the_prompt_are_refused(fresh: tuple[Model, Tokens]) -> None:
    trace = osl.record(*fresh)
    for start, stop in ((-1, 2), (3, 3), (0, 7)):
        with pytest.raises(InputError, match="expected 0 ≤ start"):
            trace.attention[0].rows(start, stop)


def test_a_text_and_its_ids_give_the_same_trace() -> None:
    model, _ = case("bridge-llama")
    text = osl.record(model, "w5 w9 w5 w30")
    assert text.tokens == ("w1", "w5", "w9", "w5", "w30")
    assert text.token_ids.tolist() == [1, 5, 9, 5, 30]
    for ids in ([1, 5, 9, 5, 30], torch.tensor([1, 5, 9, 5, 30]), torch.tensor([[1, 5, 9, 5, 30]])):
        same = osl.record(model, ids)
        assert same.tokens == text.tokens
        assert torch.equal(same.last_residuals, text.last_residuals)
        assert furthest(same, text) == 0


def test_recording_gives_what_record_gives(fresh: tuple[Model, Tokens]) -> None:
    model, tokens = fresh
    with osl.recording(model) as recorder, torch.no_grad():
        model(tokens)
    inside, whole = recorder.trace(), osl.record(model, tokens, attention="kept")
    assert inside.tokens == whole.tokens
    assert torch.equal(inside.token_ids, whole.token_ids)
    assert torch.equal(inside.prediction_input, whole.prediction_input)
    assert furthest(inside, whole) == 0


def test_recording_works_inside_run_with_cache(fresh: tuple[Model, Tokens]) -> None:
    model, tokens = fresh
    with osl.recording(model) as recorder, torch.no_grad():
        model.run_with_cache(tokens)
    assert furthest(recorder.trace(), osl.record(model, tokens, attention="kept")) == 0


def test_a_trace_does_not_change_with_the_users_cache(fresh: tuple[Model, Tokens]) -> None:
    """A cache that the user made in the same pass shares no memory with the trace."""
    model, tokens = fresh
    with osl.recording(model) as recorder, torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    trace = recorder.trace()
    before = measures(trace)
    for activation in cache.values():
        activation.zero_()
    after = measures(trace)
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------- leaving the model alone


def test_recording_changes_no_logit(fresh: tuple[Model, Tokens]) -> None:
    model, tokens = fresh
    with torch.no_grad():
        plain = model(tokens).clone()
        with osl.recording(model):
            during = model(tokens).clone()
        after = model(tokens)
    assert torch.equal(plain, during)
    assert torch.equal(plain, after)


def test_recording_changes_no_activation(fresh: tuple[Model, Tokens]) -> None:
    model, tokens = fresh
    with torch.no_grad():
        _, plain = model.run_with_cache(tokens)
        with osl.recording(model):
            _, during = model.run_with_cache(tokens)
    assert plain.keys() == during.keys()
    assert all(torch.equal(plain[name], during[name]) for name in plain.keys())  # noqa: SIM118


def test_recording_leaves_the_callers_graph_whole(fresh: tuple[Model, Tokens]) -> None:
    """Gradients flow through a recorded pass as through any other, and the trace holds none of the graph."""
    model, tokens = fresh
    parameter = next(p for p in model.blocks[0].parameters() if p.ndim == 2)

    def gradient() -> torch.Tensor:
        (grad,) = torch.autograd.grad(model(tokens)[0, -1].square().sum(), parameter)
        return grad

    with torch.enable_grad():
        plain = gradient()
        with osl.recording(model) as recorder:
            during = gradient()
    assert torch.equal(plain, during)
    trace = recorder.trace()
    held = [trace.last_residuals, trace.prediction_input, *(a.rows(0, 6) for a in trace.attention)]
    held += [value for value in vars(trace.gains).values() if isinstance(value, torch.Tensor)]
    held += [value for value in vars(trace.gains.weights).values() if value is not None]
    assert not any(tensor.requires_grad for tensor in held)


def test_record_works_in_every_gradient_mode(fresh: tuple[Model, Tokens]) -> None:
    model, tokens = fresh
    plain = osl.record(model, tokens)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            trace = osl.record(model, tokens)
        assert furthest(trace, plain) == 0, mode.__name__


def test_recording_works_in_inference_mode(fresh: tuple[Model, Tokens]) -> None:
    model, tokens = fresh
    with torch.inference_mode(), osl.recording(model) as recorder:
        model(tokens)
    assert furthest(recorder.trace(), osl.record(model, tokens, attention="kept")) == 0


def record_twice(model: Model, tokens: Tokens) -> None:
    """Two passes in one recording: refused at the second."""
    with osl.recording(model):
        model(tokens)
        model(tokens)


def test_nothing_refers_to_the_model_afterwards(fresh: tuple[Model, Tokens]) -> None:
    model, tokens = fresh
    trace = osl.record(model, tokens)
    with osl.recording(model) as recorder:
        model(tokens)
    store: dict = {}
    hooks = osl.last_token_residual_hooks(model, store) + osl.attention_path_hooks(model, store)
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    osl.measured_sensitivity(model, tokens, probes=2)
    referrers = gc.get_referrers(model)
    owned = [r for r in referrers if type(r).__module__.startswith("oversquash_lens")]
    assert not owned
    assert not [r for r in referrers if any(r is hook.args for _, hook in hooks)]
    assert recorder.trace().n_positions == trace.n_positions == 6


@pytest.mark.parametrize("name", ["hooked-ln", "hooked-rms", "bridge-gpt2", "bridge-llama"])
def test_a_model_goes_when_its_owner_lets_it_go(name: str, make: Callable) -> None:
    """Traces, recorders, hooks and truths stay; the model and its weights are given back."""
    model, tokens = make(name), tokens_for(5, 6)
    reference = weakref.ref(model)
    trace = osl.record(model, tokens)
    with osl.recording(model) as recorder:
        model(tokens)
    with pytest.raises(HookMismatchError):
        record_twice(model, tokens)
    store: dict = {}
    hooks = osl.last_token_residual_hooks(model, store) + osl.attention_path_hooks(model, store)
    truth = osl.measured_sensitivity(model, tokens, probes=2, freeze=("attention",))
    del model
    gc.collect()
    assert reference() is None
    assert len(hooks) == 3 + 3 * 2
    assert furthest(trace, recorder.trace()) < 1e-5
    assert truth.values.shape == (6,)


# ---------------------------------------------------------------- weights that change between two recordings

EDITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda weight: weight.mul_(1.5),
    ".data": lambda weight: weight.data.mul_(1.5),
    ".data, sign": lambda weight: weight.data.neg_(),
    ".data, two entries swapped": lambda weight: weight.data.copy_(weight.data.flip(0)),
    "back and forth": lambda weight: (weight.mul_(2), weight.mul_(0.5), weight.mul_(3)),
}


def output_matrix(model: Model) -> torch.nn.Parameter:
    """What the first layer's heads write through: W_O, o_proj or attn.o."""
    parameters = dict(model.blocks[0].attn.named_parameters())
    (name,) = (n for n in parameters if n == "W_O" or ("weight" in n and ("o_proj" in n or n.startswith("o."))))
    return parameters[name]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["hooked-ln", "hooked-rms", "bridge-gpt2", "bridge-llama"])
def test_edited_weights_are_measured_anew(name: str, edit: str, make: Callable) -> None:
    """A model recorded before and after an edit gives what a model that always was like this gives."""
    used, unused, tokens = make(name), make(name), tokens_for(5, 6)
    before = osl.record(used, tokens)
    for model in (used, unused):
        with torch.no_grad():
            EDITS[edit](output_matrix(model))
    after = osl.record(used, tokens)
    assert furthest(after, osl.record(unused, tokens)) == 0
    assert furthest(after, before) > 1e-3


@pytest.mark.parametrize("name", ["hooked-ln", "bridge-gpt2"])
def test_weights_edited_inside_a_recording_are_those_measured(name: str, make: Callable) -> None:
    """An edit between opening the recording and the pass is in the trace, or is refused: never half of it."""
    model, tokens = make(name), tokens_for(5, 6)
    with osl.recording(model) as recorder:
        with torch.no_grad():
            output_matrix(model).mul_(3)
        model(tokens)
    try:
        trace = recorder.trace()
    except HookMismatchError:
        return
    assert furthest(trace, osl.record(model, tokens, attention="kept")) == 0


# ---------------------------------------------------------------- folded norms


def llama_folder(folder: Path, *, tied: bool) -> Path:
    """A tiny Llama on disk, every gain away from 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in hf.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if noise.ndim == 1 else noise * noise.shape[1] ** -0.5)
    hf.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    return llama_folder(tmp_path_factory.mktemp("llama"), tied=request.param), request.param


@pytest.fixture(scope="module")
def folded_pair(folder: tuple[Path, bool]) -> tuple[Model, Model, bool]:
    """The same float64 weights as a HookedTransformer, plain and folded; and whether they are tied."""
    if not has_hooked():
        pytest.skip(NO_HOOKED)
    path, tied = folder
    options = {"kind": "hooked", "dtype": "float64", "device": "cpu"}
    return osl.load_model(path, **options), osl.load_model(path, **options, fold_ln=True), tied


def test_folding_is_said_and_undone_where_the_gain_is_known(folded_pair: tuple[Model, Model, bool]) -> None:
    plain, folded, tied = (
        osl.record(folded_pair[0], tokens_for(2, 6)),
        osl.record(folded_pair[1], tokens_for(2, 6)),
        folded_pair[2],
    )
    assert (plain.about.folded, plain.about.final_gain) == (False, "model")
    assert (folded.about.folded, folded.about.final_gain) == (True, "restored" if tied else "unknown")
    assert "folded" in str(folded.about)
    if tied:
        assert torch.allclose(folded.prediction_input, plain.prediction_input, rtol=0, atol=1e-5)
        assert furthest(folded, plain) < 1e-5
    else:  # all but the last norm's gain is still there
        left, right = measures(folded), measures(plain)
        for name in left:
            shift = left[name][:-1] - right[name][:-1]
            assert shift.max() - shift.min() < 1e-5, name
        assert any("final gain" in note for note in osl.mean_field_sensitivity(folded).notes)


def test_folding_changes_the_truth_only_where_the_gain_is_not_known(folded_pair: tuple[Model, Model, bool]) -> None:
    plain, folded, tied = folded_pair
    for norm in ("fro", "spectral"):
        one, two = (
            osl.measured_sensitivity(m, tokens_for(2, 6), probes=None, norm=norm).values for m in (plain, folded)
        )
        assert torch.allclose(one, two, rtol=1e-5) == tied


def test_an_unknown_gain_is_not_compared_with_a_known_one(folded_pair: tuple[Model, Model, bool]) -> None:
    plain, folded, tied = folded_pair
    tokens = tokens_for(2, 6)
    mine, theirs = (osl.mean_field_sensitivity(osl.record(model, tokens)) for model in (plain, folded))
    truth = osl.measured_sensitivity(plain, tokens, probes=None)
    if tied:
        assert compare(mine, theirs).max_log10_ratio == pytest.approx(0, abs=1e-5)
        assert compare(theirs, truth).spearman == compare(mine, truth).spearman
        return
    for pair in ((mine, theirs), (theirs, mine), (theirs, truth), (truth, theirs)):
        with pytest.raises(InputError, match="final gain"):
            compare(*pair)
    assert compare(theirs, theirs).spearman == pytest.approx(1)


@needs_hooked
def test_a_folded_layernorm_is_said_to_be_folded() -> None:
    """Untied, so its final gain is not known. Rollout sees patterns only: as before, to TransformerLens' folding."""
    plain, folded = hooked(6), hooked(6, norm="LNPre")  # TransformerLens 2 folds into a model without gains only
    folded.load_and_process_state_dict(plain.state_dict(), center_writing_weights=False, center_unembed=False)
    one, two = (osl.record(model, tokens_for(6, 6)) for model in (plain, folded))
    assert (two.about.folded, two.about.final_gain) == (True, "unknown")
    rollouts = [osl.path_bound(trace, "rollout").share_by_layer for trace in (one, two)]
    assert torch.allclose(*rollouts, rtol=1e-5)


@pytest.mark.skipif(not has_bridge(), reason="this TransformerLens (2) has no TransformerBridge")
def test_a_bridge_in_compatibility_mode_says_whether_it_is_folded() -> None:
    tokens = tokens_for(6, 6)
    plain, folded, kept = (bridge(6, "llama") for _ in range(3))
    folded.enable_compatibility_mode()
    kept.enable_compatibility_mode(no_processing=True)
    before, after, same = (osl.record(model, tokens) for model in (plain, folded, kept))
    assert (after.about.folded, after.about.final_gain) == (True, "unknown")
    assert (same.about.folded, same.about.final_gain) == (False, "model")
    assert furthest(same, before) < 1e-6
    left, right = osl.mean_field_sensitivity(after), osl.mean_field_sensitivity(before)
    assert torch.allclose(left.log_by_layer[:-1], right.log_by_layer[:-1], rtol=0, atol=1e-5)


@needs_both
def test_both_classes_give_one_trace(folder: tuple[Path, bool]) -> None:
    """The same weights as either class; a bridge's norms and softmax are float32, whence 1e-4."""
    tokens = tokens_for(2, 6)
    one, two = (
        osl.record(osl.load_model(folder[0], kind=kind, dtype="float64", device="cpu"), tokens)
        for kind in ("hooked", "bridge")
    )
    assert torch.allclose(one.last_residuals, two.last_residuals, rtol=1e-4, atol=1e-5)
    assert torch.allclose(one.prediction_input, two.prediction_input, rtol=1e-4, atol=1e-5)
    for left, right in zip(one.attention, two.attention, strict=True):
        assert torch.allclose(left.rows(0, 6), right.rows(0, 6), atol=1e-5)
    assert furthest(one, two) < 1e-4


# ---------------------------------------------------------------- arguments


def test_exact_node_gains_are_as_many_probes_as_directions(fresh: tuple[Model, Tokens]) -> None:
    model, tokens = fresh
    exact = osl.record(model, tokens, node_probes=None)
    assert exact.gains.node_probes == model.cfg.d_model
    many = osl.record(model, tokens, node_probes=10_000, seed=3)
    assert torch.equal(exact.gains.node_gain, many.gains.node_gain)


def test_a_seed_draws_the_same_probes_again(fresh: tuple[Model, Tokens]) -> None:
    first, again, other = (osl.record(*fresh, seed=seed).gains.node_gain for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("seed", [-5, 2**40, 2**62, 2**63, 2**80])
def test_a_seed_of_64_bits_is_taken_and_a_larger_one_refused(seed: int) -> None:
    model, tokens = case("bridge-gpt2")
    for measure in (lambda: osl.record(model, tokens, seed=seed).gains.seed, lambda: truth_seed(model, tokens, seed)):
        if abs(seed) < 2**63:
            assert measure() == seed
        else:
            with pytest.raises(InputError, match="seed"):
                measure()


def truth_seed(model: Model, tokens: Tokens, seed: int) -> int | None:
    return osl.measured_sensitivity(model, tokens, probes=2, seed=seed).seed


@pytest.mark.parametrize("node_probes", [0, -1])
def test_no_node_probes_are_refused(node_probes: int, fresh: tuple[Model, Tokens]) -> None:
    with pytest.raises(InputError, match="node_probes"):
        osl.record(*fresh, node_probes=node_probes)


NO_MODELS = """
import torch, oversquash_lens as osl
from oversquash_lens.errors import InputError
for thing in (None, "gpt2", torch.nn.Linear(2, 2)):
    for ask in (
        lambda: osl.record(thing, [1, 2]),
        lambda: osl.record(thing, "some text"),
        lambda: osl.recording(thing).__enter__(),
        lambda: osl.measured_sensitivity(thing, [1, 2]),
        lambda: osl.audit(thing, [1, 2]),
        lambda: osl.last_token_residual_hooks(thing, {}),
        lambda: osl.attention_path_hooks(thing, {}),
    ):
        try:
            ask()
        except InputError as error:
            assert "expected a HookedTransformer or TransformerBridge" in str(error), (thing, str(error))
        else:
            raise AssertionError(thing)
"""


def test_what_is_no_hooked_model_is_refused() -> None:
    """In a process of its own, where no type checker answers before we do."""
    done = subprocess.run([sys.executable, "-c", NO_MODELS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
