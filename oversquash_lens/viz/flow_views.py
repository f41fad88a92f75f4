"""Views of a flow: which heads carry it, which way one token's part takes, and what each head brings where."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import InputError
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.heaviest import HeavyEdge, heaviest_by_layer
from oversquash_lens.paths.recursion import ROWS
from oversquash_lens.viz.captions import caption, colour_key, guide, named, percent, rounded
from oversquash_lens.viz.cells import Cells, cells_for, check_shares, millionths
from oversquash_lens.viz.html import View
from oversquash_lens.viz.strips import kind_of, layer_rows, strip_view

PATTERN_CELLS = 48  # tokens or bins on each axis of a pattern, at most
BLOCKS = 25_000  # squares that one layer's patterns are drawn of: CircuitsVis makes an object of each
PATTERN_NUMBERS = 75_000  # in all patterns of one view, about 200 KB
PATTERN_FLOOR = 1e-6  # share at which the colour of a pattern starts
ACTIVATION_CELLS = 128  # tokens or bins, at most
ACTIVATION_NUMBERS = 200_000  # about 500 KB; large models have fewer cells

MOVES = 5  # that are told in words, of each layer


def heads(flow: Flow | object) -> View:
    """Map of layers × heads, coloured by the share of the paths that each head moves, and the picked layer's patterns.

    A row of the map sums to 1 with its last column, what stays in the residual stream. The patterns are CircuitsVis'
    AttentionHeads on [head, dest, src] shares: attention weighted with the paths that use it. They come for the layers
    whose heads move most, as many as a page can carry, on at most 48 tokens or bins; the caption says which.
    """
    checked = _checked(flow)
    n_heads = checked.head_at.shape[1]
    cells = cells_for(checked.tokens, checked.node, _pattern_cells(n_heads))
    moved = checked.head.sum(-1)
    shown = _shown_layers(moved, n_heads * len(cells.cells) * (len(cells.cells) + 1) // 2)
    table = torch.cat([checked.head, checked.residual[:, None]], dim=1).cpu().double()
    floor = 0.01 / table.shape[1]
    layer = int(moved.argmax())
    payload = {
        "view": "heads",
        "tokens": cells.texts,
        "places": cells.places,
        "table": [[rounded(share, 3) for share in row] for row in table.tolist()],
        "columns": [*(f"head {head}" for head in range(n_heads)), "residual stream"],
        "patterns": {str(layer): _pattern(checked, layer, cells) for layer in shown},
        "pattern_floor": PATTERN_FLOOR,
        "pattern_key": colour_key(PATTERN_FLOOR),
        "start": [layer, int(checked.head[layer].argmax())],
        "floor": rounded(floor),
        "key": colour_key(floor),
    }
    note = _patterns_note(shown, checked.n_layers) + cells.note("their sum")
    walk = (
        "Click a head, or walk the map with the arrow keys and press Enter, for its pattern: rows receive, columns "
        "send, and a number is the share of the paths that runs over that edge."
    )
    meaning = "the share of the paths that a head moves"
    return View(
        payload,
        caption(checked, "Which heads carry it") + note,
        guide(meaning, "a hundredth of an even share", floor, checked.tokens, walk),
    )


def route(flow: Flow | object) -> View:
    """The way of one token's paths (or of all): the positions they pass at each layer, and the heads that move them.

    An overview of layers × positions with the heaviest moves of all, the tokens of the picked layer coloured by the
    share of the paths that pass there, and in words the edges that carry most of what moves in that layer.
    """
    checked = _checked(flow)
    by_layer = heaviest_by_layer(checked, MOVES)
    heaviest = sorted((edge for edges in by_layer for edge in edges), key=lambda edge: -edge.share)[:MOVES]
    topic = "Route of all tokens" if checked.source is None else f"Route of {named(checked.tokens, checked.source)}"
    return strip_view(
        layer_rows(checked),
        caption(checked, topic),
        view="route",
        heaviest=[[edge.layer, _told(checked, edge)] for edge in heaviest],
        moves=[[_told(checked, edge) for edge in edges] for edges in by_layer],
        stays=[f"{percent(share)} stays where it is" for share in checked.residual.tolist()],
    )


def _told(flow: Flow, edge: HeavyEdge) -> str:
    ends = f"from {named(flow.tokens, edge.src)} to {named(flow.tokens, edge.dest)}"
    return f"head {edge.head} brings {percent(edge.share)} {ends}"


def activations(flow: Flow | object) -> View:
    """What each head of each layer brings to each token, [token × layer × head], a layer and head to pick.

    CircuitsVis' TextNeuronActivations on `flow.head_at`, in whole millionths of the paths (it computes in float32,
    which holds these exactly); the last "head" is the residual stream. A layer sums to one million. Beyond 128 tokens
    (fewer for large models) the heaviest stand alone and the others are summed.
    """
    checked = _checked(flow)
    brought = torch.cat([checked.head_at, checked.residual_at[:, None]], dim=1).cpu().double()
    most = ACTIVATION_NUMBERS // (brought.shape[0] * brought.shape[1])
    cells = cells_for(checked.tokens, checked.node, max(16, min(ACTIVATION_CELLS, most)))
    n_heads = checked.head_at.shape[1]
    floor = 0.01 / len(checked.tokens)
    payload = {
        "view": "activations",
        "tokens": cells.texts,
        "widths": cells.widths,
        "places": cells.places,
        "millionths": millionths(cells.sums(brought).permute(2, 0, 1)).tolist(),
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
        caption(checked, "What each head brings where") + cells.note(),
        guide(meaning, "a hundredth of an even share", floor, checked.tokens, walk),
    )


def _checked(flow: Flow | object) -> Flow:
    if not isinstance(flow, Flow):
        raise InputError(f"a view of a flow was asked of {kind_of(flow)}; expected a Flow: call flow(trace) first")
    if not flow.tokens or not flow.n_layers or 0 in flow.head_at.shape:
        raise InputError(
            f"expected at least one token, layer and head, got an empty flow ({len(flow.tokens)} tokens, "
            f"{flow.n_layers} layers): record a prompt with tokens in it"
        )
    for name in ("node", "head_at", "residual_at"):
        check_shares(flow.tokens, getattr(flow, name).detach().cpu().double())
    return flow


def _pattern_cells(n_heads: int) -> int:
    """Cells on each axis such that all heads of a layer, and the enlarged one, are drawn of at most `BLOCKS`."""
    return max(16, min(PATTERN_CELLS, math.isqrt(BLOCKS // (n_heads + 1))))


def _shown_layers(moved: Float[Tensor, " layer"], numbers: int) -> list[int]:
    """The layers that move most, in order; as many as `PATTERN_NUMBERS` allows, one at least."""
    count = min(len(moved), max(1, PATTERN_NUMBERS // numbers))
    return sorted(moved.topk(count).indices.tolist())


def _pattern(flow: Flow, layer: int, cells: Cells) -> list[list[int]]:
    """Each head's edges in millionths, summed into cells: the lower triangle, row by row."""
    n, sums = len(flow.tokens), []
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        rows = cells.sums(flow.edge_rows(layer, start, stop))  # [head, dest, cell]
        padded = torch.zeros(*rows.shape[::2], n, dtype=rows.dtype)
        padded[..., start:stop] = rows.mT
        sums.append(cells.sums(padded))  # [head, src cell, dest cell]
    square = torch.stack(sums).sum(0).mT
    dest, src = torch.tril_indices(*square.shape[1:])
    return millionths(square[:, dest, src]).tolist()


def _patterns_note(shown: Sequence[int], n_layers: int) -> str:
    if len(shown) == n_layers:
        return ""
    named = ", ".join(map(str, shown))
    return (
        f' <span class="osl-note">Patterns come for the {len(shown)} of {n_layers} layers whose heads move most '
        f"({named}); the others have their numbers in the map.</span>"
    )
