"""The edges and the paths of a flow that carry most."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oversquash_lens.errors import InputError, whole_number
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.recursion import ROWS
from oversquash_lens.results import Result

BLOCK = 64  # positions whose edges are looked through at a time


@dataclass(frozen=True)
class HeavyEdge:
    """One edge of one layer: `head` moves `share` of the flow from position `src` to `dest`; None: it stays."""

    layer: int
    head: int | None
    dest: int
    src: int
    share: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class HeavyPath:
    """One causal path and its share of the flow.

    `positions[l]` is where it enters layer l (the last one: where it leaves the last layer). `heads[l]` is the head
    that moves most of that step where it goes to another position, None where the path stays; the share counts all
    heads between the same two positions.
    """

    positions: tuple[int, ...]
    heads: tuple[int | None, ...]
    share: float

    @property
    def moves(self) -> tuple[tuple[int, int, int, int], ...]:
        """(layer, head, src, dest) of each step to another position."""
        steps = zip(self.heads, self.positions, self.positions[1:], strict=False)
        return tuple((layer, head, src, dest) for layer, (head, src, dest) in enumerate(steps) if head is not None)

    def to_dict(self) -> dict[str, Any]:
        return {"positions": list(self.positions), "heads": list(self.heads), "share": self.share}


Item = TypeVar("Item", bound="HeavyEdge | HeavyPath")


class _Heaviest(Result, tuple[Item, ...], Generic[Item]):
    """A tuple, the largest share first, that shows itself as a table."""

    _what: ClassVar[str]
    flow: Flow

    def _title(self) -> str:
        return f"{len(self)} heaviest {self._what} of {self.flow.kind} paths from {self.flow.source_text}"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": f"heaviest {self._what}", self._what: [each.to_dict() for each in self]}

    def _texts(self, positions: Iterable[int]) -> list[str]:
        return [self.flow.tokens[position] for position in positions]


class HeavyEdges(_Heaviest[HeavyEdge]):
    """Edges of a flow, the largest share first."""

    _what = "edges"

    def _table(self) -> dict[str, Any]:
        names = ("layer", "head", "src", "dest", "share")
        columns = {name: [getattr(edge, name) for edge in self] for name in names}
        return columns | {f"{end}_token": self._texts(columns[end]) for end in ("src", "dest")}


class HeavyPaths(_Heaviest[HeavyPath]):
    """Paths of a flow, the largest share first; a move is "layer.head → position"."""

    _what = "paths"

    def _table(self) -> dict[str, Any]:
        starts = [path.positions[0] for path in self]
        moves = ["; ".join(f"{layer}.{head} → {dest}" for layer, head, _, dest in path.moves) for path in self]
        shares = [path.share for path in self]
        return {"share": shares, "start": starts, "start_token": self._texts(starts), "moves": moves}


def heaviest_edges(flow: Flow | object, k: int = 20, *, moving: bool = True) -> HeavyEdges:
    """The k edges that carry the largest shares of the flow, the largest first; fewer where fewer carry any.

    Args:
        flow: what `flow` gave.
        k: how many, at least 1.
        moving: leave out all that stays at its position: the residual stream, and heads that attend to their own.

    Returns:
        A tuple of `HeavyEdge`, each with layer, head, dest, src and its share of the flow, 0 … 1.

    Raises:
        InputError: no flow, or a k that is no whole number of at least 1.
    """
    flow = _checked(flow, k)
    found: list[HeavyEdge] = []
    for layer in range(flow.n_layers):
        found = _largest(found + _edges_of(flow, layer, k, moving, _least(found, k)), k)
    largest = HeavyEdges(found)
    largest.flow = flow
    return largest


def heaviest_by_layer(flow: Flow | object, k: int) -> tuple[tuple[HeavyEdge, ...], ...]:
    """Of each layer the k edges by which heads move most to another position, the largest first."""
    flow = _checked(flow, k)
    return tuple(tuple(_edges_of(flow, layer, k, moving=True, least=0.0)) for layer in range(flow.n_layers))


def _edges_of(flow: Flow, layer: int, k: int, moving: bool, least: float) -> list[HeavyEdge]:
    """The k largest edges of one layer that pass `least`.

    Exact, and quick where few positions receive most: no edge outweighs what its head moves to that position in all,
    so blocks of positions come in the order of that bound, until no other can hold one of the k heaviest.
    """
    n = len(flow.tokens)
    found = [] if moving else _staying(flow, layer, k)
    bounds = [flow.head_at[layer, :, start : start + BLOCK].max().item() for start in range(0, n, BLOCK)]
    for block in sorted(range(len(bounds)), key=lambda block: -bounds[block]):
        if bounds[block] <= max(least, _least(found, k)):
            break
        start = block * BLOCK
        edges = flow.edge_rows(layer, start, min(start + BLOCK, n))
        if moving:
            edges.diagonal(offset=start, dim1=1, dim2=2).zero_()
        best = edges.flatten().topk(min(k, edges.numel()))
        for share, place in zip(best.values.tolist(), best.indices, strict=True):
            head, dest, src = (int(i) for i in torch.unravel_index(place, edges.shape))
            found.append(HeavyEdge(layer, head, start + dest, src, share))
        found = _largest(found, k)
    return found


def _staying(flow: Flow, layer: int, k: int) -> list[HeavyEdge]:
    best = flow.residual_at[layer].topk(min(k, len(flow.tokens)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [HeavyEdge(layer, None, position, position, share) for position, share in pairs if share > 0]


def _largest(edges: list[HeavyEdge], k: int) -> list[HeavyEdge]:
    return sorted((edge for edge in edges if edge.share > 0), key=lambda edge: -edge.share)[:k]


def _least(found: list[HeavyEdge], k: int) -> float:
    """What an edge has to pass to be one of the k largest."""
    return found[-1].share if len(found) == k else 0.0


def heaviest_paths(flow: Flow | object, k: int = 10) -> HeavyPaths:
    """The k causal paths with the largest shares of the flow, exactly, the largest first; fewer where fewer exist.

    A path is a position per layer; heads and residual stream between the same two positions count as one step.
    Dynamic programming from the last token down: a share is a product over layers of the part of what reaches
    `dest` that comes from `src`. O(layer·pos²·k).

    Args:
        flow: what `flow` gave.
        k: how many, at least 1.

    Returns:
        A tuple of `HeavyPath`, each with a position per layer, the heads that move it, and its share of the flow.

    Raises:
        InputError: no flow, or a k that is no whole number of at least 1.
    """
    flow = _checked(flow, k)
    n = len(flow.tokens)
    # log share of the k best paths from here to the last token
    best = torch.full((n, k), -math.inf, dtype=torch.float64, device="cpu")
    best[-1, 0] = 0.0
    choices: list[tuple[Tensor, Tensor]] = []
    for layer in reversed(range(flow.n_layers)):
        best, choice = _one_layer_down(flow, layer, best)
        choices.append(choice)
    choices.reverse()
    logs, index = best.flatten().topk(min(k, best.numel()))
    found = []
    for log_share, place in zip(logs.tolist(), index.tolist(), strict=True):
        if math.isinf(log_share):
            break
        position, rank = divmod(place, k)
        positions = [position]
        for dests, ranks in choices:
            position, rank = int(dests[position, rank]), int(ranks[position, rank])
            positions.append(position)
        found.append(HeavyPath(tuple(positions), _leading_heads(flow, positions), math.exp(log_share)))
    largest = HeavyPaths(found)
    largest.flow = flow
    return largest


def _one_layer_down(
    flow: Flow, layer: int, best: Float[Tensor, "pos k"]
) -> tuple[Float[Tensor, "pos k"], tuple[Int[Tensor, "pos k"], Int[Tensor, "pos k"]]]:
    """The k best continuations of each position one layer below, and which (dest, rank) above each goes on with."""
    n, k = best.shape
    found = torch.full((n, k), -math.inf, dtype=torch.float64, device="cpu")
    dests, ranks = torch.zeros(n, k, dtype=torch.long, device="cpu"), torch.zeros(n, k, dtype=torch.long, device="cpu")
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        edges = flow.edges.edge_block(layer, start, stop).dense()
        log_part = (edges.log() + flow.log_below[layer, :stop]).log_softmax(-1)
        log_part = log_part.masked_fill(log_part.isnan(), -math.inf)  # rows that nothing reaches
        # Whoever goes on with one of the k best goes on to one of the k dests that are best in the first rank.
        few = min(k, stop - start)
        dest = (log_part + best[start:stop, :1]).T.topk(few).indices  # [src, few]
        candidates = log_part.T.gather(1, dest)[:, :, None] + best[start + dest]  # [src, few, k]
        found[:stop], index = torch.cat([found[:stop], candidates.flatten(1)], dim=1).topk(k)
        dests[:stop] = torch.cat([dests[:stop], (start + dest).repeat_interleave(k, 1)], dim=1).gather(1, index)
        ranks[:stop] = torch.cat([ranks[:stop], torch.arange(k, device="cpu").repeat(stop, few)], dim=1).gather(
            1, index
        )
    return found, (dests, ranks)


def _leading_heads(flow: Flow, positions: list[int]) -> tuple[int | None, ...]:
    steps = enumerate(pairwise(positions))
    return tuple(
        None if src == dest else int(flow.edges.edge_block(layer, dest, dest + 1).by_head().heads[:, 0, src].argmax())
        for layer, (src, dest) in steps
    )


def _checked(flow: Flow | object, k: int) -> Flow:
    if not isinstance(flow, Flow):
        raise InputError(f"expected a Flow, got a {type(flow).__name__}: call flow(trace) first")
    whole_number("k", k)
    return flow
