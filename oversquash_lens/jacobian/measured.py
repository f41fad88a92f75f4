"""The truth: how much y_n, what the unembedding reads, moves with each position's embedding.

‖∂y_n/∂v_i⁽⁰⁾‖ by autograd from the unembedding's input at the last position to the residual that enters the first
block. One backward product gives every position at once, so the exact norm costs d_model products whatever the prompt's
length, and a few Gaussian probes estimate the Frobenius norm with a standard error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.mlp import random_source
from oversquash_lens.capture.recorder import NODE_PROBES, record_tokens
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import Prompt
from oversquash_lens.errors import InputError, whole_number
from oversquash_lens.jacobian.products import Differentiated, differentiate
from oversquash_lens.jacobian.routes import fitting_memory
from oversquash_lens.jacobian.steps import VocabularySteps
from oversquash_lens.jacobian.targets import target_of
from oversquash_lens.numerics import json_numbers
from oversquash_lens.paths.profiles import LEVEL, deviations, mean_field_sensitivity
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.results import About, Result

NORMS = ("fro", "spectral", "vocabulary")
FREEZABLE = ("attention", "norms")
MEMORY = 1 << 30  # bytes that one batch of backward products may take


@dataclass(frozen=True, repr=False)
class MeasuredSensitivity(Result):
    """‖∂y_n/∂v_i‖ for every position i, measured: in units of y per unit of the residual stream.

    With a `target` F it is ‖∂F/∂v_i‖ instead, in units of F (nats or logits) per unit of the residual stream.
    """

    tokens: tuple[str, ...]
    values: Float[Tensor, " pos"]
    standard_error: Float[Tensor, " pos"]
    """Of `values`; 0 where `exact`."""
    exact: bool
    norm: str
    """One of `NORMS`."""
    freeze: tuple[str, ...]
    """What was held fixed, of `FREEZABLE`."""
    probes: int | None
    """How many Gaussian probes; None where `exact`."""
    seed: int | None
    about: About
    target: str = field(default="", kw_only=True)
    """The number F of the prediction, in words; empty where it is all of y_n."""

    _ranked_by: ClassVar[str | None] = "share"

    @property
    def share(self) -> Float[Tensor, " pos"]:
        """Each position's part of the sum of sensitivities; sums to 1."""
        return self.values / self.values.sum()

    def _title(self) -> str:
        how = "exact" if self.exact else f"{self.probes} probes, seed {self.seed}"
        frozen = f", {' and '.join(self.freeze)} frozen" if self.freeze else ""
        of = f"∂F/∂v_i‖, F the {self.target}" if self.target else f"∂y_n/∂v_i‖ ({self.norm})"
        return f"‖{of}, measured over {len(self.tokens)} tokens ({how}{frozen}): {self.about}"

    def _table(self) -> Mapping[str, Sequence[Any]]:
        return {
            "position": range(len(self.tokens)),
            "token": self.tokens,
            "value": self.values.tolist(),
            "standard_error": self.standard_error.tolist(),
            "share": self.share.tolist(),
        }

    def to_dict(self) -> dict:
        """Every field and the shares, as JSON takes them."""
        tensors = {name: json_numbers(getattr(self, name)) for name in ("values", "standard_error", "share")}
        rest = {name: value for name, value in vars(self).items() if name not in tensors and name != "about"}
        return {"kind": "measured", **rest, **tensors, "about": self.about.to_dict()}


def measured_sensitivity(
    model: Any,
    prompt: Prompt,
    probes: int | None = 16,
    *,
    norm: str = "fro",
    freeze: Sequence[str] = (),
    chat: bool = False,
    bos: bool | None = None,
    target: Any = None,
    seed: int = 0,
    memory: int = MEMORY,
    progress: bool = False,
) -> MeasuredSensitivity:
    """Measure how much the prediction's input y_n moves with each position's embedding: ‖∂y_n/∂v_i‖.

    In units of y per unit of the residual stream, from 0 on.

    - `model`: a HookedTransformer or TransformerBridge; hooks of your own stay on.
    - `prompt`: a text or token ids [pos]; `chat` puts a text through the chat template, `bos` forces or forbids BOS.
    - `probes`: Gaussian probes for an estimate of the Frobenius norm (16: about 6 %), or None for the exact norm from
      d_model products.
    - `norm`: "fro"; exact only, "spectral"; or "vocabulary", the root mean square of ‖∂y_n/∂v_i · (e_w − e_i)‖ over all
      words w, in units of y: how far y moves, to first order, when a word drawn uniformly stands at i.
    - `freeze`: "attention" and/or "norms": attention weights or the norms' divisors are held fixed, as the paper's
      assumptions do.
    - `target`: a number F of the prediction instead of all of y_n: ‖∂F/∂v_i‖, exact, by one backward product; `probes`
      and `norm` are then without effect. A token (id or text), "top", two of them for the contrast of their logits, or
      "log p(token)".
    - `seed`: draws the probes; the global random state is left alone.
    - `memory`: bytes that a batch of backward products may take.
    - `progress`: show a bar.

    A graph that would take more than a quarter of the memory there is, is made one block at a time, each block being
    run twice: hooks of your own must do the same thing both times, which is checked. From 512 tokens on a bridge whose
    attention can be fused (and is not frozen, or hooked by you) makes no patterns, in memory that grows as n; the
    result then differs by float32 rounding.

    Raises InputError for options and prompts that cannot be used or do not fit into memory, ModelError where attention
    cannot be frozen, HookMismatchError for a pass that is not finite or not repeatable.
    """
    _check_options(probes, norm, freeze)
    subject = Subject.of(model)
    subject.require("truth")
    tokenized = subject.tokenize(prompt, chat=chat, bos=bos)
    memory = fitting_memory(subject, len(tokenized.ids), memory, spectral=norm == "spectral", freeze=freeze)
    label, exact = "", probes is None or target is not None
    with subject.failures_named("differentiating"):
        steps = VocabularySteps(subject, tokenized.ids) if norm == "vocabulary" and target is None else None
        differentiated = differentiate(subject, tokenized, freeze)
        if target is not None:
            chosen = target_of(subject.model, target, differentiated.prediction.logits.detach())
            (row,) = differentiated.products(differentiated.prediction.covector(chosen)[None], memory, progress)
            values, label = row[0].double().norm(dim=-1).cpu(), chosen.label
            error = torch.zeros_like(values)
        elif probes is None:
            values = exact_norms(differentiated, (norm,), memory, progress, steps)[norm]
            error = torch.zeros_like(values)
        else:
            rows, _ = probe_rows(differentiated, probes, seed, memory, progress)
            values, error = frobenius_estimate(rows if steps is None else steps(rows))
    return MeasuredSensitivity(
        tokens=tokenized.tokens,
        values=values,
        standard_error=error,
        exact=exact,
        norm=norm,
        freeze=tuple(freeze),
        probes=None if exact else probes,
        seed=None if exact else seed,
        about=tokenized.described(subject.about),
        target=label,
    )


def exact_norms(
    differentiated: Differentiated,
    norms: Sequence[str],
    memory: int = MEMORY,
    progress: bool = False,
    steps: VocabularySteps | None = None,
) -> dict[str, Float[Tensor, " pos"]]:
    """The asked norms of every ∂y_n/∂v_i from d_model products; the spectral one holds the Jacobians themselves.

    Where these pass `memory`, positions are taken in windows and the products computed again for each. `steps`:
    what the norm "vocabulary" weighs them with.
    """
    assert steps is not None or "vocabulary" not in norms
    d_model, n = differentiated.output.shape[0], differentiated.leaf.shape[1]
    window = n
    if "spectral" in norms:
        window = max(1, min(n, memory // (d_model * d_model * differentiated.output.element_size())))
    found: dict[str, list[Tensor]] = {norm: [] for norm in norms}
    eye = torch.eye(d_model, device="cpu")
    for start in range(0, n, window):
        columns = slice(start, start + window)
        squares = {norm: torch.zeros((), dtype=torch.float64, device="cpu") for norm in norms if norm != "spectral"}
        jacobian = []
        for rows in differentiated.products(eye, memory, progress):
            rows = rows[:, columns]
            for norm in squares:
                weighted = steps(rows, columns) if norm == "vocabulary" and steps is not None else rows.cpu()
                lengths = torch.linalg.vector_norm(weighted, dim=(0, 2), dtype=torch.float64)
                squares[norm] = squares[norm] + lengths.square()
            if "spectral" in norms:
                jacobian.append(rows)
        for norm, total in squares.items():
            found[norm].append(total.sqrt())
        if "spectral" in norms:
            found["spectral"].append(_spectral(torch.cat(jacobian).transpose(0, 1)))
    return {norm: torch.cat(parts).cpu() for norm, parts in found.items()}


def probe_rows(
    differentiated: Differentiated, probes: int, seed: int, memory: int = MEMORY, progress: bool = False
) -> tuple[Float[Tensor, "probe pos d_model"], Float[Tensor, "probe d_model"]]:
    """ω ∂y_n/∂v_i for Gaussian ω, and the ω: each row's ‖·‖² is an unbiased estimate of ‖∂y_n/∂v_i‖_F²."""
    covectors = torch.randn(
        probes, differentiated.output.shape[0], generator=random_source(seed), dtype=torch.float64, device="cpu"
    )
    return torch.cat([rows.cpu() for rows in differentiated.products(covectors, memory, progress)]), covectors


def frobenius_estimate(
    rows: Float[Tensor, "probe pos d_model"],
) -> tuple[Float[Tensor, " pos"], Float[Tensor, " pos"]]:
    """Root of the mean square of ωJ, and its standard error: value · √(alike / 2K) from K probes.

    `alike` estimates ‖JJᵀ‖_F²/‖J‖_F⁴, one over J's effective rank, from how parallel the rows of two probes are, which
    tells more than the scatter of K squares does. One probe alone gets the largest error possible, that of rank 1.
    """
    gram = einsum(rows.double(), rows.double(), "a pos d, b pos d -> pos a b")
    squares = gram.diagonal(dim1=1, dim2=2)
    values = squares.mean(1).sqrt()
    pairs = 1 - torch.eye(len(rows), dtype=gram.dtype, device="cpu")
    parallel = (gram.square() * pairs).sum((1, 2))
    largest = (squares[:, :, None] * squares[:, None, :] * pairs).sum((1, 2))
    alike = torch.where(largest > 0, parallel / largest, 1.0)
    return values, values * (alike / (2 * len(rows))).sqrt()


def _spectral(jacobian: Float[Tensor, "pos out d_model"]) -> Float[Tensor, " pos"]:
    """Largest singular values, by way of Gram matrices of what is brought to size 1: no square underflows."""
    size = jacobian.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(jacobian.dtype).tiny)
    unit = (jacobian / size).cpu()  # not every device has eigenvalues, or float64
    largest = torch.linalg.eigvalsh(unit @ unit.mT)[:, -1].clamp(min=0).sqrt()
    return largest.double() * size[:, 0, 0].cpu().double()


def _check_options(probes: int | None, norm: str, freeze: Sequence[str]) -> None:
    if norm not in NORMS:
        raise InputError(f"expected one of {', '.join(map(repr, NORMS))}, got norm {norm!r}")
    if isinstance(freeze, str) or not set(freeze) <= set(FREEZABLE):
        raise InputError(f"expected a subset of ('attention', 'norms'), got freeze={freeze!r}")
    if probes is not None:
        whole_number("probes", probes, otherwise=", or None for the exact norm")
    if probes is not None and norm == "spectral":
        raise InputError("expected probes=None, got norm='spectral' with probes: probes estimate no spectral norm")


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
    with subject.failures_named("differentiating"):
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
