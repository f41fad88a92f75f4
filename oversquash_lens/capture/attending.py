"""A layer's attention as a recording sees it: checked, and kept as its pattern or as what makes its rows anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture import attention, checks
from oversquash_lens.capture.architecture import Architecture
from oversquash_lens.capture.attention import KeptAttention, RecomputedAttention
from oversquash_lens.capture.parameters import LayerWeights
from oversquash_lens.capture.pass_context import PassContext
from oversquash_lens.capture.rotation import halves_turned, linear_bias, pairs_turned
from oversquash_lens.errors import InputError

Pop = Callable[[str], Tensor]  # key -> what that hook saw


class Heads(NamedTuple):
    """What one layer's heads read and write. Queries and keys are normalised, but not turned by their positions."""

    query: Float[Tensor, "pos head d_head"]
    key: Float[Tensor, "pos kv_head d_head"]
    value: Float[Tensor, "pos kv_head d_head"]
    z: Float[Tensor, "pos head d_head"]


def kept(context: PassContext, layer: int, w: LayerWeights, heads: Heads, pop: Pop) -> KeptAttention:
    """The whole pattern, once it is sure that the model uses it."""
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


def recomputed(context: PassContext, layer: int, w: LayerWeights, heads: Heads, pop: Pop) -> RecomputedAttention:
    """Queries, keys and log-normalisers; that they make the pattern which mixed the values is checked at some rows."""
    architecture = context.architecture
    query, key = _turned(architecture, heads, pop)
    _refuse_cache(context.name(layer, "query"), len(query), len(key))
    scores = {
        "scale": context.weights.score_scale[layer].item() / architecture.score_factor,
        "soft_cap": architecture.soft_cap,
        "window": architecture.windows[layer],
        "bias": linear_bias(architecture.n_heads, len(query), query) if architecture.biased else None,
    }
    found = attention.recomputed(_by_head(query), _by_head(key), _mixed(context, heads.z), sinks=w.sinks, **scores)
    check_recomputed(context, layer, found, heads, pop("pattern"))
    return found


def fused(context: PassContext, layer: int, w: LayerWeights, heads: Heads, pop: Pop) -> RecomputedAttention:
    """As `recomputed`, with what fused attention was given and said of its log-normalisers."""
    query, key = pop("turned_query"), pop("turned_key")
    scores = {"scale": pop("scale").item(), "window": context.architecture.windows[layer]}
    made, mixed = (_by_head(query), _by_head(key)), _mixed(context, heads.z)
    sums = pop("log_normaliser")
    if len(sums):
        found = RecomputedAttention(*made, sums.clone(memory_format=torch.contiguous_format), mixed, **scores)
    else:
        found = attention.recomputed(*made, mixed, **scores)
    check_recomputed(context, layer, found, heads, None)
    return found


ATTENDING = {"kept": kept, "recomputed": recomputed, "fused": fused}


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
    """Queries and keys as they meet in the score, [pos head d_head]."""
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
        turned = [pairs_turned(each.float(), architecture.rotary_dim) for each in (query, key)]
        place = context.name(layer, "pattern")
        checks.check_delegated_scores(place, pattern[:, rows], *turned, scale, rows, architecture.dtype)
    else:
        shown = scores.diagonal(dim1=1, dim2=2)[:, rows]
        bias_at = rows.to(query.dtype) if architecture.biased else None
        place, cap = context.name(layer, "scores"), architecture.soft_cap
        checks.check_scores(place, shown, query[rows], key[rows], scale, cap, bias_at, architecture.dtype)
