"""The edges of causal paths, a block of rows at a time: as a whole, and split by head and residual stream.

Every kind of path (a bound's variant, the mean-field estimate) says through an `Edges` what one layer passes from
position `src` to position `dest`; what more than one kind takes from a trace a `Block` computes once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.paths.block import Block
from oversquash_lens.paths.factored import Factored


class Parts(NamedTuple):
    """One layer's edges split up, none negative: edge(j, k) = Σ_h heads[h, j, k] + δ_jk own[j]."""

    heads: Float[Tensor, "head dest src"]
    own: Float[Tensor, " dest"]

    def together(self, start: int) -> Float[Tensor, "dest src"]:
        edges = self.heads.sum(0)
        edges.diagonal(offset=start).add_(self.own)
        return edges


@runtime_checkable
class Edges(Protocol):
    """One kind of path's edges through a block."""

    def factored(self, block: Block) -> Factored:
        """The whole edge, all heads and the residual stream together."""
        ...

    def parts(self, block: Block) -> Parts:
        """The same, split by head and residual stream."""
        ...

    def brought(self, block: Block, column: Float[Tensor, "src source"]) -> Float[Tensor, "head dest source"]:
        """What each head makes of `column`: heads · column."""
        ...


@dataclass(frozen=True)
class MixedEdges:
    """Edges that are attention weights times factors of head, source and destination, and what stays in the residual
    stream (`own`, one number per layer or position): all printed variants, and `calibrated`.

    `weight` names the heads' factors in `WeightGains`; without it all heads weigh 1.
    """

    own: Float[Tensor, "layer pos_or_1"]
    dest_factor: Float[Tensor, "layer pos_or_1"]
    src_factor: Float[Tensor, "layer pos"] | None = None
    weight: str | None = None

    def factored(self, block: Block) -> Factored:
        core = block.even if self.weight is None else block.summed(self.weight)
        src = None if self.src_factor is None else self.src_factor[block.index, : block.stop]
        return Factored(core, block.start, self._at_dest(self.own, block), self._at_dest(self.dest_factor, block), src)

    def parts(self, block: Block) -> Parts:
        rows = block.attention
        heads = rows * self._factor(block)[:, :, None].to(rows)
        if self.src_factor is not None:
            heads *= self.src_factor[block.index, : block.stop].to(rows)
        return Parts(heads, self._at_dest(self.own, block).to(rows))

    def brought(self, block: Block, column: Float[Tensor, "src source"]) -> Float[Tensor, "head dest source"]:
        rows = block.attention
        if self.src_factor is not None:
            column = column * self.src_factor[block.index, : block.stop, None].to(column)
        times = (rows.flatten(0, 1) @ column.to(rows)).view(*rows.shape[:2], -1)
        return times * self._factor(block)[:, :, None].to(rows)

    def _factor(self, block: Block) -> Float[Tensor, "head dest"]:
        dest, heads = self._at_dest(self.dest_factor, block), len(block.attention)
        weight = dest.new_ones(heads) if self.weight is None else getattr(block.gains.weights, self.weight)[block.index]
        return torch.outer(weight.to(dest), dest)

    def _at_dest(self, factor: Float[Tensor, "layer pos_or_1"], block: Block) -> Float[Tensor, " dest"]:
        of_layer = factor[block.index]
        return of_layer.expand(block.stop - block.start) if len(of_layer) == 1 else of_layer[block.start : block.stop]


class SplitEdges:
    """Edges whose heads are known from their parts only: a subclass gives `parts`."""

    def brought(self, block: Block, column: Float[Tensor, "src source"]) -> Float[Tensor, "head dest source"]:
        heads = self.parts(block).heads
        return heads @ column.to(heads)
