"""Small random bridges of more architectures than the measures' tests need; nothing here asks the network."""

from __future__ import annotations

import os
from typing import Any

import torch
from small_models import D_VOCAB, N_CTX, _random_value, tokenizer

COMMON = {
    "vocab_size": D_VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": N_CTX,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
ONLY_BLOOM = {"vocab_size": D_VOCAB, "hidden_size": 16, "n_layer": 2, "n_head": 4}
# Name -> transformers' classes (…ForCausalLM, …Config) and what they are made of.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", COMMON | {"sliding_window": None}),
    "mistral-window": ("Mistral", COMMON | {"sliding_window": 4}),
    "qwen2": ("Qwen2", COMMON),
    "gemma": ("Gemma", COMMON | {"head_dim": 8}),
    "bloom": ("Bloom", ONLY_BLOOM),
}


def small_bridge(seed: int, name: str, *, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """A TransformerBridge over a tiny Hugging Face model of random weights, of N_CTX positions.

    `config` overrides the configuration; its weights are of `dtype`, but most classes compute norms, softmax or
    rotations in float32.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    family, defaults = ARCHITECTURES[name]
    made = getattr(transformers, f"{family}Config")(**defaults | config)
    hf = getattr(transformers, f"{family}ForCausalLM")(made).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for label, parameter in hf.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(_random_value(label, noise, transposed=False))
    return TransformerBridge.boot_transformers(
        f"tiny-random-{name}", hf_model=hf, tokenizer=tokenizer(), dtype=dtype, device="cpu"
    )
