"""The estimate as prior, one or two backward probes as evidence: a posterior of the sensitivity, with an interval.

Everything is in natural logs of ‖∂y_n/∂v_i‖_F. The estimate is off by an offset that all positions share and a part of
each position's own; so is ‖ωJ_i‖, since one ω weighs all positions' Jacobians. With normal distributions for all four
the posterior is in closed form. How far the estimate scatters is learnt from how far it differs from the probes on
this very prompt; how far probes scatter follows from the rank of Jacobians (docs/estimate.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.about import About
from oversquash_lens.capture.recorder import NODE_PROBES, record_tokens
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import Prompt
from oversquash_lens.errors import whole_number
from oversquash_lens.jacobian.measured import MEMORY, MeasuredSensitivity, probe_rows
from oversquash_lens.jacobian.products import differentiate
from oversquash_lens.numerics import json_numbers
from oversquash_lens.paths.expected_error import LEVEL, deviations
from oversquash_lens.paths.profiles import mean_field_sensitivity
from oversquash_lens.paths.recursion import PathProfile

# Measured on one half of 96 prompts on three models: python -m benchmarks.estimate_calibration
RANK = 6.0  # ‖ωJ‖²/‖J‖_F² scatters as a mean of so many squares of normal numbers
APART = 0.45  # part of that variance that is each position's own; the rest all positions share
USUAL_SPREAD, USUAL_FROM = 0.25, 8  # of the estimate, before the prompt is looked at; it counts as so many positions
OFFSET_SPREAD = 1.0  # of the estimate's offset: a factor of e, so that the probes decide


@dataclass(frozen=True, repr=False)
class CorrectedSensitivity(MeasuredSensitivity):
    """‖∂y_n/∂v_i‖_F for every position i, from the estimate and `probes` backward products together."""

    low: Float[Tensor, " pos"]
    high: Float[Tensor, " pos"]
    """`low` … `high` holds the sensitivity with probability `level`, as far as the model of errors does."""
    level: float
    estimate: PathProfile
    probed: Float[Tensor, " pos"]
    """Root mean square of ‖ωJ_i‖ over the probes."""
    weight: float
    """Of the probes' differences between positions, from 0 to 1; the rest is the estimate's."""

    def _title(self) -> str:
        return (
            f"‖∂y_n/∂v_i‖_F over {len(self.tokens)} tokens, from the mean-field estimate corrected by "
            f"{self.probes} probes (seed {self.seed}, weight {self.weight:.2f}), intervals of {self.level:.0%}: "
            f"{self.about}"
        )

    def _table(self) -> Mapping[str, Sequence[Any]]:
        columns = {"low": self.low, "high": self.high, "probed": self.probed, "estimate": self.estimate.values}
        return {**super()._table(), **{name: values.tolist() for name, values in columns.items()}}

    def to_dict(self) -> dict:
        tensors = {name: json_numbers(getattr(self, name)) for name in ("low", "high", "probed")}
        rest = {"level": self.level, "weight": self.weight, "estimate": self.estimate.to_dict()}
        return {**super().to_dict(), "kind": "corrected", **tensors, **rest}


def probe_corrected_sensitivity(
    model: Any,
    prompt: Prompt,
    probes: int = 1,
    *,
    level: float = LEVEL,
    chat: bool = False,
    bos: bool | None = None,
    seed: int = 0,
    node_probes: int | None = NODE_PROBES,
    memory: int = MEMORY,
    progress: bool = False,
) -> CorrectedSensitivity:
    """What `measured_sensitivity` would find with many probes, from a few of them and the mean-field estimate.

    One forward pass is recorded, a second one differentiated. Beyond a few probes the estimate adds little.

    - `model`, `prompt`, `chat`, `bos`, `memory`, `progress`: as in `measured_sensitivity`.
    - `probes`: backward products, at least 1.
    - `level`: probability that an interval is meant to hold the truth with, between 0 and 1.
    - `seed`: draws the probes, the same as in `measured_sensitivity`, and those of the nodes.
    - `node_probes`: pairs of directions at each node of the recording, or None for exact gains.

    Raises InputError for options and prompts that cannot be used, and what `record` and `measured_sensitivity` raise.
    """
    whole_number("probes", probes)
    deviations(level)  # refused before the model runs
    subject = Subject.of(model)
    subject.require("truth")
    tokenized = subject.tokenize(prompt, chat=chat, bos=bos)
    trace = record_tokens(subject.model, tokenized, node_probes=node_probes, seed=seed)
    rows, _ = probe_rows(differentiate(subject, tokenized), probes, seed, memory, progress)
    probed = rows.double().square().sum(-1).mean(0).sqrt()
    return corrected(mean_field_sensitivity(trace), probed, trace.about, probes, level, seed)


def corrected(
    estimate: PathProfile,
    probed: Float[Tensor, " pos"],
    about: About,
    probes: int,
    level: float = LEVEL,
    seed: int | None = None,
) -> CorrectedSensitivity:
    """The posterior, from the estimate and the root mean square of ‖ωJ_i‖ over `probes` Gaussian ω.

    Where the estimate or the probes know of no path at all, the probes alone are taken.
    """
    variance, bias = _scatter(RANK * probes)
    own, shared = APART * variance, (1 - APART) * variance
    prior, evidence = estimate.log_values, probed.log() - bias
    known = torch.isfinite(prior) & torch.isfinite(evidence)
    difference = (evidence - prior)[known]
    offset = difference.mean() if len(difference) else prior.new_zeros(())
    spread = _spread(difference, own)
    weight = spread / (spread + own)
    part = 1 / max(1, len(difference))
    common = OFFSET_SPREAD**2 + spread * part  # of the mean over positions, before the probes
    offset_weight = common / (common + shared + own * part)
    posterior = prior + offset_weight * offset + weight * (evidence - prior - offset)
    log_values = torch.where(known, posterior, probed.log())
    error = ((1 - part) * weight * own + (1 - offset_weight) * common) ** 0.5
    half_width = deviations(level) * error
    return CorrectedSensitivity(
        tokens=estimate.tokens,
        values=log_values.exp(),
        standard_error=log_values.exp() * error,
        exact=False,
        norm="fro",
        freeze=(),
        probes=probes,
        seed=seed,
        about=about,
        low=(log_values - half_width).exp(),
        high=(log_values + half_width).exp(),
        level=level,
        estimate=estimate,
        probed=probed,
        weight=weight,
    )


def _scatter(squares: float) -> tuple[float, float]:
    """Variance and mean of ½ ln(χ²/squares), the log of the root of a mean of so many squares of normal numbers."""
    half = torch.tensor(squares / 2, dtype=torch.float64, device="cpu")
    return torch.polygamma(1, half).item() / 4, (torch.digamma(half) - half.log()).item() / 2


def _spread(difference: Float[Tensor, " pos"], own: float) -> float:
    """Variance of the estimate's own part, from how far estimate and probes differ, and what is usual."""
    freedom = max(0, len(difference) - 1)
    found = max(0.0, difference.var().item() - own) if freedom else 0.0
    return (USUAL_FROM * USUAL_SPREAD**2 + freedom * found) / (USUAL_FROM + freedom)
