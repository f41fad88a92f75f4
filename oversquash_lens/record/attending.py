"""A layer's attention as a recording sees it: checked, and kept as its pattern or as what makes its rows anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import InputError
from oversquash_lens.record import attention, gate
from oversquash_lens.record.attention import KeptAttention, RecomputedAttention
from oversquash_lens.record.layout import Layout
from oversquash_lens.record.parameters import LayerWeights
from oversquash_lens.record.rotation import halves_turned, linear_bias, pairs_turned
from oversquash_lens.record.whole import Whole

Pop = Callable[[str], Tensor]  # key -> what that hook saw


class Heads(NamedTuple):
    """What one layer's heads read and write. Queries and keys are normalised, but not turned by their positions."""

    query: Float[Tensor, "pos head d_head"]
    key: Float[Tensor, "pos kv_head d_head"]
    value: Float[Tensor, "pos kv_head d_head"]
    z: Float[Tensor, "pos head d_head"]


def kept(whole: Whole, layer: int, w: LayerWeights, heads: Heads, pop: Pop) -> KeptAttention:
    """The whole pattern, once it is sure that the model uses it."""
    layout, scores, pattern = whole.layout, pop("scores"), pop("pattern")
    name, rows = whole.name(layer, "pattern"), gate.sampled(len(heads.z), whole.verify).to(pattern.device)
    _refuse_cache(name, pattern.shape[1], pattern.shape[2])
    gate.check_pattern(name, pattern, layout.sinks)
    gate.check_window(name, pattern[:, rows], rows, layout.windows[layer])
    if w.sinks is not None:
        gate.check_sinks(name, pattern[:, rows], scores[:, rows], w.sinks, rows)
    gate.check_output(whole.name(layer, "z"), pattern[:, rows], heads.value, heads.z[rows])
    _check_scores(whole, layer, scores, pattern, heads, rows)
    return KeptAttention(pattern.clone(), _mixed(whole, heads.z))  # a user's cache may hold the same memory


def recomputed(whole: Whole, layer: int, w: LayerWeights, heads: Heads, pop: Pop) -> RecomputedAttention:
    """Queries, keys and log-normalisers; that they make the pattern which mixed the values is checked at some rows."""
    layout = whole.layout
    query, key = _turned(layout, heads, pop)
    _refuse_cache(whole.name(layer, "query"), len(query), len(key))
    scores = {
        "scale": whole.weights.score_scale[layer].item() / layout.score_factor,
        "soft_cap": layout.soft_cap,
        "window": layout.windows[layer],
        "bias": linear_bias(layout.n_heads, len(query), query) if layout.biased else None,
    }
    found = attention.recomputed(_by_head(query), _by_head(key), _mixed(whole, heads.z), sinks=w.sinks, **scores)
    check_recomputed(whole, layer, found, heads, pop("pattern"))
    return found


def fused(whole: Whole, layer: int, w: LayerWeights, heads: Heads, pop: Pop) -> RecomputedAttention:
    """As `recomputed`, with what fused attention was given and said of its log-normalisers."""
    query, key = pop("turned_query"), pop("turned_key")
    scores = {"scale": pop("scale").item(), "window": whole.layout.windows[layer]}
    made, mixed = (_by_head(query), _by_head(key)), _mixed(whole, heads.z)
    sums = pop("log_normaliser")
    if len(sums):
        found = RecomputedAttention(*made, sums.clone(memory_format=torch.contiguous_format), mixed, **scores)
    else:
        found = attention.recomputed(*made, mixed, **scores)
    check_recomputed(whole, layer, found, heads, None)
    return found


ATTENDING = {"kept": kept, "recomputed": recomputed, "fused": fused}


def check_recomputed(
    whole: Whole, layer: int, found: RecomputedAttention, heads: Heads, pattern: Tensor | None
) -> None:
    """At some rows, or all: they are those of the pattern shown, and mix the values into what the model goes on with.

    On the diagonal positions cancel: there the score is that of the queries and keys which norms are taken of.
    """
    layout, every = whole.layout, gate.sampled(len(heads.z), whole.verify).to(heads.z.device)
    own = (whole.work(found.query[:, every]) * whole.work(found.grouped(found.key[:, every]))).sum(-1)
    scale = whole.weights.score_scale[layer].item()
    name = whole.name(layer) + ", queries and keys"
    gate.check_scores(name, own * found.scale, heads.query[every], heads.key[every], scale, dtype=layout.dtype)
    for rows in every.split(gate.ROWS):
        block = found.at(rows)
        if pattern is not None:
            place, route = whole.name(layer, "pattern"), "softmax(q · k · scale)"
            gate.check_same(place, block, pattern[:, rows].to(block), route, "hook_pattern", layout.dtype)
        gate.check_output(whole.name(layer, "z"), block, heads.value, heads.z[rows])


def _turned(layout: Layout, heads: Heads, pop: Pop) -> tuple[Tensor, Tensor]:
    """Queries and keys as they meet in the score, [pos head d_head]."""
    if layout.rotation == "shown":
        return pop("turned_query"), pop("turned_key")
    if layout.rotation == "tables":
        cos, sin = pop("cos"), pop("sin")
        return halves_turned(heads.query, cos, sin), halves_turned(heads.key, cos, sin)
    if layout.rotation == "pairs":
        return pairs_turned(heads.query, layout.rotary_dim), pairs_turned(heads.key, layout.rotary_dim)
    return heads.query, heads.key


def _by_head(x: Float[Tensor, "pos head d_head"]) -> Float[Tensor, "head pos d_head"]:
    """A copy: a view would keep more alive, and a user's cache may hold the same memory."""
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format)


def _mixed(whole: Whole, z: Float[Tensor, "pos head d_head"]) -> Float[Tensor, "head pos d_head"] | None:
    """What the heads read, where the model computes it as exactly as the measures do."""
    return _by_head(z) if z.dtype == whole.work(z[:0]).dtype else None


def _refuse_cache(name: str, queries: int, keys: int) -> None:
    if queries != keys:
        raise InputError(f"{name}: a pass with a key/value cache came; expected the whole prompt at once")


def _check_scores(whole: Whole, layer: int, scores: Tensor, pattern: Tensor, heads: Heads, rows: Tensor) -> None:
    layout, scale = whole.layout, whole.weights.score_scale[layer].item()
    query, key = heads.query, heads.key
    if layout.delegated:
        turned = [pairs_turned(each.float(), layout.rotary_dim) for each in (query, key)]
        place = whole.name(layer, "pattern")
        gate.check_delegated_scores(place, pattern[:, rows], *turned, scale, rows, layout.dtype)
    else:
        shown = scores.diagonal(dim1=1, dim2=2)[:, rows]
        bias_at = rows.to(query.dtype) if layout.biased else None
        place, cap = whole.name(layer, "scores"), layout.soft_cap
        gate.check_scores(place, shown, query[rows], key[rows], scale, cap, bias_at, layout.dtype)
