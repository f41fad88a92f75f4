"""Tiny random models that mix positions by other means than a softmax over keys that are projected head by head.

Latent attention, state-space models, linear attention, short convolutions, and hybrids of these with attention; each
a TransformerBridge over transformers' own class. A family is one row of MIXERS. `plain` is transformers' model, and
`mixer` a bridge over a copy of it, so that both can be compared.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from small_models import D_VOCAB, N_CTX, NO_BRIDGE, has_bridge, tokenizer

SIZES: dict[str, Any] = {"vocab_size": D_VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": N_CTX}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
LATENT |= {"num_key_value_heads": 4, "head_dim": 4}
EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXPERTS |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4}
LINEAR |= {"linear_value_head_dim": 4, "head_dim": 4, "layer_types": ["linear_attention", "full_attention"]}
FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@dataclass(frozen=True)
class Mixer:
    """`prefix` of transformers' classes, `config` beside SIZES; `config_prefix` where the config's class has another.

    `patterns`: whether a bridge shows a pattern in every layer.
    """

    prefix: str
    config: dict[str, Any] = field(default_factory=dict)
    config_prefix: str | None = None
    patterns: bool = False


MIXERS: dict[str, Mixer] = {
    "deepseek-v2": Mixer("DeepseekV2", LATENT | EXPERTS | {"topk_method": "greedy"}, patterns=True),
    "deepseek-v3": Mixer("DeepseekV3", LATENT | EXPERTS, patterns=True),
    "deepseek-v3-dense": Mixer("DeepseekV3", LATENT | EXPERTS | {"first_k_dense_replace": 2}, patterns=True),
    "glm4-moe-lite": Mixer("Glm4MoeLite", LATENT | EXPERTS, patterns=True),
    "youtu": Mixer("Youtu", LATENT, patterns=True),
    "mamba": Mixer("Mamba", {"state_size": 4}),
    "falcon-mamba": Mixer("FalconMamba", {"state_size": 4}),
    "mamba2": Mixer("Mamba2", {"num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1, "chunk_size": 4}),
    "rwkv": Mixer("Rwkv", {"context_length": N_CTX, "attention_hidden_size": 16}),
    "recurrent-gemma": Mixer(
        "RecurrentGemma", {"block_types": ["recurrent", "attention"], "attention_window_size": 8, "lru_width": 16}
    ),
    "jamba": Mixer(
        "Jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4}
        | {"use_mamba_kernels": False},
    ),
    "falcon-h1": Mixer("FalconH1", MAMBA2 | {"mamba_d_ssm": 32, "head_dim": 4}),
    "bamba": Mixer("Bamba", MAMBA2 | {"attn_layer_indices": [1]}),
    "zamba2": Mixer(
        "Zamba2",
        {"mamba_d_state": 4, "mamba_ngroups": 1, "n_mamba_heads": 4, "chunk_size": 4, "num_hidden_layers": 4}
        | {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_key_value_heads": 4, "adapter_rank": 4}
        | {"use_mamba_kernels": False},
    ),
    "nemotron-h": Mixer(
        "NemotronH",
        {"layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 4, "mamba_head_dim": 8}
        | {"ssm_state_size": 4, "n_groups": 1, "chunk_size": 4, "head_dim": 4, "use_mamba_kernels": False},
    ),
    "granite-hybrid": Mixer(
        "GraniteMoeHybrid",
        MAMBA2
        | {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "shared_intermediate_size": 24}
        | {"position_embedding_type": "rope"},
    ),
    "lfm2": Mixer("Lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "lfm2-moe": Mixer("Lfm2Moe", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1} | FEW_EXPERTS),
    "qwen3-next": Mixer("Qwen3Next", LINEAR | FEW_EXPERTS | {"shared_expert_intermediate_size": 24}),
    "qwen3.5": Mixer("Qwen3_5", LINEAR, config_prefix="Qwen3_5Text"),
    "olmo-hybrid": Mixer("OlmoHybrid", LINEAR | {"num_key_value_heads": 4}),
}


def lacking_mixer(name: str) -> str | None:
    """Why the installed TransformerLens and transformers have no such bridge; None where they have."""
    import transformers

    if not has_bridge():
        return NO_BRIDGE
    from transformer_lens.factories import architecture_adapter_factory as factory

    row = MIXERS[name]
    known = factory.SUPPORTED_ARCHITECTURES
    if not hasattr(transformers, f"{row.prefix}ForCausalLM") or f"{row.prefix}ForCausalLM" not in known:
        return f"neither library may lack {row.prefix}"
    return None


def plain_mixer(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """transformers' own model of the family, every weight drawn."""
    import transformers

    row = MIXERS[name]
    made = getattr(transformers, f"{row.config_prefix or row.prefix}Config")(**SIZES | row.config | config)
    made._attn_implementation = "eager"
    made._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{row.prefix}ForCausalLM")(made)
    made.architectures = [type(model).__name__]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in label or label.endswith(("ln1.weight", "ln2.weight", "ln_out.weight")):
                parameter.add_(0.2 * noise)  # around what the class begins with, 0 or 1
            elif noise.ndim == 2:
                parameter.copy_(noise * noise.shape[-1] ** -0.5)
            else:  # decays, steps, convolutions: near what the class begins with, where they are stable
                parameter.add_(0.1 * noise)
    return model.to(dtype).eval()


def bridge_over(made: Any) -> Any:
    """A TransformerBridge over this very model."""
    from transformer_lens.model_bridge import TransformerBridge

    dtype = next(made.parameters()).dtype
    model = TransformerBridge.boot_transformers("tiny", hf_model=made, tokenizer=tokenizer(), dtype=dtype, device="cpu")
    return model.eval()


def mixer(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A TransformerBridge over a tiny model of the family."""
    return bridge_over(copy.deepcopy(plain_mixer(name, seed, dtype, **config)))
