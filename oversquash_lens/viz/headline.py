"""The top of a report: the numbers that decide it in a sentence, and again to glance at, and whose they are."""

from __future__ import annotations

import math

from oversquash_lens.analyses.audit import AuditRow
from oversquash_lens.analyses.findings import Findings
from oversquash_lens.paths.squashing import Span
from oversquash_lens.viz.document import number, percent, place, plain, span_html
from oversquash_lens.viz.html import escape

NAMED_SPANS = 3
SMALLEST_LOSS = 0.01  # of all that is heard; less is not worth a sentence


def headline(found: Findings) -> str:
    about = found.about
    size = f"{about.n_layers} layers of {about.n_heads} heads, d_model {about.d_model}"
    line = f"{about}; {len(found.tokens):,} tokens, {size}."
    return (
        f'<p class="lead">{_heard(found)} {_narrowest(found)} {_squashed(found)}</p>\n{_numbers(found)}'
        f'<p>{_trust(found)}</p>\n<p class="about"><bdi>{escape(plain(line))}</bdi></p>\n'
    )


def _heard(found: Findings) -> str:
    squashing, measured = found.squashing, found.audit.truth
    how = "measured" if measured.exact else f"measured by {measured.probes} probes"
    return (
        f"Of {len(found.tokens):,} tokens the last one hears about <strong>{_few(found.heard)}</strong> ({how}; "
        f"{_few(squashing.effective_tokens)} by the estimate), where even attention would let it hear "
        f"<strong>{_few(squashing.null_effective_tokens)}</strong>."
    )


def _narrowest(found: Findings) -> str:
    squashing = found.squashing
    layer = squashing.narrowest
    return (
        f"Against even attention its paths are narrowest on entering <strong>layer {layer}</strong>: through "
        f"{_few(squashing.flow.effective_width[layer].item())} positions, "
        f"{number(squashing.relative_width[layer].item(), '.2f')} times as many."
    )


def _squashed(found: Findings) -> str:
    spans = [span for span in found.squashing.spans if span.null_share - span.share >= SMALLEST_LOSS]
    if not spans:
        return "No tokens lose a hundredth of what is heard against even attention."
    named = "; ".join(_span(found, span) for span in spans[:NAMED_SPANS])
    return f"Most squashed: {named}."


def _span(found: Findings, span: Span) -> str:
    return (
        f"{span_html(found.tokens, span.start, span.stop)} ({place(span.start, span.stop)}: {percent(span.share)} of "
        f"all that is heard, {percent(span.null_share)} with even attention)"
    )


def _trust(found: Findings) -> str:
    row = estimate_row(found)
    return (
        f"How far to trust the pictures: the estimate behind them ranks tokens with ρ = {number(row.spearman, '.2f')} "
        f"to the measured truth and is typically {number(_size(row), '.2g')} times its size. "
        f"{escape(found.audit.expected.sentence)}"
    )


def _numbers(found: Findings) -> str:
    squashing, row = found.squashing, estimate_row(found)
    layer = squashing.narrowest
    tiles = (
        (_few(found.heard), f"tokens heard of {len(found.tokens):,}, measured"),
        (_few(squashing.effective_tokens), "by the estimate"),
        (_few(squashing.null_effective_tokens), "with even attention"),
        (
            number(squashing.index, ".2f"),
            "squashing index: 0 as even attention, 1 one token alone, below 0 more is heard",
        ),
        (
            str(layer),
            f"narrowest layer of {found.about.n_layers} against even attention, entered through "
            f"{_few(squashing.flow.effective_width[layer].item())} positions",
        ),
        (number(row.spearman, ".2f"), "rank correlation of estimate and truth"),
    )
    return (
        '<dl class="numbers">\n'
        + "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>\n" for value, name in tiles)
        + "</dl>\n"
    )


def estimate_row(found: Findings) -> AuditRow:
    return next(row for row in found.audit.rows if row.name == "mean_field")


def _size(row: AuditRow) -> float:
    return math.nan if math.isnan(row.median_log10_ratio) else 10**row.median_log10_ratio


def _few(count: float) -> str:
    """How many, as HTML: one digit behind the point below a hundred."""
    return number(count, ".1f" if count < 100 else ",.0f")
