"""The mean-field path sensitivity: what the last token hears, estimated from one forward pass.

The bound multiplies worst cases, so on a deep model it says nothing about the truth. Here every edge and node
carries the mean square of its gain instead, as in mean-field signal propagation: the sum over paths stays, the
sizes become those that a typical perturbation meets (docs/theory.md, section 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.trace import Trace, check_trace
from oversquash_lens.numerics import to_float64
from oversquash_lens.paths.block import Block
from oversquash_lens.paths.edges import Parts, SplitEdges
from oversquash_lens.paths.factored import Factored
from oversquash_lens.paths.paths import PathProfile
from oversquash_lens.paths.weighing import Weighing

FACTOR = "output_factor"  # of WeightGains: lengths of head outputs, a norm behind attention included


def mean_field_sensitivity(trace: Trace) -> PathProfile:
    """Estimate of ‖∂y_n/∂v_i‖_F for every position i, and of ‖∂y_n/∂v_i⁽ˡ⁾‖_F at every layer.

    `values` = sqrt(d_model · S), S the sum over causal paths of the product of mean-square gains; the same units
    as `measured_sensitivity`, no bound. With `log_constant` added, row l of `log_by_layer` estimates the log of
    the sensitivity to the residual entering layer l. O(layer·pos²), no backward pass.
    """
    check_trace(trace)
    return mean_field_weighing(trace).profile()


def mean_field_weighing(trace: Trace, *, attention_fixed: bool = False) -> Weighing:
    """Mean-square edges and node gains of this trace; their path sum is S. `attention_fixed` leaves the softmax's
    derivative out, as if attention weights were constants.
    """
    gains = trace.gains
    log_constant = 0.5 * math.log(trace.about.d_model * gains.final_gain_square / gains.final_scale**2)
    notes = ["an estimate from one forward pass, not a bound", f"node gains from {gains.node_probes} probes"]
    if trace.support["mean_field"].why:
        notes.append(trace.support["mean_field"].why)
    if trace.about.final_gain == "unknown":
        notes.append("the final gain was folded into the unembedding and is not known: y lacks it")
    log_gain = None if trace.parallel else gains.node_gain.log()
    edges = MeanSquareEdges(trace.parallel, trace.about.d_model, attention_fixed)
    return Weighing("mean_field", trace, edges, log_gain, log_constant, tuple(notes), power=0.5)


@dataclass(frozen=True)
class MeanSquareEdges(SplitEdges):
    """Mean-square gain from position src to position dest through one layer's attention and residual stream.

    Values moved by attention (with the cross term between heads), the same interfering with the residual stream on
    the diagonal, and the softmax's derivative: through the keys, and on the diagonal through the query.
    """

    parallel: bool
    d_model: int
    attention_fixed: bool = False

    def factored(self, block: Block) -> Factored:
        dest, src = self._divisors(block)
        core, own = block.quadratic, self._own(block) + 2 * self._interference(block)
        if not self.attention_fixed:
            core = core + block.summed_squared_pull(FACTOR, self._key_side(block))
            own = own + self._query_side(block).sum(0)
        itself = to_float64(core.diagonal(offset=block.start)) * dest * src[block.start :]
        return Factored(core, block.start, own.maximum(-itself), dest, src)  # a mean square, whatever rounding says

    def parts(self, block: Block) -> Parts:
        """What heads add to or take from one another and the residual stream is shared out in proportion to what
        each would pass on alone, so no part is negative and a head that passes nothing has none.
        """
        rows, weights = block.attention, block.gains.weights
        edges = self.factored(block).dense().to(rows)
        dest, src = (factor.to(rows) for factor in self._divisors(block))
        alone = (rows * rows).mul_(weights.ov_gram[block.index].to(rows).diagonal()[:, None, None])
        if not self.attention_fixed:
            alone.addcmul_(block.pull(FACTOR).square(), self._key_side(block).to(rows)[:, :, None])
        alone.mul_(torch.outer(dest, src))
        if not self.attention_fixed:
            alone.diagonal(block.start, dim1=1, dim2=2).add_(self._query_side(block).to(rows))
        own = self._own(block).to(rows)
        total = alone.sum(0)
        total.diagonal(offset=block.start).add_(own)
        ratio = edges / total.clamp(min=torch.finfo(total.dtype).tiny)
        return Parts(alone.mul_(ratio), own * ratio.diagonal(offset=block.start))

    def _own(self, block: Block) -> Float[Tensor, " dest"]:
        """What stays in the residual stream: an MLP beside attention belongs to it."""
        gain = to_float64(block.gains.node_gain[block.index, block.start : block.stop])
        return gain if self.parallel else torch.ones_like(gain)

    def _interference(self, block: Block) -> Float[Tensor, " dest"]:
        """Σ_h α^h_jj tr(OV_h)/d, over r_j and ρ_j: what a position reads of itself, along its residual stream."""
        weight, at = block.gains.weights.ov_trace[block.index], (block.index, slice(block.start, block.stop))
        scale = block.gains.attention_scale[at] * block.gains.attention_post_scale[at]
        return to_float64(weight.to(block.looking_at_itself) @ block.looking_at_itself) / to_float64(scale)

    def _divisors(self, block: Block) -> tuple[Float[Tensor, " dest"], Float[Tensor, " src"]]:
        """1/ρ_j² of a norm behind attention, and 1/r_k²."""
        post = to_float64(block.gains.attention_post_scale[block.index, block.start : block.stop])
        scale = to_float64(block.gains.attention_scale[block.index, : block.stop])
        return post.square().reciprocal(), scale.square().reciprocal()

    def _key_side(self, block: Block) -> Float[Tensor, "head dest"]:
        """‖diag(γ)W_K q_j‖² / ‖q_j‖² / d: with the square of a pull, the key side's mean square."""
        at = (block.index, slice(None), slice(block.start, block.stop))
        pull, norm = to_float64(block.gains.key_pull[at]), to_float64(block.gains.query_norm[at])
        return torch.where(norm > 0, pull / norm, 0.0).square() / self.d_model

    def _query_side(self, block: Block) -> Float[Tensor, "head dest"]:
        """How position j moves its own row of attention: its scores move as q_j along keys that lie apart."""
        gains, positions = block.gains, slice(block.start, block.stop)
        square, scale = gains.weights.query_square[block.index], gains.weights.score_scale[block.index]
        divisors = gains.attention_scale[block.index, positions] * gains.attention_post_scale[block.index, positions]
        divisors = to_float64(divisors) * to_float64(gains.query_scale[block.index, :, positions])
        moved = to_float64(block.reached(FACTOR)) * to_float64(block.key_spread)
        per_direction = to_float64(square) * to_float64(scale).square() / (gains.key.shape[-1] * self.d_model)
        return moved * per_direction[:, None] / divisors.square()
