"""The command line: `oversquash-lens report | bound | audit | flow | what-if | sweep | collapse | tasks | …`.

Nothing heavy is imported before a command runs, so `--help` answers at once. Results go to standard output,
progress to standard error; bad input is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn

from oversquash_lens.cli import finite_effects, many_prompts, one_prompt, paper
from oversquash_lens.cli.common import DEFAULT_PROMPT
from oversquash_lens.errors import InputError, OversquashError, nearest, one_line, visible
from oversquash_lens.storage import check_working_folder

__all__ = ["DEFAULT_PROMPT", "build_parser", "main"]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all of this package does, and what was probably meant."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", int, _number(int, "a whole number such as 8"))
        self.register("type", float, _number(float, "a number such as 0.5"))

    def error(self, message: str) -> NoReturn:
        said = one_line(message, 200)
        if "expected" not in said:
            said += "; expected what its help lists"
        if meant := self._meant(message):
            said += f": did you mean {meant}?"
        print(f"{self.prog}: {said} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse would let go of help that cannot be written, and exit with 0."""
        (file or sys.stderr).write(message)

    def _meant(self, message: str) -> str | None:
        """The command or option that a misspelt one is closest to."""
        if found := re.search(r"invalid choice: '([^']*)'", message):
            return nearest(found[1], self.commands())
        if found := re.search(r"unrecognized arguments: (--[^\s=]+)", message):
            return nearest(found[1], self._option_string_actions)
        return None

    def commands(self) -> dict[str, _Parser]:
        subparsers = [each for each in self._actions if isinstance(each, argparse._SubParsersAction)]
        return subparsers[0].choices if subparsers else {}


class _Version(argparse.Action):
    """Looked up only where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"oversquash-lens {version('oversquash-lens')}")
        except PackageNotFoundError:  # run from its sources
            print("oversquash-lens, not installed")
        parser.exit()


def _number(kind: type, expected: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {one_line(repr(text), 60)}") from None

    return read


class _Shown:
    """A stream whose text controls no terminal. `lossy`: what cannot be written is let go, as notes on progress are."""

    def __init__(self, stream: Any, *, lossy: bool) -> None:
        self._stream, self._lossy = stream, lossy

    def write(self, text: str) -> int:
        if self._lossy and not text.strip("\r\n\x1b[A"):  # a progress bar that moves between lines
            shown = text
        else:
            shown = "\r".join(map(visible, text.split("\r"))) if self._lossy else visible(text)
        try:
            self._stream.write(shown)
        except (OSError, ValueError):
            if not self._lossy:
                raise
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            if not self._lossy:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _streams() -> Iterator[None]:
    """Standard output and error as a command writes to them; as they were afterwards."""
    before = sys.stdout, sys.stderr
    with ExitStack() as stack:
        for stream in before:
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal without ρ shows a question mark, not a traceback
        # Where there is none, print(file=None) would write notes into the results.
        error = sys.stderr or stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        sys.stderr = _Shown(error, lossy=True)
        sys.stdout = None if sys.stdout is None else _Shown(sys.stdout, lossy=False)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    with _streams():
        return _run(arguments)


def _run(arguments: list[str] | None) -> int:
    try:
        if sys.stdout is None or getattr(sys.stdout, "closed", False):
            raise InputError("standard output is closed; expected one for the result: give > FILE, or /dev/null")
        try:
            options = _parsed(arguments)
        finally:
            sys.stdout.flush()  # of --help and --version
        check_working_folder()
        _silence_other_peoples_notices()
        options.run(options)
        sys.stdout.flush()  # a full disk behind `> FILE` is said now, and not when Python ends
    except OversquashError as error:
        print(f"oversquash-lens: {one_line(error, 2000)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        _let_go_of_output()
        return 0
    except KeyboardInterrupt:
        print("oversquash-lens: interrupted; nothing half-written was left behind", file=sys.stderr)
        return 130
    except OSError as error:
        _let_go_of_output()
        print(
            f"oversquash-lens: the system refused ({one_line(error, 200)}); expected room and rights for the result: "
            "mend that, or write it elsewhere",
            file=sys.stderr,
        )
        return 2
    return 0


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    options, left = parser.parse_known_args(arguments)
    if left:  # said by the command's own parser, which knows what was probably meant
        parser.commands()[options.command].error(f"unrecognized arguments: {' '.join(left)}")
    return options


def build_parser() -> _Parser:
    parser = _Parser(
        prog="oversquash-lens",
        description="What of its prompt can a Transformer's last token still hear?",
        epilog="Without --model: SmolLM2-135M-Instruct, downloaded once. Without a prompt: a short story.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    many_prompts.add_report(commands)
    one_prompt.add_commands(commands)
    finite_effects.add_commands(commands)
    many_prompts.add_sweep(commands)
    paper.add_commands(commands)
    models = commands.add_parser("models", help="which models are cached, and where")
    models.add_argument("--json", action="store_true", help="print JSON")
    models.set_defaults(run=run_models)
    return parser


def run_models(options: argparse.Namespace) -> None:
    from oversquash_lens.models.default_model import cache_folder, cached_models

    found = cached_models()
    if options.json:
        rows = [{**vars(model), "path": str(model.path)} for model in found]
        print(json.dumps({"cache": str(cache_folder()), "models": rows}))
        return
    print(f"cache: {cache_folder()}")
    for model in found:
        print(f"{model.name}  {model.label}  {model.state}  {model.bytes / 1e6:.1f} MB  {model.path}")


def _let_go_of_output() -> None:
    """What could not be written is not tried again when Python ends."""
    with suppress(OSError, ValueError, AttributeError):  # no file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _silence_other_peoples_notices() -> None:
    """Deprecation notes of the libraries below us help nobody at a command line; our own stay."""
    import warnings

    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module=r"oversquash_lens\..*")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
