"""What can go wrong, by kind. Every message says what came, what was expected and what to do next."""

from __future__ import annotations

import operator
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any


class _Shown(dict[int, str]):
    """How a terminal is shown each character: what would control it, or cannot be seen, by its code point."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        harmless = unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or letter in "\n\u200c\u200d"
        self[code] = letter if harmless else " " if letter in "\t\r" else f"‹U+{code:04X}›"
        return self[code]


_SHOWN = _Shown()  # joiners belong inside emoji and Indic words, and move nothing


def visible(text: object) -> str:
    """Text that controls no terminal: every control character but the line end is shown by its code point.

    >>> visible("a\\x1b[2Jb\\n"), visible("a\\u202eb")
    ('a‹U+001B›[2Jb\\n', 'a‹U+202E›b')
    """
    said = str(text)
    return said if said.isprintable() else said.translate(_SHOWN)


class OversquashError(Exception):
    """Base of everything this package raises on purpose; the command line turns it into exit code 2."""

    def __str__(self) -> str:
        """One line, with nothing in it that controls a terminal, whatever file, name or path it speaks of."""
        return visible(super().__str__()).replace("\n", " ")


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
    line = visible(" ".join(str(text).split()))
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


def is_conversation(prompt: Any) -> bool:
    """Whether this is meant as a list of messages, [{"role": …, "content": …}, …]."""
    return isinstance(prompt, list | tuple) and bool(prompt) and all(isinstance(each, Mapping) for each in prompt)


def nearest(came: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one is closest to, if one is close.

    >>> nearest("prof", ("proof", "rollout")), nearest("x", ("proof",))
    ('proof', None)
    """
    import difflib

    return next(iter(difflib.get_close_matches(came, list(known), n=1)), None)
