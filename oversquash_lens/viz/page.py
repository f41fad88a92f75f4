"""The report: one HTML file on what of its prompt the last token hears, where the rest is lost, and how one knows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from oversquash_lens.analyses.findings import Findings, findings
from oversquash_lens.errors import InputError
from oversquash_lens.storage import check_writable, write_atomically
from oversquash_lens.viz.concentration import by_depth, by_head, by_path, by_route
from oversquash_lens.viz.document import document, plain
from oversquash_lens.viz.headline import headline
from oversquash_lens.viz.html import escape, runtime
from oversquash_lens.viz.tokens import by_layer, by_token, in_numbers
from oversquash_lens.viz.trust import assumed, audited

TITLE = "What the last token hears"
SECTIONS = (by_token, by_depth, by_head, by_route, by_path, by_layer, audited, assumed, in_numbers)

# What `findings` can be told, by name.
OPTIONS = tuple(name for name in signature(findings).parameters if name not in ("model", "prompt"))


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
    """Find out what the model hears of the prompt and write the page; returns where it lies, as an absolute path.

    `probes=None` measures the truth exactly, which takes minutes; 16 probes take seconds. `probes`, `chat`, `bos` and
    further `options` (beta=, seed=, progress=, …) are `findings`'. The place is looked at before the model runs, and
    the file appears whole or not at all.
    """
    target = check_writable(path)
    check_options(options)
    return write_page(findings(model, prompt, probes=probes, chat=chat, bos=bos, **options), target, title=title)


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
        raise InputError(
            f"a page was asked of a {type(found).__name__}; expected Findings: call findings(model, prompt)"
        )
    body = "".join(section(found) for section in (headline, _contents, *SECTIONS, _footer))
    return document(title or TITLE, body, runtime(), ("view.css", "page.css"))


def _contents(found: Findings) -> str:
    entries = {
        "tokens": "Token by token",
        "where": "Where it narrows",
        "heads": "Heads",
        "routes": "Routes",
        "paths": "Edges and paths",
        "layers": "Layer by layer",
        "trust": "Trust",
        "assumptions": "Assumptions",
        "numbers": "All numbers",
    }
    links = " ".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in entries.items())
    return f'<nav aria-label="On this page">{links}</nav>\n'


def _footer(found: Findings) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found.about.versions.items())
    line = f"{versions}. This page is one file and asks nothing of the network."
    return f"<footer><p><bdi>{escape(plain(line))}</bdi></p></footer>\n"
