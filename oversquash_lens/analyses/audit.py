"""Bound, estimate and both truths side by side, on the user's own model and prompt."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.analyses.answer import replaced_unasked
from oversquash_lens.analyses.compare import (
    FlowComparison,
    baselines,
    ceiling,
    compare,
    flows_compared,
    rank_of_replaced,
    sources_compared,
)
from oversquash_lens.capture.fused import choose_route
from oversquash_lens.capture.recorder import NODE_PROBES, record_tokens
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import Prompt, TokenizedPrompt
from oversquash_lens.capture.trace import Trace
from oversquash_lens.errors import whole_number
from oversquash_lens.jacobian.measured import MEMORY, MeasuredSensitivity, exact_norms, frobenius_estimate, probe_rows
from oversquash_lens.jacobian.products import differentiate, truth_route
from oversquash_lens.jacobian.routes import MOST_FROZEN, fitting_memory, truth_bytes
from oversquash_lens.jacobian.steps import VocabularySteps
from oversquash_lens.memory import HELD, check_memory, kept_bytes, record_bytes
from oversquash_lens.numerics import json_numbers, spearman
from oversquash_lens.paths.kinds import CALIBRATED, MEAN_FIELD_FIXED, PRINTED, VARIANTS
from oversquash_lens.paths.profiles import ExpectedError, paths_of_trace, predicted_error, profiles_in_one_sweep
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.results import About, Result
from oversquash_lens.swaps.substitution import Substitution

ROUNDING = 1e-9  # a bound may be below the truth by this share before it counts as violated
UNIT_BETA = "proof, β = 1"
DRAWS = 4  # replacements of each token, two uniform and two plausible: a half of both kinds has a half to be held to
UNSIZED = (math.nan,) * 3  # of what has no size to be compared
WORDS = {"truth": "the infinitesimal truth", "mean_field": "the estimate", "attention": "last-row attention"}


@dataclass(frozen=True)
class AuditRow:
    """One measure against both truths. `spearman` is always against ‖∂y_n/∂v_i‖_F, `finite` against how far y moves
    when a token is replaced (nan where that was not measured); ratios are log₁₀ of the measure over the truth named by
    `compared_with`; `violations` counts positions where it lies below that truth.
    """

    name: str
    spearman: float
    median_log10_ratio: float
    min_log10_ratio: float
    max_log10_ratio: float
    violations: int | None
    promises_bound: bool
    compared_with: str
    finite: float = math.nan


@dataclass(frozen=True, repr=False)
class Audit(Result):
    """Every measure of one prompt beside both truths, the infinitesimal one and the finite one.

    `str(audit)` is a table of `rows`, `sentence` says what it says; `truth` is ‖∂y_n/∂v_i‖_F, `mean_field` and
    `bounds` (by variant) are the profiles that `rows` compare with it; two baselines of attention follow, and the
    infinitesimal truth itself, plain and weighted with the steps that a token can take ("vocabulary"). `expected` is
    the estimate's error, predicted without the truth. `replaced` is what replacing each token does, or None, and
    `not_replaced` why it was not measured. `where` holds the estimated flow against the measured one, source by source.
    """

    about: About
    tokens: tuple[str, ...]
    truth: MeasuredSensitivity
    bounds: dict[str, PathProfile]
    mean_field: PathProfile
    rows: tuple[AuditRow, ...]
    expected: ExpectedError  # of the estimate, predicted without the truth
    replaced: Substitution | None = None
    not_replaced: str = ""
    where: tuple[FlowComparison, ...] = ()

    @property
    def ceiling(self) -> float:
        """ρ of one half of the draws with the other: what no measure can pass by much; nan below four draws."""
        return math.nan if self.replaced is None else ceiling(self.replaced)

    @property
    def sentence(self) -> str:
        estimate, paper = self._row("mean_field"), self._row("proof")
        size = 10**estimate.median_log10_ratio
        return (
            f"Of these {len(self.tokens)} tokens the mean-field estimate ranks the sensitivities "
            f"{_in_words(estimate.spearman)} (Spearman ρ = {estimate.spearman:.2f}, typically {size:.2f} times the "
            f"true size), the paper's bound {_in_words(paper.spearman)} (ρ = {paper.spearman:.2f}); "
            f"{self._soundness}.{self._finite}"
        )

    @property
    def _finite(self) -> str:
        """What is said of the finite truth."""
        if self.replaced is None:
            return ""
        by = {name: self._row(name).finite for name in ("truth", "mean_field", "attention")}
        said = ", ".join(f"{WORDS[name]} at {rho:.2f}" for name, rho in by.items())
        half = "" if math.isnan(self.ceiling) else f"; one half of the draws ranks the other at {self.ceiling:.2f}"
        return f" How far the output moves when a token is replaced is ranked by {said}{half}."

    @property
    def _soundness(self) -> str:
        promising = [row for row in self.rows if row.promises_bound and row.violations is not None]
        if not promising:
            return "no bound promises to hold on this architecture"
        closest = min(row.min_log10_ratio for row in promising)
        broken = sum(row.violations or 0 for row in promising)
        gap = f"at least 10^{math.floor(closest)} above"
        above = f"the bounds that promise to hold do, {gap} the truth"
        if not self.truth.exact:  # probes see the spectral norm from below only
            above = f"the bounds that promise to hold are not refuted, {gap} what the probes see of the truth"
        return f"the bounds that promise to hold are BROKEN at {broken} positions" if broken else above

    def _row(self, name: str) -> AuditRow:
        return next(row for row in self.rows if row.name == name)

    def _title(self) -> str:
        return f"Audit of {len(self.tokens)} tokens, {self.about}; log10 ratio: measure over truth"

    def _table(self) -> Mapping[str, Sequence[Any]]:
        names = {
            "measure": "name",
            "spearman": "spearman",
            "finite": "finite",
            "median_log10_ratio": "median_log10_ratio",
            "min": "min_log10_ratio",
            "max": "max_log10_ratio",
            "below_truth": "violations",
            "ratio_to": "compared_with",
        }
        return {column: [getattr(row, field) for row in self.rows] for column, field in names.items()}

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
            "replaced": None if self.replaced is None else self.replaced.to_dict(),
            "not_replaced": self.not_replaced,
            "ceiling": json_numbers(self.ceiling),
            "mean_field": self.mean_field.to_dict(),
            "expected": self.expected.to_dict(),
            "where": [each.to_dict() for each in self.where],
            "bounds": {name: profile.to_dict() for name, profile in self.bounds.items()},
        }

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        title = Text(f"{self.about}, {len(self.tokens)} tokens")  # a model's name is no markup
        table = Table(title=title, title_justify="left")
        table.add_column("measure")
        for name in ("Spearman ρ", "ρ, replaced", "median log₁₀ ratio", "min", "max", "below truth"):
            table.add_column(name, justify="right")
        table.add_column("ratio to")
        for row in self.rows:
            numbers = (row.median_log10_ratio, row.min_log10_ratio, row.max_log10_ratio)
            table.add_row(
                row.name,
                _number(row.spearman),
                _number(row.finite),
                *map(_number, numbers),
                "–" if row.violations is None else str(row.violations),
                row.compared_with,
            )
        out = io.StringIO()
        console = Console(file=out, width=110, legacy_windows=False, force_jupyter=False, force_terminal=False)
        console.print(table)
        console.print(Text("\n".join([self.sentence, *map(str, self.where)])))
        return out.getvalue().rstrip()


@dataclass(frozen=True)
class Truths:
    """What the measures are compared with: the Jacobian with nothing frozen, and with the attention weights frozen.

    Spectral norms are exact, or rigorous lower bounds from probes; all four come from the same probes. The last two
    are None where a model class computes attention out of sight, so that it cannot be frozen, or nobody asked.
    """

    frobenius: MeasuredSensitivity
    spectral: MeasuredSensitivity
    frozen_frobenius: MeasuredSensitivity | None
    frozen_spectral: MeasuredSensitivity | None
    vocabulary: MeasuredSensitivity
    """With nothing frozen, weighted with the steps from each token to the other words."""


def audit(
    model: Any,
    prompt: Prompt,
    *,
    probes: int | None = None,
    beta: float | str = "measured",
    draws: int | None = None,
    where: bool | Sequence[Any] = False,
    chat: bool = False,
    bos: bool | None = None,
    seed: int = 0,
    verify: bool = False,
    node_probes: int | None = NODE_PROBES,
    attention: str = "auto",
    memory: int = MEMORY,
    progress: bool = False,
) -> Audit:
    """Record a prompt, compute every bound and the mean-field estimate, measure both truths, and compare.

    Beyond `MOST_FROZEN` tokens the truth is not measured again with attention frozen, which would take memory that
    grows with their square.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks of your own stay on.
        prompt: a text, or token ids [pos] or [1, pos].
        probes: backward products of the truth; None measures it exactly, by 2·d_model of them. With probes the
            Frobenius truth is estimated, and bounds are compared with ‖ωJ‖/‖ω‖, which the spectral norm is never
            below: a violation found so is certain.
        beta: of the printed bounds, "measured" or one number, as in `path_bound`.
        draws: replacements of each token for the finite truth, 0 for none; None for four up to 150 tokens, where single
            positions can be recomputed alone (see `substitution`).
        where: True, or a list of tokens or spans as `flow` takes them: the estimated flow of each is held against the
            measured one, which takes 24 backward and forward products for each; True means six positions.
        chat: as `record` takes it, and so are bos, seed, verify, node_probes and attention.
        memory: bytes for a batch of backward products.
        progress: show a bar.

    Returns:
        An `Audit`: a row for each measure, with its rank correlations with both truths, its log₁₀ ratios to the
        infinitesimal one, and how often it lies below.

    Raises:
        InputError: what cannot be used, or does not fit into memory.
        ModelError: a model of which the truth cannot be measured.
    """
    subject = Subject.of(model)
    check_effort(probes, node_probes, draws)
    recording = {"node_probes": node_probes, "seed": seed, "verify": verify, "attention": attention}
    effort = {"probes": probes, "seed": seed, "memory": memory, "progress": progress}
    tokenized = subject.tokenize(prompt, chat=chat, bos=bos)
    places = sources_compared(tokenized.tokens, where)  # refused before the long part
    trace, truths = recorded_truths(subject, tokenized, recording, effort)
    compared = flows_compared(subject, tokenized.ids, trace, places, seed, progress)
    replaced = replaced_unasked(subject, tokenized.ids, draws, DRAWS, seed, progress)
    return replace(audit_trace(trace, truths, beta, replaced), where=compared)


def check_effort(probes: int | None, node_probes: int | None, draws: int | None = None) -> None:
    """How many directions truth and nodes are measured in, and how often is replaced; asked before the model runs."""
    if draws is not None:
        whole_number("draws", draws, least=0, otherwise=", or None for what a short prompt allows")
    for name, number in (("probes", probes), ("node_probes", node_probes)):
        if number is not None:
            whole_number(name, number, otherwise=", or None for exact numbers")


def audit_trace(
    trace: Trace,
    truths: Truths,
    beta: float | str = "measured",
    replaced: tuple[Substitution | None, str] = (None, "it was not asked for"),
) -> Audit:
    """The audit of a recorded prompt whose truths are measured already, without variants that the model refuses."""
    known = [name for name in VARIANTS if name not in CALIBRATED or trace.support[name].state != "refused"]
    weighings = {name: paths_of_trace(trace, name, beta if name in PRINTED else "measured") for name in known}
    if beta == "measured":
        weighings[UNIT_BETA] = paths_of_trace(trace, "proof", 1.0)
    weighings["mean_field"] = paths_of_trace(trace, "mean_field")
    weighings["attention fixed"] = paths_of_trace(trace, MEAN_FIELD_FIXED)
    bounds = dict(zip(weighings, profiles_in_one_sweep(list(weighings.values())), strict=True))
    estimate, fixed = bounds.pop("mean_field"), bounds.pop("attention fixed")
    rows = [_row("mean_field", estimate, truths.frobenius, truths, "‖J‖_F")]
    for name, bound in bounds.items():
        frozen = name == "calibrated"
        truth = truths.frozen_spectral if frozen else truths.spectral
        label = "‖J‖₂, attention frozen" if frozen else "‖J‖₂"
        label = label if truth is None or truth.exact else f"{label}, from below"
        rows.append(_row(name, bound, truth, truths, label))
    derivatives = {"truth": truths.frobenius, "vocabulary": truths.vocabulary}
    plain = baselines(trace) | {name: each.values.double() for name, each in derivatives.items()}
    rows += [
        AuditRow(name, spearman(values.log(), plain["truth"].log()), *UNSIZED, None, False, "–")
        for name, values in plain.items()
    ]
    if replaced[0] is not None:
        measures: dict[str, Any] = {**bounds, "mean_field": estimate, **plain}
        rows = [replace(row, finite=rank_of_replaced(measures[row.name], replaced[0])) for row in rows]
    error = predicted_error(estimate, fixed)
    return Audit(trace.about, trace.tokens, truths.frobenius, bounds, estimate, tuple(rows), error, *replaced)


def recorded_truths(
    subject: Subject, tokenized: TokenizedPrompt, recording: Mapping[str, Any], effort: Mapping[str, Any]
) -> tuple[Trace, Truths]:
    """One prompt recorded once and its truth measured; what would not fit is refused before that.

    `recording`: options of `record_tokens`; `effort`: probes, seed, memory and progress of `measure_truths`.
    """
    n = len(tokenized.ids)
    check_audit(subject, n, effort["probes"])
    trace = record_tokens(subject.model, tokenized, **recording)
    return trace, measure_truths(subject, tokenized, trace.about, frozen=n <= MOST_FROZEN, **effort)


def check_audit(subject: Subject, n: int, probes: int | None) -> None:
    """Refuse what would not fit even with one backward product at a time, before the recording that comes first."""
    size, recorded = subject.size, choose_route(subject.model, subject.architecture, n)
    route = truth_route(subject, n, ("attention",) if n <= MOST_FROZEN else ())
    needed = kept_bytes(size, n, recorded, HELD) | truth_bytes(size, n, 1, 0, probes is None, route)
    what = f"recording {n} tokens with {subject.about.model} and measuring their truth"
    for parts in (record_bytes(size, n, recorded), needed):
        check_memory(parts, subject.device, what)


def measure_truths(
    subject: Subject,
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
    steps = VocabularySteps(subject, tokenized.ids)
    largest = ("attention",) if frozen else ()
    memory = fitting_memory(subject, len(tokenized.ids), memory, spectral=probes is None, freeze=largest)

    def all_norms(freeze: tuple[str, ...]) -> Iterator[MeasuredSensitivity]:
        differentiated = differentiate(subject, tokenized, freeze)  # let go before the next: one graph at a time
        if probes is None:
            norms = ("fro", "spectral", *(() if freeze else ("vocabulary",)))
            exact = exact_norms(differentiated, norms, memory, progress, steps)
            found = {norm: (values, torch.zeros_like(values)) for norm, values in exact.items()}
        else:
            rows, covectors = probe_rows(differentiated, probes, seed, memory, progress)
            from_below = _spectral_from_below(rows, covectors)
            found = {"fro": frobenius_estimate(rows), "spectral": (from_below, torch.zeros_like(from_below))}
            if not freeze:
                found["vocabulary"] = frobenius_estimate(steps(rows))
        own_seed = None if probes is None else seed
        for norm, (values, error) in found.items():
            yield MeasuredSensitivity(
                tokenized.tokens, values, error, probes is None, norm, freeze, probes, own_seed, about
            )

    frozen = frozen and subject.support["attention frozen"].state != "refused"
    frobenius, spectral, vocabulary = all_norms(())
    fixed_frobenius, fixed_spectral = all_norms(("attention",)) if frozen else (None, None)
    return Truths(frobenius, spectral, fixed_frobenius, fixed_spectral, vocabulary)


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
    for least, words in (
        (0.9, "almost as the infinitesimal truth does"),
        (0.6, "roughly as the infinitesimal truth does"),
    ):
        if rho >= least:
            return words
    return "hardly as the infinitesimal truth does" if rho >= 0.3 else "not as the infinitesimal truth does"
