"""What one layer passes from position `src` to position `dest`: the families of edges that the kinds of path use.

`PathInputs` is what a row of the table in kinds.py may use of one recording, and makes the edges of each family.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.trace import Gains, Trace
from oversquash_lens.numerics import to_float64
from oversquash_lens.paths.blocks import AttentionBlock, EdgeBlock, HeadEdges

OUTPUT = "output_factor"  # of WeightGains: lengths of head outputs, a norm behind attention included
WORST_OUTPUT = "worst_output_factor"  # the same, where that norm's own Jacobian is bounded

EdgeRule = Callable[[AttentionBlock], EdgeBlock]


@dataclass(frozen=True)
class PathInputs:
    """What a kind of path may use of one recording.

    `beta_1`, `beta_2` (norms before attention and MLP, one number a layer) and `beta_3` (the final norm) are what the
    paper's assumption (i) replaces the norms by. `trace` None: attention patterns alone, as hooks leave them.
    """

    beta_1: Float[Tensor, " layer"]
    beta_2: Float[Tensor, " layer"]
    beta_3: float
    n_heads: int
    trace: Trace | None = None

    @classmethod
    def of_trace(cls, trace: Trace, beta: float | str = "measured") -> PathInputs:
        """`beta` "measured": per layer the geometric mean over positions of the norm's divisor; β₃ at the last token,
        over max|γ₃|. A number stands for all norms.
        """
        gains = trace.gains
        beta_1, beta_2 = geometric_mean(gains.attention_scale), geometric_mean(gains.mlp_scale)
        beta_3 = gains.final_scale / gains.final_gain_max
        if beta != "measured":
            beta_3 = float(beta)
            beta_1, beta_2 = torch.full_like(beta_1, beta_3), torch.full_like(beta_2, beta_3)
        return cls(beta_1, beta_2, beta_3, trace.about.n_heads, trace)

    @property
    def recorded(self) -> Trace:
        assert self.trace is not None, "patterns alone have no gains"
        return self.trace

    @property
    def gains(self) -> Gains:
        return self.recorded.gains

    @property
    def one(self) -> Float[Tensor, " layer"]:
        return torch.ones_like(self.beta_1)

    @property
    def sigma(self) -> Float[Tensor, " layer"]:
        """σ_ψ, the paper's Lipschitz constant of each layer's MLP, its norm left out."""
        return self.gains.mlp_sigma.cpu().double()

    @property
    def log_mlp_factors(self) -> Float[Tensor, " layer"]:
        """log(σ_ψ/β₂ + 1)."""
        return torch.log1p(self.sigma / self.beta_2)

    @property
    def log_lipschitz_nodes(self) -> Float[Tensor, "layer pos"] | None:
        """log(1 + lip_j), or None where the MLP lies beside attention and is part of the edge."""
        return None if self.recorded.parallel else torch.log1p(self.gains.mlp_lipschitz)

    @property
    def log_mean_square_nodes(self) -> Float[Tensor, "layer pos"] | None:
        return None if self.recorded.parallel else self.gains.node_gain.log()

    @property
    def log_final_gain(self) -> float:
        """log(max|γ₃|/r_n), the final norm at the last token."""
        return math.log(self.gains.final_gain_max / self.gains.final_scale)

    @property
    def log_root_mean_square_gain(self) -> float:
        """log(√(d mean γ₃²)/r_n)."""
        gains = self.gains
        return 0.5 * math.log(self.recorded.about.d_model * gains.final_gain_square / gains.final_scale**2)

    @property
    def sigma_note(self) -> str:
        gated = self.recorded.gated_mlp
        return "a gated MLP has no global Lipschitz constant: σ_ψ is the largest over this prompt" if gated else ""

    def mean_attention(self, factor: Float[Tensor, " layer"], residual: Float[Tensor, " layer"]) -> EdgeRule:
        """factor · mean_h α + residual · δ: all printed forms."""
        return partial(attention_edges, diagonal=residual[:, None], dest=(factor / self.n_heads)[:, None])

    def frozen_norms(self) -> EdgeRule:
        """δ + Σ_h α^h ‖OV_h‖₂/r (docs/theory.md, sections 3 and 10); an MLP beside attention belongs to δ."""
        gains = self.gains
        lipschitz = gains.mlp_lipschitz
        diagonal = 1 + lipschitz if self.recorded.parallel else torch.ones_like(lipschitz)
        return partial(
            attention_edges,
            diagonal=diagonal,
            dest=1 / gains.attention_post_scale,
            src=1 / gains.attention_scale,
            weight="ov_norm",
        )

    def full_norms(self) -> EdgeRule:
        """`frozen_norms` and the derivative of the attention weights."""
        factor = OUTPUT if self.gains.weights.worst_output_factor is None else WORST_OUTPUT
        return partial(full_edges, frozen=self.frozen_norms(), factor=factor)

    def mean_squares(self, *, attention_fixed: bool = False) -> EdgeRule:
        """Mean-square gains; `attention_fixed` leaves the softmax's derivative out."""
        trace = self.recorded
        return partial(
            mean_square_edges, parallel=trace.parallel, d_model=trace.about.d_model, attention_fixed=attention_fixed
        )


def geometric_mean(scale: Float[Tensor, "layer pos"]) -> Float[Tensor, " layer"]:
    return scale.cpu().double().log().mean(-1).exp()


# -- attention weights times factors: all printed kinds, rollout, and `calibrated` --------------------------


@dataclass(frozen=True, kw_only=True)
class AttentionEdges(EdgeBlock):
    """dest_j · Σ_h w_h α^h_jk · src_k + δ_jk diagonal_j; `weight` None weighs all heads 1."""

    attention: Float[Tensor, "head dest src"]
    weight: Float[Tensor, " head"] | None

    def by_head(self) -> HeadEdges:
        rows = self.attention
        heads = rows * self._factor[:, :, None].to(rows)
        if self.src is not None:
            heads *= self.src.to(rows)
        assert self.diagonal is not None
        return HeadEdges(heads, self.diagonal.to(rows))

    def head_products(self, column: Float[Tensor, "src source"]) -> Float[Tensor, "head dest source"]:
        rows = self.attention
        if self.src is not None:
            column = column * self.src[:, None].to(column)
        products = (rows.flatten(0, 1) @ column.to(rows)).view(*rows.shape[:2], -1)
        return products * self._factor[:, :, None].to(rows)

    @property
    def _factor(self) -> Float[Tensor, "head dest"]:
        dest = self.dest
        assert dest is not None
        weight = dest.new_ones(len(self.attention)) if self.weight is None else self.weight
        return torch.outer(weight.to(dest), dest)


def attention_edges(
    block: AttentionBlock,
    *,
    diagonal: Float[Tensor, "layer pos_or_1"],
    dest: Float[Tensor, "layer pos_or_1"],
    src: Float[Tensor, "layer pos"] | None = None,
    weight: str | None = None,
) -> AttentionEdges:
    """`diagonal`, `dest`: one number per layer or position; `weight` names the heads' factors in `WeightGains`."""

    def at_dest(factor: Tensor) -> Tensor:
        of_layer = factor[block.index]
        return of_layer.expand(block.stop - block.start) if len(of_layer) == 1 else of_layer[block.start : block.stop]

    return AttentionEdges(
        core=block.head_sum if weight is None else block.weighted_head_sum(weight),
        start=block.start,
        diagonal=at_dest(diagonal),
        dest=at_dest(dest),
        src=None if src is None else src[block.index, : block.stop],
        attention=block.attention,
        weight=None if weight is None else getattr(block.gains.weights, weight)[block.index],
    )


# -- the same with the derivative of the attention weights: `calibrated_full` --------------------------------


@dataclass(frozen=True, kw_only=True)
class FullEdges(EdgeBlock):
    """The frozen ones and the derivative of the attention weights (docs/theory.md, sections 3 and 10).

    `key_response` [head, dest, src] and `key_norm` [head] are what moving a key does, `query_side` what moving the
    query does: on the diagonal, as the query is the position's own.
    """

    frozen: EdgeBlock
    key_response: Float[Tensor, "head dest src"]
    key_norm: Float[Tensor, " head"]
    query_side: Float[Tensor, "head dest"]

    def by_head(self) -> HeadEdges:
        heads, residual = self.frozen.by_head()
        assert self.src is not None
        assert self.dest is not None
        key_side = self.key_response * self.key_norm.to(heads)[:, None, None]
        key_side *= self.src.to(key_side)
        key_side *= self.dest[:, None].to(key_side)
        heads = heads.add_(key_side)
        heads.diagonal(offset=self.start, dim1=1, dim2=2).add_(self.query_side.to(heads))
        return HeadEdges(heads, residual)


def full_edges(block: AttentionBlock, *, frozen: EdgeRule, factor: str) -> FullEdges:
    """`factor` names the triangular factors of W_O by which head outputs are measured."""
    gains, at = block.gains, (block.index, slice(block.start, block.stop))
    norms = to_float64(gains.weights.query_norm[block.index])[:, None]
    scale = to_float64(gains.query_scale[block.index][:, block.start : block.stop])
    query_side = to_float64(block.query_response(factor)) * norms
    query_side = query_side / (scale * to_float64(gains.attention_scale[at] * gains.attention_post_scale[at]))
    fixed = frozen(block)
    assert fixed.diagonal is not None
    return FullEdges(
        core=fixed.core + block.weighted_key_response(factor, "key_norm"),
        start=block.start,
        diagonal=fixed.diagonal + query_side.sum(0),
        dest=fixed.dest,
        src=fixed.src,
        frozen=fixed,
        key_response=block.key_response(factor),
        key_norm=gains.weights.key_norm[block.index],
        query_side=query_side,
    )


# -- mean squares in place of worst cases: `mean_field` ------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MeanSquareEdges(EdgeBlock):
    """Mean-square gain from position src to position dest through one layer's attention and residual stream.

    Values moved by attention (with the cross term between heads), the same interfering with the residual stream on
    the diagonal, and the softmax's derivative: through the keys, and on the diagonal through the query. `residual` is
    what the residual stream passes on alone; `key_side`, `query_side` None where attention weights are held fixed.
    """

    block: AttentionBlock
    residual: Float[Tensor, " dest"]
    key_side: Float[Tensor, "head dest"] | None
    query_side: Float[Tensor, "head dest"] | None

    def by_head(self) -> HeadEdges:
        """What heads add to or take from one another and the residual stream is shared out in proportion to what
        each would pass on alone, so no part is negative and a head that passes nothing has none.
        """
        block, rows = self.block, self.block.attention
        assert self.src is not None
        assert self.dest is not None
        edges, dest, src = self.dense().to(rows), self.dest.to(rows), self.src.to(rows)
        squares = block.gains.weights.ov_gram[block.index].to(rows).diagonal()
        alone = (rows * rows).mul_(squares[:, None, None])
        if self.key_side is not None:
            alone.addcmul_(block.key_response(OUTPUT).square(), self.key_side.to(rows)[:, :, None])
        alone.mul_(torch.outer(dest, src))
        if self.query_side is not None:
            alone.diagonal(block.start, dim1=1, dim2=2).add_(self.query_side.to(rows))
        residual = self.residual.to(rows)
        total = alone.sum(0)
        total.diagonal(offset=block.start).add_(residual)
        ratio = edges / total.clamp(min=torch.finfo(total.dtype).tiny)
        return HeadEdges(alone.mul_(ratio), residual * ratio.diagonal(offset=block.start))


def mean_square_edges(
    block: AttentionBlock, *, parallel: bool, d_model: int, attention_fixed: bool = False
) -> MeanSquareEdges:
    """`parallel`: an MLP beside attention belongs to what stays in the residual stream."""
    gains, positions = block.gains, slice(block.start, block.stop)
    # 1/ρ_j² of a norm behind attention, and 1/r_k²
    dest = to_float64(gains.attention_post_scale[block.index, positions]).square().reciprocal()
    src = to_float64(gains.attention_scale[block.index, : block.stop]).square().reciprocal()
    gain = to_float64(gains.node_gain[block.index, positions])
    residual = gain if parallel else torch.ones_like(gain)
    core, diagonal = block.value_mean_square, residual + 2 * _interference(block)
    key_side = query_side = None
    if not attention_fixed:
        key_side, query_side = _key_side(block, d_model), _query_side(block, d_model)
        core = core + block.weighted_squared_key_response(OUTPUT, key_side)
        diagonal = diagonal + query_side.sum(0)
    attention_part = to_float64(core.diagonal(offset=block.start)) * dest * src[block.start :]
    return MeanSquareEdges(
        core=core,
        start=block.start,
        diagonal=diagonal.maximum(-attention_part),  # the whole is a mean square, whatever rounding says
        dest=dest,
        src=src,
        block=block,
        residual=residual,
        key_side=key_side,
        query_side=query_side,
    )


def _interference(block: AttentionBlock) -> Float[Tensor, " dest"]:
    """Σ_h α^h_jj tr(OV_h)/d, over r_j and ρ_j: what a position reads of itself, along its residual stream."""
    weight, at = block.gains.weights.ov_trace[block.index], (block.index, slice(block.start, block.stop))
    scale = block.gains.attention_scale[at] * block.gains.attention_post_scale[at]
    return to_float64(weight.to(block.attention_diagonal) @ block.attention_diagonal) / to_float64(scale)


def _key_side(block: AttentionBlock, d_model: int) -> Float[Tensor, "head dest"]:
    """‖diag(γ)W_K q_j‖² / ‖q_j‖² / d: with the square of a key response, the key side's mean square."""
    at = (block.index, slice(None), slice(block.start, block.stop))
    turned, norm = to_float64(block.gains.key_pull[at]), to_float64(block.gains.query_norm[at])
    return torch.where(norm > 0, turned / norm, 0.0).square() / d_model


def _query_side(block: AttentionBlock, d_model: int) -> Float[Tensor, "head dest"]:
    """How position j moves its own row of attention: its scores move as q_j along keys that lie apart."""
    gains, positions = block.gains, slice(block.start, block.stop)
    square, scale = gains.weights.query_square[block.index], gains.weights.score_scale[block.index]
    divisors = gains.attention_scale[block.index, positions] * gains.attention_post_scale[block.index, positions]
    divisors = to_float64(divisors) * to_float64(gains.query_scale[block.index, :, positions])
    moved = to_float64(block.value_deviation(OUTPUT)) * to_float64(block.key_deviation)
    per_direction = to_float64(square) * to_float64(scale).square() / (gains.key.shape[-1] * d_model)
    return moved * per_direction[:, None] / divisors.square()
