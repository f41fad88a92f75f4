"""What a norm multiplies by, and what folding has left of it."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from oversquash_lens.numerics import to_float64


def norm_gain(norm: Any, model: Any) -> Float[Tensor, " gain"]:
    """A norm's γ as it multiplies: ones where folded away, one more than what is stored where the class says so."""
    weight = getattr(norm, "w", None)
    if weight is None:
        weight = getattr(norm, "weight", None)
    if weight is None:
        return next(model.parameters()).detach().new_ones(model.cfg.d_model)
    offset = bool(getattr(getattr(norm, "config", None), "rmsnorm_uses_offset", False))
    return weight.detach() + 1 if offset else weight.detach()


def norm_bias(norm: Any) -> Float[Tensor, " d_model"] | None:
    bias = getattr(norm, "b", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def is_folded(model: Any) -> bool:
    """Whether the norms' gains were folded into the weights behind them."""
    if getattr(model.cfg, "normalization_type", None) in ("LNPre", "RMSPre"):
        return True
    if not getattr(model, "compatibility_mode", False):
        return False
    norms = [
        getattr(model, "ln_final", None),
        *(getattr(block, name, None) for block in model.blocks for name in ("ln1", "ln2")),
    ]
    return all(bool((norm_gain(norm, model) == 1).all()) for norm in norms if norm is not None)


def folded_final_gain(model: Any) -> Float[Tensor, " d_model"] | None:
    """γ₃ of a folded model whose embedding was tied: then W_U = γ₃ · W_Eᵀ up to a shift; None where it was not."""
    embed, unembed = getattr(model, "W_E", None), getattr(model, "W_U", None)
    if embed is None or unembed is None or embed.T.shape != unembed.shape:
        return None
    some = slice(0, 4096)  # as many tokens say as much as all
    embed, unembed = to_float64(embed.detach()[some].T), to_float64(unembed.detach()[:, some])
    embed = embed - embed.mean(1, keepdim=True)  # centring the unembedding over the vocabulary shifts it
    unembed = unembed - unembed.mean(1, keepdim=True)
    gain = (embed * unembed).sum(1) / embed.square().sum(1)
    residual = (unembed - gain[:, None] * embed).norm() / unembed.norm()
    return gain if bool(residual < 1e-3) else None
