"""What a figure shows, as data: the same object is drawn, written as CSV and JSON, and judged.

Recipes make charts, `viz.figures` draws them; nobody computes inside a drawing.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from oversquash_lens.errors import InputError, one_line, visible

SERIES_KINDS = ("line", "published", "floor", "bars", "marks")
AXES = ("linear", "log", "category")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # what a cell of a spreadsheet runs
Number = float | int
Row = tuple[Any, ...]  # a line of a CSV file: series, kind, x, y, low, high


@dataclass(frozen=True)
class Paths:
    """Causal paths through layers as a drawing: how many run over each edge from `token` to the last one.

    `edges` holds (layer, source position, destination position, number of paths over it); layer 0 is the lowest.
    """

    tokens: tuple[str, ...]
    n_layers: int
    token: int
    edges: tuple[tuple[int, int, int, Number], ...]

    @property
    def total(self) -> Number:
        """Number of paths from `token` to the last one: every path leaves it over one edge of the lowest layer."""
        return sum(count for layer, source, _, count in self.edges if (layer, source) == (0, self.token))

    def rows(self) -> Iterator[Row]:
        for layer, source, destination, count in self.edges:
            yield f"layer {layer}", "paths", source, destination, count, count


@dataclass(frozen=True)
class Heat:
    """A map of shares: `values[row][column]`, row 0 at the bottom, nan where nothing is known.

    The colour is logarithmic from `low` (or less) to `high` (or more); `label` says what it stands for. A series of
    the same panel is drawn at the map's right against the rows: x is the row, y the number.
    """

    values: tuple[tuple[Number, ...], ...]
    low: Number
    high: Number
    label: str

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.values}
        if len(widths) != 1 or widths == {0}:
            raise InputError(f"expected rows of one length, not 0, got a map with rows of {sorted(widths)} numbers")
        if not 0 < self.low < self.high < math.inf:
            raise InputError(f"expected 0 < low < high, got a map with colours from {self.low} to {self.high}")

    def rows(self) -> Iterator[Row]:
        for row, values in enumerate(self.values):
            for column, value in enumerate(values):
                yield f"row {row}", "map", column, value, "", ""


@dataclass(frozen=True)
class Route:
    """How shares of a flow run through positions and layers; those on entering a layer sum to 1.

    A stop stands for positions start … stop-1 of `spans`, from left to right: a position that matters, or a run of
    others gathered in one. `node[layer][stop]` is the share there on entering the layer (the last row: on leaving
    the last one), `stays[layer][stop]` what does not leave the stop in that layer, and `moves` holds (layer,
    stop it leaves, stop it comes to, share, head that brings most of it). Shares below `least` are not drawn; moves
    as faint as that are not there.
    """

    names: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    node: tuple[tuple[Number, ...], ...]
    stays: tuple[tuple[Number, ...], ...]
    moves: tuple[tuple[int, int, int, Number, str], ...]
    source: int | None
    least: Number

    def __post_init__(self) -> None:
        sizes = {len(row) for row in (self.names, self.spans, *self.node, *self.stays)}
        if len(sizes) != 1 or len(self.node) != len(self.stays) + 1:
            raise InputError(
                "expected one number of stops, and one more row of shares than layers, got a route with "
                f"{sorted(sizes)} stops, {len(self.node)} rows of shares and {len(self.stays)} layers"
            )

    @property
    def n_layers(self) -> int:
        return len(self.stays)

    @property
    def left_out(self) -> float:
        """The largest share of a layer that is not drawn."""
        drawn = [sum(share for share in shares if share >= self.least) for shares in self.stays]
        for layer, _, _, share, _ in self.moves:
            drawn[layer] += share
        return max(0.0, 1 - min(drawn))

    def is_gathered(self, stop: int) -> bool:
        start, end = self.spans[stop]
        return end - start > 1

    def rows(self) -> Iterator[Row]:
        places = [str(start) if end - start == 1 else f"{start}–{end - 1}" for start, end in self.spans]
        for layer, shares in enumerate(self.node):
            for place, share in zip(places, shares, strict=True):
                yield f"layer {layer}", "node", place, share, "", ""
        for layer, shares in enumerate(self.stays):
            for place, share in zip(places, shares, strict=True):
                yield f"layer {layer}", "stays", place, place, share, share
        for layer, source, destination, share, head in self.moves:
            yield f"layer {layer}, head {head}", "moves", places[source], places[destination], share, share


KINDS: dict[str, type] = {"paths": Paths, "heat": Heat, "route": Route}


@dataclass(frozen=True)
class Series:
    """One row of numbers against x; `low`/`high` are a band (min–max), nan is a gap.

    Kinds: "line" what was measured, "published" what was read off the paper's print, "floor" what rounding alone
    makes, "bars" a histogram, "marks" right (1) or wrong (0) answers, drawn as ✓ and ✗. A "published" or "floor"
    series that has a line's label belongs to that line and takes its colour.
    """

    label: str
    x: tuple[Number, ...]
    y: tuple[Number, ...]
    low: tuple[Number, ...] | None = None
    high: tuple[Number, ...] | None = None
    kind: str = "line"

    def __post_init__(self) -> None:
        sizes = {len(each) for each in (self.x, self.y, self.low, self.high) if each is not None}
        if len(sizes) != 1:
            raise InputError(f"expected as many y as x, got series {self.label!r} with {sorted(sizes)} numbers")
        if (self.low is None) != (self.high is None):
            raise InputError(f"expected both low and high, or neither, got series {self.label!r} with half a band")
        if self.kind not in SERIES_KINDS:
            raise InputError(f"expected one of {', '.join(SERIES_KINDS)}, got series kind {self.kind!r}")
        if self.kind == "marks" and not all(mark in (0, 1) or math.isnan(mark) for mark in self.y):
            raise InputError(
                f"expected 1 (right), 0 (wrong) or nan (not known), got marks {self.label!r} with {self.y}"
            )


@dataclass(frozen=True)
class Panel:
    """One pair of axes: curves, or a diagram (causal paths, a map, a route).

    `reference` is a dashed horizontal line: (value, label). `zero` is what a 0 means, said where a log axis has
    no place for it and draws it at its edge. `x_names` stand in place of the numbers 0 … n-1 on the x axis.
    """

    title: str
    x_label: str = ""
    y_label: str = ""
    series: tuple[Series, ...] = ()
    x_axis: str = "linear"
    y_axis: str = "linear"
    reference: tuple[Number, str] | None = None
    paths: Paths | None = None
    heat: Heat | None = None
    route: Route | None = None
    note: str = ""
    zero: str = "bit-equal"
    x_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for axis in (self.x_axis, self.y_axis):
            if axis not in AXES:
                raise InputError(f"expected one of {', '.join(AXES)}, got axis {axis!r}")
        if len({one.kind == "marks" for one in self.series}) > 1:
            raise InputError(f"panel {self.title!r} has marks and numbers on one pair of axes; give each its own panel")
        if (count := sum(getattr(self, kind) is not None for kind in KINDS)) > 1:
            raise InputError(f"panel {self.title!r} has {count} diagrams on one pair of axes; give each its own panel")

    @property
    def diagram(self) -> Paths | Heat | Route | None:
        return self.paths or self.heat or self.route


@dataclass(frozen=True)
class Verdict:
    """A claim of the paper, the number that decides it here, and whether it held; `held` None where nothing decides."""

    claim: str
    number: str
    held: bool | None

    def __post_init__(self) -> None:
        if self.held not in (True, False, None):
            raise InputError(f"expected True, False, or None for not decided, got a verdict with held={self.held!r}")

    def __str__(self) -> str:
        return f"{self.word}: {self.claim} ({self.number})"

    @property
    def word(self) -> str:
        return {True: "held", False: "did not hold", None: "not decided"}[self.held]


@dataclass(frozen=True)
class Table:
    """Rows of words and numbers that a figure's page shows below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Chart:
    """One figure: its panels, what was found, and on which model. `columns` is how many panels stand side by side."""

    name: str
    title: str
    panels: tuple[Panel, ...]
    verdicts: tuple[Verdict, ...]
    model: str = ""
    setup: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    columns: int = 0
    data: dict[str, Any] = field(default_factory=dict)

    def with_notes(self, *notes: str) -> Chart:
        return replace(self, notes=(*self.notes, *notes))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; numbers that JSON has no word for (nan, inf) become None."""
        return {"kind": "chart", **_jsonable(asdict(self))}

    @classmethod
    def from_dict(cls, values: Any) -> Chart:
        """The chart that `to_dict` wrote; of its numbers, None is read as nan."""
        try:
            panels = tuple(_panel(**panel) for panel in values["panels"])
            tables = tuple(_table(**table) for table in values["tables"])
            verdicts = tuple(Verdict(**verdict) for verdict in values["verdicts"])
            words: dict[str, Any] = {name: tuple(values[name]) for name in ("setup", "notes")}
            rest: dict[str, Any] = {name: values[name] for name in ("name", "title", "model", "columns", "data")}
            return cls(panels=panels, verdicts=verdicts, tables=tables, **words, **rest)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"expected what Chart.to_dict wrote, got a damaged chart ({type(error).__name__}: "
                f"{one_line(error)}): make the figure again"
            ) from error

    def to_csv(self) -> str:
        """One line a point, edge or cell of a map: panel, series, kind, x, y, low, high."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["panel", "series", "kind", "x", "y", "low", "high"])
        for panel in self.panels:
            for one in panel.series:
                empty = ("",) * len(one.x)
                for row in zip(one.x, one.y, one.low or empty, one.high or empty, strict=True):
                    writer.writerow(map(_cell, [panel.title, one.label, one.kind, *row]))
            if panel.diagram is not None:
                writer.writerows(map(_cell, [panel.title, *row]) for row in panel.diagram.rows())
        return out.getvalue()


def _cell(value: Any) -> Any:
    """A text without control characters; one that a spreadsheet would run begins with an apostrophe, which it hides."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if value.lstrip(" ").startswith(FORMULA) else text


def _panel(series: list, reference: list | None, x_names: list, **rest: Any) -> Panel:
    diagrams = {kind: _diagram(kind, rest.pop(kind)) for kind in KINDS if rest.get(kind) is not None}
    rows = tuple(_series(**one) for one in series)
    dashed: Any = reference if reference is None else tuple(reference)
    return Panel(series=rows, reference=dashed, x_names=tuple(x_names), **rest | diagrams)


def _diagram(kind: str, values: dict[str, Any]) -> Paths | Heat | Route:
    """Of its numbers, None is read as nan."""
    return KINDS[kind](**{name: _tuples(value) for name, value in values.items()})


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(math.nan if each is None else _tuples(each) for each in value)
    return value


def _series(label: str, kind: str, **numbers: list | None) -> Series:
    return Series(label=label, kind=kind, **{name: _tuples(each) for name, each in numbers.items()})


def _table(columns: list, rows: list, **rest: Any) -> Table:
    return Table(columns=tuple(columns), rows=tuple(map(tuple, rows)), **rest)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(each) for each in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "tolist"):  # tensors and arrays
        return _jsonable(value.tolist())
    raise InputError(
        f"expected numbers, words, lists and dicts of them, got a chart with a {type(value).__name__} in it"
    )
