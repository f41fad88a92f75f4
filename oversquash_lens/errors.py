"""What can go wrong, by kind. Every message says what came, what was expected and what to do next."""

from __future__ import annotations

import operator
from collections.abc import Iterable
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


def one_of(name: str, came: Any, known: Iterable[str]) -> str:
    """`came`, if it is one of the known names; an InputError that lists them and says which was probably meant.

    >>> one_of("variant", "proof", ("proof", "rollout"))
    'proof'
    """
    names = list(known)
    if isinstance(came, str) and came in names:
        return came
    meant = nearest(came, names) if isinstance(came, str) else None
    said = f"expected one of {', '.join(names)}, got {name} {one_line(repr(came), 60)}"
    raise InputError(said + (f": did you mean {meant}?" if meant else ""))


def nearest(came: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one is closest to, if one is close.

    >>> nearest("prof", ("proof", "rollout")), nearest("x", ("proof",))
    ('proof', None)
    """
    import difflib

    return next(iter(difflib.get_close_matches(came, list(known), n=1)), None)
