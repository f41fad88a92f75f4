"""Bound, estimate and truth side by side, on the user's own model and prompt."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.analyses.compare import compare
from oversquash_lens.capture.about import About
from oversquash_lens.capture.recorder import NODE_PROBES, record_tokens
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import Prompt, TokenizedPrompt, tokenize
from oversquash_lens.capture.trace import Trace
from oversquash_lens.errors import whole_number
from oversquash_lens.jacobian.costs import MOST_FROZEN, check_audit, fitting_memory
from oversquash_lens.jacobian.measured import MEMORY, MeasuredSensitivity, exact_norms, frobenius_estimate, probe_rows
from oversquash_lens.jacobian.products import differentiate
from oversquash_lens.paths.bounds import CALIBRATED, PRINTED, VARIANTS
from oversquash_lens.paths.expected_error import ExpectedError, foretold
from oversquash_lens.paths.mean_field import mean_field_weighing
from oversquash_lens.paths.paths import PathProfile, json_numbers
from oversquash_lens.paths.profiles import path_weighing
from oversquash_lens.paths.weighing import weigh

ROUNDING = 1e-9  # a bound may be below the truth by this share before it counts as violated
UNIT_BETA = "proof, β = 1"


@dataclass(frozen=True)
class AuditRow:
    """One measure against the truth. `spearman` is always against ‖∂y_n/∂v_i‖_F; ratios are log₁₀ of the measure
    over the truth named by `compared_with`; `violations` counts positions where it lies below that truth.
    """

    name: str
    spearman: float
    median_log10_ratio: float
    min_log10_ratio: float
    max_log10_ratio: float
    violations: int | None
    promises_bound: bool
    compared_with: str


@dataclass(frozen=True)
class Audit:
    """Every measure of one prompt beside the truth; `str(audit)` is a table, `sentence` says what it says."""

    about: About
    tokens: tuple[str, ...]
    truth: MeasuredSensitivity
    bounds: dict[str, PathProfile]
    mean_field: PathProfile
    rows: tuple[AuditRow, ...]
    expected: ExpectedError  # of the estimate, foretold without the truth

    @property
    def sentence(self) -> str:
        estimate, paper = self._row("mean_field"), self._row("proof")
        size = 10**estimate.median_log10_ratio
        return (
            f"Of these {len(self.tokens)} tokens the mean-field estimate ranks what the last token hears "
            f"{_in_words(estimate.spearman)} (Spearman ρ = {estimate.spearman:.2f}, typically {size:.2f} times the "
            f"true size), the paper's bound {_in_words(paper.spearman)} (ρ = {paper.spearman:.2f}); "
            f"{self._soundness}."
        )

    @property
    def _soundness(self) -> str:
        promising = [row for row in self.rows if row.promises_bound and row.violations is not None]
        if not promising:
            return "no bound promises to hold on this architecture"
        closest = min(row.min_log10_ratio for row in promising)
        broken = sum(row.violations for row in promising)
        gap = f"at least 10^{math.floor(closest)} above"
        above = f"the bounds that promise to hold do, {gap} the truth"
        if not self.truth.exact:  # probes see the spectral norm from below only
            above = f"the bounds that promise to hold are not refuted, {gap} what the probes see of the truth"
        return f"the bounds that promise to hold are BROKEN at {broken} positions" if broken else above

    def _row(self, name: str) -> AuditRow:
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict:
        return {
            "kind": "audit",
            "about": self.about.to_dict(),
            "tokens": list(self.tokens),
            "sentence": self.sentence,
            "rows": [
                {k: json_numbers(v) if isinstance(v, float) else v for k, v in asdict(row).items()} for row in self.rows
            ],
            "truth": self.truth.to_dict(),
            "mean_field": self.mean_field.to_dict(),
            "expected": self.expected.to_dict(),
            "bounds": {name: profile.to_dict() for name, profile in self.bounds.items()},
        }

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        title = Text(f"{self.about}, {len(self.tokens)} tokens")  # a model's name is no markup
        table = Table(title=title, title_justify="left")
        table.add_column("measure")
        for name in ("Spearman ρ", "median log₁₀ ratio", "min", "max", "below truth"):
            table.add_column(name, justify="right")
        table.add_column("ratio to")
        for row in self.rows:
            numbers = (row.median_log10_ratio, row.min_log10_ratio, row.max_log10_ratio)
            table.add_row(
                row.name,
                _number(row.spearman),
                *map(_number, numbers),
                "–" if row.violations is None else str(row.violations),
                row.compared_with,
            )
        console = Console(
            file=io.StringIO(), width=110, legacy_windows=False, force_jupyter=False, force_terminal=False
        )
        console.print(table)
        console.print(Text(self.sentence))
        return console.file.getvalue().rstrip()


@dataclass(frozen=True)
class Truths:
    """What the measures are held against, with nothing frozen and with the attention weights frozen.

    Spectral norms are exact, or rigorous lower bounds from probes; all four come from the same probes. The last two
    are None where a model class computes attention out of sight, so that it cannot be frozen, or nobody asked.
    """

    frobenius: MeasuredSensitivity
    spectral: MeasuredSensitivity
    frozen_frobenius: MeasuredSensitivity | None
    frozen_spectral: MeasuredSensitivity | None


def audit(
    model: Any,
    prompt: Prompt,
    *,
    probes: int | None = None,
    chat: bool = False,
    bos: bool | None = None,
    beta: float | str = "measured",
    node_probes: int | None = NODE_PROBES,
    seed: int = 0,
    verify: bool = False,
    attention: str = "auto",
    memory: int = MEMORY,
    progress: bool = False,
) -> Audit:
    """Record a prompt, compute every bound and the mean-field estimate, measure the truth, and compare.

    `probes=None` measures exactly (2·d_model backward products). With probes the Frobenius truth is estimated, and
    bounds are held against ‖ωJ‖/‖ω‖, which the spectral norm is never below: a violation found so is certain.
    Beyond `MOST_FROZEN` tokens the truth is not measured again with attention frozen, which would take memory that
    grows with their square.
    """
    check_effort(probes, node_probes)
    tokenized = tokenize(model, prompt, chat=chat, bos=bos)
    check_audit(model, len(tokenized.ids), probes)
    trace = record_tokens(model, tokenized, node_probes=node_probes, seed=seed, verify=verify, attention=attention)
    effort = {"probes": probes, "seed": seed, "memory": memory, "progress": progress}
    truths = measure_truths(model, tokenized, trace.about, frozen=len(tokenized.ids) <= MOST_FROZEN, **effort)
    return held_against(truths, trace, beta)


def check_effort(probes: int | None, node_probes: int | None) -> None:
    """How many directions truth and nodes are measured in; asked before the model runs."""
    for name, number in (("probes", probes), ("node_probes", node_probes)):
        if number is not None:
            whole_number(name, number, otherwise=", or None for exact numbers")


def held_against(truths: Truths, trace: Trace, beta: float | str = "measured") -> Audit:
    """The audit of a recorded prompt whose truth is measured already; variants that the model refuses are left out."""
    known = [name for name in VARIANTS if name not in CALIBRATED or trace.support[name].state != "refused"]
    weighings = {name: path_weighing(trace, name, beta if name in PRINTED else "measured") for name in known}
    if beta == "measured":
        weighings[UNIT_BETA] = path_weighing(trace, "proof", 1.0)
    weighings["mean_field"] = path_weighing(trace, "mean_field")
    weighings["attention fixed"] = mean_field_weighing(trace, attention_fixed=True)
    bounds = dict(zip(weighings, weigh(list(weighings.values())), strict=True))
    estimate, fixed = bounds.pop("mean_field"), bounds.pop("attention fixed")
    rows = [_row("mean_field", estimate, truths.frobenius, truths, "‖J‖_F")]
    for name, bound in bounds.items():
        frozen = name == "calibrated"
        truth = truths.frozen_spectral if frozen else truths.spectral
        label = "‖J‖₂, attention frozen" if frozen else "‖J‖₂"
        label = label if truth is None or truth.exact else f"{label}, from below"
        rows.append(_row(name, bound, truth, truths, label))
    return Audit(trace.about, trace.tokens, truths.frobenius, bounds, estimate, tuple(rows), foretold(estimate, fixed))


def measure_truths(
    model: Any,
    tokenized: TokenizedPrompt,
    about: About,
    *,
    probes: int | None = None,
    seed: int = 0,
    frozen: bool = True,
    memory: int = MEMORY,
    progress: bool = False,
) -> Truths:
    """Full and, if asked, frozen-attention Jacobian of a tokenized prompt: both norms from the same products."""
    subject = Subject.of(model)
    dearest = ("attention",) if frozen else ()
    memory = fitting_memory(subject, len(tokenized.ids), memory, spectral=probes is None, freeze=dearest)

    def both_norms(freeze: tuple[str, ...]) -> Iterator[MeasuredSensitivity]:
        tape = differentiate(subject, tokenized, freeze)  # let go before the next: one graph at a time
        if probes is None:
            exact = exact_norms(tape, ("fro", "spectral"), memory, progress)
            found = {norm: (values, torch.zeros_like(values)) for norm, values in exact.items()}
        else:
            rows, covectors = probe_rows(tape, probes, seed, memory, progress)
            from_below = _spectral_from_below(rows, covectors)
            found = {"fro": frobenius_estimate(rows), "spectral": (from_below, torch.zeros_like(from_below))}
        own_seed = None if probes is None else seed
        for norm, (values, error) in found.items():
            yield MeasuredSensitivity(
                tokenized.tokens, values, error, probes is None, norm, freeze, probes, own_seed, about
            )

    frozen = frozen and subject.support["attention frozen"].state != "refused"
    return Truths(*both_norms(()), *(both_norms(("attention",)) if frozen else (None, None)))


def _spectral_from_below(
    rows: Float[Tensor, "probe pos d_model"], covectors: Float[Tensor, "probe d_model"]
) -> Float[Tensor, " pos"]:
    """max ‖ωJ‖/‖ω‖ ≤ ‖J‖₂: no estimate of it, but never above it."""
    return (rows.double().norm(dim=2) / covectors.norm(dim=1, keepdim=True)).amax(0)


def _row(
    name: str, profile: PathProfile, truth: MeasuredSensitivity | None, truths: Truths, compared_with: str
) -> AuditRow:
    violations, low, median, high = None, math.nan, math.nan, math.nan
    if truth is not None:
        sizes = compare(profile, truth)
        low, median, high = sizes.min_log10_ratio, sizes.median_log10_ratio, sizes.max_log10_ratio
        if name != "mean_field" and not math.isnan(profile.log_constant):
            below = profile.log_values < truth.values.log() + math.log1p(-ROUNDING)
            violations = int(below.sum())
    return AuditRow(
        name=name,
        spearman=compare(profile, truths.frobenius).spearman,
        median_log10_ratio=median,
        min_log10_ratio=low,
        max_log10_ratio=high,
        violations=violations,
        promises_bound=name in CALIBRATED,
        compared_with="–" if math.isnan(median) else compared_with,
    )


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _in_words(rho: float) -> str:
    if math.isnan(rho):
        return "not at all (all positions alike)"
    for least, words in ((0.9, "almost as the truth does"), (0.6, "roughly as the truth does")):
        if rho >= least:
            return words
    return "hardly as the truth does" if rho >= 0.3 else "not as the truth does"
