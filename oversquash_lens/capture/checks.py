"""Checks, at recording, that what the hooks saw describes the model: otherwise an error, never a silent number.

Every check names the hook and its layer. The cheap form, always on, looks at every row's sum, at every weight above
the diagonal, and for the rest at the last position and a few more; the full form (`verify=True`) at all of them.
`PassContext` says of a recorded pass where it is checked, in which precision, and how an error calls a place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from einops import einsum, repeat
from jaxtyping import Float, Int
from torch import Tensor

from oversquash_lens.capture.architecture import LAYER_HOOKS, Architecture
from oversquash_lens.capture.hooked_model import HookedModel, wrapped_config
from oversquash_lens.capture.hooks import NamedHook, attached
from oversquash_lens.capture.weights import LayerWeights, WeightGains
from oversquash_lens.errors import HookMismatchError, ModelError
from oversquash_lens.numerics import to_float64

# How far two routes to the same number may differ, relative to the largest entry, by the model's dtype. (A bridge of
# float64 weights computes norms, softmax and rotations in float32.)
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
ROWS = 16  # positions at which the cheap form follows attention
# What fused attention reports where no hook shows it.
REPORTED = ("turned_query", "turned_key", "scale", "log_normaliser")

Pop = Callable[[str], Tensor]  # key -> what that hook saw
Made = TypeVar("Made")


@dataclass(frozen=True)
class PassContext:
    """One pass: of which model, in what structure, with how many probes of each node, checked at how many positions."""

    model: Any  # None once the recording is over
    architecture: Architecture
    weights: WeightGains
    node_probes: int | None
    seed: int
    verify: bool
    device: torch.device  # where all is computed, wherever the layers of a spread model lie
    route: str = "kept"  # one of architecture.ROUTES
    cache: dict[str, tuple[int, Any]] = field(default_factory=dict)  # see `per_layer`

    def per_layer(self, what: str, layer: int, make: Callable[[], Made]) -> Made:
        """What is made of one layer's weights alone, kept until another layer's is: the prompts of a batch share it."""
        if self.cache.get(what, (None,))[0] != layer:
            self.cache[what] = (layer, make())
        return self.cache[what][1]

    def detached(self, value: Tensor) -> Tensor:
        """What a hook saw, without its graph, from whatever device its layer is on."""
        return value.detach().to(self.device)

    def work(self, value: Tensor) -> Tensor:
        """float64 models stay float64; everything else is accumulated in float32."""
        return value.double() if self.architecture.dtype == torch.float64 else value.float()

    def normalized(self, x: Float[Tensor, "row d"], scale: Float[Tensor, " row"]) -> Float[Tensor, "row d"]:
        """What a norm of this model makes of x, its gain left out."""
        x = self.work(x)
        centre = x.mean(-1, keepdim=True) if self.architecture.centred else 0.0
        return (x - centre) / scale.to(x)[:, None]

    def rows(self, n: int) -> Int[Tensor, " row"]:
        """Where residual bookkeeping and matrices are followed: the last position, or all of them."""
        return torch.arange(n, device="cpu") if self.verify else torch.tensor([n - 1], device="cpu")

    def hooks(self) -> dict[str, str]:
        """Key -> name of what is waited for in each layer: hooks, and what fused attention reports without one."""
        reported = dict.fromkeys(REPORTED, "of fused attention") if self.route == "fused" else {}
        return self.architecture.layer_hooks(self.route) | reported

    def name(self, layer: int, key: str | None = None) -> str:
        """`layer 7, attn.hook_pattern`: what an error calls a place."""
        hook = self.hooks().get(key) if key else None
        return f"layer {layer}" + (f", {hook}" if hook else "")


def sampled(n: int, every: bool) -> Int[Tensor, " row"]:
    """The positions at which checks look: all, or up to ROWS of them, evenly spread, the last one last."""
    if every or n <= ROWS:
        return torch.arange(n, device="cpu")
    return torch.linspace(0, n - 1, ROWS, device="cpu").round().long()


def check_finite(name: str, value: Tensor) -> None:
    # A sum that is finite has finite terms, and costs less than to look at each.
    if not math.isfinite(value.sum(dtype=_summed_in(value)).item()) and not torch.isfinite(value).all():
        raise HookMismatchError(
            f"{name} holds NaN or infinite values; expected finite activations: check the model's weights, or use "
            "a wider dtype (float32) if this one overflows"
        )


def _summed_in(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def check_pattern(name: str, pattern: Float[Tensor, "head dest src"], sinks: bool = False) -> None:
    """Rows sum to 1 (with sinks: to no more), nothing above the diagonal; a head of zeros alone is switched off.

    Whether such a head indeed reads nothing, `check_output` decides: this hook may not show what it reads.
    """
    sums = pattern.sum(-1, dtype=torch.float32)
    off = ((sums - 1).clamp(min=0) if sinks else (sums - 1).abs()).amax(-1)
    wrong = ~(off <= TOLERANCE[pattern.dtype])  # NaN too
    if wrong.any() and pattern[wrong].any():
        raise HookMismatchError(
            f"{name}: rows of the attention pattern sum to 1 ± {off[wrong].max().item():.2g}; expected 1: this hook "
            "does not show the softmax that the model uses (attention sinks, padding or a delegated attention), or "
            "weights hold NaN"
        )
    ahead = largest_above_diagonal(pattern)
    if ahead:
        raise HookMismatchError(
            f"{name}: expected a causal pattern, zero above the diagonal, got attention to later positions "
            f"({ahead:.2g})"
        )


def largest_above_diagonal(pattern: Float[Tensor, "head dest src"], block: int = 128) -> float:
    """The largest size of a weight above the diagonal, read where it lies: no copy of the pattern is made."""
    n = pattern.shape[-1]
    if n <= block:
        return pattern.triu(1).abs().amax().item()
    half = n // 2
    corner = pattern[:, :half, half:]
    high, low = corner.amax().item(), corner.amin().item()
    parts = (pattern[:, :half, :half], pattern[:, half:, half:])
    return max(high, -low, *(largest_above_diagonal(part, block) for part in parts))


def check_window(
    name: str, pattern: Float[Tensor, "head row src"], rows: Int[Tensor, " row"], window: int | None
) -> None:
    """A layer that sees `window` positions looks no further back."""
    if window is None:
        return
    src = torch.arange(pattern.shape[-1], device=pattern.device)
    beyond = pattern * (rows[:, None] - src >= window)
    if beyond.any():
        raise HookMismatchError(
            f"{name}: expected none beyond this layer's window of {window}, got attention to positions more than "
            f"{window - 1} back ({beyond.abs().max().item():.2g}): the model was given another mask than its own"
        )


def check_sinks(
    name: str,
    pattern: Float[Tensor, "head row src"],
    scores: Float[Tensor, "head row src"],
    sinks: Float[Tensor, " head"],
    rows: Int[Tensor, " row"],
) -> None:
    """Rows sum to what the softmax leaves beside each head's sink."""
    src = torch.arange(pattern.shape[-1], device=pattern.device)
    seen = scores[..., : len(src)].float().masked_fill(src > rows[:, None], -torch.inf)
    share = torch.sigmoid(torch.logsumexp(seen, -1) - sinks.float()[:, None])
    sums = pattern.sum(-1, dtype=torch.float32)
    check_same(name, share, sums, "the softmax beside the sink", "the rows' sums", pattern.dtype)


def check_output(
    name: str,
    pattern: Float[Tensor, "head row pos"],
    value: Float[Tensor, "pos kv_head d_head"],
    z: Float[Tensor, "row head d_head"],
) -> None:
    """pattern·v = z, so an edit of the pattern that the model does not use, or uses unseen, is found out."""
    grouped = pattern.to(z).reshape(value.shape[1], -1, len(value))  # heads that read the same values together
    mixed = torch.matmul(grouped, value.to(z).transpose(0, 1)).view(z.shape[1], len(z), -1)
    check_same(name, mixed.transpose(0, 1), z, "pattern · v", "hook_z", z.dtype)


def check_scores(
    name: str,
    scores: Float[Tensor, "head row"],
    query: Float[Tensor, "row head d_head"],
    key: Float[Tensor, "row kv_head d_head"],
    scale: float,
    soft_cap: float | None = None,
    bias_at: Float[Tensor, " row"] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """q·k·scale on the diagonal, where rotations and relative positions cancel; queries and keys as they enter it.

    `bias_at`: positions from the first on, where ALiBi leaves a bias in proportion to them, and where it is counted
    from beyond the prompt (HookedTransformer's after a longer one) one for all, which changes no pattern.
    """
    key = repeat(key, "row kv d -> row (kv heads) d", heads=query.shape[1] // key.shape[1])
    own = einsum(query.float(), key.float(), "row head d, row head d -> head row") * scale
    own = own if soft_cap is None else soft_cap * torch.tanh(own / soft_cap)
    scores = scores.float()
    if bias_at is not None:
        first, last = (scores - own)[:, :1], (scores - own)[:, -1:]
        own = own + first + (last - first) * bias_at / bias_at[-1]
    check_same(name, own, scores, "q · k · scale", "the score", dtype or query.dtype)


def check_delegated_scores(
    name: str,
    pattern: Float[Tensor, "head row src"],
    query: Float[Tensor, "pos head d_head"],
    key: Float[Tensor, "pos kv_head d_head"],
    scale: float,
    rows: Int[Tensor, " row"],
    dtype: torch.dtype,
    window: int | None = None,
) -> None:
    """softmax(q·k·scale) = pattern, where the scores are out of sight; queries and keys as they meet in them."""
    key = repeat(key, "pos kv d -> pos (kv heads) d", heads=query.shape[1] // key.shape[1])
    scores = einsum(query[rows], key, "row head d, src head d -> head row src") * scale
    back = rows[:, None] - torch.arange(len(key), device=rows.device)
    hidden = (back < 0) | (back >= (len(key) if window is None else window))
    own = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    check_same(name, own, pattern.float(), "softmax(q · k · scale)", "hook_pattern", dtype)


def check_norm(name: str, x: Float[Tensor, "row d"], scale: Float[Tensor, " row"], architecture: Architecture) -> None:
    """The divisor is that of the vector which the norm is said to read: no norm is elsewhere."""
    x = to_float64(x)
    centred = x - x.mean(-1, keepdim=True) if architecture.centred else x
    square, shown = centred.square().mean(-1), to_float64(scale)
    check_finite(f"{name} (the divisor)", shown)
    off = (square + architecture.eps - shown.square()).abs() - 2 * architecture.eps
    wrong = ~(off <= 2 * TOLERANCE[architecture.dtype] * shown.square())
    if wrong.any():
        came, expected = shown[wrong][0].item(), (square[wrong][0] + architecture.eps).sqrt().item()
        raise HookMismatchError(
            f"{name}: the norm divides by {came:.4g} where what it is said to read has {expected:.4g}; expected the "
            "same: a norm stands elsewhere in this model"
        )


def check_projections(
    name: str,
    normalized: Float[Tensor, "row d_model"],
    w: LayerWeights,
    seen: dict[str, Float[Tensor, "row heads d_head"]],
    architecture: Architecture,
) -> None:
    """Queries, keys and values from norm, gain and weights: no head of them was edited.

    What is cut to a range next is compared inside it: transformers' own code cuts in place what the hook saw.
    """
    dtype = architecture.dtype
    inside = normalized * w.attention_gain.to(normalized)
    if w.attention_norm_bias is not None:
        inside = inside + w.attention_norm_bias.to(normalized)
    for key, value in seen.items():
        weight, bias = getattr(w, key).to(normalized), getattr(w, f"{key}_bias")
        computed = einsum(inside, weight, "row d, head d i -> row head i")
        computed, value = computed if bias is None else computed + bias.to(normalized), value.to(normalized)
        if architecture.clip is not None and (key == "value" or not architecture.qk_norm):
            computed, value = (each.clamp(-architecture.clip, architecture.clip) for each in (computed, value))
        place, seen_at = f"{name}, attn.hook_{key[0]}", f"hook_{key[0]}"
        check_same(place, computed, value, f"norm · gain · W_{key}", seen_at, dtype)


def check_sum(name: str, before: Tensor, update: Tensor, after: Tensor, dtype: torch.dtype) -> None:
    """The residual stream: what was there, plus what the weights make of the hooks, is what comes out."""
    check_finite(name, after)
    off = (before + update - after).abs().max().item()
    rounding = 16 * torch.finfo(dtype).eps * after.abs().max().item()
    if not off <= TOLERANCE[dtype] * update.abs().max().item() + rounding:
        raise HookMismatchError(
            f"{name}: the residual stream moves by other than what this layer writes (off by {off:.2g}); expected "
            "residual + output · W + b: the model scales or normalises what it adds"
        )


def check_same(where: str, computed: Tensor, seen: Tensor, route: str, hook: str, dtype: torch.dtype) -> None:
    """Two routes to one number."""
    check_finite(f"{where} ({hook})", seen)
    size = seen.abs().max().clamp(min=1e-6).item()
    off = (computed - seen).abs().max().item() / size
    if not off <= TOLERANCE[dtype]:
        raise HookMismatchError(
            f"{where}: {route} differs from {hook} by {off:.2g} of its size; expected the same: the model "
            "computes something else than its hooks show"
        )


class Predictions(NamedTuple):
    """What one pass makes of some tokens, in float64 on the CPU; `y`: the prediction's input."""

    logits: Float[Tensor, "pos d_vocab"]
    y: Float[Tensor, "pos d_model"]


def apart(own: Predictions, other: Predictions, architecture: Architecture) -> str | None:
    """By how much two predictions of the same tokens differ where that is more than rounding; None where it is not.

    In half precision a router near a tie may flip at one position, so there the median over positions counts.
    """
    ours, theirs = own.logits.log_softmax(-1), other.logits.log_softmax(-1)
    if ours.shape != theirs.shape:
        return f"{theirs.shape[-1]} logits instead of {ours.shape[-1]}"
    found = {"log-probabilities": (ours - theirs).abs().amax(-1) / ours.abs().max().clamp(min=1.0)}
    if not architecture.folded and own.y.shape == other.y.shape:
        found["what the unembedding reads"] = (own.y - other.y).norm(dim=-1) / own.y.norm(dim=-1).clamp(min=1e-6)
    half = architecture.dtype.itemsize < 4
    for what, off in found.items():
        most = (off.median() if half else off.max()).item()
        if not most <= TOLERANCE[architecture.dtype]:
            return f"{what} differ by {most:.2g} of their size"
    return None


def refuse_apart(said: str | None, architecture: Architecture, route: str) -> None:
    """Raise the ModelError about what `apart` has said of a route to the predictions, where it has."""
    if said is not None:
        kind = "HookedTransformer" if architecture.hooked else "TransformerBridge"
        raise ModelError(
            f"{architecture.name} as a {kind} computes another function than {route}: {said} of a few tokens, "
            f"expected at most {TOLERANCE[architecture.dtype]:.2g}; a measure of it would describe neither: load it as "
            "the other class, or with another version of transformer-lens"
        )


# ------------------------------------------------------------ what needs passes of its own (verify=True)


def logits_from(model: HookedModel, unembedded: Float[Tensor, "*axes d_vocab"]) -> Float[Tensor, "*axes d_vocab"]:
    """What the model makes of y W_U + b_U: some cap it or multiply it, as their config says."""
    config = wrapped_config(model) or model.cfg
    for word, rule in LOGIT_RULES.items():
        number = getattr(config, word, None)
        if number is not None and number > 0:
            unembedded = rule(unembedded, number)
    return unembedded


# What configs call that which a model does to its logits behind the unembedding.
LOGIT_RULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "output_logits_soft_cap": lambda logits, cap: cap * (logits / cap).tanh(),
    "final_logit_softcapping": lambda logits, cap: cap * (logits / cap).tanh(),
    "logit_scale": lambda logits, scale: logits * scale,
    "logits_scaling": lambda logits, scale: logits / scale,
    "lm_head_multiplier": lambda logits, factor: logits * factor,
}


def verify_pass(model: HookedModel, architecture: Architecture, ids: Int[Tensor, "one pos"], recorded: Any) -> None:
    """Run the model again without our hooks, and once with halved patterns; an error says what does not fit."""
    shown: list[Tensor] = []
    handle = model.unembed.register_forward_hook(lambda module, inputs, logits: shown.append(logits.detach()))
    try:
        with torch.no_grad():
            plain = model(ids)
    finally:
        handle.remove()
    check_same("logits", recorded, plain, "the recorded pass", "a plain pass", architecture.dtype)
    unembedded, logits = logits_from(model, shown[0][0, -1]), plain[0, -1].to(shown[0])
    factor = (unembedded @ logits) / (unembedded @ unembedded)  # one that no config names changes no order
    check_same("logits", unembedded * factor, logits, "y · W_U + b_U", "the model's logits", architecture.dtype)
    if not architecture.delegated and not patterns_are_used(model, architecture, ids):
        raise HookMismatchError(
            "attn.hook_pattern: halving all attention patterns changes nothing; expected the patterns that the hooks "
            "show to be those that the model uses: load it with attn_implementation='eager'"
        )


def patterns_are_used(model: HookedModel, architecture: Architecture, ids: Int[Tensor, "one pos"]) -> bool:
    """Whether an edit of hook_pattern reaches what the heads make of it; delegated attention drops it in silence."""
    caught = []

    def mixed(z: Tensor, hook: Any = None) -> None:
        caught.append(z.detach().clone())

    def halve(pattern: Tensor, hook: Any = None) -> Any:
        return pattern * 0.5

    halved: list[NamedHook] = [(f"blocks.{i}.{LAYER_HOOKS['pattern']}", halve) for i in range(architecture.n_layers)]
    for hooks in ([], halved):
        with torch.no_grad(), attached(model, [(f"blocks.0.{LAYER_HOOKS['z']}", mixed), *hooks]):
            model(ids)
    return not torch.equal(*caught)
