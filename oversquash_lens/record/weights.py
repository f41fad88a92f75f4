"""What the measures need of the weights alone: operator norms, Gram matrices and traces, once per model.

Everything about OV_h = diag(γ) W_V^h W_O^h is computed from d_head × d_head matrices, never from d × d products.
Operator norms enter bounds, so they come from whole singular- or eigenvalue computations in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from weakref import WeakKeyDictionary

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import ModelError
from oversquash_lens.record.layout import HookedModel, LayerWeights, Layout, layer_weights


@dataclass(frozen=True)
class WeightGains:
    """Per layer (and head): how strongly the weights can, and on mean-square average do, pass a signal on.

    With OV_h = diag(γ₁) W_V^h W_O^h: `ov_norm` = ‖OV_h‖₂, `ov_trace` = tr(OV_h)/d, `ov_gram` =
    tr(OV_h OV_h'ᵀ)/d, `output_gram` = W_O^h W_O^hᵀ. `query_norm`, `key_norm` = ‖diag(γ₁) W‖₂,
    `key_square` = ‖diag(γ₁) W_K^h‖_F². `mlp_gate_norm` (0 without a gate) and `mlp_in_norm` hold γ₂.
    `score_scale` is what q·k is multiplied by. `lipschitz` bounds the activation's derivative.
    """

    ov_norm: Float[Tensor, "layer head"]
    ov_trace: Float[Tensor, "layer head"]
    ov_gram: Float[Tensor, "layer head head2"]
    output_gram: Float[Tensor, "layer head d_head d_head2"]
    query_norm: Float[Tensor, "layer head"]
    key_norm: Float[Tensor, "layer head"]
    key_square: Float[Tensor, "layer head"]
    score_scale: Float[Tensor, " layer"]
    mlp_gate_norm: Float[Tensor, " layer"]
    mlp_in_norm: Float[Tensor, " layer"]
    mlp_out_norm: Float[Tensor, " layer"]


_known: WeakKeyDictionary[HookedModel, tuple[tuple, WeightGains]] = WeakKeyDictionary()


def weight_gains(model: HookedModel, layout: Layout) -> WeightGains:
    """The model's `WeightGains`, computed at the first call and again whenever its weights have changed."""
    mark = _fingerprint(model)
    if model not in _known or _known[model][0] != mark:
        layers = [_layer_gains(layer_weights(model, layout, i)) for i in range(layout.n_layers)]
        stacked = {f.name: torch.stack([layer[f.name] for layer in layers]) for f in fields(WeightGains)}
        _known[model] = (mark, WeightGains(**stacked))
    return _known[model][1]


def _fingerprint(model: HookedModel) -> tuple:
    """Changes when any weight does, also by a `.data` edit, which torch's own version counter does not see."""
    parameters = [p.detach() for p in model.blocks.parameters()]
    wide = torch.promote_types(parameters[0].dtype, torch.float32)
    sums = torch.stack([_irregular_sum(p.to(wide)) for p in parameters])
    if not torch.isfinite(sums).all():
        which = [name for name, _ in model.blocks.named_parameters()][int((~torch.isfinite(sums)).nonzero()[0])]
        raise ModelError(f"the weights blocks.{which} hold NaN or infinite values; expected finite ones: load it again")
    return tuple((p.data_ptr(), p._version) for p in parameters), tuple(sums.tolist())


def _irregular_sum(weight: Tensor) -> Float[Tensor, ""]:
    """A sum whose terms weigh differently, so that signs, swapped heads and permuted rows change it."""
    rows = weight.reshape(len(weight), -1)
    across, down = (
        torch.arange(1, size + 1, device=weight.device).to(weight).sqrt().cos() for size in rows.shape[::-1]
    )
    return (rows @ across) @ down


def _layer_gains(w: LayerWeights) -> dict[str, Tensor]:
    gain1, gain2 = w.attention_gain.double(), w.mlp_gain.double()
    heads = w.output.shape[0]
    query, output = gain1[:, None] * w.query.double(), w.output.double()
    key, value = (gain1[:, None] * each.double() for each in (w.key, w.value))
    value_gram = einsum(value, value, "a d i, b d j -> a b i j")
    output_gram = einsum(output, output, "a i d, b j d -> a b i j")
    value_gram = _per_head(_per_head(value_gram, heads, 0), heads, 1)
    d_model = query.shape[1]
    value, key = _per_head(value, heads), _per_head(key, heads)
    return {
        "ov_norm": _product_norm(value, output),
        "ov_trace": einsum(value, output, "h d i, h i d -> h") / d_model,
        "ov_gram": einsum(value_gram, output_gram, "a b i j, a b i j -> a b") / d_model,
        "output_gram": output_gram.diagonal(dim1=0, dim2=1).permute(2, 0, 1).contiguous(),
        "query_norm": torch.linalg.svdvals(query)[:, 0],
        "key_norm": torch.linalg.svdvals(key)[:, 0],
        "key_square": key.square().sum((1, 2)),
        "score_scale": torch.tensor(w.score_scale, dtype=torch.float64),
        "mlp_gate_norm": query.new_zeros(()) if w.mlp_gate is None else _norm(gain2, w.mlp_gate),
        "mlp_in_norm": _norm(gain2, w.mlp_in),
        "mlp_out_norm": _norm(gain2.new_ones(w.mlp_out.shape[0]), w.mlp_out),
    }


def _per_head(grouped: Tensor, heads: int, axis: int = 0) -> Tensor:
    """Grouped key/value heads repeated for the query heads that read them."""
    return grouped.repeat_interleave(heads // grouped.shape[axis], dim=axis)


def _product_norm(
    value: Float[Tensor, "head d_model d_head"], output: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, " head"]:
    """‖W_V W_O‖₂ from the triangular factors of both: as exact as the product's own singular values."""
    left = torch.linalg.qr(value, mode="r").R
    right = torch.linalg.qr(output.mT, mode="r").R
    return torch.linalg.matrix_norm(left @ right.mT, ord=2)


def _norm(gain: Float[Tensor, " rows"], weight: Float[Tensor, "rows columns"]) -> Float[Tensor, ""]:
    """‖diag(gain) W‖₂ from the eigenvalues of its smaller Gram matrix."""
    scaled = gain[:, None] * weight.double()
    gram = scaled @ scaled.T if scaled.shape[0] <= scaled.shape[1] else scaled.T @ scaled
    return torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()
