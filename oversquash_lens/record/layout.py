"""What differs between HookedTransformer and TransformerBridge, and between architectures, in one table.

Both classes answer to the same hook aliases; what they do not share (where the weights lie, how the score is
scaled, what folding leaves behind) is looked up here and nowhere else. Structure is read from the hooks and
modules that exist, not from the config, which a bridge does not keep up to date.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from oversquash_lens.errors import InputError, ModelError
from oversquash_lens.record.about import About, software_versions


@runtime_checkable
class HookedModel(Protocol):
    """The surface that HookedTransformer and TransformerBridge share and that we use."""

    cfg: Any
    hook_dict: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...


# What is recorded in each layer -> the hook's name inside `blocks.{layer}.`, the same on both classes.
LAYER_HOOKS = {
    "residual": "hook_resid_pre",
    "attention_scale": "ln1.hook_scale",
    "query": "attn.hook_q",
    "key": "attn.hook_k",
    "value": "attn.hook_v",
    "scores": "attn.hook_attn_scores",
    "pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "middle": "hook_resid_mid",
    "mlp_scale": "ln2.hook_scale",
    "mlp_normalized": "ln2.hook_normalized",
    "pre": "mlp.hook_pre",
    "post": "mlp.hook_post",
}
GATED_HOOKS = {"pre_linear": "mlp.hook_pre_linear"}
FINAL_HOOKS = {
    "last": "blocks.{last}.hook_resid_post",
    "final_scale": "ln_final.hook_scale",
    "prediction_input": "unembed.hook_in",
}


@dataclass(frozen=True)
class Activation:
    """An MLP's elementwise function and an upper bound on the absolute value of its derivative."""

    function: Callable[[Tensor], Tensor]
    lipschitz: float


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_GELU_TANH = Activation(_gelu_tanh, 1.1290)  # sup 1.128993
ACTIVATIONS = {
    "relu": Activation(torch.relu, 1.0),
    "silu": Activation(functional.silu, 1.0999),  # sup 1.099839
    "swish": Activation(functional.silu, 1.0999),
    "gelu": Activation(functional.gelu, 1.1290),  # sup 1.128904
    "gelu_new": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "quick_gelu": Activation(_quick_gelu, 1.0999),
    "tanh": Activation(torch.tanh, 1.0),
}


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights as the mathematics has them: x @ W, heads apart, norms' gains beside.

    The offsets are what pre-activations hold besides normalized · gain · W (biases of norm and matrix);
    `mlp_post_bias` is what a class adds behind the gate's product.
    """

    attention_gain: Float[Tensor, " d_model"]
    attention_norm_bias: Float[Tensor, " d_model"] | None
    query: Float[Tensor, "head d_model d_head"]
    key: Float[Tensor, "kv_head d_model d_head"]
    value: Float[Tensor, "kv_head d_model d_head"]
    query_bias: Float[Tensor, "head d_head"] | None
    key_bias: Float[Tensor, "kv_head d_head"] | None
    value_bias: Float[Tensor, "kv_head d_head"] | None
    output: Float[Tensor, "head d_head d_model"]
    output_bias: Float[Tensor, " d_model"] | None
    score_scale: float
    mlp_gain: Float[Tensor, " d_model"]
    mlp_gate: Float[Tensor, "d_model d_mlp"] | None
    mlp_in: Float[Tensor, "d_model d_mlp"]
    mlp_out: Float[Tensor, "d_mlp d_model"]
    mlp_gate_offset: Float[Tensor, " d_mlp"] | None
    mlp_in_offset: Float[Tensor, " d_mlp"]
    mlp_post_bias: Float[Tensor, " d_mlp"] | None
    mlp_out_bias: Float[Tensor, " d_model"] | None


@dataclass(frozen=True)
class Layout:
    """A hooked model's structure, checked to be one that the theory's section 1 speaks of."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    n_ctx: int
    gated: bool
    centred: bool
    activation: Activation
    dtype: torch.dtype
    folded: bool
    final_gain: Float[Tensor, " d_model"]
    final_gain_state: str
    restore_gain: Float[Tensor, " d_model"] | None

    def layer_hooks(self) -> dict[str, str]:
        return LAYER_HOOKS | (GATED_HOOKS if self.gated else {})

    def final_hooks(self) -> dict[str, str]:
        return {key: name.format(last=self.n_layers - 1) for key, name in FINAL_HOOKS.items()}


def model_layout(model: Any) -> Layout:
    """Read a model's structure; a ModelError names what this package cannot describe yet."""
    if not (hasattr(model, "hook_dict") and hasattr(model, "cfg") and hasattr(model, "blocks")):
        raise InputError(
            f"a {type(model).__name__} came; expected a HookedTransformer or TransformerBridge: "
            "load one with oversquash_lens.load_model()"
        )
    _refuse_unknown_structure(model)
    cfg, block = model.cfg, model.blocks[0]
    folded = _folded(model)
    restore = _folded_final_gain(model) if folded else None
    own_gain = _gain(model.ln_final, model)
    state = "model" if not folded else ("restored" if restore is not None else "unknown")
    weight = block.attn.W_O
    return Layout(
        n_layers=len(model.blocks),
        n_heads=weight.shape[0],
        n_kv_heads=_key_value_heads(cfg, weight.shape[0]),
        d_model=weight.shape[2],
        n_ctx=cfg.n_ctx,
        gated=_weight(block.mlp, "W_gate") is not None,
        centred=_centred(model),
        activation=_activation(cfg),
        dtype=weight.dtype,
        folded=folded,
        final_gain=own_gain if restore is None else restore,
        final_gain_state=state,
        restore_gain=restore,
    )


def describe(model: HookedModel, layout: Layout) -> About:
    """The label that every result carries."""
    return About(
        model=getattr(model.cfg, "model_name", None) or "unnamed",
        model_class=type(model).__name__,
        n_layers=layout.n_layers,
        n_heads=layout.n_heads,
        d_model=layout.d_model,
        dtype=str(layout.dtype).removeprefix("torch."),
        folded=layout.folded,
        final_gain=layout.final_gain_state,
        bos=False,
        chat=False,
        versions=software_versions(),
    )


def layer_weights(model: HookedModel, layout: Layout, layer: int) -> LayerWeights:
    """One layer's weights, as views where the class has them; detached."""
    block = model.blocks[layer]
    attn, mlp = block.attn, block.mlp
    gate = _weight(mlp, "W_gate")
    w_in = _weight(mlp, "W_in").detach()
    norm_bias = _norm_bias(block.ln2)

    def offset(weight: Tensor, bias: Tensor | None) -> Tensor:
        total = torch.zeros(weight.shape[1], dtype=weight.dtype, device=weight.device)
        if norm_bias is not None:
            total = total + norm_bias @ weight
        return total if bias is None else total + bias.detach()

    def heads_bias(name: str, heads: int) -> Tensor | None:
        bias = _detached(attn, name)
        if bias is None:
            return None
        bias = bias.reshape(-1, attn.W_Q.shape[2])
        return bias[:: bias.shape[0] // heads]

    # HookedTransformer adds a gated MLP's b_in after the product, a bridge's own class inside it.
    hooked = type(model).__name__ == "HookedTransformer"
    in_bias = None if hooked and gate is not None else _weight(mlp, "b_in")
    gate_bias = None if hooked else _weight(mlp, "b_gate")
    return LayerWeights(
        attention_gain=_gain(block.ln1, model),
        attention_norm_bias=_norm_bias(block.ln1),
        query=attn.W_Q.detach(),
        key=_per_kv_head(attn.W_K.detach(), layout),
        value=_per_kv_head(attn.W_V.detach(), layout),
        query_bias=heads_bias("b_Q", layout.n_heads),
        key_bias=heads_bias("b_K", layout.n_kv_heads),
        value_bias=heads_bias("b_V", layout.n_kv_heads),
        output=attn.W_O.detach(),
        output_bias=_detached(attn, "b_O"),
        score_scale=_score_scale(attn, layout),
        mlp_gain=_gain(block.ln2, model),
        mlp_gate=None if gate is None else gate.detach(),
        mlp_in=w_in,
        mlp_out=_weight(mlp, "W_out").detach(),
        mlp_gate_offset=None if gate is None else offset(gate.detach(), gate_bias),
        mlp_in_offset=offset(w_in, in_bias),
        mlp_post_bias=_detached(mlp, "b_in") if hooked and gate is not None else None,
        mlp_out_bias=_detached(mlp, "b_out"),
    )


# HookedTransformer's matrices, and layers that keep theirs as `weight`, turned to [outputs, inputs] (einops).
MATRIX_AXES = {
    **dict.fromkeys(("W_Q", "W_K", "W_V", "_W_K", "_W_V"), "head d_model d_head -> (head d_head) d_model"),
    "W_O": "head d_head d_model -> d_model (head d_head)",
    **dict.fromkeys(("W_in", "W_gate", "W_out"), "inputs outputs -> outputs inputs"),
    "Linear.weight": "outputs inputs -> outputs inputs",
    "Conv1D.weight": "inputs outputs -> outputs inputs",
}


def weight_holder(model: torch.nn.Module) -> torch.nn.Module:
    """The module whose tree holds every weight: what a bridge wraps, otherwise the model itself."""
    return getattr(model, "original_model", model)


def weight_matrices(model: torch.nn.Module) -> Iterator[tuple[Tensor, str]]:
    """Every matrix that multiplies activations, with the einops pattern that turns it to [outputs, inputs].

    Left out are embedding and unembedding tables; where a model does not say which layer unembeds, none is.
    """
    holder = weight_holder(model)
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


def _refuse_unknown_structure(model: HookedModel) -> None:
    """What would make the recorded hooks tell another story than section 1's equations."""
    cfg, block, hooks = model.cfg, model.blocks[0], model.hook_dict
    reasons = {
        "attention and MLP in parallel": bool(getattr(cfg, "parallel_attn_mlp", False))
        or (hasattr(block, "mlp") and "blocks.0.hook_resid_mid" not in hooks),
        "norms after attention or MLP": any("ln1_post." in n or "ln2_post." in n for n in hooks)
        or bool(getattr(cfg, "use_normalization_before_and_after", False)),
        "normalised queries and keys": any("q_norm" in name for name in hooks),
        "a mixture of experts": bool(getattr(cfg, "num_experts", None)),
        "no norms": "ln_final.hook_scale" not in hooks or "blocks.0.ln1.hook_scale" not in hooks,
        "no MLP": not hasattr(block, "mlp") or _weight(getattr(block, "mlp", None), "W_in") is None,
        "attention that is not causal": getattr(cfg, "attention_dir", "causal") != "causal",
        "capped attention scores": (getattr(cfg, "attn_scores_soft_cap", None) or -1.0) > 0,
        "attention sinks as parameters": getattr(getattr(block.attn, "original_component", None), "sinks", None)
        is not None,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise ModelError(
            f"{getattr(cfg, 'model_name', 'this model')} has {' and '.join(found)}; expected a pre-norm, causal "
            "decoder with sequential attention and MLP (GPT-2, Llama, Mistral, Qwen2, …): its measures would not "
            "hold, so they are refused"
        )
    missing = [n for n in LAYER_HOOKS.values() if f"blocks.0.{n}" not in hooks]
    if missing:
        raise ModelError(
            f"{getattr(cfg, 'model_name', 'this model')} has no hook {missing[0]!r} in its blocks; expected "
            "TransformerLens' standard hooks: load the model with attn_implementation='eager'"
        )


def _folded(model: HookedModel) -> bool:
    if getattr(model.cfg, "normalization_type", None) in ("LNPre", "RMSPre"):
        return True
    if not getattr(model, "compatibility_mode", False):
        return False
    norms = [model.ln_final] + [norm for block in model.blocks for norm in (block.ln1, block.ln2)]
    return all(bool((_gain(norm, model) == 1).all()) for norm in norms)


def _folded_final_gain(model: HookedModel) -> Float[Tensor, " d_model"] | None:
    """γ₃ of a folded model whose embedding was tied: then W_U = γ₃ · W_Eᵀ up to a shift; None where it was not."""
    embed, unembed = getattr(model, "W_E", None), getattr(model, "W_U", None)
    if embed is None or unembed is None or embed.T.shape != unembed.shape:
        return None
    some = slice(0, 4096)  # as many tokens say as much as all
    embed, unembed = embed.detach()[some].T.double(), unembed.detach()[:, some].double()
    embed = embed - embed.mean(1, keepdim=True)  # centring the unembedding over the vocabulary shifts it
    unembed = unembed - unembed.mean(1, keepdim=True)
    gain = (embed * unembed).sum(1) / embed.square().sum(1)
    residual = (unembed - gain[:, None] * embed).norm() / unembed.norm()
    return gain if bool(residual < 1e-3) else None


def _gain(norm: Any, model: HookedModel) -> Float[Tensor, " d_model"]:
    """A norm's γ as it multiplies: ones where folded away, one more than what is stored where the class says so."""
    weight = getattr(norm, "w", None)
    if weight is None:
        weight = getattr(norm, "weight", None)
    if weight is None:
        return model.blocks[0].attn.W_O.new_ones(model.cfg.d_model).detach()
    offset = bool(getattr(getattr(norm, "config", None), "rmsnorm_uses_offset", False))
    return weight.detach() + 1 if offset else weight.detach()


def _norm_bias(norm: Any) -> Float[Tensor, " d_model"] | None:
    bias = getattr(norm, "b", None)
    return None if bias is None else bias.detach()


def _centred(model: HookedModel) -> bool:
    """LayerNorm (subtracts the mean) or RMSNorm (does not)."""
    return "RMS" not in str(getattr(model.cfg, "normalization_type", "LN") or "LN")


def _weight(module: Any, name: str) -> Tensor | None:
    weight = getattr(module, name, None)
    return weight if isinstance(weight, Tensor) else None


def _detached(module: Any, name: str) -> Tensor | None:
    weight = _weight(module, name)
    return None if weight is None else weight.detach()


def _key_value_heads(cfg: Any, n_heads: int) -> int:
    return getattr(cfg, "n_key_value_heads", None) or n_heads


def _per_kv_head(weight: Tensor, layout: Layout) -> Tensor:
    """HookedTransformer repeats grouped keys and values for every head; keep one of each."""
    return weight[:: weight.shape[0] // layout.n_kv_heads]


def _score_scale(attn: Any, layout: Layout) -> float:
    """What q·k is multiplied by in the score; recording checks it against the scores themselves."""
    if isinstance(getattr(attn, "attn_scale", None), float):
        return 1.0 / attn.attn_scale
    scaling = getattr(getattr(attn, "original_component", None), "scaling", None)
    return float(scaling) if scaling is not None else attn.W_Q.shape[2] ** -0.5


def _activation(cfg: Any) -> Activation:
    name = getattr(cfg, "act_fn", None)
    if name not in ACTIVATIONS:
        raise ModelError(f"activation {name!r} came; expected one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]
