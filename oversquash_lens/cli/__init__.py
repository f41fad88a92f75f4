"""The command line: `oversquash-lens report | bound | audit | flow | what-if | sweep | collapse | tasks | …`.

Nothing heavy is imported before a command runs, so `--help` answers at once. Results go to standard output,
progress to standard error; bad input is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from oversquash_lens.cli import lens, paper, sweep, what_if, where
from oversquash_lens.cli.common import DEFAULT_PROMPT
from oversquash_lens.errors import OversquashError, one_line

__all__ = ["DEFAULT_PROMPT", "build_parser", "main"]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all of this package does."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", int, _number(int, "a whole number such as 8"))
        self.register("type", float, _number(float, "a number such as 0.5"))

    def error(self, message: str) -> NoReturn:
        said = one_line(message, 200)
        if "expected" not in said:
            said += "; expected what its help lists"
        print(f"{self.prog}: {said} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _number(kind: type, expected: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {one_line(repr(text), 60)}") from None

    return read


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
    lens.add_commands(commands)
    where.add_commands(commands)
    what_if.add_commands(commands)
    sweep.add_commands(commands)
    paper.add_commands(commands)
    return parser


def _silence_other_peoples_notices() -> None:
    """Deprecation notes of the libraries below us help nobody at a command line; our own stay."""
    import os
    import warnings

    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module=r"oversquash_lens\..*")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
