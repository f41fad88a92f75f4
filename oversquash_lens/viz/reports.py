"""Reports on many prompts: a page each, and an index with a row for every prompt, also for those that failed."""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oversquash_lens.analyses.findings import Findings, findings
from oversquash_lens.errors import InputError, OversquashError, one_line
from oversquash_lens.storage import check_place, write_atomically
from oversquash_lens.sweeps.prompt_files import read_prompts
from oversquash_lens.viz import figures
from oversquash_lens.viz.chart import Chart, Table
from oversquash_lens.viz.html import page
from oversquash_lens.viz.report import check_options, estimate_row, write_page
from oversquash_lens.viz.style import DPI
from oversquash_lens.viz.words import DASH, axis_number, one_line_text

HEADING = "What the last token depends on, prompt by prompt"
LONGEST_BEGINNING = 90  # characters of a prompt in the index
WORDS = 2  # that the answer depends on most, in the index
UNUSABLE = (OversquashError, MemoryError, torch.OutOfMemoryError)  # of one prompt; the others may still do


@dataclass(frozen=True)
class Entry:
    """One prompt's row in the index: its page and what was found, or why there is none."""

    name: str
    beginning: str
    file: str = ""
    n: int = 0
    next_token: str = ""
    words: tuple[str, ...] = ()
    effective: float = float("nan")
    null_effective: float = float("nan")
    widest: int = -1
    spearman: float = float("nan")
    error: str = ""


def reports(
    model: Any,
    prompts: Any,
    folder: str | os.PathLike,
    *,
    title: str | None = None,
    column: str | None = None,
    **options: Any,
) -> Path:
    """One page per prompt and index.html over them; returns the index's absolute path.

    A prompt that cannot be used gets a row with the error, and the others go on. Every file appears whole or not at
    all, the index anew after each prompt.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompts: as `sweep` takes them: a list of texts, messages or token ids, a table, or the path of a file.
        folder: of the pages; made where there is none.
        title: the index's heading; None is the usual one.
        column: where a table has its prompts, else "text", "prompt" or "messages".
        options: those of `findings`, the same for every prompt.

    Raises:
        InputError: an option that is none, a place that cannot be written, or prompts of which none can be used.
    """
    named = read_prompts(prompts, column)
    check_options(options)
    target = check_place(folder, "index.html")
    entries: list[Entry] = []
    for number, each in enumerate(named, 1):
        name, prompt = each.name, each.prompt
        file = file_name(number, len(named), name if name is not None else prompt)
        shown = f"prompt {number}" if name is None else name
        fitting = each.options(options.get("chat", False), options.get("bos"))
        how = options | {name: value for name, value in fitting.items() if name in options}
        entries.append(_one(model, prompt, shown, name, target.with_name(file), how))
        write_atomically(target, render_index(entries, title).encode("ascii"))
    if all(entry.error for entry in entries):
        raise InputError(f"none of the {len(entries)} prompts could be used; the first: {entries[0].error}")
    return target


def file_name(number: int, of: int, name: object) -> str:
    """A file name that is safe everywhere and no other prompt's, whatever the name.

    >>> file_name(3, 12, "../Alice & Bob"), file_name(1, 5, "漢字")
    ('03-alice-bob.html', '1.html')
    """
    words = re.findall(r"[a-z0-9]+", name[:200].lower()) if isinstance(name, str) else []
    slug = "-".join(words)[:40].strip("-")
    return f"{number:0{len(str(of))}d}{'-' if slug else ''}{slug}.html"


def _one(model: Any, prompt: Any, shown: str, title: str | None, place: Path, options: dict) -> Entry:
    beginning = one_line_text(prompt, LONGEST_BEGINNING) if isinstance(prompt, str) else "token ids"
    try:
        found = findings(model, prompt, **options)
        write_page(found, place, title=title)
    except UNUSABLE as error:
        if options.get("progress"):
            print(f"{shown} could not be used: {one_line(error)}", file=sys.stderr)
        return Entry(shown, beginning, error=one_line(error) or type(error).__name__)
    if not isinstance(prompt, str):
        beginning = one_line_text("".join(found.tokens), LONGEST_BEGINNING)
    return _entry(found, shown, beginning, place.name)


def _entry(found: Findings, name: str, beginning: str, file: str) -> Entry:
    answer = found.answer
    return Entry(
        name=name,
        beginning=beginning,
        file=file,
        n=len(found.tokens),
        next_token=answer.predicted[0][0],
        words=tuple(answer.text(word) for word in answer.words[:WORDS]),
        effective=answer.effective_tokens,
        null_effective=found.squashing.null_effective_tokens,
        widest=answer.widest,
        spearman=estimate_row(found).spearman,
    )


def render_index(entries: Sequence[Entry], title: str | None = None) -> str:
    """The index as HTML: one row per prompt, links to the pages beside it, no script, nothing from a network."""
    done = sum(not entry.error for entry in entries)
    failed = len(entries) - done
    lead = f"{len(entries):,} prompt{'s' if len(entries) != 1 else ''}, {done:,} report{'s' if done != 1 else ''}"
    lead += f"; {failed:,} could not be used." if failed else "."
    return page("index.html.j2", title or HEADING, lead=lead, entries=entries)


GALLERY_HEADING = "The paper’s figures, on this model"
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


def write_index(folder: str | os.PathLike, heading: str = GALLERY_HEADING) -> Path:
    """Write index.html of all charts in the folder, in the paper's order; returns its absolute path.

    JSON files that are no charts are left alone; damaged ones are named on the page.
    """
    target = check_place(folder, "index.html")
    charts, damaged = read_charts(target.parent)
    return write_atomically(target, render_gallery(charts, damaged, target.parent, heading).encode("utf-8"))


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


def render_gallery(
    charts: dict[str, Chart], damaged: dict[str, str], folder: Path, heading: str = GALLERY_HEADING
) -> str:
    """The page as HTML: pictures inside it, links to the files beside it, no script, nothing from a network."""
    found = [verdict.held for chart in charts.values() for verdict in chart.verdicts]
    counts = {"held": found.count(True), "did not hold": found.count(False), "not decided": found.count(None)}
    return page(
        "gallery.html.j2",
        heading,
        styles=("page.css", "gallery.css"),
        classes="osl-gallery",
        said=f"Of {len(found)} claims, {', '.join(f'{n} {word}' for word, n in counts.items() if n)}." if found else "",
        models="; ".join(dict.fromkeys(chart.model for chart in charts.values() if chart.model)),
        damaged=damaged,
        figures=[_figure(name, chart, folder) for name, chart in charts.items()],
        SIGNS=SIGNS,
        CLASSES=CLASSES,
    )


def _figure(name: str, chart: Chart, folder: Path) -> dict[str, Any]:
    """What the template shows of one figure: its PNG too, so that the page can travel alone."""
    short = f"Figure {name}" if name[0].isdigit() else name.capitalize()
    png, lost = b"", ""
    try:
        png = (folder / f"{name}.png").read_bytes()
    except OSError as error:
        lost = f"{name}.png cannot be read: {error.strerror or error}"
    width, height = struct.unpack(">II", png[16:24].ljust(8, b"\0"))  # of a PNG's first block
    return {
        "name": name,
        "chart": chart,
        "anchor": f"figure-{re.sub(r'[^A-Za-z0-9_-]', '-', name)}",
        "short": short,
        "title": re.sub(rf"^{re.escape(short)}[:.]?\s+", "", str(chart.title)),  # its number stands beside it
        "png": base64.b64encode(png).decode("ascii"),
        "lost": lost,
        "size": (width, height, f"{width / DPI:.3g}"),
        "files": [kind for kind in (*figures.FORMATS, *DATA) if (folder / f"{name}.{kind}").is_file()],
        "tables": [_table(table) for table in chart.tables],
    }


def _table(table: Table) -> dict[str, Any]:
    """A table's columns, each with whether it holds numbers, and its cells as (text, is it a number)."""
    numeric = [
        all(not isinstance(row[i], str) for row in table.rows if i < len(row)) for i in range(len(table.columns))
    ]
    columns = list(zip(table.columns, numeric, strict=True))
    return {"title": table.title, "columns": columns, "rows": [list(map(table_cell, row)) for row in table.rows]}


def table_cell(value: Any) -> tuple[str, bool]:
    """What a cell says, and whether it is a number: four digits of it; what is not known is a dash.

    >>> table_cell(0.123456), table_cell("<b>"), table_cell(None), table_cell(True)
    (('0.1235', True), ('<b>', False), ('–', True), ('yes', False))
    """
    if isinstance(value, bool):
        return ("yes" if value else "no"), False
    if value is None or value != value:
        return DASH, True
    if isinstance(value, float):
        value = float(f"{value:.4g}")
    return (axis_number(value), True) if isinstance(value, float | int) else (str(value), False)
