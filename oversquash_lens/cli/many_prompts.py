"""The commands that take many prompts: `report`, a page for one or for each, and `sweep`, a row for each."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from oversquash_lens.cli.common import (
    attention_option,
    check_figure,
    check_out,
    checked,
    load,
    model_command,
    planned,
    prompt_command,
    prompt_of,
    recording_options,
    remark,
    target_option,
    target_options,
    verify_option,
)
from oversquash_lens.errors import InputError, visible
from oversquash_lens.sweeps.prompt_files import read_prompts

PROBES, FULL_PROBES = 8, 2048  # of a report's truth, and the tokens up to which it has so many
FILES = "'-' or one prompt a line, or .json, .jsonl, .csv, .tsv, .parquet"
COLUMN = "where a .csv, .tsv, .jsonl or .parquet file has its prompts (default text, prompt or messages)"


def add_report(commands: Any) -> None:
    report = prompt_command(commands, "report", run_report, "write an HTML page: what each token counts, and where")
    report.add_argument(
        "--probes",
        type=int,
        metavar="K",
        help=f"backward probes for all outputs (default {PROBES}, of more than {FULL_PROBES} tokens fewer)",
    )
    report.add_argument("--exact", action="store_true", help="all outputs exactly, d_model backward products")
    target_option(report)
    report.add_argument(
        "--draws", type=int, metavar="K", help="replacements of each token, 0 for none (default 2 up to 150 tokens)"
    )
    report.add_argument("--out", default="report.html", metavar="FILE", help="default report.html")
    report.add_argument(
        "--prompts-file",
        metavar="FILE",
        help=f"a page per prompt and an index into the folder --out (default reports): {FILES}",
    )
    report.add_argument("--column", help=COLUMN)
    verify_option(report)
    attention_option(report)


def add_sweep(commands: Any) -> None:
    command = model_command(commands, "sweep", run_sweep, "measure thousands of prompts, a row each in a parquet file")
    command.add_argument("--prompts-file", required=True, metavar="FILE", help=FILES)
    command.add_argument("--column", help=COLUMN)
    command.add_argument(
        "--measures", default="mean_field,flow", metavar="NAMES", help="with commas between (default mean_field,flow)"
    )
    command.add_argument("--out", default="sweep.parquet", metavar="FILE", help="default sweep.parquet")
    command.add_argument("--figure", metavar="FILE", help="also draw bands over the prompts: .png, .pdf or .svg")
    command.add_argument("--chat", action="store_true", help="apply the model's chat template")
    command.add_argument("--probes", type=int, default=16, metavar="K", help="backward probes of 'truth' (default 16)")
    command.add_argument(
        "--ray", metavar="WHERE", help="run on Ray: 'auto' (the running cluster, else one here), or an address"
    )
    attention_option(command)
    verify_option(command)


def run_report(options: argparse.Namespace) -> None:
    checked("probes", options.probes)
    checked("draws", options.draws, least=0)
    if options.prompts_file is not None:
        return _run_reports(options)
    if options.column is not None:
        raise InputError("expected it with --prompts-file only, got --column: leave it out")
    check_out(options)
    prompt = prompt_of(options)
    from oversquash_lens.analyses.findings import findings
    from oversquash_lens.viz.report import write_page

    model = load(options)
    probes = None if options.exact else options.probes or _usual_probes(model, prompt, options)
    if planned(options, model, prompt, "report", probes):
        return
    how = recording_options(options) | target_options(options)
    found = findings(model, prompt, probes=probes, draws=options.draws, progress=True, **how)
    remark(found.about)
    path = write_page(found, options.out)
    print(json.dumps(found.to_dict()) if options.json else f"{found.sentence}\n\n{path}")


def _run_reports(options: argparse.Namespace) -> None:
    if any(given is not None for given in (options.prompt, options.prompt_file, options.token_ids)) or options.json:
        raise InputError(
            "expected it alone, got --prompts-file with one prompt or --json beside it: leave the others out"
        )
    from oversquash_lens.storage import check_place
    from oversquash_lens.viz.reports import reports

    folder = "reports" if options.out == "report.html" else options.out
    probes = None if options.exact else options.probes if options.probes is not None else PROBES
    listed = read_prompts(options.prompts_file, options.column)
    if not all(isinstance(each.prompt, str | list) for each in listed):
        raise InputError(
            f"--prompts-file {options.prompts_file} holds other things; expected texts or lists of token ids: put "
            "every prompt into quotes"
        )
    if options.plan:
        model = load(options)
        for each in listed:
            planned(options, model, each.prompt, "report", probes)
        return
    check_place(folder, "index.html")
    how = recording_options(options) | {"target": target_options(options)["target"], "draws": options.draws}
    print(reports(load(options), listed, folder, probes=probes, progress=True, **how))


def _usual_probes(model: Any, prompt: Any, options: argparse.Namespace) -> int:
    """As many as a long prompt leaves time for: each probe costs about two passes over it."""
    from oversquash_lens.capture.tokens import tokenize

    n = len(tokenize(model, prompt, chat=options.chat, bos=options.bos).ids)
    return max(1, min(PROBES, PROBES * FULL_PROBES // n))


def run_sweep(options: argparse.Namespace) -> None:
    from oversquash_lens.parts import check_results_file
    from oversquash_lens.sweeps.rows import checked_measures
    from oversquash_lens.sweeps.run import sweep

    measures = checked_measures([name.strip() for name in options.measures.split(",")])
    check_figure(options.figure)
    check_results_file(options.out)
    prompts = read_prompts(options.prompts_file, options.column)  # before any model is loaded
    if options.plan:
        return _plan(options, prompts, measures)
    how = {"probes": options.probes, "ray": options.ray, **recording_options(options)}
    if options.ray is None:
        result = sweep(load(options), prompts, measures, options.out, progress=True, **how)
    else:
        name, given = _name_and_options(options)
        result = sweep(name, prompts, measures, options.out, load=given, progress=True, **how)
    print(json.dumps(result.to_dict()) if options.json else result)
    if not result.done:
        raise InputError(
            f"none of the {result.total} prompts could be measured; expected one at least: see the reasons in "
            f"{options.out}"
        )
    if options.figure:
        from oversquash_lens.viz.figures import bands, save

        path = Path(options.figure)
        save(bands(result), path.parent, path.stem, [path.suffix[1:]])
        print(f"wrote {visible(options.figure)}", file=sys.stderr)


def _name_and_options(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """What a worker of Ray hands to load_model; what is left to its default is left out."""
    from oversquash_lens.models.default_model import NAME

    given = {name: getattr(options, name) for name in ("kind", "dtype", "device", "device_map")}
    return NAME if options.model is None else options.model, {k: v for k, v in given.items() if v is not None}


def _plan(options: argparse.Namespace, prompts: list, measures: tuple[str, ...]) -> None:
    from oversquash_lens.sweeps.run import sweep_plan

    found = sweep_plan(load(options), prompts, measures, chat=options.chat, bos=options.bos, probes=options.probes)
    print(json.dumps(found.to_dict()) if options.json else found)
