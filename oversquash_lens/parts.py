"""Results of long runs, kept part by part until they are one file: a killed run goes on where it stopped.

`Parts` keeps the rows of a run in small parquet files, each of them whole or absent. What is promised: a row that `add`
has returned from is on the disk; no row is there twice; two runs never write for one file at once; rows made under
other settings are never mixed with these; what is read is what was written (`storage.sealed`).
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from oversquash_lens import storage
from oversquash_lens.errors import InputError, one_line
from oversquash_lens.storage import check_writable, opened, remove_drafts, sealed, write_atomically

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

WINDOW = 256  # rows that are held at once while parts become one file
KEY = b"oversquash-lens-run"  # where a parquet file says which run it belongs to
RECORDED = "recorded"  # what a run says of itself that may differ when it goes on
Key = tuple[str | int, ...]
Row = Mapping[str, Any]


def arrow_schema(columns: Mapping[str, str], identity: Mapping[str, Any] | None = None) -> Any:
    """The parquet schema of rows with these columns; `identity`, which run they are of, lies in its metadata.

    Types: "number" (float64), "count" (int64), "word", "bytes", "row" (of float64), "ids" (of int64), "words".
    """
    import pyarrow as pa

    types = {
        "number": pa.float64(),
        "count": pa.int64(),
        "word": pa.string(),
        "bytes": pa.binary(),
        "row": pa.list_(pa.float64()),
        "ids": pa.list_(pa.int64()),
        "words": pa.list_(pa.string()),
    }
    fields = [pa.field(name, types[kind]) for name, kind in columns.items()]
    return pa.schema(fields, metadata={KEY: json.dumps(identity, sort_keys=True)} if identity else None)


def identity_of(path: Path) -> dict[str, Any] | None:
    """The run that a file of rows belongs to; None if it is no such file, or a damaged one."""
    import pyarrow

    try:
        return _identity(opened(path))
    except (OSError, ValueError, pyarrow.ArrowException):
        return None


def _identity(file: Any) -> dict[str, Any] | None:
    try:
        found = json.loads((file.schema_arrow.metadata or {})[KEY])
    except (KeyError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_rows(path: Path, columns: Sequence[str] | None = None, *, schema: Any = None) -> Any:
    """Rows of a finished file, or some of their columns, as Arrow has them; an InputError where it is damaged.

    `schema`: what the file must hold.
    """
    import pyarrow

    try:
        file = opened(path)
        if schema is not None and not file.schema_arrow.equals(schema):
            raise ValueError("it has other columns")
        return file.read(columns=None if columns is None else list(columns))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise InputError(
            f"{one_line(path, 200)} is damaged ({one_line(error, 80)}); expected what the run wrote: delete it and run "
            "the same again"
        ) from error


def check_results_file(out: Any) -> Path:
    """The absolute path, if rows can be kept there or are there already; asked before long work."""
    path = check_writable(out)
    if path.suffix.lower() in (".json", ".jsonl"):
        raise InputError(
            f"expected a name that ends in .parquet for results that are kept, got {one_line(path, 200)}: give "
            f"{path.stem}.parquet (what an earlier version kept as JSON lines is not read any more: it is made again)"
        )
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a device or a pipe; expected a file that can be read again: give another one")
    if path.exists() and identity_of(path) is None:
        raise InputError(
            f"{one_line(path, 200)} is there and holds no results that this version keeps, or is damaged; expected a "
            "new path, or that of the same run: give another one"
        )
    return path


class Parts:
    """The rows of one run: in small files of the folder `<out>.parts` while it goes on, at the end in the file `out`.

    `identity`: what the rows depend on, as JSON; floats are compared exactly, but {"values": …, "tolerance": …} within
    the tolerance (absolute); what is under "recorded" is kept and not compared. `columns`: name and type (as in
    `arrow_schema`) of each column; the first tells the rows apart. Use it as a context, which holds the run's lock.
    """

    def __init__(self, out: Any, identity: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        self.out = check_results_file(out)
        self.identity = json.loads(json.dumps(identity))
        self.folder = self.out.with_name(f"{self.out.name}.parts")
        self._schema, self._key = arrow_schema(columns, self.identity), next(iter(columns))
        self._where: dict[Any, Path] = {}
        self._ours: set[Path] = set()  # what was read or written here: nothing else is ever taken away
        self._open = ExitStack()

    def __enter__(self) -> Parts:
        with ExitStack() as opening:
            opening.enter_context(_only_run(self.out))
            self._look()
            self._open = opening.pop_all()
        return self

    def __exit__(self, *trouble: object) -> None:
        self._open.close()

    @property
    def keys(self) -> list[Any]:
        """The first column's values of all rows that are there, in the order in which they came."""
        return list(self._where)

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows that are there, in the order in which they came."""
        for at in range(0, len(self._where), WINDOW):
            yield from self._table(self.keys[at : at + WINDOW]).to_pylist()

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows, on the disk when this returns: all of them, or an error and none."""
        import pyarrow as pa

        if not rows:
            return
        keys = [row[self._key] for row in rows]
        doubled = [key for key in keys if key in self._where or keys.count(key) > 1]
        assert not doubled, f"there already: {doubled}"
        table = pa.Table.from_pylist(list(rows), schema=self._schema)
        path = self.folder / f"{time.time_ns():020d}-{uuid4().hex}.parquet"  # names in the order of time
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            if not (self.folder / "run.json").exists():
                storage.replace_file(self.folder / "run.json", json.dumps(self.identity, indent=1).encode())
            storage.replace_file(path, _parquet([table], self._schema))
        except OSError as error:
            raise InputError(
                f"{self.out} could not be written ({error.strerror or error}); expected room and rights for it there: "
                f"the {len(self._where)} results so far are safe: make room and run the same again, it goes on where "
                "it stopped"
            ) from error
        self._where |= dict.fromkeys(keys, path)
        self._ours.add(path)

    def finish(self, keys: Sequence[Any] | None = None) -> None:
        """Put the rows of these keys (None: all), in this order, into the one file, and take the parts away."""
        wanted = self.keys if keys is None else keys
        if any(self._where.get(key) != self.out for key in wanted):
            tables = (self._table(wanted[at : at + WINDOW]) for at in range(0, len(wanted), WINDOW))
            write_atomically(self.out, _parquet(tables, self._schema))
        with suppress(OSError):  # the folder stays where somebody else has put something into it
            for path in (*(self._ours - {self.out}), self.folder / "run.json"):
                path.unlink(missing_ok=True)
            remove_drafts(self.folder)
            self.folder.rmdir()
        self._where = dict.fromkeys(wanted, self.out)

    def _look(self) -> None:
        """What is there of this run; InputError for what is there of another one."""
        if self.out.exists():
            self._take(self.out)
        run = self.folder / "run.json"
        if run.exists():
            self._check_same(_read_json(run), self.folder)
        elif left := [each.name for each in self.folder.glob("*") if not each.name.startswith(".")]:
            raise InputError(
                f"the folder {one_line(self.folder, 200)} holds {one_line(left[0], 60)} and no run.json; expected the "
                "parts of this run: move it away, or give another file"
            )
        for path in sorted(self.folder.glob("*.parquet")):
            self._take(path)

    def _take(self, path: Path) -> None:
        for key in self._read(path, [self._key])[self._key].to_pylist():
            self._where.setdefault(key, path)
        self._ours.add(path)

    def _table(self, wanted: Sequence[Any]) -> Any:
        """The rows of these keys, each once, in their order; InputError if one is not there any more."""
        import pyarrow as pa

        paths = [path for path in dict.fromkeys(self._where.get(key) for key in wanted) if path and path.exists()]
        tables = [self._read(path) for path in paths]
        table = pa.concat_tables(tables) if tables else self._schema.empty_table()
        place = {key: row for row, key in enumerate(table[self._key].to_pylist())}
        if missing := [key for key in wanted if key not in place]:
            raise InputError(
                f"the row {one_line(repr(missing[0]), 60)} is gone from {one_line(self.folder, 200)}; expected every "
                "part there until the run is over: run it again, it makes what is missing"
            )
        return table.take([place[key] for key in wanted])

    def _read(self, path: Path, columns: list[str] | None = None) -> Any:
        import pyarrow

        try:
            file = opened(path)
            self._check_same(_identity(file), path)
            if not file.schema_arrow.equals(self._schema):
                raise ValueError("it has other columns")
            return file.read(columns=columns)
        except InputError:
            raise
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise InputError(
                f"the part {one_line(path, 200)} is damaged or somebody else's ({one_line(error, 80)}); expected what "
                "the run wrote: delete it or move it away, what it held is then made again"
            ) from error

    def _check_same(self, theirs: dict[str, Any] | None, where: Path) -> None:
        if theirs is None:
            raise InputError(
                f"the part {one_line(where, 200)} is damaged or somebody else's; expected what the run wrote: delete "
                "it or move it away, what it held is then made again"
            )
        if differing := differences(theirs, self.identity):
            said = ", ".join(f"{name}: {there} there, {now} now" for name, (there, now) in differing.items())
            raise InputError(
                f"{one_line(where, 160)} belongs to another run ({one_line(said, 300)}); expected the same model, "
                "prompts, options and settings: give another file, or delete it"
            )


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """What of two identities differs, by name: as text in the one and in the other.

    >>> differences({"model": {"dtype": "float32"}, "seed": 0}, {"model": {"dtype": "float64"}, "seed": 0})
    {'model.dtype': ("'float32'", "'float64'")}
    """
    found: dict[str, tuple[str, str]] = {}
    for name in dict.fromkeys((*ours, *theirs)):
        there, now = theirs.get(name), ours.get(name)
        if name == RECORDED or there == now or _within_tolerance(there, now):
            continue
        if isinstance(there, dict) and isinstance(now, dict) and "tolerance" not in now:
            found |= {f"{name}.{inner}": said for inner, said in differences(there, now).items()}
        elif isinstance(there, dict) and isinstance(now, dict):
            found[name] = ("other numbers", "these")
        else:
            absent = [name not in each for each in (theirs, ours)]
            shown = [one_line(repr(each), 60) for each in (there, now)]
            one, two = ("nothing" if missing else text for missing, text in zip(absent, shown, strict=True))
            found[name] = (one, two)
    return found


def _within_tolerance(there: Any, now: Any) -> bool:
    if not (isinstance(there, dict) and isinstance(now, dict) and "tolerance" in now and there.keys() == now.keys()):
        return False
    theirs, ours = there["values"], now["values"]
    if not isinstance(theirs, list) or len(theirs) != len(ours):
        return False
    numbers = all(isinstance(each, int | float) for each in theirs)
    return numbers and all(abs(a - b) <= now["tolerance"] for a, b in zip(theirs, ours, strict=True))


def _parquet(tables: Iterable[Any], schema: Any) -> bytes:
    """One file, each table a row group; sealed, so that damage is found."""
    from pyarrow import parquet

    out = io.BytesIO()
    with parquet.ParquetWriter(out, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
    return sealed(out.getvalue())


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class AnswerFile:
    """Values by key, kept in the file `path` as they come; use it as a context, which holds the file's lock.

    `answers` maps each key to its value (JSON) and starts with what is there, made under the same `settings`. `path`
    None keeps values in memory alone.
    """

    def __init__(self, path: str | os.PathLike | None, settings: Mapping[str, Any]) -> None:
        columns = {"key": "word", "value": "word"}
        self._parts = None if path is None else Parts(path, dict(settings), columns)
        self.answers: dict[Key, Any] = {}

    def __enter__(self) -> AnswerFile:
        if self._parts is not None:
            self._parts.__enter__()
            try:
                self.answers = {tuple(json.loads(row["key"])): json.loads(row["value"]) for row in self._parts.rows()}
            except (TypeError, ValueError, RecursionError) as error:
                self._parts.__exit__(None)
                raise InputError(
                    f"{one_line(self._parts.out, 200)} holds values that are none ({one_line(error, 60)}); expected "
                    "what the run wrote: delete it, or give another file"
                ) from error
        return self

    def __exit__(self, kind: object, *trouble: object) -> None:
        if self._parts is not None:
            try:
                if kind is None:
                    self._parts.finish()
            finally:
                self._parts.__exit__(kind, *trouble)

    def append(self, results: Sequence[tuple[Key, Any]]) -> None:
        """Add (key, value) pairs and return when they are on the disk: all of them, or an error and none."""
        keys = {key for key, _ in results}
        assert len(keys) == len(results), f"answered twice: {keys}"
        assert not keys & set(self.answers), f"answered twice: {keys & set(self.answers)}"
        if self._parts is not None:
            self._parts.add([{"key": _json(list(key)), "value": _json(value)} for key, value in results])
        self.answers |= dict(results)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False)


# ---------------------------------------------------------------- one run at a time


@contextmanager
def _only_run(out: Path) -> Iterator[None]:
    """While no other run writes for `out`: the system's lock on a file beside, which goes with the process however
    that ends; where there is no such lock, the file itself, which a killed process leaves behind."""
    lock = out.with_name(f"{out.name}.lock")
    try:
        handle = _taken(lock, out)
    except OSError as error:
        raise InputError(
            f"{lock} could not be opened ({error.strerror}); expected a folder to write in: mend the rights there, or "
            "give another file"
        ) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # before it is given back, or it could be somebody else's by now
        if handle is not None:
            os.close(handle)


def _taken(lock: Path, out: Path) -> int | None:
    """The handle that holds the system's lock; None where the file's being there is the lock."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # a link could lead to anybody's file
    while True:
        made = not os.path.lexists(lock)
        try:
            handle = os.open(lock, flags | (os.O_EXCL if made else 0), 0o600)
        except FileExistsError:  # somebody made it just now
            continue
        held = _system_lock(handle, out)
        if held and _is_still(lock, handle):
            return handle
        os.close(handle)
        if held:  # the run before has just ended, and its file is gone
            continue
        if made:
            return None
        raise InputError(
            f"another run is writing into {out}, or was killed: {lock} is there; expected one at a time: wait, or "
            "delete the lock file if no such run is left"
        )


def _system_lock(handle: int, out: Path) -> bool:
    """Whether the file is locked now, until it is closed; False where the system or the drive has no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise InputError(
            f"another run is writing into {out}; expected one at a time: wait for it, or give another file"
        ) from error
    except OSError:
        return False
    return True


def _is_still(lock: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(lock), os.fstat(handle))
    except FileNotFoundError:
        return False
