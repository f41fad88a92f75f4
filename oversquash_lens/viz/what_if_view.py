"""What an edit does, seen: the prompt's tokens as they are and under each edit, coloured by what is heard of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.analyses.what_if import MEASURES, Change, Outcome, WhatIf
from oversquash_lens.errors import InputError
from oversquash_lens.viz.captions import NAMES, guide, rounded
from oversquash_lens.viz.cells import Cells, cells_for
from oversquash_lens.viz.html import Views, escape
from oversquash_lens.viz.strips import HEARD, input_rows, kind_of, strip_view

NEW = "‹+›"  # stands before a token that an edit put in


def what_if(result: WhatIf | object, of: str = "truth") -> Views:
    """The tokens before and after each edit, one colour scale for all; hovering gives the share, and that before.

    Coloured by the share in what the last token hears: measured, or `of` "estimate", "bound", "calibrated". Tokens
    that an edit put in are marked. Colour starts at a tenth of an even share of the longest prompt.
    """
    if not isinstance(result, WhatIf):
        raise InputError(
            f"a view of edits was asked of {kind_of(result)}; expected a WhatIf: call what_if(model, prompt, edit)"
        )
    if of not in MEASURES:
        raise InputError(f"expected one of {', '.join(MEASURES)}, got of={of!r}")
    profiles = [getattr(outcome, of) for outcome in result.outcomes]
    rows = [input_rows(profile) for profile in profiles]
    floor = min(row.floor for row in rows)
    views = [strip_view(rows[0], _caption(result.before), floor=floor)]
    for outcome, change, row in zip(result.after, result.changes, rows[1:], strict=True):
        cells = _EditedCells(cells_for(row.tokens, row.shares), outcome.places, rows[0].shares[0])
        shown = {"cells": cells.cells, "tokens": cells.texts, "places": cells.places}
        views.append(strip_view(row, _caption(outcome, change), floor=floor, **shown))
    name = NAMES["truth"] if of == "truth" else NAMES.get(profiles[0].kind, profiles[0].kind)
    even = "a tenth of an even share of the longest prompt"
    words = guide(f"{HEARD} ({name})", even, floor, {token for row in rows for token in row.tokens})
    if any(None in outcome.places for outcome in result.outcomes):
        words += escape(f" {NEW} stands before a token that the edit put in.")
    return Views(views, words)


class _EditedCells:
    """The cells of an edited prompt, and what stood in them before."""

    def __init__(self, cells: Cells, before: Sequence[int | None], share_before: Float[Tensor, " pos"]) -> None:
        self.cells, self._before = cells, before
        was = [0.0 if place is None else share_before[place].item() for place in before]
        self._share = cells.sums(torch.tensor(was, dtype=torch.float64)).tolist()
        self._new = cells.sums(torch.tensor([float(place is None) for place in before])).int().tolist()

    @property
    def texts(self) -> list[str]:
        """As ever, those marked that an edit put in."""
        cells = zip(self.cells.texts, self.cells.widths, self._new, strict=True)
        return [NEW + text if new == width else text for text, width, new in cells]

    @property
    def places(self) -> list[str]:
        """Where each cell is now, and where and how loud it was before the edit."""
        return [f"{place} ({self._history(i)})" for i, place in enumerate(self.cells.places)]

    def _history(self, i: int) -> str:
        start, width, new = self.cells.cells[i].start, self.cells.widths[i], self._new[i]
        if new == width:
            return "put in"
        share = f"share {rounded(self._share[i]):g}"
        if new:
            return f"{new} of them put in; the others before: {share}"
        moved = width == 1 and self._before[start] != start
        return f"before token {self._before[start]}: {share}" if moved else f"before: {share}"


def _caption(outcome: Outcome, change: Change | None = None) -> str:
    """The edit and its numbers, as HTML."""
    said = [f"hears {outcome.measured_tokens:.1f} of {len(outcome.tokens)} tokens"]
    if change is not None:
        loud, guess = (10 ** change.median(name) for name in ("truth", "estimate"))
        said.append(f"a token {loud:.2f} times as loud (median; estimated {guess:.2f})")
        said += [f"{change.cut_off} cut off"] if change.cut_off else []
    said.append(f"collapse distance {outcome.collapse:.3g}")
    return f"<strong>{escape(outcome.label)}</strong> <span>{escape('; '.join(said))}</span>"
