"""Proof, at recording, that what the hooks saw describes the model: otherwise an error, never a silent number."""

from __future__ import annotations

import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import GateError
from oversquash_lens.record.layout import LayerWeights, Layout
from oversquash_lens.record.nodes import MlpState

# How far two routes to the same number may differ, relative to the largest entry, by the model's dtype.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


def check_finite(name: str, value: Tensor) -> None:
    if not torch.isfinite(value).all():
        raise GateError(
            f"{name} holds NaN or infinite values; expected finite activations: check the model's weights, or use "
            "a wider dtype (float32) if this one overflows"
        )


def check_pattern(name: str, pattern: Float[Tensor, "head dest src"]) -> None:
    """Rows sum to 1, nothing above the diagonal; a head whose whole pattern is 0 is switched off.

    That such a head indeed reads nothing, and is not merely out of this hook's sight, `check_output` finds out.
    """
    off = (pattern.sum(-1, dtype=torch.float32) - 1).abs().amax(-1)
    wrong = ~(off <= TOLERANCE[pattern.dtype])  # NaN too
    if pattern[wrong].any():
        raise GateError(
            f"{name}: rows of the attention pattern sum to 1 ± {off[wrong].max().item():.2g}; expected 1: this hook "
            "does not show the softmax that the model uses (attention sinks, padding or a delegated attention), or "
            "weights hold NaN"
        )
    future = pattern.triu(1)
    if future.any():
        raise GateError(
            f"{name}: attention to later positions ({future.abs().max().item():.2g}) came; expected a causal pattern, "
            "zero above the diagonal"
        )


def check_output(
    name: str,
    pattern: Float[Tensor, "head pos pos"],
    value: Float[Tensor, "pos kv_head d_head"],
    z: Float[Tensor, "pos head d_head"],
) -> None:
    """pattern·v = z, so an edit of the pattern that the model does not use, or uses unseen, is found out."""
    heads = z.shape[1] // value.shape[1]
    value = repeat(value, "src kv d -> (kv heads) src d", heads=heads)
    mixed = torch.matmul(pattern.to(z), value.to(z))
    _compare(name, mixed.transpose(0, 1), z, "pattern · v", "hook_z", z.dtype)


def check_scores(
    name: str,
    scores: Float[Tensor, "head pos pos"],
    query: Float[Tensor, "pos head d_head"],
    key: Float[Tensor, "pos kv_head d_head"],
    scale: float,
) -> None:
    """q·k·scale on the diagonal, where rotations and relative positions cancel."""
    key = repeat(key, "pos kv d -> pos (kv heads) d", heads=query.shape[1] // key.shape[1])
    own = einsum(query.float(), key.float(), "pos head d, pos head d -> head pos") * scale
    _compare(name, own, scores.diagonal(dim1=1, dim2=2), "q · k · scale", "the score", query.dtype)


def check_projections(
    name: str,
    normalized: Float[Tensor, " d_model"],
    w: LayerWeights,
    seen: dict[str, Float[Tensor, "heads d_head"]],
    dtype: torch.dtype,
) -> None:
    """The last position's queries, keys and values from norm, gain and weights: no head of them was edited."""
    inside = normalized * w.attention_gain.to(normalized)
    if w.attention_norm_bias is not None:
        inside = inside + w.attention_norm_bias.to(normalized)
    for key, value in seen.items():
        weight, bias = getattr(w, key).to(normalized), getattr(w, f"{key}_bias")
        computed = einsum(inside, weight, "d, head d i -> head i")
        computed = computed if bias is None else computed + bias.to(normalized)
        _compare(name, computed, value.to(normalized), f"norm · gain · W_{key}", f"hook_{key[0]}", dtype)


def check_mlp(name: str, state: MlpState, post: Float[Tensor, " d_mlp"], w: LayerWeights, layout: Layout) -> None:
    """The last position's pre-activations from norm, gain and weights, and its activations from these."""
    work = state.gate.dtype
    last = state.normalized[-1] * w.mlp_gain.to(work)

    def same(computed: Tensor, seen: Tensor, route: str, hook: str) -> None:
        _compare(name, computed, seen, route, hook, layout.dtype)

    inside = last @ w.mlp_in.to(work) + w.mlp_in_offset.to(work)
    out = layout.activation.function(state.gate[-1])
    if state.up is None:
        same(inside, state.gate[-1], "norm · gain · W_in", "hook_pre")
    else:
        gate = last @ w.mlp_gate.to(work) + w.mlp_gate_offset.to(work)
        same(gate, state.gate[-1], "norm · gain · W_gate", "hook_pre")
        same(inside, state.up[-1], "norm · gain · W_in", "hook_pre_linear")
        out = out * state.up[-1]
    if w.mlp_post_bias is not None:
        out = out + w.mlp_post_bias.to(work)
    same(out, post.to(work), "activation(pre)", "hook_post")


def check_sum(name: str, before: Tensor, update: Tensor, after: Tensor, dtype: torch.dtype) -> None:
    """The residual stream: what was there, plus what the weights make of the hooks, is what comes out."""
    check_finite(name, after)
    off = (before + update - after).abs().max().item()
    rounding = 16 * torch.finfo(dtype).eps * after.abs().max().item()
    if not off <= TOLERANCE[dtype] * update.abs().max().item() + rounding:
        raise GateError(
            f"{name}: the residual stream moves by other than what this layer writes (off by {off:.2g}); expected "
            "residual + output · W + b: the model scales or normalises what it adds, or a hook behind ours edits it"
        )


def _compare(where: str, computed: Tensor, seen: Tensor, route: str, hook: str, dtype: torch.dtype) -> None:
    check_finite(f"{where} ({hook})", seen)
    size = seen.abs().max().clamp(min=1e-6).item()
    off = (computed - seen).abs().max().item() / size
    if not off <= TOLERANCE[dtype]:
        raise GateError(
            f"{where}: {route} differs from {hook} by {off:.2g} of its size; expected the same: a hook of yours edits "
            "the result, which the weights then do not tell (to switch a head off, use edits.ablate_head; "
            "measured_sensitivity allows any edit), or the model computes something else than its hooks show"
        )
