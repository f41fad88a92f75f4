"""The lens against forward passes and against its peers, in one table: time, peak memory, growth with the prompt.

    python -m benchmarks [--lengths 512 2048 8192] [--kinds bridge hooked] [--repeats 5] [--quick]
                         [--json FILE] [--again] [--readme]

`lens` is record, every bound and the mean-field estimate. `own pass` is the model class's plain forward pass, `fused
pass` Hugging Face's with fused attention, both with all logits. Times are medians of steps taken in turn within one
process, ratios medians of the ratios within a round. Memory is the peak of the resident set of a fresh process that
loads the model and does that one thing, weights included. What depends on the weights alone is computed once per model,
and is in the memory but not in the times. Cells that the JSON file already has are not measured again (`--again` does).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from benchmarks.cells import Cell, Results, measure
from benchmarks.machine import cores, in_words, machine
from benchmarks.table import FUSED_ONLY, growth, lens_table, limits, peer_table, verdicts
from oversquash_lens.storage import write_atomically

README = Path(__file__).parent.parent / "README.md"
MARKS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")
QUICK = (128, 512)
PEER_LENGTHS = (512, 2048)
PEER_REPEATS = 3
ONCE = ("inseq", "alti", "captum")  # minutes long: time and memory from the same run
SHORT_ONLY = ("captum",)  # at the shortest length alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--kinds", nargs="+", default=["bridge", "hooked"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--quick", action="store_true", help=f"n = {QUICK[0]} and {QUICK[1]}, one round")
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks.json"), help="where cells are kept")
    parser.add_argument("--again", action="store_true", help="measure every cell anew")
    parser.add_argument("--readme", action="store_true", help="also put the table into README.md")
    options = parser.parse_args()
    lengths, repeats = (QUICK, 1) if options.quick else (sorted(options.lengths), options.repeats)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    results = Results(options.json, machine(options.threads), options.again)
    missing = {name: "not installed" for name in ("inseq", "captum") if find_spec(name) is None}
    for cell in cells(options.kinds, lengths, repeats, missing):
        if cell.name not in results.cells or "failed" in results.cells[cell.name]:
            print(f"{cell.name} …", file=sys.stderr, flush=True)
            found = measure(cell, options.threads)
            results.add(cell.name, found)
            if "failed" in found:
                print(f"  {found['failed']}", file=sys.stderr)
    text = page(results, options.kinds, lengths, repeats, missing)
    print(text)
    if options.readme:
        write_atomically(README, put(README.read_text("utf-8"), text).encode())


def cells(kinds: list[str], lengths: list[int], repeats: int, missing: dict[str, str]) -> Iterator[Cell]:
    """Everything that the tables show; the peers on the first class alone."""
    for n in lengths:
        for kind in kinds if n <= FUSED_ONLY else kinds[:1]:
            own = ("forward",) * (n <= FUSED_ONLY)
            yield Cell("time", kind, n, (*own, "fused", "record", "sweep"), repeats)
            for step in ("forward", "fused", "lens"):
                yield Cell("memory", kind, n, (step,))
    for n in lengths:
        if n > max(PEER_LENGTHS):
            continue
        yield Cell("time", kinds[0], n, ("row", "rollout"), min(repeats, PEER_REPEATS))
        for steps in (("recomputed_row",), ("cached_rollout",), ("gradient",)):
            yield Cell("time", kinds[0], n, steps, min(repeats, PEER_REPEATS))
        for step in ("recomputed_row", "cached_rollout", "gradient", *ONCE):
            if step not in missing and (step not in SHORT_ONLY or n == min(lengths)):
                yield Cell("memory", kinds[0], n, (step,))


def page(results: Results, kinds: list[str], lengths: list[int], repeats: int, missing: dict[str, str]) -> str:
    """Both tables and what they say, as Markdown."""
    short = [n for n in lengths if n <= max(PEER_LENGTHS)]
    said = [*growth(results, kinds[0], lengths), *limits(results, kinds[0]), *verdicts(results, kinds[0], short)]
    planned = [cell.name for cell in cells(kinds, lengths, repeats, missing)]
    found = {name: results.cells.get(name, {}) for name in planned}
    failed = [f"{name}: {each['failed']}" for name, each in found.items() if "failed" in each]
    peers = (
        f"Peers, on a {kinds[0]} and, where fused, on the plain transformers model; extra memory is beyond the loaded"
    )
    return "\n".join(
        [
            f"SmolLM2-135M, float32; {in_words(results.machine)}; medians of {repeats}.",
            "",
            lens_table(results, kinds, lengths),
            "",
            *(f"- {line}" for line in said),
            "",
            f"{peers} model:",
            "",
            peer_table(results, kinds[0], short, missing),
            *(["", "Not measured: " + "; ".join(failed)] if failed else []),
        ]
    )


def put(readme: str, text: str) -> str:
    """The README with `text` between its marks.

    >>> put("a <!-- benchmarks -->old<!-- /benchmarks --> b", "new").split()
    ['a', '<!--', 'benchmarks', '-->', 'new', '<!--', '/benchmarks', '-->', 'b']
    """
    start, stop = MARKS
    found = re.sub(f"{start}.*?{stop}", lambda _: f"{start}\n{text}\n{stop}", readme, count=1, flags=re.DOTALL)
    if text not in found:
        raise SystemExit(f"README.md has no {start} … {stop}; expected both marks: put them where the table belongs")
    return found


if __name__ == "__main__":
    main()
