"""What finite effects and measured flows cost, in plain passes of the same model, as ratios of interleaved runs.

    python -m benchmarks.swap_costs [--kind bridge] [--repeats 3] [--only exact nodes flow target]

Each ratio is the median over rounds in which the two sides take turns. A plain pass is the class's own, all logits;
where many are needed, some are run and their time is multiplied.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import oversquash_lens as osl
from benchmarks.long_text import long_prompt
from benchmarks.timing import peak_bytes, plain, seconds

DRAWS = 8
RECOMPUTED = 9  # tokens of one replaced prompt that node substitution runs: itself, 3 behind it, the 5 last ones
SOME = 24  # places of a long prompt that are replaced


def said(
    name: str, wanted: float, step: Callable[[], object], passes: Callable[[], object], times: float, n: int
) -> None:
    """The median of a step's time over `times` times that of `passes`, in turn, `n` rounds."""
    rounds = [seconds(step) / (times * seconds(passes)) for _ in range(n)]
    print(f"{name:<52} {statistics.median(rounds):7.2f}   wanted at most {wanted:g}", flush=True)


def exact(model: Any, ids: torch.Tensor, rounds: int) -> None:
    """Against n·draws whole prompts, as many at a time as 256 tokens of endings are."""
    batch = ids.expand(DRAWS, -1)
    step = partial(osl.substitution, model, ids, draws=DRAWS, method="exact")
    said(f"exact, n={len(ids)}, {DRAWS} draws", 0.6, step, partial(run, model, batch), len(ids), rounds)


def nodes(model: Any, ids: torch.Tensor, rounds: int) -> None:
    """Against passes of as many tokens as are recomputed, a batch of one draw each; the prompt's own pass besides."""
    places = torch.linspace(1, len(ids) - 16, SOME).long().tolist()
    step = partial(osl.substitution, model, ids, places, draws=DRAWS, method="nodes")
    batch = ids[:RECOMPUTED].expand(DRAWS, -1)

    def passes() -> None:
        plain(model, ids)
        for _ in places:
            run(model, batch)

    said(f"nodes, n={len(ids)}, {SOME} places, {DRAWS} draws", 1.3, step, passes, 1, rounds)


def flow(model: Any, ids: torch.Tensor, rounds: int) -> None:
    for probes, wanted in ((8, 110), (4, 60)):
        step = partial(osl.measured_flow, model, ids, len(ids) // 2, probes)
        said(f"flow of a token, n={len(ids)}, probes={probes}", wanted, step, partial(plain, model, ids), 1, rounds)


def target(model: Any, ids: torch.Tensor, rounds: int) -> None:
    step = partial(osl.measured_flow, model, ids, target="top")
    before, peak = peak_bytes(step)
    print(f"target's flow, n={len(ids)}: peak {peak / 1e9:.1f} GB, {before / 1e9:.1f} GB before; wanted at most 8")
    said(f"target's flow, n={len(ids)}", 12, step, partial(plain, model, ids), 1, rounds)


def run(model: Any, rows: torch.Tensor) -> None:
    with torch.no_grad():
        model(rows)


STEPS = {"exact": (exact, (128,)), "nodes": (nodes, (512, 2048)), "flow": (flow, (512,)), "target": (target, (2048,))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("bridge", "hooked"), default="bridge")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=tuple(STEPS), default=list(STEPS))
    options = parser.parse_args()
    model = osl.load_model(kind=options.kind)
    for name in options.only:
        step, lengths = STEPS[name]
        for n in lengths:
            step(model, torch.tensor(long_prompt(model.tokenizer, n)), options.repeats)


if __name__ == "__main__":
    main()
