"""Reports on many prompts: a page each, and an index with a row for every prompt, also for those that failed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oversquash_lens.analyses.findings import Findings, findings
from oversquash_lens.errors import InputError, OversquashError, one_line
from oversquash_lens.storage import check_place, write_atomically
from oversquash_lens.viz.html import page
from oversquash_lens.viz.report import check_options, estimate_row, write_page
from oversquash_lens.viz.words import one_line_text

HEADING = "What the last token depends on, prompt by prompt"
LONGEST_BEGINNING = 90  # characters of a prompt in the index
UNUSABLE = (OversquashError, MemoryError, torch.OutOfMemoryError)  # of one prompt; the others may still do


@dataclass(frozen=True)
class Entry:
    """One prompt's row in the index: its page and what was found, or why there is none."""

    name: str
    beginning: str
    file: str = ""
    n: int = 0
    heard: float = float("nan")
    null_heard: float = float("nan")
    index: float = float("nan")
    narrowest: int = -1
    spearman: float = float("nan")
    error: str = ""


def reports(model: Any, prompts: Any, folder: str | os.PathLike, *, title: str | None = None, **options: Any) -> Path:
    """One page per prompt and index.html over them; returns the index's absolute path.

    `prompts` is a list of texts or token ids, of (name, prompt) pairs, or a dict name -> prompt; `options` are
    `findings`'. A prompt that cannot be used gets a row with the error and the others go on; if none can be used,
    InputError says so. Every file appears whole or not at all, the index anew after each prompt.
    """
    named = _named(prompts)
    check_options(options)
    target = check_place(folder, "index.html")
    entries: list[Entry] = []
    for number, (name, prompt) in enumerate(named, 1):
        file = file_name(number, len(named), name if name is not None else prompt)
        shown = f"prompt {number}" if name is None else name
        entries.append(_one(model, prompt, shown, name, target.with_name(file), options))
        write_atomically(target, render_index(entries, title).encode("ascii"))
    if all(entry.error for entry in entries):
        raise InputError(f"none of the {len(entries)} prompts could be used; the first: {entries[0].error}")
    return target


def _named(prompts: Any) -> list[tuple[str | None, Any]]:
    """(name or None, prompt) of each; a single text is refused, for its characters would be taken for prompts."""
    if isinstance(prompts, Mapping):
        prompts = list(prompts.items())
    if isinstance(prompts, str | bytes) or not hasattr(prompts, "__iter__"):
        raise InputError(
            f"expected a list of texts, or of (name, prompt) pairs, got prompts of type {type(prompts).__name__}: "
            "put a single one into a list"
        )
    named = [
        tuple(each) if isinstance(each, tuple) and len(each) == 2 and isinstance(each[0], str) else (None, each)
        for each in prompts
    ]
    if not named:
        raise InputError("expected a list of texts, or of (name, prompt) pairs, got no prompt: give at least one")
    return named


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
    squashing = found.squashing
    return Entry(
        name=name,
        beginning=beginning,
        file=file,
        n=len(found.tokens),
        heard=found.effective_tokens,
        null_heard=squashing.null_effective_tokens,
        index=squashing.index,
        narrowest=squashing.narrowest,
        spearman=estimate_row(found).spearman,
    )


def render_index(entries: Sequence[Entry], title: str | None = None) -> str:
    """The index as HTML: one row per prompt, links to the pages beside it, no script, nothing from a network."""
    done = sum(not entry.error for entry in entries)
    failed = len(entries) - done
    lead = f"{len(entries):,} prompt{'s' if len(entries) != 1 else ''}, {done:,} report{'s' if done != 1 else ''}"
    lead += f"; {failed:,} could not be used." if failed else "."
    return page("index.html.j2", title or HEADING, lead=lead, entries=entries)
