"""Null models: what the causal mask alone would do, whatever a model has learned.

Causal attention favours early tokens because more paths start there, so every share is compared with a null: paths
counted, attention weights of 1/j, or the very model with its attention made uniform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.attention import UniformAttention
from oversquash_lens.capture.trace import Trace
from oversquash_lens.errors import InputError, whole_number
from oversquash_lens.paths.recursion import PathProfile, log_path_products


def with_uniform_attention(trace: Trace) -> Trace:
    """The same recording, weights, norms and MLPs, with every head attending alike to its own position and all
    earlier ones: also a head that an edit had switched off, and beyond any window.
    """
    value = trace.gains.value
    uniform = UniformAttention(trace.n_positions, trace.about.n_heads, value.dtype, value.device)
    return replace(trace, attention=(uniform,) * trace.n_layers)


def count_paths(n: int, n_layers: int, tokens: Sequence[str] | None = None) -> PathProfile:
    """Number of causal paths from each of n positions to the last through `n_layers` layers.

    Null model: every edge of the causal mask counts 1, so `values` is binomial(n-i+L-1, L-1), i = 1 … n
    (exact to float64 rounding, in log space beyond). `tokens` name the positions, to set it against a prompt's profile.

    >>> count_paths(4, 2).values.round()
    tensor([4., 3., 2., 1.], dtype=torch.float64)
    """
    return _null_model("count_paths", n, n_layers, torch.ones_like, "every causal edge is 1", tokens)


def uniform_causal(n: int, n_layers: int, residual: float = 0.0, tokens: Sequence[str] | None = None) -> PathProfile:
    """Null model of pure mask geometry: every position attends alike to itself and all earlier ones.

    `residual` in [0, 1) is the share of the residual stream in each layer: 0 is α_jk = 1/j alone, 0.5 is what
    attention rollout assumes. `values` sums to 1.

    >>> uniform_causal(4, 1).values
    tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    if not 0.0 <= residual < 1.0:
        raise InputError(f"expected 0 ≤ residual < 1, got residual={residual}")
    note = f"uniform causal attention, residual share {residual:g}"

    def weight(dest: Tensor) -> Tensor:
        return (1 - residual) / (dest + 1)

    return _null_model("uniform_causal", n, n_layers, weight, note, tokens, residual)


def _null_model(
    kind: str,
    n: int,
    n_layers: int,
    weight: Callable[[Tensor], Tensor],
    note: str,
    tokens: Sequence[str] | None,
    residual: float = 0.0,
) -> PathProfile:
    """Every causal edge into a position weighs the same, `residual` more on the diagonal."""
    whole_number("n", n)
    whole_number("n_layers", n_layers)

    def edge_rows(layer: int, start: int, stop: int) -> Float[Tensor, "dest src"]:
        dest = torch.arange(start, stop, dtype=torch.float64, device="cpu")[:, None]
        src = torch.arange(n, dtype=torch.float64, device="cpu")
        return weight(dest) * (src <= dest) + residual * (src == dest)

    names = tuple(str(i) for i in range(1, n + 1)) if tokens is None else tuple(tokens)
    return PathProfile(kind, names, log_path_products(edge_rows, n, n_layers), 0.0, None, (note,))
