"""Cells of the benchmark table: each is measured in a process of its own, and kept as soon as it is there.

    python -m benchmarks.cells time bridge 512 --steps forward fused record sweep --repeats 5
    python -m benchmarks.cells memory bridge 2048 --steps lens

`time` takes the steps in turn, so that a drifting machine hits all alike, and gives all their seconds; `memory` does
one step, once, in a process that has done nothing else but load the model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from oversquash_lens.storage import write_atomically

WORDS = 300  # characters of an error that are kept


@dataclass(frozen=True)
class Cell:
    """What to measure: seconds of `steps` in turn, or the peak memory of one step."""

    what: str  # "time" or "memory"
    kind: str
    n: int
    steps: tuple[str, ...]
    repeats: int = 1

    @property
    def name(self) -> str:
        return f"{self.what} {self.kind} {self.n} {'+'.join(self.steps)} x{self.repeats}"


class Results:
    """Cells measured so far, in a JSON file that is written anew after each; those of another machine are left out."""

    def __init__(self, path: Path, machine: dict, again: bool = False) -> None:
        self.path, self.machine, self.cells = path, machine, {}
        if path.exists() and not again:
            found = json.loads(path.read_text("utf-8"))
            if found.get("machine") == machine:
                self.cells = found["cells"]

    def add(self, name: str, found: dict) -> None:
        self.cells[name] = found
        write_atomically(self.path, json.dumps({"machine": self.machine, "cells": self.cells}, indent=1).encode())

    def seconds(self, kind: str, n: int, step: str) -> list[float]:
        """All seconds of a step, the rounds in their order; none where it was not measured."""
        for name, found in self.cells.items():
            what, its_kind, length, steps, _ = name.split()
            if (what, its_kind, length) == ("time", kind, str(n)) and step in steps.split("+"):
                return found.get("seconds", {}).get(step, [])
        return []

    def bytes(self, kind: str, n: int, step: str) -> dict:
        """`before` and `peak` of a step, and how long it `took`, cold; none where it was not measured."""
        found = self.cells.get(Cell("memory", kind, n, (step,)).name, {})
        return {} if "failed" in found else found


def measure(cell: Cell, threads: int) -> dict:
    """A cell's numbers from a fresh process, or the last line of what went wrong."""
    command = [sys.executable, "-m", "benchmarks.cells", cell.what, cell.kind, str(cell.n), "--steps", *cell.steps]
    command += ["--repeats", str(cell.repeats)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": said[-1][:WORDS]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("time", "memory"))
    parser.add_argument("kind")
    parser.add_argument("n", type=int)
    parser.add_argument("--steps", nargs="+", required=True)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    from benchmarks.steps import STEPS, Bench

    bench = Bench(options.kind, options.n)
    steps = {name: STEPS[name] for name in options.steps}
    print(json.dumps(MEASURED[options.what](bench, steps, options.repeats)))


def times(bench, steps: dict, repeats: int) -> dict:
    """Seconds of each step, in turn; a short prompt has warmed them up, the weights' norms among them."""
    from benchmarks.steps import Bench
    from benchmarks.timing import seconds

    warm = Bench(bench.kind, min(64, bench.n))
    for name in steps:
        bench.load(name)
    for name in ("model", "twin"):
        if name in vars(bench):
            setattr(warm, name, getattr(bench, name))
    for name, step in steps.items():
        warm.load(name)
        step(warm)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            taken[name].append(seconds(lambda step=step: step(bench)))
    return {"seconds": taken}


def memory(bench, steps: dict, repeats: int) -> dict:
    from benchmarks.timing import peak_bytes

    ((name, step),) = steps.items()
    bench.load(name)
    begun = time.perf_counter()
    before, peak = peak_bytes(lambda: step(bench))
    return {"before": before, "peak": peak, "took": time.perf_counter() - begun}


MEASURED = {"time": times, "memory": memory}

if __name__ == "__main__":
    main()
