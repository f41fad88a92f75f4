"""Strips of coloured tokens: the payload that `view.js` draws with CircuitsVis' ColoredTokens, a row per layer."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured import MeasuredSensitivity
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.viz.captions import colour_key, guide, rounded
from oversquash_lens.viz.cells import MILLION, Cells, cell_text, cells_for, check_shares, millionths
from oversquash_lens.viz.html import View

HEARD = "a token’s share in what the last token hears"
PASSED = "the share of the paths that pass through a token at that layer"
MOST_INSIDE = 16_384  # tokens of a prompt whose bins can be opened: about 200 KB of a page


class Rows(NamedTuple):
    """Shares of the tokens at each layer, each row with its name and what it means."""

    tokens: tuple[str, ...]
    shares: Float[Tensor, "layer pos"]
    labels: list[str]
    notes: list[str]
    meaning: str
    millionths: bool = False  # a flow has many rows: carried as whole millionths of three digits, a third of the size

    @property
    def floor(self) -> float:
        """Where colour starts: a tenth of an even share."""
        return 0.1 / len(self.tokens)


def input_rows(result: PathProfile | MeasuredSensitivity | object) -> Rows:
    """The one row of what is heard of each input position."""
    if not isinstance(result, PathProfile | MeasuredSensitivity):
        raise InputError(
            f"a view was asked of {kind_of(result)}; expected a result of path_bound, "
            "mean_field_sensitivity or measured_sensitivity: call one of them first"
        )
    return _checked(Rows(result.tokens, result.share.detach().cpu().double()[None], [""], [""], HEARD))


def layer_rows(result: PathProfile | Flow | object) -> Rows:
    """A row for what enters each layer, and the last one for what leaves the last."""
    if not isinstance(result, PathProfile | Flow):
        raise InputError(
            f"a view by layer was asked of {kind_of(result)}; expected a PathProfile, from path_bound or "
            "mean_field_sensitivity, or a Flow, from flow (a measured truth has no layers: use positions)"
        )
    is_flow = isinstance(result, Flow)
    shares = (result.node if is_flow else result.share_by_layer).detach().cpu().double()
    last = len(shares) - 1
    labels = [f"layer {layer}" for layer in range(last + 1)]
    meanings = ["the embeddings", *(f"what enters block {layer}" for layer in range(1, last))]
    meanings.append("what leaves the last block")
    notes = [f"{label} of {last}: {meaning}" for label, meaning in zip(labels, meanings, strict=True)]
    return _checked(Rows(result.tokens, shares, labels, notes, PASSED if is_flow else HEARD, is_flow))


def _checked(rows: Rows) -> Rows:
    check_shares(rows.tokens, rows.shares)
    return rows


def kind_of(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def strip_view(
    rows: Rows, described: str, *, cells: Cells | None = None, floor: float | None = None, **extra: object
) -> View:
    """A view of tokens coloured by their shares, one row at a time; `described` is its caption as HTML.

    `cells` and `floor` are given where several views share them; `extra` goes into the payload as it is.
    """
    cells = cells or cells_for(rows.tokens, rows.shares)
    floor = rows.floor if floor is None else floor
    sums = cells.sums(rows.shares)
    if rows.millionths:
        shares = millionths(sums).tolist()
    else:
        shares = [[rounded(share) for share in row] for row in sums.tolist()]
    payload = {
        "view": "strip",
        "tokens": cells.texts,
        "widths": cells.widths,
        "places": cells.places,
        "shares": shares,
        "parts": MILLION if rows.millionths else 1,  # of which one is the unit of `shares`
        "labels": rows.labels,
        "notes": rows.notes,
        "floor": rounded(floor),
        "key": colour_key(floor),
        **extra,
    }
    note = cells.note()
    if len(rows.shares) == 1 and len(cells.cells) < len(rows.tokens) <= MOST_INSIDE:
        payload["inside"] = {"tokens": [cell_text(token) for token in rows.tokens], "shares": _inside(rows)}
        note += ' <span class="osl-note">Click a bin, or press Enter on it, and its tokens open one by one.</span>'
    return View(payload, described + note, guide(rows.meaning, "a tenth of an even share", floor, rows.tokens))


def _inside(rows: Rows) -> list[float]:
    """Every token's own share, of three digits."""
    return [rounded(share, 3) for share in rows.shares[0].tolist()]
