"""What can go wrong, by kind. Every message says what came, what was expected and what to do next."""

from __future__ import annotations

import operator
from typing import Any


class OversquashError(Exception):
    """Base of everything this package raises on purpose; the command line turns it into exit code 2."""


class InputError(OversquashError, ValueError):
    """An argument, prompt, file or name that cannot be used as it came."""


class ModelError(OversquashError):
    """A model that cannot be found, loaded or described by the measures."""


class HookMismatchError(OversquashError):
    """What was recorded does not describe the model: a hook that did not fire, a row that does not sum to 1, …"""


class TraceFileError(OversquashError):
    """A trace file that is damaged, half-written or of another format version."""


def one_line(text: object, limit: int = 300) -> str:
    """Collapse another library's multi-line message to one line of at most `limit` characters.

    >>> one_line("first\\n   second")
    'first second'
    """
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def whole_number(name: str, came: Any, least: int = 1, otherwise: str = "") -> int:
    """`came` as a whole number of at least `least`; an InputError for all else, also for True and False.

    >>> whole_number("probes", 3)
    3
    """
    try:
        found = least - 1 if isinstance(came, bool) else operator.index(came)
    except TypeError:
        found = least - 1
    if found < least:
        shown = one_line(repr(came), 60)
        raise InputError(f"expected at least {least}{otherwise}, as a whole number, got {name}={shown}")
    return found
