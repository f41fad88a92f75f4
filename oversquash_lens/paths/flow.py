"""Where the paths run: the sum over causal paths, split by layer, position, head and residual stream.

With u⁽ˡ⁾ the row from the last token down to layer l and f⁽ˡ⁾ the column from the prompt up to it, u⁽ˡ⁾·f⁽ˡ⁾ is the
total at every layer, so u_k f_k / (u·f) is a distribution over positions: the part of the paths that pass through
position k on entering layer l (docs/theory.md, section 9). What enters a position is split by the heads that move it
there and the residual stream that keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.trace import Trace
from oversquash_lens.errors import InputError, one_line
from oversquash_lens.numerics import effective_number, json_numbers, without_autocast
from oversquash_lens.paths.blocks import AttentionBlock, EdgeBlock, HeadEdges
from oversquash_lens.paths.edges import EdgeRule
from oversquash_lens.paths.profiles import TracePaths, blocks_of, checked_trace, paths_of_trace
from oversquash_lens.paths.recursion import FAINT, ROWS, PathProfile
from oversquash_lens.results import About, Result

Source = int | str | slice  # a position, a token's text, or a span of positions


@runtime_checkable
class EdgesByLayer(Protocol):
    """Any layer's edges into positions start … stop-1 from positions 0 … stop-1."""

    def edge_block(self, layer: int, start: int, stop: int) -> EdgeBlock: ...


@dataclass(frozen=True, repr=False)
class Flow(Result):
    """How the paths that reach the last token are spread over positions and heads, layer by layer.

    `node[l, k]` is the share of them that pass through position k on entering layer l (row n_layers: on leaving
    the last layer); every row sums to 1. `head_at[l, h, j]` is the share that head h of layer l moves to position
    j, `residual_at[l, j]` what stays there; both together sum to 1 in each layer. `source` None counts the paths
    from all input positions, i those from position i alone, a slice those from its positions.

    Shares are of the kind's own path sum: for the mean-field estimate of squared sensitivity.
    """

    kind: str
    tokens: tuple[str, ...]
    source: int | slice | None
    node: Float[Tensor, "layer_plus_1 pos"]
    head_at: Float[Tensor, "layer head pos"]
    residual_at: Float[Tensor, "layer pos"]
    log_above: Float[Tensor, "layer_plus_1 pos"]  # u, natural log
    log_below: Float[Tensor, "layer_plus_1 pos"]  # f, natural log
    edges: EdgesByLayer = field(compare=False)
    about: About
    power: float = 1.0  # the sensitivity that the kind speaks of is the path sum to this power
    notes: tuple[str, ...] = ()

    def _title(self) -> str:
        total = self.log_total / math.log(10)
        return f"{self.kind} paths from {self.source_text} to the last of {len(self.tokens)}: log₁₀ total {total:.3f}"

    def _table(self) -> dict[str, Any]:
        """One row a layer, the lowest first."""
        head = self.head
        return {
            "layer": range(self.n_layers),
            "effective_width": self.effective_width[:-1],
            "receptive_field": self.receptive_field[:-1],
            "residual": self.residual,
            "largest_head": head.argmax(-1),
            "its_share": head.amax(-1),
        }

    @property
    def source_text(self) -> str:
        """The source in words, with the tokens' text."""
        if self.source is None:
            return "all tokens"
        if isinstance(self.source, int):
            return f"token {self.source}, {self.tokens[self.source]!r}"
        start, stop = self.source.start, self.source.stop
        return f"tokens {start} … {stop - 1}, {one_line(repr(''.join(self.tokens[start:stop])), 60)}"

    @property
    def n_layers(self) -> int:
        return self.node.shape[0] - 1

    @property
    def head(self) -> Float[Tensor, "layer head"]:
        """Share that each head moves; with `residual` it sums to 1 in each layer."""
        return self.head_at.sum(-1)

    @property
    def residual(self) -> Float[Tensor, " layer"]:
        """Share that stays where it is."""
        return self.residual_at.sum(-1)

    @property
    def effective_width(self) -> Float[Tensor, " layer_plus_1"]:
        """Number of positions that the paths pass through at each layer: exp of the shares' entropy, 1 … n."""
        return effective_number(self.node)

    @property
    def receptive_field(self) -> Float[Tensor, " layer_plus_1"]:
        """Number of positions that any path passes through at each layer, by the causal mask and by zero weights."""
        return (torch.isfinite(self.log_above) & torch.isfinite(self.log_below)).sum(-1).double()

    @property
    def relative_width(self) -> Float[Tensor, " layer_plus_1"]:
        """Effective width over receptive field, in (0, 1]: 1 where every position that could is used alike."""
        return self.effective_width / self.receptive_field

    @property
    def log_total(self) -> float:
        """Natural log of the path sum itself, the constant left out."""
        return (self.log_above + self.log_below)[-1].logsumexp(-1).item()

    @property
    def imbalance(self) -> float:
        """Largest relative deviation of u·f between layers: 0 but for rounding, as flow is conserved."""
        totals = (self.log_above + self.log_below).logsumexp(-1)
        return torch.expm1(totals - totals[-1]).abs().max().item()

    def edge(self, layer: int) -> HeadEdges:
        """Share that runs over every edge of one layer: heads [head, dest, src] and residual [dest]; sums to 1."""
        if not 0 <= layer < self.n_layers:
            raise InputError(f"expected 0 … {self.n_layers - 1}, the layers of this flow, got layer {layer}")
        n = len(self.tokens)
        heads = torch.zeros(self.head_at.shape[1], n, n, dtype=torch.float64, device="cpu")
        for start in range(0, n, ROWS):
            stop = min(start + ROWS, n)
            heads[:, start:stop, :stop] = self.edge_rows(layer, start, stop)
        return HeadEdges(heads, self.residual_at[layer])

    def edge_rows(self, layer: int, start: int, stop: int) -> Float[Tensor, "head dest src"]:
        """As `edge`, the heads' part into positions start … stop-1 from positions 0 … stop-1."""
        heads = self.edges.edge_block(layer, start, stop).by_head().heads.cpu().double()
        below = self.log_below[layer, :stop]
        # Below the source nothing is reached, all of `below` is -inf: no share, and no NaN.
        weights = heads * (below - below.max().clamp(min=torch.finfo(below.dtype).min)).exp()
        moved = self.head_at[layer, :, start:stop]
        total = weights.sum(-1)
        faint = (total < FAINT) & (moved > 0)
        shares = weights * (moved / total.clamp(min=FAINT))[..., None]
        for head, dest in faint.nonzero().tolist():  # rare, as in the row recursion
            shares[head, dest] = moved[head, dest] * (heads[head, dest].log() + below).softmax(-1)
        return shares

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: shares by node and by head, widths. `head_at` is left out: megabytes on a long prompt."""
        tensors = ("node", "head", "residual", "effective_width", "receptive_field")
        source = [self.source.start, self.source.stop] if isinstance(self.source, slice) else self.source
        return {
            "kind": "flow",
            "paths": self.kind,
            "source": source,
            "tokens": list(self.tokens),
            **{name: json_numbers(getattr(self, name)) for name in tensors},
            "log_total": json_numbers(self.log_total),
            "notes": list(self.notes),
            "about": self.about.to_dict(),
        }


def flow(
    trace: Trace | object,
    kind: str = "mean_field",
    source: Source | object | None = None,
    beta: float | str = "measured",
) -> Flow:
    """Where the paths from the prompt, or from `source` alone, run on their way to the last token.

    Args:
        trace: what `record` gave.
        kind: "mean_field" or a variant of `path_bound`.
        source: None for all positions together, a position, the text of a token or of some that follow one another
            ("Alice", with or without its leading space), or a slice of positions.
        beta: as in `path_bound`.

    Returns:
        A `Flow`, shares in 0 … 1. O(layer·pos²), two sweeps over the same edges.

    Raises:
        InputError: a source that the prompt has not or has several times, or from which no path has any weight.
        ModelError: a kind that does not hold on this architecture.
    """
    return flows(trace, (source,), kind, beta)[0]


def flows(
    trace: Trace | object,
    sources: Sequence[Any] | object,
    kind: str = "mean_field",
    beta: float | str = "measured",
    profile: PathProfile | None = None,
) -> tuple[Flow, ...]:
    """As `flow` for several sources (None: all positions), at little more than the cost of one.

    `profile`: this kind's own, where it is known already, as from `profiles`; it saves the sweep from above.
    """
    trace = checked_trace(trace)
    places = places_of(trace.tokens, sources)
    assert isinstance(sources, Sequence)  # or places_of has refused them
    paths = paths_of_trace(trace, kind, beta)
    log_above = (profile or paths.profile()).log_by_layer / paths.power
    with without_autocast():
        log_below, head_part, residual_part = _columns(paths, places)
    found = []
    for i, place in enumerate(places):
        logs = log_above + log_below[i]
        if torch.isneginf(logs[-1]).all():
            raise InputError(
                f"expected one that has a path to the last token, got source={sources[i]!r}, from which no path has "
                "any weight (its attention was cut off, or is too faint for this dtype): choose another position"
            )
        node = logs.softmax(-1)
        entered = node[1:, None]
        found.append(
            Flow(
                kind=paths.kind,
                tokens=trace.tokens,
                source=place,
                node=node,
                head_at=entered * head_part[i],
                residual_at=entered[:, 0] * residual_part[i],
                log_above=log_above,
                log_below=log_below[i],
                edges=paths,
                about=trace.about,
                power=paths.power,
                notes=paths.notes,
            )
        )
    return tuple(found)


def places_of(tokens: Sequence[str], sources: Sequence[Any] | object) -> list[int | slice | None]:
    """`position_of` each, None for all tokens together; an InputError where `sources` is no list of at least one."""
    if not isinstance(sources, Sequence) or isinstance(sources, str) or not sources:
        came = "no source" if isinstance(sources, list | tuple) and not sources else f"a {type(sources).__name__}"
        raise InputError(
            f"expected a list of positions of the prompt, or of None for all of them together, got {came}: give at "
            "least one, such as [None]"
        )
    return [None if source is None else position_of(tokens, source) for source in sources]


def position_of(tokens: Sequence[str], source: Source | object) -> int | slice:
    """The position, or the slice of positions, that an index, a text or a slice means in a prompt.

    A text is that of one token, with or without the space around it, or of several that follow one another; digits
    that are no token's text are an index, "3:7" a slice. Raises InputError with the places where a text occurs more
    than once.

    >>> position_of(("The", " cat", " sat"), "cat"), position_of(("The", " cat", " sat"), "cat sat")
    (1, slice(1, 3, None))
    """
    n = len(tokens)
    expected = f"expected a position 0 … {n - 1}, the text of a token or a slice of positions"
    place = _place_of_text(tokens, source, expected) if isinstance(source, str) else source
    if isinstance(place, slice):
        start, stop = 0 if place.start is None else place.start, n if place.stop is None else place.stop
        if type(start) is int and type(stop) is int and place.step in (None, 1) and 0 <= start < stop <= n:
            return slice(start, stop)
    elif type(place) is int and 0 <= place < n:
        return place
    raise InputError(f"{expected}, got source={one_line(repr(source), 60)}")


def span_of(place: int | slice) -> tuple[int, int]:
    """Start and stop of what `position_of` found.

    >>> span_of(3), span_of(slice(1, 3))
    ((3, 4), (1, 3))
    """
    return (place.start, place.stop) if isinstance(place, slice) else (place, place + 1)


def _place_of_text(tokens: Sequence[str], text: str, expected: str) -> int | slice:
    wanted = text.strip()
    places: list[int | slice] = [i for i, token in enumerate(tokens) if text == token or text == token.strip() != ""]
    if not places and wanted:
        places = [i for i, token in enumerate(tokens) if token.strip() == wanted]
    if not places and wanted.replace(":", "", 1).isdecimal() and wanted.isascii():
        ends = [int(part) if part else None for part in wanted.split(":")]
        return ends[0] if len(ends) == 1 and ends[0] is not None else slice(*ends)
    if not places and wanted:
        places = list(_runs_of_text(tokens, wanted))
    if len(places) == 1:
        return places[0]
    at = ", ".join(str(span_of(place)[0]) for place in places[:20])
    said = f"which is at positions {at}: give one of them" if places else "but no token is that"
    raise InputError(f"{expected}, got source={one_line(repr(text), 60)}, {said}")


def _runs_of_text(tokens: Sequence[str], wanted: str) -> Iterable[slice]:
    """Tokens that follow one another and together are this text."""
    for start, first in enumerate(tokens):
        text = first.lstrip()
        if not text or not wanted.startswith(text):
            continue
        for stop in range(start + 2, len(tokens) + 1):
            text += tokens[stop - 1]
            if text.rstrip() == wanted and tokens[stop - 1].strip():
                yield slice(start, stop)
            if not wanted.startswith(text):
                break


def _columns(
    paths: TracePaths, sources: Sequence[int | slice | None]
) -> tuple[
    Float[Tensor, "source layer_plus_1 pos"],
    Float[Tensor, "source layer head pos"],
    Float[Tensor, "source layer pos"],
]:
    """From the prompt upwards: log of the paths that reach each position, and what part each head moved there."""
    trace, blocks = paths.trace, blocks_of(paths.trace)
    column = torch.full((trace.n_positions, len(sources)), -math.inf, dtype=torch.float64, device="cpu")
    for i, source in enumerate(sources):
        column[source if source is not None else slice(None), i] = 0.0
    columns, heads, residual = [column], [], []
    for layer in range(trace.n_layers):
        stayed = torch.isfinite(column)  # where nothing was, nothing stays: the heads moved it all
        column, head_part = _log_column_product(paths.edges, blocks(layer), column)
        if paths.log_node_gain is not None:
            column = column + paths.log_node_gain[layer].cpu().double()[:, None]
        moved = head_part.sum(0)
        head_part = torch.where(stayed | (moved == 0), head_part, head_part / moved)
        columns.append(column)
        heads.append(head_part)
        residual.append(torch.where(stayed, 1 - moved, 0.0).clamp(min=0))
    return (
        torch.stack(columns).permute(2, 0, 1),
        torch.stack(heads).permute(3, 0, 1, 2),
        torch.stack(residual).permute(2, 0, 1),
    )


def _log_column_product(
    rule: EdgeRule, blocks: Iterable[AttentionBlock], log_column: Float[Tensor, "pos source"]
) -> tuple[Float[Tensor, "pos source"], Float[Tensor, "head pos source"]]:
    """log(edges · exp(log_column)), no entry lost to underflow, and each head's part of it."""
    shift = log_column.amax(0)
    column = (log_column - shift).exp()
    reached = torch.isfinite(log_column.cummax(0).values)
    logs, parts = [], []
    for block in blocks:
        edges = rule(block)
        total = edges.column_product(column)
        products = edges.head_products(column[: block.stop])
        log_total, part = total.log() + shift, products.cpu().double() / total.clamp(min=FAINT)
        # What no path reaches is truly 0; what merely fell below the range is computed again.
        faint = (total < _faintest(products)) & reached[block.start : block.stop]
        if faint.any():
            split = edges.by_head()
            for dest in faint.any(1).nonzero()[:, 0].tolist():
                one = HeadEdges(split.heads[:, dest].cpu().double(), split.residual[dest].cpu().double())
                log_total[dest], part[:, dest] = _in_logarithms(one, block.start + dest, log_column[: block.stop])
        logs.append(log_total)
        parts.append(part / part.sum(0).clamp(min=1.0))  # rounding must not make the parts more than their sum
    return torch.cat(logs), torch.cat(parts, dim=1)


def _faintest(products: Tensor) -> float:
    """Products below this share of the largest entry have lost digits in the dtype that the heads are computed in."""
    return FAINT if products.dtype == torch.float64 else 1e-30


def _in_logarithms(
    edges: HeadEdges, dest: int, log_column: Float[Tensor, "src source"]
) -> tuple[Float[Tensor, " source"], Float[Tensor, "head source"]]:
    """The same for one position: rare, where one source is fainter than 1e-30 of another."""
    moved = (edges.heads.log()[:, :, None] + log_column).logsumexp(1)
    stayed = edges.residual.log() + log_column[dest]
    total = torch.cat([moved, stayed[None]]).logsumexp(0)
    return total, torch.where(torch.isneginf(total), 0.0, (moved - total).exp())
