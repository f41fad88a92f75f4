"""The command line: `oversquash-lens report | bound | audit | models`.

Nothing heavy is imported before a command runs, so `--help` answers at once. Results go to standard output,
progress to standard error; bad input is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from oversquash_lens.errors import InputError, OversquashError, one_line
from oversquash_lens.files import check_writable, write_atomically

# The counting prompt of the paper's section 4, one of those whose truth we publish.
DEFAULT_PROMPT = "How many ones are in the following sequence? " + "1 " * 40 + "Answer:"
VARIANT_NAMES = (
    "proof",
    "theorem_5_1",
    "theorem_b5",
    "multi_head",
    "rollout",
    "calibrated",
    "calibrated_full",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {one_line(message)} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ρ shows a question mark, not a traceback
    options = build_parser().parse_args(arguments)
    try:
        _silence_other_peoples_notices()
        options.run(options)
    except OversquashError as error:
        print(f"oversquash-lens: {one_line(error, 2000)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("oversquash-lens: interrupted; nothing half-written was left behind", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="oversquash-lens",
        description="What of its prompt can a Transformer's last token still hear?",
        epilog="Without --model: SmolLM2-135M-Instruct, downloaded once. Without a prompt: counting ones.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    report = _command(commands, "report", run_report, "write one HTML page: bound, estimate and truth")
    report.add_argument("--probes", type=int, default=16, metavar="K", help="backward probes (default 16)")
    report.add_argument("--exact", action="store_true", help="exact truth, d_model backward products")
    report.add_argument("--out", default="report.html", metavar="FILE", help="default report.html")
    bound = _command(commands, "bound", run_bound, "the paper's bound or another variant, token by token")
    bound.add_argument("--variant", default="proof", help=f"{', '.join(VARIANT_NAMES)}, or mean_field")
    bound.add_argument("--beta", default="measured", help="'measured' or a number (printed variants only)")
    bound.add_argument("--top", type=int, default=20, metavar="K", help="rows of the table (default 20)")
    bound.add_argument("--out", metavar="FILE", help="write the result as JSON")
    audit = _command(commands, "audit", run_audit, "every measure beside the measured truth")
    audit.add_argument("--probes", type=int, metavar="K", help="estimate the truth from K probes, not exactly")
    audit.add_argument("--out", metavar="FILE", help="write the result as JSON")
    models = commands.add_parser("models", help="which models are cached, and where")
    models.add_argument("--json", action="store_true", help="print JSON")
    models.set_defaults(run=run_models)
    return parser


def _command(commands: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    """A command that runs a model on a prompt, with the options that all of these share."""
    command = commands.add_parser(name, help=about, description=about)
    command.set_defaults(run=run)
    command.add_argument("--model", help="hub name, Hugging Face folder or .gguf file")
    command.add_argument("--kind", default="auto", help="hooked, bridge or auto (default)")
    source = command.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="'-' reads standard input")
    source.add_argument("--prompt-file", metavar="FILE", help="'-' reads standard input")
    source.add_argument("--token-ids", metavar="IDS", help="the prompt as numbers: '504 4922 2271'")
    command.add_argument("--chat", action="store_true", help="apply the model's chat template")
    command.add_argument("--bos", action=argparse.BooleanOptionalAction, help="force BOS on or off")
    command.add_argument("--device", help="cpu, cuda, mps … (default: cuda where there is one)")
    command.add_argument("--dtype", default="float32", help="float64, float32 (default), bfloat16, float16")
    command.add_argument("--seed", type=int, default=0, help="of all probes (default 0)")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return command


def run_report(options: argparse.Namespace) -> None:
    from oversquash_lens.render.page import write_page

    _check_out(options)
    audit = _audit(options, None if options.exact else options.probes)
    path = write_page(audit, options.out)
    print(json.dumps(audit.to_dict()) if options.json else f"{audit.sentence}\n\n{path}")


def run_audit(options: argparse.Namespace) -> None:
    _check_out(options)
    audit = _audit(options, options.probes)
    _deliver(options, audit.to_dict(), str(audit))


def run_bound(options: argparse.Namespace) -> None:
    beta = _number_or_word(options.beta)
    if options.variant == "mean_field" and beta != "measured":
        raise InputError(f"--beta {options.beta} came with mean_field; expected no beta: it uses none")
    if options.variant not in (*VARIANT_NAMES, "mean_field"):
        raise InputError(f"variant {options.variant!r} came; expected one of {', '.join(VARIANT_NAMES)}, or mean_field")
    if options.top < 1:
        raise InputError(f"--top {options.top} came; expected at least 1")
    _check_out(options)
    prompt = _prompt(options)
    from oversquash_lens.measure.bounds import path_bound
    from oversquash_lens.measure.mean_field import mean_field_sensitivity
    from oversquash_lens.record.recorder import record

    trace = record(_model(options), prompt, chat=options.chat, bos=options.bos, seed=options.seed)
    if options.variant == "mean_field":
        profile = mean_field_sensitivity(trace)
    else:
        profile = path_bound(trace, options.variant, beta)
    _deliver(options, profile.to_dict(), _profile_table(profile, options.top))


def run_models(options: argparse.Namespace) -> None:
    from oversquash_lens.models import cache_folder, cached_models

    found = cached_models()
    if options.json:
        rows = [{**vars(model), "path": str(model.path)} for model in found]
        print(json.dumps({"cache": str(cache_folder()), "models": rows}))
        return
    print(f"cache: {cache_folder()}")
    for model in found:
        print(f"{model.name}  {model.label}  {model.state}  {model.bytes / 1e6:.1f} MB  {model.path}")


def _audit(options: argparse.Namespace, probes: int | None) -> Any:
    prompt = _prompt(options)
    if probes is not None and probes < 1:
        raise InputError(f"--probes {probes} came; expected at least 1")
    from oversquash_lens.measure.audit import audit

    return audit(
        _model(options),
        prompt,
        probes=probes,
        chat=options.chat,
        bos=options.bos,
        seed=options.seed,
        progress=True,
    )


def _model(options: argparse.Namespace) -> Any:
    from oversquash_lens.embedded import NAME
    from oversquash_lens.models import load_model

    name = options.model if options.model is not None else NAME
    print(f"loading {name} …", file=sys.stderr)
    return load_model(name, kind=options.kind, dtype=options.dtype, device=options.device)


def _prompt(options: argparse.Namespace) -> str | list[int]:
    """The prompt; read before any model is loaded, so that a wrong path costs no waiting."""
    if options.token_ids is not None:
        try:
            return [int(each) for each in options.token_ids.replace(",", " ").split()]
        except ValueError:
            raise InputError(f"--token-ids {options.token_ids!r} came; expected whole numbers, '504 4922'") from None
    if options.prompt_file not in (None, "-"):
        try:
            return Path(options.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"cannot read --prompt-file {options.prompt_file}: {one_line(error)}; expected a UTF-8 text file"
            ) from error
    if "-" in (options.prompt, options.prompt_file):
        return _standard_input()
    if options.prompt is None:
        return DEFAULT_PROMPT
    if not options.prompt:
        raise InputError("an empty --prompt came; expected a text of at least two tokens")
    return options.prompt


def _standard_input() -> str:
    raw = getattr(sys.stdin, "buffer", None)
    try:
        return sys.stdin.read() if raw is None else raw.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 ({error.reason}); expected a UTF-8 text") from error


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        if text == "measured":
            return text
        raise InputError(f"--beta {text!r} came; expected 'measured' or a number") from None


def _check_out(options: argparse.Namespace) -> None:
    if options.out:
        check_writable(options.out)


def _deliver(options: argparse.Namespace, result: dict, table: str) -> None:
    if options.out:
        write_atomically(options.out, json.dumps(result, indent=1).encode())
        print(f"wrote {options.out}", file=sys.stderr)
    print(json.dumps(result) if options.json else table)


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


def _silence_other_peoples_notices() -> None:
    """Deprecation notes of the libraries below us help nobody at a command line; our own stay."""
    import os
    import warnings

    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module=r"oversquash_lens\..*")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    raise SystemExit(main())
