"""CircuitsVis views of a result: its tokens, coloured by their shares in the sensitivity of the last output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.analyses.what_if import MEASURES, Change, Outcome, WhatIf
from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured import MeasuredSensitivity
from oversquash_lens.jacobian.measured_flow import MeasuredFlow
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.swaps.substitution import Substitution
from oversquash_lens.viz.flow_views import activations, heads, route, swap
from oversquash_lens.viz.html import View, Views
from oversquash_lens.viz.token_strips import (
    SHARE,
    Bins,
    bins_for,
    input_rows,
    kind_of,
    layer_rows,
    strip_view,
)
from oversquash_lens.viz.words import (
    GLOSSES,
    NAMES,
    guide,
    measure_name,
    rounded,
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
    "swap",
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


def layers(result: PathProfile | Flow | MeasuredFlow | object) -> View:
    """As `positions`, one layer at a time, to be picked: each position's share in the sensitivity from there upwards.

    Layer 0 is what enters the first block (the embeddings), layer L what leaves the last one, where the last
    token has all of it. Each layer's shares sum to 1. Of a MeasuredFlow: the share of the sensitivity that runs there,
    negative ones in blue; of a Flow: the share of its paths that pass there.
    """
    return strip_view(layer_rows(result), *title_and_gloss(result, "Where it runs, by layer"))


def prompts(
    first: PathProfile | MeasuredSensitivity | MeasuredFlow | Flow | object,
    second: PathProfile | MeasuredSensitivity | MeasuredFlow | Flow | object,
) -> Views:
    """Two results of one kind on two prompts beside each other, each on its own tokens, one colour scale for both.

    With layers where the results have them, picked in both at once. Colour starts at a tenth of a uniform share of the
    longer prompt.
    """
    for result in (first, second):
        if not isinstance(result, PathProfile | MeasuredSensitivity | MeasuredFlow | Flow):
            raise InputError(
                "expected two results of path_bound, mean_field_sensitivity, measured_sensitivity, measured_flow or "
                f"flow, got {kind_of(result)}: call one of them on each prompt"
            )
    if type(first) is not type(second):
        raise InputError(
            f"expected two results of one kind, got {kind_of(first)} and {kind_of(second)}: measure both prompts alike"
        )
    make = input_rows if isinstance(first, MeasuredSensitivity) else layer_rows
    rows = [make(result) for result in (first, second)]
    floor = min(row.floor for row in rows)
    views = [
        strip_view(row, *title_and_gloss(result, "Where it runs"), floor=floor)
        for row, result in zip(rows, (first, second), strict=True)
    ]
    start = "a tenth of a uniform share of the longer prompt"
    signed = any(bool((row.shares < 0).any()) for row in rows)
    return Views(views, guide(rows[0].meaning, start, floor, rows[0].tokens + rows[1].tokens, signed=signed))


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
