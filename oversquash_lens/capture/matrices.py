"""Where a model keeps the matrices that multiply activations, whichever class wraps it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# HookedTransformer's matrices, and layers that keep theirs as `weight`, turned to [outputs, inputs] (einops).
MATRIX_AXES = {
    **dict.fromkeys(("W_Q", "W_K", "W_V", "_W_K", "_W_V"), "head d_model d_head -> (head d_head) d_model"),
    "W_O": "head d_head d_model -> d_model (head d_head)",
    **dict.fromkeys(("W_in", "W_gate", "W_out"), "inputs outputs -> outputs inputs"),
    "Linear.weight": "outputs inputs -> outputs inputs",
    "Conv1D.weight": "inputs outputs -> outputs inputs",
}


def weight_holder(model: torch.nn.Module) -> torch.nn.Module:
    """The module whose tree holds every weight: what a bridge wraps, otherwise the model itself."""
    return getattr(model, "original_model", model)


def weight_matrices(model: torch.nn.Module) -> Iterator[tuple[Tensor, str]]:
    """Every matrix that multiplies activations, with the einops pattern that turns it to [outputs, inputs].

    Left out are embedding and unembedding tables; where a model does not say which layer unembeds, none is.
    """
    holder = weight_holder(model)
    unembedding = getattr(model, "unembed", None)
    if unembedding is None and hasattr(holder, "get_output_embeddings"):
        unembedding = holder.get_output_embeddings()
    tables = [unembedding, *(module for module in holder.modules() if isinstance(module, torch.nn.Embedding))]
    left_out = {id(table) for module in tables if module is not None for table in module.parameters()}
    for module in holder.modules():
        kinds = [kind.__name__ for kind in type(module).__mro__]
        for name, weight in module.named_parameters(recurse=False):
            patterns = [MATRIX_AXES[key] for key in (name, *(f"{kind}.{name}" for kind in kinds)) if key in MATRIX_AXES]
            if patterns and id(weight) not in left_out:
                yield weight, patterns[0]
