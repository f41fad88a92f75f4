"""Small random models with nothing left at zero: every bias, gain and weight is drawn, every pattern uneven.

`hooked` makes a HookedTransformer (TransformerLens 2 and 3; float64 all through), `bridge` a
TransformerBridge over a tiny Hugging Face model (TransformerLens 3 and 4; the weights are float64, but a
Llama's norms, softmax and rotations are computed in float32 there). Nothing here asks the network.
"""

from __future__ import annotations

import os
import random
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

D_VOCAB = 50
N_CTX = 16
NO_BRIDGE = "this TransformerLens (2.x) has no TransformerBridge"
NO_HOOKED = "this TransformerLens (4 or later) has no HookedTransformer"


def has_hooked() -> bool:
    """Whether the installed TransformerLens still has HookedTransformer (4.x raises ImportError)."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True


def has_bridge() -> bool:
    """Whether the installed TransformerLens already has TransformerBridge (2.x has not)."""
    try:
        from transformer_lens.model_bridge import TransformerBridge  # noqa: F401
    except ImportError:
        return False
    return True


def tokens_for(seed: int, n: int) -> torch.Tensor:
    """`n` random token ids, shape [1, n]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, D_VOCAB, (1, n), generator=generator)


def hooked(
    seed: int,
    *,
    norm: str = "LN",
    gated: bool = False,
    kv_heads: int | None = None,
    positions: str = "standard",
    n_layers: int = 2,
    n_heads: int = 2,
    d_model: int = 12,
    d_mlp: int = 20,
    act: str = "gelu_new",
    strength: float = 1.0,
    dtype: torch.dtype = torch.float64,
    **config: Any,
) -> Any:
    """A HookedTransformer of random weights. `strength` scales what attention and MLP write."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    d_head = d_model // n_heads
    rotary = {"rotary_dim": d_head, "rotary_adjacent_pairs": seed % 2 == 1} if positions == "rotary" else {}
    cfg = HookedTransformerConfig(
        n_layers=n_layers,
        n_heads=n_heads,
        d_model=d_model,
        d_head=d_head,
        d_mlp=d_mlp,
        d_vocab=D_VOCAB,
        n_ctx=N_CTX,
        act_fn=act,
        gated_mlp=gated,
        normalization_type=norm,
        final_rms=norm == "RMS",
        n_key_value_heads=kv_heads,
        positional_embedding_type=positions,
        default_prepend_bos=False,
        device="cpu",
        dtype=dtype,
        seed=seed,
        **rotary,
        **config,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.x announces that 4.x has no such class
        model = HookedTransformer(cfg)
    _randomise_hooked(model, seed, strength)
    _lend_a_hook_before_the_unembedding(model)
    return model.eval()


@cache
def unembed_with_hook(kind: type) -> type:
    """TransformerLens 2's unembedding with the hook point that later ones have before it."""

    class Unembed(kind):
        def forward(self, residual: torch.Tensor) -> torch.Tensor:
            return super().forward(self.hook_in(residual))

    return Unembed


def _lend_a_hook_before_the_unembedding(model: Any) -> None:
    """TransformerLens 2 has none there, where the tests look for themselves; the zoo's models stay without."""
    from transformer_lens.hook_points import HookPoint

    if "unembed.hook_in" not in model.hook_dict:
        model.unembed.hook_in = HookPoint()
        model.unembed.__class__ = unembed_with_hook(type(model.unembed))  # a hook here would be one of the user's
        model.setup()


def _randomise_hooked(model: Any, seed: int, strength: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    d_model, d_head, d_mlp = model.cfg.d_model, model.cfg.d_head, model.cfg.d_mlp
    spread = {  # standard deviation by the last part of the parameter's name
        "W_Q": 1.2 * d_model**-0.5,
        "W_K": 1.2 * d_model**-0.5,
        "W_V": d_model**-0.5,
        "W_O": strength * (d_head * model.cfg.n_heads) ** -0.5,
        "W_gate": d_model**-0.5,
        "W_in": d_model**-0.5,
        "W_out": strength * d_mlp**-0.5,
        "W_E": 1.0,
        "W_pos": 0.5,
        "W_U": d_model**-0.5,
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = name.split(".")[-1].removeprefix("_")
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if kind == "w":  # a norm's gain
                value = 1 + 0.3 * noise
            elif kind.startswith("b"):
                value = 0.3 * noise
            else:
                value = spread[kind] * noise
            parameter.copy_(value)


@cache
def tokenizer() -> Any:
    """A made-up tokenizer: the words w0 … w49; w1 is BOS, w2 is EOS and padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(D_VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", unk_token="w0", pad_token="w2"
    )
    with tempfile.TemporaryDirectory() as folder:
        # TransformerLens reads the tokenizer's folder again to ask it for a BOS token: load it with one.
        fast.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, add_bos_token=True)


def bridge(
    seed: int,
    label: str = "llama",
    *,
    n_layers: int = 2,
    d_model: int = 16,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """A TransformerBridge: "llama" (rotary, RMS, gated, grouped-query) or "gpt2" (LN, plain MLP, learned)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformer_lens.model_bridge import TransformerBridge

    hf = {"llama": _llama, "gpt2": _gpt2}[label](n_layers, d_model).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(_random_value(name, noise, transposed=label == "gpt2"))
    hf.eval()
    return TransformerBridge.boot_transformers(
        f"tiny-random-{label}", hf_model=hf, tokenizer=tokenizer(), dtype=dtype, device="cpu"
    )


def _random_value(name: str, noise: torch.Tensor, transposed: bool) -> torch.Tensor:
    """A parameter's value; GPT-2 stores its matrices [in, out], everyone else [out, in]."""
    if name.endswith("bias"):
        return 0.3 * noise
    if noise.ndim == 1:
        return 1 + 0.3 * noise
    if any(part in name for part in ("embed_tokens", "wte", "wpe")):
        return 0.7 * noise
    return 1.1 * noise * noise.shape[0 if transposed else 1] ** -0.5


def _llama(n_layers: int, d_model: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=D_VOCAB,
            hidden_size=d_model,
            intermediate_size=24,
            num_hidden_layers=n_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=N_CTX,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    )


def _gpt2(n_layers: int, d_model: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=D_VOCAB,
            n_embd=d_model,
            n_inner=24,
            n_layer=n_layers,
            n_head=4,
            n_positions=N_CTX,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    )


ACTIVATIONS = ("relu", "silu", "gelu", "gelu_new", "gelu_pytorch_tanh")


def random_spec(seed: int) -> dict[str, Any]:
    """Keyword arguments for `hooked`, drawn over every option at once."""
    draw = random.Random(seed)
    n_heads = draw.choice((1, 2, 2, 4, 4))
    head_width = draw.choice({1: (8, 12), 2: (4, 6, 8), 4: (2, 4)}[n_heads])  # even: rotations need pairs
    return {
        "norm": draw.choice(("LN", "RMS")),
        "gated": draw.random() < 0.5,
        "kv_heads": draw.choice([None, {1: None, 2: 1, 4: draw.choice((1, 2))}[n_heads]]),
        "positions": draw.choice(("standard", "rotary")),
        "n_layers": draw.choice((1, 2, 2, 3)),
        "n_heads": n_heads,
        "d_model": n_heads * head_width,
        "d_mlp": draw.choice((10, 16, 24)),
        "act": draw.choice(ACTIVATIONS),
        "strength": draw.choice((0.3, 1.0, 2.0)),
    }


# The named models that the measures' tests share: every architecture option, L ≤ 4, prompts of ≤ 6 tokens.
HOOKED_CASES: dict[str, dict[str, Any]] = {
    "ln-plain-learned": {"norm": "LN", "act": "gelu_new", "n_layers": 3, "n_heads": 2},
    "ln-gated-rotary": {"norm": "LN", "gated": True, "act": "gelu", "positions": "rotary", "n_layers": 2},
    "rms-gated-rotary-gqa": {
        "norm": "RMS",
        "gated": True,
        "act": "silu",
        "positions": "rotary",
        "n_heads": 4,
        "kv_heads": 2,
        "d_model": 16,
        "n_layers": 4,
    },
    "rms-plain-learned-mqa": {"norm": "RMS", "act": "relu", "n_heads": 2, "kv_heads": 1, "n_layers": 2},
    "rms-plain-rotary": {"norm": "RMS", "act": "silu", "positions": "rotary", "n_layers": 3, "strength": 2.0},
    "ln-one-layer": {"norm": "LN", "act": "gelu_pytorch_tanh", "n_layers": 1, "n_heads": 4, "d_model": 16},
}
BRIDGE_CASES = ("bridge-llama", "bridge-gpt2")
CASES = (*HOOKED_CASES, *BRIDGE_CASES)


@cache
def case(name: str) -> tuple[Any, torch.Tensor]:
    """(model, tokens) of a named case; skips the calling test where this TransformerLens lacks the class.

    The model is shared between tests: never leave it changed.
    """
    import pytest

    seed = CASES.index(name)
    tokens = tokens_for(seed, 6 if seed % 2 == 0 else 5)
    if name in HOOKED_CASES:
        if not has_hooked():
            pytest.skip(NO_HOOKED)
        return hooked(seed, **HOOKED_CASES[name]), tokens
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    return bridge(seed, name.removeprefix("bridge-"), n_layers=2), tokens


@contextmanager
def silent_mlps(model: Any) -> Iterator[None]:
    """Within the block every MLP's output matrix is zero (ψ is a constant); afterwards it is as before."""
    matrices = [
        parameter
        for block in model.blocks
        for name, parameter in block.mlp.named_parameters()
        if name == "W_out" or (name.endswith("weight") and ("down_proj" in name or "c_proj" in name))
    ]
    assert len(matrices) == len(model.blocks), "one output matrix per MLP expected"
    before = [matrix.detach().clone() for matrix in matrices]
    try:
        with torch.no_grad():
            for matrix in matrices:
                matrix.zero_()
        yield
    finally:
        with torch.no_grad():
            for matrix, value in zip(matrices, before, strict=True):
                matrix.copy_(value)
