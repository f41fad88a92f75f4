"""Over how many fewer tokens the sensitivity is spread than the causal mask alone would spread it, and where.

Causal attention favours early tokens whatever a model has learned: they have more paths. So every number is compared
with a null model, the same weights, norms and MLPs with attention uniform over all earlier positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.attention import UniformAttention
from oversquash_lens.capture.trace import Trace
from oversquash_lens.errors import InputError, whole_number
from oversquash_lens.numerics import effective_number, json_numbers
from oversquash_lens.paths.flow import Flow, flow, flows
from oversquash_lens.paths.profiles import checked_trace
from oversquash_lens.paths.recursion import PathProfile, log_path_products
from oversquash_lens.results import About, Result


@dataclass(frozen=True)
class Span:
    """Tokens start … stop-1: their share of the sensitivity, and what the null model would give them."""

    start: int
    stop: int
    share: float
    null_share: float


@dataclass(frozen=True, repr=False)
class Squashing(Result):
    """Each token's share of the sensitivity beside what mask geometry alone would give it.

    `share`, `null_share`: of the sensitivity (as `PathProfile.share`; each sums to 1). `flow`, `null`: where the
    paths run with the model's attention, and with uniform attention (of every head, to all earlier positions: also of
    one that an edit had switched off, and beyond any window).
    """

    flow: Flow
    null: Flow
    share: Float[Tensor, " pos"]
    null_share: Float[Tensor, " pos"]

    _ranked_by = "share"

    def _title(self) -> str:
        return self.sentence

    def _table(self) -> dict[str, Any]:
        return {
            "position": range(len(self.tokens)),
            "token": self.tokens,
            "share": self.share,
            "null_share": self.null_share,
            "lift": self.lift,
        }

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.flow.tokens

    @property
    def about(self) -> About:
        return self.flow.about

    @property
    def effective_tokens(self) -> float:
        """Effective number of tokens that the sensitivity is spread over, from 1 to n: exp of the share's entropy."""
        return effective_number(self.share).item()

    @property
    def null_effective_tokens(self) -> float:
        """The same with uniform attention."""
        return effective_number(self.null_share).item()

    @property
    def index(self) -> float:
        """Squashing index, at most 1: the part of the null model's entropy that is lost. 0 as with uniform attention,
        1 if all sensitivity is to one token, below 0 if it is spread over more; nan for a single token.
        """
        most = math.log(self.null_effective_tokens)
        return 1 - math.log(self.effective_tokens) / most if most > 0 else math.nan

    @property
    def lift(self) -> Float[Tensor, " pos"]:
        """How many times each token's share is what it is with uniform attention."""
        return self.share / self.null_share

    @property
    def relative_width(self) -> Float[Tensor, " layer_plus_1"]:
        """Effective width at each layer over that of the null model."""
        return self.flow.effective_width / self.null.effective_width

    @property
    def narrowest(self) -> int:
        """The layer at whose entry the paths are narrowest compared with the null (leaving the last layer apart)."""
        return int(self.relative_width[:-1].argmin())

    @property
    def spans(self) -> tuple[Span, ...]:
        """Runs of tokens that lose most compared with the null model, the greatest loss first."""
        loss = (self.null_share - self.share).tolist()
        spans = [
            Span(start, stop, self.share[start:stop].sum().item(), self.null_share[start:stop].sum().item())
            for start, stop in maximal_runs(loss)
        ]
        return tuple(sorted(spans, key=lambda span: span.share - span.null_share))

    @property
    def sentence(self) -> str:
        n, layer = len(self.tokens), self.narrowest
        width = self.flow.effective_width[layer].item()
        uniform = self.null.effective_width[layer].item()
        return (
            f"Of {n} tokens the last one is sensitive to about {self.effective_tokens:.1f} (effective number), with "
            f"uniform attention to {self.null_effective_tokens:.1f} (squashing index {self.index:.2f}). Compared with "
            f"uniform attention the paths are narrowest on entering layer {layer}: through {width:.1f} positions "
            f"instead of {uniform:.1f}."
        )

    def to_dict(self) -> dict[str, Any]:
        numbers = ("share", "null_share", "effective_tokens", "null_effective_tokens", "index", "lift")
        return {
            "kind": "squashing",
            "tokens": list(self.tokens),
            **{name: json_numbers(getattr(self, name)) for name in (*numbers, "relative_width")},
            "narrowest": self.narrowest,
            "spans": [vars(span) for span in self.spans],
            "flow": self.flow.to_dict(),
            "null_flow": self.null.to_dict(),
            "about": self.about.to_dict(),
        }


def squashing(trace: Trace | object, kind: str = "mean_field", profile: PathProfile | None = None) -> Squashing:
    """Flow and shares of a trace beside those of uniform attention. Two flows.

    Args:
        trace: what `record` gave; anything else raises InputError.
        kind: "mean_field" or a variant of `path_bound`.
        profile: this kind's own, where it is known already, as from `profiles`; it saves a sweep.

    Returns:
        Shares [pos] that sum to 1, the squashing index (at most 1), effective numbers of tokens (1 … n), the layer
        where the paths are narrowest, and the spans of tokens that lose most. docs/theory.md, section 9.
    """
    trace = checked_trace(trace)
    (real,) = flows(trace, (None,), kind, profile=profile)
    null = flow(with_uniform_attention(trace), kind)
    return Squashing(real, null, _share(real), _share(null))


def _share(flow: Flow) -> Float[Tensor, " pos"]:
    """Of the sensitivity, the power of the path sum that the kind speaks of."""
    return (flow.log_above[0] * flow.power).softmax(-1)


def maximal_runs(scores: Sequence[float | int]) -> list[tuple[int, int]]:
    """All maximal scoring runs (start, stop): no run's sum grows by lengthening or shortening it, none overlap.

    Ruzzo & Tompa (1999), linear in practice.

    >>> maximal_runs([1, -3, 2, -1, 3])
    [(0, 1), (2, 5)]
    """
    runs: list[tuple[int, int, float, float]] = []  # start, stop, sum before the run, sum up to its end
    total = 0.0
    for i, score in enumerate(scores):
        total += score
        if score <= 0:
            continue
        start, before = i, total - score
        while True:
            place = next((k for k in reversed(range(len(runs))) if runs[k][2] < before), None)
            if place is None or runs[place][3] >= total:
                break
            start, before = runs[place][0], runs[place][2]
            del runs[place:]
        runs.append((start, i + 1, before, total))
    return [run[:2] for run in runs]


def with_uniform_attention(trace: Trace) -> Trace:
    """The same recording, weights, norms and MLPs, with every head attending alike to its own position and all
    earlier ones: also a head that an edit had switched off, and beyond any window.
    """
    value = trace.gains.value
    uniform = UniformAttention(trace.n_positions, trace.about.n_heads, value.dtype, value.device)
    return replace(trace, attention=(uniform,) * trace.n_layers)


def count_paths(n: int, n_layers: int, tokens: Sequence[str] | None = None) -> PathProfile:
    """Number of causal paths from each of n positions to the last through `n_layers` layers.

    Null model: every edge of the causal mask counts 1, so `values` is binomial(n-i+L-1, L-1), i = 1 … n
    (exact to float64 rounding, in log space beyond). `tokens` name the positions, to set it against a prompt's profile.

    >>> count_paths(4, 2).values.round()
    tensor([4., 3., 2., 1.], dtype=torch.float64)
    """
    return _null_model("count_paths", n, n_layers, torch.ones_like, "every causal edge is 1", tokens)


def uniform_causal(n: int, n_layers: int, residual: float = 0.0, tokens: Sequence[str] | None = None) -> PathProfile:
    """Null model of pure mask geometry: every position attends alike to itself and all earlier ones.

    `residual` in [0, 1) is the share of the residual stream in each layer: 0 is α_jk = 1/j alone, 0.5 is what
    attention rollout assumes. `values` sums to 1.

    >>> uniform_causal(4, 1).values
    tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    if not 0.0 <= residual < 1.0:
        raise InputError(f"expected 0 ≤ residual < 1, got residual={residual}")
    note = f"uniform causal attention, residual share {residual:g}"

    def weight(dest: Tensor) -> Tensor:
        return (1 - residual) / (dest + 1)

    return _null_model("uniform_causal", n, n_layers, weight, note, tokens, residual)


def _null_model(
    kind: str,
    n: int,
    n_layers: int,
    weight: Callable[[Tensor], Tensor],
    note: str,
    tokens: Sequence[str] | None,
    residual: float = 0.0,
) -> PathProfile:
    """Every causal edge into a position weighs the same, `residual` more on the diagonal."""
    whole_number("n", n)
    whole_number("n_layers", n_layers)

    def edge_rows(layer: int, start: int, stop: int) -> Float[Tensor, "dest src"]:
        dest = torch.arange(start, stop, dtype=torch.float64, device="cpu")[:, None]
        src = torch.arange(n, dtype=torch.float64, device="cpu")
        return weight(dest) * (src <= dest) + residual * (src == dest)

    names = tuple(str(i) for i in range(1, n + 1)) if tokens is None else tuple(tokens)
    return PathProfile(kind, names, log_path_products(edge_rows, n, n_layers), 0.0, None, (note,))
