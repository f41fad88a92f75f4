"""What a run needs of memory and time, planned against measured.

    python -m benchmarks.planned [--kind hooked|bridge] [--measures record report] [--lengths 256 512 1024 2048]

`bound` is record, every bound and the mean-field estimate in one sweep: a report without the truth. Each line is a
process of its own, in which the model is loaded, the plan comes first, and the run is the first one of its kind, as on
the command line. Memory is the peak of the resident set less what it was before; what does not fit is not run. On a
machine that others use, too, `--clock cpu` counts the process's own seconds (with one thread, OMP_NUM_THREADS=1), for
the plan as for the run.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import oversquash_lens as osl
from benchmarks.long_text import long_prompt
from oversquash_lens.analyses.plan import plan_collapse

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", default="auto")
    parser.add_argument("--measures", nargs="+", default=["record", "report"], choices=STEPS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--one", action="store_true", help="measure one line in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options)))
        return
    print(f"{'measure':8} {'n':>5} {'memory: planned':>17} {'measured':>9} {'ratio':>6}", end="")
    print(f" {'time: planned':>15} {'measured':>9} {'ratio':>6}")
    for measure in options.measures:
        for n in options.lengths:
            print(line(measure, n, apart(options, measure, n)), flush=True)


def apart(options: argparse.Namespace, measure: str, n: int) -> dict:
    """One line's numbers from a fresh process."""
    command = [sys.executable, "-m", "benchmarks.planned", "--one", "--kind", options.kind, "--measures", measure]
    command += ["--lengths", str(n), "--clock", options.clock, "--probes", str(options.probes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.returncode}


def line(measure: str, n: int, found: dict) -> str:
    start = f"{measure:8} {n:5d} "
    if "failed" in found:
        return f"{start}failed with exit code {found['failed']}"
    memory = f"{found['bytes'] / 1e6:14.0f} MB"
    if "peak" not in found:
        return f"{start}{memory} not run: {found['available'] / 1e6:.0f} MB are there"
    ratio = found["bytes"] / found["peak"]
    end = f"{found['seconds']:13.1f} s {found['took']:7.1f} s {found['seconds'] / found['took']:6.2f}"
    return f"{start}{memory} {found['peak'] / 1e6:6.0f} MB {ratio:6.2f} {end}"


def one(options: argparse.Namespace) -> dict:
    """Plan, then run: bytes and seconds of both."""
    (measure,), (n,), clock = options.measures, options.lengths, CLOCKS[options.clock]
    model = osl.load_model(kind=options.kind)
    tokens = torch.tensor(long_prompt(model.tokenizer, n))
    if measure == "collapse":
        planned = plan_collapse(model, [pair(tokens)], clock=clock)
    else:
        planned = osl.plan(model, n, measure, probes=options.probes, clock=clock)
    numbers = {"bytes": planned.bytes, "seconds": planned.seconds, "available": planned.available}
    if not planned.fits:
        return numbers
    peak, took = peak_and_seconds(lambda: STEPS[measure](model, tokens, options.probes), clock)
    return numbers | {"peak": peak, "took": took}


def pair(tokens: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ids = tuple(tokens.tolist())
    return ids, (*ids, ids[-1])


STEPS: dict[str, Callable[[Any, torch.Tensor, int], object]] = {
    "forward": lambda model, tokens, probes: torch.no_grad()(model)(tokens[None]),
    "record": lambda model, tokens, probes: osl.record(model, tokens),
    "bound": lambda model, tokens, probes: osl.profiles(osl.record(model, tokens)),
    "flow": lambda model, tokens, probes: osl.squashing(osl.record(model, tokens)),
    "truth": lambda model, tokens, probes: osl.measured_sensitivity(model, tokens, probes=probes),
    "audit": lambda model, tokens, probes: osl.audit(model, tokens, probes=probes),
    "report": lambda model, tokens, probes: osl.findings(model, tokens, probes=probes),
    "what_if": lambda model, tokens, probes: osl.what_if(model, tokens, osl.edits.window(32), probes=probes),
    "collapse": lambda model, tokens, probes: osl.collapse_curve(model, pair(tokens), (1,)),
}


def peak_and_seconds(step: Callable[[], object], clock: Callable[[], float]) -> tuple[float, float]:
    """Bytes that the resident set grew by at its largest (Linux), and seconds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, begun = resident("VmRSS"), clock()
    step()
    took = clock() - begun
    return resident("VmHWM") - before, took


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
