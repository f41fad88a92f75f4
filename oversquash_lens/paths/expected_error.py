"""How far the mean-field estimate is likely to be off on a prompt, predicted from its recording alone.

One number of a recording predicts most: how much of the estimate comes from the softmax's derivative. It is small in
shallow models, whose embeddings pass through few layers that matter, and there the estimate's assumptions cost most.
The coefficients are fitted on one half of 96 prompts on three models (`python -m benchmarks.estimate_calibration`);
docs/estimate.md shows how they do on the other half.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from oversquash_lens.capture.trace import Trace
from oversquash_lens.errors import InputError, one_line
from oversquash_lens.numerics import json_numbers
from oversquash_lens.paths.kinds import MEAN_FIELD, MEAN_FIELD_FIXED
from oversquash_lens.paths.profiles import checked_trace, paths_of_trace, profiles_in_one_sweep
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.results import Result

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
