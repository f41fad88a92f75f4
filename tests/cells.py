"""One cell of the compatibility table: a zoo model, every measure tried on it, each held against the truth.

What `osl.support` declares beforehand is compared with what happened; a difference is a fault of the package.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from small_models import tokens_for
from torch.nn import functional
from zoo import float64_throughout, zoo

import oversquash_lens as osl
from oversquash_lens.analyses.compare import compare
from oversquash_lens.capture.architecture import read_architecture
from oversquash_lens.capture.hooks import attached
from oversquash_lens.capture.subject import MEASURES, STATES, SupportVerdict
from oversquash_lens.capture.subject import Subject as ProvenSubject
from oversquash_lens.errors import HookMismatchError, ModelError
from oversquash_lens.paths.kinds import PRINTED

LENGTH = 10
BATCH = 64  # prompts at a time


@dataclass(frozen=True)
class Precision:
    """How exact a model is: the share by which a bound may lie below the truth by rounding; the step of central
    differences, and how far from the derivative they may be, relative to its largest entry.

    float32 inside leaves noise of 1e-7 / step, the bend of a ReLU or a router within the step an error of its size.
    """

    rounding: float
    step: float
    difference: float


FINE = Precision(rounding=1e-9, step=1e-6, difference=1e-5)
COARSE = Precision(rounding=1e-5, step=3e-3, difference=1e-2)


class BrokenError(Exception):
    """A measure gave a number that the truth refutes."""


@dataclass(frozen=True)
class Found:
    """What a measure did: "supported", "approximate" or "refused" (`why`: the error's words), and its numbers."""

    state: str
    why: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """Every measure of one family and class; `faults` says where the package is not what it declares."""

    family: str
    kind: str
    measures: dict[str, Found]
    faults: tuple[str, ...]


class Subject:
    """One model and one prompt, recorded and measured when first asked."""

    def __init__(self, model: Any, seed: int, precision: Precision = COARSE) -> None:
        self.model, self.precision = model, precision
        self.tokens = tokens_for(seed, LENGTH)
        self._truths: dict[tuple, Any] = {}

    @cached_property
    def trace(self) -> Any:
        return osl.record(self.model, self.tokens, verify=True, node_probes=None)

    def truth(self, norm: str, *freeze: str) -> Any:
        key = (norm, freeze)
        if key not in self._truths:
            measured = osl.measured_sensitivity(self.model, self.tokens, probes=None, norm=norm, freeze=freeze)
            self._truths[key] = measured
        return self._truths[key]

    @cached_property
    def patterns(self) -> list[torch.Tensor]:
        """Each layer's attention weights in a plain pass: [head, dest, src]."""
        found: dict[int, torch.Tensor] = {}
        hooks = [
            (f"blocks.{i}.attn.hook_pattern", lambda p, hook=None, i=i: found.update({i: p[0].detach().clone()}))
            for i in range(self.model.cfg.n_layers)
        ]
        with torch.no_grad(), attached(self.model, hooks):
            self.model(self.tokens)
        return [found[i] for i in range(len(found))]

    @cached_property
    def embedded(self) -> bool:
        """Whether later layers read the embedding beside the residual stream."""
        return ProvenSubject.of(self.model).function.shown.embedded

    def frozen_spectral(self) -> torch.Tensor:
        """‖∂y_n/∂v_i‖₂ with the attention weights held fixed, also where no hook can hold them: Float[pos]."""
        try:
            return self.truth("spectral", "attention").values
        except ModelError:  # then transformers' own softmax is the only one in the model
            softmax = functional.softmax
            with mock.patch.object(functional, "softmax", lambda *args, **kwargs: softmax(*args, **kwargs).detach()):
                return osl.measured_sensitivity(self.model, self.tokens, probes=None, norm="spectral").values

    def differences(self, freeze_attention: bool) -> torch.Tensor:
        """‖∂y_n/∂v_i‖_F by central differences, every entry of every embedding moved: Float[pos].

        nan where a tenth of the step says otherwise by more than is held against: there a router changes its mind or a
        value is cut within the step, and no derivative is near. Where that is nearly everywhere, a smaller step, for
        what more rounding it costs.
        """
        for step in (self.precision.step, self.precision.step / 10):
            wide, narrow = (self._slopes(step / part, freeze_attention) for part in (1, 10))
            jumps = (wide - narrow).abs().amax((1, 2)) > self.precision.difference * wide.abs().amax()
            if jumps.float().mean() < 0.5:
                break
        return wide.square().sum((1, 2)).sqrt().masked_fill(jumps, torch.nan)

    def _slopes(self, step: float, freeze_attention: bool) -> torch.Tensor:
        """(y(v + step) - y(v - step)) / 2 step: Float[pos, d_model, d_model]."""
        n, width = self.tokens.shape[1], self.model.cfg.d_model
        nudges = step * torch.eye(n * width, dtype=torch.float64).reshape(-1, n, width)
        parts = torch.cat([nudges, -nudges]).split(BATCH)
        up, down = torch.cat([self._outputs(part, freeze_attention) for part in parts]).chunk(2)
        return ((up - down) / (2 * step)).reshape(n, width, width)

    def _outputs(self, nudges: torch.Tensor, freeze_attention: bool) -> torch.Tensor:
        """What the unembedding reads at the last position, for each [pos, d_model] added to the embeddings."""
        found: list[torch.Tensor] = []
        hooks = [("unembed.hook_in", lambda y, hook=None: found.append(y[:, -1].double()))]
        if freeze_attention:
            kept = self.patterns
            hooks += [
                (
                    f"blocks.{i}.attn.hook_pattern",
                    lambda p, hook=None, kept=kept[i]: kept.to(p).expand_as(p).contiguous(),
                )
                for i in range(len(kept))
            ]
        with torch.no_grad(), ExitStack() as stack:
            if self.embedded:
                moved = self.model.embed.register_forward_hook(lambda embed, inputs, v: v + nudges.to(v))
                stack.callback(moved.remove)
            else:
                hooks.append(("blocks.0.hook_resid_pre", lambda v, hook=None: v + nudges.to(v)))
            stack.enter_context(attached(self.model, hooks))
            self.model(self.tokens.repeat(len(nudges), 1))
        restore = read_architecture(self.model).restore_gain
        return found[0] if restore is None else found[0] * restore.double()


def judge(name: str, kind: str, seeds: tuple[int, ...] = (0,)) -> Cell:
    """Every measure on a family's models of these seeds, against the truth and against what is declared."""
    precision = FINE if float64_throughout(name, kind) else COARSE
    return judge_subjects(name, kind, [Subject(zoo(name, kind, seed), seed, precision) for seed in seeds])


def judge_subjects(name: str, kind: str, subjects: list[Subject]) -> Cell:
    """The same of models that are there."""
    declared = _declared(subjects[0].model)
    measures, faults = {}, []
    for measure in JUDGES:
        verdict = declared[measure]
        try:
            found = _tried(measure, subjects)
            fault = _difference(verdict, found)
        except BrokenError as broken:
            found, fault = Found("refused", f"broken: {broken}"), str(broken)
        if fault is not None:
            faults.append(f"{measure}: {fault}")
        elif measure == "mean_field" and found.state != "refused":
            found = replace(found, state="approximate", why=verdict.why)
        else:
            found = replace(found, state=verdict.state, why=verdict.why)
        measures[measure] = found
    return Cell(name, kind, measures, tuple(f"{name}, {kind}, {fault}" for fault in faults))


def _declared(model: Any) -> dict[str, SupportVerdict]:
    try:
        return osl.support(model)
    except ModelError as error:
        return dict.fromkeys(MEASURES, SupportVerdict("refused", str(error)))
    except Exception as error:
        return dict.fromkeys(MEASURES, SupportVerdict("crashed", f"osl.support: {type(error).__name__}: {error}"))


def _difference(declared: SupportVerdict, found: Found) -> str | None:
    """How the declaration and the run tell different stories; None where they agree."""
    if declared.state not in STATES or (declared.state == "refused") != (found.state == "refused"):
        return f"declared {declared.state} ({declared.why}), found {found.state} ({found.why})"
    if declared.state == "refused" and _without_figures(declared.why) not in _without_figures(found.why):
        return f"refused because {found.why!r}, declared because {declared.why!r}"
    return None


def _without_figures(why: str) -> str:
    """A reason read off a pass says by how much, which is another amount for other tokens."""
    return re.sub(r"\d[\d.e+-]*", "#", why)


def _tried(measure: str, subjects: list[Subject]) -> Found:
    """One measure on every subject; refused if it is refused on any."""
    numbers = []
    for subject in subjects:
        try:
            numbers.append(JUDGES[measure](subject))
        except (ModelError, HookMismatchError) as error:
            return Found("refused", str(error))
        except BrokenError:
            raise
        except Exception as error:  # no refusal but a crash: a fault of this cell, and the others are still to come
            raise BrokenError(f"crashed with {type(error).__name__}: {error}") from error
    merged = {key: COMBINED[key]([one[key] for one in numbers]) for key in numbers[0]}
    return Found("supported", "", merged)


# ---------------------------------------------------------------- one measure each: its numbers, or BrokenError


def _printed(subject: Subject) -> dict[str, float]:
    """No bounds on a real model: all they promise is shares of the paths from every position."""
    for variant in (*PRINTED, "rollout"):
        share = osl.path_bound(subject.trace, variant).share
        if not (bool((share >= 0).all()) and abs(share.sum().item() - 1) < 1e-9):
            raise BrokenError(f"shares of {variant} sum to {share.sum().item()}")
    return {}


def _calibrated(subject: Subject) -> dict[str, float]:
    return _above(subject, "calibrated", subject.frozen_spectral)


def _calibrated_full(subject: Subject) -> dict[str, float]:
    return _above(subject, "calibrated_full", lambda: subject.truth("spectral").values)


def _above(subject: Subject, variant: str, truth_of: Callable[[], torch.Tensor]) -> dict[str, float]:
    bound = osl.path_bound(subject.trace, variant).log_values  # first, so that a refusal is the bound's own
    truth = truth_of()
    gap = (bound - truth.log())[truth > 0].min().item() / math.log(10)
    if not gap >= math.log10(1 - subject.precision.rounding):
        raise BrokenError(f"{variant} lies below the truth by a factor 10^{gap:.3g}")
    return {"tightest_log10_gap": gap}


def _mean_field(subject: Subject) -> dict[str, float]:
    estimated = osl.mean_field_sensitivity(subject.trace)
    held = compare(estimated, subject.truth("fro"))
    if not (math.isfinite(held.spearman) and math.isfinite(held.median_log10_ratio)):
        raise BrokenError(f"the estimate is not finite: {held}")
    estimate, truth = estimated.values, subject.truth("fro").values
    off = (estimate.log10() - truth.log10())[truth > 0].abs()
    return {"median_abs_log10_ratio": off.median().item(), "spearman": held.spearman}


def _truth(*freeze: str) -> Callable[[Subject], dict[str, float]]:
    def same(subject: Subject) -> dict[str, float]:
        truth = subject.truth("fro", *freeze).values
        off = (truth - subject.differences(bool(freeze))).abs() / truth.max()
        smooth = off[~off.isnan()]
        if len(smooth) < len(off) / 2:
            raise BrokenError("central differences find no derivative at most positions")
        off = smooth.max().item()
        if not off <= subject.precision.difference:
            raise BrokenError(f"the measured sensitivity is off by {off:.2g} of central differences")
        return {"off_central_differences": off}

    return same


JUDGES: dict[str, Callable[[Subject], dict[str, float]]] = {
    "printed bounds": _printed,
    "calibrated": _calibrated,
    "calibrated_full": _calibrated_full,
    "mean_field": _mean_field,
    "truth": _truth(),
    "attention frozen": _truth("attention"),
}
COMBINED: dict[str, Callable[[list[float]], float]] = {
    "tightest_log10_gap": min,
    "median_abs_log10_ratio": statistics.median,
    "spearman": statistics.median,
    "off_central_differences": max,
}
