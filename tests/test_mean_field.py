"""The mean-field sensitivity against its formula written out term by term, and against what it estimates."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import brute_force, exact_jacobian, frobenius, mean_field, read
from small_models import (
    CASES,
    NO_HOOKED,
    case,
    has_hooked,
    hooked,
    random_spec,
    silent_mlps,
    tokens_for,
)
from zoo import lacking, zoo

import oversquash_lens as osl
from oversquash_lens.paths.profiles import paths_of_trace

record = partial(osl.record, attention="kept")  # references read the model's own patterns

TIGHT = 1e-12  # relative; float64 against float64
# Bridge computes a Llama's norms in float32, and with them the autograd reference of the node gain.
FLOAT32_INSIDE = {"bridge-llama": 1e-5}

needs_hooked = pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)


def assert_matches(model: object, tokens: torch.Tensor, tolerance: float) -> None:
    profile = osl.mean_field_sensitivity(record(model, tokens, node_probes=None))
    paths = mean_field(read(model, tokens))
    squares = brute_force(paths.edges, paths.nodes, tokens.shape[1])
    assert profile.kind == "mean_field"
    assert profile.log_by_layer.dtype == torch.float64
    none = squares == 0
    assert torch.equal(torch.isneginf(profile.log_by_layer), none)
    ratio = (2 * profile.log_by_layer[~none]).exp() / squares[~none]
    assert (ratio - 1).abs().max() <= tolerance
    assert math.expm1(2 * profile.log_constant - paths.log_constant) == pytest.approx(0, abs=tolerance)
    estimate = (squares[0] * math.exp(paths.log_constant)).sqrt()
    assert torch.allclose(profile.values, estimate, rtol=2 * tolerance, atol=0)
    assert torch.allclose(profile.share, estimate / estimate.sum(), rtol=2 * tolerance, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_equals_sum_over_all_paths(name: str) -> None:
    model, tokens = case(name)
    assert_matches(model, tokens, FLOAT32_INSIDE.get(name, TIGHT))


@needs_hooked
@given(seed=st.integers(0, 10_000), n=st.integers(2, 6))
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_equals_path_sums_on_random_architectures(seed: int, n: int) -> None:
    assert_matches(hooked(seed, **random_spec(seed)), tokens_for(seed, n), TIGHT)


def last_node_gain(model: object, tokens: torch.Tensor, **recording: object) -> float:
    """The node gain at the last position of a one-layer model, up to a factor that no probe enters."""
    trace = record(model, tokens, **recording)
    return math.exp(2 * osl.mean_field_sensitivity(trace).log_by_layer[0, -1].item())


@needs_hooked
@pytest.mark.parametrize("gated", [False, True])
def test_probed_node_gain_is_unbiased(gated: bool) -> None:
    """Mean over 200 seeds of the two-probe gain is the exact gain, within 4 standard errors (p < 1e-4)."""
    model = hooked(5, n_layers=1, gated=gated, act="silu", norm="RMS", strength=2.0, d_model=24)
    tokens = tokens_for(5, 4)
    exact = last_node_gain(model, tokens, node_probes=None)
    probed = torch.tensor([last_node_gain(model, tokens, node_probes=2, seed=seed) for seed in range(200)])
    error = probed.std() / math.sqrt(len(probed))
    assert probed.std() > 0.01 * exact, "two probes must scatter"
    assert abs(probed.mean().item() - exact) < 4 * error


@needs_hooked
def test_more_node_probes_scatter_less_and_enough_of_them_are_exact() -> None:
    model, tokens = hooked(6, n_layers=1, act="gelu", strength=2.0, d_model=48), tokens_for(6, 4)

    def gains(probes: int) -> torch.Tensor:
        return torch.tensor([last_node_gain(model, tokens, node_probes=probes, seed=s) for s in range(100)])

    assert 1.4 < gains(1).std() / gains(4).std() < 4  # independent pairs: √4 = 2, of orthogonal directions more
    assert last_node_gain(model, tokens, node_probes=48) == pytest.approx(
        last_node_gain(model, tokens, node_probes=None), rel=1e-12
    )


def test_node_probes_repeat_with_their_seed() -> None:
    model, tokens = case("bridge-gpt2")
    first, again, other = (
        osl.mean_field_sensitivity(record(model, tokens, node_probes=2, seed=seed)).log_values for seed in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@needs_hooked
def test_node_probes_are_drawn_anew_in_every_layer() -> None:
    """Two layers with the same weights and the same input must not get the same probed gain."""
    model, tokens = hooked(9, n_layers=2, strength=2.0), tokens_for(9, 3)
    with torch.no_grad():
        for name, parameter in model.blocks[1].named_parameters():
            parameter.copy_(dict(model.blocks[0].named_parameters())[name])
        for block in model.blocks:  # nothing written: both layers see the embeddings
            for name, parameter in block.named_parameters():
                if name.endswith(("W_O", "b_O", "b_out")):
                    parameter.zero_()
                if name.endswith("W_out"):
                    parameter.mul_(1e-3)
    gains = [
        osl.mean_field_sensitivity(record(model, tokens, node_probes=1, seed=seed)).log_by_layer[:, -1]
        for seed in range(5)
    ]
    upper = torch.stack([rows[1] for rows in gains])
    lower = torch.stack([rows[0] - rows[1] for rows in gains])
    assert upper.std() > 0
    assert (upper - lower).abs().min() > 0.02 * upper.abs().max()


@needs_hooked
@pytest.mark.parametrize("seed", range(6))
def test_exact_where_its_assumptions_hold(seed: int) -> None:
    """One layer, no keys, no MLP, norms frozen, γ₃ = 1: every edge is isotropic to the last factor, so the

    estimate is the Frobenius norm itself: ‖δI + Σ_h α^h OV_h/r‖_F / r_n.
    """
    heads = {"n_heads": 4, "kv_heads": 2, "d_model": 16} if seed % 2 else {"n_heads": 2}
    model = hooked(seed, norm="RMS", n_layers=1, **heads)
    tokens = tokens_for(seed, 6)
    with torch.no_grad():
        model.ln_final.w.fill_(1.0)
        for name, parameter in model.named_parameters():
            if name.endswith("W_K"):
                parameter.zero_()
    with silent_mlps(model):
        estimate = osl.mean_field_sensitivity(record(model, tokens, node_probes=None)).values
        truth = frobenius(exact_jacobian(model, tokens, freeze_norms=True))
    assert torch.allclose(estimate, truth, rtol=1e-12, atol=0)


@needs_hooked
def test_without_attention_only_the_last_token_counts() -> None:
    model, tokens = hooked(2, norm="RMS", n_layers=3), tokens_for(2, 5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("W_O"):
                parameter.zero_()
    with silent_mlps(model):
        profile = osl.mean_field_sensitivity(record(model, tokens, node_probes=None))
        truth = frobenius(exact_jacobian(model, tokens, freeze_norms=True))
    assert torch.isneginf(profile.log_values[:-1]).all()
    assert (truth[:-1] == 0).all()
    assert profile.values[-1].item() == pytest.approx(truth[-1].item(), rel=1e-12)


@needs_hooked
def test_estimates_the_truth_on_random_models() -> None:
    """It is an estimate, not a bound: over 40 random models the median error stays within 0.1 in log₁₀,

    and no value is off by more than a factor of 10.
    """
    errors = []
    for seed in range(40):
        model, tokens = hooked(seed, **random_spec(seed)), tokens_for(seed, 6)
        estimate = osl.mean_field_sensitivity(record(model, tokens, node_probes=None)).log_values
        truth = frobenius(exact_jacobian(model, tokens))
        errors.append((estimate - truth.log()) / math.log(10))
    errors = torch.cat(errors)
    assert errors.median().abs() < 0.1
    assert errors.abs().max() < 1.0


@pytest.mark.parametrize("name", CASES)
def test_estimates_the_truth_on_every_class(name: str) -> None:
    model, tokens = case(name)
    estimate = osl.mean_field_sensitivity(record(model, tokens, node_probes=None)).log_values
    truth = frobenius(exact_jacobian(model, tokens)).log()
    assert ((estimate - truth) / math.log(10)).abs().max() < 0.5


@needs_hooked
@pytest.mark.parametrize("norm", ["LN", "RMS"])
@pytest.mark.parametrize("seed", range(3))
def test_key_side_is_the_derivative_through_keys(norm: str, seed: int) -> None:
    """One head, positions not turned, divisors held: ‖∂(attention at j)/∂x_k‖_F² through the key alone, by autograd."""
    model, n = hooked(seed, norm=norm, n_layers=1, n_heads=1, strength=2.0), 6
    tokens = tokens_for(seed, n)
    trace, block = record(model, tokens), model.blocks[0]
    seen: dict[str, torch.Tensor] = {}
    model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: seen.update(x=x.detach()))])

    def normed(x: torch.Tensor) -> torch.Tensor:
        """The norm with its divisors as they are on this prompt."""
        centred = x - x.mean(-1, keepdim=True) if norm == "LN" else x
        return centred / trace.gains.attention_scale[0][:, None] * block.ln1.w + getattr(block.ln1, "b", 0.0)

    still = normed(seen["x"]).detach()
    jacobian = torch.autograd.functional.jacobian(
        lambda x: block.attn(still, normed(x), still)[0], seen["x"]
    )  # [dest, out, 1, src, into]
    through_keys = jacobian[:, :, 0].square().sum((1, 3))
    unmoved = replace(trace, gains=replace(trace.gains, key_pull=torch.zeros_like(trace.gains.key_pull)))
    with_keys, without = (paths_of_trace(each, "mean_field").edge_block(0, 0, n).dense() for each in (trace, unmoved))
    found = (with_keys - without) * model.cfg.d_model
    assert torch.allclose(found, through_keys, rtol=1e-9, atol=1e-12 * through_keys.max().item())
    assert through_keys.tril(-1).max() > 0


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_experts_are_run_again_without_the_users_hooks_which_stay(kind: str) -> None:
    if lacking("mixtral", kind) is not None:
        pytest.skip(lacking("mixtral", kind))
    model, tokens, calls = zoo("mixtral", kind), tokens_for(4, 6), []
    name = next(name for name in model.hook_dict if name.startswith("blocks.1.mlp.hook_"))
    osl.support(model)
    model.add_hook(name, lambda value, hook: calls.append(1))
    record(model, tokens, node_probes=None)
    passes = len(calls)
    with torch.no_grad():
        model(tokens)
    once = len(calls) - passes
    assert once > 0, "the hook is there still"
    calls.clear()
    record(model, tokens, node_probes=None)
    assert len(calls) == once, "heard once in a recording, not in the second run of the experts"
