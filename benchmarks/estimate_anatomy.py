"""Where does the estimate go wrong? One layer at a time, what it assumes is set against what true covectors meet there.

    python -m benchmarks.estimate_anatomy [--models NAME ...] [--tokens 64] [--probes 64]

On the real texts of the first half (benchmarks.estimate_prompts), models as HookedTransformers. Covectors ω∂y_n/∂v at
every layer's entry, and between its attention and its MLP, come from one graph and many ω. All numbers are log₁₀ of
lengths, assumed over true: median over positions and their standard deviation, each the median over prompts. "below"
starts from the true lengths at a layer's exit and goes on as assumed: what the layers from there down contribute.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import oversquash_lens as osl
from benchmarks.estimate_prompts import REAL, halves, tokens
from benchmarks.estimate_vs_truth import model_of
from oversquash_lens.capture.mlp import random_source
from oversquash_lens.numerics import spearman
from oversquash_lens.paths.profiles import paths_of_trace

MODELS = ("hooked", "learned", "deep")


class Squares(NamedTuple):
    """Mean squares of covectors at every layer's entry (last row: behind the last layer), and before its MLP."""

    entering: Float[Tensor, "layer_plus_1 pos"]
    middle: Float[Tensor, "layer pos"]


class Step(NamedTuple):
    """What one layer does on one prompt: median and deviation of each error, and ρ of the estimate from there down."""

    attention: tuple[float, float]
    mlp: tuple[float, float]
    below: tuple[float, float]
    rho: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--tokens", type=int, default=64, help="the longest prompts looked at")
    parser.add_argument("--probes", type=int, default=64)
    options = parser.parse_args()
    for name in options.models:
        model, prompts, errors = model_of(name), [], {"first": [], "punctuation": [], "others": []}
        for sample in halves()[0]:
            ids = tokens(sample, model).cpu()
            if sample.kind not in REAL or len(ids) > options.tokens:
                continue
            trace, true = osl.record(model, ids), squares(model, ids, options.probes)
            prompts.append(steps(trace, true))
            off = osl.mean_field_sensitivity(trace).log_values / math.log(10)
            for place, error in enumerate((off - true.entering[0].log10() / 2).tolist()):
                errors[kind_of(trace.tokens[place], place)].append(error)
        print(f"\n{name}, {len(prompts)} prompts\n{table(prompts)}\n{by_kind(errors)}", flush=True)


def squares(model: Any, ids: Tensor, probes: int) -> Squares:
    """From one forward pass that is differentiated: nothing of it is shared with the estimate."""
    n_layers, seen = model.cfg.n_layers, {}

    def leaf(value: Tensor, hook: Any) -> Tensor:
        return seen.setdefault(hook.name, value.detach().requires_grad_())

    def kept(value: Tensor, hook: Any) -> None:
        seen[hook.name] = value

    before, between = ([f"blocks.{i}.hook_resid_{place}" for i in range(n_layers)] for place in ("pre", "mid"))
    after = f"blocks.{n_layers - 1}.hook_resid_post"
    hooks = [(before[0], leaf), *((name, kept) for name in (*before[1:], *between, after))]
    reading = model.unembed.register_forward_pre_hook(lambda unembed, inputs: seen.update(y=inputs[0]))
    try:
        with torch.enable_grad():
            model.run_with_hooks(ids[None], fwd_hooks=hooks)
    finally:
        reading.remove()
    y = seen["y"][0, -1]
    omega = torch.randn(probes, len(y), generator=random_source(0), dtype=y.dtype)
    places = [seen[name] for name in (*before, after, *between)]
    rows = torch.autograd.grad(y, places, omega, is_grads_batched=True)
    found = torch.stack([row[:, 0].double().square().sum(-1).mean(0) for row in rows])
    return Squares(*found.split([n_layers + 1, n_layers]))


def steps(trace: osl.Trace, true: Squares) -> list[Step]:
    """The errors of every layer."""
    paths, n = paths_of_trace(trace, "mean_field"), trace.n_positions
    edges = [paths.edge_block(layer, 0, n).dense() for layer in range(trace.n_layers)]
    nodes = trace.gains.node_gain.double()
    found = []
    for layer, edge in enumerate(edges):
        row = true.entering[layer + 1]
        for lower in range(layer, -1, -1):
            row = (row * nodes[lower]) @ edges[lower]
        attention = _error(true.middle[layer] @ edge, true.entering[layer])
        mlp = _error(true.entering[layer + 1] * nodes[layer], true.middle[layer])
        found.append(Step(attention, mlp, _error(row, true.entering[0]), spearman(row, true.entering[0])))
    return found


def _error(assumed: Float[Tensor, " pos"], true: Float[Tensor, " pos"]) -> tuple[float, float]:
    reached = true > 0
    off = (assumed[reached] / true[reached]).log10() / 2
    return off.median().item(), off.std().item() if len(off) > 1 else 0.0


def kind_of(token: str, place: int) -> str:
    if place == 0:
        return "first"
    return "others" if any(map(str.isalnum, token)) else "punctuation"


def table(prompts: Sequence[Sequence[Step]]) -> str:
    lines = [f"{'layer':>5} {'attention':>14} {'MLP':>14} {'below':>14}    rho"]
    for layer, at in enumerate(zip(*prompts, strict=True)):
        numbers = [
            f"{median(each[0] for each in errors):+7.3f} {median(each[1] for each in errors):6.3f}"
            for errors in zip(*(step[:3] for step in at), strict=True)
        ]
        lines.append(f"{layer:5d} {' '.join(numbers)} {median(step.rho for step in at):6.3f}")
    return "\n".join(lines)


def by_kind(errors: dict[str, list[float]]) -> str:
    rows = {kind: torch.tensor(found) for kind, found in errors.items() if len(found) > 1}
    return "\n".join(
        f"{kind:12} {len(found):5d} tokens: {found.median():+.3f}, deviation {found.std():.3f}"
        for kind, found in rows.items()
    )


if __name__ == "__main__":
    main()
