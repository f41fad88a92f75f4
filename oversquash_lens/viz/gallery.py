"""Figures as files in a folder, and the page that shows them: picture, verdict, set-up, tables, downloads.

The page is made of what lies in the folder, so a figure that was made again is all that has to be done again.
"""

from __future__ import annotations

import base64
import json
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oversquash_lens.errors import one_line
from oversquash_lens.storage import check_place, write_atomically
from oversquash_lens.viz import figures
from oversquash_lens.viz.chart import Chart, Table, Verdict
from oversquash_lens.viz.document import document
from oversquash_lens.viz.html import escape
from oversquash_lens.viz.scales import number
from oversquash_lens.viz.style import DPI

HEADING = "The paper’s figures, on this model"
DATA = ("csv", "json")
AFTER_NUMBERS = ("ushape", "window", "remedies")  # figures that the paper has no number for, in its order
SIGNS = {True: "✓", False: "✗", None: "–"}
CLASSES = {True: "held", False: "failed", None: "open"}


def write_chart(chart: Chart, folder: str | os.PathLike) -> dict[str, Path]:
    """Write NAME.pdf, .svg, .png, .csv and .json (the whole chart) into the folder; returns where each lies.

    Each file appears whole or not at all, the JSON last: what the index page shows is complete. The places are
    looked at before anything is drawn; the folder is made where there is none.
    """
    kinds = (*figures.FORMATS, *DATA)
    places = {kind: check_place(folder, f"{chart.name}.{kind}") for kind in kinds}
    text = {"csv": chart.to_csv(), "json": json.dumps(chart.to_dict(), indent=1, allow_nan=False) + "\n"}
    figures.save(chart, folder, chart.name)
    for kind in DATA:
        write_atomically(places[kind], text[kind].encode("utf-8", "backslashreplace"))
    return places


def write_index(folder: str | os.PathLike, heading: str = HEADING) -> Path:
    """Write index.html of all charts in the folder, in the paper's order; returns its absolute path.

    JSON files that are no charts are left alone; damaged ones are named on the page.
    """
    target = check_place(folder, "index.html")
    charts, damaged = read_charts(target.parent)
    return write_atomically(target, render_index(charts, damaged, target.parent, heading).encode("utf-8"))


def read_charts(folder: Path) -> tuple[dict[str, Chart], dict[str, str]]:
    """Charts of the folder by file name in the paper's order, and what is wrong with those that cannot be read."""
    charts: dict[str, Chart] = {}
    damaged: dict[str, str] = {}
    files = [path for path in folder.glob("*.json") if not path.name.startswith(".")]
    for path in sorted(files, key=lambda path: _order(path.stem)):
        try:
            values = json.loads(path.read_text("utf-8"))
            if isinstance(values, dict) and values.get("kind") == "chart":
                charts[path.stem] = Chart.from_dict(values)
        except (OSError, ValueError, RecursionError) as error:
            damaged[path.name] = one_line(error)
    return charts, damaged


def _order(name: str) -> tuple:
    """Sort key: 1 … 12, then the paper's unnumbered ones, then others by name.

    >>> sorted(["window", "10", "notes", "2", "ushape", "figure-5b"], key=_order)
    ['2', 'figure-5b', '10', 'ushape', 'window', 'notes']
    """
    if numbered := re.fullmatch(r"(?:fig(?:ure)?[-_]?)?(\d+)(.*)", name):
        return 0, int(numbered[1]), numbered[2]
    return (1, AFTER_NUMBERS.index(name), "") if name in AFTER_NUMBERS else (2, 0, name)


def render_index(charts: dict[str, Chart], damaged: dict[str, str], folder: Path, heading: str = HEADING) -> str:
    """The page as HTML: pictures inside it, links to the files beside it, no script, nothing from a network."""
    figures_of = "".join(_figure(name, chart, folder) for name, chart in charts.items())
    body = _lead(charts) + _damaged(damaged) + _overview(charts) + figures_of
    return document(heading, body, styles=("page.css", "gallery.css"), classes="osl-page osl-gallery")


# -- the page's head -----------------------------------------------------------------------------------------


def _lead(charts: dict[str, Chart]) -> str:
    if not charts:
        return '<p class="lead">There is no figure in this folder yet.</p>\n'
    found = [verdict.held for chart in charts.values() for verdict in chart.verdicts]
    counts = {"held": found.count(True), "did not hold": found.count(False), "not decided": found.count(None)}
    said = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    models = "; ".join(dict.fromkeys(chart.model for chart in charts.values() if chart.model))
    claims = f"Of {len(found)} claims, {said}." if found else ""
    return f'<p class="lead">{escape(claims)}</p>\n<p class="about">{escape(models)}</p>\n'


def _damaged(damaged: dict[str, str]) -> str:
    items = "".join(f"<li><bdi>{escape(name)}</bdi>: {escape(why)}</li>\n" for name, why in damaged.items())
    return (
        f'<section class="damaged">\n<h2>Files that cannot be read</h2>\n<ul>\n{items}</ul>\n</section>\n'
        if items
        else ""
    )


def _overview(charts: dict[str, Chart]) -> str:
    """One row a figure: which, what about, and how its claims fared."""
    rows = "".join(
        f'<li><a href="#{_anchor(name)}"><b>{escape(_short(name))}</b> <span>{escape(_title(name, chart))}</span></a>'
        f'<span class="signs">{"".join(map(_sign, chart.verdicts))}</span></li>\n'
        for name, chart in charts.items()
    )
    return f'<nav aria-label="Figures">\n<ol>\n{rows}</ol>\n</nav>\n' if charts else ""


def _sign(verdict: Verdict) -> str:
    said, sign = escape(verdict.word), escape(SIGNS[verdict.held])
    return f'<span class="{CLASSES[verdict.held]}" role="img" aria-label="{said}" title="{said}">{sign}</span>'


def _anchor(name: str) -> str:
    return f"figure-{re.sub(r'[^A-Za-z0-9_-]', '-', name)}"


def _short(name: str) -> str:
    return f"Figure {name}" if name[0].isdigit() else name.capitalize()


def _title(name: str, chart: Chart) -> str:
    """The chart's title without the figure's number, which stands beside it."""
    return re.sub(rf"^{re.escape(_short(name))}[:.]?\s+", "", str(chart.title))


# -- one figure ----------------------------------------------------------------------------------------------


def _figure(name: str, chart: Chart, folder: Path) -> str:
    verdicts = "".join(map(_verdict, chart.verdicts))
    setup = _list("Set-up", chart.setup)
    notes = _list("Notes", chart.notes)
    tables = "".join(map(_table, chart.tables))
    heading = f"<span>{escape(_short(name))}</span> {escape(_title(name, chart))}"
    return (
        f'<section id="{_anchor(name)}">\n<h2>{heading}</h2>\n'
        + (f'<p class="about">{escape(chart.model)}</p>\n' if chart.model else "")
        + (f'<ul class="verdicts">\n{verdicts}</ul>\n' if verdicts else "")
        + _picture(name, chart, folder)
        + _links(name, folder)
        + (f'<div class="words">\n{setup}{notes}</div>\n' if setup or notes else "")
        + f"{tables}</section>\n"
    )


def _verdict(verdict: Verdict) -> str:
    return (
        f'<li class="{CLASSES[verdict.held]}"><strong>{escape(verdict.word)}:</strong> {escape(verdict.claim)} '
        f"<span>({escape(verdict.number)})</span></li>\n"
    )


def _picture(name: str, chart: Chart, folder: Path) -> str:
    """The PNG itself, so that the page can travel alone."""
    try:
        png = (folder / f"{name}.png").read_bytes()
    except OSError as error:
        return f'<p class="missing">{escape(f"{name}.png cannot be read: {error.strerror or error}")}</p>\n'
    data = base64.b64encode(png).decode("ascii")
    width, height = struct.unpack(">II", png[16:24].ljust(8, b"\0"))  # of a PNG's first block
    alt = escape(" ".join([chart.title, *map(str, chart.verdicts)]))
    image = f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{alt}">'
    size = f"--inches: {width / DPI:.3g}"
    return f'<figure role="group" aria-label="{escape(_short(name))}" tabindex="0" style="{size}">{image}</figure>\n'


def _links(name: str, folder: Path) -> str:
    there = [kind for kind in (*figures.FORMATS, *DATA) if (folder / f"{name}.{kind}").is_file()]
    links = " ".join(f'<a href="{escape(name)}.{kind}">{kind.upper()}</a>' for kind in there)
    return f'<p class="links">{links}</p>\n'


def _list(heading: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>\n" for line in lines)
    return f"<div>\n<h3>{heading}</h3>\n<ul>\n{items}</ul>\n</div>\n" if items else ""


def _table(table: Table) -> str:
    numeric = [
        all(not isinstance(row[i], str) for row in table.rows if i < len(row)) for i in range(len(table.columns))
    ]
    head = "".join(
        f'<th scope="col"{_class(right)}>{escape(column)}</th>'
        for column, right in zip(table.columns, numeric, strict=True)
    )
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in table.rows)
    return (
        f'<div class="scroll" role="region" aria-label="{escape(table.title)}" tabindex="0">\n<table>\n'
        f"<caption><span>{escape(table.title)}</span></caption>\n"
        f"<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>\n{rows}</tbody>\n</table>\n</div>\n"
    )


def _class(right: bool) -> str:
    return ' class="n"' if right else ""


def _cell(value: Any) -> str:
    """Words to the left, numbers to the right with four digits; what is not known is a dash.

    >>> _cell(0.123456), _cell("<b>"), _cell(None)
    ('<td class="n">0.1235</td>', '<td>&lt;b&gt;</td>', '<td class="n">&#8211;</td>')
    """
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if value is None or value != value:
        return f'<td class="n">{escape("–")}</td>'
    if isinstance(value, float):
        value = float(f"{value:.4g}")
    return (
        f'<td class="n">{escape(number(value))}</td>' if isinstance(value, float | int) else f"<td>{escape(value)}</td>"
    )
