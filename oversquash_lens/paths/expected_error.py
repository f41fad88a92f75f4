"""How far the mean-field estimate is likely to be off on a prompt, foretold from its recording alone.

One number of a recording foretells most: how much of the estimate comes from the softmax's derivative. It is small in
shallow models, whose embeddings pass through few layers that matter, and there the estimate's assumptions cost most.
The coefficients are fitted on one half of 96 prompts on three models (`python -m benchmarks.estimate_calibration`);
docs/estimate.md shows how they do on the other half.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist

from oversquash_lens.capture.trace import Trace, check_trace
from oversquash_lens.errors import InputError, one_line
from oversquash_lens.paths.mean_field import mean_field_weighing
from oversquash_lens.paths.paths import PathProfile, json_numbers
from oversquash_lens.paths.weighing import weigh

# log₁₀(estimate/truth) of a prompt: its median is OFFSET[0] + OFFSET[1] · response, give or take OFFSET_ERROR, and
# the natural log of its standard deviation over positions SPREAD[0] + SPREAD[1] · response.
OFFSET = (-0.505, 0.908)
OFFSET_ERROR = 0.141
SPREAD = (-2.573, 1.099)
LEVEL = 0.9


@dataclass(frozen=True)
class ExpectedError:
    """What is expected of log₁₀(estimate/truth) on one prompt: its median `offset`, known to ± `offset_error`, and its
    standard deviation over positions, `spread`.

    `response` is what it was foretold from: log₁₀ of how many times larger the estimate is, at the median position,
    than with attention weights held fixed.
    """

    response: float
    offset: float
    offset_error: float
    spread: float

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

    def to_dict(self) -> dict:
        numbers = {name: json_numbers(value) for name, value in asdict(self).items()}
        derived = {"size": json_numbers(self.size), "factor_90": json_numbers(self.factor())}
        return {"kind": "expected error", **numbers, **derived, "sentence": self.sentence}


def expected_error(trace: Trace | object) -> ExpectedError:
    """How far `mean_field_sensitivity` of this trace is likely to be off; no pass of the model, one sweep."""
    check_trace(trace)
    return estimate_and_error(trace)[1]


def estimate_and_error(trace: Trace) -> tuple[PathProfile, ExpectedError]:
    """`mean_field_sensitivity` and `expected_error` from the one sweep that the latter needs."""
    estimate, fixed = weigh([mean_field_weighing(trace), mean_field_weighing(trace, attention_fixed=True)])
    return estimate, foretold(estimate, fixed)


def foretold(estimate: PathProfile, attention_fixed: PathProfile) -> ExpectedError:
    """`expected_error` from the estimate with the softmax's derivative and without."""
    response = (estimate.log_by_layer[0] - attention_fixed.log_by_layer[0]) / math.log(10)
    median = response.nan_to_num(nan=0.0).median().item()  # nan: where neither hears anything
    return ExpectedError(
        response=median,
        offset=OFFSET[0] + OFFSET[1] * median,
        offset_error=OFFSET_ERROR,
        spread=math.exp(SPREAD[0] + SPREAD[1] * median),
    )


def deviations(level: float) -> float:
    """How many standard deviations to either side hold this share of normal numbers."""
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
        raise InputError(f"expected a share between 0 and 1, got level={one_line(repr(level), 60)}: give 0.9")
    return NormalDist().inv_cdf((1 + level) / 2)
