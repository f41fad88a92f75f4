"""Do the tests find a wrong formula? Each row makes one small mistake in a copy of the package and runs some tests.

    python -m benchmarks.mutations [--only WORDS] [--first N] [--json mutations.json]

Run from the repository. A row of `mutation_rows.ROWS` is killed where a test that it names fails, and survives where
all of them pass. One that changes no number says why in `equivalent`, and must survive; one whose old text is not found
exactly once, or whose tests do not pass on the package as it is, is stale. Exits with 1 where fewer than 95 % are
killed or equivalent, or any is stale. Every row runs in a process of its own, forked from one that has imported what
the tests need besides the package.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from benchmarks.mutation_rows import ROWS, Mutation

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".git", "__pycache__", ".*_cache", "*.egg-info", "demos", "node_modules")
ENOUGH = 0.95
PATIENCE = 900  # seconds; a row whose tests are not done by then has survived


def occurrences(row: Mutation, root: Path = ROOT) -> int:
    """How often the old text stands in its file."""
    path = root / row.file
    return path.read_text("utf-8").count(row.old) if path.is_file() else 0


def passes(root: Path, tests: Sequence[str]) -> bool:
    """Whether these tests pass on the tree at `root`, stopping at the first that does not; in a forked process."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            sys.stdout.flush()
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            os.chdir(root)
            os.environ["PYTHONPATH"] = str(root)
            sys.dont_write_bytecode = True
            sys.path[:0] = [str(root), str(root / "tests")]
            import pytest

            # Without the type checker, which takes most of the time: numbers alone must tell.
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", *tests]))
        finally:
            os._exit(code)
    started = time.monotonic()
    while time.monotonic() - started < PATIENCE:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.1)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return True


def judged(row: Mutation, root: Path, unharmed: dict[tuple[str, ...], bool]) -> str:
    """killed, survived, equivalent or stale; the tree at `root` is afterwards as it was."""
    if occurrences(row, root) != 1:
        return "stale"
    if row.tests not in unharmed:
        unharmed[row.tests] = passes(root, row.tests)
    if not unharmed[row.tests]:
        return "stale"
    path = root / row.file
    before = path.read_text("utf-8")
    path.write_text(before.replace(row.old, row.new), "utf-8")
    try:
        survived = passes(root, row.tests)
    finally:
        path.write_text(before, "utf-8")
    if row.equivalent:
        return "equivalent" if survived else "stale"
    return "survived" if survived else "killed"


def import_what_tests_need() -> None:
    """All but the package itself, once for all rows."""
    for name in (
        "hypothesis",
        "pandas",
        "pytest",
        "rich",
        "safetensors.torch",
        "selenium.webdriver",
        "transformer_lens",
    ):
        with suppress(ImportError):
            import_module(name)
    for module, names in {
        "transformers": ("AutoTokenizer", "PreTrainedTokenizerFast", "GPT2LMHeadModel", "LlamaForCausalLM"),
        "transformer_lens": ("HookedTransformer",),
        "transformer_lens.model_bridge": ("TransformerBridge",),
    }.items():
        for name in names:
            with suppress(ImportError, AttributeError):
                getattr(import_module(module), name)
    gc.freeze()  # a collection in a forked process need not look at these


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="words: rows whose name or file holds one of them")
    parser.add_argument("--first", type=int, default=0, help="number of the first row, counted from 0")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [
        row
        for row in ROWS[options.first :]
        if not options.only or any(w in f"{row.file} {row.name}" for w in options.only)
    ]
    import_what_tests_need()
    found: list[dict[str, object]] = []
    unharmed: dict[tuple[str, ...], bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for row in rows:
            started = time.monotonic()
            verdict = judged(row, root, unharmed)
            found.append({**row._asdict(), "verdict": verdict, "seconds": round(time.monotonic() - started, 1)})
            why = f" ({row.equivalent})" if row.equivalent else ""
            print(f"{verdict:10} {found[-1]['seconds']:>6} s  {row.file}: {row.name}{why}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    counted = Counter(each["verdict"] for each in found)
    print(f"{len(found)} mutations: " + ", ".join(f"{count} {verdict}" for verdict, count in counted.most_common()))
    good = counted["killed"] + counted["equivalent"]
    return 1 if counted["stale"] or good < ENOUGH * len(found) else 0


if __name__ == "__main__":
    sys.exit(main())
