"""The commands on one prompt: `report`, `bound`, `audit`, and `models`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from oversquash_lens.cli.common import (
    attention_option,
    check_out,
    deliver,
    load,
    plan_option,
    planned,
    prompt_command,
    prompt_of,
    read_text,
    recording_options,
    verify_option,
)
from oversquash_lens.errors import InputError, one_line

VARIANT_NAMES = (
    "proof",
    "theorem_5_1",
    "theorem_b5",
    "multi_head",
    "rollout",
    "calibrated",
    "calibrated_full",
)
PROBES, FULL_PROBES = 16, 1024  # of a report's truth, and the tokens up to which it has so many


def add_commands(commands: Any) -> None:
    report = prompt_command(
        commands, "report", run_report, "write an HTML page: what is heard, and where the rest is lost"
    )
    report.add_argument(
        "--probes",
        type=int,
        metavar="K",
        help=f"backward probes (default {PROBES}, of more than {FULL_PROBES} tokens fewer)",
    )
    report.add_argument("--exact", action="store_true", help="exact truth, d_model backward products")
    report.add_argument("--out", default="report.html", metavar="FILE", help="default report.html")
    report.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="a page per prompt and an index into the folder --out (default reports): one prompt a line, or JSON, a "
        "list of texts or an object {name: text}",
    )
    bound = prompt_command(commands, "bound", run_bound, "the paper's bound or another variant, token by token")
    bound.add_argument("--variant", default="proof", help=f"{', '.join(VARIANT_NAMES)}, or mean_field")
    bound.add_argument("--beta", default="measured", help="'measured' or a number (printed variants only)")
    bound.add_argument("--top", type=int, default=20, metavar="K", help="rows of the table (default 20)")
    bound.add_argument("--out", metavar="FILE", help="write the result as JSON")
    audit = prompt_command(commands, "audit", run_audit, "every measure beside the measured truth")
    audit.add_argument("--probes", type=int, metavar="K", help="estimate the truth from K probes, not exactly")
    audit.add_argument("--out", metavar="FILE", help="write the result as JSON")
    for command in (report, bound, audit):
        plan_option(command)
        verify_option(command)
        attention_option(command)
    models = commands.add_parser("models", help="which models are cached, and where")
    models.add_argument("--json", action="store_true", help="print JSON")
    models.set_defaults(run=run_models)


def run_report(options: argparse.Namespace) -> None:
    if options.prompts_file is not None:
        return _run_reports(options)
    check_out(options)
    prompt, effort = prompt_of(options), _effort(options, options.probes)
    from oversquash_lens.analyses.findings import findings
    from oversquash_lens.viz.report import write_page

    model = load(options)
    effort["probes"] = None if options.exact else options.probes or _usual_probes(model, prompt, options)
    if planned(options, model, prompt, "report", effort["probes"]):
        return
    found = findings(model, prompt, **effort)
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
    prompts, effort = prompts_of(options.prompts_file), _effort(options, probes)
    if options.plan:
        model = load(options)
        for each in prompts:
            planned(options, model, each if isinstance(each, str) else each[1], "report", effort["probes"])
        return
    check_place(folder, "index.html")
    print(reports(load(options), prompts, folder, **effort))


def prompts_of(file: str) -> list[str] | list[tuple[str, str]]:
    """Prompts of a file: one a line, or JSON, a list of texts or an object of names and texts."""
    text = read_text(file, "--prompts-file")
    if not text.strip():
        raise InputError(f"--prompts-file {file} is empty; expected one prompt a line, or JSON: write some into it")
    if not file.endswith(".json"):
        return [line for line in text.splitlines() if line.strip()]
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"--prompts-file {file} is no JSON ({one_line(error)}); expected a list or an object: mend it, or name "
            "the file .txt for one prompt a line"
        ) from error
    texts = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise InputError(
            f"--prompts-file {file} holds other things; expected a list of texts or an object {{name: text}}: put "
            "every prompt into quotes"
        )
    return list(found.items()) if isinstance(found, dict) else found


def run_audit(options: argparse.Namespace) -> None:
    check_out(options)
    prompt, effort = prompt_of(options), _effort(options, options.probes)
    from oversquash_lens.analyses.audit import audit

    model = load(options)
    if planned(options, model, prompt, "audit", effort["probes"]):
        return
    result = audit(model, prompt, **effort)
    deliver(options, result.to_dict(), str(result))


def run_bound(options: argparse.Namespace) -> None:
    beta = _number_or_word(options.beta)
    if options.variant == "mean_field" and beta != "measured":
        raise InputError(f"expected no beta, got --beta {options.beta} with mean_field: it uses none")
    if options.variant not in (*VARIANT_NAMES, "mean_field"):
        raise InputError(f"expected one of {', '.join(VARIANT_NAMES)}, or mean_field, got variant {options.variant!r}")
    if options.top < 1:
        raise InputError(f"expected at least 1, got --top {options.top}")
    check_out(options)
    prompt = prompt_of(options)
    from oversquash_lens.capture.recorder import record
    from oversquash_lens.paths.bounds import path_bound
    from oversquash_lens.paths.expected_error import estimate_and_error

    model = load(options)
    if planned(options, model, prompt, "bound"):
        return
    trace = record(model, prompt, **recording_options(options))
    if options.variant == "mean_field":
        profile, expected = estimate_and_error(trace)
        table = f"{_profile_table(profile, options.top)}\n\n{expected.sentence}"
        deliver(options, {**profile.to_dict(), "expected": expected.to_dict()}, table)
    else:
        profile = path_bound(trace, options.variant, beta)
        deliver(options, profile.to_dict(), _profile_table(profile, options.top))


def run_models(options: argparse.Namespace) -> None:
    from oversquash_lens.models.loading import cache_folder, cached_models

    found = cached_models()
    if options.json:
        rows = [{**vars(model), "path": str(model.path)} for model in found]
        print(json.dumps({"cache": str(cache_folder()), "models": rows}))
        return
    print(f"cache: {cache_folder()}")
    for model in found:
        print(f"{model.name}  {model.label}  {model.state}  {model.bytes / 1e6:.1f} MB  {model.path}")


def _usual_probes(model: Any, prompt: Any, options: argparse.Namespace) -> int:
    """As many as a long prompt leaves time for: each probe costs about two passes over it."""
    from oversquash_lens.capture.tokens import tokenize

    n = len(tokenize(model, prompt, chat=options.chat, bos=options.bos).ids)
    return max(1, min(PROBES, PROBES * FULL_PROBES // n))


def _effort(options: argparse.Namespace, probes: int | None) -> dict[str, Any]:
    """How to record and how hard to measure, as `audit` and `findings` take it."""
    if probes is not None and probes < 1:
        raise InputError(f"expected at least 1, got --probes {probes}")
    return {"probes": probes, **recording_options(options), "progress": True}


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        if text == "measured":
            return text
        raise InputError(f"expected 'measured' or a number, got --beta {text!r}") from None


def _profile_table(profile: Any, top: int) -> str:
    """The most heard tokens, and how much of the whole they are."""
    import math

    share = profile.share
    order = share.argsort(descending=True)[:top].tolist()
    sized = not math.isnan(profile.log_constant)
    lines = [f"{profile.about}", f"{profile.kind}: {'; '.join(profile.notes)}", ""]
    lines.append(f"{'position':>8}  {'share':>9}  {'log10 value':>11}  token")
    for i in order:
        value = f"{profile.log_values[i].item() / math.log(10):11.3f}" if sized else " " * 10 + "–"
        lines.append(f"{i:8d}  {share[i].item():9.3g}  {value}  {profile.tokens[i]!r}")
    rest = len(profile.tokens) - len(order)
    if rest:
        lines.append(f"… and {rest} more with {1 - share[order].sum().item():.3g} of the whole together")
    return "\n".join(lines)
