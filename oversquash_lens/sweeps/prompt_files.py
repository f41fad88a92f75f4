"""The one reader of texts and lists of prompts that the user points at, and a mark that tells two lists apart.

UTF-8, without its byte order mark; one line end at the end of a file or stream is no part of a prompt; lines end at
\\n, \\r\\n or \\r and nowhere else.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oversquash_lens.errors import InputError, one_line

COLUMNS = ("text", "prompt")  # where a table's prompts are looked for, unless a column is named
NAMES = ("name", "id")
MOST_BYTES = 64 << 20  # of a prompt, or of a file of prompts that is text; what has no end must not fill the memory
WITH_COLUMNS = (".csv", ".tsv", ".jsonl", ".parquet")
LINE_END = re.compile(r"\r\n|\n|\r")


@dataclass(frozen=True)
class SweepPrompt:
    """One prompt of many: its place among them, its name if it has one, and a text or token ids as they came."""

    index: int
    name: str | None
    prompt: Any

    @property
    def text(self) -> str | None:
        return self.prompt if isinstance(self.prompt, str) else None


def read_text(file: str | os.PathLike, what: str = "") -> str:
    """A file's text as it stands, less a byte order mark; `what` names it in errors (its path if empty)."""
    named = f"{what} {one_line(file, 200)}".strip()
    try:
        with open(Path(file).expanduser(), "rb") as stream:
            payload = stream.read(MOST_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:  # a path with a NUL byte, of ~nobody
        raise InputError(f"cannot read {named}: {one_line(error)}; expected a UTF-8 text file") from error
    return _decoded(payload, named)


def read_prompt(file: str | os.PathLike, what: str = "") -> str:
    """The prompt that a file holds: its text less one line end at the end. "-" is standard input."""
    return _without_last_end(standard_input() if os.fspath(file) == "-" else read_text(file, what))


def standard_input() -> str:
    """All of standard input as text, less a byte order mark."""
    stream = sys.stdin
    if stream is None or stream.closed:
        raise InputError("expected a prompt on standard input, got none: it is closed; give --prompt or --prompt-file")
    try:
        raw = getattr(stream, "buffer", None)
        payload = stream.read(MOST_BYTES).encode() if raw is None else raw.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read standard input ({one_line(error)}); expected a UTF-8 text") from error
    return _decoded(payload, "standard input")


def lines_of(text: str) -> list[str]:
    """The lines of a text, which end at line ends and at no other separators that Unicode knows.

    >>> lines_of("a\\u2028b\\r\\nc\\n")
    ['a\\u2028b', 'c']
    """
    return LINE_END.split(_without_last_end(text))


def _without_last_end(text: str) -> str:
    for end in ("\r\n", "\n", "\r"):
        if text.endswith(end):
            return text.removesuffix(end)
    return text


def _decoded(payload: bytes, named: str) -> str:
    if len(payload) > MOST_BYTES:
        raise InputError(f"{named} holds more than {MOST_BYTES >> 20} MiB; expected a prompt: give a shorter text")
    try:
        return payload.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{named} is not UTF-8 ({error.reason}); expected a UTF-8 text: convert it, or give another file"
        ) from error


def read_prompts(prompts: Any, column: str | None = None) -> list[SweepPrompt]:
    """Prompts of a list or of a file, in their order; at least one.

    `prompts`: texts, lists of token ids, (name, prompt) pairs, a mapping name -> prompt, or the path of a file: .json
    (a list, or an object of names and prompts), .jsonl (texts, lists of ids or objects), .parquet, .csv or .tsv with
    the columns' names in the first line (`column`, else "text" or "prompt"; names in "name" or "id"), and of any other
    file one prompt a line, empty lines left out.
    What a prompt holds is not looked at here: one that cannot be used is found out when its turn comes.
    """
    if isinstance(prompts, str | os.PathLike):
        path = Path(os.path.expanduser(prompts))
        named = _read_file(path, column)
        if not named:
            raise InputError(f"{one_line(path, 200)} holds no prompt; expected at least one: write some into it")
    else:
        named = _listed(prompts)
        if not named:
            raise InputError("expected texts, token ids or (name, prompt) pairs, got no prompt: give at least one")
    return [SweepPrompt(index, name, prompt) for index, (name, prompt) in enumerate(named)]


def mark_of(prompts: Iterable[SweepPrompt]) -> str:
    """The same for the same prompts with the same names in the same order (SHA-256)."""
    digest = hashlib.sha256()
    for each in prompts:
        digest.update(json.dumps([each.name, _plain(each.prompt)], default=repr).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _plain(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return prompt
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt


Named = list[tuple[str | None, Any]]


def _listed(prompts: Any) -> Named:
    if isinstance(prompts, Mapping):
        return [(str(name), prompt) for name, prompt in prompts.items()]
    if isinstance(prompts, bytes) or not hasattr(prompts, "__iter__"):
        raise InputError(
            "expected a list of texts, token ids or (name, prompt) pairs, or the path of a file, got prompts of "
            f"type {type(prompts).__name__}: put a single prompt into a list"
        )
    return [_pair(each) for each in prompts]


def _pair(each: Any) -> tuple[str | None, Any]:
    named = isinstance(each, tuple | list) and len(each) == 2 and isinstance(each[0], str)
    return (each[0], each[1]) if named else (None, each)


def _read_file(path: Path, column: str | None) -> Named:
    if not os.path.isfile(path):
        raise InputError(
            f"{one_line(path, 200)} is not a file; expected one of prompts, .txt, .csv, .tsv, .json, .jsonl or "
            ".parquet: give its path, or the prompts themselves as a list"
        )
    kind = path.suffix.lower()
    if column is not None and kind not in WITH_COLUMNS:
        raise InputError(
            f"expected a file with columns ({', '.join(WITH_COLUMNS)}), got column={column!r} with {path.name}: leave "
            "it out"
        )
    if kind == ".parquet":
        return _of_parquet(path, column)
    readers: dict[str, Callable[[Path, str, str | None], Named]] = {
        ".json": _of_json,
        ".jsonl": _of_jsonl,
        ".csv": _of_table,
        ".tsv": _of_table,
    }
    return readers.get(kind, _of_lines)(path, read_text(path), column)


def _of_lines(path: Path, text: str, column: str | None) -> Named:
    return [(None, line) for line in lines_of(text) if line.strip()]


def _of_table(path: Path, text: str, column: str | None) -> Named:
    """A table of text; a quoted field may hold line ends."""
    delimiter = "," if path.suffix.lower() == ".csv" else "\t"
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise InputError(
            f"{path.name} is no table ({one_line(error, 120)}); expected the columns' names in the first line and "
            "quotes around texts that hold a separator: mend it, or name the file .txt for one prompt a line"
        ) from error
    return [_of_object(row, column, path.name) for row in rows]


def _of_json(path: Path, text: str, column: str | None) -> Named:
    found = _parsed(text, path.name) if text.strip() else []
    if not isinstance(found, dict | list):
        raise InputError(
            f"{path.name} holds a {type(found).__name__}; expected a list of prompts or an object {{name: prompt}}: "
            "put the prompt into a list"
        )
    return _listed(found)


def _of_jsonl(path: Path, text: str, column: str | None) -> Named:
    found: Named = []
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            where = f"{path.name}, line {number}"
            value = _parsed(line, where)
            found.append(_of_object(value, column, where) if isinstance(value, dict) else _pair(value))
    return found


def _of_object(value: dict, column: str | None, where: str) -> tuple[str | None, Any]:
    key = _chosen(column, value, where)
    name = next((value[each] for each in NAMES if value.get(each) not in (None, "")), None)
    return None if name is None else str(name), value[key]


def _of_parquet(path: Path, column: str | None) -> Named:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        having = file.schema_arrow.names
        key = _chosen(column, having, path.name)
        name = next((each for each in NAMES if each in having), None)
        table = file.read(columns=[key, *([name] if name else [])])
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(
            f"{one_line(path, 200)} is no parquet file ({one_line(error, 120)}); expected a table with a column of "
            "prompts: write it again, or name the file .txt for one prompt a line"
        ) from error
    names = [None if each is None else str(each) for each in table[name].to_pylist()] if name else [None] * len(table)
    return list(zip(names, table[key].to_pylist(), strict=True))


def _chosen(column: str | None, having: Iterable[str], where: str) -> str:
    wanted = COLUMNS if column is None else (column,)
    found = next((each for each in wanted if each in having), None)
    if found is None:
        there = one_line(", ".join(map(str, having)), 80) or "nothing"
        raise InputError(
            f"{where} has {there}, but not {' or '.join(map(repr, wanted))}; expected the prompts there: name their "
            "column with column="
        )
    return found


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where} is no JSON ({one_line(error, 120)}); expected a text in quotes, a list or an object: mend it, or "
            "name the file .txt for one prompt a line"
        ) from error
