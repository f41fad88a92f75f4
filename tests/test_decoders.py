"""Families that differ from Llama and GPT-2 in one term, held against the transformers model before it was wrapped.

The reference is a second model of the same weights, run by transformers alone: its prediction's input, its attention,
its Jacobian by autograd. Nothing of the package is in it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from small_models import tokenizer, tokens_for
from torch.nn import functional
from zoo import CELLS, lacking, transformers_model, zoo

import oversquash_lens as osl
from oversquash_lens.errors import ModelError

# What is a row of its own: a factor on what is added, no factor on scores, norms behind only or of all heads together
# or of each head's own, cut queries, keys and values, activations of unbounded slope.
DECODERS = (
    "granite",
    "granite-moe",
    "gpt-neo",
    "olmo",
    "olmo-clip",
    "olmo2",
    "olmo3",
    "olmoe",
    "olmoe-clip",
    "stablelm",
    "stablelm-norms",
    "stablelm-parallel",
    "cohere",
    "cohere-norms",
    "cohere2",
    "exaone4",
    "llama4",
    "mpt",
    "mpt-clip",
    "arcee",
    "nemotron",
    "apertus",
)
SIDE_BY_SIDE = ("stablelm-parallel", "cohere", "cohere-norms", "cohere2")  # attention and MLP
HOOKED = [name for name, kind in CELLS if kind == "hooked" and name in DECODERS and "moe" not in name]
SEEDS = (0, 1, 2)
N = 9


class Plain:
    """transformers' own model, from the residual that enters its first layer to what its unembedding reads."""

    def __init__(self, name: str, seed: int) -> None:
        self.model, self.tokens = transformers_model(name, seed), tokens_for(seed, N)
        count = self.model.config.num_hidden_layers
        stacks = (module for module in self.model.modules() if isinstance(module, torch.nn.ModuleList))
        self.first = next(stack for stack in stacks if len(stack) == count)[0]

    def run(self, start: torch.Tensor | None = None) -> dict[str, Any]:
        """`start` [pos, d_model] in place of what enters the first layer; y is [d_model], of the last position."""
        kept: dict[str, Any] = {}

        def enter(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            kept["start"] = (args[0] if args else kwargs["hidden_states"])[0]
            if start is None:
                return None
            return ((start[None], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": start[None]})

        def leave(module: Any, args: tuple) -> None:
            kept["y"] = args[0][0, -1]

        handles = [
            self.first.register_forward_pre_hook(enter, with_kwargs=True),
            self.model.get_output_embeddings().register_forward_pre_hook(leave),
        ]
        try:
            kept["attentions"] = self.model(self.tokens, output_attentions=True, use_cache=False).attentions
        finally:
            for handle in handles:
                handle.remove()
        return kept

    def jacobian(self) -> torch.Tensor:
        """∂y_n/∂v_i at every position i: [pos, d_model, d_model]."""
        start = self.run()["start"].detach()
        found = torch.autograd.functional.jacobian(lambda v: self.run(v)["y"], start)
        return found.transpose(0, 1).double()


@contextmanager
def fixed_attention() -> Iterator[None]:
    """Within the block the softmax over scores [batch, head, dest, src] is a constant of autograd."""
    softmax = functional.softmax

    def constant(scores: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made = softmax(scores, *args, **kwargs)
        return made.detach() if scores.ndim == 4 else made

    with mock.patch.object(functional, "softmax", constant):
        yield


@cache
def loaded(name: str, seed: int, folder: str) -> Any:
    """A bridge of the same weights, by way of a folder."""
    path = os.path.join(folder, f"{name}-{seed}")
    transformers_model(name, seed).save_pretrained(path)
    tokenizer().save_pretrained(path)
    experts = "moe" in name or name == "llama4"  # transformers' product of experts knows no float64
    return osl.load_model(path, kind="bridge", dtype="float32" if experts else "float64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("decoders"))


@cache
def plain(name: str, seed: int) -> Plain:
    return Plain(name, seed)


def pair(name: str, seed: int, folder: str) -> tuple[Any, Plain]:
    why = lacking(name, "bridge")
    if why is not None:
        pytest.skip(why)
    model = loaded(name, seed, folder)
    osl.support(model)
    return model, plain(name, seed)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("attention", ["kept", "recomputed"])
@pytest.mark.parametrize("name", DECODERS)
def test_prediction_input_and_attention_rows_are_transformers(name: str, attention: str, folder: str) -> None:
    model, truth = pair(name, 0, folder)
    if name == "llama4" and attention == "kept":
        with pytest.raises(ModelError, match="kept patterns cannot be held against them"):
            osl.record(model, truth.tokens, attention="kept")
        return
    trace, kept = osl.record(model, truth.tokens, attention=attention, verify=True), truth.run()
    assert close(trace.prediction_input.double(), kept["y"].detach())
    assert close(trace.last_residuals[0].double(), kept["start"][-1].detach())
    for layer, rows in enumerate(kept["attentions"]):
        assert close(trace.attention[layer].rows(0, N).double(), rows[0].detach().double()), layer


@pytest.mark.parametrize("name", DECODERS)
def test_the_proofs_product_at_beta_1_is_that_of_transformers_patterns(name: str, folder: str) -> None:
    model, truth = pair(name, 1, folder)
    product = torch.eye(N, dtype=torch.float64)
    for rows in truth.run()["attentions"]:
        product = (rows[0].mean(0).detach().double() + torch.eye(N)) @ product
    found = osl.path_bound(osl.record(model, truth.tokens), "proof", beta=1.0)
    assert close(found.log_by_layer[0].exp(), product[-1])


@pytest.mark.parametrize("name", DECODERS)
def test_measured_sensitivity_is_the_jacobian_of_transformers(name: str, folder: str) -> None:
    model, truth = pair(name, 0, folder)
    full = truth.jacobian()
    found = osl.measured_sensitivity(model, truth.tokens, probes=None)
    assert close(found.values, torch.linalg.matrix_norm(full), 1e-4)
    spectral = osl.measured_sensitivity(model, truth.tokens, probes=None, norm="spectral")
    assert close(spectral.values, torch.linalg.matrix_norm(full, 2), 1e-4)
    if osl.support(model)["attention frozen"].state == "refused":
        with pytest.raises(ModelError, match="held fixed"):
            osl.measured_sensitivity(model, truth.tokens, probes=None, freeze=("attention",))
        return
    with fixed_attention():
        frozen = truth.jacobian()
    found = osl.measured_sensitivity(model, truth.tokens, probes=None, freeze=("attention",))
    assert close(found.values, torch.linalg.matrix_norm(frozen), 1e-4)
    assert not close(torch.linalg.matrix_norm(frozen), torch.linalg.matrix_norm(full), 1e-3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", DECODERS)
def test_calibrated_bounds_lie_above_transformers_jacobian(name: str, seed: int, folder: str) -> None:
    model, truth = pair(name, seed, folder)
    trace = osl.record(model, truth.tokens)
    if trace.support["calibrated"].state == "refused":
        with pytest.raises(ModelError, match="router"):
            osl.path_bound(trace, "calibrated")
        return
    with fixed_attention():
        frozen = truth.jacobian()
    for variant, jacobian in (("calibrated", frozen), ("calibrated_full", truth.jacobian())):
        size = torch.linalg.matrix_norm(jacobian, 2)
        gap = osl.path_bound(trace, variant).log_values[size > 0] - size[size > 0].log()
        assert gap.min() > -1e-4, variant
        assert gap.min() < 12, variant  # nor is it a bound that says nothing


@pytest.mark.parametrize("name", DECODERS)
def test_nothing_is_lost_between_the_layers_of_a_flow(name: str, folder: str) -> None:
    model, truth = pair(name, 2, folder)
    trace = osl.record(model, truth.tokens)
    for kind in ("mean_field", "proof", "calibrated_full"):
        if kind != "calibrated_full" or trace.support[kind].state != "refused":
            assert osl.flow(trace, kind=kind).imbalance < 1e-5


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in SIDE_BY_SIDE])
def test_exact_node_gains_are_those_of_the_mlps_jacobian(name: str, folder: str) -> None:
    """‖I + J‖_F²/d, J by autograd of what the residual gains of what the MLP's branch reads."""
    model, truth = pair(name, 0, folder)
    trace = osl.record(model, truth.tokens, node_probes=None)
    assert not trace.parallel
    for layer in range(trace.n_layers):
        expected = 1 + torch.stack(list(_mlp_gains(model, truth.tokens, layer)))
        assert close(trace.gains.node_gain[layer].double(), expected, 1e-4), layer


def _mlp_gains(model: Any, tokens: torch.Tensor, layer: int) -> Iterator[torch.Tensor]:
    """(‖I + J‖_F² - ‖I‖_F²)/d at every position."""
    kept: dict[str, torch.Tensor] = {}

    def leaf(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
        kept["in"] = value.detach().clone().requires_grad_()
        return kept["in"]

    def out(value: torch.Tensor, hook: Any = None) -> None:
        kept["out"] = value

    with torch.enable_grad():
        hooks = [(f"blocks.{layer}.hook_resid_mid", leaf), (f"blocks.{layer}.hook_resid_post", out)]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        for position in range(tokens.shape[1]):
            rows = [
                torch.autograd.grad(part, kept["in"], retain_graph=True)[0][0, position]
                for part in kept["out"][0, position]
            ]
            jacobian, eye = torch.stack(rows).double(), torch.eye(len(rows), dtype=torch.float64)
            yield ((jacobian + eye).square().sum() - len(rows)) / len(rows)


# ---------------------------------------------------------------- one model, written in two ways


def measures(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    trace = osl.record(model, tokens, node_probes=None)
    kinds = [kind for kind in ("mean_field", "proof", "calibrated", "calibrated_full") if _holds(trace, kind)]
    found = osl.profiles(trace, kinds)
    return {
        kind: each.log_by_layer[0] + (0 if math.isnan(each.log_constant) else each.log_constant)
        for kind, each in found.items()
    }


def _holds(trace: Any, kind: str) -> bool:
    return trace.support.get(kind, trace.support["printed bounds"]).state != "refused"


def the_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for kind, values in expected.items():
        assert torch.allclose(found[kind], values, atol=1e-5), kind


@pytest.mark.parametrize("name", ["granite", "granite-moe"])
def test_a_multiplier_is_the_same_as_larger_weights(name: str) -> None:
    """Granite at multipliers is Granite without them and W_E, W_O, W_out and W_Q so many times as large."""
    if lacking(name, "bridge"):
        pytest.skip(lacking(name, "bridge"))
    tokens, model = tokens_for(3, N), zoo(name, "bridge")
    plain_factor = (model.cfg.d_model // model.cfg.n_heads) ** -0.5
    neutral = {"attention_multiplier": plain_factor, "residual_multiplier": 1.0, "embedding_multiplier": 1.0}
    other = zoo(name, "bridge", **neutral, tie_word_embeddings=False)
    config = model.original_model.config
    with torch.no_grad():
        for own, theirs in zip(other.original_model.parameters(), model.original_model.parameters(), strict=False):
            own.copy_(theirs)
        other.original_model.model.embed_tokens.weight.mul_(config.embedding_multiplier)
        for weight_name, weight in other.original_model.named_parameters():
            if any(part in weight_name for part in ("o_proj", "down_proj", "output_linear")):
                weight.mul_(config.residual_multiplier)
            if "q_proj" in weight_name:
                weight.mul_(config.attention_multiplier / plain_factor)
    the_same(measures(model, tokens), measures(other, tokens))


@pytest.mark.parametrize("name", ["olmo-clip", "olmoe-clip", "mpt-clip"])
def test_what_cuts_nothing_changes_no_estimate_and_loosens_no_bound_much(name: str) -> None:
    if lacking(name, "bridge"):
        pytest.skip(lacking(name, "bridge"))
    tokens = tokens_for(3, N)
    settings = (lambda c: {"attn_config": {"clip_qkv": c}}) if name == "mpt-clip" else (lambda c: {"clip_qkv": c})
    wide, without = (measures(zoo(name, "bridge", **settings(c)), tokens) for c in (1e3, None))
    the_same(
        {kind: wide[kind] for kind in ("mean_field", "proof")},
        {kind: without[kind] for kind in ("mean_field", "proof")},
    )
    for kind in ("calibrated", "calibrated_full"):
        if kind in without:
            assert (wide[kind] >= without[kind] - 1e-9).all()
    cut = osl.record(zoo(name, "bridge"), tokens)
    limit = 0.6
    assert max(part.abs().max().item() for part in cut.gains.value) <= limit + 1e-6
    assert any((part.abs() > limit - 1e-6).any() for part in cut.gains.value)  # and it does cut


@pytest.mark.parametrize("name", HOOKED)
def test_both_classes_say_the_same(name: str) -> None:
    """A HookedTransformer and a bridge of one structure and the same weights, measure by measure."""
    for kind in ("hooked", "bridge"):
        if lacking(name, kind):
            pytest.skip(lacking(name, kind))
    bridge, hooked, tokens = zoo(name, "bridge"), zoo(name, "hooked"), tokens_for(3, N)
    copied(bridge, hooked)
    the_same(measures(hooked, tokens), measures(bridge, tokens))


def copied(bridge: Any, hooked: Any) -> None:
    """The bridge's weights in the HookedTransformer."""
    with torch.no_grad():
        for name, parameter in hooked.named_parameters():
            *path, last = name.split(".")
            owner = bridge
            for part in path:
                owner = getattr(owner, part) if not part.isdigit() else owner[int(part)]
            value = getattr(owner, last.removeprefix("_"))
            parameter.copy_(torch.zeros_like(parameter) if value is None else value.reshape(parameter.shape))
