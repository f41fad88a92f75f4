"""The one door: what a model must be before anything is measured, and what is said where it is not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import D_VOCAB, N_CTX, NO_BRIDGE, NO_HOOKED, has_bridge, has_hooked, hooked, tokenizer, tokens_for
from zoo import transformers_model, zoo

import oversquash_lens as osl
from oversquash_lens.capture import proof
from oversquash_lens.capture.subject import Subject
from oversquash_lens.errors import HookMismatchError, InputError, ModelError, OversquashError

Model = Any
needs_hooked = pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)
needs_bridge = pytest.mark.skipif(not has_bridge(), reason=NO_BRIDGE)

IDS = [1, 7, 9, 3, 20, 11]
SIZE = {"vocab_size": D_VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": N_CTX}
SIZE |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
DOORS: dict[str, Callable[[Model], Any]] = {
    "record": lambda model: osl.record(model, IDS),
    "recorded fused or anew": lambda model: osl.record(model, IDS, attention="recomputed"),
    "recording": lambda model: osl.recording(model).__enter__(),
    "record_batch": lambda model: osl.record_batch(model, [IDS, IDS]),
    "truth": lambda model: osl.measured_sensitivity(model, IDS, probes=2),
    "correction": lambda model: osl.probe_corrected_sensitivity(model, IDS),
    "collapse": lambda model: osl.collapse_curve(model, lambda k: [1, *[7] * k, 9], (1, 2)),
    "audit": lambda model: osl.audit(model, IDS, probes=2),
    "support": osl.support,
    "residual hooks": lambda model: osl.last_token_residual_hooks(model, {}),
    "path hooks": lambda model: osl.attention_path_hooks(model, {}),
    "edits": lambda model: osl.edited_attention(model, osl.edits.window(2)).__enter__(),
}
# Doors that show what the user's own pass does, and so do not try the user's hooks beforehand.
OWN_PASS = {"recording"}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def refusal(ask: Callable[[], Any], kind: type[OversquashError] = ModelError) -> str:
    """The one-line error that a call ends in."""
    with pytest.raises(kind) as caught:
        ask()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def drawn(family: str, **config: Any) -> Model:
    """A tiny transformers model of this family, every weight drawn."""
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZE | config))
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.3 * noise if noise.ndim == 1 else noise * noise.shape[-1] ** -0.5)
    made.config.architectures = [type(made).__name__]
    return made.eval()


def bridged(made: Model) -> Model:
    from transformer_lens.model_bridge import TransformerBridge

    made.set_attn_implementation("eager")
    return TransformerBridge.boot_transformers(
        "tiny", hf_model=made, tokenizer=tokenizer(), dtype=torch.float32, device="cpu"
    )


def loaded(made: Model, folder: Path) -> Model:
    """The same by `load_model`, from a folder."""
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return osl.load_model(folder, kind="bridge", device="cpu")


# ---------------------------------------------------------------- 1. the function is one


@needs_bridge
@pytest.mark.parametrize("family", ["Cohere", "Cohere2", "StableLm"])
@pytest.mark.parametrize("made", ["booted", "loaded"])
def test_a_bridge_that_computes_another_function_is_refused_at_every_door(
    family: str, made: str, tmp_path: Path
) -> None:
    """TransformerLens 3 differs from transformers in all three; 4 mended some: a direct comparison decides."""
    wrapped = drawn(family)
    with torch.no_grad():
        expected = wrapped(torch.tensor([IDS])).logits.log_softmax(-1)
    model = bridged(wrapped) if made == "booted" else loaded(wrapped, tmp_path)
    with torch.no_grad():
        apart = (model(torch.tensor([IDS])).log_softmax(-1) - expected).abs().max()
    if apart < 1e-5:
        assert osl.support(model)["truth"].state != "refused"
        return
    for door, ask in DOORS.items():
        said = refusal(lambda ask=ask: ask(model))
        assert "computes another function" in said, door
        assert "log-probabilities differ by 0." in said, door


@needs_bridge
def test_a_loaded_model_is_held_against_the_one_before_wrapping(tmp_path: Path) -> None:
    """What the bridge computes is changed behind transformers' back, in code that only the bridge runs."""
    model = loaded(drawn("Llama"), tmp_path)
    assert osl.support(model)["truth"] == ("supported", "")
    other = loaded(drawn("Llama"), tmp_path)
    reference = proof._references[other]
    doubled = proof.Predictions(2 * reference.predictions.logits, reference.predictions.y)
    proof._references[other] = proof.Reference(reference.ids, doubled, reference.weights)
    assert "the transformers model it was made from" in refusal(lambda: osl.record(other, IDS))


@needs_bridge
def test_edited_weights_are_compared_with_the_wrapped_modules_instead(tmp_path: Path) -> None:
    model = loaded(drawn("Llama"), tmp_path)
    before = osl.measured_sensitivity(model, IDS, probes=None).values
    with torch.no_grad():
        model.blocks[0].mlp.out.weight.mul_(3)
    assert osl.support(model)["truth"] == ("supported", "")
    assert not torch.allclose(before, osl.measured_sensitivity(model, IDS, probes=None).values)


@needs_bridge
def test_copies_of_joint_projections_may_be_edited() -> None:
    """A bridge splits joint projections into copies; editing these changes its function alone, and is measured."""
    model = zoo("gpt-neox", "bridge")
    with torch.no_grad():
        model.blocks[0].attn.q.original_component.weight.mul_(2)
    supported = osl.support(model)
    assert "copies" in supported["truth"].why
    assert supported["mean_field"].state != "refused"
    assert osl.record(model, IDS).route == "kept"


@needs_hooked
def test_a_model_with_nothing_to_compare_says_so() -> None:
    assert "not compared with transformers" in osl.support(hooked(1))["truth"].why


@needs_hooked
@pytest.mark.parametrize(("what", "value"), [("b_U", float("inf")), ("W_U", float("nan")), ("b_U", float("-inf"))])
def test_weights_that_are_no_numbers_are_refused_at_every_door(what: str, value: float) -> None:
    model = hooked(1)
    with torch.no_grad():
        getattr(model.unembed, what).view(-1)[3] = value
    for door, ask in DOORS.items():
        assert f"unembed.{what} hold NaN or infinite values" in refusal(lambda ask=ask: ask(model)), door


# ---------------------------------------------------------------- 2. it is a fixed function


@needs_bridge
@pytest.mark.parametrize(
    ("family", "config", "word"),
    [
        ("gpt2", {"attn_pdrop": 0.1, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, "p = 0.1"),
        ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.3}, "p = 0.3"),
        ("llama", {"attention_dropout": 0.2}, "attention_dropout = 0.2"),
        ("opt", {"layerdrop": 0.1, "dropout": 0.0}, "drop"),
        ("gpt-neox", {"hidden_dropout": 0.1}, "p = 0.1"),
    ],
)
def test_dropout_is_refused_wherever_it_is(family: str, config: dict, word: str) -> None:
    model = zoo(family, "bridge", **config)
    kept = osl.record(model, IDS)
    model.train()
    for door, ask in DOORS.items():
        said = refusal(lambda ask=ask: ask(model))
        assert "model.eval()" in said, door
        assert word in said, door
    model.eval()
    assert torch.equal(osl.record(model, IDS).last_residuals, kept.last_residuals)


@needs_bridge
def test_training_mode_without_dropout_is_no_obstacle() -> None:
    model = zoo("llama", "bridge")
    expected = osl.record(model, IDS).last_residuals
    assert torch.equal(osl.record(model.train(), IDS).last_residuals, expected)


@needs_hooked
def test_a_hooked_transformer_is_in_training_mode_and_fixed() -> None:
    model = hooked(1).train()
    assert model.training
    osl.record(model, IDS)


def random_hook(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
    return value + 0.1 * torch.randn_like(value)


class Counting:
    """A hook with a memory: each call adds more than the one before."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, value: torch.Tensor, hook: Any = None) -> torch.Tensor:
        self.calls += 1
        edited = value.clone()
        edited[..., ::2] += 0.3 * self.calls
        return edited


@pytest.mark.parametrize("make_hook", [lambda: random_hook, Counting], ids=["random", "stateful"])
def test_a_hook_that_makes_the_function_another_each_time_is_named(
    make_hook: Callable, fresh: tuple[Model, torch.Tensor]
) -> None:
    model, _ = fresh
    model.add_hook("blocks.1.hook_resid_pre", make_hook())
    for door, ask in DOORS.items():
        if door in OWN_PASS:
            continue
        said = refusal(lambda ask=ask: ask(model))
        assert "not a fixed function" in said, door
        assert "blocks.1" in said, door
    model.reset_hooks()
    osl.record(model, IDS)


def test_a_steering_hook_is_measured_and_a_hook_for_one_far_position_too(fresh: tuple[Model, torch.Tensor]) -> None:
    model, _ = fresh
    plain = osl.measured_sensitivity(model, IDS, probes=None).values

    def far(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
        value = value.clone()
        value[:, 10] *= 2  # more positions than the proof has tokens
        return value

    model.add_hook("hook_embed", lambda value, hook: 2 * value)
    steered = osl.measured_sensitivity(model, IDS, probes=None).values
    assert not torch.allclose(plain, steered)
    model.reset_hooks()
    model.add_hook("blocks.0.hook_resid_pre", far)
    assert osl.measured_sensitivity(model, [*IDS, *IDS], probes=2).values.shape == (12,)


def test_the_users_random_numbers_go_on_as_if_nothing_was_proven(make: Callable) -> None:
    model = make("bridge-llama")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    osl.support(model)
    assert torch.equal(torch.rand(4), expected)


# ---------------------------------------------------------------- 3. it is causal


def bidirectional(start: int, stop: int) -> Callable:
    """A hook that lets positions of a prefix see all of it."""

    def mix(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
        value = value.clone()
        value[:, start:stop] += value[:, start:stop].mean(1, keepdim=True)
        return value

    return mix


@needs_bridge
def test_an_encoder_is_refused_at_every_door() -> None:
    import transformers

    config = transformers.BertConfig(
        **{key: SIZE[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        num_attention_heads=4,
        max_position_embeddings=N_CTX,
    )
    made = transformers.BertForMaskedLM(config).eval()
    made.config.architectures = ["BertForMaskedLM"]
    model = bridged(made)
    for door, ask in DOORS.items():
        assert "causal" in refusal(lambda ask=ask: ask(model), OversquashError), door


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (0, 8), (2, 6)])
def test_a_prefix_model_is_refused(start: int, stop: int, fresh: tuple[Model, torch.Tensor]) -> None:
    model, _ = fresh
    model.add_hook("blocks.0.hook_resid_pre", bidirectional(start, stop))
    for door, ask in DOORS.items():
        if door not in OWN_PASS:
            assert "is not causal" in refusal(lambda ask=ask: ask(model)), door


@needs_hooked
def test_a_prefix_of_two_tokens_inside_the_model_itself_is_found() -> None:
    model = hooked(1)
    own = type(model.blocks[0]).forward

    def forward(self: Any, residual: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return own(self, bidirectional(0, 2)(residual), *args, **kwargs)

    model.blocks[0].__class__ = type("PrefixBlock", (type(model.blocks[0]),), {"forward": forward})
    assert "is not causal" in refusal(lambda: osl.measured_sensitivity(model, IDS, probes=2))


# ---------------------------------------------------------------- 4. hooks are heard; 5. what is supported


@needs_bridge
@pytest.mark.parametrize("name", ["gpt-j", "opt"])
def test_delegated_attention_refuses_freezing_and_edits_by_name(name: str) -> None:
    model = zoo(name, "bridge")
    assert osl.support(model)["attention frozen"].state == "refused"
    assert "attention" in refusal(lambda: osl.measured_sensitivity(model, IDS, freeze=("attention",)))
    assert "drop the edit" in refusal(lambda: osl.edited_attention(model, osl.edits.window(2)).__enter__())
    osl.record(model, IDS)


@needs_hooked
@pytest.mark.parametrize("config", [{"positional_embedding_type": "shortformer"}], ids=["shortformer"])
def test_support_says_refused_where_no_recording_can_be_made(config: dict) -> None:
    model = zoo("attention-only", "hooked", **config)
    verdicts = osl.support(model)
    said = refusal(lambda: osl.record(model, IDS), HookMismatchError)
    assert "hook of yours" not in said
    for measure in ("printed bounds", "calibrated", "calibrated_full", "mean_field"):
        assert verdicts[measure].state == "refused"
        assert "layer 0, attn.hook_q" in verdicts[measure].why
    assert verdicts["truth"].state == "supported"
    osl.measured_sensitivity(model, IDS, probes=2)


@needs_bridge
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("GPTNeo", {"attention_types": [[["global", "local"], 1]], "num_key_value_heads": 4, "window_size": 4}),
        ("Granite", {"residual_multiplier": 3.0, "attention_multiplier": 0.3}),
    ],
)
def test_support_and_record_of_other_bridges_agree(family: str, config: dict) -> None:
    model = bridged(drawn(family, **config))
    verdict = osl.support(model)["mean_field"]
    if verdict.state == "refused":
        assert "hook of yours" not in refusal(lambda: osl.record(model, IDS), OversquashError)
    else:
        osl.record(model, IDS)


@needs_hooked
def test_an_activation_is_what_it_computes_whatever_it_is_called() -> None:
    model = zoo("gpt2", "hooked")
    expected = osl.mean_field_sensitivity(osl.record(model, IDS)).log_values
    model.cfg.act_fn = "gelu_of_nobody"
    assert torch.equal(osl.mean_field_sensitivity(osl.record(model, IDS)).log_values, expected)


@needs_hooked
@pytest.mark.parametrize("activation", ["solu_ln", "solu"])
def test_an_unknown_activation_refuses_recordings_and_nothing_else(activation: str) -> None:
    model = zoo("gpt2", "hooked", act_fn=activation)
    assert repr(activation) in refusal(lambda: osl.record(model, IDS))
    verdicts = osl.support(model)
    assert verdicts["mean_field"].state == verdicts["calibrated"].state == "refused"
    assert verdicts["truth"].state == verdicts["attention frozen"].state == "supported"
    store: dict = {}
    model.run_with_hooks(tokens_for(1, 6), fwd_hooks=osl.attention_path_hooks(model, store))
    assert osl.path_products(store, "rollout")[0].sum() == pytest.approx(1)
    osl.measured_sensitivity(model, IDS, probes=2)
    osl.collapse_curve(model, lambda k: [1, *[7] * k, 9], (1, 2))


def test_a_hook_is_blamed_only_where_one_is_attached(fresh: tuple[Model, torch.Tensor]) -> None:
    model, _ = fresh
    model.add_hook("blocks.1.attn.hook_z", lambda value, hook: 2 * value)
    assert "a hook of yours, on blocks.1.attn" in refusal(lambda: osl.record(model, IDS), HookMismatchError)


@needs_bridge
def test_a_model_without_attention_has_a_truth_and_no_paths() -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=D_VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)
    made = transformers.MambaForCausalLM(config).eval()
    made.config.architectures = ["MambaForCausalLM"]
    model = bridged(made)
    verdicts = osl.support(model)
    assert verdicts["truth"].state == "supported"
    assert verdicts["mean_field"].state == "refused"
    assert "no attention in its first block" in refusal(lambda: osl.record(model, IDS))
    assert osl.measured_sensitivity(model, IDS, probes=2).values.shape == (len(IDS),)


@needs_bridge
def test_an_encoder_with_a_decoder_is_refused() -> None:
    import transformers

    size = {"vocab_size": D_VOCAB, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    made = transformers.T5ForConditionalGeneration(transformers.T5Config(**size, decoder_start_token_id=0)).eval()
    made.config.architectures = ["T5ForConditionalGeneration"]
    model = bridged(made)
    for door, ask in DOORS.items():
        assert "expected a causal decoder" in refusal(lambda ask=ask: ask(model)), door


@needs_bridge
def test_the_same_recording_twice_of_a_bridge_that_hooks_itself() -> None:
    model = bridged(drawn("Granite"))
    first, second = (osl.record(model, IDS, attention="recomputed") for _ in range(2))
    assert torch.equal(first.last_residuals, second.last_residuals)


def test_a_trace_says_why_its_attention_was_recorded_as_it_was(fresh: tuple[Model, torch.Tensor]) -> None:
    model, _ = fresh
    assert osl.record(model, IDS, attention="kept").route_reason == "asked for"
    reason = osl.record(model, IDS).route_reason
    assert reason
    model.add_hook("blocks.0.attn.hook_pattern", lambda value, hook: None)
    assert "blocks.0.attn" in osl.record(model, IDS).route_reason


# ---------------------------------------------------------------- classes


@needs_hooked
def test_a_subclass_is_what_it_is_made_from() -> None:
    plain, made = zoo("llama", "hooked"), zoo("llama", "hooked")
    made.__class__ = type("HookedSAETransformer", (type(made),), {})
    for attention in ("kept", "recomputed"):
        one, other = (osl.record(model, IDS, attention=attention) for model in (plain, made))
        assert torch.equal(osl.mean_field_sensitivity(one).log_values, osl.mean_field_sensitivity(other).log_values)
    truths = [osl.measured_sensitivity(model, IDS, probes=None).values for model in (plain, made)]
    assert torch.equal(*truths)


@needs_bridge
def test_a_subclass_of_the_bridge_and_of_its_attention() -> None:
    model = zoo("gpt-j", "bridge")
    model.__class__ = type("MyBridge", (type(model),), {})
    for block in model.blocks:
        block.attn.__class__ = type("MyAttention", (type(block.attn),), {})
    assert osl.support(model)["attention frozen"].state == "refused"
    osl.record(model, IDS)


@needs_hooked
def test_ungrouped_queries_and_keys_are_recorded() -> None:
    model = zoo("llama", "hooked")
    plain = osl.mean_field_sensitivity(osl.record(model, IDS)).log_values
    model.cfg.ungroup_grouped_query_attention = True
    assert torch.allclose(osl.mean_field_sensitivity(osl.record(model, IDS)).log_values, plain, atol=1e-9)


@pytest.mark.parametrize(
    "thing", [None, 3, "gpt2", torch.nn.Linear(2, 2), object()], ids=lambda thing: type(thing).__name__
)
def test_what_is_no_hooked_model(thing: Any) -> None:
    for door, ask in DOORS.items():
        assert "load_model" in refusal(lambda ask=ask: ask(thing), InputError), door


# ---------------------------------------------------------------- 6. surroundings


@pytest.fixture(params=["hooked-ln", "bridge-llama"])
def single(request: pytest.FixtureRequest, make: Callable) -> Model:
    return make(request.param).to(torch.float32)


def test_autocast_is_off_inside(single: Model) -> None:
    expected = osl.record(single, IDS), osl.measured_sensitivity(single, IDS, probes=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = osl.record(single, IDS), osl.measured_sensitivity(single, IDS, probes=None)
        with osl.recording(single) as recorder, torch.no_grad():
            single(torch.tensor([IDS]))
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found[0].last_residuals, expected[0].last_residuals)
    assert torch.allclose(recorder.trace().last_residuals, expected[0].last_residuals, atol=1e-5)  # another route
    assert torch.equal(found[1].values, expected[1].values)


def test_autocast_that_begins_inside_a_recording_is_named(single: Model) -> None:
    def ask() -> None:
        with osl.recording(single), torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            single(torch.tensor([IDS]))

    assert "torch.autocast('cpu')" in refusal(ask, OversquashError)


@pytest.mark.parametrize("name", ["hooked-ln", "bridge-llama"])
def test_a_model_made_and_measured_in_inference_mode(name: str, make: Callable) -> None:
    plain = make(name)
    with torch.inference_mode():
        model = make(name)
        trace = osl.record(model, IDS)
        truth = osl.measured_sensitivity(model, IDS, probes=None)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(trace.last_residuals, osl.record(plain, IDS).last_residuals)
    assert torch.equal(truth.values, osl.measured_sensitivity(plain, IDS, probes=None).values)


def test_compiled_wrappers_are_unwrapped(single: Model) -> None:
    expected = osl.record(single, IDS).last_residuals
    assert torch.equal(osl.record(torch.compile(single, backend="eager"), IDS).last_residuals, expected)
    single.compile(backend="eager")
    assert torch.equal(osl.record(single, IDS).last_residuals, expected)


def test_anomaly_detection_is_survived(single: Model) -> None:
    expected = osl.measured_sensitivity(single, IDS, probes=None).values
    with torch.autograd.set_detect_anomaly(True):
        osl.record(single, IDS)
        assert torch.allclose(osl.measured_sensitivity(single, IDS, probes=None).values, expected)


def test_threads_take_turns(single: Model) -> None:
    prompts = [[1, 7, 9, i] for i in range(3, 9)]
    expected = [osl.record(single, prompt).last_residuals for prompt in prompts]
    found: dict[int, Any] = {}

    def run(i: int) -> None:
        try:
            found[i] = osl.record(single, prompts[i]).last_residuals
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, each in enumerate(expected):
        assert torch.allclose(found[i], each, rtol=1e-5, atol=1e-6)  # equal but for how threads share out the sums


def test_a_pass_of_another_thread_inside_a_recording_is_refused(single: Model) -> None:
    said: list[str] = []

    def run() -> None:
        try:
            single(torch.tensor([IDS]))
        except OversquashError as error:
            said.append(str(error))

    with osl.recording(single) as recorder, torch.no_grad():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        single(torch.tensor([IDS]))
    assert "one thread at a time" in said[0]
    assert recorder.trace().n_positions == len(IDS)


def test_the_meta_device_holds_no_numbers(make: Callable) -> None:
    model = make("bridge-llama")
    assert "meta" in refusal(lambda: osl.record(model, torch.tensor(IDS, device="meta")), InputError)
    assert "sparse" in refusal(lambda: osl.record(model, torch.tensor(IDS).to_sparse()), InputError)
    model.to("meta")
    for door, ask in DOORS.items():
        assert "meta" in refusal(lambda ask=ask: ask(model)), door


@needs_bridge
def test_a_model_whose_own_forward_fails_is_named(make: Callable) -> None:
    model = make("bridge-llama")

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model.blocks[0].mlp.forward = broken
    for door, ask in DOORS.items():
        said = refusal(lambda ask=ask: ask(model))
        assert "own forward pass" in said, door
        assert "mat1 and mat2" in said, door


# ---------------------------------------------------------------- once per model


@pytest.mark.parametrize("name", ["hooked-ln", "hooked-rms", "bridge-gpt2", "bridge-llama"])
def test_at_most_six_passes_of_at_most_eight_tokens_once_per_model(
    name: str, make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    for where in ("predictions", "wrapped_predictions"):
        own = getattr(proof, where)

        def watched(model: Model, ids: torch.Tensor, *args: Any, own: Callable = own) -> Any:
            seen.append(ids.shape[1])
            return own(model, ids, *args)

        monkeypatch.setattr(proof, where, watched)
    model = make(name)
    osl.last_token_residual_hooks(model, {})
    assert 3 <= len(seen) <= 5
    assert max(seen) <= 8
    osl.support(model)  # the one more is its recording
    first = len(seen)
    for ask in DOORS.values():
        if ask is not DOORS["recording"] and ask is not DOORS["edits"]:
            ask(model)
    assert len(seen) == first
    with torch.no_grad():
        model.blocks[0].mlp.W_out.data.mul_(1.5)  # seen by no version counter
    osl.last_token_residual_hooks(model, {})
    assert len(seen) > first


def test_a_subject_goes_through_the_door_as_it_is(make: Callable) -> None:
    subject = Subject.of(make("bridge-llama"))
    assert Subject.of(subject) is subject
    assert subject.about.model == subject.architecture.name


@needs_bridge
def test_what_is_known_of_a_model_does_not_keep_it_alive() -> None:
    import gc
    import weakref

    model = zoo("llama", "bridge")
    osl.support(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_wrapped_model_is_left_as_it_was() -> None:
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    made = transformers_model("llama")
    model = zoo("llama", "bridge")
    before = [(name, id(module)) for name, module in model.original_model.named_modules()]
    osl.support(model)
    assert [(name, id(module)) for name, module in model.original_model.named_modules()] == before
    ids = torch.tensor([IDS])
    with torch.no_grad():
        assert torch.allclose(made(ids).logits, model(ids), atol=1e-6)
