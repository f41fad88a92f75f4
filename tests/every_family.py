"""Every decoder that transformers has a config class for, tiny and random, through `load_model`: what is said of it.

    python tests/every_family.py --out families-3.9.json     # all of them; or name some: granite olmo2 "mpt clip"
    python tests/every_family.py --render families-*.json    # docs/families.md

A family is supported, approximate, refused (a ModelError says why), wrong (a number that the truth refutes, or a
declaration that is not kept) or foreign (somebody else's exception). Exits with 1 where any is wrong or foreign.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from cells import Subject, judge_subjects
from small_models import D_VOCAB, tokenizer, tokens_for
from zoo import draw

import oversquash_lens as osl
from oversquash_lens.errors import InputError, ModelError

# transformers' words for sizes, each set where a config class has it.
WORDS = {
    16: ("hidden_size", "n_embd", "d_model", "model_dim", "dim_model", "word_embed_proj_dim", "embedding_size"),
    24: ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size", "d_inner"),
    2: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_key_value_heads"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "head_dim"),
    64: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    D_VOCAB: ("vocab_size", "vocab_size_per_layer_input"),
}
SIZES = {word: size for size, words in WORDS.items() for word in words}
SIZES |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "sliding_window", "window_size"), 4)
SIZES |= dict.fromkeys(("num_experts_per_tok", "top_k", "moe_topk", "moe_num_experts", "n_group", "topk_group"), 2)
SIZES |= dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "expand"), 24)
SIZES |= dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers"), 2)
SIZES |= dict.fromkeys(
    ("encoder_attention_heads", "num_kv_heads", "moe_k", "num_expert_group", "moe_num_shared_experts"), 4
)
SIZES |= dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 8)
SIZES |= {"qk_rope_head_dim": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "global_head_dim": 4}
SIZES |= dict.fromkeys(("mamba_chunk_size", "chunk_size", "mamba_d_state", "state_size", "ssm_state_size"), 8)
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "attention_dropout": 0.0}
MOST = 10**6  # weights of a model that is tiny
HYBRID = ["linear_attention", "full_attention"]
LINEAR = {f"linear_{which}_head_dim": 4 for which in ("key", "value")} | {
    f"linear_num_{which}_heads": 4 for which in ("key", "value")
}
# What one config class needs besides, and options of it that change its function: name -> (model type, settings).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"activation_function": "gelu_new"}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2}),
    "gptj": ("gptj", {"rotary_dim": 2}),
    "codegen": ("codegen", {"rotary_dim": 2}),
    "mpt": ("mpt", {}),
    "mpt clip": ("mpt", {"attn_config": {"clip_qkv": 0.5}}),
    "bloom": ("bloom", {}),
    "bloom residual": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "falcon new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "falcon alibi": ("falcon", {"alibi": True, "new_decoder_architecture": False}),
    "granite": (
        "granite",
        {"attention_multiplier": 0.3, "residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 4.0},
    ),
    "granitemoe": (
        "granitemoe",
        {"attention_multiplier": 0.3, "residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 4.0},
    ),
    "olmo": ("olmo", {}),
    "olmo clip": ("olmo", {"clip_qkv": 0.5}),
    "olmoe": ("olmoe", {}),
    "olmoe clip": ("olmoe", {"clip_qkv": 0.5}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5}),
    "stablelm norms": ("stablelm", {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "stablelm parallel": ("stablelm", {"partial_rotary_factor": 0.5, "use_parallel_residual": True}),
    "cohere": ("cohere", {}),
    "cohere norms": ("cohere", {"use_qk_norm": True}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 4}),
    "llama yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "bamba": ("bamba", {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_expand": 2, "attn_layer_indices": [1]}),
    "deepseek_v2": ("deepseek_v2", {"num_key_value_heads": 4}),
    "deepseek_v3": ("deepseek_v3", {"num_key_value_heads": 4, "first_k_dense_replace": 0}),
    "deepseek_v3 dense": ("deepseek_v3", {"num_key_value_heads": 4, "first_k_dense_replace": 1}),
    **{name: (name, {"num_key_value_heads": 4}) for name in ("glm4_moe_lite", "glm_moe_dsa", "youtu")},
    **{name: (name, {"layer_types": HYBRID} | LINEAR) for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")},
    "granitemoehybrid": (
        "granitemoehybrid",
        {"mamba_n_heads": 4, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    ),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "mamba2": ("mamba2", {"num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 1}),
    "lfm2_moe": ("lfm2_moe", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "recurrent_gemma": ("recurrent_gemma", {"block_types": ["recurrent", "attention"]}),
    "zamba2": ("zamba2", {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 4, "use_mamba_kernels": False}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2}),
    "nemotron": ("nemotron", {"partial_rotary_factor": 0.5}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "gemma4_text": ("gemma4_text", {"global_head_dim": 4, "hidden_size_per_layer_input": 0}),
    "gemma3n_text": (
        "gemma3n_text",
        {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "modernbert-decoder": ("modernbert-decoder", {"local_attention": 8, "global_attn_every_n_layers": 2}),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "opt relu2": ("opt", {"activation_function": "relu2", "word_embed_proj_dim": 16}),
    "phi norms": ("phi", {"qk_layernorm": True}),
    "persimmon": ("persimmon", {"qk_layernorm": True}),
    "gpt_neox sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
}


def names() -> list[str]:
    """Variants, and every other type of model that transformers calls a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    covered = {kind for kind, _ in VARIANTS.values()}
    return [*VARIANTS, *(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in covered)]


def has_adapter(name: str) -> bool:
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[VARIANTS.get(name, (name,))[0]] in SUPPORTED_ARCHITECTURES


def tiny(name: str, seed: int = 0) -> Any:
    """transformers' own model of the family, random weights in float64."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind, settings = VARIANTS.get(name, (name, {}))
    config_class = CONFIG_MAPPING[kind]
    known = {*inspect.signature(config_class).parameters, *vars(config_class())}
    sizes = {word: size for word, size in SIZES.items() if word in known}
    config = config_class(**sizes | settings)
    config._experts_implementation = "eager"  # the fused product of experts knows no float64
    with torch.device("meta"):
        size = sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"{size} weights: its config has words for sizes that are not listed here")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.float64).eval()
    draw(model, seed)
    with torch.no_grad():
        model(tokens_for(0, 8))
    return model


def loaded(model: Any, folder: str) -> Any:
    """The same, saved and loaded as a bridge."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    experts = any("Experts" in type(module).__name__ for module in model.modules())  # their product knows no float64
    return osl.load_model(folder, kind="bridge", dtype="float32" if experts else "float64")


def said_of(name: str) -> dict[str, Any]:
    """One family: its outcome, measure by measure, and why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not has_adapter(name):
            return {"outcome": "no bridge", "why": "TransformerLens has no bridge for it"}
        try:
            model = tiny(name)
        except Exception as error:
            return {"outcome": "not made", "why": f"{type(error).__name__}: {error}"[:160]}
        with tempfile.TemporaryDirectory() as folder:
            try:
                model = loaded(model, f"{folder}/{name.replace(' ', '-')}")  # errors name it so
            except (ModelError, InputError) as error:
                return {"outcome": "not loaded", "why": str(error)[:240]}
            except Exception as error:
                return {"outcome": "foreign", "why": f"load_model: {type(error).__name__}: {error}"[:300]}
            try:
                cell = judge_subjects(name, "bridge", [Subject(model, 0)])
            except Exception:
                return {"outcome": "foreign", "why": traceback.format_exc()[-600:]}
    states = {measure: found.state for measure, found in cell.measures.items()}
    why = {found.why for found in cell.measures.values() if found.state == "refused"}
    if cell.faults:
        foreign = any("crashed" in fault for fault in cell.faults)
        return {"outcome": "foreign" if foreign else "wrong", "why": list(cell.faults), "measures": states}
    kinds = [state for measure, state in states.items() if measure != "mean_field" or state == "refused"]
    order = ("refused", "approximate", "supported")
    outcome = next(state for state in order if state in kinds)
    if outcome == "refused" and any(state != "refused" for state in kinds):
        outcome = "in part"
    return {"outcome": outcome, "why": sorted(why), "measures": states}


HEAD = """# Families

Every type of model that transformers calls a causal language model and TransformerLens has a bridge for: one tiny
random model of each, saved and loaded by `load_model`, every measure held against the truth and against what
`osl.support` declares. Made by `python tests/every_family.py` and `--render`, never by hand;
[compatibility](compatibility.md) has the numbers of those that most people use.

- **supported**, **approximate**: every measure is there, and means what its documentation says, or nearly.
- **in part**: some measures are refused, each with its reason; the column says which remain.
- **refused**: none remains. **not loaded**: TransformerLens itself cannot load it.
- **not made**: no tiny model of it could be made here, so nothing is known.
"""


def page(runs: dict[str, dict[str, Any]]) -> str:
    """The table of every family with a bridge, a column for each version, and the totals."""
    known = dict.fromkeys(name for found in runs.values() for name in found)
    lines = [HEAD, f"| family | {' | '.join(runs)} | what remains where some is refused | why |"]
    lines.append("|---" * (len(runs) + 3) + "|")
    for name in known:
        found = [run.get(name, {"outcome": "not tried", "why": ""}) for run in runs.values()]
        if all(each["outcome"] in ("no bridge", "not tried") for each in found):
            continue
        last = next(each for each in reversed(found) if each["outcome"] not in ("no bridge", "not tried"))
        remains = [measure for measure, state in last.get("measures", {}).items() if state != "refused"]
        why = last["why"] if isinstance(last["why"], str) else "; ".join(last["why"])
        why = why.split("; expected")[0].replace("|", "/").replace("\n", " ")
        cells = [name, *(each["outcome"] for each in found)]
        lines.append(f"| {' | '.join(cells)} | {', '.join(remains) if last['outcome'] == 'in part' else ''} | {why} |")
    for label, run in runs.items():
        counts = Counter(each["outcome"] for each in run.values())
        lines.append(f"\n{label}: {len(run)} tried, {', '.join(f'{n} {what}' for what, n in counts.most_common())}.")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--after", help="go on behind this one")
    parser.add_argument("--render", nargs="+", type=Path, metavar="FILE", help="write docs/families.md from these runs")
    options = parser.parse_args()
    if options.render:
        runs = {path.stem.split("-", 1)[-1]: json.loads(path.read_text("utf-8")) for path in options.render}
        (Path(__file__).parent.parent / "docs" / "families.md").write_text(page(runs), "utf-8")
        return 0
    torch.set_num_threads(1)
    found = {}
    wanted = options.families or names()
    for name in wanted[wanted.index(options.after) + 1 if options.after else 0 :]:
        found[name] = said_of(name)
        print(f"{name:24} {found[name]['outcome']:12} {found[name]['why']}"[:400], flush=True)
    counts = Counter(each["outcome"] for each in found.values())
    print(dict(counts))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1), "utf-8")
    return 1 if counts["wrong"] or counts["foreign"] else 0


if __name__ == "__main__":
    sys.exit(main())
