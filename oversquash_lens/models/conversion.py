"""Plain Llama and Qwen2 weights into HookedTransformer by a config written here: no hub, no list of names."""

from __future__ import annotations

from typing import Any

import torch

from oversquash_lens.errors import ModelError
from oversquash_lens.models.sources import Loading, Weights

CONVERTERS = {"LlamaForCausalLM": "convert_llama_weights", "Qwen2ForCausalLM": "convert_qwen2_weights"}
# Largest difference from Hugging Face's logits as a share of the largest: room for rounding, not for a wrong
# conversion.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def obstacle(config: Any, architecture: str) -> str | None:
    """Why these weights cannot be converted here, in words; None if they can."""
    if architecture not in CONVERTERS:
        return f"{architecture} is none of {', '.join(CONVERTERS)}"
    if architecture == "LlamaForCausalLM" and getattr(config, "attention_bias", False):
        return "its attention has biases"
    if getattr(config, "mlp_bias", False):
        return "its MLP has biases"
    if getattr(config, "use_sliding_window", False):
        return "its attention has a sliding window"
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"its rotary positions are of the kind {rope['rope_type']!r}"
    return None


def converted(model_class: Any, found: Weights, loading: Loading, fold_ln: bool) -> Any:
    """The same model as a HookedTransformer on `loading.device`, checked against Hugging Face's logits."""
    import transformer_lens.pretrained.weight_conversions as conversions

    cfg = _config(found, loading, "RMSPre" if fold_ln else "RMS")
    model = model_class(cfg)
    convert = getattr(conversions, CONVERTERS[cfg.original_architecture])
    with torch.no_grad():
        state = convert(found.model, cfg)
        if fold_ln:
            model.load_and_process_state_dict(
                state, fold_ln=True, center_writing_weights=False, center_unembed=False, fold_value_biases=False
            )
        else:  # what the other branch does with every flag off, but there once for each of 500 tensors: 6 s
            model.load_state_dict(model.fill_missing_keys(state), strict=False)
    for block in model.blocks:  # TransformerLens 2 makes one n_ctx² table a layer: 2 GB for SmolLM2
        block.attn.mask = model.blocks[0].attn.mask
    model.set_tokenizer(found.tokenizer)
    _check_logits(model.eval(), found)
    return model


def _config(found: Weights, loading: Loading, normalization_type: str) -> Any:
    from transformer_lens import HookedTransformerConfig

    config = found.model.config
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = _rope(config)
    scaled = {}
    if rope["rope_type"] == "llama3":
        scaled = {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_by_parts_factor": rope["factor"],
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
        }
    return HookedTransformerConfig(
        model_name=found.label,
        original_architecture=config.architectures[0],
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        d_head=d_head,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        n_ctx=config.max_position_embeddings,
        d_vocab=config.vocab_size,
        act_fn=config.hidden_act,
        gated_mlp=True,
        normalization_type=normalization_type,
        final_rms=True,
        eps=config.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_adjacent_pairs=False,
        rotary_base=rope["rope_theta"],
        init_weights=False,  # random numbers that would be overwritten at once
        dtype=loading.dtype,
        device=str(loading.device),
        **scaled,
    )


def _rope(config: Any) -> dict[str, Any]:
    """Rotary parameters in one form: transformers 5 has one dictionary, 4 a base and an optional scaling."""
    found = getattr(config, "rope_parameters", None)
    if found is None:
        scaling = getattr(config, "rope_scaling", None) or {}
        found = {"rope_theta": getattr(config, "rope_theta", 10_000.0), **scaling}
    kind = found.get("rope_type") or found.get("type") or "default"
    return {"rope_theta": 10_000.0, **found, "rope_type": kind}


def _check_logits(model: Any, found: Weights) -> None:
    """A wrong conversion must not pass: eight tokens through both, before Hugging Face's copy goes away."""
    tokens = torch.arange(1, 9).remainder(found.model.config.vocab_size)[None]
    with torch.no_grad():
        expected = found.model(tokens).logits
        came = model(tokens.to(model.cfg.device)).to(expected.device)
    apart = ((came - expected).abs().max() / expected.abs().max()).item()
    if apart > TOLERANCE[came.dtype]:
        raise ModelError(
            f"{found.label} as a HookedTransformer differs from Hugging Face's logits by {apart:.2g} of the "
            f"largest, expected at most {TOLERANCE[came.dtype]:.2g}. Use kind='bridge'."
        )
