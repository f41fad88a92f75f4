"""Seconds and bytes of one step, and the pass that everything is set against."""

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def plain(model: Any, tokens: torch.Tensor) -> None:
    """The model's own forward pass, all logits, no gradient."""
    with torch.no_grad():
        model(tokens[None])


def seconds(step: Callable[[], object]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def peak_bytes(step: Callable[[], object]) -> tuple[int, int]:
    """Resident bytes before a step, weights included, and at its peak.

    On Linux the high-water mark starts anew, so that what loading the model took does not hide the step; elsewhere the
    peak is that of the whole process.
    """
    gc.collect()
    marks = Path("/proc/self/clear_refs")
    if marks.exists():
        ctypes.CDLL(None).malloc_trim(0)
        marks.write_text("5")
    before = highest()
    step()
    return before, highest()


def highest() -> int:
    """The process's largest resident set so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss, which a child takes over from its parent
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
