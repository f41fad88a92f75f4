"""An estimate of ‖∂y_n/∂v_i‖ from one forward pass, held against the truth: 96 prompts, several models, two halves.

    python -m benchmarks.estimate_vs_truth [--models NAME ...] [--half first|second|both] [--kinds NAME ...]
                                           [--exact 128] [--probes 64] [--out build/estimate]

Truth is exact up to --exact tokens (0: nowhere) and from --probes Gaussian probes beyond; it is measured once and kept
in OUT, so a run that was stopped goes on. SmolLM2's truth is measured on the bridge and serves both classes. Whatever
is chosen or fitted is chosen on the first half; the second one is for reporting. Prints a table for each model and
writes OUT/rows.json and, for each model, OUT/MODEL.png: estimate against truth, a point for each token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

import oversquash_lens as osl
from benchmarks.estimate_prompts import KINDS, REAL, Sample, halves, tokens
from benchmarks.trained import MODELS as TRAINED
from benchmarks.trained import trained
from oversquash_lens.capture.attention import per_head
from oversquash_lens.capture.subject import Subject
from oversquash_lens.identity import subject_identity
from oversquash_lens.numerics import spearman
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.storage import write_atomically

# Whose truth a model's is: the two classes hold the same weights.
TRUTH_OF = {"bridge": "bridge", "hooked": "bridge", **{name: name for name in TRAINED}}


def with_average_keys(trace: osl.Trace) -> PathProfile:
    """The estimate as it was: every query pulls on keys as the average direction does, and nothing on its own row."""
    gains = trace.gains
    heads, d_head = gains.query_norm.shape[1], gains.key.shape[-1]
    strength = (gains.weights.key_factor.square().sum((-1, -2)) / d_head).sqrt()
    pull = gains.query_norm * per_head(strength, heads, 1)[..., None]
    before = replace(gains, key_pull=pull.to(gains.key_pull), key=torch.zeros_like(gains.key))
    return osl.mean_field_sensitivity(replace(trace, gains=before))


# Of a trace: the formula before, and the one that was kept.
ESTIMATES: dict[str, Callable[[Any], Any]] = {"before": with_average_keys, "mean_field": osl.mean_field_sensitivity}
GROUPS = {"real text": REAL, "repeated": ("repeated",), "random": ("random",)}
COLOURS = {"real text": "#3b6ea5", "repeated": "#e08214", "random": "#999999"}


@dataclass(frozen=True)
class Truth:
    """‖∂y_n/∂v_i‖_F, and its standard error: 0 where it is exact."""

    values: Float[Tensor, " pos"]
    error: Float[Tensor, " pos"]


@dataclass(frozen=True)
class Prompted:
    """Which prompt of n tokens on which model."""

    model: str
    prompt: str
    kind: str
    half: str
    n: int


@dataclass(frozen=True)
class Row(Prompted):
    """One estimate on one prompt: rank correlation, Pearson's of logs, and log₁₀ of estimate over truth."""

    estimate: str
    exact: bool
    spearman: float
    pearson: float
    median: float
    spread: float  # standard deviation over positions
    worst: float
    worst_token: str
    worst_position: int


def main() -> None:
    options = chosen_options(__doc__)
    rows = []
    for name in options.models:
        points = []
        for half, sample, ids, truth in judged(name, options):
            trace = osl.record(model_of(name), ids)
            for estimate, function in ESTIMATES.items():
                values = function(trace).values.double()
                rows.append(row(name, sample, half, estimate, trace.tokens, values, truth))
                largest = truth.values.max()
                points.append((estimate, group_of(sample.kind), truth.values / largest, values / largest))
        print(table(name, [each for each in rows if each.model == name]), flush=True)
        draw(name, points, options.out / f"{name}.png")
    write_atomically(options.out / "rows.json", json.dumps([asdict(each) for each in rows], indent=1).encode())


def chosen_options(doc: str) -> argparse.Namespace:
    """What the command line says; `doc` of the module that is run."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(TRUTH_OF), choices=list(TRUTH_OF))
    parser.add_argument("--half", default="both", choices=("first", "second", "both"))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--exact", type=int, default=128, help="tokens up to which the truth is exact")
    parser.add_argument("--probes", type=int, default=64, help="of the truth of longer prompts")
    parser.add_argument("--out", type=Path, default=Path("build/estimate"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def judged(name: str, options: argparse.Namespace) -> Iterator[tuple[str, Sample, Tensor, Truth]]:
    """Every chosen prompt: its half, its ids on this model, and the truth."""
    for half, sample in tqdm(chosen(options), desc=name, unit="prompt", leave=False):
        ids = tokens(sample, model_of(name)).cpu()
        yield half, sample, ids, measured(TRUTH_OF[name], sample, ids, options)


def chosen(options: argparse.Namespace) -> list[tuple[str, Sample]]:
    both = zip(("first", "second"), halves(), strict=True)
    wanted = [(half, sample) for half, part in both for sample in part if options.half in (half, "both")]
    return [(half, sample) for half, sample in wanted if sample.kind in options.kinds]


@cache
def model_of(name: str) -> Any:
    return trained(name) if name in TRAINED else osl.load_model(kind=name)


@cache
def mark_of(name: str) -> str:
    """Tells a model's weights from those of the same name that were trained another time."""
    return subject_identity(Subject.of(model_of(name)))["weights"][:8]


def measured(owner: str, sample: Sample, ids: Tensor, options: argparse.Namespace) -> Truth:
    """The truth, from the folder if it is there already, as it was asked for or exact."""
    probes = None if len(ids) <= options.exact else options.probes
    folder, name = options.out / "truth", f"{owner}-{mark_of(owner)}-{sample.name}"
    exact = folder / f"{name}-exact.safetensors"
    file = exact if probes is None else folder / f"{name}-{probes}.safetensors"
    for known in (exact, file):
        if known.exists():
            kept = load_file(known)
            if torch.equal(kept["ids"], ids):  # another text under this name is measured anew
                return Truth(kept["values"], kept["error"])
    found = osl.measured_sensitivity(model_of(owner), ids, probes=probes)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, save({"ids": ids, "values": found.values, "error": found.standard_error}))
    return Truth(found.values, found.standard_error)


def row(
    model: str,
    sample: Sample,
    half: str,
    estimate: str,
    words: Sequence[str],
    values: Float[Tensor, " pos"],
    truth: Truth,
) -> Row:
    logs = torch.stack([values.log10(), truth.values.double().log10()])
    ratio = logs[0] - logs[1]
    worst = int(ratio.abs().argmax())
    return Row(
        model=model,
        prompt=sample.name,
        kind=sample.kind,
        half=half,
        estimate=estimate,
        n=len(values),
        exact=not truth.error.any(),
        spearman=spearman(values, truth.values),
        pearson=torch.corrcoef(logs)[0, 1].item(),
        median=median(ratio.tolist()),
        spread=ratio.std().item(),
        worst=ratio[worst].item(),
        worst_token=words[worst],
        worst_position=worst,
    )


def group_of(kind: str) -> str:
    return next(group for group, kinds in GROUPS.items() if kind in kinds)


def table(name: str, rows: Sequence[Row]) -> str:
    """For every kind, and for all real text: medians over prompts, and the least ρ and farthest median among them."""
    lines = [f"\n{name}: medians over prompts [the worst prompt]; ratios are log10(estimate/truth)"]
    lines.append(
        f"{'estimate':12} {'half':6} {'kind':10} {'prompts':>7} {'rho':>13} {'Pearson':>8} {'ratio':>15} spread"
    )
    for estimate in ESTIMATES:
        for half in ("first", "second"):
            of_half = [each for each in rows if (each.half, each.estimate) == (half, estimate)]
            kinds = {**{kind: (kind,) for kind in KINDS}, "real text": REAL}
            for label, wanted in kinds.items():
                part = [each for each in of_half if each.kind in wanted]
                if part:
                    lines.append(f"{estimate:12} {half:6} {label:10} {_summary(part)}")
    return "\n".join(lines)


def _summary(rows: Sequence[Row]) -> str:
    rho, pearson, ratio, spread = (
        median(getattr(each, name) for each in rows) for name in ("spearman", "pearson", "median", "spread")
    )
    least, farthest = min(each.spearman for each in rows), max((each.median for each in rows), key=abs)
    return f"{len(rows):7d} {rho:5.3f} [{least:5.3f}] {pearson:8.3f} {ratio:+6.3f} [{farthest:+6.3f}] {spread:.3f}"


def draw(name: str, points: Sequence[tuple[str, str, Tensor, Tensor]], file: Path) -> None:
    """Estimate against truth, a panel for each estimate; `points`: estimate's name, group, truth and estimate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(ESTIMATES), 5), layout="constrained")
    panels = figure.subplots(1, len(ESTIMATES), squeeze=False)[0]
    for axes, estimate in zip(panels, ESTIMATES, strict=True):
        for group, colour in COLOURS.items():
            found = [pair for which, of, *pair in points if (which, of) == (estimate, group)]
            if found:
                x, y = map(torch.cat, zip(*found, strict=True))
                axes.scatter(x, y, s=4, alpha=0.4, color=colour, linewidths=0, label=group)
        axes.set(xscale="log", yscale="log", title=estimate)
        axes.set(xlabel="truth, over its prompt's largest", ylabel="estimate, over the same")
        axes.axline((0.01, 0.01), (1, 1), color="black", linewidth=0.8)
        axes.legend(markerscale=3, frameon=False)
    figure.suptitle(f"‖∂y_n/∂v_i‖ on {name}")
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
