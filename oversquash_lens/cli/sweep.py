"""The command on thousands of prompts: `sweep`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from oversquash_lens.cli.common import (
    attention_option,
    check_figure,
    load,
    model_command,
    plan_option,
    recording_options,
    verify_option,
)
from oversquash_lens.errors import InputError


def add_commands(commands: Any) -> None:
    command = model_command(commands, "sweep", run_sweep, "measure thousands of prompts, a row each in a parquet file")
    source = {"required": True, "metavar": "FILE", "help": "one prompt a line, or .json, .jsonl, .parquet"}
    command.add_argument("--prompts-file", **source)
    command.add_argument("--column", help="where a .jsonl or .parquet file has its prompts (default text or prompt)")
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
    plan_option(command)
    verify_option(command)


def run_sweep(options: argparse.Namespace) -> None:
    from oversquash_lens.sweeps.prompts import read_prompts
    from oversquash_lens.sweeps.rows import checked_measures
    from oversquash_lens.sweeps.run import sweep
    from oversquash_lens.sweeps.store import check_out

    measures = checked_measures([name.strip() for name in options.measures.split(",")])
    check_figure(options.figure)
    check_out(options.out)
    prompts = read_prompts(options.prompts_file, options.column)  # before any model is loaded
    if options.plan:
        return _plan(options, prompts, measures)
    how = {"column": options.column, "probes": options.probes, "ray": options.ray, **recording_options(options)}
    if options.ray is None:
        result = sweep(load(options), options.prompts_file, measures, options.out, progress=True, **how)
    else:
        name, given = _name_and_options(options)
        result = sweep(name, options.prompts_file, measures, options.out, load=given, progress=True, **how)
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
        print(f"wrote {options.figure}", file=sys.stderr)


def _name_and_options(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """What a worker of Ray hands to load_model; what is left to its default is left out."""
    from oversquash_lens.models.default_model import NAME

    given = {name: getattr(options, name) for name in ("kind", "dtype", "device", "device_map")}
    return NAME if options.model is None else options.model, {k: v for k, v in given.items() if v is not None}


def _plan(options: argparse.Namespace, prompts: list, measures: tuple[str, ...]) -> None:
    from oversquash_lens.sweeps.plan import sweep_plan

    found = sweep_plan(load(options), prompts, measures, chat=options.chat, bos=options.bos, probes=options.probes)
    print(json.dumps(found.to_dict()) if options.json else found)
