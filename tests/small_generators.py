"""A tiny random Llama that reads characters, as the twin and as both hooked classes, and generators without a model."""

from __future__ import annotations

import string
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from small_models import NO_BRIDGE, NO_HOOKED, has_bridge, has_hooked
from torch import Tensor

import oversquash_lens as osl
from oversquash_lens.models.loading import load_twin
from oversquash_lens.models.sources import Weights
from oversquash_lens.paper.generator import GREEDY, Completion, Generator, Sampling

N_CTX = 1024
TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
KINDS = ("twin", "bridge", "hooked")


@cache
def characters(template: str | None = TEMPLATE, merges: tuple[str, ...] = ()) -> Any:
    """A tokenizer for which every printable character is a token, and `merges` too; it has no padding token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = ["<s>", "</s>", "<?>", *merges, *string.printable]
    tokenizer = Tokenizer(models.WordLevel({text: index for index, text in enumerate(texts)}, unk_token="<?>"))
    pattern = Regex("|".join([*(text.replace("+", r"\+") for text in merges), r"[\s\S]"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<?>")
    fast.chat_template = template
    return fast


def model(seed: int = 1, sliding_window: int | None = None) -> Any:
    """Two layers, grouped-query heads, float64, sharp enough that replies vary; a Mistral if its window slides."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    sizes = {
        "vocab_size": 110,  # padded beyond the tokenizer's, as published models are
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": N_CTX,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "attn_implementation": "eager",
    }
    if sliding_window:
        made = MistralForCausalLM(MistralConfig(**sizes, head_dim=4, sliding_window=sliding_window))
    else:
        made = LlamaForCausalLM(LlamaConfig(**sizes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            wide = 3.0 if "lm_head" in name else 1.5
            parameter.copy_(1 + 0.3 * noise if noise.ndim == 1 else wide * noise * noise.shape[-1] ** -0.5)
        made.lm_head.weight[1] *= 2  # </s> comes up now and then
    return made.to(torch.float64).eval()


@cache
def _folder() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "tiny-characters"
    model().save_pretrained(path)
    characters().save_pretrained(path)
    return folder


@cache
def loaded(kind: str, dtype: str = "float32") -> Any:
    """The one tiny model by the doors that users take: "twin", "bridge" or "hooked"."""
    if kind == "bridge" and not has_bridge():
        pytest.skip(NO_BRIDGE)
    if kind == "hooked" and not has_hooked():
        pytest.skip(NO_HOOKED)
    path = Path(_folder().name) / "tiny-characters"
    if kind == "twin":
        return load_twin(path, dtype=dtype, device="cpu")
    return osl.load_model(path, kind=kind, dtype=dtype, device="cpu")


def generator(kind: str = "twin", dtype: str = "float32", **options: Any) -> Generator:
    return Generator(loaded(kind, dtype), **options)


def other_architecture(name: str) -> Generator:
    """Tiny random models that mask, place and cache in their own ways: GPT-2 (learned positions), Bloom (ALiBi),
    Gemma 2 and 3 (some layers' windows slide).
    """
    import transformers

    sizes = {"vocab_size": 110, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_hidden_layers": 2}
    gemma = {**sizes, **heads, "hidden_size": 16, "intermediate_size": 24, "sliding_window": 12}
    configs = {
        "GPT2": lambda: transformers.GPT2Config(**sizes, n_embd=16, n_layer=2, n_head=4, n_positions=256),
        "Bloom": lambda: transformers.BloomConfig(**sizes, hidden_size=16, n_layer=2, n_head=4),
        "Gemma2": lambda: transformers.Gemma2Config(**gemma, max_position_embeddings=256),
        "Gemma3": lambda: transformers.Gemma3TextConfig(**gemma, max_position_embeddings=256),
    }
    made = transformers.AutoModelForCausalLM.from_config(configs[name](), attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1.5 * noise * parameter.shape[-1] ** -0.5)
    return Generator(Weights(made, characters(), name))


def plain_generator(
    seed: int = 1, sliding_window: int | None = None, tokenizer: Any = None, **options: Any
) -> Generator:
    """A twin made here, for tokenizers and windows of the test's own."""
    weights = Weights(model(seed, sliding_window), tokenizer or characters(), "tiny characters")
    return Generator(weights, **options)


def logits(generator: Generator, ids: list[int]) -> Float[Tensor, "pos vocab"]:
    """One pass over these tokens alone, no cache, no mask: the reference for everything a generator does."""
    with torch.no_grad():
        out = generator.backend.model(torch.tensor([ids]))
    return (out if isinstance(out, Tensor) else out.logits)[0]


class Parrot:
    """A generator without a model: says what `answer` makes of a prompt, and counts what it was asked.

    `patience`: it raises PatienceError when asked for more replies than that.
    """

    def __init__(self, answer: Callable[[str], str], batch_size: int = 3, patience: int | None = None) -> None:
        self.answer, self.batch_size, self.patience = answer, batch_size, patience
        self.settings = {"model": "parrot", "chat": False}
        self.asked: list[str] = []
        self.scored: list[str] = []

    def batches(self, prompts: Sequence[str], sampling: Sampling = GREEDY) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def completions(
        self, prompts: Sequence[str], sampling: Sampling = GREEDY, *, draws: Sequence[int] | None = None
    ) -> tuple[Completion, ...]:
        if self.patience is not None and len(self.asked) + len(prompts) > self.patience:
            raise PatienceError
        self.asked += prompts
        texts = [f"{self.answer(prompt)}" for prompt in prompts]
        return tuple(Completion(text, len(text), True) for text in texts)

    def log_likelihoods(
        self, prompt: str, candidates: Sequence[str], *, whole_numbers: bool
    ) -> Float[Tensor, " candidate"]:
        """Made-up numbers that a test can make again: candidate c has -ln(c + 2)."""
        assert whole_numbers
        self.scored.append(prompt)
        return -torch.arange(2, len(candidates) + 2, dtype=torch.float64).log()


class PatienceError(Exception):
    """What a parrot raises when it has had enough."""
