"""Measures against each other and against what replacing does, and the estimated flow against the measured one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from oversquash_lens.capture.attention import per_head
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.trace import Trace
from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured import MeasuredSensitivity
from oversquash_lens.jacobian.measured_flow import MeasuredFlow, measured_flow
from oversquash_lens.numerics import json_numbers, spearman, to_float64
from oversquash_lens.paths.flow import Flow, flows, places_of
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


def baselines(trace: Trace) -> dict[str, Float[Tensor, " pos"]]:
    """What people use instead: "attention" and "values" of the last row.

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
    return {"attention": weights.mean((0, 1)).cpu(), "values": written.mean(0).cpu()}


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


# ------------------------------------------------------------ where: the estimated flow against the measured one

LEADING = 3  # heads
WHERE_PROBES = 8  # of the measured flow: within a total variation of 0.02 of all directions


@dataclass(frozen=True)
class FlowComparison:
    """The estimated flow of one source held against the measured one."""

    source: int | slice | None
    text: str
    total_variation: Float[Tensor, " layer_plus_1"]
    """Half the sum over positions of |estimated − measured share|, entering each layer and leaving the last; from 0."""
    heads: Float[Tensor, " layer"]
    """Spearman's ρ of both over the heads of each layer; nan where it shows none."""
    estimated: tuple[tuple[int, int], ...]
    """The leading (layer, head) of the estimate, the largest share first."""
    measured: tuple[tuple[int, int], ...]
    """The same, measured."""
    error: float
    """Of the measurement, as a total variation at its worst layer."""

    @property
    def shared(self) -> int:
        """How many of the leading heads are both's."""
        return len(set(self.estimated) & set(self.measured))

    def to_dict(self) -> dict[str, Any]:
        tensors = {name: json_numbers(getattr(self, name)) for name in ("total_variation", "heads")}
        named = {name: [list(each) for each in getattr(self, name)] for name in ("estimated", "measured")}
        return {"text": self.text, **tensors, **named, "shared": self.shared, "error": json_numbers(self.error)}

    def __str__(self) -> str:
        worst, inner = int(self.total_variation.argmax()), self.total_variation[1:-1]
        typical = inner.median().item() if len(inner) else self.total_variation.median().item()
        return (
            f"flow of {self.text}: total variation {typical:.2f} (median over layers), "
            f"{self.total_variation[worst]:.2f} entering layer {worst}; ρ over the heads of a layer "
            f"{self.heads.nanmedian():.2f} (median); {self.shared} of the {len(self.measured)} leading heads are the "
            "measured ones"
        )


def compare_flows(estimated: Flow, measured: MeasuredFlow) -> FlowComparison:
    """How far the estimated flow of a source is from the measured one of the same tokens and source."""
    if estimated.tokens != measured.tokens or estimated.source != measured.source:
        raise InputError("expected flows of one prompt and one source, got two: measure and estimate the same one")
    shown = measured.head if measured.head.numel() else torch.full_like(estimated.head, math.nan)
    rho = [
        spearman(*pair) if not pair[1].isnan().any() else math.nan for pair in zip(estimated.head, shown, strict=True)
    ]
    return FlowComparison(
        source=measured.source,
        text=estimated.source_text,
        total_variation=(estimated.node.cpu() - measured.node).abs().sum(-1) / 2,
        heads=torch.tensor(rho, dtype=torch.float64, device="cpu"),
        estimated=_leading(estimated.head),
        measured=_leading(shown),
        error=measured.error,
    )


def _leading(head: Float[Tensor, "layer head"]) -> tuple[tuple[int, int], ...]:
    largest = head.nan_to_num(nan=-math.inf).flatten().topk(min(LEADING, head.numel())).indices.tolist()
    return tuple(divmod(at, head.shape[1]) for at in largest)


def sources_compared(tokens: Sequence[str], where: bool | Sequence[Any]) -> Sequence[int | slice]:
    """The positions or spans that `where` means: none, six over the prompt (True), or those that it lists.

    Raises InputError where it lists what is not there, or all tokens together, which both flows count in another way.
    """
    n = len(tokens)
    if isinstance(where, bool):
        return sorted({0, 1, n // 4, n // 2, 3 * n // 4, n - 2} & set(range(n - 1))) if where else []
    places = places_of(tokens, where)
    found = [each for each in places if each is not None]
    if len(found) < len(places):
        raise InputError(
            "expected tokens or spans, got None for all tokens together, where the measured flow counts each token "
            "alike and the estimate each path: name the tokens"
        )
    return found


def flows_compared(
    subject: Subject, ids: Int[Tensor, " pos"], trace: Trace, places: Sequence[int | slice], seed: int, progress: bool
) -> tuple[FlowComparison, ...]:
    """The estimate of a recorded prompt against a measured flow, for each place."""
    return tuple(
        compare_flows(each, measured_flow(subject.model, ids, each.source, WHERE_PROBES, seed=seed, progress=progress))
        for each in (flows(trace, places) if places else ())
    )
