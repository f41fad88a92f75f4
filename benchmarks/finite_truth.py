"""What ranks the real effect of replacing a token: attention, estimate, bound, derivatives and nodes, on 96 prompts.

    python -m benchmarks.finite_truth [--models NAME ...] [--half first|second|both] [--kinds NAME ...] [--most 48]
                                      [--draws 8] [--long] [--out build/finite]

The truth is `substitution(method="exact")`, with the geometric mean over --draws replacements of each token, half of
them uniform and half plausible; of longer prompts --most positions, spread evenly. Nodes draw other replacements than
the truth. Nothing is fitted. Every prompt is kept in OUT as it is done, so a run that was stopped goes on. Prints, for
each model, Spearman's ρ and how many of the truth's leading 15 % of positions are found: medians over prompts [worst].
--long adds a prompt of 1,000 tokens to the real models.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

import oversquash_lens as osl
from benchmarks.estimate_prompts import KINDS, tokens
from benchmarks.estimate_texts import TEXTS
from benchmarks.estimate_vs_truth import GROUPS, TRUTH_OF, chosen, group_of, mark_of, model_of
from oversquash_lens.analyses.audit import measure_truths
from oversquash_lens.analyses.compare import baselines, ceiling
from oversquash_lens.capture.subject import Subject
from oversquash_lens.numerics import spearman
from oversquash_lens.storage import write_atomically

NODES = (2, 4, 8)  # draws
PROBES = 64  # of the derivatives
LEADING = 0.15  # share of positions that are looked for
OTHER_SEED = 1  # of draws that are not the truth's
LONG = 1000  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(dict.fromkeys(TRUTH_OF.values())), choices=list(TRUTH_OF))
    parser.add_argument("--half", default="both", choices=("first", "second", "both"))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--most", type=int, default=48, help="positions of a prompt whose tokens are replaced")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("build/finite"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        prompts = [
            (half, sample.kind, sample.name, tokens(sample, model_of(name)).cpu()) for half, sample in chosen(options)
        ]
        if options.long and model_of(name).tokenizer is not None:
            text = " ".join(TEXTS["prose"])
            prompts.append(
                ("second", "long", "long", model_of(name).to_tokens(text, prepend_bos=False)[0][:LONG].cpu())
            )
        rows = [
            {"half": half, "kind": kind, "prompt": prompt, **kept(name, prompt, ids, options)}
            for half, kind, prompt, ids in tqdm(prompts, desc=name, unit="prompt")
        ]
        write_atomically(options.out / f"{name}.json", json.dumps(rows, indent=1).encode())
        print(table(name, rows), flush=True)


def kept(name: str, prompt: str, ids: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """One prompt, from the folder where it was done already as it is asked for."""
    file = options.out / f"{name}-{mark_of(name)}" / f"{prompt}-{options.draws}-{options.most}.json"
    if file.exists():
        found = json.loads(file.read_text("utf-8"))
        if found["ids"] == ids.tolist():
            return found
    found = {"ids": ids.tolist(), **judged(model_of(name), ids, options.draws, options.most)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(found).encode())
    return found


def judged(model: Any, ids: Tensor, draws: int, most: int) -> dict[str, Any]:
    """Every measure's values at the positions whose tokens were replaced, and the truth's."""
    n = len(ids)
    places = torch.linspace(0, n - 1, min(n, most), device="cpu").round().long().tolist()
    subject, truth = Subject.of(model), osl.substitution(model, ids, places, draws, "exact")
    trace = osl.record(model, ids)
    derivatives = measure_truths(subject, subject.tokenize(ids), trace.about, probes=PROBES, frozen=False)
    profiles = osl.profiles(trace, ("rollout", "proof", "mean_field"))
    measures = {
        **baselines(trace),
        "truth": derivatives.frobenius.values,
        "vocabulary": derivatives.vocabulary.values,
        "rollout": profiles["rollout"].share,
        "bound": profiles["proof"].share,
        "mean_field": profiles["mean_field"].values,
    }
    values = {each: of.double()[places].tolist() for each, of in measures.items()}
    for many in NODES:
        nodes = osl.substitution(model, ids, places, many, "nodes", seed=OTHER_SEED)
        values[f"nodes, {many} draws"] = nodes.distance.tolist()
    return {"places": places, "truth": truth.distance.tolist(), "ceiling": ceiling(truth), "values": values}


def recall(measure: Float[Tensor, " place"], truth: Float[Tensor, " place"]) -> float:
    """Share of the truth's leading positions that are among the measure's, the last position left out."""
    many = max(1, round(LEADING * (len(truth) - 1)))
    leading, found = (set(each[:-1].topk(many).indices.tolist()) for each in (truth, measure))
    return len(leading & found) / many


def table(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """For each half and group of kinds, and for each measure."""
    lines = [f"\n{name}: Spearman's ρ with the finite effect, median [worst]; recall of its leading {LEADING:.0%}"]
    lines.append(f"{'half':6} {'prompts':17} {'measure':15} {'ρ':>13} {'recall':>7}")
    for half in ("first", "second"):
        for group in (*GROUPS, "long"):
            part = [row for row in rows if row["half"] == half and _group(row["kind"]) == group]
            label = f"{half:6} {f'{group} ({len(part)})':17}"
            truths = [torch.tensor(row["truth"]) for row in part]
            for measure in part[0]["values"] if part else ():
                own = [torch.tensor(row["values"][measure]) for row in part]
                rho = [spearman(a.log(), b.log()) for a, b in zip(own, truths, strict=True)]
                found = median(recall(a, b) for a, b in zip(own, truths, strict=True))
                lines.append(f"{label} {measure:15} {_summary(rho)} {found:7.2f}")
            if part:
                lines.append(f"{label} {'half of draws':15} {_summary([row['ceiling'] for row in part])}")
    return "\n".join(lines)


def _group(kind: str) -> str:
    return kind if kind == "long" else group_of(kind)


def _summary(values: Sequence[float]) -> str:
    known = [each for each in values if not math.isnan(each)]  # no order where all are alike
    return f"{median(known):5.2f} [{min(known):5.2f}]" if known else f"{'–':>13}"


if __name__ == "__main__":
    main()
