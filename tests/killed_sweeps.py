"""Sweeps that are killed again and again: `python killed_sweeps.py FOLDER KILLS SEED`.

One Python makes a small model; children that it forks sweep the same prompts into the same file and are killed
(SIGKILL) at a random moment, until one comes to its end; then the file is looked through, and all begins anew until
KILLS children have been killed. Prints JSON: how many were killed, how many sweeps ended, and what was wrong.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
from small_models import bridge, has_bridge, hooked
from small_sweeps import MEASURES, exactly_once, texts

import oversquash_lens as osl
from oversquash_lens.sweeps import rows, run

PROMPTS = [*texts(40), "w5 " * 40, "", [3, 4, 5]]


def rows_in_parts(out: Path) -> list[int]:
    """Prompts whose rows are on the disk; every part must be whole."""
    parts = sorted(out.with_name(f"{out.name}.parts").glob("*.parquet"))
    return [index for part in parts for index in pyarrow.parquet.read_table(part)["index"].to_pylist()]


def child(model: Any, out: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            osl.sweep(model, PROMPTS, MEASURES, out)
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr)
            os._exit(4)
        os._exit(0)
    return pid


def main() -> None:
    folder, kills, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    rows.MOST["cpu"], run.WINDOW = 3, 16  # small batches and windows: more moments to be killed at
    model = bridge(3, "llama") if has_bridge() else hooked(3)
    out, wrong = folder / "rows.parquet", []
    begun = time.perf_counter()
    osl.sweep(model, PROMPTS, MEASURES, folder / "whole.parquet")
    once, killed, ended, kept = time.perf_counter() - begun, 0, 0, 0
    while killed < kills:
        pid = child(model, out)
        time.sleep(draw.uniform(0, 0.7 * once))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed += os.WIFSIGNALED(status)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            wrong.append(f"a child ended with {os.WEXITSTATUS(status)}")
        indices = rows_in_parts(out)
        if len(indices) != len(set(indices)) or (not out.exists() and len(indices) < kept):
            wrong.append(f"{kept} rows were kept, then {len(indices)}, {len(set(indices))} of them different")
        kept = len(indices)
        if out.exists():
            exactly_once(osl.sweep(model, PROMPTS, MEASURES, out), PROMPTS)  # tidies up what the kill left
            out.unlink()
            ended, kept = ended + 1, 0
    result = osl.sweep(model, PROMPTS, MEASURES, out)
    exactly_once(result, PROMPTS)
    print(json.dumps({"killed": killed, "ended": ended, "reused": result.reused, "wrong": wrong}))


if __name__ == "__main__":
    main()
