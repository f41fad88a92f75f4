"""The pieces that pages are made of: the document with its policy, sections, tables, cells, tokens in a sentence."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence

from oversquash_lens.viz.html import View, ascii_html, asset, escape, visible_token

DASH = "&#8211;"
LONGEST_SPAN = 60  # characters shown of several tokens in a row
LONGEST_TEXT = 400  # characters shown of a title, a model's name, the beginning of a prompt


def document(
    heading: str, body: str, script: str = "", styles: Sequence[str] = ("page.css",), classes: str = "osl-page"
) -> str:
    """One self-contained HTML page, in ASCII; `heading` is text, `body` and `script` are our own HTML and code.

    It loads no file, font or picture and runs no script but this one.
    """
    title = escape(plain(heading))
    code = f"<script>{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>\n{''.join(map(asset, styles))}</style>\n</head>\n"
        f'<body class="{classes}">\n<main>\n<h1><bdi>{title}</bdi></h1>\n{ascii_html(body)}</main>\n'
        f"{code}</body>\n</html>\n"
    )


def _policy(script: str) -> str:
    """Content-Security-Policy: nothing from any network, and no script but the one whose hash stands here."""
    allowed = ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
        allowed = f"script-src 'sha256-{digest}'; "
    return f"default-src 'none'; {allowed}style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def section(heading: str, content: str, anchor: str = "") -> str:
    named = f' id="{anchor}"' if anchor else ""
    return f"<section{named}>\n<h2>{escape(heading)}</h2>\n{content}</section>\n"


def folded(summary: str, content: str) -> str:
    """What is only read when asked for; on paper where it is open."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{content}</details>\n"


def guide(text: str) -> str:
    return f'<p class="guide">{formula(text)}</p>\n'


def keyed(view: View) -> str:
    """How to read a view and those after it: its guide and its colour key."""
    return f'<p class="guide">{view.guide}</p>\n{view.key()}\n'


def columns(views: Sequence[View], together: bool = False) -> str:
    """Views next to one another; `together`: a layer picked in one is picked in all."""
    kind = "columns osl-together" if together else "columns"
    return f'<div class="{kind}">\n{"".join(view.fragment(guided=False) for view in views)}</div>\n'


def table(name: str, caption: str, head: str, rows: Sequence[str]) -> str:
    """A table that scrolls inside its own box where the screen is narrow, also by keyboard."""
    return (
        f'<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0">\n<table>\n'
        f"<caption><span>{formula(caption)}</span></caption>\n"
        f"<thead>\n{head}</thead>\n<tbody>\n{''.join(rows)}</tbody>\n</table>\n</div>\n"
    )


def head_row(words: Sequence[str], numbers: Sequence[str] = ()) -> str:
    """A table's head: columns of words, then columns of numbers."""
    cells = [f'<th scope="col">{escape(word)}</th>' for word in words]
    cells += [f'<th scope="col" class="n">{escape(name)}</th>' for name in numbers]
    return f"<tr>{''.join(cells)}</tr>\n"


def formula(text: str) -> str:
    return escape(text).replace("_F", "<sub>F</sub>")


def number(value: float, form: str) -> str:
    """A number as HTML; what is not known is a dash.

    >>> number(-0.25, "+.2f"), number(-0.001, "+.2f"), number(float("nan"), ".4g"), number(float("inf"), ".4g")
    ('&#8722;0.25', '0.00', '&#8211;', '&#8734;')
    """
    if math.isnan(value):
        return DASH
    text = "0.00" if form.endswith(".2f") and abs(value) < 0.005 else format(value, form).replace("-", "−")
    return ascii_html(text.replace("inf", "∞"))


def cell(value: float, form: str) -> str:
    """A table cell of a number."""
    return f'<td class="n">{number(value, form)}</td>'


def percent(share: float) -> str:
    """A share as people read it, two digits and no zeros.

    >>> percent(0.1234), percent(0.00567), percent(1.0), percent(3e-7), percent(0.0)
    ('12 %', '0.57 %', '100 %', '&lt; 0.001 %', '0 %')
    """
    if math.isnan(share):
        return DASH
    if 0 < share < 1e-5:
        return "&lt; 0.001 %"
    return f"{100 * share:.2g} %" if share < 0.095 else f"{100 * share:.0f} %"


def plain(text: object, longest: int = LONGEST_TEXT) -> str:
    """Somebody's text as one line that one can see all of: words apart by single spaces, nothing invisible in them.

    >>> plain("two  words\\n"), plain("a\\u202eb"), plain("x" * 9, 4)
    ('two words↵', 'a‹U+202E›b', 'xxxx… (+5 characters)')
    """
    text = str(text)
    left_out = len(text) - longest
    shown = " ".join(visible_token(word, longest) for word in text[:longest].split(" ") if word)
    return f"{shown}… (+{left_out:,} characters)" if left_out > 0 else shown


def token_html(token: str) -> str:
    """A token in text, in a direction of its own."""
    return f"<bdi>{escape(visible_token(token))}</bdi>"


def span_html(tokens: Sequence[str], start: int, stop: int) -> str:
    """Tokens start … stop-1 as one sees them in a row, cut in the middle where they are many."""
    text = "".join(visible_token(token, LONGEST_SPAN) for token in tokens[start:stop])
    if len(text) > LONGEST_SPAN:
        text = f"{text[: LONGEST_SPAN // 2]} … {text[-LONGEST_SPAN // 2 :]}"
    return f"<bdi>{escape(text)}</bdi>"


def place(start: int, stop: int) -> str:
    """Where tokens stand, in words.

    >>> place(3, 4), place(3, 6)
    ('token 3', 'tokens 3 to 5')
    """
    return f"token {start}" if stop - start == 1 else f"tokens {start} to {stop - 1}"
