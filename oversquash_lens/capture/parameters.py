"""A layer's weights as the mathematics has them, wherever the two classes and their architectures keep them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.architecture import Architecture, per_head_sinks
from oversquash_lens.capture.hooked_model import HookedModel
from oversquash_lens.capture.norms import norm_bias, norm_gain


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights: x @ W, heads apart, norms' gains beside. Ones and zeros stand for what is not there.

    The offsets are what pre-activations hold besides normalized · gain · W (biases of norm and matrix);
    `mlp_post_bias` is what a class adds behind the gate's product. `attention_post_gain`, `mlp_post_gain` belong to
    norms of what attention and MLP write, `query_gain`, `key_gain` to those of queries and keys: None without them.
    The matrices of an MLP are None where there is none, or a mixture of experts.
    """

    attention_gain: Float[Tensor, " d_model"]
    attention_norm_bias: Float[Tensor, " d_model"] | None
    query: Float[Tensor, "head d_model d_head"]
    key: Float[Tensor, "kv_head d_model d_head"]
    value: Float[Tensor, "kv_head d_model d_head"]
    query_bias: Float[Tensor, "head d_head"] | None
    key_bias: Float[Tensor, "kv_head d_head"] | None
    value_bias: Float[Tensor, "kv_head d_head"] | None
    query_gain: Float[Tensor, " d_head"] | None
    key_gain: Float[Tensor, " d_head"] | None
    output: Float[Tensor, "head d_head d_model"]
    output_bias: Float[Tensor, " d_model"] | None
    score_scale: float
    sinks: Float[Tensor, " head"] | None
    attention_post_gain: Float[Tensor, " d_model"] | None
    mlp_gain: Float[Tensor, " d_model"]
    mlp_norm_bias: Float[Tensor, " d_model"] | None
    mlp_gate: Float[Tensor, "d_model d_mlp"] | None
    mlp_in: Float[Tensor, "d_model d_mlp"] | None
    mlp_out: Float[Tensor, "d_mlp d_model"] | None
    mlp_gate_offset: Float[Tensor, " d_mlp"] | None
    mlp_in_offset: Float[Tensor, " d_mlp"] | None
    mlp_post_bias: Float[Tensor, " d_mlp"] | None
    mlp_out_bias: Float[Tensor, " d_model"] | None
    mlp_post_gain: Float[Tensor, " d_model"] | None


def moved(w: LayerWeights, device: torch.device) -> LayerWeights:
    """The same on this device."""
    tensors = {name: value.to(device) for name, value in vars(w).items() if isinstance(value, Tensor)}
    return replace(w, **tensors)


def layer_weights(model: HookedModel, architecture: Architecture, layer: int) -> LayerWeights:
    """One layer's weights, as views where the class has them; detached."""
    block = model.blocks[layer]
    attn = block.attn
    mlp_norm = getattr(block, "ln1" if architecture.shared_norm else "ln2", None)
    return LayerWeights(
        attention_gain=norm_gain(block.ln1, model),
        attention_norm_bias=norm_bias(block.ln1),
        query=attn.W_Q.detach(),
        key=_per_kv_head(attn.W_K.detach(), architecture),
        value=_per_kv_head(attn.W_V.detach(), architecture),
        query_bias=_heads_bias(attn, "b_Q", architecture.n_heads),
        key_bias=_heads_bias(attn, "b_K", architecture.n_kv_heads),
        value_bias=_heads_bias(attn, "b_V", architecture.n_kv_heads),
        query_gain=norm_gain(attn.q_norm, model) if architecture.qk_norm else None,
        key_gain=norm_gain(attn.k_norm, model) if architecture.qk_norm else None,
        output=attn.W_O.detach(),
        output_bias=_detached(attn, "b_O"),
        score_scale=_score_scale(attn) * architecture.score_factor,
        sinks=per_head_sinks(block),
        attention_post_gain=norm_gain(block.ln1_post, model) if architecture.post_norms else None,
        mlp_gain=norm_gain(mlp_norm, model),
        mlp_norm_bias=norm_bias(mlp_norm),
        mlp_post_gain=norm_gain(block.ln2_post, model)
        if architecture.post_norms and architecture.mlp != "none"
        else None,
        **_mlp_weights(model, architecture, getattr(block, "mlp", None), norm_bias(mlp_norm)),
    )


def _mlp_weights(
    model: HookedModel, architecture: Architecture, mlp: Any, norm_bias: Tensor | None
) -> dict[str, Tensor | None]:
    names = ("gate", "in", "out", "gate_offset", "in_offset", "post_bias", "out_bias")
    if not architecture.dense:
        return {f"mlp_{name}": None for name in names}
    gate, w_in = _detached(mlp, "W_gate"), _detached(mlp, "W_in")

    def offset(weight: Tensor, bias: Tensor | None) -> Tensor:
        total = weight.new_zeros(weight.shape[1]) if norm_bias is None else norm_bias @ weight
        return total if bias is None else total + bias

    # HookedTransformer adds a gated MLP's b_in after the product, a bridge's own class inside it.
    after = architecture.hooked and gate is not None
    found = (
        gate,
        w_in,
        _detached(mlp, "W_out"),
        None if gate is None else offset(gate, None if after else _detached(mlp, "b_gate")),
        offset(w_in, None if after else _detached(mlp, "b_in")),
        _detached(mlp, "b_in") if after else None,
        _detached(mlp, "b_out"),
    )
    return {f"mlp_{name}": value for name, value in zip(names, found, strict=True)}


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


def _score_scale(attn: Any) -> float:
    """What q·k is multiplied by in the score; recording checks it against the scores themselves."""
    if isinstance(getattr(attn, "attn_scale", None), float):
        return 1.0 / attn.attn_scale
    component = getattr(attn, "original_component", None)
    if getattr(component, "scaling", None) is not None:
        return float(component.scaling)
    divisor = getattr(component, "scale_attn", None)  # GPT-J
    return 1.0 / float(divisor) if divisor is not None else attn.W_Q.shape[2] ** -0.5
