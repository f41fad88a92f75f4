"""The command that changes the prompt or the attention and measures again: `what-if`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from oversquash_lens.cli.common import (
    check_out,
    deliver,
    load,
    prompt_command,
    prompt_of,
    recording_options,
    verify_option,
)
from oversquash_lens.errors import InputError, one_line
from oversquash_lens.paths.kinds import VARIANTS

FORMS = (
    "window:WIDTH, window:WIDTH:keep-first, ablate:LAYER.HEAD, mask:POSITION, sharpen:POWER, separators:EVERY, "
    "separators:EVERY:TEXT, with-bos, without-bos"
)


def add_commands(commands: Any) -> None:
    command = prompt_command(commands, "what-if", run_what_if, "measure again under edits of prompt or attention")
    command.add_argument("--edit", action="append", required=True, metavar="EDIT", help=f"repeatable; one of {FORMS}")
    command.add_argument("--variant", default="proof", help=f"the bound beside: {', '.join(VARIANTS)}")
    command.add_argument("--probes", type=int, default=16, metavar="K", help="backward probes (default 16)")
    command.add_argument("--exact", action="store_true", help="exact truth, d_model backward products each")
    command.add_argument("--out", metavar="FILE", help="write the result as JSON")
    verify_option(command)


def run_what_if(options: argparse.Namespace) -> None:
    check_out(options)
    prompt = prompt_of(options)
    edits = [edit_of(text) for text in options.edit]
    from oversquash_lens.analyses.what_if import what_if

    result = what_if(
        load(options),
        prompt,
        *edits,
        variant=options.variant,
        probes=None if options.exact else options.probes,
        progress=True,
        **recording_options(options),
    )
    deliver(options, result.to_dict(), str(result))


def edit_of(text: str) -> Any:
    """The edit that `--edit` means: a name, and behind colons what it needs."""
    from oversquash_lens.capture import edits

    def window(width: str, keep: str = "") -> Any:
        if keep not in ("", "keep-first"):
            raise ValueError(keep)
        return edits.window(int(width), keep_first=bool(keep))

    def ablate(head: str) -> Any:
        layer, _, number = head.partition(".")
        return edits.ablate_head(int(layer), int(number))

    known: dict[str, Callable] = {
        "window": window,
        "ablate": ablate,
        "mask": lambda position: edits.mask_position(int(position)),
        "sharpen": lambda power: edits.sharpen(float(power)),
        "separators": lambda every, text=",": edits.separators(int(every), text),
        "with-bos": edits.with_bos,
        "without-bos": edits.without_bos,
    }
    name, *arguments = text.split(":", 2)
    try:
        return known[name](*arguments)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError):
        raise InputError(f"expected one of {FORMS}, got --edit {one_line(repr(text), 60)}") from None
