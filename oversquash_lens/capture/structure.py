"""What a model is made of, read from the hooks and modules that exist and from the config where it can be believed."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.activations import ACTIVATIONS, Activation
from oversquash_lens.errors import ModelError

_WHOLE_MODEL = object()  # of a layer that says nothing of its own window
# What transformers' configs call an MLP's activation.
ACTIVATION_WORDS = ("hidden_activation", "hidden_act", "activation_function", "activation")


def per_head_sinks(block: Any) -> Float[Tensor, " head"] | None:
    """Each head's score of nothing at all, a parameter where attention may look away (gpt-oss)."""
    sinks = getattr(getattr(block.attn, "original_component", block.attn), "sinks", None)
    return sinks.detach() if isinstance(sinks, Tensor) else None


def has_weight(module: Any, name: str) -> bool:
    return isinstance(getattr(module, name, None), Tensor)


def model_name(model: Any) -> str:
    return getattr(model.cfg, "model_name", None) or "this model"


def refuse_unknown_structure(model: Any, hooks: dict[str, Any]) -> None:
    """What would make the recorded hooks tell another story than the theory's equations."""
    cfg, block = model.cfg, model.blocks[0]
    normed = "blocks.0.ln1.hook_scale" in hooks
    architecture = str(getattr(cfg, "original_architecture", None) or getattr(cfg, "architecture", None) or "")
    reasons = {
        "no attention in its first block": not hasattr(block, "attn") or not has_weight(block.attn, "W_O"),
        "attention that is not causal": getattr(cfg, "attention_dir", "causal") != "causal",
        "norms behind attention and MLP only": "olmo2" in architecture.lower() or "olmo3" in architecture.lower(),
        "norms in some places only": normed != ("ln_final.hook_scale" in hooks),
        "queries and keys normalised across heads": _norms_across_heads(block),
        "blocks that differ in kind": len({mlp_kind(each) for each in model.blocks if hasattr(each, "attn")}) > 1
        or not all(hasattr(each, "attn") for each in model.blocks),
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise ModelError(
            f"{model_name(model)} has {' and '.join(found)}; expected a causal decoder that normalises what attention "
            "and MLP read, or nothing (GPT-2, NeoX, Llama, Qwen, Gemma, Mixtral, …): its measures would not hold, so "
            "they are refused"
        )


def mlp_kind(block: Any) -> str:
    mlp = getattr(block, "mlp", None)
    if mlp is None:
        return "none"
    if has_weight(mlp, "W_gate") and has_weight(mlp, "W_in"):
        return "gated"
    return "plain" if has_weight(mlp, "W_in") else "experts"


def norms(model: Any, hooks: dict[str, Any]) -> str:
    if "blocks.0.ln1.hook_scale" not in hooks:
        return "none"
    return "rms" if "RMS" in str(getattr(model.cfg, "normalization_type", "LN") or "LN") else "layer"


def parallel(model: Any, hooks: dict[str, Any]) -> bool:
    return hasattr(model.blocks[0], "mlp") and "blocks.0.hook_resid_mid" not in hooks


def _norms_across_heads(block: Any) -> bool:
    norm = getattr(block.attn, "q_norm", None) if hasattr(block, "attn") else None
    weight = getattr(norm, "w", None) if norm is not None else None
    weight = getattr(norm, "weight", None) if weight is None else weight
    return weight is not None and weight.numel() != block.attn.W_Q.shape[2]


def soft_cap(model: Any) -> float | None:
    """c of c·tanh(score / c); None where scores are not capped."""
    own = getattr(getattr(model.blocks[0].attn, "original_component", None), "attn_logit_softcapping", None)
    cap = own if own is not None else getattr(model.cfg, "attn_scores_soft_cap", None)
    return float(cap) if cap is not None and cap > 0 else None


def window(model: Any, layer: int) -> int | None:
    """How many positions a layer sees, itself included; None for all of them."""
    component = getattr(model.blocks[layer].attn, "original_component", None)
    if component is None:
        kinds = getattr(model.cfg, "attn_types", None)
        local = getattr(model.cfg, "use_local_attn", False) and kinds is not None and kinds[layer] == "local"
        return model.cfg.window_size if local else None
    found = getattr(component, "sliding_window", _WHOLE_MODEL)
    if found is _WHOLE_MODEL:  # Mistral, Mixtral, Phi-3: all layers see as far as the config says
        found = getattr(wrapped_config(model), "sliding_window", None)
    return found if isinstance(found, int) and found > 0 else None


def activation(model: Any) -> Activation:
    """A bridge's own word for it is not always true; what it wraps knows better."""
    config = wrapped_config(model)
    named = (getattr(config, word, None) for word in ACTIVATION_WORDS)
    name = next((each for each in named if isinstance(each, str)), None) or getattr(model.cfg, "act_fn", None)
    name = "gelu_new" if getattr(config, "model_type", "") == "bloom" else name  # it has no word for its own
    if name not in ACTIVATIONS:
        raise ModelError(f"expected one of {', '.join(sorted(ACTIVATIONS))}, got activation {name!r}")
    return ACTIVATIONS[name]


def wrapped_config(model: Any) -> Any:
    """transformers' config of what a bridge wraps; None for a HookedTransformer."""
    return getattr(getattr(model, "original_model", None), "config", None)


def score_factor(model: Any) -> float:
    """Rotations that stretch what they turn (YaRN) do so to queries and keys both."""
    inner = getattr(getattr(model, "original_model", None), "model", None)
    return float(getattr(getattr(inner, "rotary_emb", None), "attention_scaling", None) or 1.0) ** 2


def rotary_dim(model: Any) -> int:
    """How many coordinates of a head GPT-J's way of rotating turns; 0 where a config has no word for it."""
    return getattr(wrapped_config(model), "rotary_dim", None) or 0


def rotation(model: Any, hooks: dict[str, Any]) -> str:
    """Where queries and keys are to be had as they meet in the score: one of architecture.ROTATIONS."""
    attn = model.blocks[0].attn
    kinds = {kind.__name__ for kind in type(attn).__mro__}
    if type(model).__name__ == "HookedTransformer":
        known = {"rotary": "shown", "standard": "none", "alibi": "none"}
        scaled = getattr(model.cfg, "use_logn_attn", False)  # queries are scaled behind the hook
        return "unknown" if scaled else known.get(model.cfg.positional_embedding_type, "unknown")
    if "JointQKVPositionEmbeddingsAttentionBridge" in kinds:
        return "tables"
    if "PositionEmbeddingsAttentionBridge" in kinds:
        return "shown" if "blocks.0.attn.hook_rot_q" in hooks else "none"
    if type(attn).__name__ == "AttentionBridge" and rotary_dim(model):
        return "pairs"
    turned = getattr(model.cfg, "positional_embedding_type", None) == "rotary"
    return "unknown" if turned else "none"


def biased(model: Any) -> bool:
    """Whether scores carry ALiBi's bias, wherever it is counted from."""
    return alibi(model) or getattr(model.cfg, "positional_embedding_type", None) == "alibi"


def alibi(model: Any) -> bool:
    """Whether scores carry a bias that is counted from the first position, as transformers writes ALiBi."""
    config = wrapped_config(model)
    return bool(getattr(config, "alibi", False)) or getattr(config, "model_type", "") == "bloom"
