"""On which machine and with which versions a table was made."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "transformers", "transformer-lens")


def machine(threads: int) -> dict[str, str | int]:
    """What the numbers depend on; results of another machine are not mixed with ours."""
    versions = {name: version(name) for name in PACKAGES}
    return {"cpu": cpu(), "cores": cores(), "threads": threads, "python": platform.python_version(), **versions}


def in_words(machine: dict) -> str:
    """One line for people.

    >>> in_words({"cpu": "A", "cores": 2, "threads": 1, "python": "3.11.2", "torch": "2.13.0"})
    'A, 2 cores, 1 thread, python 3.11.2, torch 2.13.0'
    """
    counts = [f"{machine[name]} {name[:-1] if machine[name] == 1 else name}" for name in ("cores", "threads")]
    versions = [f"{name} {found}" for name, found in machine.items() if name not in ("cpu", "cores", "threads")]
    return ", ".join([str(machine["cpu"]), *counts, *versions])


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
