"""What does not describe the model is an error that says so, never a number: hooks, passes, weights, architectures."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import small_models
import torch
from small_models import D_VOCAB, N_CTX, NO_BRIDGE, NO_HOOKED, has_bridge, has_hooked, hooked, tokenizer, tokens_for

import oversquash_lens as osl
from oversquash_lens.capture import checks
from oversquash_lens.capture.architecture import FINAL_HOOKS, LAYER_HOOKS, read_architecture
from oversquash_lens.errors import HookMismatchError, InputError, ModelError, OversquashError

needs_hooked = pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)
needs_bridge = pytest.mark.skipif(not has_bridge(), reason=NO_BRIDGE)

Model = Any
Tokens = torch.Tensor
NEVER_FIRES = "attn.hook_result"  # both classes have it, and use it only where they are asked to


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    assert "expected" in str(error)
    return str(error)


# ---------------------------------------------------------------- hooks


@pytest.mark.parametrize("attention", ["kept", "recomputed"])
@pytest.mark.parametrize("key", LAYER_HOOKS)
def test_a_hook_that_never_fires_is_found_out(
    key: str,
    attention: str,
    fresh: tuple[Model, Tokens],
    monkeypatch: pytest.MonkeyPatch,
    count_hooks: Callable,
) -> None:
    model, tokens = fresh
    has_it = key in read_architecture(model).layer_hooks(attention)
    monkeypatch.setitem(LAYER_HOOKS, key, NEVER_FIRES)
    before = count_hooks(model)

    def recorded() -> osl.Trace:
        with osl.recording(model, attention=attention) as recorder, torch.no_grad():
            model(tokens)
        return recorder.trace()

    if not has_it:  # the architecture has no such hook, or the route does not need it: nobody waits for it
        assert recorded().n_positions == 6
        return
    with pytest.raises(HookMismatchError) as caught:
        recorded()
    assert f"layer 0: the hook {NEVER_FIRES} did not fire" in one_line(caught.value)
    assert count_hooks(model) == before


@pytest.mark.parametrize("key", FINAL_HOOKS)
def test_a_hook_behind_the_last_layer_that_never_fires(
    key: str, fresh: tuple[Model, Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FINAL_HOOKS, key, f"blocks.0.{NEVER_FIRES}")
    with pytest.raises(HookMismatchError) as caught:
        osl.record(*fresh)
    assert NEVER_FIRES in one_line(caught.value)


def test_a_hook_that_a_later_block_lacks(
    fresh: tuple[Model, Tokens], monkeypatch: pytest.MonkeyPatch, count_hooks: Callable
) -> None:
    model, tokens = fresh
    before = count_hooks(model)
    monkeypatch.setitem(FINAL_HOOKS, "final_scale", "blocks.1.no_such_hook")
    with pytest.raises(HookMismatchError, match=r"blocks\.1\.no_such_hook"):
        osl.record(model, tokens)
    assert count_hooks(model) == before


def test_a_hook_that_the_first_block_lacks(fresh: tuple[Model, Tokens], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYER_HOOKS, "pattern", "attn.no_such_hook")
    with pytest.raises(ModelError, match=r"attn\.no_such_hook"):
        osl.record(*fresh)


# ---------------------------------------------------------------- passes


def test_no_pass_at_all(fresh: tuple[Model, Tokens]) -> None:
    with osl.recording(fresh[0]) as recorder:
        pass
    with pytest.raises(HookMismatchError, match="expected one whole forward pass"):
        recorder.trace()


def test_two_passes_in_one_recording(fresh: tuple[Model, Tokens], count_hooks: Callable) -> None:
    model, tokens = fresh
    before = count_hooks(model)
    with osl.recording(model):
        model(tokens)
        with pytest.raises(HookMismatchError, match="second time"):
            model(tokens)
    assert count_hooks(model) == before


@needs_hooked
def test_a_pass_that_stops_halfway(make: Callable) -> None:
    model = make("hooked-ln")
    with osl.recording(model) as recorder:
        model(tokens_for(1, 5), stop_at_layer=1)
    with pytest.raises(HookMismatchError, match="not recorded"):
        recorder.trace()


def test_a_batch(fresh: tuple[Model, Tokens], count_hooks: Callable) -> None:
    model, tokens = fresh
    before = count_hooks(model)
    with pytest.raises(InputError, match="got a batch of 2"), osl.recording(model):
        model(tokens.expand(2, -1))
    assert count_hooks(model) == before


@needs_hooked
def test_a_pass_with_a_key_value_cache(make: Callable) -> None:
    try:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache as Cache
    except ImportError:  # TransformerLens 2
        from transformer_lens import HookedTransformerKeyValueCache as Cache

    model = make("hooked-ln")
    cache = Cache.init_cache(model.cfg, "cpu", 1)
    model(tokens_for(1, 4), past_kv_cache=cache, attention_mask=torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(OversquashError, match="key/value cache"), osl.recording(model):
        model(tokens_for(2, 2), past_kv_cache=cache, attention_mask=torch.ones(1, 2, dtype=torch.long))


@needs_bridge
@pytest.mark.parametrize("name", ["bridge-gpt2", "bridge-llama"])
def test_a_generating_bridge(name: str, make: Callable) -> None:
    model = make(name)
    with osl.recording(model), pytest.raises(OversquashError):
        model.generate(tokens_for(1, 4), max_new_tokens=3, verbose=False)


@needs_hooked
@pytest.mark.parametrize(
    ("setting", "name"),
    [
        *itertools.product(["split_qkv_input", "attn_result", "hook_mlp_in"], ["hooked-ln", "hooked-rms"]),
        ("attn_in", "hooked-ln"),  # TransformerLens itself refuses it with the grouped queries of the other
    ],
)
def test_optional_hook_points_change_nothing_or_are_refused(setting: str, name: str, make: Callable) -> None:
    """They compute the same numbers another way: so are the trace's, or a plain error says that it cannot."""
    model, tokens = make(name), tokens_for(5, 6)
    plain = osl.mean_field_sensitivity(osl.record(model, tokens)).log_values
    getattr(model, {"attn_in": "set_use_attn_in"}.get(setting, f"set_use_{setting}"))(True)
    try:
        trace = osl.record(model, tokens)
    except HookMismatchError as error:
        one_line(error)
        return
    assert torch.allclose(osl.mean_field_sensitivity(trace).log_values, plain, rtol=1e-9)


# ---------------------------------------------------------------- activations


def user_edit(model: Model, tokens: Tokens, name: str, edit: Callable) -> None:
    with osl.recording(model):
        model.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: edit(value.clone()))])


def scaled(value: torch.Tensor) -> torch.Tensor:
    return value * 1.5


def looking_ahead(pattern: torch.Tensor) -> torch.Tensor:
    return torch.full_like(pattern, 1 / pattern.shape[-1])


def poisoned(value: torch.Tensor) -> torch.Tensor:
    value[0, 1] = float("nan")
    return value


@pytest.mark.parametrize(
    ("at", "edit", "said"),
    [
        ("blocks.1.attn.hook_pattern", scaled, "sum to 1"),
        ("blocks.1.attn.hook_pattern", looking_ahead, "later positions"),
        ("blocks.1.attn.hook_pattern", poisoned, "NaN"),
        ("blocks.1.attn.hook_z", scaled, "pattern · v differs from hook_z"),
        ("blocks.1.mlp.hook_post", scaled, "activation\\(pre\\) differs from hook_post"),
        ("blocks.0.hook_resid_pre", poisoned, "NaN"),
    ],
    ids=["rows", "future", "NaN pattern", "z", "post", "NaN residual"],
)
def test_activations_that_contradict_each_other(
    at: str, edit: Callable, said: str, fresh: tuple[Model, Tokens], count_hooks: Callable
) -> None:
    model, tokens = fresh
    before = count_hooks(model)
    with pytest.raises(HookMismatchError, match=said) as caught:
        user_edit(model, tokens, at, edit)
    one_line(caught.value)
    if "blocks.1" in at:
        assert "layer 1" in str(caught.value)
    assert count_hooks(model) == before


def said_to_compute(model: Model, activation: str) -> None:
    """Whatever config this class reads its activation's name from says so."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    words = ("hidden_act", "activation_function")
    for owner, word in ((model.cfg, "act_fn"), *((config, word) for word in words if hasattr(config, word))):
        setattr(owner, word, activation)


@pytest.mark.parametrize("said", ["relu", "xielu", "gelu_of_nobody"])
@pytest.mark.parametrize("name", ["hooked-ln", "hooked-rms", "bridge-gpt2", "bridge-llama"])
def test_an_activation_is_what_it_computes_whatever_the_config_says(name: str, said: str, make: Callable) -> None:
    model = make(name)
    expected = osl.mean_field_sensitivity(osl.record(model, tokens_for(5, 6))).log_values
    said_to_compute(model, said)
    assert torch.equal(osl.mean_field_sensitivity(osl.record(model, tokens_for(5, 6))).log_values, expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("part", ["embed", "blocks.0.ln1", "blocks.1.attn", "blocks.0.mlp", "ln_final"])
def test_weights_that_are_no_numbers(part: str, poison: float, fresh: tuple[Model, Tokens]) -> None:
    model, tokens = fresh
    module = model.embed if part == "embed" else model.ln_final if part == "ln_final" else None
    if module is None:
        _, layer, name = part.split(".")
        module = getattr(model.blocks[int(layer)], name)
    with torch.no_grad():
        for parameter in [*module.parameters(), *getattr(module, "original_component", module).parameters()]:
            parameter.fill_(poison)
    for run in (lambda: osl.record(model, tokens), lambda: osl.audit(model, tokens, probes=2)):
        with pytest.raises(OversquashError, match="NaN") as caught:
            run()
        one_line(caught.value)
    with pytest.raises(OversquashError, match="NaN"):
        osl.measured_sensitivity(model, tokens, probes=2)


# The gate's own functions on made-up numbers.


def causal(n: int = 4, heads: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(heads, n, n, generator=generator)
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_softmax_passes_in_every_dtype(dtype: torch.dtype) -> None:
    checks.check_pattern("here", causal(300).to(dtype))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: p * 0.9, "sum to 1"),
        (lambda p: p.roll(1, -1), "later positions"),
        (lambda p: p.masked_fill(torch.eye(4).bool(), torch.nan), "NaN"),
    ],
    ids=["sinks", "ahead", "NaN"],
)
def test_a_spoiled_pattern(spoil: Callable, said: str) -> None:
    checks.check_pattern("here", causal())
    with pytest.raises(HookMismatchError, match=f"here.*{said}"):
        checks.check_pattern("here", spoil(causal()))


def test_one_wrong_row_is_enough() -> None:
    pattern = causal()
    pattern[1, 3] *= 0.99
    with pytest.raises(HookMismatchError, match="sum to 1"):
        checks.check_pattern("here", pattern)


def test_a_head_that_is_off_passes_and_a_half_of_one_does_not() -> None:
    pattern = causal(4, 3)
    pattern[1] = 0
    checks.check_pattern("here", pattern)
    checks.check_pattern("here", torch.zeros_like(pattern))
    for rest in ((1, 2, 0), (1, 3, 3)):
        spoiled = pattern.clone()
        spoiled[rest] = 1e-9
        with pytest.raises(HookMismatchError, match="sum to 1 ± 1;"):
            checks.check_pattern("here", spoiled)
    spoiled = causal(4, 3)
    spoiled[1, :3] = 0
    with pytest.raises(HookMismatchError, match="sum to 1 ± 1;"):
        checks.check_pattern("here", spoiled)


def test_a_head_that_is_only_said_to_be_off() -> None:
    """The hook shows zeros, the model goes on reading: pattern · v is not z."""
    generator = torch.Generator().manual_seed(1)
    pattern, value = causal(4, 2), torch.randn(4, 2, 3, generator=generator)
    z = torch.stack([pattern[h] @ value[:, h] for h in range(2)], 1)
    pattern[1] = 0
    checks.check_pattern("here", pattern)
    with pytest.raises(HookMismatchError, match="hook_z"):
        checks.check_output("here", pattern, value, z)


def test_on_a_model_a_head_that_is_only_said_to_be_off(fresh: tuple[Model, Tokens]) -> None:
    """Its pattern is set to 0 and its output back to what it was."""
    model, tokens = fresh
    was: dict[str, torch.Tensor] = {}
    name = "blocks.1.attn.hook_{}".format
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(name("z"), lambda z, hook: was.update(z=z.clone()))])

    def off(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        return pattern * torch.tensor([1, 0, 1, 1], dtype=pattern.dtype)[:, None, None]

    with osl.recording(model) as recorder:
        model.run_with_hooks(tokens, fwd_hooks=[(name("pattern"), off)])
    assert not recorder.trace().attention[1].rows(0, 6)[1].any()
    hooks = [(name("pattern"), off), (name("z"), lambda z, hook: was["z"])]
    with pytest.raises(HookMismatchError, match=r"layer 1.*hook_z"), osl.recording(model):
        model.run_with_hooks(tokens, fwd_hooks=hooks)


def test_a_tiny_look_ahead_is_enough() -> None:
    pattern = causal()
    pattern[0, 0, 3] = 1e-9
    with pytest.raises(HookMismatchError, match="later positions"):
        checks.check_pattern("here", pattern)


def test_output_and_scores_of_grouped_heads() -> None:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    pattern, value, query, key = causal(4, 4), draw(4, 2, 3), draw(4, 4, 3), draw(4, 2, 3)
    z = torch.stack([pattern[h] @ value[:, h // 2] for h in range(4)], 1)
    scores = torch.stack([query[:, h] @ key[:, h // 2].T for h in range(4)]) * 0.7
    checks.check_output("here", pattern, value, z)
    on_the_diagonal = scores.diagonal(dim1=1, dim2=2)
    checks.check_scores("here", on_the_diagonal, query, key, 0.7)
    with pytest.raises(HookMismatchError, match="hook_z"):
        checks.check_output("here", pattern, value.flip(1), z)
    with pytest.raises(HookMismatchError, match="score"):
        checks.check_scores("here", on_the_diagonal, query, key, 0.5)


# ---------------------------------------------------------------- architectures

HOOKED_REFUSED: dict[str, tuple[dict, str]] = {
    "bidirectional": ({"attention_dir": "bidirectional"}, "not causal"),
}


@pytest.fixture
def as_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hooked` leaves the weights as TransformerLens draws them, whatever they are called."""
    monkeypatch.setattr(small_models, "_randomise_hooked", lambda *arguments: None)


@needs_hooked
@pytest.mark.usefixtures("as_drawn")
@pytest.mark.parametrize("name", HOOKED_REFUSED)
def test_hooked_transformers_that_the_theory_does_not_describe(name: str) -> None:
    options, said = HOOKED_REFUSED[name]
    model = hooked(1, **options)
    for ask in (
        lambda: osl.record(model, tokens_for(1, 5)),
        lambda: osl.measured_sensitivity(model, tokens_for(1, 5), probes=2),
        lambda: osl.last_token_residual_hooks(model, {}),
        lambda: osl.attention_path_hooks(model, {}),
    ):
        with pytest.raises(ModelError, match=said) as caught:
            ask()
        one_line(caught.value)


@needs_hooked
def test_positions_that_are_added_to_queries_and_keys_alone() -> None:
    """The shortformer's queries are not those of the norm: collapse can be measured, paths cannot."""
    model = hooked(1, positions="shortformer")
    with pytest.raises(HookMismatchError, match=r"layer 0, attn\.hook_q: norm · gain · W_query differs"):
        osl.record(model, tokens_for(1, 5))


SIZE = {"vocab_size": D_VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"max_position_embeddings": N_CTX, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
LLAMA_LIKE = SIZE | {"intermediate_size": 24, "num_key_value_heads": 2}

BRIDGE_REFUSED: dict[str, tuple[str, dict, str]] = {
    "BLOOM": (
        "Bloom",
        {"vocab_size": D_VOCAB, "hidden_size": 16, "n_layer": 2, "n_head": 4}
        | {"apply_residual_connection_post_layernorm": True},
        "a residual stream that is normalised itself",
    ),
}
# Families without a row of their own in the zoo.
BRIDGE_OTHERS: dict[str, tuple[str, dict]] = {
    "OLMo": ("Olmo", LLAMA_LIKE),
    "Granite": ("Granite", LLAMA_LIKE | {"residual_multiplier": 30.0, "attention_multiplier": 0.3}),
    "MPT": ("Mpt", {"vocab_size": D_VOCAB, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": N_CTX}),
}


def bridged(family: str, options: dict) -> Model:
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    config = getattr(transformers, f"{family}Config")(**options)
    hf = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    hf.config.architectures = [type(hf).__name__]
    hf.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in hf.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if noise.ndim == 1 else noise * noise.shape[-1] ** -0.5)
    return TransformerBridge.boot_transformers(
        f"tiny-{family}", hf_model=hf, tokenizer=tokenizer(), dtype=torch.float64, device="cpu"
    )


@needs_bridge
@pytest.mark.parametrize("name", BRIDGE_REFUSED)
def test_bridges_that_the_theory_does_not_describe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    family, options, said = BRIDGE_REFUSED[name]
    model = bridged(family, options)
    with pytest.raises(ModelError, match=said) as caught:
        osl.record(model, tokens_for(1, 5))
    assert "names the measures that remain" in one_line(caught.value)


@needs_bridge
@pytest.mark.parametrize("name", BRIDGE_OTHERS)
def test_other_families_are_measured_soundly_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a family is accepted, its calibrated bounds hold and the estimate is within a factor of ten."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokens = bridged(*BRIDGE_OTHERS[name]), tokens_for(1, 6)
    try:
        trace = osl.record(model, tokens)
    except OversquashError as error:
        one_line(error)
        return
    full, frozen = (
        osl.measured_sensitivity(model, tokens, probes=None, norm="spectral", freeze=freeze).values.log()
        for freeze in ((), ("attention",))
    )
    assert (osl.path_bound(trace, "calibrated_full").log_values >= full - 1e-5).all()
    assert (osl.path_bound(trace, "calibrated").log_values >= frozen - 1e-5).all()
    truth = osl.measured_sensitivity(model, tokens, probes=None).values.log()
    apart = (osl.mean_field_sensitivity(trace).log_values - truth).abs()
    assert apart[torch.isfinite(truth)].max() < 2.4
