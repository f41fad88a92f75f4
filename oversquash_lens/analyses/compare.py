"""Two profiles over the same tokens against each other: do they rank alike, and how far apart are their sizes?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured import MeasuredSensitivity
from oversquash_lens.paths.recursion import PathProfile

Profile = PathProfile | MeasuredSensitivity


@dataclass(frozen=True)
class Comparison:
    """Spearman's ρ, and log₁₀ of first/second over positions; nan where a profile has shares only."""

    spearman: float
    median_log10_ratio: float
    min_log10_ratio: float
    max_log10_ratio: float


def compare(first: Profile | object, second: Profile | object) -> Comparison:
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
    heard = ~(torch.isneginf(logs[0]) & torch.isneginf(logs[1]))  # what neither hears has no ratio
    ratio = ((logs[0] - logs[1]) / math.log(10))[heard]
    if not (_has_size(first) and _has_size(second)) or not len(ratio) or bool(torch.isnan(ratio).any()):
        return Comparison(spearman(*logs), math.nan, math.nan, math.nan)
    ordered = ratio.sort().values
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return Comparison(spearman(*logs), middle.item(), ordered[0].item(), ordered[-1].item())


def spearman(first: Float[Tensor, " pos"], second: Float[Tensor, " pos"]) -> float:
    """Spearman's rank correlation in [-1, 1], ties sharing their mean rank; nan where one side is constant.

    >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 15.0])), 9)
    0.5
    """
    ranks = torch.stack([_ranks(first), _ranks(second)])
    centred = ranks - ranks.mean(1, keepdim=True)
    size = centred.norm(dim=1).prod()
    return (centred[0] @ centred[1] / size).item() if size > 0 else math.nan


def _ranks(values: Float[Tensor, " pos"]) -> Float[Tensor, " pos"]:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


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
