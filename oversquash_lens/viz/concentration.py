"""The sections on where a prompt's information concentrates: by layer and position, by head, from single tokens."""

from __future__ import annotations

from collections.abc import Sequence

from oversquash_lens.analyses.findings import DISTANT, LARGEST, MOST_SQUASHED, Findings
from oversquash_lens.paths.heaviest import HeavyEdge, HeavyPath
from oversquash_lens.paths.squashing import Span
from oversquash_lens.viz.curve import width_curve
from oversquash_lens.viz.document import (
    DASH,
    cell,
    folded,
    guide,
    head_row,
    keyed,
    percent,
    section,
    span_html,
    table,
    token_html,
)
from oversquash_lens.viz.flow_views import activations
from oversquash_lens.viz.html import escape
from oversquash_lens.viz.views import heads, route

MOST_SPANS = 10
WHY = {
    LARGEST: "the token that is heard most",
    DISTANT: "heard most of the prompt’s first half",
    MOST_SQUASHED: "of the others, the token that loses most against even attention",
}


def by_depth(found: Findings) -> str:
    """Where the channel narrows: width by depth, the most squashed spans, the positions that carry the paths."""
    view = route(found.squashing.flow)
    return section(
        "Where it narrows",
        guide(
            "Effective width is the number of positions that the paths to the last token pass through on entering a "
            "layer: exp of their shares’ entropy, paths counted with their weights. Where it is small, what comes from "
            "many positions has to fit into few. The ring marks the layer that is narrowest against even attention."
        )
        + f'<div class="columns tables">\n{_curve(found)}{_spans(found)}</div>\n'
        + keyed(view)
        + view.fragment(guided=False)
        + _layers_in_numbers(found),
        "where",
    )


def _curve(found: Findings) -> str:
    legend = '<span class="real">this prompt</span> <span class="null">even attention, the same weights</span>'
    return f'<figure class="card"><figcaption>{legend}</figcaption>\n{width_curve(found.squashing)}</figure>\n'


def _spans(found: Findings) -> str:
    rows = [_span_row(found, span) for span in found.squashing.spans[:MOST_SPANS]]
    if not rows:
        return ""
    caption = (
        "The most squashed runs of tokens: their share of all that is heard, beside what mask geometry alone, even "
        "attention with the same weights, would give them."
    )
    return table(
        "Most squashed spans", caption, head_row(("tokens",), ("from", "to", "share", "even attention", "ratio")), rows
    )


def _span_row(found: Findings, span: Span) -> str:
    ratio = span.share / span.null_share if span.null_share > 0 else float("nan")
    return (
        f'<tr><th scope="row" class="span">{span_html(found.tokens, span.start, span.stop)}</th>'
        f'<td class="n">{span.start}</td><td class="n">{span.stop - 1}</td><td class="n">{percent(span.share)}</td>'
        f'<td class="n">{percent(span.null_share)}</td>{cell(ratio, ".2g")}</tr>\n'
    )


def _layers_in_numbers(found: Findings) -> str:
    squashing = found.squashing
    flow = squashing.flow
    widths = (flow.effective_width, squashing.null.effective_width, squashing.relative_width)
    rows = []
    for layer, numbers in enumerate(zip(*(width.tolist() for width in widths), strict=True)):
        cells = "".join(cell(value, ".3g") for value in numbers)
        if layer < flow.n_layers:
            head = int(flow.head[layer].argmax())
            moved = f'<td class="n">{percent(flow.residual[layer].item())}</td><td class="n">{head}</td>' + (
                f'<td class="n">{percent(flow.head[layer, head].item())}</td>'
            )
        else:
            moved = f'<td class="n">{DASH}</td>' * 3
        name = f"into {layer}" if layer < flow.n_layers else "out of the last"
        rows.append(f'<tr><th scope="row">{name}</th>{cells}{moved}</tr>\n')
    names = ("width", "even attention", "ratio", "stays in place", "leading head", "carries")
    caption = "Effective width entering each layer; what of the paths stays where it is, and which head moves most."
    return folded("Every layer in numbers", table("Every layer in numbers", caption, head_row(("layer",), names), rows))


def by_head(found: Findings) -> str:
    """Which heads carry it, and what each brings to each token."""
    flow = found.squashing.flow
    views = (heads(flow), activations(flow))
    return section("Heads", "".join(keyed(view) + view.fragment(guided=False) for view in views), "heads")


def by_path(found: Findings) -> str:
    """Heaviest edges and whole paths."""
    edges = table(
        "Heaviest edges",
        "The edges between positions that carry the largest shares of all paths.",
        head_row(("from", "to"), ("layer", "head", "share")),
        [_edge_row(found.tokens, edge) for edge in found.edges],
    )
    paths = table(
        "Heaviest whole paths",
        "The single paths from the prompt to the last token with the largest shares; between moves a path stays where "
        "it is. L3 H4 is head 4 of layer 3, the head that brings most of that step.",
        head_row(("path",), ("share",)),
        [_path_row(found.tokens, path) for path in found.paths],
    )
    return section("The heaviest edges and paths", f'<div class="columns tables">\n{paths}{edges}</div>\n', "paths")


def _edge_row(tokens: Sequence[str], edge: HeavyEdge) -> str:
    head = DASH if edge.head is None else str(edge.head)
    return (
        f'<tr><th scope="row">{_at(tokens, edge.src)}</th><td>{_at(tokens, edge.dest)}</td><td class="n">{edge.layer}'
        f'</td><td class="n">{head}</td><td class="n">{percent(edge.share)}</td></tr>\n'
    )


def _path_row(tokens: Sequence[str], path: HeavyPath) -> str:
    steps = [_at(tokens, path.positions[0])]
    steps += [f"<small>L{layer} H{head}</small> {_at(tokens, dest)}" for layer, head, _, dest in path.moves]
    text = " &#8594; ".join(steps) if path.moves else f"{steps[0]} stays where it is"
    return f'<tr><th scope="row" class="path">{text}</th><td class="n">{percent(path.share)}</td></tr>\n'


def _at(tokens: Sequence[str], position: int) -> str:
    return f'<span class="at">{token_html(tokens[position])} <small>{position}</small></span>'


def by_route(found: Findings) -> str:
    """Which way single tokens take."""
    views = []
    for why, flow in found.routes.items():
        share = percent(found.squashing.share[flow.source].item())
        words = f"{escape(WHY.get(why, why))}: {share} of all that is heard"
        heading = f"<h3>{_at(found.tokens, flow.source)} <span>{words}</span></h3>\n"
        views.append(heading + route(flow).fragment(guided=False))
    text = (
        "What becomes of one token’s information: the positions that carry it, layer by layer, up to the last token, "
        "and the heads that move it. The colours are those of the key above."
    )
    return section("Routes of single tokens", guide(text) + "".join(views), "routes") if views else ""
