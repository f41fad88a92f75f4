"""Path sums of a recording: every kind of path from every input position, in one sweep over the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.attention import KeptAttention
from oversquash_lens.capture.subject import refuse_unsupported
from oversquash_lens.capture.trace import Trace, check_trace
from oversquash_lens.errors import InputError, one_line
from oversquash_lens.numerics import json_numbers, without_autocast
from oversquash_lens.paths.blocks import AttentionBlock, Buffers, EdgeBlock, LayerAttention
from oversquash_lens.paths.edges import EdgeRule, PathInputs, geometric_mean
from oversquash_lens.paths.kinds import FROM_PATTERNS, KINDS, MEAN_FIELD, MEAN_FIELD_FIXED, TABLE, VARIANTS, PathKind
from oversquash_lens.paths.recursion import PathFactors, PathProfile, log_path_sums
from oversquash_lens.results import Result


def path_bound(trace: Trace, variant: str = "proof", beta: float | str = "measured") -> PathProfile:
    """Weighted count of causal paths from every input position to the prediction, as the variant weights them.

    Args:
        trace: what `record` gave.
        variant: one of `VARIANTS` (table in paths/kinds.py). Only `calibrated` (attention weights frozen) and
            `calibrated_full` are bounds on a real model; the others are the paper's printed forms and rollout.
        beta: what the printed variants divide by: "measured" (per layer the geometric mean over positions of the
            norm's divisor; β₃ at the last token, over max|γ₃|) or one number for all norms. The calibrated variants
            use each position's own divisor and rollout none.

    Returns:
        A profile: `log_by_layer` [layer+1, pos], natural logs; `log_values` [pos] with the constant; `share` [pos].

    Raises:
        InputError: an unknown variant, or a number as `beta` with a variant that uses none.
        ModelError: the calibrated variants on an architecture where they do not hold.
    """
    check_trace(trace)
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise InputError(f"expected one of {', '.join(VARIANTS)}, got variant {one_line(repr(variant), 60)}")
    return paths_of_trace(trace, variant, beta).profile()


def mean_field_sensitivity(trace: Trace) -> PathProfile:
    """Estimate of ‖∂y_n/∂v_i‖_F for every position i, and of ‖∂y_n/∂v_i⁽ˡ⁾‖_F at every layer.

    `values` = sqrt(d_model · S), S the sum over causal paths of the product of mean-square gains; the same units
    as `measured_sensitivity`, no bound. With `log_constant` added, row l of `log_by_layer` [layer+1, pos] estimates
    the log of the sensitivity to the residual entering layer l. O(layer·pos²), no backward pass. docs/theory.md,
    section 4; docs/estimate.md says how far it is off.

    Args:
        trace: what `record` gave; anything else raises InputError.
    """
    check_trace(trace)
    return paths_of_trace(trace, "mean_field").profile()


def profiles(
    trace: Trace | object, kinds: Sequence[str] | object = KINDS, beta: float | str = "measured"
) -> dict[str, PathProfile]:
    """`path_bound` of several variants, and with "mean_field" `mean_field_sensitivity`, at little more than one's cost.

    The attention of each layer is computed once for all of them, a block of rows at a time: O(layer·pos²) time, and
    memory that does not grow with pos² unless the trace's own attention does.

    Args:
        trace: what `record` gave.
        kinds: names of `KINDS`, by default all; one that is there twice is computed once.
        beta: goes to the printed variants, as in `path_bound`; the others use none.

    Returns:
        Name of the kind -> its profile, in the order of `kinds`.

    Raises:
        InputError: no list of kinds, or one that is none. ModelError: a kind that does not hold on this architecture.
    """
    trace = checked_trace(trace)
    if isinstance(kinds, str) or not isinstance(kinds, Sequence) or not kinds:
        raise InputError(
            f"expected a list of {', '.join(KINDS)}, got kinds={one_line(repr(kinds), 60)}: give at least one"
        )
    wanted = [
        paths_of_trace(trace, kind, beta if TABLE[kind].takes_beta else "measured")
        for kind in dict.fromkeys(map(_known, kinds))
    ]
    return {found.kind: found for found in profiles_in_one_sweep(wanted)}


def path_products(
    store: Mapping[str, Any],
    variant: str = "proof",
    beta: float | str = "measured",
    batch: int | None = None,
) -> Float[Tensor, "layer_plus_1 pos"]:
    """Attention-path products from what `attention_path_hooks` left in `store`, constant left out.

    Args:
        store: what the hooks filled.
        variant: one of the printed ones or rollout (the calibrated ones and the estimate need `record`).
        beta: as in `path_bound`.
        batch: which prompt, where several ran together.

    Returns:
        float64; row l is the sensitivity of the last token to each position entering layer l, the last row the last
        token alone. See `path_bound` for logarithms that cannot overflow.

    Raises:
        InputError: another variant, a store that no hook filled, a prompt that it does not hold.
    """
    if variant not in FROM_PATTERNS:
        raise InputError(
            f"expected one of {', '.join(FROM_PATTERNS)}, got variant {variant!r}: the calibrated ones need record()"
        )
    _check_beta(beta, TABLE[variant])
    if not isinstance(store, Mapping):
        raise InputError(
            f"expected a store that hooks filled, got a {type(store).__name__}: give attention_path_hooks one"
        )
    patterns = store.get("attention")
    if not patterns:
        raise InputError(
            "expected one that attention_path_hooks(model, store) filled, got a store without attention: run the "
            "model with these hooks first"
        )
    size = len(patterns[0])
    which = 0 if batch is None and size == 1 else batch
    if which is None or not 0 <= which < size:
        raise InputError(f"expected batch=0 … {size - 1}, got a store of {size} prompts with batch={batch}")
    if not TABLE[variant].takes_beta:
        beta = 1.0
    inputs = PathInputs(
        beta_1=_stored_norm(store, "attention_scale", which, beta),
        beta_2=_stored_norm(store, "mlp_scale", which, beta),
        beta_3=1.0,
        n_heads=patterns[0].shape[1],
    )

    def blocks(layer: int) -> Iterator[AttentionBlock]:
        return LayerAttention(KeptAttention(patterns[layer][which].detach()), None, layer).blocks()

    factors = PathFactors(TABLE[variant].edges(inputs))
    return log_path_sums(blocks, [factors], patterns[0].shape[-1], len(patterns))[0].exp()


@dataclass(frozen=True)
class TracePaths:
    """The paths of one kind through one trace: the row of the table, with what this recording puts into it."""

    kind: str
    trace: Trace
    edges: EdgeRule
    log_node_gain: Float[Tensor, "layer pos"] | None
    log_constant: float
    notes: tuple[str, ...]
    power: float = 1.0

    def profile(self) -> PathProfile:
        """All path products down to every layer, as the sensitivity's logarithm."""
        return profiles_in_one_sweep([self])[0]

    def edge_block(self, layer: int, start: int, stop: int) -> EdgeBlock:
        """The edges into positions start … stop-1 from positions 0 … stop-1."""
        with without_autocast():
            return self.edges(LayerAttention.of(self.trace, layer).block(start, stop))


def paths_of_trace(trace: Trace, kind: str | PathKind, beta: float | str = "measured") -> TracePaths:
    """One kind of path on a trace: a name of `KINDS`, or a row that is not in the table."""
    row = kind if isinstance(kind, PathKind) else TABLE[_known(kind)]
    _check_beta(beta, row)
    refuse_unsupported(trace.support, row.support, trace.about.model)
    inputs = PathInputs.of_trace(trace, beta)
    notes = [row.note, row.second_note(inputs), trace.support[row.support].why]
    if trace.about.final_gain == "unknown":
        notes.append("the final gain was folded into the unembedding and is not known: y lacks it")
    return TracePaths(
        kind=row.name,
        trace=trace,
        edges=row.edges(inputs),
        log_node_gain=row.log_node_gain(inputs),
        log_constant=row.log_constant(inputs),
        notes=tuple(note for note in notes if note),
        power=row.power,
    )


def profiles_in_one_sweep(wanted: Sequence[TracePaths]) -> list[PathProfile]:
    """The profiles of several kinds of path on one trace: attention is computed once for all."""
    trace = wanted[0].trace
    assert all(each.trace is trace for each in wanted)
    factors = [PathFactors(each.edges, each.log_node_gain) for each in wanted]
    sums = log_path_sums(blocks_of(trace), factors, trace.n_positions, trace.n_layers)
    return [
        PathProfile(each.kind, trace.tokens, found * each.power, each.log_constant, trace.about, each.notes)
        for each, found in zip(wanted, sums, strict=True)
    ]


def blocks_of(trace: Trace) -> Callable[[int], Iterator[AttentionBlock]]:
    """Layer -> its blocks, one after another in the same memory."""
    buffers = Buffers()
    return lambda layer: LayerAttention.of(trace, layer, buffers).blocks()


def checked_trace(trace: object) -> Trace:
    """What every measure asks of what it is given; anything else is an InputError."""
    check_trace(trace)
    assert isinstance(trace, Trace)
    return trace


def _known(kind: object) -> str:
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"expected one of {', '.join(KINDS)}, got kind {one_line(repr(kind), 60)}")
    return kind


def _check_beta(beta: float | str, kind: PathKind) -> None:
    if beta == "measured":
        return
    number = not isinstance(beta, bool) and isinstance(beta, int | float)
    if not number or not (math.isfinite(float(beta)) and float(beta) > 0):
        raise InputError(f"expected 'measured' or a positive number, got beta={beta!r}: 1.0 divides by nothing")
    if not kind.takes_beta:
        raise InputError(f"expected no beta, got beta={beta!r} with {kind.name!r}: it uses none")


def _stored_norm(store: Mapping[str, Any], key: str, batch: int, beta: float | str) -> Float[Tensor, " layer"]:
    layers = range(len(store["attention"]))
    if beta != "measured":
        return torch.full((len(layers),), float(beta), dtype=torch.float64, device="cpu")
    if len(store.get(key, ())) != len(layers):
        raise InputError(f"expected attention_path_hooks to fill it, or beta=1.0, got a store without {key}")
    return geometric_mean(torch.stack([store[key][layer][batch].detach().cpu() for layer in layers]))


# log₁₀(estimate/truth) of a prompt: its median is OFFSET[0] + OFFSET[1] · softmax_share, give or take OFFSET_ERROR, and
# the natural log of its standard deviation over positions SPREAD[0] + SPREAD[1] · softmax_share.
OFFSET = (-0.505, 0.908)
OFFSET_ERROR = 0.141
SPREAD = (-2.573, 1.099)
LEVEL = 0.9


@dataclass(frozen=True, repr=False)
class ExpectedError(Result):
    """What is expected of log₁₀(estimate/truth) on one prompt: its median `offset`, known to ± `offset_error`, and its
    standard deviation over positions, `spread`.

    `softmax_share` is what it was predicted from: how much of the estimate the softmax's derivative makes, as log₁₀
    of how many times larger it is, at the median position, than with attention weights held fixed; 0 is nothing.
    """

    softmax_share: float
    offset: float
    offset_error: float
    spread: float

    def _title(self) -> str:
        return self.sentence

    def _table(self) -> dict[str, Any]:
        numbers = {**asdict(self), "size": self.size, "factor_90": self.factor()}
        return {"number": list(numbers), "value": list(numbers.values())}

    @property
    def size(self) -> float:
        """Estimate over truth, typically."""
        return 10**self.offset

    def factor(self, level: float = LEVEL) -> float:
        """Of all positions the share `level` is expected within this factor of estimate / `size`."""
        return 10 ** (deviations(level) * math.hypot(self.spread, self.offset_error))

    @property
    def sentence(self) -> str:
        return (
            f"From the recording alone, the estimate is expected to be {self.size:.2f} times the true size, and nine "
            f"of ten tokens to lie within a factor of {self.factor():.1f} of that."
        )

    def to_dict(self) -> dict[str, Any]:
        numbers = {name: json_numbers(value) for name, value in asdict(self).items()}
        derived = {"size": json_numbers(self.size), "factor_90": json_numbers(self.factor())}
        return {"kind": "expected error", **numbers, **derived, "sentence": self.sentence}


def expected_error(trace: Trace | object) -> ExpectedError:
    """How far `mean_field_sensitivity` of this trace is likely to be off; no pass of the model, one sweep.

    In log₁₀(estimate/truth): an offset of all positions together, and a spread over positions. Fitted on real models
    and prompts (docs/estimate.md), so it says what was seen there, no bound.

    Args:
        trace: what `record` gave; anything else raises InputError.
    """
    return estimate_and_error(checked_trace(trace))[1]


def estimate_and_error(trace: Trace) -> tuple[PathProfile, ExpectedError]:
    """`mean_field_sensitivity` and `expected_error` from the one sweep that the latter needs."""
    both = [paths_of_trace(trace, kind) for kind in (MEAN_FIELD, MEAN_FIELD_FIXED)]
    estimate, attention_fixed = profiles_in_one_sweep(both)
    return estimate, predicted_error(estimate, attention_fixed)


def predicted_error(estimate: PathProfile, attention_fixed: PathProfile) -> ExpectedError:
    """`expected_error` from the estimate with the softmax's derivative and without."""
    raised = (estimate.log_by_layer[0] - attention_fixed.log_by_layer[0]) / math.log(10)
    median = raised.nan_to_num(nan=0.0).median().item()  # nan: positions from which no path runs in either
    return ExpectedError(
        softmax_share=median,
        offset=OFFSET[0] + OFFSET[1] * median,
        offset_error=OFFSET_ERROR,
        spread=math.exp(SPREAD[0] + SPREAD[1] * median),
    )


def deviations(level: float) -> float:
    """How many standard deviations to either side hold this share of normal numbers."""
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
        raise InputError(f"expected a share between 0 and 1, got level={one_line(repr(level), 60)}: give 0.9")
    return NormalDist().inv_cdf((1 + level) / 2)
