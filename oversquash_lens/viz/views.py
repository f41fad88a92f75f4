"""CircuitsVis views of a result: its tokens, coloured by their shares in the sensitivity of the last output."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.analyses.what_if import MEASURES, Change, Outcome, WhatIf
from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured import MeasuredSensitivity
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.heaviest import HeavyEdge, heaviest_by_layer
from oversquash_lens.paths.recursion import ROWS, PathProfile
from oversquash_lens.swaps.substitution import Substitution
from oversquash_lens.viz.html import View, Views
from oversquash_lens.viz.token_strips import (
    SHARE,
    Bins,
    bins_for,
    check_shares,
    input_rows,
    kind_of,
    layer_rows,
    millionths,
    strip_view,
)
from oversquash_lens.viz.words import (
    GLOSSES,
    NAMES,
    colour_key,
    guide,
    measure_name,
    named,
    percent,
    rounded,
    source_named,
    title_and_gloss,
)

__all__ = [
    "GLOSSES",
    "NAMES",
    "activations",
    "heads",
    "layers",
    "positions",
    "prompts",
    "route",
    "side_by_side",
    "what_if",
]

NEW = "‹+›"  # stands before a token that an edit put in


def positions(result: PathProfile | MeasuredSensitivity | Substitution | object) -> View:
    """Tokens of the prompt, coloured by their share in the last output's sensitivity; hover shows the share.

    Of a `substitution` it is their share in how far the last output moves when they are replaced.

    Shares are dimensionless and sum to 1. The colour is logarithmic and the same in every view of a prompt:
    none at a tenth of a uniform share (0.1/n) or less, full at 1. Beyond 512 tokens the 192 with the largest
    shares (96 beyond 2,048) stand alone, runs of the others are summed, and the caption says so; a click opens them.
    """
    return side_by_side(result)[0]


def side_by_side(*results: PathProfile | MeasuredSensitivity | Substitution | object) -> tuple[View, ...]:
    """As `positions`, several results on the same tokens, binned in the same places, for comparison."""
    if not results:
        raise InputError("expected one or more, such as path_bound's and measured_sensitivity's, got no result")
    rows = [input_rows(result) for result in results]
    tokens = rows[0].tokens
    for row in rows[1:]:
        if row.tokens != tokens:
            raise InputError(
                f"expected results on one prompt, got results on different tokens ({len(tokens)} and "
                f"{len(row.tokens)} of them): measure them on the same tokens, or see two prompts beside each other "
                "with prompts"
            )
    bins = bins_for(tokens, torch.cat([row.shares for row in rows]))
    return tuple(
        strip_view(row, *title_and_gloss(result), bins=bins) for row, result in zip(rows, results, strict=True)
    )


def layers(result: PathProfile | Flow | object) -> View:
    """As `positions`, one layer at a time, to be picked: each position's share in the sensitivity from there upwards.

    Layer 0 is what enters the first block (the embeddings), layer L what leaves the last one, where the last
    token has all of it. Each layer's shares sum to 1. Of a Flow: the share of its paths that pass there.
    """
    return strip_view(layer_rows(result), *title_and_gloss(result, "Where the paths run, by layer"))


def prompts(
    first: PathProfile | MeasuredSensitivity | Flow | object, second: PathProfile | MeasuredSensitivity | Flow | object
) -> Views:
    """Two results of one kind on two prompts beside each other, each on its own tokens, one colour scale for both.

    With layers where the results have them, picked in both at once. Colour starts at a tenth of a uniform share of the
    longer prompt.
    """
    for result in (first, second):
        if not isinstance(result, PathProfile | MeasuredSensitivity | Flow):
            raise InputError(
                "expected two results of path_bound, mean_field_sensitivity, measured_sensitivity or flow, got "
                f"{kind_of(result)}: call one of them on each prompt"
            )
    if type(first) is not type(second):
        raise InputError(
            f"expected two results of one kind, got {kind_of(first)} and {kind_of(second)}: measure both prompts alike"
        )
    make = input_rows if isinstance(first, MeasuredSensitivity) else layer_rows
    rows = [make(result) for result in (first, second)]
    floor = min(row.floor for row in rows)
    views = [
        strip_view(row, *title_and_gloss(result, "Where the paths run"), floor=floor)
        for row, result in zip(rows, (first, second), strict=True)
    ]
    start = "a tenth of a uniform share of the longer prompt"
    return Views(views, guide(rows[0].meaning, start, floor, rows[0].tokens + rows[1].tokens))


# -- edits ---------------------------------------------------------------------------------------------------


def what_if(result: WhatIf | object, of: str = "truth") -> Views:
    """The tokens before and after each edit, one colour scale for all; hovering gives the share, and that before.

    Coloured by the share in the last output's sensitivity: measured, or `of` "estimate", "bound", "calibrated".
    Tokens that an edit put in are marked. Colour starts at a tenth of a uniform share of the longest prompt.
    """
    if not isinstance(result, WhatIf):
        raise InputError(f"expected a WhatIf, got {kind_of(result)}: call what_if(model, prompt, edit) first")
    if of not in MEASURES:
        raise InputError(f"expected one of {', '.join(MEASURES)}, got of={of!r}")
    profiles = [getattr(outcome, of) for outcome in result.outcomes]
    rows = [input_rows(profile) for profile in profiles]
    floor = min(row.floor for row in rows)
    views = [strip_view(rows[0], result.before.label, _numbers(result.before), floor=floor)]
    for outcome, change, row in zip(result.after, result.changes, rows[1:], strict=True):
        edited = _EditedBins(bins_for(row.tokens, row.shares), outcome.places, rows[0].shares[0])
        said = _numbers(outcome, change)
        shown = {"tokens": edited.texts, "places": edited.places}
        views.append(strip_view(row, outcome.label, said, bins=edited.bins, floor=floor, **shown))
    name = NAMES["truth"] if of == "truth" else measure_name(profiles[0].kind)
    start = "a tenth of a uniform share of the longest prompt"
    words = guide(f"{SHARE} ({name})", start, floor, {token for row in rows for token in row.tokens})
    if any(None in outcome.places for outcome in result.outcomes):
        words += f" {NEW} stands before a token that the edit put in."
    return Views(views, words)


class _EditedBins:
    """The bins of an edited prompt, and what stood in them before."""

    def __init__(self, bins: Bins, before: Sequence[int | None], share_before: Float[Tensor, " pos"]) -> None:
        self.bins, self._before = bins, before
        was = [0.0 if place is None else share_before[place].item() for place in before]
        self._share = bins.sums(torch.tensor(was, dtype=torch.float64)).tolist()
        self._new = bins.sums(torch.tensor([float(place is None) for place in before])).int().tolist()

    @property
    def texts(self) -> list[str]:
        """As ever, those marked that an edit put in."""
        bins = zip(self.bins.texts, self.bins.widths, self._new, strict=True)
        return [NEW + text if new == width else text for text, width, new in bins]

    @property
    def places(self) -> list[str]:
        """Where each bin is now, and where it was and its share before the edit."""
        return [f"{place} ({self._history(i)})" for i, place in enumerate(self.bins.places)]

    def _history(self, i: int) -> str:
        start, width, new = self.bins.bins[i].start, self.bins.widths[i], self._new[i]
        if new == width:
            return "put in"
        share = f"share {rounded(self._share[i]):g}"
        if new:
            return f"{new} of them put in; the others before: {share}"
        moved = width == 1 and self._before[start] != start
        return f"before token {self._before[start]}: {share}" if moved else f"before: {share}"


def _numbers(outcome: Outcome, change: Change | None = None) -> str:
    """What an edit did, in numbers."""
    said = [f"effective number {outcome.measured_tokens:.1f} of {len(outcome.tokens)} tokens"]
    if change is not None:
        truth, estimate = (10 ** change.median(name) for name in ("truth", "estimate"))
        said.append(f"sensitivity to a token {truth:.2f} times as large (median; estimated {estimate:.2f})")
        said += [f"{change.cut_off} cut off"] if change.cut_off else []
    return "; ".join([*said, f"collapse distance {outcome.collapse:.3g}"])


PATTERN_BINS = 48  # tokens or bins on each axis of a pattern, at most
BLOCKS = 25_000  # squares that one layer's patterns are drawn of: CircuitsVis makes an object of each
PATTERN_NUMBERS = 75_000  # in all patterns of one view, about 200 KB
PATTERN_FLOOR = 1e-6  # share at which the colour of a pattern starts
ACTIVATION_BINS = 128  # tokens or bins, at most
ACTIVATION_NUMBERS = 200_000  # about 500 KB; large models have fewer bins

MOVES = 5  # that are told in words, of each layer


def heads(flow: Flow | object) -> View:
    """Map of layers × heads, coloured by the share of the paths that each head moves, and the picked layer's patterns.

    A row of the map sums to 1 with its last column, what stays in the residual stream. The patterns are CircuitsVis'
    AttentionHeads on [head, dest, src] shares: attention weighted with the paths that use it. They come for the layers
    whose heads move most, as many as a page can carry, on at most 48 tokens or bins; the caption says which.
    """
    checked = _checked(flow)
    n_heads = checked.head_at.shape[1]
    bins = bins_for(checked.tokens, checked.node, _pattern_bins(n_heads))
    moved = checked.head.sum(-1)
    shown = _shown_layers(moved, n_heads * len(bins.bins) * (len(bins.bins) + 1) // 2)
    table = torch.cat([checked.head, checked.residual[:, None]], dim=1).cpu().double()
    floor = 0.01 / table.shape[1]
    layer = int(moved.argmax())
    payload = {
        "view": "heads",
        "tokens": bins.texts,
        "places": bins.places,
        "table": [[rounded(share, 3) for share in row] for row in table.tolist()],
        "columns": [*(f"head {head}" for head in range(n_heads)), "residual stream"],
        "patterns": {str(layer): _pattern(checked, layer, bins) for layer in shown},
        "pattern_floor": PATTERN_FLOOR,
        "pattern_key": colour_key(PATTERN_FLOOR),
        "start": [layer, int(checked.head[layer].argmax())],
        "floor": rounded(floor),
        "key": colour_key(floor),
    }
    notes = [_patterns_note(shown, checked.n_layers), bins.note("their sum")]
    walk = (
        "Click a head, or walk the map with the arrow keys and press Enter, for its pattern: rows receive, columns "
        "send, and a number is the share of the paths that runs over that edge."
    )
    meaning = "the share of the paths that a head moves"
    return View(
        payload,
        *title_and_gloss(checked, "Which heads carry it"),
        notes,
        guide(meaning, "a hundredth of a uniform share", floor, checked.tokens, walk),
    )


def route(flow: Flow | object) -> View:
    """The way of one token's paths (or of all): the positions they pass at each layer, and the heads that move them.

    An overview of layers × positions with the heaviest moves of all, the tokens of the picked layer coloured by the
    share of the paths that pass there, and in words the edges that carry most of what moves in that layer.
    """
    checked = _checked(flow)
    by_layer = heaviest_by_layer(checked, MOVES)
    heaviest = sorted((edge for edges in by_layer for edge in edges), key=lambda edge: -edge.share)[:MOVES]
    topic = "Route of all tokens" if checked.source is None else f"Route of {source_named(checked)}"
    return strip_view(
        layer_rows(checked),
        *title_and_gloss(checked, topic),
        view="route",
        heaviest=[[edge.layer, _told(checked, edge)] for edge in heaviest],
        moves=[[_told(checked, edge) for edge in edges] for edges in by_layer],
        stays=[f"{percent(share, 3)} stays where it is" for share in checked.residual.tolist()],
    )


def _told(flow: Flow, edge: HeavyEdge) -> str:
    ends = f"from {named(flow.tokens, edge.src)} to {named(flow.tokens, edge.dest)}"
    return f"head {edge.head} brings {percent(edge.share, 3)} {ends}"


def activations(flow: Flow | object) -> View:
    """What each head of each layer brings to each token, [token × layer × head], a layer and head to pick.

    CircuitsVis' TextNeuronActivations on `flow.head_at`, in whole millionths of the paths (it computes in float32,
    which holds these exactly); the last "head" is the residual stream. A layer sums to one million. Beyond 128 tokens
    (fewer for large models) the heaviest stand alone and the others are summed.
    """
    checked = _checked(flow)
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


def _checked(flow: Flow | object) -> Flow:
    if not isinstance(flow, Flow):
        raise InputError(f"expected a Flow, got {kind_of(flow)}: call flow(trace) first")
    if not flow.tokens or not flow.n_layers or 0 in flow.head_at.shape:
        raise InputError(
            f"expected at least one token, layer and head, got an empty flow ({len(flow.tokens)} tokens, "
            f"{flow.n_layers} layers): record a prompt with tokens in it"
        )
    for name in ("node", "head_at", "residual_at"):
        check_shares(flow.tokens, getattr(flow, name).detach().cpu().double())
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
