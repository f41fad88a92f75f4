"""The importable hook utilities, and how our hooks live beside the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import CASES, case, tokens_for

import oversquash_lens as osl
from oversquash_lens.capture.architecture import read_architecture
from oversquash_lens.errors import HookMismatchError, InputError

Model = Any
Tokens = torch.Tensor
PRINTED = ("proof", "theorem_5_1", "theorem_b5", "multi_head", "rollout")


def nothing(value: torch.Tensor, hook: Any = None) -> None:
    """A user's hook that only looks."""


def only_self(pattern: torch.Tensor, hook: Any = None) -> torch.Tensor:
    """A user's edit: head 0 attends to its own position alone. Still causal, rows still sum to 1."""
    edited = pattern.clone()
    edited[:, 0] = torch.eye(pattern.shape[-1], dtype=pattern.dtype)
    return edited


def to_the_first(pattern: torch.Tensor, hook: Any = None) -> torch.Tensor:
    edited = torch.zeros_like(pattern)
    edited[..., 0] = 1
    return edited


# ---------------------------------------------------------------- what the utilities put into `store`


def batch(n: int = 6) -> torch.Tensor:
    return torch.cat([tokens_for(seed, n) for seed in (21, 22, 23)])


@pytest.mark.parametrize("name", CASES)
def test_last_token_residuals_are_the_last_column_of_the_residual_stream(name: str, watch: Callable) -> None:
    model, _ = case(name)
    n_layers = model.cfg.n_layers
    names = [f"blocks.{i}.hook_resid_pre" for i in range(n_layers)] + [f"blocks.{n_layers - 1}.hook_resid_post"]
    seen, store = watch(model, batch(), *names), {}
    with torch.no_grad():
        model.run_with_hooks(batch(), fwd_hooks=osl.last_token_residual_hooks(model, store))
    assert store.keys() == {"last_residual"}
    assert sorted(store["last_residual"]) == list(range(n_layers + 1))
    for layer, at in enumerate(names):
        assert store["last_residual"][layer].shape == (3, model.cfg.d_model)
        assert torch.equal(store["last_residual"][layer], seen[at][:, -1])


@pytest.mark.parametrize("name", CASES)
def test_path_hooks_keep_patterns_and_divisors(name: str, watch: Callable) -> None:
    model, _ = case(name)
    layers, store = range(model.cfg.n_layers), {}
    parts = {"attention": "attn.hook_pattern", "attention_scale": "ln1.hook_scale", "mlp_scale": "ln2.hook_scale"}
    seen = watch(model, batch(), *(f"blocks.{i}.{part}" for i in layers for part in parts.values()))
    with torch.no_grad():
        model.run_with_hooks(batch(), fwd_hooks=osl.attention_path_hooks(model, store))
    assert store.keys() == parts.keys()
    for key, part in parts.items():
        assert sorted(store[key]) == list(layers)
        for i in layers:
            wanted = seen[f"blocks.{i}.{part}"]
            assert torch.equal(store[key][i], wanted if key == "attention" else wanted[..., 0])


def test_hooks_come_as_pairs_that_change_nothing(fresh: tuple[Model, Tokens]) -> None:
    model, tokens = fresh
    store: dict = {}
    pairs = osl.last_token_residual_hooks(model, store) + osl.attention_path_hooks(model, store)
    assert all(isinstance(name, str) and callable(hook) for name, hook in pairs)
    assert {name for name, _ in pairs} <= set(model.hook_dict)
    with torch.no_grad():
        plain = model(tokens)
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=pairs), plain)
        with model.hooks(fwd_hooks=pairs):
            assert torch.equal(model(tokens), plain)


def test_what_is_kept_pins_no_larger_activation(fresh: tuple[Model, Tokens]) -> None:
    model, _ = fresh
    store: dict = {}
    hooks = osl.last_token_residual_hooks(model, store) + osl.attention_path_hooks(model, store)
    model.run_with_hooks(batch(), fwd_hooks=hooks)
    for kept in store.values():
        for tensor in kept.values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert not tensor.requires_grad


def test_not_detached_they_keep_the_graph(fresh: tuple[Model, Tokens]) -> None:
    model, tokens = fresh
    store: dict = {}
    hooks = osl.last_token_residual_hooks(model, store, detach=False)
    hooks += osl.attention_path_hooks(model, store, detach=False)
    with torch.enable_grad():
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    weight = next(p for p in model.blocks[0].parameters() if p.ndim >= 2)
    for key, layer in (("last_residual", model.cfg.n_layers), ("attention", 1), ("attention_scale", 1)):
        kept = store[key][layer]
        assert kept.grad_fn is not None
        weights = torch.linspace(1, 2, kept.numel(), dtype=kept.dtype).view_as(kept)
        (gradient,) = torch.autograd.grad((kept * weights).sum(), weight, retain_graph=True)
        assert gradient.abs().max() > 0
    products = osl.path_products(store, variant="rollout")
    assert not products.requires_grad


def test_a_second_pass_replaces_the_first(fresh: tuple[Model, Tokens]) -> None:
    model, tokens = fresh
    store, other = {}, {}
    hooks = osl.attention_path_hooks(model, store) + osl.last_token_residual_hooks(model, store)
    for each in (tokens_for(9, 4), tokens):
        model.run_with_hooks(each, fwd_hooks=hooks)
    model.run_with_hooks(
        tokens, fwd_hooks=osl.attention_path_hooks(model, other) + osl.last_token_residual_hooks(model, other)
    )
    assert all(torch.equal(store[key][i], other[key][i]) for key in other for i in other[key])


# ---------------------------------------------------------------- path_products


@pytest.mark.parametrize("variant", PRINTED)
@pytest.mark.parametrize("name", CASES)
def test_path_products_are_the_bound_without_its_constant(name: str, variant: str) -> None:
    model, tokens = case(name)
    store: dict = {}
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=osl.attention_path_hooks(model, store))
    trace = osl.record(model, tokens, attention="kept")
    products = osl.path_products(store, variant=variant)
    assert products.dtype == torch.float64
    assert products.shape == (model.cfg.n_layers + 1, tokens.shape[1])
    assert torch.allclose(products, osl.path_bound(trace, variant).log_by_layer.exp(), rtol=1e-6, atol=0)
    assert products[-1].tolist() == [0.0] * (tokens.shape[1] - 1) + [1.0]
    if variant != "rollout":
        wanted = osl.path_bound(trace, variant, beta=2.5).log_by_layer.exp()
        assert torch.allclose(osl.path_products(store, variant=variant, beta=2.5), wanted, rtol=1e-6, atol=0)


def test_path_products_of_each_prompt_of_a_batch(fresh: tuple[Model, Tokens]) -> None:
    model, _ = fresh
    store: dict = {}
    model.run_with_hooks(batch(), fwd_hooks=osl.attention_path_hooks(model, store))
    for i, tokens in enumerate(batch()):
        alone = osl.path_bound(osl.record(model, tokens), "proof").log_by_layer.exp()
        assert torch.allclose(osl.path_products(store, batch=i), alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("which", [None, 3, 7, -4], ids=str)
def test_which_prompt_of_a_batch_must_be_said(which: int | None) -> None:
    model, _ = case("bridge-gpt2")
    store: dict = {}
    model.run_with_hooks(batch(), fwd_hooks=osl.attention_path_hooks(model, store))
    with pytest.raises(InputError, match=r"batch=0 … 2"):
        osl.path_products(store, batch=which)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variant": "calibrated"}, "need record"),
        ({"variant": "nonsense"}, "nonsense"),
        ({"beta": -1.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"beta": "given"}, "beta"),
    ],
    ids=lambda value: str(value),
)
def test_bad_arguments_of_path_products(options: dict, said: str) -> None:
    model, tokens = case("bridge-gpt2")
    store: dict = {}
    model.run_with_hooks(tokens, fwd_hooks=osl.attention_path_hooks(model, store))
    with pytest.raises(InputError, match=said):
        osl.path_products(store, **options)


def test_a_store_that_no_pass_has_filled() -> None:
    model, tokens = case("bridge-gpt2")
    unfilled: dict = {}
    osl.attention_path_hooks(model, unfilled)
    for store in ({}, unfilled, {"last_residual": {0: torch.zeros(1, 2)}}):
        with pytest.raises(InputError, match="attention_path_hooks"):
            osl.path_products(store)
    without = {}
    model.run_with_hooks(tokens, fwd_hooks=osl.attention_path_hooks(model, without))
    del without["mlp_scale"]
    with pytest.raises(InputError, match="mlp_scale"):
        osl.path_products(without)
    assert torch.isfinite(osl.path_products(without, beta=1.0)[0]).all()


# ---------------------------------------------------------------- beside the user's own hooks


def test_fifty_recordings_leave_every_hook_as_it_was(fresh: tuple[Model, Tokens], count_hooks: Callable) -> None:
    """The user's own hook stays installed and fires throughout; no other is left behind."""
    model, tokens = fresh
    fired = []
    model.hook_dict["blocks.0.attn.hook_pattern"].add_hook(lambda value, hook: fired.append(1))
    before = count_hooks(model)
    assert before >= 1
    with torch.no_grad():
        plain = model(tokens).clone()
        for _ in range(50):
            with osl.recording(model) as recorder:
                assert torch.equal(model(tokens), plain)
            recorder.trace()
            assert count_hooks(model) == before
    assert len(fired) == 51
    model.reset_hooks()
    assert count_hooks(model) < before


def test_other_measurements_leave_every_hook_as_it_was(fresh: tuple[Model, Tokens], count_hooks: Callable) -> None:
    model, tokens = fresh
    model.hook_dict["blocks.1.hook_resid_pre"].add_hook(nothing)
    before = count_hooks(model)
    osl.record(model, tokens)
    osl.measured_sensitivity(model, tokens, probes=2)
    osl.audit(model, tokens, probes=2)
    assert count_hooks(model) == before


WAYS = ("before", "around", "inside", "added inside", "permanent")


def run_edited(model: Model, tokens: Tokens, way: str, name: str, edit: Callable) -> osl.Trace:
    """A recording of a pass that the user's `edit` changes, installed in one of the usual ways."""
    pair = [(name, edit)]
    if way in ("before", "permanent"):
        model.hook_dict[name].add_hook(edit, is_permanent=way == "permanent")
        with osl.recording(model) as recorder:
            model(tokens)
    elif way == "around":
        with model.hooks(fwd_hooks=pair), osl.recording(model) as recorder:
            model(tokens)
    elif way == "inside":
        with osl.recording(model) as recorder:
            model.run_with_hooks(tokens, fwd_hooks=pair)
    else:
        with osl.recording(model) as recorder:
            model.hook_dict[name].add_hook(edit)
            model(tokens)
    return recorder.trace()


@pytest.mark.parametrize("edit", [only_self, to_the_first])
@pytest.mark.parametrize("way", WAYS)
def test_an_edited_pattern_is_recorded_as_the_model_used_it(
    way: str, edit: Callable, fresh: tuple[Model, Tokens], watch: Callable
) -> None:
    model, tokens = fresh
    name, n_layers = "blocks.0.attn.hook_pattern", model.cfg.n_layers
    plain = osl.record(model, tokens)
    original = watch(model, tokens, name)[name]
    last = {}

    def keep(value: torch.Tensor, hook: Any = None) -> None:
        last["residual"] = value[0, -1].clone()

    model.run_with_hooks(tokens, fwd_hooks=[(name, edit), (f"blocks.{n_layers - 1}.hook_resid_post", keep)])
    trace = run_edited(model, tokens, way, name, edit)
    assert torch.equal(trace.attention[0].rows(0, 6), edit(original)[0])
    assert torch.equal(trace.last_residuals[-1], last["residual"].double())
    assert not torch.allclose(trace.last_residuals[-1], plain.last_residuals[-1])


@pytest.mark.parametrize("way", WAYS)
def test_an_ablated_value_is_refused(way: str, fresh: tuple[Model, Tokens]) -> None:
    """Values set to zero leave pattern·v = z, but the head's W_V no longer tells what it passes on."""
    model, tokens = fresh

    def ablate(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
        edited = value.clone()
        edited[:, :, 0] = 0
        return edited

    with pytest.raises(HookMismatchError, match=r"layer 1, attn.hook_v: norm · gain · W_value differs from hook_v"):
        run_edited(model, tokens, way, "blocks.1.attn.hook_v", ablate)


@pytest.mark.parametrize("way", WAYS)
def test_an_ablated_head_output_is_refused(way: str, fresh: tuple[Model, Tokens], count_hooks: Callable) -> None:
    """z that is no longer pattern·v: paths through this head are not what the pattern says."""
    model, tokens = fresh
    before = count_hooks(model)

    def ablate(z: torch.Tensor, hook: Any = None) -> torch.Tensor:
        edited = z.clone()
        edited[:, :, 1] = 0
        return edited

    with pytest.raises(HookMismatchError, match=r"pattern · v differs from hook_z"):
        run_edited(model, tokens, way, "blocks.1.attn.hook_z", ablate)
    model.reset_hooks(including_permanent=True)
    assert count_hooks(model) == before
    osl.record(model, tokens)


@pytest.mark.parametrize("at", ["attn.hook_z", "mlp.hook_post", "hook_attn_out", "hook_mlp_out", "hook_resid_mid"])
def test_an_edit_that_cuts_paths_is_refused(at: str, fresh: tuple[Model, Tokens]) -> None:
    """With a part of the block silenced, no measure may speak of the paths through it as if they were there."""
    model, tokens = fresh
    with pytest.raises(HookMismatchError):
        run_edited(model, tokens, "inside", f"blocks.0.{at}", lambda value, hook: torch.zeros_like(value))


def test_only_our_hooks_go(fresh: tuple[Model, Tokens]) -> None:
    """A user's hooks on the very points that we use, added before, inside and permanently, all survive."""
    model, tokens = fresh
    fired = []
    name = "blocks.0.attn.hook_pattern"
    point = model.hook_dict[name]
    point.add_hook(lambda value, hook: fired.append("before"))
    point.add_hook(lambda value, hook: fired.append("permanent"), is_permanent=True)
    with osl.recording(model):
        point.add_hook(lambda value, hook: fired.append("inside"))
        model(tokens)
    assert sorted(fired) == ["before", "inside", "permanent"]
    model(tokens)
    assert sorted(fired[3:]) == ["before", "inside", "permanent"]


def test_a_users_backward_hook_survives(fresh: tuple[Model, Tokens]) -> None:
    model, tokens = fresh
    fired = []
    model.hook_dict["blocks.1.hook_resid_pre"].add_hook(lambda grad, hook: fired.append(1), dir="bwd")
    with osl.recording(model) as recorder:
        model(tokens)[0, -1].sum().backward()
    recorder.trace()
    model(tokens)[0, -1].sum().backward()
    assert len(fired) == 2


def test_the_models_own_reset_does_not_end_a_recording(fresh: tuple[Model, Tokens], count_hooks: Callable) -> None:
    model, tokens = fresh
    before = count_hooks(model)
    with osl.recording(model) as recorder:
        model.reset_hooks()
        model(tokens)
        model.reset_hooks()
    assert torch.equal(recorder.trace().last_residuals, osl.record(model, tokens, attention="kept").last_residuals)
    assert count_hooks(model) == before


def test_a_reset_of_everything_is_found_out(fresh: tuple[Model, Tokens], count_hooks: Callable) -> None:
    model, tokens = fresh
    before = count_hooks(model)
    with osl.recording(model) as recorder:
        model.reset_hooks(including_permanent=True)
        model(tokens)
    with pytest.raises(HookMismatchError, match="not recorded"):
        recorder.trace()
    assert count_hooks(model) == before


class UsersError(Exception):
    pass


@pytest.mark.parametrize("where", ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_pattern", "unembed.hook_in"])
def test_an_exception_in_the_pass_leaves_only_the_users_hook(
    where: str, fresh: tuple[Model, Tokens], count_hooks: Callable
) -> None:
    model, tokens = fresh
    wanted = osl.record(model, tokens)

    def fail(value: torch.Tensor, hook: Any = None) -> None:
        raise UsersError

    model.hook_dict[where].add_hook(fail)
    before = count_hooks(model)
    for run in (
        lambda: osl.record(model, tokens),
        lambda: osl.measured_sensitivity(model, tokens, probes=2, freeze=("norms",)),
        lambda: osl.audit(model, tokens, probes=2),
    ):
        with pytest.raises(UsersError):
            run()
        assert count_hooks(model) == before
    with pytest.raises(UsersError):
        model(tokens)  # the user's own is still there
    model.reset_hooks()
    assert torch.equal(osl.record(model, tokens).last_residuals, wanted.last_residuals)


def test_an_exception_in_the_block_leaves_nothing(fresh: tuple[Model, Tokens], count_hooks: Callable) -> None:
    model, tokens = fresh
    before = count_hooks(model)

    def stopped_by(error: type[BaseException]) -> None:
        with osl.recording(model):
            model(tokens)
            raise error

    for error in (UsersError, KeyboardInterrupt):
        with pytest.raises(error):
            stopped_by(error)
        assert count_hooks(model) == before


def test_recordings_nest(fresh: tuple[Model, Tokens], count_hooks: Callable) -> None:
    model, tokens = fresh
    before = count_hooks(model)
    with osl.recording(model) as outer, osl.recording(model) as inner:
        model(tokens)
    assert torch.equal(outer.trace().last_residuals, inner.trace().last_residuals)
    assert count_hooks(model) == before


def test_a_users_edit_reaches_the_truth_as_it_reaches_the_trace(fresh: tuple[Model, Tokens]) -> None:
    """Layer 0 and layer 1 read the first position only: then the truth hears no other but the last."""
    model, tokens = fresh
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(read_architecture(model).n_layers)]
    with model.hooks(fwd_hooks=[(name, to_the_first) for name in names]):
        trace = osl.record(model, tokens)
        truth = osl.measured_sensitivity(model, tokens, probes=None).values
        bound = osl.path_bound(trace, "rollout").log_by_layer[0]
    heard = torch.tensor([True, False, False, False, False, True])
    assert torch.equal(truth > 0, heard)
    assert torch.equal(torch.isfinite(bound), heard)
