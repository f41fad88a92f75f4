"""One kind of path: what its edges, nodes and constant weigh on a trace, and the profile that follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.trace import Trace
from oversquash_lens.paths.block import Block, Layer, Room
from oversquash_lens.paths.edges import Edges, Parts
from oversquash_lens.paths.paths import PathKind, PathProfile, log_path_sums, without_autocast


@dataclass(frozen=True)
class Weighing:
    """Edges, node gains and constant of one kind of path on one trace.

    A path's weight is the product of its edges and node gains; the sensitivity that the kind speaks of is
    C · (sum over paths)^power: power is 1 for bounds, 1/2 where edges are mean squares.
    """

    kind: str
    trace: Trace
    edges: Edges
    log_node_gain: Float[Tensor, "layer pos"] | None
    log_constant: float
    notes: tuple[str, ...]
    power: float = 1.0

    def profile(self) -> PathProfile:
        """All path products down to every layer, as the sensitivity's logarithm."""
        return weigh([self])[0]

    def rows(self, layer: int, start: int, stop: int) -> Float[Tensor, "dest src"]:
        """The whole edges into positions start … stop-1 from positions 0 … stop-1, in float64."""
        with without_autocast():
            return self.edges.factored(Layer.of(self.trace, layer).block(start, stop)).dense()

    def parts(self, layer: int, start: int, stop: int) -> Parts:
        """The same, split by head and residual stream."""
        with without_autocast():
            return self.edges.parts(Layer.of(self.trace, layer).block(start, stop))


def weigh(weighings: Sequence[Weighing]) -> list[PathProfile]:
    """The profiles of several kinds of path on one trace, from one sweep: attention is computed once for all."""
    trace = weighings[0].trace
    assert all(each.trace is trace for each in weighings)
    kinds = [PathKind(each.edges.factored, each.log_node_gain) for each in weighings]
    sums = log_path_sums(layer_blocks(trace), kinds, trace.n_positions, trace.n_layers)
    return [
        PathProfile(each.kind, trace.tokens, found * each.power, each.log_constant, trace.about, each.notes)
        for each, found in zip(weighings, sums, strict=True)
    ]


def layer_blocks(trace: Trace) -> Callable[[int], Iterator[Block]]:
    """Layer -> its blocks, one after another in the same memory."""
    room = Room()
    return lambda layer: Layer.of(trace, layer, room).blocks()
