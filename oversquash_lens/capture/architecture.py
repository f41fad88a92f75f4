"""What differs between HookedTransformer and TransformerBridge, and between architectures, in one table.

Both classes answer to the same hook aliases; which of them an architecture has, and what its equations lack or add
(docs/theory.md, section 10), is looked up here and nowhere else. Structure is read from the hooks and modules that
exist, not from the config, which a bridge does not keep up to date.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from oversquash_lens.capture.hooked_model import (
    ACTIVATIONS,
    activation_name,
    activation_of,
    centres,
    clip,
    folded_final_gain,
    head_norms,
    is_a,
    is_folded,
    is_hooked_transformer,
    known_class,
    norm_behind,
    norm_gain,
    norms,
    norms_across_heads,
    weight_of,
    wrapped_config,
    wrapped_model,
)
from oversquash_lens.errors import InputError, ModelError

# What is recorded in each layer -> the hook's name inside `blocks.{layer}.` of both classes, in the order of firing.
LAYER_HOOKS = {
    "residual": "hook_resid_pre",
    "attention_scale": "ln1.hook_scale",
    "query": "attn.hook_q",
    "key": "attn.hook_k",
    "value": "attn.hook_v",
    "cos": "attn.hook_cos",
    "sin": "attn.hook_sin",
    "turned_query": "attn.hook_rot_q",
    "turned_key": "attn.hook_rot_k",
    "scores": "attn.hook_attn_scores",
    "pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "attention_post_scale": "ln1_post.hook_scale",
    "middle": "hook_resid_mid",
    "mlp_scale": "ln2.hook_scale",
    "pre": "mlp.hook_pre",
    "pre_linear": "mlp.hook_pre_linear",
    "post": "mlp.hook_post",
    "mlp_post_scale": "ln2_post.hook_scale",
    "mlp_post_normalized": "ln2_post.hook_normalized",
    "mlp_out": "hook_mlp_out",
}
# The property of a `Architecture` without which a layer has no such hook; every layer has those that are not listed.
ONLY_IF = {
    "attention_scale": "pre_norms",
    "attention_post_scale": "post_norms",
    "middle": "sequential",
    "mlp_scale": "own_mlp_norm",
    "pre": "dense",
    "pre_linear": "gated",
    "post": "dense",
    "mlp_post_scale": "post_norms",
    "mlp_post_normalized": "post_norms",
    "mlp_out": "experts",
}
# How attention is recorded: "kept" keeps the pattern; "recomputed" what makes it anew, in the class's own pass; "fused"
# the same, in a pass of our own that makes no pattern (oversquash_lens.capture.fused).
ROUTES = ("kept", "recomputed", "fused")
# Where a layer shows queries and keys as they meet in the score: before any turn ("none"), in hooks behind it
# ("shown"), before it and beside the tables that turn them ("tables"), before it only, turned as GPT-J does ("pairs").
ROTATIONS = ("none", "shown", "tables", "pairs", "unknown")
# Which route listens to what only some do, and with which rotation.
ONLY_ON = {
    "cos": (("recomputed",), ("tables",)),
    "sin": (("recomputed",), ("tables",)),
    "turned_query": (("recomputed",), ("shown",)),
    "turned_key": (("recomputed",), ("shown",)),
    "scores": (("kept",), ROTATIONS),
    "pattern": (("kept", "recomputed"), ROTATIONS),
}
FINAL_HOOKS = {
    "last": "blocks.{last}.hook_resid_post",
    "final_scale": "ln_final.hook_scale",
    "prediction_input": "unembed.hook_in",
}
_COMPONENTS = "transformer_lens.model_bridge.generalized_components"
_UNSAID = object()  # of a layer that says nothing of its own window


@dataclass(frozen=True)
class Architecture:
    """A hooked model's structure: which of the theory's terms it has.

    `obstacle` says what keeps every recording from describing the model, None where nothing does; what needs no
    recording (the measured sensitivity, collapse, the hook utilities) is not touched by it. `hooked`: a
    HookedTransformer or a class made from it, rather than a bridge. `mlp` is "plain", "gated", "experts" or "none".
    `fused_obstacle`: what a pass has shown to be in the way of fused attention.
    `norms` is "layer" (subtracts the mean), "rms" or "none". `parallel`: attention and MLP both read the residual
    that enters the layer; `shared_norm`: through one norm. `pre_norms`: attention and MLP read a normalised residual;
    `post_norms`: what they write is normalised, by norms called ln1 and ln2 with `behind` added. `qk_norm`: queries and
    keys are, head by head or (`qk_across`) all heads together; `qk_centred`: their mean is taken away. `clip`: queries,
    keys and values are cut to ±clip. `multiplier`: of what attention and MLP add to the residual. `steep`: the slope of
    the MLP's activation has no bound. `delegated`: the attention is computed out of the hooks' sight,
    which show the scores only after the softmax; `rotary_dim` then says how much of a head its positions turn.
    `rotation`: one of `ROTATIONS`. `biased`: scores carry a bias that grows with the position. `windows`: how many
    positions each layer sees, None for all. `score_factor`: what stretched rotations multiply scores by (YaRN).
    """

    name: str
    hooked: bool
    obstacle: str | None
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_mlp: int
    n_ctx: int
    norms: str
    parallel: bool
    shared_norm: bool
    pre_norms: bool
    behind: str | None
    qk_norm: bool
    qk_across: bool
    qk_centred: bool
    clip: float | None
    multiplier: float
    mlp: str
    delegated: bool
    rotary_dim: int
    rotation: str
    biased: bool
    score_factor: float
    soft_cap: float | None
    windows: tuple[int | None, ...]
    sinks: bool
    eps: float
    steep: bool
    dtype: torch.dtype
    folded: bool
    final_gain: Float[Tensor, " d_model"]
    final_gain_state: str
    restore_gain: Float[Tensor, " d_model"] | None
    fused_obstacle: str | None = None

    @property
    def normed(self) -> bool:
        return self.norms != "none"

    @property
    def centred(self) -> bool:
        return self.norms == "layer"

    @property
    def post_norms(self) -> bool:
        return self.behind is not None

    @property
    def dense(self) -> bool:
        return self.mlp in ("plain", "gated")

    @property
    def gated(self) -> bool:
        return self.mlp == "gated"

    @property
    def experts(self) -> bool:
        return self.mlp == "experts"

    @property
    def sequential(self) -> bool:
        return self.mlp != "none" and not self.parallel

    @property
    def own_mlp_norm(self) -> bool:
        return self.mlp != "none" and self.pre_norms and not self.shared_norm

    def layer_hooks(self, route: str = "kept") -> dict[str, str]:
        """Key -> name inside `blocks.{layer}.` of the hooks that a route listens to in a layer of this model."""
        return self._hooks_of[route]

    @cached_property  # asked for at every hook of every layer
    def _hooks_of(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {route: {} for route in ROUTES}
        for key, name in LAYER_HOOKS.items():
            routes, rotations = ONLY_ON.get(key, (ROUTES, ROTATIONS))
            if self.rotation in rotations and (key not in ONLY_IF or getattr(self, ONLY_IF[key])):
                for route in routes:
                    found[route][key] = name.replace("_post.", f"{self.behind or ''}.")
        return found

    def final_hooks(self) -> dict[str, str]:
        found = {key: name.format(last=self.n_layers - 1) for key, name in FINAL_HOOKS.items()}
        return found if self.normed else {key: name for key, name in found.items() if key != "final_scale"}

    def scale_hooks(self) -> tuple[str, ...]:
        """The norms' divisors inside a layer; those of queries and keys apart."""
        return tuple(name for key, name in self.layer_hooks().items() if key.endswith("_scale"))

    def check_recordable(self) -> None:
        """Raise the ModelError that says why no recording describes this model, where none does."""
        if self.obstacle is not None:
            raise ModelError(f"{self.name} has {self.obstacle}")


def check_class(model: Any) -> None:
    """Raise an InputError for what is no hooked model, a ModelError for one that is no decoder."""
    if not (isinstance(model, nn.Module) and hasattr(model, "hook_dict") and hasattr(model, "cfg")):
        raise InputError(
            f"expected a HookedTransformer or TransformerBridge, got a {type(model).__name__}: load one with "
            "oversquash_lens.load_model()"
        )
    if not all(hasattr(model, name) for name in ("blocks", "embed", "unembed")):
        raise ModelError(
            f"{getattr(model.cfg, 'model_name', None) or 'this model'} has no embedding, blocks and unembedding of one "
            "stack; expected a causal decoder (GPT-2, NeoX, Llama, Qwen, Gemma, …)"
        )


def read_architecture(model: Any) -> Architecture:
    """Read a model's structure, no pass is made; an InputError or ModelError for what is no causal hooked model."""
    check_class(model)
    hooks = model.hook_dict
    cfg, block = model.cfg, model.blocks[0]
    name = getattr(cfg, "model_name", None) or "this model"
    if getattr(cfg, "attention_dir", "causal") != "causal":
        raise ModelError(
            f"{name} has attention that is not causal; expected a causal decoder (GPT-2, NeoX, Llama, Qwen, Gemma, …), "
            "for which every measure here is made"
        )
    obstacles = _obstacles(model, hooks)
    folded = is_folded(model)
    restore = folded_final_gain(model) if folded else None
    weight, mlp = weight_of(getattr(block, "attn", None), "W_O"), mlp_kind(block)
    n_heads = cfg.n_heads if weight is None else weight.shape[0]
    grouped = (
        None if getattr(cfg, "ungroup_grouped_query_attention", False) else getattr(cfg, "n_key_value_heads", None)
    )
    activation = activation_of(model, 0) if mlp in ("plain", "gated") else None
    if mlp in ("plain", "gated") and activation is None:
        obstacles.append(
            f"an activation that is no function of each neuron by itself; expected one such as "
            f"{', '.join(sorted(ACTIVATIONS))}, got {activation_name(model)!r}"
        )
    behind = norm_behind(model, hooks)
    head_norm = next((each[0] for each in (head_norms(getattr(b, "attn", None)) for b in model.blocks) if each), None)
    architecture = Architecture(
        name=name,
        hooked=is_hooked_transformer(model),
        obstacle=None,
        n_layers=len(model.blocks),
        n_heads=n_heads,
        n_kv_heads=grouped or n_heads,
        d_model=cfg.d_model if weight is None else weight.shape[2],
        d_mlp=block.mlp.W_out.shape[0] if mlp in ("plain", "gated") else 0,
        n_ctx=cfg.n_ctx or 1 << 31,  # one that says none reads any length
        norms=norms(model, hooks),
        parallel=parallel(model, hooks),
        shared_norm=parallel(model, hooks) and "blocks.0.ln2.hook_scale" not in hooks,
        pre_norms="blocks.0.ln1.hook_scale" in hooks and behind != "",
        behind=behind,
        qk_norm=head_norm is not None,
        qk_across=norms_across_heads(model, head_norm),
        qk_centred=centres(head_norm),
        clip=clip(block),
        multiplier=float(getattr(getattr(block, "original_component", None), "residual_multiplier", 1.0)),
        mlp=mlp,
        delegated=delegated(block),
        rotary_dim=rotary_dim(model),
        rotation=rotation(model, hooks),
        biased=biased(model),
        score_factor=score_factor(model),
        soft_cap=soft_cap(model),
        windows=tuple(window(model, layer) for layer in range(len(model.blocks))),
        sinks=per_head_sinks(block) is not None,
        eps=float(getattr(cfg, "eps", None) or 1e-5),
        steep=activation is not None and math.isinf(activation.lipschitz),
        dtype=next(model.parameters()).dtype if weight is None else weight.dtype,
        folded=folded,
        final_gain=norm_gain(getattr(model, "ln_final", None), model) if restore is None else restore,
        final_gain_state="model" if not folded else ("restored" if restore is not None else "unknown"),
        restore_gain=restore,
    )
    missing = [each for each in architecture.layer_hooks().values() if f"blocks.0.{each}" not in hooks]
    if missing and not obstacles:
        obstacles.append(
            f"no hook {missing[0]!r} in its blocks; expected TransformerLens' standard hooks: load the model with "
            "attn_implementation='eager'"
        )
    return replace(architecture, obstacle=obstacles[0] if obstacles else None)


# ---------------------------------------------------------------- what is read of structure, one fact a function


def _obstacles(model: Any, hooks: dict[str, Any]) -> list[str]:
    """What would make the recorded hooks tell another story than the theory's equations."""
    attention, before = ([getattr(each, name, None) for each in model.blocks] for name in ("attn", "ln1"))
    kinds = {mlp_kind(b) for b, a in zip(model.blocks, attention, strict=True) if a is not None}
    reasons = {
        "no attention in its first block": weight_of(attention[0], "W_O") is None,
        "attention without query and key weights of its own (latent attention)": weight_of(attention[0], "W_O")
        is not None
        and any(weight_of(attention[0], each) is None for each in ("W_Q", "W_K", "W_V")),
        "norms in some places only": (norms(model, hooks) != "none") != ("ln_final.hook_scale" in hooks)
        or any(is_a(getattr(each, "original_component", None), "torch.nn", "Identity") for each in before),
        "a residual stream that is normalised itself": bool(
            getattr(wrapped_config(model), "apply_residual_connection_post_layernorm", False)
        ),
        "values that are normalised": any(hasattr(getattr(a, "original_component", None), "v_norm") for a in attention),
        "blocks that differ in kind": len(kinds) > 1 or None in attention,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    expected = (
        "; expected query, key and value weights of every head in every block, and norms on what attention and MLP "
        "read, or none (GPT-2, NeoX, Llama, Qwen, Gemma, Mixtral, …), for a recording to describe it; "
        "oversquash_lens.support(model) names the measures that remain"
    )
    return [" and ".join(found) + expected] if found else []


def per_head_sinks(block: Any) -> Float[Tensor, " head"] | None:
    """Each head's score of nothing at all, a parameter where attention may look away (gpt-oss)."""
    attn = getattr(block, "attn", None)
    sinks = getattr(getattr(attn, "original_component", attn), "sinks", None)
    return sinks.detach() if isinstance(sinks, Tensor) else None


def mlp_kind(block: Any) -> str:
    mlp = getattr(block, "mlp", None)
    if mlp is None:
        return "none"
    if weight_of(mlp, "W_gate") is not None and weight_of(mlp, "W_in") is not None:
        return "gated"
    return "plain" if weight_of(mlp, "W_in") is not None else "experts"


def parallel(model: Any, hooks: dict[str, Any]) -> bool:
    return hasattr(model.blocks[0], "mlp") and "blocks.0.hook_resid_mid" not in hooks


def soft_cap(model: Any) -> float | None:
    """c of c·tanh(score / c); None where scores are not capped."""
    attn = getattr(model.blocks[0], "attn", None)
    own = getattr(getattr(attn, "original_component", None), "attn_logit_softcapping", None)
    cap = own if own is not None else getattr(model.cfg, "attn_scores_soft_cap", None)
    return float(cap) if cap is not None and cap > 0 else None


def window(model: Any, layer: int) -> int | None:
    """How many positions a layer sees, itself included; None for all of them."""
    component = getattr(getattr(model.blocks[layer], "attn", None), "original_component", None)
    if component is None:
        kinds = getattr(model.cfg, "attn_types", None)
        local = getattr(model.cfg, "use_local_attn", False) and kinds is not None and kinds[layer] == "local"
        return model.cfg.window_size if local else None
    if getattr(component, "attention_type", None) == "local":  # GPT-Neo
        return component.config.window_size
    kinds = getattr(wrapped_config(model), "layer_types", None)
    if kinds is not None and kinds[layer] == "full_attention":  # EXAONE-4's know the others' window, too
        return None
    found = getattr(component, "sliding_window", _UNSAID)
    if found is _UNSAID:  # Mistral, Mixtral, Phi-3: all layers see as far as the config says
        found = getattr(wrapped_config(model), "sliding_window", None)
    return found if isinstance(found, int) and found > 0 else None


def score_factor(model: Any) -> float:
    """Rotations that stretch what they turn (YaRN) do so to queries and keys both."""
    inner = getattr(wrapped_model(model), "model", None)
    return float(getattr(getattr(inner, "rotary_emb", None), "attention_scaling", None) or 1.0) ** 2


def rotary_dim(model: Any) -> int:
    """How many coordinates of a head GPT-J's way of rotating turns; 0 where a config has no word for it."""
    return getattr(wrapped_config(model), "rotary_dim", None) or 0


def rotation(model: Any, hooks: dict[str, Any]) -> str:
    """Where queries and keys are to be had as they meet in the score: one of ROTATIONS."""
    if is_hooked_transformer(model):
        known = {"rotary": "shown", "standard": "none", "alibi": "none"}
        scaled = getattr(model.cfg, "use_logn_attn", False)  # queries are scaled behind the hook
        return "unknown" if scaled else known.get(model.cfg.positional_embedding_type, "unknown")
    attn = getattr(model.blocks[0], "attn", None)
    if is_a(attn, _COMPONENTS, "JointQKVPositionEmbeddingsAttentionBridge"):
        return "tables"
    if is_a(attn, _COMPONENTS, "PositionEmbeddingsAttentionBridge"):
        return "shown" if "blocks.0.attn.hook_rot_q" in hooks else "none"
    if delegated(model.blocks[0]) and rotary_dim(model):
        return "pairs"
    turned = getattr(model.cfg, "positional_embedding_type", None) == "rotary"
    return "unknown" if turned else "none"


def delegated(block: Any) -> bool:
    """Whether attention is left to the module that a bridge wraps: its plain class does, most others compute it."""
    attn = getattr(block, "attn", None)
    plain = known_class(_COMPONENTS, "AttentionBridge")
    return plain is not None and isinstance(attn, plain) and getattr(type(attn), "forward", None) is plain.forward


def biased(model: Any) -> bool:
    """Whether scores carry ALiBi's bias, wherever it is counted from."""
    config = wrapped_config(model)
    own = getattr(config, "alibi", False) or getattr(config, "model_type", "") == "bloom"
    return bool(own) or getattr(model.cfg, "positional_embedding_type", None) == "alibi"
