"""A long run's results, one JSON line each, kept as they come, so that a killed run goes on where it stopped.

Every line says under which settings it was made and carries its key and its value:

    {"settings": {"model": …}, "key": ["reply", "ones", …], "value": {"text": …}}

What is promised: a line that `append` has returned from is on the disk; a line half-written by a crash is cut off and
made again; no key is there twice; two runs never write into one file at once; results made under other settings are
never mixed with these.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from oversquash_lens.errors import InputError, OversquashError, one_line
from oversquash_lens.storage import check_writable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Key = tuple[str | int, ...]
_BEGINNING = b'{"settings": '  # of every line


class AnswerFile:
    """The results at `path`, made under `settings`; use it as a context, which holds the file's lock.

    `answers` maps key to value and starts with what is there. `path` None keeps results in memory alone.
    """

    def __init__(self, path: str | os.PathLike | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else check_writable(path)
        self.settings = json.loads(json.dumps(dict(settings)))
        self.answers: dict[Key, Any] = {}
        self._open = ExitStack()
        self._file: Any = None

    def __enter__(self) -> AnswerFile:
        if self.path is not None:
            with ExitStack() as opening:
                self._file = opening.enter_context(_opened(self.path))
                self._read()
                self._open = opening.pop_all()
        return self

    def __exit__(self, *trouble: object) -> None:
        self._file = None
        self._open.close()

    def append(self, results: Sequence[tuple[Key, Any]]) -> None:
        """Add (key, value) pairs and return when they are on the disk: all of them, or an error and none."""
        keys = {key for key, _ in results}
        assert len(keys) == len(results), f"answered twice: {keys}"
        assert not keys & set(self.answers), f"answered twice: {keys & set(self.answers)}"
        if self._file is not None:
            self._write(b"".join(self._line(key, value) for key, value in results))
        self.answers |= dict(results)

    def _line(self, key: Key, value: Any) -> bytes:
        line = {"settings": self.settings, "key": list(key), "value": value}
        return json.dumps(line, ensure_ascii=True, allow_nan=False).encode() + b"\n"

    def _write(self, lines: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):  # a half-written line that stays is cut off when the run is resumed
                self._file.truncate(end)
            raise OversquashError(
                f"{self.path} could not be written ({error.strerror or error}); the {len(self.answers)} results in it "
                "so far are safe: make room and run the same again, it goes on where it stopped"
            ) from error

    def _read(self) -> None:
        content = self._file.read()
        end = 0
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            last = end + len(line) == len(content)
            try:
                made_under, key, value = _parsed(line)
            except ValueError as error:
                if last and _torn(line):
                    break
                raise InputError(
                    f"{self.path}, line {number} is damaged ({one_line(error, 80)}); expected one JSON object a "
                    "line: mend or delete that line, or give another file"
                ) from error
            self._check(number, made_under, key)
            self.answers[key] = value
            end += len(line)
        if end < len(content):
            self._file.truncate(end)

    def _check(self, number: int, made_under: Any, key: Key) -> None:
        if made_under != self.settings:
            there = one_line(_differing(made_under, self.settings), 90)
            asked = one_line(_differing(self.settings, made_under), 90)
            raise InputError(
                f"{self.path} holds results of {there}, these are of {asked}; expected the same settings: give another "
                "file, or run with the old settings"
            )
        if key in self.answers:
            raise InputError(
                f"{self.path}, line {number} repeats the key {list(key)}; expected every key once: delete one of the "
                "two lines"
            )


def _parsed(line: bytes) -> tuple[Any, Key, Any]:
    if not line.endswith(b"\n"):
        raise ValueError("it is cut off")
    found = json.loads(line)
    if not isinstance(found, dict) or set(found) != {"settings", "key", "value"} or not isinstance(found["key"], list):
        raise ValueError("it has no settings, key and value")
    return found["settings"], tuple(found["key"]), found["value"]


def _differing(these: Any, others: Any) -> str:
    """What of `these` settings is not so in the `others`."""
    if not isinstance(these, dict) or not isinstance(others, dict):
        return repr(these)
    different = {name: value for name, value in these.items() if name not in others or others[name] != value}
    return ", ".join(f"{name}={value!r}" for name, value in different.items()) or "fewer settings"


def _torn(line: bytes) -> bool:
    """Whether this is the beginning of one of our lines (or the zeros that a crash leaves), not somebody's notes."""
    return line.startswith(_BEGINNING) or _BEGINNING.startswith(line) or not line.strip(b"\0\n")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, unbuffered and at its start, while nobody else runs into it."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a device or a pipe; expected a file that can be read again: give another one")
    try:
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise InputError(
            f"{path} could not be opened ({error.strerror}); mend the rights there, or give another file: one to read "
            "and to write is expected"
        ) from error
    with file, _locked(file, path):
        file.seek(0)
        yield file


@contextmanager
def _locked(file: Any, path: Path) -> Iterator[None]:
    """The system's lock, which goes with the process however that ends; where there is none, a lock file beside."""
    with nullcontext() if _system_lock(file, path) else _lock_file(path):
        yield


def _system_lock(file: Any, path: Path) -> bool:
    """Whether the file is locked now, until it is closed; False where the system or the drive has no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"another run is writing into {path}; expected one at a time: wait for it, or give another file"
        ) from error
    except OSError:
        return False
    return True


@contextmanager
def _lock_file(path: Path) -> Iterator[None]:
    lock = path.with_name(f"{path.name}.lock")
    try:
        lock.open("x").close()
    except FileExistsError as error:
        raise InputError(
            f"another run is writing into {path}, or was killed: {lock} is there; expected one at a time: wait, or "
            "delete the lock file if no such run is left"
        ) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
