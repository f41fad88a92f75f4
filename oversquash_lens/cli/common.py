"""What the commands share: options of the model and the prompt, and where results go."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from oversquash_lens.errors import InputError, one_line
from oversquash_lens.storage import check_place, check_writable, write_atomically

FIGURE_FILES = (".png", ".pdf", ".svg")
MOST_BYTES = 64 << 20  # of a prompt or a file of prompts; what has no end (/dev/zero) must not fill the memory

# The counting prompt of the paper's section 4, one of those whose truth we publish.
DEFAULT_PROMPT = "How many ones are in the following sequence? " + "1 " * 40 + "Answer:"


def prompt_command(commands: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    """A command that runs a model on one prompt."""
    command = model_command(commands, name, run, about)
    source = command.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="'-' reads standard input")
    source.add_argument("--prompt-file", metavar="FILE", help="'-' reads standard input")
    source.add_argument("--token-ids", metavar="IDS", help="the prompt as numbers: '504 4922 2271'")
    command.add_argument("--chat", action="store_true", help="apply the model's chat template")
    return command


def model_command(commands: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    """A command that runs a model, with the options that all of these share."""
    command = commands.add_parser(name, help=about, description=about)
    command.set_defaults(run=run)
    command.add_argument("--model", help="hub name, Hugging Face folder or .gguf file")
    command.add_argument("--kind", default="auto", help="model class: hooked, bridge or auto (default)")
    command.add_argument("--bos", action=argparse.BooleanOptionalAction, help="force BOS on or off")
    command.add_argument("--device", help="cpu, cuda, mps … (default: cuda where there is one)")
    command.add_argument("--device-map", help="transformers' device_map, such as auto (bridge only)")
    command.add_argument("--dtype", default="float32", help="float64, float32 (default), bfloat16, float16")
    command.add_argument("--seed", type=int, default=0, help="of all that is drawn (default 0)")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return command


def plan_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--plan", action="store_true", help="say what memory and time it would take, and stop")


def verify_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--verify",
        action="store_true",
        help="check at every position that the hooks describe the model (two passes more)",
    )


def attention_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--attention",
        default="auto",
        help="kept (every pattern), recomputed (rows made anew, for long prompts) or auto (default)",
    )


def recording_options(options: argparse.Namespace) -> dict[str, Any]:
    """How to record, as every door that records takes it; `attention` of the commands that have it."""
    how = {"chat": options.chat, "bos": options.bos, "seed": options.seed, "verify": options.verify}
    return how | ({"attention": options.attention} if hasattr(options, "attention") else {})


def planned(options: argparse.Namespace, model: Any, prompt: Any, measure: str, probes: int | None = None) -> bool:
    """With --plan print the forecast in place of the result; says whether it did."""
    if not options.plan:
        return False
    from oversquash_lens.analyses.plan import forecast

    found = forecast(model, prompt, measure, probes=probes, chat=options.chat, bos=options.bos)
    print(json.dumps(found.to_dict()) if options.json else found)
    return True


def load(options: argparse.Namespace) -> Any:
    from oversquash_lens.models.default_model import NAME
    from oversquash_lens.models.loading import load_model

    name = options.model if options.model is not None else NAME
    print(f"loading {name} …", file=sys.stderr)
    place = {"device": options.device, "device_map": options.device_map}
    return load_model(name, kind=options.kind, dtype=options.dtype, **place)


def prompt_of(options: argparse.Namespace) -> str | list[int]:
    """The prompt; read before any model is loaded, so that a wrong path costs no waiting."""
    if options.token_ids is not None:
        try:
            return [int(each) for each in options.token_ids.replace(",", " ").split()]
        except ValueError:
            raise InputError(f"expected whole numbers, '504 4922', got --token-ids {options.token_ids!r}") from None
    if options.prompt_file not in (None, "-"):
        return read_text(options.prompt_file, "--prompt-file")
    if "-" in (options.prompt, options.prompt_file):
        return standard_input()
    if options.prompt is None:
        return DEFAULT_PROMPT
    if not options.prompt:
        raise InputError("expected a text of at least two tokens, got an empty --prompt")
    return options.prompt


def read_text(file: str, option: str) -> str:
    try:
        with open(Path(file).expanduser(), "rb") as stream:
            payload = stream.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        raise InputError(
            f"cannot read {option} {one_line(file, 200)}: {one_line(error)}; expected a UTF-8 text file"
        ) from error
    return _text(payload, f"{option} {one_line(file, 200)}")


def standard_input() -> str:
    raw = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read(MOST_BYTES) if raw is None else _text(raw.read(MOST_BYTES + 1), "standard input")


def _text(payload: bytes, source: str) -> str:
    if len(payload) > MOST_BYTES:
        raise InputError(f"{source} holds more than {MOST_BYTES >> 20} MiB; expected a prompt: give a shorter text")
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 ({error.reason}); expected a UTF-8 text") from error


def check_figure(path: str | None) -> None:
    """Known before the work: a picture's file that can be written."""
    if path is None:
        return
    target = Path(path)
    if target.suffix not in FIGURE_FILES:
        raise InputError(f"expected a file that ends in one of {', '.join(FIGURE_FILES)}, got --figure {path}")
    check_writable(path)
    check_place(target.parent, target.name)


def check_out(options: argparse.Namespace) -> None:
    if options.out:
        check_writable(options.out)


def deliver(options: argparse.Namespace, result: dict, table: str) -> None:
    if options.out:
        write_atomically(options.out, json.dumps(result, indent=1).encode())
        print(f"wrote {options.out}", file=sys.stderr)
    print(json.dumps(result) if options.json else table)
