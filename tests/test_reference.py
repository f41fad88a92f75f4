"""Every family on every class against the theory written out a second time: bounds, estimate and flow, exactly."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from reference import LIPSCHITZ, Paths, Reading, brute_force, mean_field, read, reference
from small_models import NO_HOOKED, has_hooked, hooked, random_spec, tokens_for
from test_flow import assert_flow_of
from zoo import CELLS, float64_throughout, lacking, zoo

import oversquash_lens as osl
from oversquash_lens.capture.architecture import read_architecture
from oversquash_lens.capture.hooked_model import ACTIVATIONS
from oversquash_lens.errors import ModelError
from oversquash_lens.paths.kinds import CALIBRATED, PRINTED, VARIANTS

record = partial(osl.record, node_probes=None)
needs_hooked = pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)

EXACT = 1e-9  # relative; float64 against float64
INSIDE = 2e-5  # float64 weights, but norms, softmax, rotations or experts in float32 inside
SINGLE = 1e-4  # float32 weights
# Structures that only HookedTransformer's config can ask for, each of them with LayerNorm or RMSNorm, gated or plain.
STRUCTURES: dict[str, dict[str, Any]] = {
    "post-norms": {"use_normalization_before_and_after": True, "norm": "RMS"},
    "query and key norms": {"use_qk_norm": True, "norm": "RMS", "eps": 0.05},
    "both": {"use_qk_norm": True, "use_normalization_before_and_after": True, "norm": "RMS", "eps": 0.05},
    "parallel": {"parallel_attn_mlp": True},
    "capped scores": {"attn_scores_soft_cap": 1.5},
    "window": {"use_local_attn": True, "window_size": 3, "attn_types": ["local", "global", "local"]},
    "alibi": {"positions": "alibi"},
    "scores by layer": {"scale_attn_by_inverse_layer_idx": True},
    "scores unscaled": {"use_attn_scale": False},
    "attention-only": {"attn_only": True},
    "no norms": {"norm": None},
}


def package_lipschitz() -> dict[str, float]:
    """The package's own Lipschitz constants of the activations (test_bounds holds them to a grid)."""
    return {name: ACTIVATIONS[name].lipschitz for name in LIPSCHITZ}


def assert_same(profile: Any, paths: Paths, tolerance: float) -> None:
    """Every layer's row and the constant, path by path; sensitivities to the power that the kind speaks of."""
    power = 0.5 if profile.kind == "mean_field" else 1.0
    wanted = brute_force(paths.edges, paths.nodes, len(paths.edges[0])).log() * power
    none = torch.isneginf(wanted)
    assert torch.equal(torch.isneginf(profile.log_by_layer), none), "a path where none is, or none where one is"
    off = (profile.log_by_layer - wanted)[~none].abs().max().item()
    assert off <= tolerance, f"{profile.kind} is off by {off:.2g}"
    constant = power * paths.log_constant
    assert profile.log_constant == pytest.approx(constant, abs=tolerance, nan_ok=True)


def assert_all_same(trace: osl.Trace, reading: Reading, tolerance: float, variants: tuple[str, ...] = VARIANTS) -> None:
    for variant in variants:
        if variant in CALIBRATED and reading.experts:
            with pytest.raises(ModelError, match="router"):
                osl.path_bound(trace, variant)
            continue
        expected = reference(reading, variant, lipschitz=package_lipschitz())
        assert_same(osl.path_bound(trace, variant), expected, tolerance)
    assert_same(osl.mean_field_sensitivity(trace), mean_field(reading), tolerance)


def tolerance_of(name: str, kind: str) -> float:
    return EXACT if float64_throughout(name, kind) else INSIDE


def kept(model: Any, tokens: torch.Tensor) -> osl.Trace:
    """With the model's own patterns, where these can be held against it; else on the route that is taken by itself."""
    try:
        return record(model, tokens, attention="kept")
    except ModelError:
        return record(model, tokens)


@cache
def cell(name: str, kind: str) -> tuple[Any, torch.Tensor, Reading] | None:
    """A family's model, a prompt and what the reference reads of both; None where no recording describes it."""
    model, tokens = zoo(name, kind, seed=1), tokens_for(4, 6)
    try:
        record(model, tokens)
    except ModelError:
        return None
    return model, tokens, read(model, tokens)


def test_most_families_are_recorded() -> None:
    """What is refused is said in docs/compatibility.md, which test_zoo holds to a run; here it is left out."""
    made = [each for each in CELLS if lacking(*each) is None]
    assert sum(cell(*each) is not None for each in made) > 0.9 * len(made)


def recordable(name: str, kind: str) -> tuple[Any, torch.Tensor, Reading] | None:
    if lacking(name, kind) is not None:
        pytest.skip(lacking(name, kind))
    return cell(name, kind)


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_bounds_and_estimate_of_every_family_are_sums_over_all_paths(name: str, kind: str) -> None:
    found = recordable(name, kind)
    if found is not None:
        model, tokens, reading = found
        assert_all_same(kept(model, tokens), reading, tolerance_of(name, kind))


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_rows_made_anew_give_the_same_numbers(name: str, kind: str) -> None:
    found = recordable(name, kind)
    if found is None or read_architecture(found[0]).rotation == "unknown":
        return  # no hook shows queries and keys as they meet
    model, tokens, reading = found
    some = tuple(variant for variant in ("rollout", *CALIBRATED) if not (reading.experts and variant in CALIBRATED))
    trace = record(model, tokens, attention="recomputed")
    assert_all_same(trace, reading, max(INSIDE, tolerance_of(name, kind)), some)


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_flow_of_every_family_is_a_sum_over_all_paths(name: str, kind: str) -> None:
    found = recordable(name, kind)
    if found is None:
        return
    model, tokens, reading = found
    trace = kept(model, tokens)
    asked = [("mean_field", None), ("mean_field", 2)] + [(each, None) for each in CALIBRATED if not reading.experts]
    for paths, source in asked:
        assert_flow_of(trace, reading, paths, source, tolerance_of(name, kind))


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_in_single_precision_too(name: str, kind: str) -> None:
    """Another prompt, one token of it several times over, and other weights."""
    if recordable(name, kind) is None:
        return
    model, tokens = zoo(name, kind, seed=2, dtype=torch.float32), tokens_for(5, 4).repeat(1, 2)[:, :5]
    assert_all_same(kept(model, tokens), read(model, tokens), SINGLE)


@needs_hooked
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("seed", range(4))
def test_every_structure_is_a_sum_over_all_paths(structure: str, seed: int) -> None:
    spec = random_spec(seed) | {"n_layers": 3} | STRUCTURES[structure]
    model, tokens = hooked(seed, **spec), tokens_for(seed, 5 + seed % 2)
    trace, reading = record(model, tokens, attention="kept"), read(model, tokens)
    assert_all_same(trace, reading, EXACT)
    for kind in ("mean_field", "calibrated_full"):
        assert_flow_of(trace, reading, kind, None, EXACT)
    for variant in PRINTED:
        expected = reference(reading, variant, beta=0.7, lipschitz=package_lipschitz())
        assert_same(osl.path_bound(trace, variant, beta=0.7), expected, EXACT)
