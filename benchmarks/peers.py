"""What others compute of the same model and prompt: each peer returns one number per token of the prompt.

The plain transformers model takes no hooks, so its peers read what it gives: fused attention and gradients. The hooked
model's peers read patterns from its cache, as their authors' code does.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def rollout(patterns: list[Float[Tensor, "head dest src"]]) -> Float[Tensor, " src"]:
    """Attention rollout by full matrix products, the last row of the last one.

    Abnar & Zuidema (2020), eq. 1: heads averaged, half of each row for the residual stream. O(layer·pos³).

    >>> rollout([torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])])
    tensor([0.2500, 0.7500])
    """
    identity = torch.eye(patterns[0].shape[-1], dtype=patterns[0].dtype)
    product = identity
    for pattern in patterns:
        product = (pattern.mean(0) + identity) / 2 @ product
    return product[-1]


def cached_patterns(model: Any, tokens: Tensor) -> list[Float[Tensor, "head dest src"]]:
    """Every layer's pattern by TransformerLens' own cache."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[None], names_filter=lambda name: name.endswith("hook_pattern"))
    return [pattern[0] for pattern in cache.values()]


def contributions(
    pattern: Float[Tensor, "head dest src"],
    written: Float[Tensor, "pos head d_model"],
    residual: Float[Tensor, "pos d_model"],
    bias: Float[Tensor, " d_model"] | float = 0.0,
) -> Float[Tensor, "dest src"]:
    """ALTI: how near each token's part of what attention leaves comes to the whole, rows summing to 1.

    Ferrando, Gállego & Costa-jussà (2022), eqs. 8-9, without the norm behind attention that a pre-norm model has not:
    y_i = Σ_j T_ij + b, T_ij = Σ_h α^h_ij written_jh + δ_ij residual_j, and the part of j is
    max(0, ‖y_i‖₁ - ‖y_i - T_ij‖₁), normalised. Row by row, O(pos²·head·d_model).
    """
    n = len(residual)
    found = torch.zeros(n, n, dtype=residual.dtype)
    for i in range(n):
        part = torch.einsum("hj,jhd->jd", pattern[:, i, : i + 1], written[: i + 1])
        part[i] += residual[i]
        whole = part.sum(0) + bias
        near = (whole.abs().sum() - (whole - part).abs().sum(-1)).clamp(min=0)
        found[i, : i + 1] = near / near.sum().clamp(min=torch.finfo(near.dtype).tiny)
    return found


def alti(model: Any, tokens: Tensor) -> Float[Tensor, " src"]:
    """ALTI's contributions of every layer from one cached pass, multiplied over layers; the last row."""
    names = ("hook_resid_pre", "hook_pattern", "attn.hook_v")
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[None], names_filter=lambda name: name.endswith(names))
        product = torch.eye(len(tokens))
        for layer, block in enumerate(model.blocks):
            value = cache[f"blocks.{layer}.attn.hook_v"][0]
            output = block.attn.W_O
            value = value.unflatten(-1, (-1, output.shape[1])) if value.ndim == 2 else value
            value = value.repeat_interleave(output.shape[0] // value.shape[1], dim=1)
            written = torch.einsum("phe,hed->phd", value, output)
            residual = cache[f"blocks.{layer}.hook_resid_pre"][0]
            product = contributions(cache[f"blocks.{layer}.attn.hook_pattern"][0], written, residual) @ product
    return product[-1]


def gradient_times_input(model: Any, tokens: Tensor) -> Float[Tensor, " src"]:
    """The top logit's gradient by each embedding, times that embedding; one backward pass of a transformers model."""
    embedded = model.get_input_embeddings()(tokens[None]).detach().requires_grad_()
    last = model(inputs_embeds=embedded, use_cache=False).logits[0, -1]
    (gradient,) = torch.autograd.grad(last.max(), embedded)
    return (gradient * embedded.detach())[0].sum(-1)


def inseq_input_x_gradient(model: Any, tokenizer: Any, tokens: Tensor) -> Float[Tensor, "src d_model"]:
    """inseq's input × gradient of one token that it generates, from the prompt as a text."""
    import inseq

    wrapped = inseq.load_model(model, "input_x_gradient", tokenizer=tokenizer)
    found = wrapped.attribute(
        tokenizer.decode(tokens), generation_args={"max_new_tokens": 1}, show_progress=False, pretty_progress=False
    )
    return found.sequence_attributions[0].target_attributions[: len(tokens), 0]


def integrated_gradients(model: Any, tokens: Tensor) -> Float[Tensor, " src"]:
    """captum's integrated gradients of the top logit along 50 steps from zero embeddings, one step at a time."""
    from captum.attr import IntegratedGradients

    embedded = model.get_input_embeddings()(tokens[None]).detach()
    with torch.no_grad():
        target = int(model(inputs_embeds=embedded, use_cache=False).logits[0, -1].argmax())

    def logit(embeddings: Tensor) -> Tensor:
        return model(inputs_embeds=embeddings, use_cache=False).logits[:, -1, target]

    return IntegratedGradients(logit).attribute(embedded, n_steps=50, internal_batch_size=1)[0].sum(-1)
