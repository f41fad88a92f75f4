"""The sections that go through a prompt token by token: coloured, by layer, and in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from oversquash_lens.analyses.findings import Findings
from oversquash_lens.viz.cells import MOST_CELLS
from oversquash_lens.viz.document import (
    cell,
    columns,
    folded,
    guide,
    head_row,
    keyed,
    percent,
    section,
    table,
    token_html,
)
from oversquash_lens.viz.passages import in_context
from oversquash_lens.viz.views import layers, side_by_side

MOST_ROWS = 512  # of a table of tokens


def by_token(found: Findings) -> str:
    """Truth, estimate and the paper's bound side by side."""
    audit = found.audit
    views = side_by_side(audit.truth, audit.mean_field, audit.bounds["proof"])
    context = in_context(found) if len(found.tokens) > MOST_CELLS else ""
    return section("Token by token", context + keyed(views[0]) + columns(views), "tokens")


def by_layer(found: Findings) -> str:
    """The same from a picked layer upwards."""
    words = guide(
        "What the last token hears of each position through the layers from the picked one upwards; both views follow "
        "the pick. The colours are those of the key above."
    )
    views = [layers(found.audit.mean_field), layers(found.audit.bounds["proof"])]
    return section("Layer by layer", words + columns(views, together=True), "layers")


def in_numbers(found: Findings) -> str:
    """Tokens in numbers: also what a screen reader, or a browser without scripts, gets of the views."""
    truth, estimate, squashing = found.audit.truth, found.audit.mean_field, found.squashing
    sizes = (truth.values, truth.standard_error, estimate.values)
    shares = (truth.share, squashing.share, squashing.null_share, squashing.lift)
    rows = []
    for i in _listed(shares[:3]):
        true, error, guess = (size[i].item() for size in sizes)
        heard, estimated, even, lift = (share[i].item() for share in shares)
        numbers = [cell(true, ".4g"), *([] if truth.exact else [cell(error, ".2g")]), cell(guess, ".4g")]
        numbers.append(cell(_log10_ratio(guess, true), "+.2f"))
        numbers += [f'<td class="n">{percent(share)}</td>' for share in (heard, estimated, even)]
        numbers.append(cell(lift, ".2g"))
        name = f'<th scope="row">{token_html(found.tokens[i])}</th>'
        rows.append(f'<tr><td class="n">{i}</td>{name}{"".join(numbers)}</tr>\n')
    error = [] if truth.exact else ["standard error"]
    names = ("truth", *error, "estimate", "log₁₀ of estimate over truth", "share, measured", "share, estimated")
    head = head_row(("no.", "token"), (*names, "share with even attention", "estimated over even"))
    norm = {"fro": "Frobenius", "spectral": "spectral"}.get(truth.norm, truth.norm)
    caption = (
        f"Sensitivity of the last output to each token: {norm} norm, and its mean-field estimate; each token’s share "
        "in all of it, and what even attention would leave it."
    )
    n, name = len(found.tokens), "Every token in numbers"
    if len(rows) < n:
        name = f"The {len(rows)} most heard of {n:,} tokens in numbers"
        caption += " Listed are those with the largest shares, by any of the three; the JSON of the findings has all."
    return f'<section id="numbers">\n{folded(name, table(name, caption, head, rows))}</section>\n'


def _listed(shares: Sequence[Tensor]) -> list[int]:
    """Positions that a table lists, in order: all, or of a long prompt those with the largest shares."""
    largest = torch.stack([share.double() for share in shares]).amax(0)
    return sorted(largest.topk(min(MOST_ROWS, len(largest))).indices.tolist())


def _log10_ratio(above: float, below: float) -> float:
    return math.log10(above) - math.log10(below) if above > 0 and below > 0 else math.nan
