"""How much less the last token hears than the causal mask alone would let it, and where it is lost.

Causal attention favours early tokens whatever a model has learned: they have more paths. So every number stands
against a null model, the same weights, norms and MLPs with attention spread evenly over all earlier positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.about import About
from oversquash_lens.capture.attention import UniformAttention
from oversquash_lens.capture.trace import Trace
from oversquash_lens.paths.flow import Flow, flow, flows
from oversquash_lens.paths.paths import PathProfile, effective_number, json_numbers


@dataclass(frozen=True)
class Span:
    """Tokens start … stop-1: what part of all that is heard is theirs, and what the null model would give them."""

    start: int
    stop: int
    share: float
    null_share: float


@dataclass(frozen=True, repr=False)
class Squashing:
    """What is heard of each token beside what mask geometry alone would give it.

    `share`, `null_share`: of the sensitivity (as `PathProfile.share`; each sums to 1). `flow`, `null`: where the
    paths run with the model's attention, and with even attention (of every head, to all earlier positions: also of
    one that an edit had switched off, and beyond any window).
    """

    flow: Flow
    null: Flow
    share: Float[Tensor, " pos"]
    null_share: Float[Tensor, " pos"]

    def __repr__(self) -> str:
        return f"<Squashing: {self.sentence}>"

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.flow.tokens

    @property
    def about(self) -> About:
        return self.flow.about

    @property
    def heard(self) -> float:
        """Effective number of tokens heard, from 1 to n: exp of the share's entropy."""
        return effective_number(self.share).item()

    @property
    def null_heard(self) -> float:
        """The same with even attention."""
        return effective_number(self.null_share).item()

    @property
    def index(self) -> float:
        """Squashing index, at most 1: the part of the null model's entropy that is lost. 0 as with even attention,
        1 if one token alone is heard, below 0 if more is heard than with even attention; nan for a single token.
        """
        most = math.log(self.null_heard)
        return 1 - math.log(self.heard) / most if most > 0 else math.nan

    @property
    def lift(self) -> Float[Tensor, " pos"]:
        """How many times as much of each token is heard as with even attention."""
        return self.share / self.null_share

    @property
    def relative_width(self) -> Float[Tensor, layer_plus_1]:
        """Effective width at each layer over that of the null model."""
        return self.flow.effective_width / self.null.effective_width

    @property
    def narrowest(self) -> int:
        """The layer at whose entry the paths are narrowest against the null model (leaving the last layer apart)."""
        return int(self.relative_width[:-1].argmin())

    @property
    def spans(self) -> tuple[Span, ...]:
        """Runs of tokens that lose most against the null model, the greatest loss first."""
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
        even = self.null.effective_width[layer].item()
        return (
            f"Of {n} tokens the last one hears about {self.heard:.1f}, where even attention would let it hear "
            f"{self.null_heard:.1f} (squashing index {self.index:.2f}). Against even attention the paths are "
            f"narrowest on entering layer {layer}: through {width:.1f} positions instead of {even:.1f}."
        )

    def to_dict(self) -> dict:
        numbers = ("share", "null_share", "heard", "null_heard", "index", "lift", "relative_width")
        return {
            "kind": "squashing",
            "tokens": list(self.tokens),
            **{name: json_numbers(getattr(self, name)) for name in numbers},
            "narrowest": self.narrowest,
            "spans": [vars(span) for span in self.spans],
            "flow": self.flow.to_dict(),
            "null_flow": self.null.to_dict(),
            "about": self.about.to_dict(),
        }


def squashing(trace: Trace | object, kind: str = "mean_field", profile: PathProfile | None = None) -> Squashing:
    """Flow and shares of a trace beside those of even attention; `kind` and `profile` as for `flows`. Two flows."""
    (real,) = flows(trace, (None,), kind, profile=profile)
    even = UniformAttention(trace.n_positions, trace.about.n_heads, trace.gains.value.dtype, trace.gains.value.device)
    null = flow(replace(trace, attention=(even,) * trace.n_layers), kind)
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
