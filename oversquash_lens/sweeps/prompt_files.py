"""The one reader of texts and lists of prompts that the user points at, and a mark that tells two lists apart.

UTF-8, or UTF-16 and UTF-32 with a byte order mark, which is no part of the text; nor is one line end at the end of a
file or stream part of a prompt; lines end at \\n, \\r\\n or \\r and nowhere else.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oversquash_lens.errors import InputError, is_conversation, one_line

COLUMNS = ("text", "prompt", "messages")  # where a table's prompts are looked for, unless a column is named
NAMES = ("name", "id")
MOST_BYTES = 64 << 20  # of a prompt, or of a file of prompts that is text; what has no end must not fill the memory
MOST_TABLE = 1 << 30  # of a parquet file's prompts as they are read: a small file may unfold into any size
BATCH = 256  # rows of it at a time
WITH_COLUMNS = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson", ".parquet")
LINE_END = re.compile(r"\r\n|\n|\r")
MARKS = {  # the longer ones first: UTF-32's begins like UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class SweepPrompt:
    """One prompt of many: its place among them, its name if it has one, and a text, messages or ids as they came."""

    index: int
    name: str | None
    prompt: Any

    @property
    def text(self) -> str | None:
        return self.prompt if isinstance(self.prompt, str) else None

    def options(self, chat: bool, bos: bool | None) -> dict[str, Any]:
        """What of these a prompt of its form takes: token ids carry their special tokens, messages their template."""
        written = self.text is not None
        return {"chat": chat and written, "bos": bos if written or is_conversation(self.prompt) else None}


def read_text(file: str | os.PathLike, what: str = "") -> str:
    """A file's text as it stands, less a byte order mark; `what` names it in errors (its path if empty)."""
    named = f"{what} {one_line(file, 200)}".strip()
    try:
        with open(Path(file).expanduser(), "rb") as stream:
            payload = stream.read(MOST_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:  # a path with a NUL byte, of ~nobody
        raise InputError(f"cannot read {named}: {one_line(error)}; expected a UTF-8 text file") from error
    return _decoded(payload, named)


def read_prompt(file: str | os.PathLike, what: str = "") -> Any:
    """The prompt that a file holds: its text less one line end at the end. "-" is standard input.

    Of a table, and of .json, the one prompt that is in it; several are refused.
    """
    if os.fspath(file) == "-":
        return _without_last_end(standard_input())
    if Path(file).suffix.lower() not in (*WITH_COLUMNS, ".json"):
        return _without_last_end(read_text(file, what))
    found = read_prompts(file)
    if len(found) > 1:
        raise InputError(
            f"{what} {one_line(file, 160)} holds {len(found)} prompts; expected one: give it as --prompts-file to "
            "`report` or `sweep`, or name it .txt to measure its text as it stands"
        )
    return found[0].prompt


def messages_in(text: str) -> list[dict[str, Any]] | None:
    """The messages that a text is, where it is a JSON list of objects with nothing but "role" and "content"."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if is_conversation(found) and all(set(each) == {"role", "content"} for each in found) else None


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
    coding = next((coding for mark, coding in MARKS.items() if payload.startswith(mark)), "utf-8-sig")
    try:
        text = payload.decode(coding)
        if "\0" in text:  # UTF-16 without its mark, or no text at all
            raise UnicodeDecodeError(coding, payload, 0, 1, "it holds NUL characters")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{named} is not UTF-8 ({error.reason}); expected a UTF-8 text: convert it, or give another file"
        ) from error
    return text


def read_prompts(prompts: Any, column: str | None = None) -> list[SweepPrompt]:
    """Prompts of a list, a table or a file, in their order; at least one.

    `prompts`: texts, lists of messages or of token ids, (name, prompt) pairs, objects or a table (of pandas, polars,
    Arrow, datasets) with a column of prompts, a mapping name -> prompt, or the path of a file: .json (a list, or an
    object of names and prompts), .jsonl (texts, messages, ids or objects), .parquet, .csv or .tsv with the columns'
    names in the first line; of any other file, and of standard input ("-"), one prompt a line, empty lines left out.
    Of columns it is `column`, else the first of "text", "prompt", "messages"; names lie in "name" or "id". What a
    prompt holds is not looked at here: one that cannot be used is found out when its turn comes.
    """
    if isinstance(prompts, list) and prompts and all(isinstance(each, SweepPrompt) for each in prompts):
        return prompts
    if isinstance(prompts, str | os.PathLike):
        path = Path(os.path.expanduser(prompts))
        named = _read_file(path, column)
        if not named:
            raise InputError(f"{one_line(path, 200)} holds no prompt; expected at least one: write some into it")
    else:
        named = _listed(prompts, column)
        if not named:
            raise InputError("expected texts, token ids or (name, prompt) pairs, got no prompt: give at least one")
    return [SweepPrompt(index, name, prompt) for index, (name, prompt) in enumerate(named)]


def mark_of(prompts: Iterable[SweepPrompt]) -> str:
    """The same for the same prompts with the same names in the same order (SHA-256)."""
    digest = hashlib.sha256()
    for each in prompts:
        try:
            digest.update(json.dumps([each.name, _plain(each.prompt)], default=repr).encode())
        except (RecursionError, ValueError, TypeError) as error:  # nested too deep, or in itself
            raise InputError(
                f"prompt {each.index} is no prompt ({one_line(error, 60)}); expected a text, messages or token ids: "
                "take it out"
            ) from error
        digest.update(b"\n")
    return digest.hexdigest()


def _plain(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return prompt
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt


Named = list[tuple[str | None, Any]]


def _listed(prompts: Any, column: str | None, where: str = "the list of prompts") -> Named:
    having = getattr(prompts, "column_names", None) or getattr(prompts, "columns", None)
    if having is not None and not isinstance(prompts, Mapping):
        return _of_columns(prompts, list(map(str, having)), column)
    if isinstance(prompts, bytes) or not hasattr(prompts, "__iter__"):
        raise InputError(
            "expected a list of texts, token ids or (name, prompt) pairs, or the path of a file, got prompts of "
            f"type {type(prompts).__name__}: put a single prompt into a list"
        )
    if isinstance(prompts, Mapping):
        found: Named = [(str(name), prompt) for name, prompt in prompts.items()]
    else:
        prompts = list(prompts)
        if is_conversation(prompts) and all("role" in each for each in prompts):
            prompts = [prompts]  # one conversation
        objects = [isinstance(each, Mapping) for each in prompts]
        if column is None or any(objects):
            return [
                _of_object(each, column, f"{where}, at {i}") if is_object else _pair(each)
                for i, (each, is_object) in enumerate(zip(prompts, objects, strict=True))
            ]
        found = [(None, each) for each in prompts]
    if column is not None:
        raise InputError(
            f"expected a table or objects, got column={column!r} with {where}, which has no columns: leave it out"
        )
    return found


def _of_columns(table: Any, having: Sequence[str], column: str | None) -> Named:
    """The rows of a table in memory, whichever library made it."""
    key = _chosen(column, having, f"the {type(table).__name__}")
    name = next((each for each in NAMES if each in having and each != key), None)

    def values(which: str) -> list[Any]:
        held = table[which]
        kind = next((each for each in ("to_pylist", "to_list", "tolist") if hasattr(held, each)), None)
        return list(held) if kind is None else getattr(held, kind)()

    prompts = values(key)
    names = [None if each is None else str(each) for each in values(name)] if name else [None] * len(prompts)
    return list(zip(names, prompts, strict=True))


def _pair(each: Any) -> tuple[str | None, Any]:
    named = isinstance(each, tuple | list) and len(each) == 2 and isinstance(each[0], str)
    return (each[0], each[1]) if named else (None, each)


def _read_file(path: Path, column: str | None) -> Named:
    kind = path.suffix.lower()
    if column is not None and kind not in WITH_COLUMNS:
        raise InputError(
            f"expected a file with columns ({', '.join(WITH_COLUMNS)}), got column={column!r} with {path.name}: leave "
            "it out"
        )
    if os.fspath(path) == "-":
        return _of_lines(path, standard_input(), None)
    if not os.path.isfile(path):
        raise InputError(
            f"{one_line(path, 200)} is not a file; expected one of prompts, .txt, .csv, .tsv, .json, .jsonl or "
            ".parquet: give its path, or the prompts themselves as a list"
        )
    if kind == ".parquet":
        return _of_parquet(path, column)
    readers: dict[str, Callable[[Path, str, str | None], Named]] = {
        ".json": _of_json,
        **dict.fromkeys((".jsonl", ".ndjson"), _of_jsonl),
        **dict.fromkeys((".csv", ".tsv", ".tab"), _of_table),
    }
    return readers.get(kind, _of_lines)(path, read_text(path), column)


def _of_lines(path: Path, text: str, column: str | None) -> Named:
    return [(None, line) for line in lines_of(text) if line.strip()]


def _of_table(path: Path, text: str, column: str | None) -> Named:
    """A table of text; a quoted field may hold line ends."""
    delimiter = "," if path.suffix.lower() == ".csv" else "\t"
    usual = csv.field_size_limit(MOST_BYTES)  # a long prompt is no mistake
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows, having = list(reader), list(reader.fieldnames or ())
    except csv.Error as error:
        raise InputError(
            f"{path.name} is no table ({one_line(error, 120)}); expected the columns' names in the first line and "
            "quotes around texts that hold a separator: mend it, or name the file .txt for one prompt a line"
        ) from error
    finally:
        csv.field_size_limit(usual)
    key = _chosen(column, having, path.name) if rows else column
    return [_of_object(row, key, path.name) for row in rows]


def _of_json(path: Path, text: str, column: str | None) -> Named:
    found = _parsed(text, path.name) if text.strip() else []
    if not isinstance(found, dict | list):
        raise InputError(
            f"{path.name} holds a {type(found).__name__}; expected a list of prompts or an object {{name: prompt}}: "
            "put the prompt into a list"
        )
    return _listed(found, None, path.name)


def _of_jsonl(path: Path, text: str, column: str | None) -> Named:
    found: Named = []
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            where = f"{path.name}, line {number}"
            value = _parsed(line, where)
            found.append(_of_object(value, column, where) if isinstance(value, dict) else _pair(value))
    return found


def _of_object(value: Mapping, column: str | None, where: str) -> tuple[str | None, Any]:
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
        wanted, size = [key, *(each for each in NAMES if each in having and each != key)], 0
        found: Named = []
        for batch in file.iter_batches(batch_size=BATCH, columns=wanted):
            rows = _of_columns(pyarrow.Table.from_batches([batch]), wanted, key)
            size += max(batch.nbytes, sum(len(prompt) for _, prompt in rows if isinstance(prompt, str | list)))
            if size > MOST_TABLE:
                raise ValueError(f"its prompts are more than {MOST_TABLE >> 30} GiB")
            found += rows
        return found
    except InputError:
        raise
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:  # ValueError: a text that is no UTF-8
        raise InputError(
            f"{one_line(path, 200)} is no parquet file ({one_line(error, 120)}); expected a table with a column of "
            "prompts: write it again, or name the file .txt for one prompt a line"
        ) from error


def _chosen(column: str | None, having: Iterable[Any], where: str) -> str:
    wanted, there = COLUMNS if column is None else (column,), list(having)
    found = next((each for each in wanted if each in there), None)
    if found is None or there.count(found) > 1:
        said = one_line(", ".join(map(str, there)), 80) or "nothing"
        raise InputError(
            f"{where} has {said}, but not one {' or '.join(map(repr, wanted))}; expected the prompts there: name their "
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
