"""Does the estimate know when it is off? Its expected error, and its correction by one or two probes, held to account.

    python -m benchmarks.estimate_calibration [--models NAME ...] [--half first|second|both] [--kinds NAME ...]
                                              [--exact 128] [--probes 64] [--out build/estimate]

Options, prompts and kept truths are those of benchmarks.estimate_vs_truth. Prints the coefficients that the first half
asks for, then for each model and half what became of them, and writes OUT/calibration.png: how many positions lie in
the intervals that promise to hold them, and the predicted error beside the one that was found, prompt by prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, linear_regression, median, stdev, variance
from typing import Any

from jaxtyping import Float
from torch import Tensor

import oversquash_lens as osl
from benchmarks.estimate_prompts import REAL, Sample
from benchmarks.estimate_vs_truth import GROUPS, Prompted, Truth, chosen_options, judged, model_of
from oversquash_lens.numerics import spearman
from oversquash_lens.paths.profiles import deviations, estimate_and_error
from oversquash_lens.storage import write_atomically

SEED = 1  # of the probes that correct: others than those that the truth comes from
PROBES = (1, 2)
LEVELS = tuple(step / 20 for step in range(1, 20))
COLOURS = {"bridge": "#3b6ea5", "hooked": "#8c6bb1", "learned": "#e08214", "deep": "#41ab5d"}


@dataclass(frozen=True)
class Correction:
    """What some probes alone, and the estimate corrected by them, make of a prompt."""

    probes_rho: float
    rho: float
    covered: tuple[float, ...]  # share of positions inside the interval of each of `LEVELS`
    probes_error: float  # mean |ln| off, all sizes included
    error: float
    noise_variance: float  # of ln of what the probes alone say over truth, over positions
    noise_mean: float


@dataclass(frozen=True)
class Row(Prompted):
    """One prompt on one model; all logs of the estimate's error are log₁₀(estimate/truth)."""

    response: float
    predicted: float  # root mean square error, as expected_error has it
    came: float
    offset: float
    spread: float
    covered: tuple[float, ...]
    corrections: dict[int, Correction]


def main() -> None:
    options = chosen_options(__doc__)
    rows = []
    for name in options.models:
        for half, sample, ids, truth in judged(name, options):
            rows.append(row(name, half, sample, ids, truth))
    print(coefficients([each for each in rows if each.half == "first" and each.model != "hooked"]))
    print(table(rows), flush=True)
    write_atomically(options.out / "calibration.json", json.dumps([asdict(each) for each in rows], indent=1).encode())
    draw(rows, options.out / "calibration.png")


def row(name: str, half: str, sample: Sample, ids: Tensor, truth: Truth) -> Row:
    estimate, expected = estimate_and_error(osl.record(model_of(name), ids))
    off = (estimate.values / truth.values.double()).log10()
    within = [expected.factor(level) for level in LEVELS]
    return Row(
        model=name,
        prompt=sample.name,
        kind=sample.kind,
        half=half,
        n=len(ids),
        response=expected.softmax_share,
        predicted=math.hypot(expected.offset, expected.offset_error, expected.spread),
        came=off.square().mean().sqrt().item(),
        offset=off.median().item(),
        spread=off.std().item(),
        covered=tuple(_inside(off - expected.offset, math.log10(factor)) for factor in within),
        corrections={probes: correction(name, ids, probes, truth) for probes in PROBES},
    )


def correction(name: str, ids: Tensor, probes: int, truth: Truth) -> Correction:
    found = osl.probe_corrected_sensitivity(model_of(name), ids, probes=probes, seed=SEED)
    values = truth.values.double()
    noise, off = (found.probed / values).log(), (found.values / values).log()
    error = found.standard_error / found.values  # of the logarithm
    return Correction(
        probes_rho=spearman(found.probed, values),
        rho=spearman(found.values, values),
        covered=tuple(_inside(off, error * deviations(level)) for level in LEVELS),
        probes_error=noise.abs().mean().item(),
        error=off.abs().mean().item(),
        noise_variance=noise.var().item(),
        noise_mean=noise.mean().item(),
    )


def _inside(off: Float[Tensor, " pos"], reach: Float[Tensor, " pos"] | float) -> float:
    return (off.abs() <= reach).double().mean().item()


def coefficients(rows: Sequence[Row]) -> str:
    """What expected.py and corrected.py hold, as these rows would have it."""
    if len(rows) < 3:
        return "too few prompts of the first half to fit anything"
    response = [each.response for each in rows]
    offset, spread = (
        linear_regression(response, values)
        for values in ([each.offset for each in rows], [math.log(each.spread) for each in rows])
    )
    error = stdev(each.offset - offset.intercept - offset.slope * each.response for each in rows)
    apart = fmean(each.corrections[1].noise_variance for each in rows)
    shared = fmean(
        variance(each.corrections[1].noise_mean for each in rows if each.model == name)
        for name in {each.model for each in rows}
    )
    return (
        f"first half: OFFSET = ({offset.intercept:.3f}, {offset.slope:.3f}), OFFSET_ERROR = {error:.3f}, "
        f"SPREAD = ({spread.intercept:.3f}, {spread.slope:.3f})\n"
        f"one probe's ln scatters by {apart:.3f} (variance) between positions and by {shared:.3f} from prompt to prompt"
    )


def table(rows: Sequence[Row]) -> str:
    lines = [
        "medians over prompts; ρ with the worst prompt; covered: share of positions inside the 90 % interval",
        f"{'':26}{'expected error':>24}{'one probe':>16}{'corrected':>23}{'two probes':>17}{'corrected':>23}",
        f"{'model':8} {'half':6} {'kinds':10}{'predicted':>9}{'found':>6}{'covered':>8}"
        + (f"{'rho':>8}{'':8}" + f"{'rho':>8}{'':8}{'covered':>8}") * 2,
    ]
    for name in dict.fromkeys(each.model for each in rows):
        for half in ("first", "second"):
            for label, kinds in GROUPS.items():
                part = [each for each in rows if (each.model, each.half) == (name, half) and each.kind in kinds]
                if part:
                    lines.append(f"{name:8} {half:6} {label:10}{_summary(part)}")
    return "\n".join(lines)


def _summary(rows: Sequence[Row]) -> str:
    at = LEVELS.index(0.9)
    text = f"{median(each.predicted for each in rows):9.2f}{median(each.came for each in rows):6.2f}"
    text += f"{fmean(each.covered[at] for each in rows):8.2f}"
    for probes in PROBES:
        found = [each.corrections[probes] for each in rows]
        for values in ([each.probes_rho for each in found], [each.rho for each in found]):
            text += f"{median(values):8.3f} [{min(values):.3f}]"
        text += f"{fmean(each.covered[at] for each in found):8.2f}"
    return text


def draw(rows: Sequence[Row], file: Path) -> None:
    """Intervals: promised against kept. Errors: predicted beside found."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    promised, corrected, errors = figure.subplots(1, 3)
    shown = [each for each in rows if each.half == "second"] or list(rows)
    for name in dict.fromkeys(each.model for each in shown):
        part = [each for each in shown if each.model == name]
        kept: dict[Any, list[tuple[float, ...]]] = {
            promised: [each.covered for each in part if each.kind in REAL],
            corrected: [each.corrections[1].covered for each in part if each.kind in REAL],
        }
        for axes, covered in kept.items():
            if covered:
                axes.plot(LEVELS, [fmean(at) for at in zip(*covered, strict=True)], color=COLOURS[name], label=name)
        for real, marker in ((True, "o"), (False, "x")):
            points = [(each.predicted, each.came) for each in part if (each.kind in REAL) == real]
            if points:
                label = f"{name}, {'real text' if real else 'repeated or random'}"
                errors.scatter(*zip(*points, strict=True), s=14, marker=marker, color=COLOURS[name], label=label)
    for axes, title in ((promised, "expected error, real text"), (corrected, "corrected by one probe, real text")):
        axes.axline((0, 0), (1, 1), color="black", linewidth=0.8)
        axes.set(
            title=title, xlabel="share of positions promised", ylabel="share found inside", xlim=(0, 1), ylim=(0, 1)
        )
        axes.legend(frameon=False)
    errors.axline((0.1, 0.1), (1, 1), color="black", linewidth=0.8)
    errors.set(title="each prompt", xscale="log", yscale="log")
    errors.set(xlabel="error predicted (root mean square of log₁₀)", ylabel="error that was found")
    errors.legend(frameon=False, fontsize=7)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
