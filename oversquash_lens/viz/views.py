"""CircuitsVis views of a result: its tokens, coloured by how much of each the last token hears."""

from __future__ import annotations

import torch

from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured import MeasuredSensitivity
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.viz.captions import GLOSSES, NAMES, caption, guide
from oversquash_lens.viz.cells import cells_for
from oversquash_lens.viz.flow_views import activations, heads, route
from oversquash_lens.viz.html import View, Views
from oversquash_lens.viz.strips import input_rows, kind_of, layer_rows, strip_view
from oversquash_lens.viz.what_if_view import what_if

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


def positions(result: PathProfile | MeasuredSensitivity | object) -> View:
    """Tokens of the prompt, coloured by their share in what the last token hears; hover shows the share.

    Shares are dimensionless and sum to 1. The colour is logarithmic and the same in every view of a prompt:
    none at a tenth of an even share (0.1/n) or less, full at 1. Beyond 512 tokens the 192 with the largest
    shares (96 beyond 2,048) stand alone, runs of the others are summed, and the caption says so; a click opens them.
    """
    return side_by_side(result)[0]


def side_by_side(*results: PathProfile | MeasuredSensitivity | object) -> tuple[View, ...]:
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
    cells = cells_for(tokens, torch.cat([row.shares for row in rows]))
    return tuple(strip_view(row, caption(result), cells=cells) for row, result in zip(rows, results, strict=True))


def layers(result: PathProfile | Flow | object) -> View:
    """As `positions`, one layer at a time, to be picked: what the last token hears of each position there.

    Layer 0 is what enters the first block (the embeddings), layer L what leaves the last one, where the last
    token hears itself alone. Each layer's shares sum to 1. Of a Flow: the share of its paths that pass there.
    """
    return strip_view(layer_rows(result), caption(result, "Where the paths run, by layer"))


def prompts(
    first: PathProfile | MeasuredSensitivity | Flow | object, second: PathProfile | MeasuredSensitivity | Flow | object
) -> Views:
    """Two results of one kind on two prompts beside each other, each on its own tokens, one colour scale for both.

    With layers where the results have them, picked in both at once. Colour starts at a tenth of an even share of the
    longer prompt.
    """
    for result in (first, second):
        if not isinstance(result, PathProfile | MeasuredSensitivity | Flow):
            raise InputError(
                f"a view of two prompts was asked of {kind_of(result)}; expected two results of path_bound, "
                "mean_field_sensitivity, measured_sensitivity or flow: call one of them on each prompt"
            )
    if type(first) is not type(second):
        raise InputError(
            f"expected two results of one kind, got {kind_of(first)} and {kind_of(second)}: measure both prompts alike"
        )
    make = input_rows if isinstance(first, MeasuredSensitivity) else layer_rows
    rows = [make(result) for result in (first, second)]
    floor = min(row.floor for row in rows)
    one, other = (
        strip_view(row, caption(result, "Where the paths run"), floor=floor)
        for row, result in zip(rows, (first, second), strict=True)
    )
    even = "a tenth of an even share of the longer prompt"
    return Views((one, other), guide(rows[0].meaning, even, floor, rows[0].tokens + rows[1].tokens))
