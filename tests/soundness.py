"""Are the sound bounds sound? One random case judged at every layer and position, against autograd of our own.

The truth shares no code with the package: `jacobians` is torch.autograd from `unembed.hook_in`, its norm comes from
singular values. What rounding allows is derived from the format that computes, not fitted:

- relative: the bound may come out below the truth by 64 ε for each layer (1e-9 at least, in float64): both are
  products of that many factors, each of a few rounded operations;
- absolute: the derivative of the softmax is a difference, p_k (g·v_k − Σ p g·v), whose rounding is ε times its terms.
  Where all values are alike it is 0 and autograd gives noise. A truth below 4 ε times the same layer's largest is
  noise and no truth, and counted as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from random_models import Case, build

import oversquash_lens as osl
from oversquash_lens.capture.architecture import read_architecture
from oversquash_lens.errors import HookMismatchError, ModelError
from oversquash_lens.paths.recursion import PathProfile

SOUND = ("calibrated", "calibrated_full")
ROUNDINGS = 64  # a layer
NOISE = 4


def jacobians(model: Any, tokens: torch.Tensor, *, freeze_attention: bool) -> list[torch.Tensor]:
    """∂y_n/∂v_i⁽ˡ⁾ for every layer l and position i: for each layer [pos, d_out, d_in], float64.

    One forward pass; one backward pass per entry of y_n, which reaches every layer's input at once. Where the final
    gain was folded into the unembedding and is known, y has it back, as everywhere in the package.
    """
    kept: dict[int | str, torch.Tensor] = {}

    def watched(layer: int) -> Callable:
        def keep(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
            kept[layer] = value.clone() if layer else value.detach().clone().requires_grad_(True)
            return kept[layer]

        return keep

    def take(value: torch.Tensor, hook: Any = None) -> None:
        kept["y"] = value

    def detach(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
        return value.detach().clone()

    layers = range(model.cfg.n_layers)
    hooks = [(f"blocks.{layer}.hook_resid_pre", watched(layer)) for layer in layers] + [("unembed.hook_in", take)]
    if freeze_attention:
        hooks += [(f"blocks.{layer}.attn.hook_pattern", detach) for layer in layers]
    with torch.enable_grad():
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        inputs = [kept[layer] for layer in layers]
        rows = [torch.autograd.grad(part, inputs, retain_graph=True) for part in kept["y"][0, -1]]
    found = [torch.stack([row[layer][0] for row in rows], dim=1).double() for layer in layers]
    gain = read_architecture(model).restore_gain
    return found if gain is None else [jacobian * gain.double()[:, None] for jacobian in found]


def spectral_norms(jacobian: torch.Tensor) -> torch.Tensor:
    """‖∂y_n/∂v_i‖₂ at every position, from singular values, [pos]; scaled first, so that nothing underflows."""
    size = jacobian.abs().amax((1, 2), keepdim=True).clamp(min=1e-300)
    return torch.linalg.matrix_norm(jacobian / size, 2) * size[:, 0, 0]


@dataclass(frozen=True)
class Judged:
    """One variant on one case: how many truths it was held against, and log₁₀(bound/truth) where it is smallest."""

    case: Case
    variant: str
    compared: int
    noise: int
    violations: int
    tightest: float
    where: str

    def __str__(self) -> str:
        return f"{self.variant}, {self.case}, {self.where}: log10 gap {self.tightest:.3g}"


def judge(case: Case) -> list[Judged] | str:
    """Both sound bounds on a case; where it cannot be recorded, why."""
    model, tokens = build(case)
    try:
        trace = osl.record(model, tokens)
    except HookMismatchError as error:
        return str(error)
    found = []
    for variant in SOUND:
        try:
            profile = osl.path_bound(trace, variant)
            if variant == "calibrated":  # refuses where detaching the pattern freezes nothing
                osl.measured_sensitivity(model, tokens, probes=1, freeze=("attention",))
        except ModelError:
            continue
        truths = [spectral_norms(j) for j in jacobians(model, tokens, freeze_attention=variant == "calibrated")]
        found.append(hold(case, profile, truths))
    return found


def hold(case: Case, profile: PathProfile, truths: Iterable[torch.Tensor]) -> Judged:
    """A profile against ‖∂y_n/∂v_i⁽ˡ⁾‖₂ of every layer l and position i."""
    truth = torch.stack(list(truths))  # [layer, pos]
    log_bound = profile.log_by_layer[: len(truth)] + profile.log_constant
    allowed = max(1e-9, ROUNDINGS * case.epsilon * (len(truth) + 1))
    noise = truth <= NOISE * case.epsilon * truth.amax(1, keepdim=True)
    gap = (log_bound - truth.log()) / math.log(10)
    gap = torch.where(noise, math.inf, gap)
    layer, position = divmod(int(gap.argmin()), truth.shape[1])
    return Judged(
        case=case,
        variant=profile.kind,
        compared=int((~noise).sum()),
        noise=int(((truth > 0) & noise).sum()),
        violations=int((~(gap >= math.log10(1 - allowed))).sum()),
        tightest=gap.min().item(),
        where=f"layer {layer}, position {position}",
    )


@dataclass
class Tally:
    """What many cases came to; adds up over test processes by way of `figures`."""

    cases: int = 0
    unrecorded: int = 0
    compared: int = 0
    noise: int = 0
    violations: int = 0
    tightest: dict[str, list] = field(default_factory=dict)  # variant -> [gap, where]

    def add(self, judged: list[Judged] | str) -> None:
        self.cases += 1
        if isinstance(judged, str):
            self.unrecorded += 1
            return
        for each in judged:
            self.compared += each.compared
            self.noise += each.noise
            self.violations += each.violations
            self._keep(each.variant, [each.tightest, str(each)])

    def merge(self, figures: dict[str, Any]) -> None:
        for name in ("cases", "unrecorded", "compared", "noise", "violations"):
            setattr(self, name, getattr(self, name) + figures[name])
        for variant, found in figures["tightest"].items():
            self._keep(variant, found)

    def figures(self) -> dict[str, Any]:
        return vars(self)

    def _keep(self, variant: str, found: list) -> None:
        if variant not in self.tightest or found[0] < self.tightest[variant][0]:
            self.tightest[variant] = found

    def __str__(self) -> str:
        lines = [
            f"soundness: {self.cases} random cases ({self.unrecorded} refused by the gate), {self.compared} truths "
            f"compared, {self.violations} violations; {self.noise} truths were rounding noise"
        ]
        return "\n".join(lines + [f"  tightest: {where}" for _, where in self.tightest.values()])
