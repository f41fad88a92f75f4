"""The report: one HTML file on what of its prompt the last token depends on, what is lost, and how one knows."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.analyses.answer import AnswerFindings
from oversquash_lens.analyses.audit import AuditRow
from oversquash_lens.analyses.findings import DISTANT, LARGEST, MOST_SQUASHED, Findings, findings
from oversquash_lens.errors import InputError
from oversquash_lens.paths.squashing import Span
from oversquash_lens.storage import check_writable, write_atomically
from oversquash_lens.viz import views
from oversquash_lens.viz.html import page, runtime
from oversquash_lens.viz.token_strips import MOST_BINS, PICKED, context_windows, readable
from oversquash_lens.viz.words import DASH, measure_name, number, percent, place, span_text

TITLE = "What of its prompt does the last token still hear?"
MOST_ROWS = 512  # of a table of tokens
MOST_SPANS = 10  # in a table of words, sentences or spans
WIDTH, HEIGHT = 720, 400  # of the curve of widths, in its own units
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 18, 56
WHY = {
    LARGEST: "the token of the largest measured share",
    DISTANT: "the largest share in the prompt’s first half",
    MOST_SQUASHED: "of the others, the token that loses most against uniform attention",
}

# What `findings` can be told, by name.
OPTIONS = tuple(name for name in signature(findings).parameters if name not in ("model", "prompt"))


def report(
    model: Any,
    prompt: Any,
    path: str | os.PathLike = "report.html",
    *,
    probes: int | None = None,
    target: Any = None,
    draws: int | None = None,
    chat: bool = False,
    bos: bool | None = None,
    title: str | None = None,
    **options: Any,
) -> Path:
    """Find out what of the prompt the answer depends on and write the page; returns its absolute path.

    The place is looked at before the model runs, and the file appears whole or not at all.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompt: a text, or token ids [pos] or [1, pos].
        path: of the file; one that is there is replaced.
        probes: backward products for all outputs: 16 take seconds, None measures them exactly and takes minutes.
        target: the answer that is asked about, as `findings` takes it, and so is draws.
        chat: as `record` takes it, and so is bos.
        title: the page's heading; None is the usual one.
        options: further ones of `findings`: beta, seed, verify, node_probes, attention, memory, progress.

    Raises:
        InputError: an option that is none, a place that cannot be written, and what `findings` refuses.
        ModelError: a model of which the truth cannot be measured.
    """
    place_of_page = check_writable(path)
    check_options(options)
    found = findings(model, prompt, probes=probes, target=target, draws=draws, chat=chat, bos=bos, **options)
    return write_page(found, place_of_page, title=title)


def check_options(options: Mapping[str, Any]) -> None:
    """What `report` and `reports` pass on, by name; asked before the model runs."""
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise InputError(f"expected some of {', '.join(OPTIONS)}, got options {unknown}")


def write_page(found: Findings, path: str | os.PathLike, *, title: str | None = None) -> Path:
    """Write findings that are already there as a page, whole or not at all; returns the absolute path."""
    return write_atomically(path, render_page(found, title=title).encode("ascii"))


def render_page(found: Findings | object, *, title: str | None = None) -> str:
    """Findings as one self-contained HTML page: for eyes, keyboard, phone and paper, and without a network.

    It loads no file, font or picture and runs no script but its own; the same findings give the same bytes.
    """
    if not isinstance(found, Findings):
        raise InputError(f"expected Findings, got a {type(found).__name__}: call findings(model, prompt)")
    answer, audit, squashing = found.answer, found.audit, found.squashing
    versions = ", ".join(f"{name} {version}" for name, version in found.about.versions.items())
    measured = [answer.sensitivity, *([] if answer.replaced is None else [answer.replaced]), audit.truth]
    long = len(found.tokens) > MOST_BINS
    return page(
        "report.html.j2",
        title or TITLE,
        script=runtime(),
        styles=("view.css", "page.css"),
        found=found,
        answer=answer,
        about=f"{found.about}; {len(found.tokens):,} tokens, {found.about.n_layers} layers of {found.about.n_heads} "
        f"heads, d_model {found.about.d_model}.",
        versions=f"{versions}. This page is one file and asks nothing of the network.",
        estimate=estimate_row(found),
        windows=context_windows(answer.share) if long else [],
        readable=readable(found.tokens) if long else [],
        picked=min(PICKED, len(found.tokens)),
        token_views=views.side_by_side(*measured),
        words=[(span, _replaced_words(answer, span)) for span in answer.words[:MOST_SPANS]],
        sentences=answer.squashed[:MOST_SPANS],
        curve=width_curve(answer),
        route=views.route(answer.flow),
        heads=views.heads(answer.flow) if answer.flow.head.numel() else None,
        layer_rows=_layer_rows(answer),
        estimated_views=(views.side_by_side(audit.mean_field, audit.bounds["proof"])),
        spans=squashing.spans[:MOST_SPANS],
        estimated_route=views.route(squashing.flow),
        estimated_heads=views.heads(squashing.flow),
        routes=[(WHY.get(why, why), flow, views.route(flow)) for why, flow in found.routes.items()],
        notes=_notes(found),
        token_columns=_token_columns(found),
        token_rows=_token_rows(found),
        norm={"fro": "Frobenius", "spectral": "spectral"}.get(audit.truth.norm, audit.truth.norm),
        place=place,
        span_text=span_text,
        DASH=DASH,
    )


def _replaced_words(answer: AnswerFindings, span: Span) -> str:
    """How far the prediction moves when a word's tokens are replaced one by one: the largest of them."""
    if answer.replaced is None:
        return DASH
    return percent(answer.replaced.relative[span.start : span.stop].max().item())


def estimate_row(found: Findings) -> AuditRow:
    """The audit's row of the mean-field estimate."""
    return next(row for row in found.audit.rows if row.name == "mean_field")


def width_curve(answer: AnswerFindings) -> dict[str, Any]:
    """Width of the target's sensitivity at each layer and the null model's beside it as what curve.svg.j2 draws.

    Heights are logarithmic; a picture in the page itself takes its colours from the page, in the dark and on paper.
    """
    widths = _finite(answer.flow.width, "effective widths")
    nulls = _finite(answer.null_width, "the null model's effective widths")
    last, widest = len(widths) - 1, answer.widest
    top = max(2.0, *widths, *nulls)

    def across(layer: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * layer / max(last, 1)

    def height(width: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(max(width, 1.0)) / math.log(top)

    def entering(layer: int) -> str:
        return f"entering layer {layer}" if layer < last else "leaving the last layer"

    steps = (1, 2, 5) if top < 200 else (1,)
    ticks = [step * 10.0**power for power in range(7) for step in steps if step * 10.0**power <= top]
    return {
        "box": {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "bottom": HEIGHT - BOTTOM},
        "label": f"Effective width by depth, {len(answer.tokens)} tokens: widest {entering(widest)}, "
        f"{widths[widest]:.3g} positions, where uniform attention has {nulls[widest]:.3g}.",
        "lines": {
            name: " ".join(f"{across(layer):.1f},{height(width):.1f}" for layer, width in enumerate(row))
            for name, row in (("null", nulls), ("real", widths))
        },
        "dots": [
            (
                "widest" if layer == widest else "dot",
                f"{across(layer):.1f}",
                f"{height(width):.1f}",
                f"{entering(layer)}: {width:.4g} positions; uniform attention {null:.4g}",
            )
            for layer, (width, null) in enumerate(zip(widths, nulls, strict=True))
        ],
        "rows": [(f"{value:g}", f"{height(value):.1f}", f"{height(value) + 5:.1f}") for value in ticks],
        "columns": [(layer, f"{across(layer):.1f}") for layer in sorted({round(last * part / 4) for part in range(5)})],
    }


def _finite(values: Float[Tensor, " any"], what: str) -> list[float]:
    if not torch.isfinite(values).all():
        raise InputError(
            f"expected finite numbers, got {what} that are not all finite: look for NaN or infinite values in the "
            "result, and measure again in float32"
        )
    return values.tolist()


def _layer_rows(answer: AnswerFindings) -> list[list[str]]:
    """Every layer's widths, what of the target's sensitivity stays in place, and which head carries most."""
    flow = answer.flow
    widths = (flow.width, answer.null_width, answer.relative_width)
    rows = []
    for layer, numbers in enumerate(zip(*(width.tolist() for width in widths), strict=True)):
        name, moved = "out of the last", [DASH] * 4
        if layer < len(flow.stays):
            name = f"into {layer}"
            moved = [percent(flow.stays[layer].item()), percent(flow.mlp[layer].item()), DASH, DASH]
            if flow.head.shape[1] and not torch.isnan(flow.head[layer]).all():
                head = int(flow.head[layer].nan_to_num(0).abs().argmax())
                moved[2:] = [str(head), percent(flow.head[layer, head].item())]
        rows.append([name, *(number(value, ".3g") for value in numbers), *moved])
    return rows


def _token_columns(found: Findings) -> list[str]:
    """What `_token_rows` gives of each token."""
    replaced = [] if found.answer.replaced is None else ["when replaced, y moves by"]
    error = [] if found.audit.truth.exact else ["standard error"]
    shares = ["share, all outputs", "share, estimated", "share, uniform attention"]
    return ["target", "share, target", *replaced, "all outputs", *error, "estimate", "log₁₀ of estimate", *shares]


def _token_rows(found: Findings) -> list[tuple[int, list[str]]]:
    """Tokens with their numbers, in order: all, or of a long prompt those of the largest shares by any measure."""
    answer, truth, estimate, squashing = found.answer, found.audit.truth, found.audit.mean_field, found.squashing
    shares = (truth.share, squashing.share, squashing.null_share)
    largest = torch.stack([share.double() for share in (answer.share, *shares)]).amax(0)
    rows = []
    for i in sorted(largest.topk(min(MOST_ROWS, len(largest))).indices.tolist()):
        true, error, guess = (values[i].item() for values in (truth.values, truth.standard_error, estimate.values))
        ratio = math.log10(guess) - math.log10(true) if guess > 0 and true > 0 else math.nan
        target = [number(answer.sensitivity.values[i].item(), ".4g"), percent(answer.share[i].item())]
        moved = [] if answer.replaced is None else [percent(answer.replaced.relative[i].item())]
        sizes = [number(true, ".4g"), *([] if truth.exact else [number(error, ".2g")]), number(guess, ".4g")]
        rows.append(
            (i, [*target, *moved, *sizes, number(ratio, "+.2f"), *(percent(each[i].item()) for each in shares)])
        )
    return rows


def _notes(found: Findings) -> list[tuple[str, Sequence[str]]]:
    """What each measure says of itself; measures that assume the same are named together."""
    said: dict[tuple[str, ...], list[str]] = {}
    for name, profile in (*found.audit.bounds.items(), ("mean_field", found.audit.mean_field)):
        said.setdefault(tuple(profile.notes), []).append(measure_name(name))
    return [(", ".join(names), notes) for notes, names in said.items() if notes]
