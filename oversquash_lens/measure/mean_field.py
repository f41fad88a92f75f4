"""The mean-field path sensitivity: what the last token hears, estimated from one forward pass.

The bound multiplies worst cases, so on a deep model it says nothing about the truth. Here every edge and node
carries the mean square of its gain instead, as in mean-field signal propagation: the sum over paths stays, the
sizes become those that a typical perturbation meets (docs/theory.md, section 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.measure.edges import Parts, SplitEdges, attention_rows, per_head, squared_output_distance
from oversquash_lens.measure.paths import PathProfile
from oversquash_lens.measure.weighing import Weighing
from oversquash_lens.record.trace import Trace, check_trace


def mean_field_sensitivity(trace: Trace) -> PathProfile:
    """Estimate of ‖∂y_n/∂v_i‖_F for every position i, and of ‖∂y_n/∂v_i⁽ˡ⁾‖_F at every layer.

    `values` = sqrt(d_model · S), S the sum over causal paths of the product of mean-square gains; the same units
    as `measured_sensitivity`, no bound. With `log_constant` added, row l of `log_by_layer` estimates the log of
    the sensitivity to the residual entering layer l. O(layer·pos²), no backward pass.
    """
    check_trace(trace)
    return mean_field_weighing(trace).profile(trace)


def mean_field_weighing(trace: Trace) -> Weighing:
    """Mean-square edges and node gains of this trace; their path sum is S."""
    gains = trace.gains
    log_constant = 0.5 * math.log(trace.about.d_model * gains.final_gain_square / gains.final_scale**2)
    notes = ["an estimate from one forward pass, not a bound", f"node gains from {gains.node_probes} probes"]
    if trace.support["mean_field"].why:
        notes.append(trace.support["mean_field"].why)
    if trace.about.final_gain == "unknown":
        notes.append("the final gain was folded into the unembedding and is not known: y lacks it")
    log_gain = None if trace.parallel else gains.node_gain.log()
    return Weighing("mean_field", MeanSquareEdges(trace), log_gain, log_constant, tuple(notes), power=0.5)


@dataclass(frozen=True)
class MeanSquareEdges(SplitEdges):
    """Mean-square gain from position src to position dest through one layer's attention and residual stream.

    Three terms: values moved by attention (with the cross term between heads), the same interfering with the
    residual stream on the diagonal, and the softmax's derivative through the keys.
    """

    trace: Trace

    def rows(self, layer: int, start: int, stop: int) -> Float[Tensor, "dest src"]:
        rows = attention_rows(self.trace, layer, start, stop)
        return self._whole(
            rows, self._key_side(rows, layer, start).sum(0), self._divisor(rows, layer, start), layer, start
        )

    def parts(self, layer: int, start: int, stop: int) -> Parts:
        """What heads add to or take from one another and the residual stream is shared out in proportion to what
        each would pass on alone, so no part is negative and a head that passes nothing has none.
        """
        rows = attention_rows(self.trace, layer, start, stop)
        key_side = self._key_side(rows, layer, start)
        divisor = self._divisor(rows, layer, start)
        edges = self._whole(rows, key_side.sum(0), divisor, layer, start)
        gram = self.trace.gains.weights.ov_gram[layer].to(rows)
        alone = torch.addcmul(key_side, rows * rows, gram.diagonal()[:, None, None])
        alone /= divisor
        own = self._own(rows, layer, start)
        total = alone.sum(0)
        total.diagonal(offset=start).add_(own)
        ratio = edges / total.clamp(min=torch.finfo(total.dtype).tiny)
        return Parts(alone.mul_(ratio), own * ratio.diagonal(offset=start))

    def _whole(
        self,
        rows: Float[Tensor, "head dest src"],
        key_side: Float[Tensor, "dest src"],
        divisor: Float[Tensor, "dest src"],
        layer: int,
        start: int,
    ) -> Float[Tensor, "dest src"]:
        stop, gains = rows.shape[2], self.trace.gains
        looking_at_itself = rows.diagonal(offset=start, dim1=1, dim2=2)
        interference = einsum(looking_at_itself, gains.weights.ov_trace[layer].to(rows), "head dest, head -> dest")
        interference /= (gains.attention_scale * gains.attention_post_scale)[layer, start:stop].to(rows)
        value_side = _value_side(rows, gains.weights.ov_gram[layer].to(rows))
        edges = (value_side + key_side) / divisor
        edges.diagonal(offset=start).add_(self._own(rows, layer, start) + 2 * interference)
        return edges.clamp(min=0)  # a mean square, whatever rounding says

    def _own(self, rows: Float[Tensor, "head dest src"], layer: int, start: int) -> Float[Tensor, " dest"]:
        """What stays in the residual stream: an MLP beside attention belongs to it."""
        gain = self.trace.gains.node_gain[layer, start : rows.shape[2]].to(rows)
        return gain if self.trace.parallel else torch.ones_like(gain)

    def _divisor(self, rows: Float[Tensor, "head dest src"], layer: int, start: int) -> Float[Tensor, "dest src"]:
        """r_k², and ρ_j² of a norm behind attention."""
        gains, stop = self.trace.gains, rows.shape[2]
        post = gains.attention_post_scale[layer, start:stop].to(rows)
        return torch.outer(post, gains.attention_scale[layer, :stop].to(rows)).square_()

    def _key_side(self, rows: Float[Tensor, "head dest src"], layer: int, start: int) -> Float[Tensor, "head dest src"]:
        """(α^h ‖o_k - ō_j‖)² · ‖q_j‖² scale² · ‖diag(γ)W_K‖_F²/d_head / d, over the square of the keys' own norm."""
        trace, gains, weights = self.trace, self.trace.gains, self.trace.gains.weights
        squared = squared_output_distance(trace, layer, start, rows, weights.output_factor).mul_(rows).mul_(rows)
        d_head = gains.value.shape[-1]
        key = weights.key_square[layer] * weights.score_scale[layer] ** 2 / (d_head * trace.about.d_model)
        query = gains.query_norm[layer][:, start : rows.shape[2]].to(rows).square()
        squared.mul_((query * key[:, None].to(rows))[:, :, None])
        return squared.div_(per_head(gains.key_scale[layer], len(rows))[:, None, : rows.shape[2]].to(rows).square())


def _value_side(rows: Float[Tensor, "head dest src"], gram: Float[Tensor, "head head2"]) -> Float[Tensor, "dest src"]:
    """Σ_hh' α^h α^h' tr(OV_h OV_h'ᵀ)/d."""
    mixed = (gram @ rows.flatten(1)).view_as(rows)
    return (mixed * rows).sum(0)
