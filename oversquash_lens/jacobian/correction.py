"""The estimate as prior, one or two backward probes as evidence: a posterior of the sensitivity, with an interval.

Everything is in natural logs of ‖∂y_n/∂v_i‖_F. The estimate is off by an offset that all positions share and a part of
each position's own; so is ‖ωJ_i‖, since one ω weighs all positions' Jacobians. With normal distributions for all four
the posterior is in closed form. How far the estimate scatters is learnt from how far it differs from the probes on
this very prompt; how far probes scatter follows from the rank of Jacobians (docs/estimate.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.architecture import read_architecture
from oversquash_lens.capture.recorder import NODE_PROBES, record_tokens
from oversquash_lens.capture.tokens import Prompt, tokenize
from oversquash_lens.errors import whole_number
from oversquash_lens.jacobian.measured import MEMORY, MeasuredSensitivity, differentiate, probe_rows
from oversquash_lens.numerics import json_numbers
from oversquash_lens.paths.expected_error import LEVEL, deviations
from oversquash_lens.paths.profiles import mean_field_sensitivity
from oversquash_lens.paths.recursion import PathProfile

# Measured on one half of 96 prompts on three models: python -m benchmarks.estimate_calibration
RANK = 6.0  # ‖ωJ‖²/‖J‖_F² scatters as a mean of so many squares of normal numbers
APART = 0.45  # part of that variance that is each position's own; the rest all positions share
USUAL_SPREAD, USUAL_FROM = 0.25, 8  # of the estimate, before the prompt is looked at; it counts as so many positions
OFFSET_SPREAD = 1.0  # of the estimate's offset: a factor of e, so that the probes decide


@dataclass(frozen=True)
class CorrectedSensitivity(MeasuredSensitivity):
    """‖∂y_n/∂v_i‖_F for every position i, from the estimate and `probes` backward products together.

    `low` … `high` holds it with probability `level`, as far as the model of errors does; `estimate` and `probed` are
    what went in. `weight` of the probes' differences between positions, from 0 to 1, the rest is the estimate's.
    """

    low: Float[Tensor, " pos"]
    high: Float[Tensor, " pos"]
    level: float
    estimate: PathProfile
    probed: Float[Tensor, " pos"]
    weight: float

    def to_dict(self) -> dict:
        tensors = {name: json_numbers(getattr(self, name)) for name in ("low", "high", "probed")}
        rest = {"level": self.level, "weight": self.weight, "estimate": self.estimate.to_dict()}
        return {**super().to_dict(), "kind": "corrected", **tensors, **rest}


def probe_corrected_sensitivity(
    model: Any,
    prompt: Prompt,
    *,
    probes: int = 1,
    level: float = LEVEL,
    seed: int = 0,
    chat: bool = False,
    bos: bool | None = None,
    node_probes: int | None = NODE_PROBES,
    memory: int = MEMORY,
    progress: bool = False,
) -> CorrectedSensitivity:
    """What `measured_sensitivity` would find with many probes, from `probes` of them and the mean-field estimate.

    One forward pass is recorded, a second one differentiated. Of little use beyond a few probes, whose own word then is
    enough. `seed` draws the probes, as in `measured_sensitivity`, and those of the nodes.
    """
    whole_number("probes", probes)
    deviations(level)  # refused before the model runs
    tokenized = tokenize(model, prompt, chat=chat, bos=bos)
    estimate = mean_field_sensitivity(record_tokens(model, tokenized, node_probes=node_probes, seed=seed))
    rows, _ = probe_rows(differentiate(model, read_architecture(model), tokenized), probes, seed, memory, progress)
    return corrected(estimate, rows.double().square().sum(-1).mean(0).sqrt(), probes, level, seed)


def corrected(
    estimate: PathProfile, probed: Float[Tensor, " pos"], probes: int, level: float = LEVEL, seed: int | None = None
) -> CorrectedSensitivity:
    """The posterior, from the estimate and the root mean square of ‖ωJ_i‖ over `probes` Gaussian ω.

    Where estimate or probes know of no path at all, the probes' word is taken.
    """
    variance, bias = _scatter(RANK * probes)
    own, shared = APART * variance, (1 - APART) * variance
    prior, seen = estimate.log_values, probed.log() - bias
    known = torch.isfinite(prior) & torch.isfinite(seen)
    apart = (seen - prior)[known]
    offset = apart.mean() if len(apart) else prior.new_zeros(())
    spread = _spread(apart, own)
    weight = spread / (spread + own)
    part = 1 / max(1, len(apart))
    common = OFFSET_SPREAD**2 + spread * part  # of the mean over positions, before the probes
    held = common / (common + shared + own * part)
    log_values = torch.where(known, prior + held * offset + weight * (seen - prior - offset), probed.log())
    error = ((1 - part) * weight * own + (1 - held) * common) ** 0.5
    reach = deviations(level) * error
    return CorrectedSensitivity(
        tokens=estimate.tokens,
        values=log_values.exp(),
        standard_error=log_values.exp() * error,
        exact=False,
        norm="fro",
        freeze=(),
        probes=probes,
        seed=seed,
        about=estimate.about,
        low=(log_values - reach).exp(),
        high=(log_values + reach).exp(),
        level=level,
        estimate=estimate,
        probed=probed,
        weight=weight,
    )


def _scatter(squares: float) -> tuple[float, float]:
    """Variance and mean of ½ ln(χ²/squares), the log of the root of a mean of so many squares of normal numbers."""
    half = torch.tensor(squares / 2, dtype=torch.float64, device="cpu")
    return torch.polygamma(1, half).item() / 4, (torch.digamma(half) - half.log()).item() / 2


def _spread(apart: Float[Tensor, " pos"], own: float) -> float:
    """Variance of the estimate's own part, from how far estimate and probes differ, and what is usual."""
    freedom = max(0, len(apart) - 1)
    found = max(0.0, apart.var().item() - own) if freedom else 0.0
    return (USUAL_FROM * USUAL_SPREAD**2 + freedom * found) / (USUAL_FROM + freedom)
