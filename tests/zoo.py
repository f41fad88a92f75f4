"""Tiny random models of every family, as each model class that has it; nothing here asks the network.

A family is one row of FAMILIES. As "bridge" it is a TransformerBridge over transformers' own classes, as
"compatible" the same in TransformerLens' compatibility mode, as "hooked" a HookedTransformer of the same structure
made from its config. Every weight, bias and gain is drawn, none is left at zero; patterns are uneven, activations
of the order of 1. The weights are float64, but most of transformers' classes compute norms, softmax or rotations
in float32.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pytest
import torch
from small_models import D_VOCAB, N_CTX, NO_BRIDGE, NO_HOOKED, has_bridge, has_hooked, tokenizer

KINDS = ("hooked", "bridge", "compatible")
WINDOW = 4
D_MODEL, D_HEAD, D_MLP, HEADS, KV_HEADS, LAYERS = 16, 4, 24, 4, 2, 2


@dataclass(frozen=True)
class Family:
    """What a family is made of: transformers' class prefix with config, HookedTransformerConfig's fields.

    `hooked` None: HookedTransformer has no such structure. `causal_lm` is what the class is called behind the
    prefix; `process` what `load_and_process_state_dict` is asked to fold; `compatible`: worth a row of its own
    in compatibility mode.
    """

    prefix: str | None = None
    bridge: dict[str, Any] | None = None
    hooked: dict[str, Any] | None = None
    causal_lm: str = "ForCausalLM"
    process: dict[str, bool] | None = None
    compatible: bool = False

    def kinds(self) -> tuple[str, ...]:
        having = {"hooked": self.hooked, "bridge": self.bridge, "compatible": self.bridge if self.compatible else None}
        return tuple(kind for kind in KINDS if having[kind] is not None)


# transformers' words for the sizes: what most classes call them, GPT-2's and its heirs', and the exceptions.
SIZES = {
    "vocab_size": D_VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": N_CTX,
}
GROUPED = SIZES | {"num_key_value_heads": KV_HEADS}
OLD_SIZES = {"vocab_size": D_VOCAB, "n_embd": D_MODEL, "n_inner": D_MLP, "n_layer": LAYERS, "n_head": HEADS}
OLD_SIZES |= {"n_positions": N_CTX}
OPT_SIZES = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
OPT_SIZES |= {"ffn_dim": D_MLP, "word_embed_proj_dim": D_MODEL}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
GEMMA_SIZES = GROUPED | MIXED | {"head_dim": 2 * D_HEAD, "query_pre_attn_scalar": 2 * D_HEAD}
MPT_SIZES = {"vocab_size": D_VOCAB, "d_model": D_MODEL, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": N_CTX}
MULTIPLIERS = {"attention_multiplier": 0.3, "residual_multiplier": 0.4, "embedding_multiplier": 3.0}
MULTIPLIERS |= {"logits_scaling": 4.0}
CLIP = 0.6
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": D_MLP, "decoder_sparse_step": 1, "num_experts": 4}

# HookedTransformerConfig's words for the structure.
ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": D_HEAD}
PARTIAL = {"positional_embedding_type": "rotary", "rotary_dim": D_HEAD // 2}
RMS = {"normalization_type": "RMS", "final_rms": True, "gated_mlp": True}
LLAMA = RMS | ROTARY | {"act_fn": "silu", "n_key_value_heads": KV_HEADS}
LOCAL = {"use_local_attn": True, "window_size": WINDOW, "attn_types": ["local", "local"]}
LOCAL_GLOBAL = LOCAL | {"attn_types": ["local", "global"]}
POST_NORMS = {"use_normalization_before_and_after": True}
MOE = {"num_experts": 4, "experts_per_token": 2, "norm_topk_prob": True}
CAPS = {"attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0}
GEMMA = LLAMA | {"act_fn": "gelu_pytorch_tanh", "d_head": 2 * D_HEAD, "rotary_dim": 2 * D_HEAD}
FOLD = {"fold_ln": True, "center_writing_weights": True, "center_unembed": True, "fold_value_biases": True}

FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2", OLD_SIZES, {"act_fn": "gelu_new"}, causal_lm="LMHeadModel", compatible=True),
    "gpt-j": Family(
        "GPTJ",
        OLD_SIZES | {"rotary_dim": D_HEAD // 2},
        PARTIAL | {"act_fn": "gelu_new", "parallel_attn_mlp": True, "rotary_adjacent_pairs": True},
    ),
    "gpt-neox": Family(
        "GPTNeoX",
        SIZES | {"rotary_pct": 0.5},
        PARTIAL | {"act_fn": "gelu", "parallel_attn_mlp": True},
        compatible=True,
    ),
    "opt": Family("OPT", OPT_SIZES, {"act_fn": "relu"}),
    "bloom": Family(
        "Bloom",
        {"vocab_size": D_VOCAB, "hidden_size": D_MODEL, "n_layer": LAYERS, "n_head": HEADS},
        {"act_fn": "gelu_fast", "positional_embedding_type": "alibi", "post_embedding_ln": True, "d_mlp": 4 * D_MODEL},
    ),
    "llama": Family("Llama", GROUPED, LLAMA, compatible=True),
    "mistral": Family("Mistral", GROUPED | {"sliding_window": None}, LLAMA),
    "mistral-window": Family("Mistral", GROUPED | {"sliding_window": WINDOW}, LLAMA | LOCAL),
    "qwen2": Family("Qwen2", GROUPED, LLAMA, compatible=True),
    "qwen3": Family("Qwen3", GROUPED | {"head_dim": D_HEAD}, LLAMA | {"use_qk_norm": True}, compatible=True),
    "gemma": Family("Gemma", GROUPED | {"head_dim": 2 * D_HEAD}, GEMMA),
    "gemma2": Family(
        "Gemma2",
        GEMMA_SIZES | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        GEMMA | LOCAL_GLOBAL | POST_NORMS | CAPS,
        compatible=True,
    ),
    "gemma3": Family("Gemma3", GEMMA_SIZES, GEMMA | LOCAL_GLOBAL | POST_NORMS | {"use_qk_norm": True}, compatible=True),
    "phi": Family(
        "Phi",
        SIZES | {"partial_rotary_factor": 0.5},
        PARTIAL | {"act_fn": "gelu_new", "parallel_attn_mlp": True},
    ),
    "phi3": Family("Phi3", GROUPED | {"sliding_window": None}, LLAMA),
    "mixtral": Family("Mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}, LLAMA | MOE),
    "qwen2-moe": Family("Qwen2Moe", GROUPED | EXPERTS | {"shared_expert_intermediate_size": D_MLP}),
    "qwen3-moe": Family("Qwen3Moe", GROUPED | EXPERTS | {"head_dim": D_HEAD}, LLAMA | MOE | {"use_qk_norm": True}),
    "gpt-oss": Family(
        "GptOss",
        GROUPED | MIXED | {"head_dim": D_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2},
        LLAMA | LOCAL_GLOBAL | MOE | {"use_attention_sinks": True, "original_architecture": "GptOssForCausalLM"},
    ),
    "olmo2": Family("Olmo2", GROUPED, LLAMA | {"original_architecture": "Olmo2ForCausalLM"}),
    "olmo3": Family(
        "Olmo3",
        GROUPED | MIXED,
        LLAMA | LOCAL_GLOBAL | {"original_architecture": "Olmo3ForCausalLM", "rotary_base": 500000},
    ),
    "olmo": Family("Olmo", GROUPED),
    "olmo-clip": Family("Olmo", GROUPED | {"clip_qkv": CLIP}),
    "olmoe": Family(
        "Olmoe",
        GROUPED | {"num_experts": 4, "num_experts_per_tok": 2},
        LLAMA | MOE | {"norm_topk_prob": False, "original_architecture": "OlmoeForCausalLM"},
    ),
    "olmoe-clip": Family("Olmoe", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": CLIP}),
    "granite": Family("Granite", GROUPED | MULTIPLIERS),
    "granite-moe": Family("GraniteMoe", GROUPED | MULTIPLIERS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt-neo": Family(
        "GPTNeo",
        {name: size for name, size in SIZES.items() if not name.startswith("num_")}
        | {"num_layers": LAYERS, "num_heads": HEADS, "window_size": WINDOW}
        | {"attention_types": [[["global", "local"], 1]]},
        {"act_fn": "gelu_new", "use_attn_scale": False} | LOCAL | {"attn_types": ["global", "local"]},
    ),
    "stablelm": Family("StableLm", GROUPED | {"partial_rotary_factor": 0.5}),
    "stablelm-norms": Family("StableLm", GROUPED | {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "stablelm-parallel": Family("StableLm", GROUPED | {"partial_rotary_factor": 0.5, "use_parallel_residual": True}),
    "cohere": Family("Cohere", GROUPED),
    "cohere-norms": Family("Cohere", GROUPED | {"use_qk_norm": True}),
    "cohere2": Family("Cohere2", GROUPED | MIXED),
    "llama4": Family("Llama4", GROUPED | {"head_dim": D_HEAD, "intermediate_size_mlp": D_MLP, "num_local_experts": 4}),
    "exaone4": Family("Exaone4", GROUPED | MIXED),
    "mpt": Family("Mpt", MPT_SIZES),
    "mpt-clip": Family("Mpt", MPT_SIZES | {"attn_config": {"clip_qkv": CLIP}}),
    "arcee": Family("Arcee", GROUPED),
    "nemotron": Family("Nemotron", GROUPED | {"head_dim": D_HEAD, "partial_rotary_factor": 0.5}),
    "apertus": Family("Apertus", GROUPED),
    "bloom-residual": Family(
        "Bloom",
        {"vocab_size": D_VOCAB, "hidden_size": D_MODEL, "n_layer": LAYERS, "n_head": HEADS}
        | {"apply_residual_connection_post_layernorm": True},
    ),
    "falcon": Family(
        "Falcon",
        {name: size for name, size in SIZES.items() if name != "intermediate_size"}
        | {"ffn_hidden_size": D_MLP, "multi_query": True, "parallel_attn": True, "alibi": False, "bias": False},
    ),
    # Structures rather than families: only HookedTransformer's config can ask for them.
    "attention-only": Family(hooked={"attn_only": True}),
    "no-norms": Family(hooked={"normalization_type": None, "act_fn": "gelu_new"}),
    "gpt2-folded": Family(hooked={"act_fn": "gelu_new"}, process=FOLD),
    "llama-folded": Family(hooked=LLAMA, process=FOLD | {"center_writing_weights": False}),
    "gpt-neox-folded": Family(hooked=PARTIAL | {"act_fn": "gelu", "parallel_attn_mlp": True}, process=FOLD),
    "gemma2-folded": Family(
        hooked=GEMMA | LOCAL_GLOBAL | POST_NORMS | CAPS,
        process=FOLD | {"center_writing_weights": False, "center_unembed": False},
    ),
}

# What 2.18 knows no word for, and a model is nearly the same without (its experts' weights then sum to less than 1).
LATE_FIELDS = {"norm_topk_prob"}
CELLS = tuple((name, kind) for name, family in FAMILIES.items() for kind in family.kinds())


def lacking(name: str, kind: str) -> str | None:
    """Why the installed TransformerLens and transformers cannot make this cell; None where they can."""
    family = FAMILIES[name]
    if kind != "hooked":
        import transformers

        if not has_bridge():
            return NO_BRIDGE
        if family.prefix.startswith("Cohere") and version("transformer-lens").startswith("3."):
            return "the bridge of TransformerLens 3 computes another function (tests/test_subject.py)"
        return None if hasattr(transformers, f"{family.prefix}Config") else f"this transformers has no {family.prefix}"
    if not has_hooked():
        return NO_HOOKED
    from transformer_lens import HookedTransformerConfig

    known = set(HookedTransformerConfig.__dataclass_fields__)
    unknown = sorted(set(family.hooked) - known - LATE_FIELDS)
    if "original_architecture" in family.hooked and not _knows_post_norms():
        unknown.append(family.hooked["original_architecture"])
    return f"this TransformerLens has no {unknown[0]}" if unknown else None


def each(*families: str) -> pytest.MarkDecorator:
    """Parametrises `family` and `kind`: these families as each class, compatibility mode apart, that is there."""
    kinds = ("hooked", "bridge")
    cells = ((family, kind) for family in families for kind in kinds if kind in FAMILIES[family].kinds())
    return pytest.mark.parametrize(("family", "kind"), [cell for cell in cells if lacking(*cell) is None])


def float64_throughout(name: str, kind: str) -> bool:
    """Whether nothing inside is computed in float32: transformers' norms and softmaxes and every router are."""
    return kind == "hooked" and "num_experts" not in FAMILIES[name].hooked


def zoo(name: str, kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """A new model of the family as the class `kind` says, ready for prompts of up to N_CTX tokens < D_VOCAB.

    `config` overrides the row's own settings.
    """
    family = FAMILIES[name]
    assert kind in family.kinds(), f"{name} has no row for {kind!r}"
    if kind == "hooked":
        return _hooked(name, seed, dtype, config)
    model = _bridge(name, seed, dtype, config)
    if kind == "compatible":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.enable_compatibility_mode()
        model.original_model.to(dtype)  # folding leaves some new biases in float32
    return model


def transformers_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """What the family's bridge wraps: transformers' own model, with the same weights."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    family = FAMILIES[name]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "attn_implementation": "eager"}
    prefix = {"Gemma3": "Gemma3Text", "Llama4": "Llama4Text"}.get(family.prefix, family.prefix)
    made = getattr(transformers, f"{prefix}Config")(**special | family.bridge | config)
    made.architectures = [f"{family.prefix}{family.causal_lm}"]
    made._experts_implementation = "eager"  # the fused product of experts knows no float64
    hf = getattr(transformers, made.architectures[0])(made).to(dtype).eval()
    draw(hf, seed)
    return hf


def _bridge(name: str, seed: int, dtype: torch.dtype, config: dict[str, Any]) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    hf = transformers_model(name, seed, dtype, **config)
    return TransformerBridge.boot_transformers(
        f"tiny-random-{name}", hf_model=hf, tokenizer=tokenizer(), dtype=dtype, device="cpu"
    )


def _hooked(name: str, seed: int, dtype: torch.dtype, config: dict[str, Any]) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    family = FAMILIES[name]
    fields = {
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "d_model": D_MODEL,
        "d_head": D_HEAD,
        "d_mlp": D_MLP,
        "d_vocab": D_VOCAB,
        "n_ctx": N_CTX,
        "normalization_type": "LN",
        "model_name": f"tiny-random-{name}",
        "default_prepend_bos": False,
        "device": "cpu",
        "dtype": dtype,
        "seed": seed,
    }
    fields |= family.hooked | config
    known = set(HookedTransformerConfig.__dataclass_fields__)
    fields = {field: value for field, value in fields.items() if field in known or field not in LATE_FIELDS}

    def made(**also: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.x announces that 4.x has no such class
            model = HookedTransformer(HookedTransformerConfig(**fields | also))
        return torch.nn.Module.to(model, dtype)  # its experts are float32 whatever the config says

    model = made()
    _draw(model, seed, _hooked_value)
    if family.process:  # as from_pretrained does it: into a model that has no gains any more
        folded = made(normalization_type=f"{fields['normalization_type']}Pre")
        folded.load_and_process_state_dict(model.state_dict(), **family.process)
        model = folded
    return model.eval()


def draw(model: torch.nn.Module, seed: int) -> None:
    """Every parameter of a transformers model, drawn anew."""
    _draw(model, seed, _transformers_value)


def _draw(model: torch.nn.Module, seed: int, value: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    owners = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            owner, _, label = name.rpartition(".")
            parameter.copy_(value(owners[owner], label, noise, parameter))


def _transformers_value(owner: torch.nn.Module, label: str, noise: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    kind = type(owner).__name__
    if label.endswith("bias"):
        return 0.3 * noise
    if label == "sinks":
        return noise
    if noise.ndim == 1 or "norm" in kind.lower():  # a gain, about 1 or, where the class adds the 1 itself, about 0
        return before + 0.3 * noise
    if isinstance(owner, torch.nn.Embedding):
        return 0.7 * noise
    inputs_first = kind in ("Conv1D", "GptOssExperts")
    return 1.1 * noise * noise.shape[-2 if inputs_first else -1] ** -0.5


def _hooked_value(owner: torch.nn.Module, label: str, noise: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    kind = label.removeprefix("_")  # grouped-query attention keeps _W_K, _b_K, …
    if kind == "w":
        return 1 + 0.3 * noise
    if kind.startswith("b"):
        return 0.3 * noise
    if kind == "sinks":
        return noise
    if kind in ("W_E", "W_pos"):
        return 0.7 * noise
    if kind == "W_O":
        return 1.1 * noise * (noise.shape[0] * noise.shape[1]) ** -0.5
    return 1.1 * noise * noise.shape[-1 if kind == "weight" else -2] ** -0.5  # nn.Linear has its outputs first


def _knows_post_norms() -> bool:
    """Whether HookedTransformer follows `original_architecture` (OLMo 2's norms, gpt-oss' experts)."""
    try:
        from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES  # noqa: F401
    except ImportError:
        return False
    return True
