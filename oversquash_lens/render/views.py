"""CircuitsVis views of a result: its tokens, coloured by how much of each the last token hears."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import InputError
from oversquash_lens.measure.jacobian import MeasuredSensitivity
from oversquash_lens.measure.paths import PathProfile
from oversquash_lens.render.html import MEANINGS, View, escape, inert, visible_token

MOST_CELLS = 512  # of one strip; longer prompts are binned
KEPT = 192  # tokens that a binned strip shows one by one: those with the largest shares
NAMES = {
    "truth": "Measured truth",
    "mean_field": "Mean-field estimate",
    "proof": "Paper’s bound",
    "proof, β = 1": "Paper’s bound with β = 1",
    "theorem_5_1": "Theorem 5.1 as printed",
    "theorem_b5": "Theorem B.5 as printed",
    "multi_head": "Multi-head bound",
    "rollout": "Attention rollout",
    "calibrated": "Calibrated bound, attention frozen",
    "calibrated_full": "Calibrated bound, nothing frozen",
    "count_paths": "Number of causal paths",
    "uniform_causal": "Uniform causal attention",
}
GLOSSES = {
    "mean_field": "path sensitivity from one forward pass, no gradient",
    "proof": "weighted count of attention paths, as in the proof of Theorem B.5",
    "theorem_5_1": "weighted count of attention paths, as the main text prints it",
    "theorem_b5": "weighted count of attention paths, as the appendix states it",
    "multi_head": "weighted count of attention paths, summed over heads",
    "rollout": "attention and residual stream in equal parts",
    "calibrated": "holds on a real model while the attention weights stand still",
    "calibrated_full": "holds on a real model",
    "count_paths": "null model: every edge of the causal mask counts 1",
    "uniform_causal": "null model: even attention to all earlier positions",
}


def positions(result: PathProfile | MeasuredSensitivity | object) -> View:
    """Tokens of the prompt, coloured by their share in what the last token hears; hover shows the share.

    Shares are dimensionless and sum to 1. The colour is logarithmic and the same in every view of a prompt:
    none at a tenth of an even share (0.1/n) or less, full at 1. Beyond 512 tokens the 192 with the largest
    shares stand alone, runs of the others are summed, and the caption says so.
    """
    return side_by_side(result)[0]


def side_by_side(*results: PathProfile | MeasuredSensitivity | object) -> tuple[View, ...]:
    """As `positions`, several results on the same tokens, binned in the same places, for comparison."""
    if not results:
        raise InputError("no result came; expected one or more, such as path_bound's and measured_sensitivity's")
    rows = [_shares(result) for result in results]
    tokens = results[0].tokens
    for result in results[1:]:
        if result.tokens != tokens:
            raise InputError(
                f"results on different tokens came ({len(tokens)} and {len(result.tokens)} of them); "
                "expected results on one prompt: measure them on the same tokens"
            )
    cells = _cells(torch.stack(rows))
    return tuple(
        _view(tokens, row[None], cells, [""], [""], _caption(result)) for row, result in zip(rows, results, strict=True)
    )


def layers(profile: PathProfile | object) -> View:
    """As `positions`, one layer at a time, to be picked: what the last token hears of each position there.

    Layer 0 is what enters the first block (the embeddings), layer L what leaves the last one, where the last
    token hears itself alone. Each layer's shares sum to 1.
    """
    if not isinstance(profile, PathProfile):
        raise InputError(
            f"a view by layer was asked of {_kind_of(profile)}; expected a PathProfile, from path_bound or "
            "mean_field_sensitivity (a measured truth has no layers: use positions)"
        )
    shares = profile.share_by_layer.detach().cpu().double()
    _check(profile.tokens, shares)
    last = profile.n_layers
    labels = [f"layer {layer}" for layer in range(last + 1)]
    meanings = ["the embeddings", *(f"what enters block {layer}" for layer in range(1, last))]
    meanings.append("what leaves the last block")
    notes = [f"{label} of {last}: {meaning}" for label, meaning in zip(labels, meanings, strict=True)]
    return _view(profile.tokens, shares, _cells(shares), labels, notes, _caption(profile))


def _kind_of(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _shares(result: object) -> Float[Tensor, " pos"]:
    if not isinstance(result, PathProfile | MeasuredSensitivity):
        raise InputError(
            f"a view was asked of {_kind_of(result)}; expected a result of path_bound, "
            "mean_field_sensitivity or measured_sensitivity: call one of them first"
        )
    share = result.share.detach().cpu().double()
    _check(result.tokens, share[None])
    return share


def _check(tokens: Sequence[str], shares: Float[Tensor, "layer pos"]) -> None:
    if not len(tokens) or shares.shape[1] != len(tokens):
        raise InputError(
            f"{len(tokens)} tokens came with {shares.shape[1]} shares; expected one share per token: measure again"
        )
    bad = (~(shares >= 0) | torch.isinf(shares)).nonzero()
    if len(bad):
        layer, i = bad[0].tolist()
        raise InputError(
            f"the share of token {i} ({visible_token(tokens[i])}) is {shares[layer, i]:g}; expected shares "
            "from 0 to 1: look for NaN or infinite values in the result, and measure again in float32"
        )


class _Cell(NamedTuple):
    """Tokens start … stop-1, shown as one."""

    start: int
    stop: int


def _cells(shares: Float[Tensor, "row pos"]) -> list[_Cell]:
    """One cell per token; of a long prompt the tokens with the largest shares alone, and runs of the rest.

    At most 192 alone leave at most 193 runs; cut at every ⌈rest/127⌉ tokens these are at most 193 + 127 bins.
    """
    n = shares.shape[1]
    if n <= MOST_CELLS:
        return [_Cell(i, i + 1) for i in range(n)]
    alone = set(shares.max(0).values.topk(KEPT).indices.tolist())
    width = math.ceil((n - KEPT) / (MOST_CELLS - 2 * KEPT - 1))
    cells, start = [], 0
    for i in range(n):
        if i in alone or i + 1 in alone or i + 1 - start == width or i + 1 == n:
            cells.append(_Cell(start, i + 1))
            start = i + 1
    return cells


def _view(
    tokens: Sequence[str],
    shares: Float[Tensor, "layer pos"],
    cells: Sequence[_Cell],
    labels: list[str],
    notes: list[str],
    caption: str,
) -> View:
    lengths = torch.tensor([cell.stop - cell.start for cell in cells])
    cell_of = torch.arange(len(cells)).repeat_interleave(lengths)
    sums = torch.zeros(len(shares), len(cells), dtype=shares.dtype).index_add_(1, cell_of, shares)
    floor = 0.1 / len(tokens)
    payload = {
        "tokens": [_text(tokens, cell) for cell in cells],
        "widths": lengths.tolist(),
        "places": [_place(cell) for cell in cells],
        "shares": [[_rounded(share) for share in row] for row in sums.tolist()],
        "labels": labels,
        "notes": notes,
        "floor": _rounded(floor),
        "key": _key(floor),
    }
    return View(payload, caption + _binning_note(tokens, cells), _guide(tokens, floor))


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")


def _text(tokens: Sequence[str], cell: _Cell) -> str:
    if cell.stop - cell.start > 1:
        return f"[{cell.stop - cell.start} tokens]"
    token = tokens[cell.start]
    # CircuitsVis breaks the line behind a token with a line break in it: code keeps its lines.
    return inert(visible_token(token)) + ("\n" if "\n" in token else "")


def _place(cell: _Cell) -> str:
    if cell.stop - cell.start == 1:
        return f"token {cell.start}"
    return f"tokens {cell.start} to {cell.stop - 1}, summed"


def _key(floor: float) -> list[tuple[str, float]]:
    """Labels and shares of the colour key: the floor and every power of ten above it.

    >>> _key(0.002)
    [('≤ 0.002', 0.002), ('0.01', 0.01), ('0.1', 0.1), ('1', 1.0)]
    """
    tens = [10.0**power for power in range(math.floor(math.log10(1.5 * floor)) + 1, 1)]
    return [(f"≤ {floor:.2g}", floor)] + [(f"{ten:g}", ten) for ten in tens]


def _guide(tokens: Sequence[str], floor: float) -> str:
    """How to read a view, as HTML; of the marks that stand for white space, those that occur."""
    shown = "".join({visible_token(token) for token in tokens})
    marks = ", ".join(meaning for mark, meaning in MEANINGS.items() if mark in shown)
    return escape(
        "Colour is a token’s share in what the last token hears, on a logarithmic scale: none at "
        f"{floor:.2g} (a tenth of an even share) or less, full at 1. Hover over a token, tap it or walk to "
        f"it with the arrow keys for the number. Tokens count from 0{'; ' if marks else ''}{marks}."
    )


def _binning_note(tokens: Sequence[str], cells: Sequence[_Cell]) -> str:
    alone = sum(cell.stop - cell.start == 1 for cell in cells)
    if alone == len(tokens):
        return ""
    return (
        f' <span class="osl-note">{len(tokens):,} tokens: {alone} are shown one by one, the {KEPT} with the '
        f"largest shares among them; the other {len(tokens) - alone:,} are summed in {len(cells) - alone} "
        "bins, coloured by their mean.</span>"
    )


def _caption(result: PathProfile | MeasuredSensitivity) -> str:
    """Name of the result and what it is, as HTML."""
    if isinstance(result, PathProfile):
        name, gloss = NAMES.get(result.kind, result.kind), GLOSSES.get(result.kind, "")
    else:
        name = NAMES["truth"]
        gloss = "how far the last output moves with this token’s embedding: " + (
            "exact, by autograd" if result.exact else f"by autograd, {result.probes} random probes"
        )
        if result.freeze:
            gloss += f", {' and '.join(result.freeze)} frozen"
    return f"<strong>{escape(name)}</strong> <span>{escape(gloss)}</span>"
