"""One layer of a recorded pass: what its hooks saw becomes what is kept of it, checked as soon as it is complete.

Attention is kept as its pattern, or as what makes its rows anew; the MLP is read by `oversquash_lens.capture.mlp`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture import checks
from oversquash_lens.capture.architecture import Architecture
from oversquash_lens.capture.attention import (
    AttentionRows,
    KeptAttention,
    RecomputedAttention,
    halves_turned,
    linear_bias,
    pairs_turned,
    per_head,
    recomputed_attention,
)
from oversquash_lens.capture.checks import PassContext, Pop
from oversquash_lens.capture.mlp import dense_mlp, experts, no_mlp
from oversquash_lens.capture.weights import LayerWeights, layer_weights, on_device
from oversquash_lens.errors import HookMismatchError, InputError
from oversquash_lens.numerics import to_float64

# What a layer keeps for the Trace, in the order in which it comes about.
KEPT = (
    "residual",
    "attention_scale",
    "value",
    "query_norm",
    "key_norm",
    "key",
    "key_pull",
    "query_scale",
    "key_scale",
    "attention_post_scale",
    "mlp_scale",
    "node_gain",
    "mlp_lipschitz",
    "mlp_sigma",
)


class LayerRecord:
    """Takes what the hooks of one layer see, in whatever order the architecture fires them.

    A stage runs when the last of its hooks has fired. `kept` holds what `KEPT` lists, `attention` the rows; all else is
    let go.
    """

    def __init__(self, context: PassContext, index: int) -> None:
        self.context, self.index = context, index
        self.kept: dict[str, Tensor] = {}
        self.attention: AttentionRows  # once `attend` has run
        self._awaited = context.hooks()
        self._seen: dict[str, Tensor] = {}
        self._between: dict[str, Tensor] = {}  # what one stage leaves for the next
        self._stages = [
            (stage, {key for key in keys if key in self._awaited}) for stage, keys in STAGES if keys[0] in self._awaited
        ]

    def take(self, key: str, value: Tensor) -> None:
        """One hook of this layer has fired."""
        value = self.context.detached(value)
        if key == "attention_scale" and self._repeated(value):
            return
        name = self.name(key)
        if key not in self._awaited:
            raise HookMismatchError(
                f"{name}: the hook fired a second time; expected one forward pass per recording, and no split "
                "query/key/value inputs: open a new recording(model) for each pass"
            )
        if key in ("residual", "pattern", "query", "z", "middle") and value.shape[0] != 1:
            raise InputError(
                f"{name}: expected one prompt at a time, got a batch of {value.shape[0]}: record each by itself"
            )
        del self._awaited[key]
        self._seen[key] = _one_prompt(value)
        for stage, needs in self._stages:
            if key in needs and needs <= self._seen.keys():
                with torch.no_grad():
                    stage(self)

    def name(self, key: str | None = None) -> str:
        return self.context.name(self.index, key)

    def missing(self) -> str | None:
        """The first hook, in the order of their firing, that has not fired."""
        return next(iter(self._awaited.values()), None)

    def leave(self, after: Tensor) -> None:
        """The residual that the next layer reads: this layer's bookkeeping is closed with it."""
        if self.missing() is not None:
            raise HookMismatchError(self.silence())
        after = self.context.detached(after)
        checks.check_finite(f"layer {self.index}, hook_resid_post", after)
        architecture, rows = self.context.architecture, self.context.rows(len(after))
        before, writers = ("middle", ("mlp",)) if architecture.sequential else ("residual", ("attention", "mlp"))
        updates = [self._between[f"{part}_update"] for part in writers if f"{part}_update" in self._between]
        name = f"layer {self.index}, {' and '.join(writers)}, hook_resid_post"
        work = self.context.work
        update = torch.stack(updates).sum(0)
        checks.check_sum(name, work(self._between[before][rows]), update, work(after[rows]), architecture.dtype)
        self.close()

    def close(self) -> None:
        """Let go of everything that is not kept."""
        self._between, self._seen = {}, {}

    def silence(self) -> str:
        return (
            f"layer {self.index}: the hook {self.missing()} did not fire before its layer was over; expected it once: "
            "this model class does not show its own computation there (try attn_implementation='eager')"
        )

    # ------------------------------------------------------------ stages

    def enter(self) -> None:
        residual = self._pop("residual")
        if self.index == 0:  # every other one was looked at when the layer below was left
            checks.check_finite(self.name("residual"), residual)
        self.kept["residual"] = self.context.work(residual[-1]).clone()
        self._between["residual"] = residual
        if not self.context.architecture.pre_norms:
            self._keep_scale("attention_scale", residual.new_ones(len(residual), 1))

    def attention_norm(self) -> None:
        scale = self._pop("attention_scale")
        if scale.ndim != 2:
            raise HookMismatchError(
                f"{self.name('attention_scale')}: expected one residual stream for queries, keys and values, got the "
                "norm's divisor per head: model.set_use_split_qkv_input(False), model.set_use_attn_in(False)"
            )
        self._check_norm("attention_scale", self._needed("residual"), scale[:, 0])
        self._keep_scale("attention_scale", scale)

    def attend(self) -> None:
        query, key, value, z = map(self._pop, ("query", "key", "value", "z"))
        architecture, w, work = self.context.architecture, self._layer_weights(), self.context.work
        scored_query, self.kept["query_scale"] = self._scored(work(query), w.query_gain)
        scored_key, self.kept["key_scale"] = self._scored(work(key), w.key_gain)
        projected, value = value, self._clipped(value)
        heads = Heads(scored_query, scored_key, value, z)
        self.attention = ROWS_ON[self.context.route](self.context, self.index, w, heads, self._pop)
        self._check_projections(query, key, projected)
        self.kept["value"] = work(value).transpose(0, 1).clone(memory_format=torch.contiguous_format)
        self.kept["query_norm"] = scored_query.norm(dim=-1).T.contiguous()
        self.kept["key_norm"] = scored_key.norm(dim=-1).T.contiguous()
        self.kept["key"] = scored_key.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        self.kept["key_pull"] = self._key_pull(scored_query)
        self._between["attention_update"] = self._attention_update(z)
        if architecture.mlp == "none":
            self.kept |= no_mlp(self._needed("attention_scale", self.kept))

    def middle(self) -> None:
        middle, work = self._pop("middle"), self.context.work
        rows = self.context.rows(len(middle))
        before, update = self._needed("residual"), self._needed("attention_update")
        checks.check_sum(
            self.name("middle"), work(before[rows]), update, work(middle[rows]), self.context.architecture.dtype
        )
        self._between["middle"] = middle

    def mlp(self) -> None:
        """Whatever the MLP is: its gain at every position, a bound on it, and what it writes."""
        architecture = self.context.architecture
        x = self._needed("middle" if architecture.sequential else "residual")
        if "mlp_scale" in self.context.hooks():
            scale = self._pop("mlp_scale").reshape(len(x))
            self._check_norm("mlp_scale", x, scale)
        else:
            scale = self._needed("attention_scale", self.kept)
        weights = self._layer_weights()
        if architecture.experts:
            found = experts(self.context, self.index, weights, x, self._pop("mlp_out"))
        else:
            found = dense_mlp(self.context, self.index, weights, x, scale, self._pop)
        self.kept |= {"mlp_scale": to_float64(scale), **found.kept}
        self._between["mlp_update"] = found.update

    # ------------------------------------------------------------ parts of stages

    def _attention_update(self, z: Tensor) -> Tensor:
        """What attention writes at the rows that are checked; keeps the divisor of its own norm."""
        w, work = self._layer_weights(), self.context.work
        rows = self.context.rows(len(z))
        update = work(z[rows]).flatten(1) @ work(w.output).flatten(0, 1)
        update = update if w.output_bias is None else update + work(w.output_bias)
        if w.attention_post_gain is None:
            self.kept["attention_post_scale"] = to_float64(torch.ones(len(z), device=z.device))
            return update
        scale = self._pop("attention_post_scale").reshape(len(z))
        self._check_norm("attention_post_scale", update, scale[rows], at_rows=True)
        self._keep_scale("attention_post_scale", scale[:, None])
        return self.context.normalized(update, work(scale[rows])) * work(w.attention_post_gain)

    def _check_projections(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        rows, residual = self.context.rows(len(query)), self._needed("residual")
        scale = self.context.work(self._needed("attention_scale", self.kept)[rows])
        before = self.context.architecture.pre_norms
        normalized = self.context.normalized(residual[rows], scale) if before else self.context.work(residual[rows])
        seen = {"query": query[rows], "key": key[rows], "value": value[rows]}
        checks.check_projections(self.name(), normalized, self._layer_weights(), seen, self.context.architecture)

    def _key_pull(self, query: Float[Tensor, "pos head d_head"]) -> Float[Tensor, "head pos"]:
        """‖diag(γ₁)W_K q‖: how far a step of a position's normalised residual moves its score with this query."""
        factor = per_head(self.context.weights.key_factor[self.index].to(query), query.shape[1])
        return torch.linalg.vector_norm(query.transpose(0, 1) @ factor.mT, dim=-1)

    def _scored(
        self, x: Float[Tensor, "pos head d_head"], gain: Tensor | None
    ) -> tuple[Float[Tensor, "pos head d_head"], Float[Tensor, "head pos"]]:
        """Queries or keys as they enter the score, and the divisors of their own norm."""
        architecture = self.context.architecture
        if gain is None:
            return self._clipped(x), to_float64(torch.ones(x.shape[1], x.shape[0], device=x.device))
        x = x - x.mean(-1, keepdim=True) if architecture.qk_centred else x
        square = x.square().mean(-1)
        square = square.mean(1, keepdim=True).expand_as(square) if architecture.qk_across else square
        scale = (square + architecture.eps).sqrt()
        return self._clipped(x / scale[..., None] * gain.to(x)), to_float64(scale).T.contiguous()

    def _clipped(self, x: Tensor) -> Tensor:
        clip = self.context.architecture.clip
        return x if clip is None else x.clamp(-clip, clip)

    def _check_norm(self, key: str, x: Tensor, scale: Tensor, at_rows: bool = False) -> None:
        rows = slice(None) if at_rows else self.context.rows(len(x))
        checks.check_norm(self.name(key), x[rows], scale[rows], self.context.architecture)

    def _keep_scale(self, key: str, scale: Tensor) -> None:
        self.kept[key] = to_float64(scale[:, 0])

    def _layer_weights(self) -> LayerWeights:
        context = self.context
        return context.per_layer(
            "weights",
            self.index,
            lambda: on_device(layer_weights(context.model, context.architecture, self.index), context.device),
        )

    def _pop(self, key: str) -> Tensor:
        """What a hook saw, the memory given back; the mark that it fired stays."""
        value = self._seen[key]
        self._seen[key] = value.new_empty(0)
        return value

    def _needed(self, key: str, where: dict[str, Tensor] | None = None) -> Tensor:
        """What an earlier stage left."""
        where = self._between if where is None else where
        if key not in where:
            raise HookMismatchError(self.silence())
        return where[key]

    def _repeated(self, scale: Tensor) -> bool:
        """HookedTransformer normalises the same residual once each for queries, keys and values."""
        kept = self.kept.get("attention_scale")
        return kept is not None and scale.shape[0] == 1 and torch.equal(kept, to_float64(scale.detach()[0, :, 0]))


# What shows how queries and keys make scores; each route listens to some of it.
SCORING = ("cos", "sin", "turned_query", "turned_key", "scale", "log_normaliser", "scores", "pattern")
# A stage and the hooks that it waits for; the first of them says whether a layer has the stage at all.
STAGES = (
    (LayerRecord.enter, ("residual",)),
    (LayerRecord.attention_norm, ("attention_scale",)),
    (LayerRecord.attend, ("query", "key", "value", *SCORING, "z", "attention_post_scale")),
    (LayerRecord.middle, ("middle",)),
    (LayerRecord.mlp, ("post", "mlp_scale", "pre", "pre_linear", "mlp_post_scale", "mlp_post_normalized")),
    (LayerRecord.mlp, ("mlp_out", "mlp_scale")),
)


def _one_prompt(value: Tensor) -> Tensor:
    """Without the batch axis; some classes hand their norms all positions of all prompts in one row."""
    return value[0] if value.shape[0] == 1 else value


# ------------------------------------------------------------ attention, by route


class Heads(NamedTuple):
    """What one layer's heads read and write. Queries and keys are normalised, but not turned by their positions."""

    query: Float[Tensor, "pos head d_head"]
    key: Float[Tensor, "pos kv_head d_head"]
    value: Float[Tensor, "pos kv_head d_head"]
    z: Float[Tensor, "pos head d_head"]


def _kept(context: PassContext, layer: int, w: LayerWeights, heads: Heads, pop: Pop) -> KeptAttention:
    """The full pattern, once it is sure that the model uses it."""
    architecture, scores, pattern = context.architecture, pop("scores"), pop("pattern")
    name, rows = context.name(layer, "pattern"), checks.sampled(len(heads.z), context.verify).to(pattern.device)
    _refuse_cache(name, pattern.shape[1], pattern.shape[2])
    checks.check_pattern(name, pattern, architecture.sinks)
    checks.check_window(name, pattern[:, rows], rows, architecture.windows[layer])
    if w.sinks is not None:
        checks.check_sinks(name, pattern[:, rows], scores[:, rows], w.sinks, rows)
    checks.check_output(context.name(layer, "z"), pattern[:, rows], heads.value, heads.z[rows])
    _check_scores(context, layer, scores, pattern, heads, rows)
    return KeptAttention(pattern.clone(), _mixed(context, heads.z))  # a user's cache may hold the same memory


def _recomputed(context: PassContext, layer: int, w: LayerWeights, heads: Heads, pop: Pop) -> RecomputedAttention:
    """Queries, keys and log-normalisers; that they make the pattern which mixed the values is checked at some rows."""
    architecture = context.architecture
    query, key = _turned(architecture, heads, pop)
    _refuse_cache(context.name(layer, "query"), len(query), len(key))
    found = recomputed_attention(
        _by_head(query),
        _by_head(key),
        _mixed(context, heads.z),
        sinks=w.sinks,
        scale=context.weights.score_scale[layer].item() / architecture.score_factor,
        soft_cap=architecture.soft_cap,
        window=architecture.windows[layer],
        bias=linear_bias(architecture.n_heads, len(query), query) if architecture.biased else None,
    )
    check_recomputed(context, layer, found, heads, pop("pattern"))
    return found


def _fused(context: PassContext, layer: int, w: LayerWeights, heads: Heads, pop: Pop) -> RecomputedAttention:
    """The same, of what fused attention was given, with its own log-normalisers where it reports them."""
    query, key = pop("turned_query"), pop("turned_key")
    scores: dict[str, Any] = {"scale": pop("scale").item(), "window": context.architecture.windows[layer]}
    made, mixed = (_by_head(query), _by_head(key)), _mixed(context, heads.z)
    sums = pop("log_normaliser")
    if len(sums):
        found = RecomputedAttention(*made, sums.clone(memory_format=torch.contiguous_format), mixed, **scores)
    else:
        found = recomputed_attention(*made, mixed, **scores)
    check_recomputed(context, layer, found, heads, None)
    return found


ROWS_ON: dict[str, Callable[..., AttentionRows]] = {"kept": _kept, "recomputed": _recomputed, "fused": _fused}


def check_recomputed(
    context: PassContext, layer: int, found: RecomputedAttention, heads: Heads, pattern: Tensor | None
) -> None:
    """At some rows, or all: they are those of the pattern shown, and mix the values into what the model goes on with.

    On the diagonal positions cancel: there the score is that of the queries and keys which norms are taken of.
    """
    architecture, every = context.architecture, checks.sampled(len(heads.z), context.verify).to(heads.z.device)
    own = (context.work(found.query[:, every]) * context.work(found.grouped(found.key[:, every]))).sum(-1)
    scale = context.weights.score_scale[layer].item()
    name = context.name(layer) + ", queries and keys"
    checks.check_scores(name, own * found.scale, heads.query[every], heads.key[every], scale, dtype=architecture.dtype)
    for rows in every.split(checks.ROWS):
        block = found.at(rows)
        if pattern is not None:
            place, route = context.name(layer, "pattern"), "softmax(q · k · scale)"
            checks.check_same(place, block, pattern[:, rows].to(block), route, "hook_pattern", architecture.dtype)
        checks.check_output(context.name(layer, "z"), block, heads.value, heads.z[rows])


def _turned(architecture: Architecture, heads: Heads, pop: Pop) -> tuple[Tensor, Tensor]:
    """Queries and keys as the score multiplies them, [pos head d_head]."""
    if architecture.rotation == "shown":
        return pop("turned_query"), pop("turned_key")
    if architecture.rotation == "tables":
        cos, sin = pop("cos"), pop("sin")
        return halves_turned(heads.query, cos, sin), halves_turned(heads.key, cos, sin)
    if architecture.rotation == "pairs":
        return pairs_turned(heads.query, architecture.rotary_dim), pairs_turned(heads.key, architecture.rotary_dim)
    return heads.query, heads.key


def _by_head(x: Float[Tensor, "pos head d_head"]) -> Float[Tensor, "head pos d_head"]:
    """A copy: a view would keep more alive, and a user's cache may hold the same memory."""
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format)


def _mixed(context: PassContext, z: Float[Tensor, "pos head d_head"]) -> Float[Tensor, "head pos d_head"] | None:
    """What the heads read, where the model computes it as exactly as the measures do."""
    return _by_head(z) if z.dtype == context.work(z[:0]).dtype else None


def _refuse_cache(name: str, queries: int, keys: int) -> None:
    if queries != keys:
        raise InputError(f"{name}: expected the whole prompt at once, got a pass with a key/value cache")


def _check_scores(
    context: PassContext, layer: int, scores: Tensor, pattern: Tensor, heads: Heads, rows: Tensor
) -> None:
    architecture, scale = context.architecture, context.weights.score_scale[layer].item()
    query, key = heads.query, heads.key
    if architecture.delegated:
        query, key = (pairs_turned(each.float(), architecture.rotary_dim) for each in (query, key))
        place = context.name(layer, "pattern")
        dtype, window = architecture.dtype, architecture.windows[layer]
        checks.check_delegated_scores(place, pattern[:, rows], query, key, scale, rows, dtype, window)
    else:
        shown = scores.diagonal(dim1=1, dim2=2)[:, rows]
        bias_at = rows.to(query.dtype) if architecture.biased else None
        place, cap = context.name(layer, "scores"), architecture.soft_cap
        checks.check_scores(place, shown, query[rows], key[rows], scale, cap, bias_at, architecture.dtype)
