"""A model's weights as the mathematics has them, and what the measures need of them alone, once per model.

Operator norms, Gram matrices and traces: everything about OV_h = diag(γ) W_V^h W_O^h is computed from d_head × d_head
matrices, never from d × d products. Operator norms enter bounds, so they come from full singular- or eigenvalue
computations in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.architecture import Architecture, per_head_sinks
from oversquash_lens.capture.attention import per_head
from oversquash_lens.capture.hooked_model import (
    Activation,
    HookedModel,
    activation_of,
    head_norms,
    is_hooked_transformer,
    norm_bias,
    norm_gain,
)
from oversquash_lens.errors import ModelError
from oversquash_lens.numerics import to_float64

# HookedTransformer's matrices, and layers that keep theirs as `weight`, turned to [outputs, inputs] (einops).
MATRIX_AXES = {
    **dict.fromkeys(("W_Q", "W_K", "W_V", "_W_K", "_W_V"), "head d_model d_head -> (head d_head) d_model"),
    "W_O": "head d_head d_model -> d_model (head d_head)",
    **dict.fromkeys(("W_in", "W_gate", "W_out"), "inputs outputs -> outputs inputs"),
    "Linear.weight": "outputs inputs -> outputs inputs",
    "Conv1D.weight": "inputs outputs -> outputs inputs",
}


@dataclass(frozen=True)
class MlpWeights:
    """The matrices of a plain or gated MLP: x @ W.

    `entering` holds W_gate and W_in of a gated one, W_in of a plain one; `offsets` what pre-activations hold besides
    normalized · gain · W (biases of norm and matrix). `post_bias` is what a class adds behind the gate's product.
    """

    activation: Activation

    entering: tuple[Float[Tensor, "d_model d_mlp"], ...]
    offsets: tuple[Float[Tensor, " d_mlp"], ...]
    post_bias: Float[Tensor, " d_mlp"] | None
    output: Float[Tensor, "d_mlp d_model"]
    output_bias: Float[Tensor, " d_model"] | None


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights: x @ W, heads apart, norms' gains beside. A norm that is not there has gains of 1.

    `attention_post_gain`, `mlp_post_gain` belong to norms of what attention and MLP write, `query_gain`, `key_gain` to
    those of queries and keys (one for all heads, or each head's own): None without them. `mlp` is None where there is
    no MLP, or a mixture of experts. What a model multiplies by before it adds to the residual is inside `output` and
    the MLP's, biases included.
    """

    attention_gain: Float[Tensor, " d_model"]
    attention_norm_bias: Float[Tensor, " d_model"] | None
    query: Float[Tensor, "head d_model d_head"]
    key: Float[Tensor, "kv_head d_model d_head"]
    value: Float[Tensor, "kv_head d_model d_head"]
    query_bias: Float[Tensor, "head d_head"] | None
    key_bias: Float[Tensor, "kv_head d_head"] | None
    value_bias: Float[Tensor, "kv_head d_head"] | None
    query_gain: Float[Tensor, "head_or_1 d_head"] | None
    key_gain: Float[Tensor, "kv_head_or_1 d_head"] | None
    output: Float[Tensor, "head d_head d_model"]
    output_bias: Float[Tensor, " d_model"] | None
    score_scale: float
    sinks: Float[Tensor, " head"] | None
    attention_post_gain: Float[Tensor, " d_model"] | None
    mlp_gain: Float[Tensor, " d_model"]
    mlp_norm_bias: Float[Tensor, " d_model"] | None
    mlp: MlpWeights | None
    mlp_post_gain: Float[Tensor, " d_model"] | None


def on_device(value: Any, device: torch.device) -> Any:
    """Weights, or a part of them, on this device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(on_device(each, device) for each in value)
    if isinstance(value, LayerWeights | MlpWeights):
        return replace(value, **{each.name: on_device(getattr(value, each.name), device) for each in fields(value)})
    return value


def layer_weights(model: HookedModel, architecture: Architecture, layer: int) -> LayerWeights:
    """One layer's weights, as views where the class has them; detached."""
    block, factor = model.blocks[layer], architecture.multiplier
    attn, width = block.attn, block.attn.W_Q.shape[2]

    of_queries, of_keys = head_norms(attn) or (None, None)
    before = block.ln1 if architecture.pre_norms else None
    mlp_norm = getattr(block, "ln1" if architecture.shared_norm else "ln2", None) if architecture.pre_norms else None
    return LayerWeights(
        attention_gain=norm_gain(before, model),
        attention_norm_bias=norm_bias(before),
        query=attn.W_Q.detach(),
        key=_per_kv_head(attn.W_K.detach(), architecture),
        value=_per_kv_head(attn.W_V.detach(), architecture),
        query_bias=_heads_bias(attn, "b_Q", architecture.n_heads),
        key_bias=_heads_bias(attn, "b_K", architecture.n_kv_heads),
        value_bias=_heads_bias(attn, "b_V", architecture.n_kv_heads),
        query_gain=_head_gain(of_queries, model, width),
        key_gain=_head_gain(of_keys, model, width),
        output=_times(attn.W_O.detach(), factor),
        output_bias=_times(_detached(attn, "b_O"), factor),
        score_scale=_score_scale(attn) * architecture.score_factor,
        sinks=per_head_sinks(block),
        attention_post_gain=_post_gain(block, "ln1", model, architecture),
        mlp_gain=norm_gain(mlp_norm, model),
        mlp_norm_bias=norm_bias(mlp_norm),
        mlp_post_gain=_post_gain(block, "ln2", model, architecture) if architecture.mlp != "none" else None,
        mlp=_mlp_weights(model, layer, norm_bias(mlp_norm), factor) if architecture.dense else None,
    )


def _post_gain(block: Any, norm: str, model: HookedModel, architecture: Architecture) -> Tensor | None:
    """Of the norm behind attention ("ln1") or MLP ("ln2")."""
    return None if architecture.behind is None else norm_gain(getattr(block, norm + architecture.behind), model)


def _head_gain(norm: Any, model: HookedModel, width: int) -> Tensor | None:
    return None if norm is None else norm_gain(norm, model, width).view(-1, width)


def _times(weight: Any, factor: float) -> Any:
    """The very weight where the factor is 1, else wide enough for the product not to round it."""
    if weight is None or factor == 1:
        return weight
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) * factor


def _mlp_weights(model: HookedModel, layer: int, norm_bias: Tensor | None, factor: float) -> MlpWeights:
    mlp, activation = model.blocks[layer].mlp, activation_of(model, layer)
    if activation is None:
        raise ModelError(
            f"the MLP of layer {layer} has an activation that is no function of each neuron by itself; expected one in "
            "every layer, as in the first"
        )
    gated = _detached(mlp, "W_gate") is not None
    # HookedTransformer adds a gated MLP's b_in after the product, a bridge's own class inside it.
    after = is_hooked_transformer(model) and gated
    parts = ("gate", "in") if gated else ("in",)
    entering = tuple(getattr(mlp, f"W_{part}").detach() for part in parts)
    biases = (None if after else _detached(mlp, f"b_{part}") for part in parts)
    return MlpWeights(
        activation=activation,
        entering=entering,
        offsets=tuple(_offset(weight, norm_bias, bias) for weight, bias in zip(entering, biases, strict=True)),
        post_bias=_detached(mlp, "b_in") if after else None,
        output=_times(mlp.W_out.detach(), factor),
        output_bias=_times(_detached(mlp, "b_out"), factor),
    )


def _offset(weight: Tensor, norm_bias: Tensor | None, bias: Tensor | None) -> Tensor:
    """What enters an activation where the normalised residual is 0."""
    total = weight.new_zeros(weight.shape[1]) if norm_bias is None else norm_bias @ weight
    return total if bias is None else total + bias


def _detached(module: Any, name: str) -> Tensor | None:
    weight = getattr(module, name, None)
    return weight.detach() if isinstance(weight, Tensor) else None


def _heads_bias(attn: Any, name: str, heads: int) -> Tensor | None:
    bias = _detached(attn, name)
    if bias is None:
        return None
    bias = bias.reshape(-1, attn.W_Q.shape[2])
    return bias[:: bias.shape[0] // heads]


def _per_kv_head(weight: Tensor, architecture: Architecture) -> Tensor:
    """HookedTransformer repeats grouped keys and values for every head; keep one of each."""
    return weight[:: weight.shape[0] // architecture.n_kv_heads]


# What attention modules call the factor of q·k, and its power in the score; GPT-Neo's has none.
SCALE_WORDS = {"scaling": 1, "softmax_scale": 1, "inv_norm_factor": 1, "scale_attn": -1}


def _score_scale(attn: Any) -> float:
    """What q·k is multiplied by in the score; recording checks it against the scores themselves."""
    component: Any = getattr(attn, "original_component", None)
    if component is None:  # HookedTransformer's; a bridge's word of that name is the wrapped module's, of another sense
        return 1.0 / attn.attn_scale
    for word, power in SCALE_WORDS.items():
        if isinstance(getattr(component, word, None), int | float | Tensor):
            return float(getattr(component, word)) ** power
    return 1.0 if hasattr(component, "attention_type") else attn.W_Q.shape[2] ** -0.5


@dataclass(frozen=True)
class WeightGains:
    """Per layer (and head): how strongly the weights can, and on mean-square average do, pass a signal on.

    With OV_h = diag(γ₁) W_V^h W_O^h diag(γ_post), γ_post the gain of a norm behind attention (1 without one):
    `ov_trace` = tr(OV_h)/d, `ov_gram` = tr(OV_h OV_h'ᵀ)/d, `output_factor` the
    triangular R of (W_O^h diag(γ_post))ᵀ = QR: ‖v W_O‖ = ‖v Rᵀ‖, without the squares of a Gram matrix.
    For bounds: `ov_norm` = ‖diag(γ₁) W_V^h W_O^h‖₂ · max|γ_post| (‖diag(γ₁) W_V^h‖₂ ‖W_O^h‖₂ where values are cut to
    a range in between), and `worst_output_factor` that of
    W_O^h · max|γ_post| (None where it is `output_factor`). `query_norm`, `key_norm` = ‖diag(γ₁) W‖₂, W of all heads
    where one norm takes them together, times the largest gain of the head's own norm where it has one. With that gain
    inside, and what LayerNorm's centring takes away taken away: `query_square` = ‖diag(γ₁) W_Q^h‖_F², `key_factor` R of
    diag(γ₁) W_K = QR, for lengths again.
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
    found: dict[str, Any] = {}
    device = next(model.parameters()).device  # layers may lie on several
    for i in range(architecture.n_layers):
        for name, value in _layer_gains(layer_weights(model, architecture, i), architecture).items():
            if value is None:
                found[name] = None
                continue
            if i == 0:
                found[name] = value.new_empty((architecture.n_layers, *value.shape), device=device)
            found[name][i] = value
    return WeightGains(**found)


def _layer_gains(w: LayerWeights, architecture: Architecture) -> dict[str, Tensor | None]:
    gain = to_float64(w.attention_gain)[:, None]
    bare, heads = to_float64(w.output), w.output.shape[0]
    post = w.attention_post_gain
    output = bare if post is None else bare * to_float64(post)
    query = gain * to_float64(w.query)
    value = per_head(gain * to_float64(w.value), heads)
    # Values are shared by a group of heads: their Gram matrices are computed once per group.
    grouped = gain * to_float64(w.value)
    value_gram = einsum(grouped, grouped, "a d i, b d j -> a b i j")
    value_gram = per_head(per_head(value_gram, heads, 0), heads, 1)
    output_gram = einsum(output, output, "a i d, b j d -> a b i j")
    d_model = query.shape[1]
    return {
        "ov_norm": _product_norm(value, bare, architecture.clip is not None) * _largest(post),
        "ov_trace": einsum(value, output, "h d i, h i d -> h") / d_model,
        "ov_gram": einsum(value_gram, output_gram, "a b i j, a b i j -> a b") / d_model,
        "output_factor": _factor(output),
        "worst_output_factor": None if post is None else _factor(bare) * _largest(post),
        "query_norm": _head_norms(query, w.query_gain, architecture),
        "key_norm": per_head(_head_norms(gain * to_float64(w.key), w.key_gain, architecture), heads),
        "query_square": _as_scores_see(query, w.query_gain, architecture).square().sum((1, 2)),
        "key_factor": torch.linalg.qr(_as_scores_see(gain * to_float64(w.key), w.key_gain, architecture), mode="r").R,
        "score_scale": gain.new_tensor(w.score_scale),
        **_mlp_norms(w, architecture),
    }


def _mlp_norms(w: LayerWeights, architecture: Architecture) -> dict[str, Tensor]:
    names = ("mlp_gate_norm", "mlp_in_norm", "mlp_out_norm")
    zero = to_float64(w.output.new_zeros(()))
    if w.mlp is None:
        return dict.fromkeys(names, zero * float("nan") if architecture.experts else zero)
    gain = to_float64(w.mlp_gain)
    *gate_norm, in_norm = (_norm(gain, weight) for weight in w.mlp.entering)
    out_norm = _norm(gain.new_ones(len(w.mlp.output)), w.mlp.output) * _largest(w.mlp_post_gain)
    return dict(zip(names, (*(gate_norm or [zero]), in_norm, out_norm), strict=True))


def _as_scores_see(
    weight: Float[Tensor, "head d_model d_head"],
    inside: Float[Tensor, "head_or_1 d_head"] | None,
    architecture: Architecture,
) -> Float[Tensor, "head d_model d_head"]:
    """diag(γ₁)W as queries or keys follow the residual: centred as it is, with the gain `inside` of their own norm."""
    if inside is not None:
        weight = weight - weight.mean(2, keepdim=True) if architecture.qk_centred else weight
        weight = weight * to_float64(inside)[:, None]
    return weight - weight.mean(1, keepdim=True) if architecture.centred and architecture.pre_norms else weight


def _head_norms(
    weight: Float[Tensor, "head d_model d_head"],
    inside: Float[Tensor, "head_or_1 d_head"] | None,
    architecture: Architecture,
) -> Float[Tensor, " head"]:
    """‖W‖₂ of each head's queries or keys, of all heads' where one norm takes them together, times the largest gain."""
    norms = torch.linalg.svdvals(weight)[:, 0]
    if architecture.qk_across:
        norms = torch.linalg.svdvals(weight.transpose(0, 1).flatten(1))[:1].expand(len(weight))
    return norms if inside is None else norms * to_float64(inside).abs().amax(1)


def _largest(gain: Float[Tensor, " gain"] | None) -> float:
    """max|γ|, what a norm's gain can do at most; 1 without a norm."""
    return 1.0 if gain is None else to_float64(gain).abs().max().item()


def _product_norm(
    value: Float[Tensor, "head d_model d_head"], output: Float[Tensor, "head d_head d_model"], apart: bool
) -> Float[Tensor, " head"]:
    """‖W_V W_O‖₂ from the triangular factors of both: as exact as the product's own singular values.

    `apart`: ‖W_V‖₂ ‖W_O‖₂, which no cut of single coordinates in between can raise.
    """
    if apart:
        return torch.linalg.matrix_norm(value, ord=2) * torch.linalg.matrix_norm(output, ord=2)
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


def weight_holder(model: torch.nn.Module) -> torch.nn.Module:
    """The module whose tree holds every weight: what a bridge wraps, otherwise the model itself."""
    return getattr(model, "original_model", model)


def weight_matrices(model: torch.nn.Module) -> Iterator[tuple[Tensor, str]]:
    """Every matrix that multiplies activations, with the einops pattern that turns it to [outputs, inputs].

    Left out are embedding and unembedding tables; where a model does not say which layer unembeds, none is.
    """
    holder: Any = weight_holder(model)
    unembedding = getattr(model, "unembed", None)
    if unembedding is None and hasattr(holder, "get_output_embeddings"):
        unembedding = holder.get_output_embeddings()
    tables = [unembedding, *(module for module in holder.modules() if isinstance(module, torch.nn.Embedding))]
    left_out = {id(table) for module in tables if module is not None for table in module.parameters()}
    for module in holder.modules():
        kinds = [kind.__name__ for kind in type(module).__mro__]
        for name, weight in module.named_parameters(recurse=False):
            patterns = [MATRIX_AXES[key] for key in (name, *(f"{kind}.{name}" for kind in kinds)) if key in MATRIX_AXES]
            if patterns and id(weight) not in left_out:
                yield weight, patterns[0]
