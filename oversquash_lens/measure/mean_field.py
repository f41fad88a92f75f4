"""The mean-field path sensitivity: what the last token hears, estimated from one forward pass.

The bound multiplies worst cases, so on a deep model it says nothing about the truth. Here every edge and node
carries the mean square of its gain instead, as in mean-field signal propagation: the sum over paths stays, the
sizes become those that a typical perturbation meets (docs/theory.md, section 4).
"""

from __future__ import annotations

import math

from einops import einsum
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.measure.edges import attention_rows, diagonal_of, squared_output_distance
from oversquash_lens.measure.paths import PathProfile, log_path_products
from oversquash_lens.record.trace import Trace


def mean_field_sensitivity(trace: Trace) -> PathProfile:
    """Estimate of ‖∂y_n/∂v_i‖_F for every position i, and of ‖∂y_n/∂v_i⁽ˡ⁾‖_F at every layer.

    `values` = sqrt(d_model · S), S the sum over causal paths of the product of mean-square gains; the same units
    as `measured_sensitivity`, no bound. With `log_constant` added, row l of `log_by_layer` estimates the log of
    the sensitivity to the residual entering layer l. O(layer·pos²), no backward pass.
    """

    def edges(layer: int, start: int, stop: int) -> Float[Tensor, "dest src"]:
        return mean_square_edges(trace, layer, start, stop)

    log_squares = log_path_products(edges, trace.n_positions, trace.n_layers, trace.gains.node_gain.double().log())
    gains = trace.gains
    log_constant = 0.5 * math.log(trace.about.d_model * gains.final_gain_square / gains.final_scale**2)
    notes = ["an estimate from one forward pass, not a bound", f"node gains from {gains.node_probes} probes"]
    if trace.about.final_gain == "unknown":
        notes.append("the final gain was folded into the unembedding and is not known: y lacks it")
    return PathProfile("mean_field", trace.tokens, log_squares / 2, log_constant, trace.about, tuple(notes))


def mean_square_edges(trace: Trace, layer: int, start: int, stop: int) -> Float[Tensor, "dest src"]:
    """Mean-square gain from position src to position dest through one layer's attention and residual stream.

    Three parts: values moved by attention (with the cross term between heads), the same interfering with the
    residual stream on the diagonal, and the softmax's derivative through the keys.
    """
    rows = attention_rows(trace, layer, start, stop)
    weights, scale = trace.gains.weights, trace.gains.attention_scale[layer].to(rows)
    value_side = _value_side(rows, weights.ov_gram[layer].to(rows))
    key_side = _key_side(trace, layer, start, stop, rows)
    looking_at_itself = rows.diagonal(offset=start, dim1=1, dim2=2)
    interference = einsum(looking_at_itself, weights.ov_trace[layer].to(rows), "head dest, head -> dest")
    own = 1 + 2 * interference / scale[start:stop]
    edges = (value_side + key_side) / scale[:stop].square() + diagonal_of(start, stop, rows) * own[:, None]
    return edges.clamp(min=0)  # a mean square, whatever rounding says


def _value_side(rows: Float[Tensor, "head dest src"], gram: Float[Tensor, "head head2"]) -> Float[Tensor, "dest src"]:
    """Σ_hh' α^h α^h' tr(OV_h OV_h'ᵀ)/d."""
    mixed = (gram @ rows.flatten(1)).view_as(rows)
    return (mixed * rows).sum(0)


def _key_side(
    trace: Trace, layer: int, start: int, stop: int, rows: Float[Tensor, "head dest src"]
) -> Float[Tensor, "dest src"]:
    """Σ_h (α^h ‖o_k - ō_j‖)² · ‖q_j‖² scale² · ‖diag(γ)W_K‖_F²/d_head / d."""
    weights = trace.gains.weights
    squared = squared_output_distance(trace, layer, start, rows).mul_(rows).mul_(rows)
    d_head = trace.gains.value.shape[-1]
    key = weights.key_square[layer] * weights.score_scale[layer] ** 2 / (d_head * trace.about.d_model)
    query = trace.gains.query_norm[layer][:, start:stop].square() * key[:, None].to(rows)
    return squared.mul_(query.to(rows)[:, :, None]).sum(0)
