"""CircuitsVis views of where it runs: a flow's heads, route and activations, measured or estimated, and a swap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured_flow import MeasuredFlow
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.heaviest import HeavyEdge, heaviest_by_layer
from oversquash_lens.paths.recursion import ROWS
from oversquash_lens.swaps.swap import Swap
from oversquash_lens.viz.html import View, Views
from oversquash_lens.viz.token_strips import (
    Bins,
    bins_for,
    check_shares,
    kind_of,
    layer_rows,
    millionths,
    rows_by_layer,
    strip_view,
)
from oversquash_lens.viz.words import (
    colour_key,
    guide,
    named,
    number,
    percent,
    rounded,
    source_named,
    span_text,
    title_and_gloss,
)

PATTERN_BINS = 48  # tokens or bins on each axis of a pattern, at most
BLOCKS = 25_000  # squares that one layer's patterns are drawn of: CircuitsVis makes an object of each
PATTERN_NUMBERS = 75_000  # in all patterns of one view, about 200 KB
PATTERN_FLOOR = 1e-6  # share at which the colour of a pattern starts
ACTIVATION_BINS = 128  # tokens or bins, at most
ACTIVATION_NUMBERS = 200_000  # about 500 KB; large models have fewer bins

MOVES = 5  # that are told in words, of each layer
MOVED = "how far a token’s residual moves, relative to its size"
PATCHED = "the share of the target’s change that one patched residual brings"


def heads(flow: Flow | MeasuredFlow | object) -> View:
    """Map of layers × heads, coloured by the share that each head carries; a row sums to 1 with what stays.

    Of a MeasuredFlow the share is of the sensitivity, and negative ones are blue; where heads and MLP are computed side
    by side the MLP has a column too. Of a Flow it is the share of the paths, with the picked layer's patterns:
    CircuitsVis' AttentionHeads on [head, dest, src] shares, attention weighted with the paths that use it. They come
    for the layers whose heads move most, as many as a page can carry, on at most 48 tokens or bins; the caption says
    which.
    """
    checked = _checked(flow)
    if not checked.head.shape[1]:
        raise InputError("expected a flow with heads, got one of a model that shows none: use route")
    measured = isinstance(checked, MeasuredFlow)
    bins = bins_for(checked.tokens, checked.node, _pattern_bins(checked.head.shape[1]))
    patterns, notes = ({}, []) if isinstance(checked, MeasuredFlow) else _patterns(checked, bins)
    others = {"what stays": checked.stays if isinstance(checked, MeasuredFlow) else checked.residual}
    if (
        isinstance(checked, MeasuredFlow)
        and (checked.head.sum(-1) + checked.stays - 1).abs().nan_to_num(0).max() > 1e-6
    ):
        others["MLP"] = checked.mlp
    table = torch.cat([checked.head, torch.stack(list(others.values()), 1)], dim=1).cpu().double()
    floor = 0.01 / table.shape[1]
    layer, head = divmod(int(checked.head.nan_to_num(0).abs().argmax()), checked.head.shape[1])
    if not measured:
        layer = int(checked.head.sum(-1).argmax())
        head = int(checked.head[layer].argmax())
    payload = {
        "view": "heads",
        "tokens": bins.texts,
        "places": bins.places,
        "table": [[None if math.isnan(share) else rounded(share, 3) for share in row] for row in table.tolist()],
        "columns": [*(f"head {head}" for head in range(checked.head.shape[1])), *others],
        "patterns": patterns,
        "pattern_floor": PATTERN_FLOOR,
        "pattern_key": colour_key(PATTERN_FLOOR),
        "start": [layer, head],
        "floor": rounded(floor),
        "key": colour_key(floor),
    }
    walk = "Point at a head, or walk the map with the arrow keys, for its share."
    if patterns:
        walk = (
            "Click a head, or walk the map with the arrow keys and press Enter, for its pattern: rows receive, columns "
            "send, and a number is the share of the paths that runs over that edge."
        )
    meaning = f"the share of the {'sensitivity' if measured else 'paths'} that a head carries"
    return View(
        payload,
        *title_and_gloss(checked, "Which heads carry it"),
        notes,
        guide(meaning, "a hundredth of a uniform share", floor, checked.tokens, walk, signed=bool((table < 0).any())),
    )


def _patterns(flow: Flow, bins: Bins) -> tuple[dict[str, list[list[int]]], list[str]]:
    """Each head's pattern, of the layers whose heads move most, and what was left out or summed, in words."""
    numbers = flow.head.shape[1] * len(bins.bins) * (len(bins.bins) + 1) // 2
    shown = _shown_layers(flow.head.sum(-1), numbers)
    patterns = {str(layer): _pattern(flow, layer, bins) for layer in shown}
    return patterns, [_patterns_note(shown, flow.n_layers), bins.note("their sum")]


def route(flow: Flow | MeasuredFlow | object) -> View:
    """Where one token's influence runs (or that of all): the positions at each layer, and the heads that carry it.

    A map of layers × positions with the heaviest moves of all, the tokens of the picked layer coloured by the share
    that passes there, and in words what carries most in that layer: edges of a Flow, heads and MLP of a MeasuredFlow.
    """
    checked = _checked(flow)
    if isinstance(checked, MeasuredFlow):
        moves, heaviest, stays = _measured_moves(checked)
    else:
        by_layer = heaviest_by_layer(checked, MOVES)
        edges = sorted((edge for edges in by_layer for edge in edges), key=lambda edge: -edge.share)[:MOVES]
        moves = [[_told(checked, edge) for edge in edges] for edges in by_layer]
        heaviest = [(edge.layer, _told(checked, edge)) for edge in edges]
        stays = checked.residual.tolist()
    topic = f"Route of {source_named(checked)}"
    return strip_view(
        layer_rows(checked),
        *title_and_gloss(checked, topic),
        view="route",
        heaviest=heaviest,
        moves=moves,
        stays=[
            "no heads are shown" if math.isnan(share) else f"{percent(share, 3)} stays where it is" for share in stays
        ],
    )


def _measured_moves(flow: MeasuredFlow) -> tuple[list[list[str]], list[tuple[int, str]], list[float]]:
    """What carries most, layer by layer and of all layers; and what stays."""
    carried = torch.cat([flow.head, flow.mlp[:, None]], 1).nan_to_num(0).tolist()
    names = [*(f"head {head} carries" for head in range(flow.head.shape[1])), "the MLP writes"]
    said = [
        (share, layer, f"{name} {percent(share, 3)}")
        for layer, row in enumerate(carried)
        for name, share in zip(names, row, strict=True)
        if share
    ]
    said.sort(key=lambda each: -abs(each[0]))
    moves = [[text for _, at, text in said if at == layer][:MOVES] for layer in range(len(carried))]
    return moves, [(layer, text) for _, layer, text in said if "head" in text][:MOVES], flow.stays.tolist()


def _told(flow: Flow, edge: HeavyEdge) -> str:
    ends = f"from {named(flow.tokens, edge.src)} to {named(flow.tokens, edge.dest)}"
    return f"head {edge.head} brings {percent(edge.share, 3)} {ends}"


def swap(found: Swap | object) -> Views:
    """Tokens × layers of a swap: where the two prompts differ, and what patching one residual does to the target.

    The first map shows ‖Δx_j⁽ˡ⁾‖/‖x_j⁽ˡ⁾‖, the second the share of the target's change that one patched residual
    brings: 1 all of it, negative the other way (blue), nothing where it was not patched. A layer picked in one is
    picked in the other.
    """
    if not isinstance(found, Swap):
        raise InputError(f"expected a Swap, got {kind_of(found)}: call swap(model, prompt, change) first")
    how: dict[str, Any] = {"start": "a hundredth"}
    moved = rows_by_layer(found.tokens, found.spread, MOVED, unit="relative difference", **how)
    check_shares(moved.tokens, moved.shares, moved.unit)
    patched = rows_by_layer(found.tokens, found.patched, PATCHED, unit="share of the effect", **how)
    bins = bins_for(found.tokens, torch.cat([moved.shares, patched.shares]))
    old, new = (
        span_text([each[i] for i in found.positions], 0, len(found.positions)) for each in (found.tokens, found.swapped)
    )
    known = int((~torch.isnan(found.patched)).sum())
    ends = f"{number(found.before, '.3g')} to {number(found.after, '.3g')}"
    glosses = {
        "Where the difference is": f"{old} replaced by {new}: relative difference of the residual stream",
        "What patching says": f"the {found.target} goes from {ends}; share of that when one residual alone is the "
        f"swapped prompt’s ({known:,} of {found.patched.numel():,} patched)",
    }
    bare: dict[str, Any] = {"view": "route", "heaviest": [], "moves": [], "stays": []}
    views = [
        strip_view(rows, title, gloss, bins=bins, floor=rows.floor, **bare)
        for rows, (title, gloss) in zip((moved, patched), glosses.items(), strict=True)
    ]
    meaning = f"on the left {MOVED}, on the right {PATCHED}"
    return Views(
        views, guide(meaning, "a hundredth", moved.floor, found.tokens, signed=bool((patched.shares < 0).any()))
    )


def activations(flow: Flow | object) -> View:
    """What each head of each layer brings to each token, [token × layer × head], a layer and head to pick.

    CircuitsVis' TextNeuronActivations on `flow.head_at`, in whole millionths of the paths (it computes in float32,
    which holds these exactly); the last "head" is the residual stream. A layer sums to one million. Beyond 128 tokens
    (fewer for large models) the heaviest stand alone and the others are summed.
    """
    checked = _checked(flow)
    if isinstance(checked, MeasuredFlow):
        raise InputError("expected a Flow, got a MeasuredFlow, which has no shares of a head by position: use heads")
    brought = torch.cat([checked.head_at, checked.residual_at[:, None]], dim=1).cpu().double()
    most = ACTIVATION_NUMBERS // (brought.shape[0] * brought.shape[1])
    bins = bins_for(checked.tokens, checked.node, max(16, min(ACTIVATION_BINS, most)))
    n_heads = checked.head_at.shape[1]
    floor = 0.01 / len(checked.tokens)
    payload = {
        "view": "activations",
        "tokens": bins.texts,
        "widths": bins.widths,
        "places": bins.places,
        "millionths": millionths(bins.sums(brought).permute(2, 0, 1)).tolist(),
        "layers": [f"{layer}" for layer in range(checked.n_layers)],
        "heads": [*(f"{head}" for head in range(n_heads)), "residual stream"],
        "start": list(divmod(int(checked.head.argmax()), n_heads)),
        "floor": rounded(floor),
        "key": colour_key(floor),
    }
    meaning = "the share of the paths that the picked head brings to a token"
    walk = "Hover over a token, tap it or walk to it with the arrow keys for the number, in millionths."
    return View(
        payload,
        *title_and_gloss(checked, "What each head brings where"),
        [bins.note()],
        guide(meaning, "a hundredth of a uniform share", floor, checked.tokens, walk),
    )


def _checked(flow: Flow | MeasuredFlow | object) -> Flow | MeasuredFlow:
    if not isinstance(flow, Flow | MeasuredFlow):
        raise InputError(f"expected a MeasuredFlow or a Flow, got {kind_of(flow)}: call measured_flow or flow first")
    if (
        not flow.tokens
        or not len(flow.head)
        or 0 in flow.node.shape
        or (isinstance(flow, Flow) and not flow.head.shape[1])
    ):
        raise InputError(
            f"expected at least one token, layer and head, got an empty flow ({len(flow.tokens)} tokens, "
            f"{len(flow.head)} layers): record a prompt with tokens in it"
        )
    signed = isinstance(flow, MeasuredFlow)
    for name in ("node",) if signed else ("node", "head_at", "residual_at"):
        check_shares(flow.tokens, getattr(flow, name).detach().cpu().double(), signed=signed)
    return flow


def _pattern_bins(n_heads: int) -> int:
    """Bins on each axis such that all heads of a layer, and the enlarged one, are drawn of at most `BLOCKS`."""
    return max(16, min(PATTERN_BINS, math.isqrt(BLOCKS // (n_heads + 1))))


def _shown_layers(moved: Float[Tensor, " layer"], numbers: int) -> list[int]:
    """The layers that move most, in order; as many as `PATTERN_NUMBERS` allows, one at least."""
    count = min(len(moved), max(1, PATTERN_NUMBERS // numbers))
    return sorted(moved.topk(count).indices.tolist())


def _pattern(flow: Flow, layer: int, bins: Bins) -> list[list[int]]:
    """Each head's edges in millionths, summed into bins: the lower triangle, row by row."""
    n, sums = len(flow.tokens), []
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        rows = bins.sums(flow.edge_rows(layer, start, stop))  # [head, dest, bin]
        padded = torch.zeros(*rows.shape[::2], n, dtype=rows.dtype)
        padded[..., start:stop] = rows.mT
        sums.append(bins.sums(padded))  # [head, src bin, dest bin]
    square = torch.stack(sums).sum(0).mT
    dest, src = torch.tril_indices(*square.shape[1:])
    return millionths(square[:, dest, src]).tolist()


def _patterns_note(shown: Sequence[int], n_layers: int) -> str:
    if len(shown) == n_layers:
        return ""
    listed = ", ".join(map(str, shown))
    return (
        f"Patterns come for the {len(shown)} of {n_layers} layers whose heads move most ({listed}); the others have "
        "their numbers in the map."
    )
