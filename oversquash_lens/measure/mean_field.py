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

from oversquash_lens.measure.edges import Parts, SplitEdges, attention_rows, squared_output_distance
from oversquash_lens.measure.paths import PathProfile
from oversquash_lens.measure.weighing import Weighing
from oversquash_lens.record.trace import Trace


def mean_field_sensitivity(trace: Trace) -> PathProfile:
    """Estimate of ‖∂y_n/∂v_i‖_F for every position i, and of ‖∂y_n/∂v_i⁽ˡ⁾‖_F at every layer.

    `values` = sqrt(d_model · S), S the sum over causal paths of the product of mean-square gains; the same units
    as `measured_sensitivity`, no bound. With `log_constant` added, row l of `log_by_layer` estimates the log of
    the sensitivity to the residual entering layer l. O(layer·pos²), no backward pass.
    """
    return mean_field_weighing(trace).profile(trace)


def mean_field_weighing(trace: Trace) -> Weighing:
    """Mean-square edges and node gains of this trace; their path sum is S."""
    gains = trace.gains
    log_constant = 0.5 * math.log(trace.about.d_model * gains.final_gain_square / gains.final_scale**2)
    notes = ["an estimate from one forward pass, not a bound", f"node gains from {gains.node_probes} probes"]
    if trace.about.final_gain == "unknown":
        notes.append("the final gain was folded into the unembedding and is not known: y lacks it")
    log_gain = gains.node_gain.double().log()
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
        return self._whole(rows, self._key_side(rows, layer, start).sum(0), layer, start)

    def parts(self, layer: int, start: int, stop: int) -> Parts:
        """What heads add to or take from one another and the residual stream is shared out in proportion to what
        each would pass on alone, so no part is negative and a head that passes nothing has none.
        """
        rows = attention_rows(self.trace, layer, start, stop)
        key_side = self._key_side(rows, layer, start)
        edges = self._whole(rows, key_side.sum(0), layer, start)
        gram, scale = self.trace.gains.weights.ov_gram[layer].to(rows), self._scale(rows, layer)
        alone = torch.addcmul(key_side, rows * rows, gram.diagonal()[:, None, None]).div_(scale[:stop].square())
        total = alone.sum(0)
        total.diagonal(offset=start).add_(1)
        ratio = edges / total.clamp(min=torch.finfo(total.dtype).tiny)
        return Parts(alone.mul_(ratio), ratio.diagonal(offset=start))

    def _whole(
        self, rows: Float[Tensor, "head dest src"], key_side: Float[Tensor, "dest src"], layer: int, start: int
    ) -> Float[Tensor, "dest src"]:
        stop, weights, scale = rows.shape[2], self.trace.gains.weights, self._scale(rows, layer)
        looking_at_itself = rows.diagonal(offset=start, dim1=1, dim2=2)
        interference = einsum(looking_at_itself, weights.ov_trace[layer].to(rows), "head dest, head -> dest")
        edges = (_value_side(rows, weights.ov_gram[layer].to(rows)) + key_side) / scale[:stop].square()
        edges.diagonal(offset=start).add_(1 + 2 * interference / scale[start:stop])
        return edges.clamp(min=0)  # a mean square, whatever rounding says

    def _scale(self, rows: Float[Tensor, "head dest src"], layer: int) -> Float[Tensor, " pos"]:
        return self.trace.gains.attention_scale[layer].to(rows)

    def _key_side(self, rows: Float[Tensor, "head dest src"], layer: int, start: int) -> Float[Tensor, "head dest src"]:
        """(α^h ‖o_k - ō_j‖)² · ‖q_j‖² scale² · ‖diag(γ)W_K‖_F²/d_head / d."""
        trace, weights = self.trace, self.trace.gains.weights
        squared = squared_output_distance(trace, layer, start, rows).mul_(rows).mul_(rows)
        d_head = trace.gains.value.shape[-1]
        key = weights.key_square[layer] * weights.score_scale[layer] ** 2 / (d_head * trace.about.d_model)
        query = trace.gains.query_norm[layer][:, start : start + rows.shape[1]].to(rows).square()
        return squared.mul_((query * key[:, None].to(rows))[:, :, None])


def _value_side(rows: Float[Tensor, "head dest src"], gram: Float[Tensor, "head head2"]) -> Float[Tensor, "dest src"]:
    """Σ_hh' α^h α^h' tr(OV_h OV_h'ᵀ)/d."""
    mixed = (gram @ rows.flatten(1)).view_as(rows)
    return (mixed * rows).sum(0)
