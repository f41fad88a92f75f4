"""Are the sound bounds sound, and how far off is the mean-field estimate, by architecture and kind of weights?

    python -m benchmarks.soundness [--cases 10000] [--estimates 1000] [--minutes 4] [--json FILE] [--no-smollm2]

Random models from tests/random_models.py (run it from the repository): every architecture that can be recorded, alone
and in combination. Each row: cases; Spearman correlation of the mean-field estimate with ‖∂y_n/∂v_i‖_F and
log₁₀(estimate/truth) over positions, median and 5–95 %, of the first `estimates` cases; how often a sound bound was
below the exact Jacobian, at how many layers and positions it was held against it, and by how much it was above it.
Last, the trained model on two short prompts, with the exact truth. Exits with 1 where a bound was violated.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

import oversquash_lens as osl

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from random_models import Case, build, draw
from soundness import Judged, Tally, jacobians, judge

from oversquash_lens.analyses.compare import compare

SHORT = ("The capital of France is", "Once upon a time there was a little girl who lived in a village")
COLUMNS = ("cases", "spearman", "median", "low", "high", "compared", "violations", "tightest")


def estimated(case: Case) -> tuple[float | None, list[float]]:
    """Rank correlation of the mean-field estimate with the truth, and log₁₀ of their ratio where that is above 0."""
    model, tokens = build(case)
    estimate = osl.mean_field_sensitivity(osl.record(model, tokens, node_probes=None)).log_values
    truth = jacobians(model, tokens, freeze_attention=False)[0].square().sum((1, 2)).sqrt()
    reached = (truth > 1e-6 * truth.max()) & torch.isfinite(estimate)
    ratios = ((estimate - truth.log())[reached] / math.log(10)).tolist()
    ranks = torch.stack([each[reached].argsort().argsort().double() for each in (estimate, truth)])
    return (torch.corrcoef(ranks)[0, 1].item() if reached.sum() > 2 else None), ratios


class Row:
    """What the cases of one architecture, or of one kind of weights, came to."""

    def __init__(self) -> None:
        self.tally, self.ranks, self.ratios = Tally(), [], []

    def add(self, judged: list[Judged] | str, rank: float | None, ratios: list[float]) -> None:
        self.tally.add(judged)
        self.ranks += [] if rank is None else [rank]
        self.ratios += ratios

    def figures(self) -> dict:
        cuts = statistics.quantiles(self.ratios, n=20) if len(self.ratios) > 1 else [float("nan")] * 19
        return {
            "cases": self.tally.cases,
            "spearman": statistics.median(self.ranks) if self.ranks else float("nan"),
            "median": cuts[9],
            "low": cuts[0],
            "high": cuts[18],
            "compared": self.tally.compared,
            "violations": self.tally.violations,
            "tightest": min((gap for gap, _ in self.tally.tightest.values()), default=float("nan")),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--estimates", type=int, default=1000, help="cases whose estimate is compared, too")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no new case is begun after so many")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-smollm2", action="store_true")
    options = parser.parse_args()
    rows: dict[str, Row] = defaultdict(Row)
    every, started = Tally(), time.monotonic()
    for number in range(options.cases):
        if time.monotonic() - started > 60 * options.minutes:
            break
        case = draw(options.first + number)
        judged = judge(case)
        compared = number < options.estimates and not isinstance(judged, str)
        estimate = estimated(case) if compared else (None, [])
        every.add(judged)
        for name in (case.architecture, f"weights: {case.weights}"):
            rows[name].add(judged, *estimate)
        for each in [] if isinstance(judged, str) else judged:
            if each.violations:
                print(f"VIOLATED {each}", flush=True)
    found = {name: rows[name].figures() for name in sorted(rows)}
    print(f"{'':34}" + "".join(f"{column:>11}" for column in COLUMNS))
    for name, figures in found.items():
        print(f"{name:34}" + "".join(shown(figures[column]) for column in COLUMNS))
    print(every, flush=True)
    if not options.no_smollm2:
        model = osl.load_model()
        for prompt in SHORT:
            found[prompt] = trained(model, prompt)
            print(f"{model.cfg.model_name}, {prompt!r}: {found[prompt]}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 1 if every.violations else 0


def shown(value: float) -> str:
    return f"{value:11d}" if isinstance(value, int) else f"{value:11.2g}"


def trained(model, prompt: str) -> dict:
    """The audit's rows of the trained model: ranks, sizes, positions below the truth."""
    audit = osl.audit(model, prompt)
    size = compare(audit.mean_field, audit.truth)
    sound = {row.name: (row.min_log10_ratio, row.violations) for row in audit.rows if row.promises_bound}
    return {"spearman": size.spearman, "median": size.median_log10_ratio, "gap and violations": sound}


if __name__ == "__main__":
    sys.exit(main())
