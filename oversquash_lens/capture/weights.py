"""What the measures need of the weights alone: operator norms, Gram matrices and traces, once per model.

Everything about OV_h = diag(γ) W_V^h W_O^h is computed from d_head × d_head matrices, never from d × d products.
Operator norms enter bounds, so they come from whole singular- or eigenvalue computations in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.architecture import Architecture
from oversquash_lens.capture.attention import per_head
from oversquash_lens.capture.hooked_model import HookedModel
from oversquash_lens.capture.parameters import LayerWeights, layer_weights
from oversquash_lens.errors import ModelError
from oversquash_lens.numerics import to_float64


@dataclass(frozen=True)
class WeightGains:
    """Per layer (and head): how strongly the weights can, and on mean-square average do, pass a signal on.

    With OV_h = diag(γ₁) W_V^h W_O^h diag(γ_post), γ_post the gain of a norm behind attention (1 without one):
    `ov_trace` = tr(OV_h)/d, `ov_gram` = tr(OV_h OV_h'ᵀ)/d, `output_factor` the
    triangular R of (W_O^h diag(γ_post))ᵀ = QR: ‖v W_O‖ = ‖v Rᵀ‖, without the squares of a Gram matrix.
    For bounds: `ov_norm` = ‖diag(γ₁) W_V^h W_O^h‖₂ · max|γ_post|, and `worst_output_factor` that of
    W_O^h · max|γ_post| (None where it is `output_factor`). `query_norm`, `key_norm` = ‖diag(γ₁) W‖₂, times the largest
    gain of the queries' and keys' own norm where they have one. With that gain inside, and what LayerNorm's centring
    takes away taken away: `query_square` = ‖diag(γ₁) W_Q^h‖_F², `key_factor` R of diag(γ₁) W_K = QR, for lengths again.
    `mlp_gate_norm` (0 without a gate) and `mlp_in_norm` hold γ₂, `mlp_out_norm` the largest gain behind the MLP; all
    0 without an MLP, nan for a mixture of experts. `score_scale` is what q·k is multiplied by.
    """

    ov_norm: Float[Tensor, "layer head"]
    ov_trace: Float[Tensor, "layer head"]
    ov_gram: Float[Tensor, "layer head head2"]
    output_factor: Float[Tensor, "layer head rank d_head"]
    worst_output_factor: Float[Tensor, "layer head rank d_head"] | None
    query_norm: Float[Tensor, "layer head"]
    key_norm: Float[Tensor, "layer head"]
    query_square: Float[Tensor, "layer head"]
    key_factor: Float[Tensor, "layer kv_head rank d_head"]
    score_scale: Float[Tensor, " layer"]
    mlp_gate_norm: Float[Tensor, " layer"]
    mlp_in_norm: Float[Tensor, " layer"]
    mlp_out_norm: Float[Tensor, " layer"]


_known: WeakKeyDictionary[HookedModel, tuple[tuple, WeightGains]] = WeakKeyDictionary()


def weight_gains(model: HookedModel, architecture: Architecture) -> WeightGains:
    """The model's `WeightGains`, computed at the first call and again whenever its weights have changed."""
    mark = _fingerprint(model)
    if model not in _known or _known[model][0] != mark:
        _known[model] = (mark, _every_layer(model, architecture))
    return _known[model][1]


def weights_known(model: Any) -> bool:
    """Whether this model's `WeightGains` were computed before: a first recording takes longer."""
    return model in _known


def _fingerprint(model: HookedModel) -> tuple:
    """Changes when any weight does, also by a `.data` edit, which torch's own version counter does not see."""
    parameters = [p.detach() for p in model.blocks.parameters()]
    wide = torch.promote_types(parameters[0].dtype, torch.float32)
    sums = torch.stack([_irregular_sum(p.to(wide)).cpu() for p in parameters])  # layers may lie on several devices
    if not torch.isfinite(sums).all():
        which = [name for name, _ in model.blocks.named_parameters()][int((~torch.isfinite(sums)).nonzero()[0])]
        raise ModelError(f"the weights blocks.{which} hold NaN or infinite values; expected finite ones: load it again")
    return tuple((p.data_ptr(), p._version) for p in parameters), tuple(sums.tolist())


def _irregular_sum(weight: Tensor) -> Float[Tensor, ""]:
    """A sum whose terms weigh differently, so that signs, swapped heads and permuted rows change it."""
    rows = weight.reshape(weight.shape[0] if weight.ndim else 1, -1)
    across, down = (
        torch.arange(1, size + 1, device=weight.device).to(weight).sqrt().cos() for size in rows.shape[::-1]
    )
    return (rows @ across) @ down


def _every_layer(model: HookedModel, architecture: Architecture) -> WeightGains:
    """Into memory set aside at once: small results between large passing ones keep the heap from reusing theirs."""
    found: dict[str, Tensor | None] = {}
    home = next(model.parameters()).device  # layers may lie on several
    for i in range(architecture.n_layers):
        for name, value in _layer_gains(layer_weights(model, architecture, i), architecture).items():
            if i == 0:
                found[name] = None if value is None else value.to(home).new_empty((architecture.n_layers, *value.shape))
            if value is not None:
                found[name][i] = value
    return WeightGains(**found)


def _layer_gains(w: LayerWeights, architecture: Architecture) -> dict[str, Tensor | None]:
    gain = to_float64(w.attention_gain)[:, None]
    bare, heads = to_float64(w.output), w.output.shape[0]
    post = w.attention_post_gain
    output = bare if post is None else bare * to_float64(post)
    query = gain * to_float64(w.query)
    value, key = (per_head(gain * to_float64(each), heads) for each in (w.value, w.key))
    # Values are shared by a group of heads: their Gram matrices are computed once per group.
    grouped = gain * to_float64(w.value)
    value_gram = einsum(grouped, grouped, "a d i, b d j -> a b i j")
    value_gram = per_head(per_head(value_gram, heads, 0), heads, 1)
    output_gram = einsum(output, output, "a i d, b j d -> a b i j")
    d_model = query.shape[1]
    return {
        "ov_norm": _product_norm(value, bare) * _largest(post),
        "ov_trace": einsum(value, output, "h d i, h i d -> h") / d_model,
        "ov_gram": einsum(value_gram, output_gram, "a b i j, a b i j -> a b") / d_model,
        "output_factor": _factor(output),
        "worst_output_factor": None if post is None else _factor(bare) * _largest(post),
        "query_norm": torch.linalg.svdvals(query)[:, 0] * _largest(w.query_gain),
        "key_norm": torch.linalg.svdvals(key)[:, 0] * _largest(w.key_gain),
        "query_square": _as_scores_see(query, w.query_gain, architecture).square().sum((1, 2)),
        "key_factor": torch.linalg.qr(_as_scores_see(gain * to_float64(w.key), w.key_gain, architecture), mode="r").R,
        "score_scale": gain.new_tensor(w.score_scale),
        **_mlp_norms(w, architecture),
    }


def _mlp_norms(w: LayerWeights, architecture: Architecture) -> dict[str, Tensor]:
    names = ("mlp_gate_norm", "mlp_in_norm", "mlp_out_norm")
    zero = to_float64(w.output.new_zeros(()))
    if not architecture.dense:
        return dict.fromkeys(names, zero * float("nan") if architecture.experts else zero)
    gain = to_float64(w.mlp_gain)
    found = (
        zero if w.mlp_gate is None else _norm(gain, w.mlp_gate),
        _norm(gain, w.mlp_in),
        _norm(gain.new_ones(w.mlp_out.shape[0]), w.mlp_out) * _largest(w.mlp_post_gain),
    )
    return dict(zip(names, found, strict=True))


def _as_scores_see(
    weight: Float[Tensor, "head d_model d_head"], inside: Float[Tensor, " d_head"] | None, architecture: Architecture
) -> Float[Tensor, "head d_model d_head"]:
    """diag(γ₁)W as queries or keys follow the residual: centred as it is, with the gain `inside` of their own norm."""
    weight = weight if inside is None else weight * to_float64(inside)
    return weight - weight.mean(1, keepdim=True) if architecture.centred else weight


def _largest(gain: Float[Tensor, " gain"] | None) -> float:
    """max|γ|, what a norm's gain can do at most; 1 without a norm."""
    return 1.0 if gain is None else to_float64(gain).abs().max().item()


def _product_norm(
    value: Float[Tensor, "head d_model d_head"], output: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, " head"]:
    """‖W_V W_O‖₂ from the triangular factors of both: as exact as the product's own singular values."""
    left = torch.linalg.qr(value, mode="r").R
    return torch.linalg.matrix_norm(left @ _factor(output).mT, ord=2)


def _factor(output: Float[Tensor, "head d_head d_model"]) -> Float[Tensor, "head rank d_head"]:
    """R of W_Oᵀ = QR."""
    return torch.linalg.qr(output.mT, mode="r").R


def _norm(gain: Float[Tensor, " rows"], weight: Float[Tensor, "rows columns"]) -> Float[Tensor, ""]:
    """‖diag(gain) W‖₂ from the eigenvalues of its smaller Gram matrix."""
    scaled = gain[:, None] * to_float64(weight)
    gram = scaled @ scaled.T if scaled.shape[0] <= scaled.shape[1] else scaled.T @ scaled
    return torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()
