"""One layer's attention in blocks of rows, and a block of edges: attention between factors, with its products.

Whatever is asked of an attention block is computed when first asked for and shared by all kinds of path that ask
again, so a sweep for every bound and the estimate reads the attention once. A block is small enough to stay in a
processor's cache, which is worth more than any saved multiplication.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.attention import AttentionRows, RecomputedAttention, per_head
from oversquash_lens.capture.trace import Gains, Trace
from oversquash_lens.numerics import to_float64

# Numbers in a block of [head, dest, src]; an accelerator wants more of them at a time.
ENTRIES = {"cpu": 1 << 22}
ENTRIES_ELSEWHERE = 1 << 26
MOST_ROWS = 128
# Below this share of its own terms, a squared distance from products has lost too many digits.
CANCELLED = 1e-3


class Buffers:
    """Memory that the blocks of one sweep use one after another: none is asked for, and none given back, per block."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        size = torch.Size(shape).numel()
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size or kept.dtype != like.dtype or kept.device != like.device:
            kept = self._kept[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return kept[:size].view(shape)


class HeadOutputs(NamedTuple):
    """Vectors whose product is ‖o_k - ō_j‖², o_k = v_k W_O and ō_j = Σ_k α_jk o_k, and the squares of the latter.

    In the coordinates v_k Rᵀ that W_O's triangular factor gives, which have the lengths of o_k and are as few as
    v_k's, so a distance costs what a score does. (A Gram matrix of W_O would lose what it passes on faintly.)
    """

    source: Float[Tensor, "head pos rank_2"]  # o_k, ‖o_k‖², 1
    mean: Float[Tensor, "head pos rank_2"]  # -2 ō_j, 1, ‖ō_j‖²
    mean_square: Float[Tensor, "head pos"]


class LayerAttention:
    """One layer of a trace: its attention, and what all blocks of its rows share.

    `gains` None: patterns alone, enough for what attention weights and given numbers make.
    """

    def __init__(
        self, attention: AttentionRows, gains: Gains | None, index: int, buffers: Buffers | None = None
    ) -> None:
        self.attention, self.index, self.buffers, self._gains = attention, index, buffers, gains
        self._outputs: dict[str, HeadOutputs] = {}

    @classmethod
    def of(cls, trace: Trace, index: int, buffers: Buffers | None = None) -> LayerAttention:
        return cls(trace.attention[index], trace.gains, index, buffers)

    @property
    def gains(self) -> Gains:
        assert self._gains is not None, "patterns alone have no gains"
        return self._gains

    @property
    def in_float64(self) -> bool:
        return self._gains is not None and self._gains.value.dtype == torch.float64

    def block(self, start: int, stop: int) -> AttentionBlock:
        return AttentionBlock(self, start, stop)

    def blocks(self) -> Iterator[AttentionBlock]:
        """All rows; a block's numbers are lost when the next one is made, if there are `buffers`."""
        first = self.attention.causal(0, 1)
        most = ENTRIES.get(first.device.type, ENTRIES_ELSEWHERE)
        start, n = 0, self.attention.n_positions
        while start < n:
            rows = min(MOST_ROWS, most // (len(first) * min(n, start + MOST_ROWS)))
            stop = min(n, start + max(1, rows))
            yield self.block(start, stop)
            start = stop

    @cached_property
    def value_root(self) -> Float[Tensor, "root head"]:
        """C with CᵀC = tr(OV_h OV_h'ᵀ)/d, so that a mean square is a sum of squares, never below 0."""
        values, vectors = torch.linalg.eigh(self.gains.weights.ov_gram[self.index].cpu())
        return values.clamp(min=0).sqrt()[:, None] * vectors.mT

    @cached_property
    def key_is_normalised(self) -> bool:
        return bool((self.gains.key_scale[self.index] != 1).any())

    @cached_property
    def key_square(self) -> Float[Tensor, "head pos"]:
        return self._per_head(self.gains.key[self.index].square().sum(-1))

    def per_position(self, name: str) -> Float[Tensor, "head pos"]:
        """One of the gains that are counted per key/value head or per head, for every head."""
        return self._per_head(getattr(self.gains, name)[self.index])

    def _per_head(self, values: Float[Tensor, "group pos"]) -> Float[Tensor, "head pos"]:
        return per_head(values, self.gains.query_norm.shape[1])

    def outputs(self, factor: str) -> HeadOutputs:
        """`factor` names the triangular factors of W_O in `WeightGains`."""
        if factor not in self._outputs:
            weight = getattr(self.gains.weights, factor)[self.index]
            value = per_head(self.gains.value[self.index], len(weight))
            weight = weight.to(value)
            output = value @ weight.mT
            mixed = self.attention.mixed
            mean = self._averaged(output) if mixed is None else mixed.to(value) @ weight.mT
            square, mean_square = (x.square().sum(-1, keepdim=True) for x in (output, mean))
            one = torch.ones_like(square)
            source, mean = torch.cat([output, square, one], -1), torch.cat([-2 * mean, one, mean_square], -1)
            self._outputs[factor] = HeadOutputs(source, mean, mean_square[..., 0])
        return self._outputs[factor]

    def _averaged(self, output: Float[Tensor, "head pos rank"]) -> Float[Tensor, "head pos rank"]:
        """Σ_k α_jk o_k, where nobody else has computed it."""
        return torch.cat([block.attention @ output[:, : block.stop] for block in self.blocks()], dim=1)


class AttentionBlock:
    """One layer's rows start … stop-1, cut to the positions 0 … stop-1 that they can see."""

    def __init__(self, layer: LayerAttention, start: int, stop: int) -> None:
        self.layer, self.start, self.stop = layer, start, stop
        self._sums: dict[str, Tensor] = {}
        self._responses: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def index(self) -> int:
        return self.layer.index

    @property
    def gains(self) -> Gains:
        return self.layer.gains

    @cached_property
    def attention(self) -> Float[Tensor, "head dest src"]:
        """α, upcast to at least float32, in one piece."""
        kept, buffers, out = self.layer.attention, self.layer.buffers, None
        if buffers is not None and isinstance(kept, RecomputedAttention):
            work = torch.promote_types(kept.query.dtype, torch.float32)
            shape = (kept.query.shape[0], self.stop - self.start, self.stop)
            out = buffers.take("attention", shape, kept.query.new_empty(0, dtype=work))
        rows = kept.causal(self.start, self.stop, out)
        exact = self.layer.in_float64
        return rows.to(torch.float64 if exact else torch.promote_types(rows.dtype, torch.float32)).contiguous()

    @property
    def attention_diagonal(self) -> Float[Tensor, "head dest"]:
        """α_jj."""
        return self.attention.diagonal(offset=self.start, dim1=1, dim2=2)

    @cached_property
    def head_sum(self) -> Float[Tensor, "dest src"]:
        """Σ_h α, in float64: most kinds of path ask for it."""
        return to_float64(self._combined(self.attention, torch.ones(len(self.attention), device="cpu")))

    def weighted_head_sum(self, weight: str) -> Float[Tensor, "dest src"]:
        """Σ_h w_h α, w one of the `WeightGains`."""
        if weight not in self._sums:
            self._sums[weight] = self._combined(self.attention, getattr(self.gains.weights, weight)[self.index])
        return self._sums[weight]

    @cached_property
    def value_mean_square(self) -> Float[Tensor, "dest src"]:
        """Σ_hh' α^h α^h' tr(OV_h OV_h'ᵀ)/d: the mean square of what values pass on."""
        rows, roots = self.attention.transpose(0, 1), self.layer.value_root.to(self.attention)
        out = self._buffer("squared", (len(rows), len(roots), self.stop), rows)
        return torch.bmm(roots.expand(len(rows), -1, -1), rows, out=out).square_().sum(1)

    def key_response(self, factor: str) -> Float[Tensor, "head dest src"]:
        """α_jk ‖o_k - ō_j‖ · ‖q_j‖ scale / (divisor of the key's own norm): how far head output at j moves with the
        direction of key k."""
        return self._respond(factor)[0]

    def query_response(self, factor: str) -> Float[Tensor, "head dest"]:
        """Σ_k α_jk ‖o_k - ō_j‖ · ‖k_k‖ scale: how far head output at j moves with its query."""
        return self._respond(factor)[1]

    def value_deviation(self, factor: str) -> Float[Tensor, "head dest"]:
        """Σ_k α_jk² ‖o_k - ō_j‖²: the mean square of head output at j if its scores are moved, each by itself."""
        return self._respond(factor)[2]

    @cached_property
    def key_deviation(self) -> Float[Tensor, "head dest"]:
        """Σ_k α_jk ‖k_k - k̄_j‖², k̄_j = Σ_k α_jk k_k: how differently the keys that j attends to follow its query."""
        rows, keys = self.attention, self.gains.key[self.index][:, : self.stop].to(self.attention)
        grouped = rows.reshape(len(keys), -1, self.stop)  # heads that share keys: as one
        mean = (grouped @ keys).view(*rows.shape[:2], -1)
        square = self.layer.key_square[:, : self.stop].to(rows)
        return (_row_sums(rows, square) - mean.square().sum(-1)).clamp(min=0)

    def weighted_key_response(self, factor: str, weight: str) -> Float[Tensor, "dest src"]:
        """Σ_h w_h · key response, w one of the `WeightGains`."""
        return self._combined(self.key_response(factor), getattr(self.gains.weights, weight)[self.index])

    def weighted_squared_key_response(
        self, factor: str, weight: Float[Tensor, "head dest"]
    ) -> Float[Tensor, "dest src"]:
        """Σ_h w_h · key response²."""
        response = self.key_response(factor)
        return self._combined(torch.square(response, out=self._buffer("squared", response.shape, response)), weight)

    def _respond(self, factor: str) -> tuple[Tensor, Tensor, Tensor]:
        if factor not in self._responses:
            moved = self._squared_distance(factor).sqrt_().mul_(self.attention)
            deviation = torch.linalg.vector_norm(moved, dim=-1).square()
            scale = self.gains.weights.score_scale[self.index].abs().to(moved)
            keys = self.layer.per_position("key_norm")[:, : self.stop].to(moved)
            by_query = scale * _row_sums(moved, keys)
            queries = self.gains.query_norm[self.index][:, self.start : self.stop].to(moved)
            moved.mul_((queries * scale)[:, :, None])
            if self.layer.key_is_normalised:
                moved.div_(self.layer.per_position("key_scale")[:, None, : self.stop].to(moved))
            self._responses[factor] = moved, by_query, deviation
        return self._responses[factor]

    def _squared_distance(self, factor: str) -> Float[Tensor, "head dest src"]:
        """‖o_k - ō_j‖²: how much head output moves if j attends more to k.

        Entries that cancel (a row that attends to one position only, repeated tokens) are computed again from the
        difference itself.
        """
        outputs, attention = self.layer.outputs(factor), self.attention
        source = outputs.source[:, : self.stop].to(attention)
        mean = outputs.mean[:, self.start : self.stop].to(attention)
        squared = torch.bmm(mean, source.mT, out=self._buffer(f"moved {factor}", attention.shape, attention))
        own = outputs.mean_square[:, self.start : self.stop].to(squared)
        # Where o_k is as near as that, ‖o_k‖ is nearly ‖ō_j‖: a row without such an entry is told by its smallest.
        suspects = (squared.amin(-1) < 2.2 * CANCELLED * own).nonzero()
        for part in suspects.split(max(1, ENTRIES["cpu"] // self.stop)):
            self._recompute_cancelled(squared, source, mean, part)
        return squared.clamp_(min=0)

    def _recompute_cancelled(self, squared: Tensor, source: Tensor, mean: Tensor, suspects: Tensor) -> None:
        """Distances of cancelled entries in the rows (head, dest) that have some."""
        head, dest = suspects.unbind(1)
        size = source[..., -2][head] + mean[..., -1][head, dest][:, None]
        cancelled = squared[head, dest] < CANCELLED * size
        cancelled &= torch.arange(self.stop, device=dest.device) <= (dest + self.start)[:, None]
        for part in cancelled.nonzero().split(1 << 16):
            h, j, src = head[part[:, 0]], dest[part[:, 0]], part[:, 1]
            squared[h, j, src] = (source[h, src, :-2] + mean[h, j, :-2] / 2).square().sum(-1)

    def _combined(self, maps: Float[Tensor, "head dest src"], weight: Float[Tensor, "head ..."]) -> Tensor:
        """Σ_h w_h maps_h, a product for each row: so small a left factor would keep one core busy, not all."""
        weight = weight.to(maps).reshape(len(maps), -1).T.contiguous()[:, None]
        return torch.bmm(weight.expand(maps.shape[1], -1, -1), maps.transpose(0, 1))[:, 0]

    def _buffer(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        buffers = self.layer.buffers
        return like.new_empty(shape) if buffers is None else buffers.take(name, tuple(shape), like)


class HeadEdges(NamedTuple):
    """One layer's edges split up, none negative: edge(j, k) = Σ_h heads[h, j, k] + δ_jk residual[j]."""

    heads: Float[Tensor, "head dest src"]
    residual: Float[Tensor, " dest"]

    def total(self, start: int) -> Float[Tensor, "dest src"]:
        """Their sum; rows are the positions from `start` on."""
        edges = self.heads.sum(0)
        edges.diagonal(offset=start).add_(self.residual)
        return edges


@dataclass(frozen=True)
class EdgeBlock:
    """One block of an edge matrix, none negative: edge(j, k) = dest_j · core(j, k) · src_k + δ_jk diagonal_j.

    Rows are the positions from `start` on. `core` is as large as the block and comes in the dtype that it was computed
    in; the factors are vectors, so in float64 they cost nothing. None stands for ones, for `diagonal` for zeros.
    Kinds of edge that know their heads override `by_head`; a block of a sweep is used before the next one is made.
    """

    core: Float[Tensor, "dest src"]
    start: int
    diagonal: Float[Tensor, " dest"] | None = None
    dest: Float[Tensor, " dest"] | None = None
    src: Float[Tensor, " src"] | None = None

    @property
    def positions(self) -> slice:
        return slice(self.start, self.start + len(self.core))

    def row_product(self, row: Float[Tensor, " pos"]) -> Float[Tensor, " src"]:
        """row · edges, of a row over all positions; float64, on the CPU."""
        row = row[self.positions]
        product = _row_times(row if self.dest is None else row * _like(self.dest, row), self.core)
        if self.src is not None:
            product *= _like(self.src, product)
        if self.diagonal is not None:
            product[self.positions] += row * _like(self.diagonal, row)
        return product

    def column_product(self, column: Float[Tensor, "pos source"]) -> Float[Tensor, "dest source"]:
        """edges · column, of columns over all positions; float64, on the CPU."""
        core = to_float64(self.core)
        seen = column[: core.shape[1]]
        seen = seen if self.src is None else seen * _like(self.src, seen)[:, None]
        product = (core @ seen.to(core)).cpu()
        if self.dest is not None:
            product *= _like(self.dest, product)[:, None]
        if self.diagonal is not None:
            product += column[self.positions] * _like(self.diagonal, column)[:, None]
        return product

    def head_products(self, column: Float[Tensor, "src source"]) -> Float[Tensor, "head dest source"]:
        """What each head makes of `column`: heads · column."""
        heads = self.by_head().heads
        return heads @ column.to(heads)

    def dense(self) -> Float[Tensor, "dest src"]:
        """The edges themselves, in float64, on the CPU."""
        edges = to_float64(self.core).cpu().clone()
        if self.dest is not None:
            edges *= _like(self.dest, edges)[:, None]
        if self.src is not None:
            edges *= _like(self.src, edges)
        if self.diagonal is not None:
            edges.diagonal(offset=self.start).add_(_like(self.diagonal, edges))
        return edges

    def by_head(self) -> HeadEdges:
        """The edges split by head and residual stream; of a bare matrix, as one head."""
        edges = self.dense()
        return HeadEdges(edges[None], edges.new_zeros(len(edges)))


def _row_sums(maps: Float[Tensor, "head dest src"], weight: Float[Tensor, "head src"]) -> Float[Tensor, "head dest"]:
    """Σ_k w_k maps_jk: one product a head, since a batch of matrices times vectors is ten times slower."""
    return torch.stack([torch.mv(*each) for each in zip(maps, weight, strict=True)])


def _row_times(row: Float[Tensor, " dest"], core: Float[Tensor, "dest src"]) -> Float[Tensor, " src"]:
    core = to_float64(core)
    return torch.mv(core.mT, row.to(core)).cpu()


def _like(factor: Tensor, vector: Tensor) -> Tensor:
    return factor.to(vector.device, vector.dtype)
