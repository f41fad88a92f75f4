"""What more than one measure takes from a trace: blocks of attention rows and distances between outputs."""

from __future__ import annotations

import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.record.trace import Trace

# Below this share of its own terms, a squared distance from Gram products has lost too many digits.
CANCELLED = 1e-3


def attention_rows(trace: Trace, layer: int, start: int, stop: int) -> Float[Tensor, "head dest src"]:
    """Rows start … stop-1, cut to the positions that they can see, upcast to at least float32."""
    rows = trace.attention[layer].rows(start, stop)[:, :, :stop]
    return rows.double() if trace.gains.value.dtype == torch.float64 else rows.float()


def diagonal_of(start: int, stop: int, like: Tensor) -> Float[Tensor, "dest src"]:
    """δ_jk for rows start … stop-1 and columns 0 … stop-1."""
    return torch.eye(stop, dtype=like.dtype, device=like.device)[start:stop]


def per_head(grouped: Float[Tensor, "kv_head ..."], n_heads: int) -> Float[Tensor, "head ..."]:
    """Grouped keys or values repeated for the query heads that read them."""
    return grouped.repeat_interleave(n_heads // grouped.shape[0], dim=0)


def squared_output_distance(
    trace: Trace, layer: int, start: int, attention: Float[Tensor, "head dest src"]
) -> Float[Tensor, "head dest src"]:
    """‖o_k - ō_j‖² with o_k = v_k W_O and ō_j = Σ_k α_jk o_k: how much head output moves if j looks more at k.

    From v and the Gram matrix of W_O, so it costs what attention itself costs. Entries that cancel (a row that
    looks at one position only, repeated tokens) are computed again from the difference itself.
    """
    heads, _, stop = attention.shape
    value = per_head(trace.gains.value[layer], heads)[:, :stop].to(attention)
    gram = trace.gains.weights.output_gram[layer].to(attention)
    mixed = attention @ value
    own = einsum(value @ gram, value, "head src i, head src i -> head src")
    other_gram = mixed @ gram
    other = einsum(other_gram, mixed, "head dest i, head dest i -> head dest")
    size = own[:, None, :] + other[:, :, None]
    squared = torch.baddbmm(size, other_gram, value.mT, alpha=-2)
    cancelled = squared < CANCELLED * size
    cancelled &= torch.ones_like(cancelled[0]).tril(start)  # above the diagonal nothing is asked for
    for part in cancelled.nonzero().split(1 << 18):
        head, dest, src = part.unbind(1)
        difference = value[head, src] - mixed[head, dest]
        for each in head.unique().tolist():
            mine = head == each
            d = difference[mine]
            squared[each, dest[mine], src[mine]] = einsum(d @ gram[each], d, "entry i, entry i -> entry")
    return squared.clamp(min=0)


def head_mean(attention: Float[Tensor, "head dest src"]) -> Float[Tensor, "dest src"]:
    return reduce(attention, "head dest src -> dest src", "mean")
