"""The edges of causal paths, a block of rows at a time: as a whole, and split by head and residual stream.

Every kind of path (a bound's variant, the mean-field estimate) says through an `Edges` what one layer passes from
position `src` to position `dest`; what more than one kind takes from a trace stands here, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.record.trace import Trace

# Below this share of its own terms, a squared distance from Gram products has lost too many digits.
CANCELLED = 1e-3


# (layer, start, stop) -> attention of every head from positions start … stop-1 to positions 0 … stop-1
AttentionBlocks = Callable[[int, int, int], Float[Tensor, "head dest src"]]


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
    """One kind of path's edges into positions start … stop-1 from positions 0 … stop-1."""

    def rows(self, layer: int, start: int, stop: int) -> Float[Tensor, "dest src"]:
        """The whole edge, all heads and the residual stream together."""
        ...

    def parts(self, layer: int, start: int, stop: int) -> Parts:
        """The same, split by head and residual stream."""
        ...

    def received(
        self, layer: int, start: int, stop: int, column: Float[Tensor, "src source"]
    ) -> tuple[Float[Tensor, "dest src"], Float[Tensor, "head dest source"]]:
        """The whole edges, and what each head makes of `column`: heads · column."""
        ...


@dataclass(frozen=True)
class MixedEdges:
    """Edges that are attention weights times factors of head, source and destination, and what stays in the residual
    stream (`own`, one number per layer or position): all printed variants, and `calibrated`.
    """

    attention: AttentionBlocks
    head_factor: Float[Tensor, "layer head"]
    own: Float[Tensor, "layer pos_or_1"]
    src_factor: Float[Tensor, "layer pos"] | None = None
    dest_factor: Float[Tensor, "layer pos"] | None = None

    def rows(self, layer: int, start: int, stop: int) -> Float[Tensor, "dest src"]:
        return self._mixed(self.attention(layer, start, stop), layer, start)

    def parts(self, layer: int, start: int, stop: int) -> Parts:
        rows = self.attention(layer, start, stop)
        heads = rows * self.head_factor[layer].to(rows)[:, None, None]
        if self.src_factor is not None:
            heads *= self.src_factor[layer, :stop].to(rows)
        if self.dest_factor is not None:
            heads *= self.dest_factor[layer, start:stop, None].to(rows)
        return Parts(heads, self._own(layer, start, stop).to(rows).expand(stop - start))

    def received(
        self, layer: int, start: int, stop: int, column: Float[Tensor, "src source"]
    ) -> tuple[Float[Tensor, "dest src"], Float[Tensor, "head dest source"]]:
        rows = self.attention(layer, start, stop)
        column = column.to(rows)
        if self.src_factor is not None:
            column = column * self.src_factor[layer, :stop, None].to(rows)
        times = (rows.flatten(0, 1) @ column).view(*rows.shape[:2], -1)
        if self.dest_factor is not None:
            times *= self.dest_factor[layer, start:stop, None].to(rows)
        return self._mixed(rows, layer, start), times * self.head_factor[layer].to(rows)[:, None, None]

    def _mixed(self, rows: Float[Tensor, "head dest src"], layer: int, start: int) -> Float[Tensor, "dest src"]:
        edges = einsum(rows, self.head_factor[layer].to(rows), "head dest src, head -> dest src")
        if self.src_factor is not None:
            edges *= self.src_factor[layer, : edges.shape[1]].to(rows)
        stop = start + len(edges)
        if self.dest_factor is not None:
            edges *= self.dest_factor[layer, start:stop, None].to(rows)
        edges.diagonal(offset=start).add_(self._own(layer, start, stop).to(rows))
        return edges

    def _own(self, layer: int, start: int, stop: int) -> Float[Tensor, " dest_or_1"]:
        own = self.own[layer]
        return own if len(own) == 1 else own[start:stop]


class SplitEdges:
    """Edges whose parts are not cheaper than the whole: a subclass gives `parts`."""

    def received(
        self, layer: int, start: int, stop: int, column: Float[Tensor, "src source"]
    ) -> tuple[Float[Tensor, "dest src"], Float[Tensor, "head dest source"]]:
        parts = self.parts(layer, start, stop)
        return parts.together(start), parts.heads @ column.to(parts.heads)


def attention_rows(trace: Trace, layer: int, start: int, stop: int) -> Float[Tensor, "head dest src"]:
    """Rows start … stop-1, cut to the positions that they can see, upcast to at least float32."""
    rows = trace.attention[layer].rows(start, stop)[:, :, :stop]
    return rows.double() if trace.gains.value.dtype == torch.float64 else rows.float()


def per_head(grouped: Float[Tensor, "kv_head ..."], n_heads: int) -> Float[Tensor, "head ..."]:
    """Grouped keys or values repeated for the query heads that read them."""
    return grouped.repeat_interleave(n_heads // grouped.shape[0], dim=0)


def squared_output_distance(
    trace: Trace,
    layer: int,
    start: int,
    attention: Float[Tensor, "head dest src"],
    output_factor: Float[Tensor, "layer head rank d_head"],
) -> Float[Tensor, "head dest src"]:
    """‖o_k - ō_j‖² with o_k = v_k W_O and ō_j = Σ_k α_jk o_k: how much head output moves if j looks more at k.

    In the coordinates v_k Rᵀ that W_O's triangular factor gives, which have the lengths of o_k and are as few as v_k's,
    so it costs what attention itself costs. (A Gram matrix of W_O would lose what it passes on faintly.) Entries that
    cancel (a row that looks at one position only, repeated tokens) are computed again from the difference itself.
    """
    heads, _, stop = attention.shape
    output = per_head(trace.gains.value[layer], heads)[:, :stop].to(attention)
    output = output @ output_factor[layer].to(attention).mT
    mixed = attention @ output
    size = output.square().sum(-1)[:, None, :] + mixed.square().sum(-1)[:, :, None]
    squared = torch.baddbmm(size, mixed, output.mT, alpha=-2)
    cancelled = squared < CANCELLED * size
    cancelled &= torch.ones_like(cancelled[0]).tril(start)  # above the diagonal nothing is asked for
    for part in cancelled.nonzero().split(1 << 18):
        head, dest, src = part.unbind(1)
        squared[head, dest, src] = (output[head, src] - mixed[head, dest]).square().sum(-1)
    return squared.clamp(min=0)
