"""What a panel can hold beside curves, as data: causal paths, a map of shares, the route of a share through layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from oversquash_lens.errors import InputError

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


def read_diagram(kind: str, values: dict[str, Any]) -> Paths | Heat | Route:
    """The diagram that a chart's JSON holds; of its numbers, None is read as nan."""
    return KINDS[kind](**{name: _tuples(value) for name, value in values.items()})


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(math.nan if each is None else _tuples(each) for each in value)
    return value
