"""Measures against each other and against what replacing does: rank correlations, sizes, and baselines of attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.attention import per_head
from oversquash_lens.capture.trace import Trace
from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured import MeasuredSensitivity
from oversquash_lens.numerics import spearman, to_float64
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.swaps.substitution import Substitution

Profile = PathProfile | MeasuredSensitivity


@dataclass(frozen=True)
class Comparison:
    """Spearman's ρ, and log₁₀ of first/second over positions; nan where a profile has shares only."""

    spearman: float
    median_log10_ratio: float
    min_log10_ratio: float
    max_log10_ratio: float


def compare(
    first: PathProfile | MeasuredSensitivity | Any, second: PathProfile | MeasuredSensitivity | Any
) -> Comparison:
    """Rank correlation and log₁₀ ratios of two profiles or truths over the same tokens, also across models.

    Refuses (InputError) to set a y with its final gain against one whose gain was folded away and is not known.
    """
    for profile in (first, second):
        if not isinstance(profile, Profile):
            raise InputError(
                "expected two results of path_bound, mean_field_sensitivity or measured_sensitivity, got a "
                f"{type(profile).__name__}: call one of them first"
            )
    if first.tokens != second.tokens:
        raise InputError(
            f"expected the same tokens in both, got profiles over {len(first.tokens)} and {len(second.tokens)} "
            "tokens, or of other texts: measure one prompt twice"
        )
    _refuse_mixed_gains(first, second)
    logs = _log_shape(first), _log_shape(second)
    connected = ~(torch.isneginf(logs[0]) & torch.isneginf(logs[1]))  # where both are 0 there is no ratio
    ratio = ((logs[0] - logs[1]) / math.log(10))[connected]
    if not (_has_size(first) and _has_size(second)) or not len(ratio) or bool(torch.isnan(ratio).any()):
        return Comparison(spearman(*logs), math.nan, math.nan, math.nan)
    ordered = ratio.sort().values
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return Comparison(spearman(*logs), middle.item(), ordered[0].item(), ordered[-1].item())


def _has_size(profile: Profile) -> bool:
    return isinstance(profile, MeasuredSensitivity) or not math.isnan(profile.log_constant)


def _log_shape(profile: Profile) -> Float[Tensor, " pos"]:
    """Log of the values; where the paper leaves the constant open, of the shares' numerators."""
    if isinstance(profile, MeasuredSensitivity):
        return profile.values.double().log()
    return profile.log_values if _has_size(profile) else profile.log_by_layer[0]


def _refuse_mixed_gains(first: Profile, second: Profile) -> None:
    unknown = [p.about is not None and p.about.final_gain == "unknown" for p in (first, second)]
    if unknown[0] != unknown[1]:
        raise InputError(
            "one model's final gain was folded into its unembedding and is not known, the other's is in its y; "
            "expected the same convention: load both without folding (fold_ln=False)"
        )


# ------------------------------------------------------------ against what replacing does


def baselines(
    trace: Trace, truth: MeasuredSensitivity, vocabulary: MeasuredSensitivity | None = None
) -> dict[str, Float[Tensor, " pos"]]:
    """What people use instead: "attention" and "values" of the last row, and "truth", the infinitesimal one.

    "vocabulary" is the latter weighted with the steps that a token can take, where it was measured.

    "attention" is the mean over layers and heads of the last position's weights. "values" weighs each with the length
    of what the head then writes, α‖v W_O‖, heads by their squares; each layer counts alike. Both sum to 1, or to less
    where a head may attend to nothing.
    """
    n = trace.n_positions
    weights = to_float64(torch.stack([layer.rows(n - 1, n)[:, 0] for layer in trace.attention]))
    factor = to_float64(trace.gains.weights.output_factor)
    values = per_head(to_float64(trace.gains.value), weights.shape[1], 1)
    lengths = einsum(factor, values, "layer head rank d, layer head pos d -> layer head pos rank").norm(dim=-1)
    written = (weights * lengths).square().sum(1).sqrt()
    written = written / written.sum(-1, keepdim=True).clamp(min=torch.finfo(written.dtype).tiny)
    found = {"attention": weights.mean((0, 1)).cpu(), "values": written.mean(0).cpu(), "truth": truth.values.double()}
    return found if vocabulary is None else {**found, "vocabulary": vocabulary.values.double()}


def rank_of_replaced(measure: Profile | Float[Tensor, " pos"], replaced: Substitution) -> float:
    """Spearman's ρ of a measure with the finite effect's size, the geometric mean over draws, over all positions."""
    logs = measure.double().log() if isinstance(measure, Tensor) else _log_shape(measure)
    return spearman(logs, replaced.distance.log())


def ceiling(replaced: Substitution) -> float:
    """ρ of one half of the draws with the other, each with as many of either kind; nan below two of a kind each."""
    halves = [
        [
            at
            for kind in (True, False)
            for at in [i for i, each in enumerate(replaced.plausible) if each is kind][start::2]
        ]
        for start in (0, 1)
    ]
    if len(replaced.plausible) < 4 or len(halves[0]) != len(halves[1]):
        return math.nan
    first, second = (replaced.distances[:, at].log().mean(-1) for at in halves)
    return spearman(first, second)
