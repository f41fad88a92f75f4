"""The compatibility table: family × class × TransformerLens version × measure, every cell from a run.

    python tests/compatibility.py run --out compat-3.9.json     # under the installed TransformerLens
    python tests/compatibility.py render compat-*.json          # docs/compatibility.md and README.md's table

`run` exits with 1 where the package is not what `osl.support` declares, or a bound lies below the truth.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from oversquash_lens.storage import write_atomically

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2, 3, 4)
COLUMNS = {
    "printed bounds": "printed bounds",
    "calibrated": "`calibrated`",
    "calibrated_full": "`calibrated_full`",
    "mean_field": "`mean_field`",
    "truth": "truth",
    "attention frozen": "truth, attention frozen",
}
SHORT = {"printed bounds": "printed bounds", "truth": "the truth", "attention frozen": "freezing attention"}
CLASSES = {
    "hooked": "HookedTransformer",
    "bridge": "TransformerBridge",
    "compatible": "TransformerBridge, compatibility mode",
}
TITLES = {
    "gpt2": "GPT-2",
    "gpt-j": "GPT-J",
    "gpt-neox": "GPT-NeoX, Pythia",
    "opt": "OPT",
    "bloom": "BLOOM",
    "llama": "Llama",
    "mistral": "Mistral",
    "mistral-window": "Mistral, sliding window",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "phi": "Phi",
    "phi3": "Phi-3",
    "mixtral": "Mixtral",
    "qwen2-moe": "Qwen2-MoE",
    "qwen3-moe": "Qwen3-MoE",
    "gpt-oss": "gpt-oss",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmo": "OLMo",
    "olmo-clip": "OLMo, cut queries, keys and values",
    "olmoe": "OLMoE",
    "olmoe-clip": "OLMoE, cut queries, keys and values",
    "granite": "Granite",
    "granite-moe": "Granite-MoE",
    "gpt-neo": "GPT-Neo",
    "stablelm": "StableLM",
    "stablelm-norms": "StableLM, norms of queries and keys",
    "stablelm-parallel": "StableLM, attention and MLP side by side",
    "cohere": "Cohere",
    "cohere-norms": "Cohere, norms of queries and keys",
    "cohere2": "Cohere 2",
    "exaone4": "EXAONE 4",
    "llama4": "Llama 4, text",
    "mpt": "MPT",
    "mpt-clip": "MPT, cut queries, keys and values",
    "arcee": "Arcee",
    "nemotron": "Nemotron",
    "apertus": "Apertus",
    "bloom-residual": "BLOOM, residual behind the norm",
    "falcon": "Falcon",
    "attention-only": "attention only",
    "no-norms": "no norms",
    "gpt2-folded": "GPT-2, folded (LNPre)",
    "llama-folded": "Llama, folded (RMSPre)",
    "gpt-neox-folded": "GPT-NeoX, folded",
    "gemma2-folded": "Gemma 2, folded",
}
INTRODUCTION = """# Compatibility

Made by `.ci/nightly`, never by hand: every cell is a run on {seeds} tiny random models of the family, weights in
float64. Each measure is computed and held against the truth, the truth against central differences of the model
itself; what `osl.support(model)` declares is compared with what happened, and any difference fails the run.

- **supported**: the measure means what its documentation says. For the calibrated bounds the number is the smallest
  factor by which they lay above the exact truth; for the truth, how far it was from central differences (the classes
  that compute in float32 inside limit these, not the truth).
- **approximate**: a number with a known gap in what it describes, said in the note. For the mean-field estimate:
  median |log₁₀(estimate / truth)| and Spearman's ρ over the positions, on *random* models; trained ones are in
  the README.
- **refused**: you get a `ModelError` that says why (the note), never a number.

Versions that say the same share a row, with the numbers of the worse one. They were {versions}.

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="every cell under the installed TransformerLens")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    run.add_argument("--families", nargs="+", default=list(TITLES))
    render = verbs.add_parser("render", help="merge runs into docs/compatibility.md and README.md")
    render.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    if options.verb == "render":
        write_tables([json.loads(path.read_text("utf-8")) for path in options.runs])
        return 0
    found = run_cells(tuple(options.seeds), tuple(options.families))
    write_atomically(options.out, json.dumps(found, indent=1, ensure_ascii=False).encode())
    for fault in found["faults"]:
        print(f"FAULT {fault}", file=sys.stderr)
    print(f"{len(found['cells'])} cells, {len(found['lacking'])} lacking, {len(found['faults'])} faults")
    return 1 if found["faults"] else 0


def run_cells(seeds: tuple[int, ...], families: tuple[str, ...] = tuple(TITLES)) -> dict[str, Any]:
    """Judge every cell of these families that the installed TransformerLens has."""
    from cells import judge
    from zoo import CELLS, lacking

    cells, missing, faults = [], [], []
    for name, kind in (cell for cell in CELLS if cell[0] in families):
        why = lacking(name, kind)
        if why is not None:
            missing.append({"family": name, "kind": kind, "why": why})
            continue
        start = time.perf_counter()
        cell = judge(name, kind, seeds)
        states = [found.state[0] for found in cell.measures.values()]
        print(f"{name:16} {kind:10} {' '.join(states)}  {time.perf_counter() - start:.1f} s", flush=True)
        cells.append({key: value for key, value in asdict(cell).items() if key != "faults"})
        faults += cell.faults
    packages = ("transformer-lens", "transformers", "torch")
    return {
        "versions": {name: version(name).split("+")[0] for name in packages},
        "seeds": list(seeds),
        "cells": cells,
        "lacking": missing,
        "faults": faults,
    }


# ---------------------------------------------------------------- the tables


def write_tables(runs: list[dict[str, Any]]) -> None:
    runs = sorted(runs, key=lambda run: [int(part) for part in run["versions"]["transformer-lens"].split(".")])
    write_atomically(ROOT / "docs" / "compatibility.md", full_page(runs).encode())
    readme = (ROOT / "README.md").read_text("utf-8")
    write_atomically(ROOT / "README.md", between_markers(readme, compact_table(runs)).encode())


def between_markers(text: str, table: str, name: str = "compatibility") -> str:
    """The text with what stands between `<!-- name -->` and `<!-- /name -->` replaced."""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, opened, rest = text.partition(opening)
    _, closed, tail = rest.partition(closing)
    if not (opened and closed):
        raise ValueError(f"no {opening} … {closing} in the text; expected both markers: put them back")
    return f"{head}{opening}\n{table}\n{closing}{tail}"


def short(run: dict[str, Any]) -> str:
    """2.18.0 -> 2.18"""
    return ".".join(run["versions"]["transformer-lens"].split(".")[:2])


class Notes:
    """Numbered reasons, each once: what came, without what to do about it or which of the zoo's models it was."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        text = re.sub(r"^tiny-random-\S+", "the model", text).partition("; expected")[0]
        if not text:
            return ""
        if text not in self.texts:
            self.texts.append(text)
        return f" [{self.texts.index(text) + 1}]"

    def __str__(self) -> str:
        return "\n".join(f"{number}. {text}" for number, text in enumerate(self.texts, 1))


def full_page(runs: list[dict[str, Any]]) -> str:
    """docs/compatibility.md: a row for each family, class and group of versions that agree."""
    notes = Notes()
    lines = [
        "| family | class | TransformerLens | " + " | ".join(COLUMNS.values()) + " |",
        "|" + "---|" * (3 + len(COLUMNS)),
    ]
    for name, title in TITLES.items():
        for kind, label in CLASSES.items():
            for row in _rows(runs, name, kind):
                texts = [cell_text(measure, row["measures"][measure], notes) for measure in COLUMNS]
                lines.append(f"| {title} | {label} | {', '.join(row['versions'])} | " + " | ".join(texts) + " |")
    versions = ", ".join(
        f"{run['versions']['transformer-lens']} (transformers {run['versions']['transformers']})" for run in runs
    )
    head = INTRODUCTION.format(seeds=len(runs[0]["seeds"]), versions=versions)
    return head + "\n".join(lines) + f"\n\nNotes:\n\n{notes}\n"


def _rows(runs: list[dict[str, Any]], name: str, kind: str) -> list[dict[str, Any]]:
    """The cell under each version; versions that say the same share a row, with the numbers of the worst."""
    found = [
        (short(run), cell) for run in runs for cell in run["cells"] if (cell["family"], cell["kind"]) == (name, kind)
    ]

    def story(entry: tuple[str, dict]) -> list[tuple[str, str]]:
        return [(one["state"], one["why"]) for one in entry[1]["measures"].values()]

    rows = []
    for _, group in groupby(found, key=story):
        members = list(group)
        rows.append({"versions": [label for label, _ in members], "measures": _worst([cell for _, cell in members])})
    return rows


WORST = {"tightest_log10_gap": min, "median_abs_log10_ratio": max, "spearman": min, "off_central_differences": max}


def _worst(cells: list[dict[str, Any]]) -> dict[str, Any]:
    merged = {}
    for measure, first in cells[0]["measures"].items():
        same = [cell["measures"][measure]["numbers"] for cell in cells]
        merged[measure] = first | {"numbers": {key: WORST[key](one[key] for one in same) for key in first["numbers"]}}
    return merged


def cell_text(measure: str, found: dict[str, Any], notes: Notes) -> str:
    numbers = found["numbers"]
    if found["state"] == "refused":
        return f"refused{notes.mark(found['why'])}"
    if measure == "mean_field":
        error = f"{numbers['median_abs_log10_ratio']:.2f}, ρ {numbers['spearman']:.2f}"
        return f"approximate ({error}){notes.mark(found['why'])}"
    extra = ""
    if "tightest_log10_gap" in numbers:
        extra = f" (10^{numbers['tightest_log10_gap']:.1f})"
    if "off_central_differences" in numbers:
        extra = f" ({numbers['off_central_differences']:.0e})"
    return f"{found['state']}{extra}{notes.mark(found['why'])}"


def compact_table(runs: list[dict[str, Any]]) -> str:
    """README's table: families that get the same answers share a row."""
    of_kind = {
        kind: [short(run) for run in runs if kind in {cell["kind"] for cell in run["cells"]}] for kind in CLASSES
    }
    entries: dict[tuple[str, ...], list[str]] = {}
    for name, title in TITLES.items():
        answers = tuple(_answers(_rows(runs, name, kind), of_kind[kind]) for kind in CLASSES)
        entries.setdefault(answers, []).append(title)
    heads = [f"{label} ({', '.join(of_kind[kind])})" for kind, label in CLASSES.items()]
    lines = ["| family | " + " | ".join(heads) + " |", "|" + "---|" * (1 + len(heads))]
    lines += [f"| {'; '.join(titles)} | " + " | ".join(answers) + " |" for answers, titles in entries.items()]
    return "\n".join(lines)


def _answers(rows: list[dict[str, Any]], versions: list[str]) -> str:
    """What a class says, with the versions where not all say it, or not all have the family."""
    if not rows:
        return "–"
    said: dict[str, list[str]] = {}
    for row in rows:
        said.setdefault(_answer(row), []).extend(row["versions"])
    return "; ".join(answer if of == versions else f"{answer} ({', '.join(of)})" for answer, of in said.items())


def _answer(row: dict[str, Any]) -> str:
    refused = [
        SHORT.get(measure, f"`{measure}`") for measure in COLUMNS if row["measures"][measure]["state"] == "refused"
    ]
    if not refused:
        return "all"
    return "refused" if len(refused) == len(COLUMNS) else f"all but {', '.join(refused)}"


if __name__ == "__main__":
    sys.exit(main())
