"""The paper's assumptions on this model and prompt: what is true instead, and what the difference does.

Two ways to see what an assumption does. Where the truth can be measured with it imposed (attention frozen, divisors
frozen), that truth stands beside the real one. And the mean-field estimate, which makes none of the four, is computed
again with one of them imposed: if it then ranks the tokens worse or misses their size, that one matters here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.analyses.audit import Comparison, Truths, compare
from oversquash_lens.capture.trace import Trace
from oversquash_lens.jacobian.measured import MeasuredSensitivity
from oversquash_lens.numerics import json_numbers
from oversquash_lens.paths.profiles import mean_field_sensitivity
from oversquash_lens.paths.recursion import PathProfile


@dataclass(frozen=True)
class Assumption:
    """One assumption: what it claims, what was found instead, and what imposing it does to the numbers.

    `imposed` holds the mean-field estimate that makes it against the truth, `estimate` the one that does not;
    `frozen` the truth with it imposed against the real truth, where that was measured.
    """

    name: str
    claim: str
    found: str
    estimate: Comparison
    imposed: Comparison
    frozen: Comparison | None = None

    @property
    def effect(self) -> str:
        """What it did, in a sentence or two."""
        said = []
        if self.frozen is not None:
            found = self.frozen
            typical, low, high = map(_times, (found.median_log10_ratio, found.min_log10_ratio, found.max_log10_ratio))
            said.append(
                f"Imposed on the model itself, it makes the measured sensitivity {typical} times what it is ({low} to "
                f"{high} over the tokens; rank correlation {_two(found.spearman)} with the real one)."
            )
        said.append(
            f"Imposed on the estimate, it takes the rank correlation with the truth from "
            f"{_two(self.estimate.spearman)} to {_two(self.imposed.spearman)}, and the typical size from "
            f"{_times(self.estimate.median_log10_ratio)} to {_times(self.imposed.median_log10_ratio)} times the truth."
        )
        return " ".join(said)

    def to_dict(self) -> dict:
        comparisons = ("estimate", "imposed", "frozen")
        numbers = {name: _numbers(getattr(self, name)) for name in comparisons}
        return {"name": self.name, "claim": self.claim, "found": self.found, "effect": self.effect, **numbers}


def assumptions(
    trace: Trace,
    truths: Truths,
    norms_frozen: MeasuredSensitivity | None = None,
    estimate: PathProfile | None = None,
) -> tuple[Assumption, ...]:
    """Each assumption of Theorem 5.1 on this trace, beside the truth; `norms_frozen` as `measured_sensitivity`
    gives it with freeze=("norms",); `estimate`: the trace's mean-field estimate, where it is known already. Four more
    of these, no pass of the model.
    """
    truth = truths.frobenius
    real = compare(estimate or mean_field_sensitivity(trace), truth)

    def imposed(**gains: Any) -> Comparison:
        return compare(mean_field_sensitivity(_with(trace, **gains)), truth)

    gains, weights = trace.gains, trace.gains.weights
    unchanged = 1 / trace.about.n_heads  # what a head passes on if its OV is a share of the identity
    mean = torch.full_like(weights.ov_gram, unchanged**2), torch.full_like(weights.ov_trace, unchanged)
    return (
        Assumption(
            "norms",
            "A norm divides by one constant per layer, the same at every position and whatever comes in.",
            f"The divisor of {_widest('attention’s norm', gains.attention_scale)}.",
            real,
            imposed(attention_scale=_alike(gains.attention_scale)),
            None if norms_frozen is None else compare(norms_frozen, truth),
        ),
        Assumption(
            "attention",
            "Attention weights do not depend on the input.",
            "They do: every query and key is a function of the tokens before it.",
            real,
            imposed(key=torch.zeros_like(gains.key), key_pull=torch.zeros_like(gains.key_pull)),
            None if truths.frozen_frobenius is None else compare(truths.frozen_frobenius, truth),
        ),
        Assumption(
            "heads",
            "Heads pass on what they read unchanged and weigh alike; their value and output matrices drop out.",
            f"The largest gain ‖OV‖₂ of a head ranges from {weights.ov_norm.min().item():.3g} to "
            f"{weights.ov_norm.max().item():.3g} over {weights.ov_norm.numel()} heads.",
            real,
            imposed(weights=replace(weights, ov_gram=mean[0], ov_trace=mean[1])),
        ),
        Assumption(
            "mlp",
            "An MLP multiplies every position by the same constant.",
            f"The root mean square gain of the {_widest('MLP with its residual', gains.node_gain.sqrt())}.",
            real,
            imposed(node_gain=_alike(gains.node_gain)),
        ),
    )


def _with(trace: Trace, **gains: Any) -> Trace:
    return replace(trace, gains=replace(trace.gains, **gains))


def _alike(values: Float[Tensor, "layer pos"]) -> Float[Tensor, "layer pos"]:
    """Each layer's geometric mean at all of its positions, as the printed bounds take it."""
    return values.log().mean(-1, keepdim=True).exp().expand_as(values)


def _widest(what: str, values: Float[Tensor, "layer pos"]) -> str:
    """The layer in which a gain differs most between positions, in words."""
    spread = values.amax(-1) / values.amin(-1)
    layer = int(spread.argmax())
    low, high = values[layer].min().item(), values[layer].max().item()
    return (
        f"{what} ranges from {low:.3g} to {high:.3g} over the positions of layer {layer}, "
        f"{spread[layer].item():.3g} times; in the median layer {spread.median().item():.3g} times"
    )


def _times(log10_ratio: float) -> str:
    return "–" if math.isnan(log10_ratio) else f"{10**log10_ratio:.2g}"


def _two(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _numbers(found: Comparison | None) -> dict | None:
    return None if found is None else {name: json_numbers(value) for name, value in asdict(found).items()}
