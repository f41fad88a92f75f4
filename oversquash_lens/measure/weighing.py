"""One kind of path: what its edges, nodes and constant weigh on a trace, and the profile that follows."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from oversquash_lens.measure.edges import Edges
from oversquash_lens.measure.paths import PathProfile, log_path_products
from oversquash_lens.record.trace import Trace


@dataclass(frozen=True)
class Weighing:
    """Edges, node gains and constant of one kind of path on one trace.

    A path's weight is the product of its edges and node gains; the sensitivity that the kind speaks of is
    C · (sum over paths)^power: power is 1 for bounds, 1/2 where edges are mean squares.
    """

    kind: str
    edges: Edges
    log_node_gain: Float[Tensor, "layer pos"] | None
    log_constant: float
    notes: tuple[str, ...]
    power: float = 1.0

    def profile(self, trace: Trace) -> PathProfile:
        """All path products down to every layer, as the sensitivity's logarithm."""
        log_sums = log_path_products(self.edges.rows, trace.n_positions, trace.n_layers, self.log_node_gain)
        return PathProfile(self.kind, trace.tokens, log_sums * self.power, self.log_constant, trace.about, self.notes)
