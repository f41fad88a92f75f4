"""What a sweep leaves: a file of rows, how many there are of which kind, and bands over prompts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from oversquash_lens.errors import InputError, one_line
from oversquash_lens.parts import arrow_schema, identity_of, read_rows
from oversquash_lens.results import Result
from oversquash_lens.sweeps.rows import FORMAT, checked_measures, columns

if TYPE_CHECKING:
    import pandas

BINS = 20  # relative positions of a band
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Bands:
    """Of many prompts, at each place x: least, lower quartile, median, upper quartile, most."""

    measure: str
    by: str  # "position": x is the middle of a bin, 0 … 1 of the prompt; "layer": x counts layers
    x: tuple[float, ...]
    least: tuple[float, ...]
    lower: tuple[float, ...]
    median: tuple[float, ...]
    upper: tuple[float, ...]
    most: tuple[float, ...]
    n: int  # prompts


@dataclass(frozen=True, repr=False)
class SweepResult(Result):
    """A finished sweep: `path` of its rows, `total` prompts, `done` of them measured, the others `refused`.

    `reused` rows were there before this call, which took `seconds`. `table()` gives the rows as Arrow, `to_frame()`
    as pandas; a `repr` shows how each column of numbers is spread over the prompts.
    """

    path: Path
    identity: dict[str, Any]
    total: int
    done: int
    refused: int
    reused: int = 0
    seconds: float = 0.0

    @classmethod
    def load(cls, path: str | os.PathLike, *, reused: int | None = None, seconds: float = 0.0) -> SweepResult:
        """The result that a sweep wrote to this file."""
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"expected the path of a sweep's file, got a {type(path).__name__}: give what out= was")
        path = Path(path).expanduser().absolute()
        identity = identity_of(path)
        if identity is None or identity.get("kind") != "sweep":
            raise InputError(
                f"{one_line(path, 200)} is no sweep's file, or a damaged one; expected what `sweep` wrote: give the "
                "path that out= was, or delete it and run the sweep again"
            )
        try:
            expected = arrow_schema(columns(checked_measures(identity["measures"])))
            label = [identity["model"][name] for name in ("model", "class", "dtype")]
            if identity["format"] != FORMAT or not all(isinstance(each, str) for each in label):
                raise ValueError("its format is another version's")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{one_line(path, 200)} is no sweep's file of this version ({one_line(error, 80)}); expected what "
                "`sweep` wrote: run it again into another file"
            ) from error
        status = read_rows(path, ["status"], schema=expected)["status"].to_pylist()
        if unknown := set(status) - {"done", "refused"}:
            raise InputError(
                f"{one_line(path, 200)} is damaged (a row is {one_line(repr(unknown.pop()), 30)}); expected 'done' or "
                "'refused': delete it and run the sweep again"
            )
        done = status.count("done")
        kept = len(status) if reused is None else reused
        return cls(path, identity, len(status), done, len(status) - done, kept, seconds)

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(self.identity["measures"])

    @property
    def model(self) -> str:
        """The model's label, class and number format, as results show it."""
        about = self.identity["model"]
        return f"{about['model']} as {about['class']} ({about['dtype']})"

    def table(self, columns: Sequence[str] | None = None) -> Any:
        """The rows, or some of their columns, as a pyarrow Table; `.to_pandas()` makes a data frame of it."""
        if columns is not None and (unknown := sorted(set(columns) - set(self.columns))):
            there = one_line(", ".join(self.columns), 250)
            raise InputError(f"expected some of {there}, got column {unknown[0]!r}: choose of these")
        return read_rows(self.path, columns)

    @cached_property
    def _schema(self) -> Any:
        return arrow_schema(columns(self.measures))

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._schema.names)

    @cached_property
    def remarks(self) -> dict[str, int]:
        """What of measured prompts may not be meant as it came, and how many prompts for each remark."""
        remarks = self.table(["remark"])["remark"].to_pylist()
        return dict(Counter(remark for remark in remarks if remark is not None).most_common())

    @cached_property
    def reasons(self) -> dict[str, int]:
        """Why prompts were refused, and how many for each reason; the most frequent first."""
        reasons = self.table(["reason"])["reason"].to_pylist()
        return dict(Counter(reason for reason in reasons if reason is not None).most_common())

    def bands(self, measure: str, *, bins: int = BINS) -> Bands:
        """How the shares are spread over the prompt, or how wide the paths are at each layer, over all prompts.

        `measure`: one of this sweep's, else InputError. Of one with shares: by relative position, in `bins` bins, the
        share over an even one (1 in every bin if all positions have the same). Of "flow": the effective width by
        layer, of "squashing" over that of uniform attention.
        """
        column = next((f"{measure}_{name}" for name in BANDED if f"{measure}_{name}" in self.columns), None)
        if measure not in self.measures or column is None:
            raise InputError(
                f"expected one of this sweep's, {', '.join(self.measures)}, got measure {one_line(repr(measure), 60)}"
            )
        rows = [np.asarray(row) for row in self.table([column])[column].to_pylist() if row is not None]
        if not rows:
            raise InputError(f"none of {self.total} prompts could be measured; expected one at least: see .reasons")
        by = BANDED[column.removeprefix(f"{measure}_")]
        if by == "position":
            values = np.stack([density(row, bins) for row in rows])
            x = (np.arange(bins) + 0.5) / bins
        else:
            values, x = np.stack(rows), np.arange(len(rows[0]), dtype=float)
        least, lower, median, upper, most = (tuple(row.tolist()) for row in np.quantile(values, QUANTILES, axis=0))
        return Bands(measure, by, tuple(x.tolist()), least, lower, median, upper, most, len(rows))

    def to_frame(self) -> pandas.DataFrame:
        """All rows as a pandas DataFrame, one a prompt."""
        return self.table().to_pandas()

    def _title(self) -> str:
        counts = f"{self.total:,} prompts, {self.done:,} measured, {self.refused:,} refused"
        return f"sweep of {counts}: {self.model}; {one_line(self.path, 80)}"

    def _table(self) -> dict[str, list[Any]]:
        """Least, median and most of every column of numbers over the prompts that were measured."""
        from pyarrow import types

        fields = self._schema
        names = [each.name for each in fields if types.is_floating(each.type) or types.is_integer(each.type)]
        names = [name for name in names if name not in ("index", "seconds")]
        held = self.table(names)
        columns = [np.asarray(held[name].drop_null(), dtype=float) for name in names]
        found: dict[str, list[Any]] = {"column": names}
        for title, level in (("least", 0.0), ("median", 0.5), ("most", 1.0)):
            found[title] = [float(np.quantile(values, level)) if len(values) else None for values in columns]
        return found

    def to_dict(self) -> dict[str, Any]:
        names = ("total", "done", "refused", "reused", "seconds")
        counts = {name: getattr(self, name) for name in names}
        return {
            "kind": "sweep",
            "path": str(self.path),
            **counts,
            "reasons": self.reasons,
            "remarks": self.remarks,
            **self.identity,
        }

    def __str__(self) -> str:
        lines = [f"{self.model}: {', '.join(self.measures)}", str(self.path), ""]
        lines += [f"{getattr(self, name):>9,}  {name}" for name in ("total", "done", "refused", "reused")]
        lines.append(f"{self.seconds:>9,.1f}  seconds")
        lines += [f"{count:>9,}  refused: {one_line(reason, 100)}" for reason, count in list(self.reasons.items())[:5]]
        lines += [f"{count:>9,}  remarked: {remark}" for remark, count in self.remarks.items()]
        return "\n".join(lines)


BANDED = {"share": "position", "width": "layer", "relative_width": "layer"}


def density(share: Float[np.ndarray, " pos"], bins: int) -> Float[np.ndarray, " bin"]:
    """Shares by relative position, over an even share: token i of n stands for the stretch from i/n to (i+1)/n.

    >>> density(np.array([0.75, 0.25]), 4).tolist()
    [1.5, 1.5, 0.5, 0.5]
    """
    below = np.concatenate(([0.0], np.cumsum(share)))
    at = np.linspace(0, 1, bins + 1)
    return np.diff(np.interp(at, np.linspace(0, 1, len(below)), below)) * bins
