"""The report: one HTML file on which tokens of a prompt the last token still hears, and how one knows."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oversquash_lens.errors import InputError
from oversquash_lens.files import check_writable, write_atomically
from oversquash_lens.measure.audit import Audit, AuditRow, audit
from oversquash_lens.render.html import View, ascii_html, asset, escape, runtime, visible_token
from oversquash_lens.render.views import NAMES, layers, side_by_side

TITLE = "What the last token hears"


def report(
    model: Any,
    prompt: Any,
    path: str | os.PathLike = "report.html",
    *,
    probes: int | None = None,
    chat: bool = False,
    bos: bool | None = None,
    title: str | None = None,
    **options: Any,
) -> Path:
    """Audit the model on the prompt and write the page; returns where it lies, as an absolute path.

    `probes`, `chat`, `bos` and further `options` (beta=, seed=, progress=, …) are `audit`'s. The place is
    looked at before the model runs, and the file appears whole or not at all.
    """
    target = check_writable(path)
    return write_page(audit(model, prompt, probes=probes, chat=chat, bos=bos, **options), target, title=title)


def write_page(result: Audit, path: str | os.PathLike, *, title: str | None = None) -> Path:
    """Write an audit that is already there as a page, whole or not at all; returns the absolute path."""
    return write_atomically(path, render_page(result, title=title).encode("utf-8"))


def render_page(result: Audit | object, *, title: str | None = None) -> str:
    """An audit as one self-contained HTML page: for eyes, keyboard, phone and paper, and without a network.

    It loads no file, font or picture and runs no script but its own; the same audit gives the same bytes.
    """
    if not isinstance(result, Audit):
        raise InputError(f"a page was asked of a {type(result).__name__}; expected an Audit: call audit(model, prompt)")
    heading = escape(title or TITLE)
    sections = (_header, _by_token, _by_layer, _trust, _assumptions, _all_tokens, _footer)
    body = "".join(section(result) for section in sections)
    script = runtime()
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{heading}</title>\n<style>\n{asset('view.css')}{asset('page.css')}</style>\n</head>\n"
        f'<body class="osl-page">\n<main>\n<h1>{heading}</h1>\n{body}</main>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _policy(script: str) -> str:
    """Content-Security-Policy: nothing from any network, and no script but the one whose hash stands here."""
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


# -- sections ------------------------------------------------------------------------------------------------


def _header(result: Audit) -> str:
    about = result.about
    size = f"{about.n_layers} layers of {about.n_heads} heads, d_model {about.d_model}"
    line = f"{about}; {len(result.tokens):,} tokens, {size}."
    return f'<p class="lead">{escape(result.sentence)}</p>\n<p class="about">{escape(line)}</p>\n'


def _by_token(result: Audit) -> str:
    views = side_by_side(result.bounds["proof"], result.mean_field, result.truth)
    guide = f'<p class="guide">{views[0].guide}</p>\n{views[0].key()}\n'
    return _section("Token by token", guide + _columns(views))


def _by_layer(result: Audit) -> str:
    guide = (
        '<p class="guide">What the last token hears of each position through the layers from the picked one '
        "upwards; both views follow the pick. The colours are those of the key above.</p>\n"
    )
    views = [layers(result.bounds["proof"]), layers(result.mean_field)]
    return _section("Layer by layer", guide + _columns(views, together=True))


def _trust(result: Audit) -> str:
    caption = (
        "Each measure held against J, the derivative of the last output by each token’s embedding that "
        "autograd finds. A rank correlation of 1 orders the tokens as ‖J‖_F does. A log₁₀ ratio of 0 has the "
        "true size, 1 is ten times as large; bounds speak of the spectral norm ‖J‖₂. – stands where the "
        "paper leaves the constant open."
    )
    rows = [_audit_row(row, len(result.tokens)) for row in result.rows]
    return _section("How far to trust these numbers", _table("Audit", caption, _AUDIT_HEAD, rows))


_AUDIT_HEAD = """<tr>
<th scope="col" rowspan="2">measure</th>
<th scope="col" rowspan="2" class="n">rank correlation</th>
<th scope="colgroup" colspan="4" class="group">log&#8321;&#8320; of measure over truth</th>
<th scope="col" rowspan="2" class="n">tokens below the truth</th>
<th scope="col" rowspan="2">promises to be above</th>
</tr>
<tr>
<th scope="col" class="n">median</th>
<th scope="col" class="n">smallest</th>
<th scope="col" class="n">largest</th>
<th scope="col">truth</th>
</tr>
"""


def _audit_row(row: AuditRow, n: int) -> str:
    ratios = (row.median_log10_ratio, row.min_log10_ratio, row.max_log10_ratio)
    below = _DASH if row.violations is None else f"{row.violations:,} of {n:,}"
    return (
        f'<tr><th scope="row">{escape(NAMES.get(row.name, row.name))} <code>{escape(row.name)}</code></th>'
        f"{_number(row.spearman, '.2f')}{''.join(_number(ratio, '+.2f') for ratio in ratios)}"
        f"<td>{_formula(row.compared_with)}</td>"
        f'<td class="n">{below}</td><td>{"yes" if row.promises_bound else "no"}</td></tr>\n'
    )


def _assumptions(result: Audit) -> str:
    said: dict[tuple[str, ...], list[str]] = {}  # measures that assume the same are named together
    for name, profile in (*result.bounds.items(), ("mean_field", result.mean_field)):
        said.setdefault(tuple(profile.notes), []).append(NAMES.get(name, name))
    entries = "".join(
        f"<dt>{escape(', '.join(names))}</dt>{''.join(f'<dd>{escape(note)}</dd>' for note in notes)}\n"
        for notes, names in said.items()
        if notes
    )
    return _section("What each measure assumes", f"<dl>\n{entries}</dl>\n") if entries else ""


def _all_tokens(result: Audit) -> str:
    """Every token in numbers: also what a screen reader, or a browser without scripts, gets of the views."""
    truth, exact = result.truth, result.truth.exact
    names = ["truth", *([] if exact else ["standard error"]), "estimate", "log₁₀ of estimate over truth"]
    head = "".join(f'<th scope="col" class="n">{ascii_html(name)}</th>' for name in names)
    head = f'<tr><th scope="col" class="n">no.</th><th scope="col">token</th>{head}</tr>\n'
    columns = (truth.values.tolist(), truth.standard_error.tolist(), result.mean_field.values.tolist())
    rows = []
    for i, (token, true, error, estimate) in enumerate(zip(result.tokens, *columns, strict=True)):
        cells = [_number(true, ".4g"), *([] if exact else [_number(error, ".2g")])]
        cells += [_number(estimate, ".4g"), _number(_log10_ratio(estimate, true), "+.2f")]
        name = f'<th scope="row"><bdi>{escape(visible_token(token))}</bdi></th>'
        rows.append(f'<tr><td class="n">{i}</td>{name}{"".join(cells)}</tr>\n')
    norm = {"fro": "Frobenius", "spectral": "spectral"}.get(truth.norm, truth.norm)
    caption = f"Sensitivity of the last output to each token: {norm} norm, and its mean-field estimate."
    table = _table("Every token in numbers", caption, head, rows)
    return f"<section>\n<details>\n<summary>Every token in numbers</summary>\n{table}</details>\n</section>\n"


def _footer(result: Audit) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result.about.versions.items())
    line = f"{versions}. This page is one file and asks nothing of the network."
    return f"<footer><p>{escape(line)}</p></footer>\n"


# -- pieces --------------------------------------------------------------------------------------------------

_DASH = "&#8211;"


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}</section>\n"


def _columns(views: Sequence[View], together: bool = False) -> str:
    """Views next to one another; `together`: a layer picked in one is picked in all."""
    kind = "columns osl-together" if together else "columns"
    return f'<div class="{kind}">\n{"".join(view.fragment(guided=False) for view in views)}</div>\n'


def _table(name: str, caption: str, head: str, rows: Sequence[str]) -> str:
    """A table that scrolls inside its own box where the screen is narrow, also by keyboard."""
    return (
        f'<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0">\n<table>\n'
        f"<caption><span>{_formula(caption)}</span></caption>\n"
        f"<thead>\n{head}</thead>\n<tbody>\n{''.join(rows)}</tbody>\n</table>\n</div>\n"
    )


def _formula(text: str) -> str:
    return escape(text).replace("_F", "<sub>F</sub>")


def _number(value: float, form: str) -> str:
    """A table cell; NaN is a dash.

    >>> _number(-0.25, "+.2f"), _number(-0.001, "+.2f"), _number(float("nan"), ".4g")
    ('<td class="n">&#8722;0.25</td>', '<td class="n">0.00</td>', '<td class="n">&#8211;</td>')
    """
    text = "0.00" if form.endswith(".2f") and abs(value) < 0.005 else format(value, form).replace("-", "−")
    return f'<td class="n">{_DASH if math.isnan(value) else ascii_html(text)}</td>'


def _log10_ratio(above: float, below: float) -> float:
    return math.log10(above) - math.log10(below) if above > 0 and below > 0 else math.nan
