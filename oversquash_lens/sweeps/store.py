"""Where a sweep's rows lie: small parquet files while it runs, one at the end; each knows which run it belongs to.

The parts lie in the folder `<out>.parts`, each whole or not at all, beside `run.json`, the identity of the run. Killed
at any moment, what is there is what was done. The rows of a part are prompts of one window of WINDOW consecutive ones,
so that merging holds a window at a time, and a row that came twice counts once.
"""

from __future__ import annotations

import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from oversquash_lens.errors import InputError, one_line
from oversquash_lens.storage import check_place, check_writable, remove_drafts, write_atomically

WINDOW = 256  # consecutive prompts whose rows may share a part
KEY = b"oversquash-lens-sweep"
Identity = Mapping[str, Any]
Row = Mapping[str, Any]


def arrow_schema(columns: Mapping[str, str], identity: Identity) -> Any:
    """The parquet schema of rows with these columns (types as in sweep_rows), the run's identity in its metadata."""
    import pyarrow as pa

    types = {
        "number": pa.float64(),
        "count": pa.int64(),
        "word": pa.string(),
        "row": pa.list_(pa.float64()),
        "ids": pa.list_(pa.int64()),
        "words": pa.list_(pa.string()),
    }
    fields = [pa.field(name, types[kind]) for name, kind in columns.items()]
    return pa.schema(fields, metadata={KEY: json.dumps(identity, sort_keys=True)})


def identity_of(path: Path) -> dict | None:
    """The run that a finished file belongs to; None if it is no sweep's."""
    import pyarrow
    from pyarrow import parquet

    try:
        return json.loads((parquet.read_schema(path).metadata or {})[KEY])
    except (OSError, pyarrow.ArrowException, KeyError, ValueError):
        return None


def check_out(out: Any) -> Path:
    """The path, if a sweep's file can be put there or is there already; asked before a model is loaded."""
    path = check_writable(out)
    if path.exists() and identity_of(path) is None:
        raise InputError(
            f"{one_line(path, 200)} is there and is no sweep's file; expected a new path, or that of the same sweep: "
            "give another one"
        )
    return path


class Store:
    """The rows of one run: which are done, where new ones go, and the file that they become."""

    def __init__(self, out: Path, identity: Identity, columns: Mapping[str, str], total: int) -> None:
        self.out, self.identity, self.total = out, json.loads(json.dumps(identity)), total
        self.folder = out.with_name(f"{out.name}.parts")
        self._schema = arrow_schema(columns, self.identity)
        self.finished = self._is_finished()
        self.done: set[int] = set(range(total)) if self.finished else self._read_done()
        if self.finished:
            self._tidy()

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows of prompts of one window, on the disk when this returns."""
        import pyarrow as pa

        (window,) = {row["index"] // WINDOW for row in rows}
        table = pa.Table.from_pylist(list(rows), schema=self._schema)
        write_atomically(self.folder / f"{window:06d}-{uuid4().hex}.parquet", _parquet([table], self._schema))
        self.done |= {row["index"] for row in rows}

    def finish(self) -> None:
        """Put all rows into the one file, in the order of the prompts, and take the parts away."""
        tables = (self._window(window, paths) for window, paths in sorted(self._parts().items()))
        write_atomically(self.out, _parquet(tables, self._schema))
        self.finished = True
        self._tidy()

    def _is_finished(self) -> bool:
        if not self.out.exists():
            return False
        self._check_same(identity_of(self.out), self.out)
        return True

    def _read_done(self) -> set[int]:
        run = check_place(self.folder, "run.json")
        if run.exists():
            self._check_same(_read_json(run), self.folder)
        elif left := [each.name for each in self.folder.iterdir() if not each.name.startswith(".")]:
            raise InputError(
                f"the folder {one_line(self.folder, 200)} holds {one_line(left[0], 60)} and no run.json; expected the "
                "parts of this sweep: move it away, or give another out="
            )
        else:
            write_atomically(run, json.dumps(self.identity, indent=1).encode())
        paths = [path for some in self._parts().values() for path in some]
        return {index for path in paths for index in _read_part(path, ["index"])["index"].to_pylist()}

    def _parts(self) -> dict[int, list[Path]]:
        found = defaultdict(list)
        for path in sorted(self.folder.glob("[0-9]*-*.parquet")):
            found[int(path.name.partition("-")[0])].append(path)
        return dict(found)

    def _window(self, window: int, paths: Sequence[Path]) -> Any:
        """The rows of a window, each once, in order. Raises InputError if one is not there any more."""
        import pyarrow as pa

        table = pa.concat_tables([_read_part(path) for path in paths])
        place = {index: row for row, index in enumerate(table["index"].to_pylist())}
        wanted = range(window * WINDOW, min((window + 1) * WINDOW, self.total))
        if missing := [index for index in wanted if index not in place]:
            raise InputError(
                f"the row of prompt {missing[0]} is gone from {one_line(self.folder, 200)}; expected every part there "
                "until the sweep is over: run it again, it makes what is missing"
            )
        return table.take([place[index] for index in wanted])

    def _check_same(self, theirs: Any, where: Path) -> None:
        if theirs == self.identity:
            return
        keys = sorted(set(self.identity) | set(theirs)) if isinstance(theirs, dict) else []
        differing = [key for key in keys if theirs.get(key) != self.identity.get(key)]
        key = differing[0] if differing else "nothing known"
        came, there = (one_line(repr(each.get(key)), 60) for each in (self.identity, theirs if differing else {}))
        raise InputError(
            f"{one_line(where, 160)} belongs to another sweep ({key}: {there} there, {came} now); expected the same "
            "model, prompts, measures and options: give another out=, or delete it"
        )

    def _tidy(self) -> None:
        """Take away the parts, and their folder if nothing else lies in it."""
        with suppress(OSError):
            for path in (*self.folder.glob("[0-9]*-*.parquet"), self.folder / "run.json"):
                path.unlink(missing_ok=True)
            remove_drafts(self.folder)
            self.folder.rmdir()


def _parquet(tables: Iterable[Any], schema: Any) -> bytes:
    """One file, each table a row group."""
    from pyarrow import parquet

    out = io.BytesIO()
    with parquet.ParquetWriter(out, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
    return out.getvalue()


def _read_part(path: Path, columns: list[str] | None = None) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path).read(columns=columns)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(
            f"the part {one_line(path, 200)} is damaged ({one_line(error, 80)}); expected what the sweep wrote: delete "
            "it, its prompts are then run again"
        ) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return os.fspath(path)
