"""The edges and the whole paths of a flow that carry most."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oversquash_lens.errors import InputError, whole_number
from oversquash_lens.paths.flow import ROWS, Flow

BLOCK = 64  # positions whose edges are looked through at a time


@dataclass(frozen=True)
class HeavyEdge:
    """One edge of one layer: `head` moves `share` of the flow from position `src` to `dest`; None: it stays."""

    layer: int
    head: int | None
    dest: int
    src: int
    share: float

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class HeavyPath:
    """One causal path and its share of the flow.

    `positions[l]` is where it enters layer l (the last one: where it leaves the last layer). `heads[l]` is the head
    that brings most of that step where it goes to another position, None where the path stays; the share counts all
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

    def to_dict(self) -> dict:
        return {"positions": list(self.positions), "heads": list(self.heads), "share": self.share}


def heaviest_edges(flow: Flow | object, k: int = 20, *, moving: bool = True) -> tuple[HeavyEdge, ...]:
    """The k edges that carry the largest shares of the flow, the largest first; fewer where fewer carry any.

    `moving` leaves out all that stays at its position: the residual stream, and heads that look at themselves.
    """
    _check(flow, k)
    found: list[HeavyEdge] = []
    for layer in range(flow.n_layers):
        found = _largest(found + _edges_of(flow, layer, k, moving, _least(found, k)), k)
    return tuple(found)


def heaviest_by_layer(flow: Flow | object, k: int) -> tuple[tuple[HeavyEdge, ...], ...]:
    """Of each layer the k edges by which heads move most to another position, the largest first."""
    _check(flow, k)
    return tuple(tuple(_edges_of(flow, layer, k, moving=True, least=0.0)) for layer in range(flow.n_layers))


def _edges_of(flow: Flow, layer: int, k: int, moving: bool, least: float) -> list[HeavyEdge]:
    """The k largest edges of one layer that pass `least`.

    Exact, and quick where few positions receive most: no edge outweighs what its head brings to that position in all,
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


def heaviest_paths(flow: Flow | object, k: int = 10) -> tuple[HeavyPath, ...]:
    """The k causal paths with the largest shares of the flow, exactly, the largest first; fewer where fewer exist.

    A path is a position per layer; heads and residual stream between the same two positions count as one step.
    Dynamic programming from the last token down: a share is a product over layers of the part of what reaches
    `dest` that comes from `src`. O(layer·pos²·k).
    """
    _check(flow, k)
    n = len(flow.tokens)
    best = torch.full(
        (n, k), -math.inf, dtype=torch.float64, device="cpu"
    )  # log share of the k best from here to the last token
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
            position, rank = dests[position, rank].item(), ranks[position, rank].item()
            positions.append(position)
        found.append(HeavyPath(tuple(positions), _leading_heads(flow, positions), math.exp(log_share)))
    return tuple(found)


def _one_layer_down(
    flow: Flow, layer: int, best: Float[Tensor, "pos k"]
) -> tuple[Float[Tensor, "pos k"], tuple[Int[Tensor, "pos k"], Int[Tensor, "pos k"]]]:
    """The k best continuations of each position one layer below, and which (dest, rank) above each goes on with."""
    n, k = best.shape
    found = torch.full((n, k), -math.inf, dtype=torch.float64, device="cpu")
    dests, ranks = torch.zeros(n, k, dtype=torch.long, device="cpu"), torch.zeros(n, k, dtype=torch.long, device="cpu")
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        log_part = (flow.edges.rows(layer, start, stop).log() + flow.log_below[layer, :stop]).log_softmax(-1)
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
        None if src == dest else int(flow.edges.parts(layer, dest, dest + 1).heads[:, 0, src].argmax())
        for layer, (src, dest) in steps
    )


def _check(flow: Flow | object, k: int) -> None:
    if not isinstance(flow, Flow):
        raise InputError(f"expected a Flow, got a {type(flow).__name__}: call flow(trace) first")
    whole_number("k", k)
