"""Tokens made visible, text made harmless, and the one HTML class that every view is."""

from __future__ import annotations

import hashlib
import html
import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import circuitsvis
from circuitsvis.utils.render import RenderedHTML

from oversquash_lens.errors import InputError, OversquashError

LONGEST_TOKEN = 64  # characters shown of one token
SCRIPTS = ("view.js", "view_strip.js", "view_grid.js", "view_flow.js", "view_all.js")  # one scope, in this order
LARGEST_PAYLOAD = 4 * 2**20  # bytes of data in one view; beyond it browsers turn slow
MARKS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
MEANINGS = {
    "·": "· is a space",
    "↵": "↵ a line break",
    "⇥": "⇥ a tab",
    "␍": "␍ a carriage return",
    "∅": "∅ an empty token",
    "‹U+": "‹U+…› a character that cannot be seen",
}
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"}  # Unicode categories that leave no ink
_JOINERS = "\u200c\u200d"  # belong inside emoji and Indic words; suspect only at a token's edge


def visible_token(token: str, longest: int = LONGEST_TOKEN) -> str:
    """The token as one can see it on paper: no white space, nothing invisible, never empty, not too long.

    >>> visible_token(" the"), visible_token("\\n\\t"), visible_token(""), visible_token("a\\u202eb")
    ('·the', '↵⇥', '∅', 'a‹U+202E›b')
    """
    head = token[:longest]
    edges = (0, len(head) - 1)
    shown = "".join(_mark(c, inside=i not in edges) for i, c in enumerate(head)) or "∅"
    if unicodedata.combining(shown[0]):
        shown = "◌" + shown
    left_out = len(token) - len(head)
    return f"{shown}… (+{left_out:,} characters)" if left_out else shown


def _mark(character: str, inside: bool) -> str:
    if character in MARKS:
        return MARKS[character]
    if unicodedata.category(character) not in _UNSEEN or (inside and character in _JOINERS):
        return character
    return f"‹U+{ord(character):04X}›"


def escape(text: object) -> str:
    """Text for an HTML element or attribute, in ASCII so that no missing charset can garble it.

    >>> escape('<b> & "ψ" \\ud800')
    '&lt;b&gt; &amp; &quot;&#968;&quot; \\\\ud800'
    """
    # A lone surrogate is a character that neither HTML nor UTF-8 has: it is written out.
    plain = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return ascii_html(html.escape(plain))


def ascii_html(markup: str) -> str:
    """HTML with every character beyond ASCII as a character reference."""
    return markup.encode("ascii", "xmlcharrefreplace").decode("ascii")


def inert(text: str) -> str:
    """Text that no HTML parser can take for markup, yet reads the same.

    CircuitsVis sets a token as innerHTML in the strip and as plain text in the hover box, so entities would
    show in the second. A word joiner (U+2060, no width) behind every `<` and `&` leaves no tag and no entity.

    >>> inert("<b>&amp;").replace("\\u2060", "|")
    '<|b>&|amp;'
    """
    return re.sub("[<&]", "\\g<0>\u2060", text)


def script_json(value: object) -> str:
    """JSON that can stand inside a <script> element: ASCII, and no character that could end it.

    >>> script_json({"a": "</script>&"})
    '{"a":"\\\\u003c/script\\\\u003e\\\\u0026"}'
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def asset(name: str) -> str:
    """One of this folder's own style sheets or scripts."""
    return resources.files(__package__).joinpath(name).read_text("utf-8")


@cache
def runtime() -> str:
    """JavaScript that draws every view in the document: CircuitsVis' bundle and our few lines; about 1.3 MB.

    It runs once per document, however many outputs of a notebook bring it. The bundle's source map line would
    make developer tools ask for a file. Its 64-bit integers try to compile WebAssembly, which the page's
    policy refuses with a message: they are given none, and do without.
    """
    path = Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js"
    try:
        bundle = path.read_text("utf-8")
    except OSError as error:
        raise OversquashError(
            f"CircuitsVis' JavaScript cannot be read ({error}); expected it at {path}: "
            "reinstall it (pip install --force-reinstall --no-deps circuitsvis)"
        ) from error
    bundle = re.sub(r"^//# sourceMappingURL=.*$", "", bundle, flags=re.MULTILINE)
    body = bundle + "\n" + "".join(map(asset, SCRIPTS)) + "return drawAll;"
    name = "oversquash-lens " + hashlib.sha256(body.encode("utf-8")).hexdigest()[:12]
    code = f'(globalThis["{name}"] ??= (function(WebAssembly){{{body}}})({{}}))();\n'
    return code.replace("</script", "<\\/script")


class View(RenderedHTML):
    """A picture for notebooks and pages: self-contained HTML that never asks the network.

    CircuitsVis' own class asks google.com whether there is a network and then loads its code from a CDN; here
    `_repr_html_`, `__html__`, `str()`, `show_code` and both sources are the same text, bundle included.
    `payload` is what `view_all.js` draws; `caption` and `guide` (how to read it; said once on a page) are HTML.
    """

    def __init__(self, payload: dict, caption: str, guide: str) -> None:
        self.payload = payload
        self.caption = caption
        self.guide = guide
        self._data = script_json(payload)
        if len(self._data) > LARGEST_PAYLOAD:
            raise InputError(
                f"this view would carry {len(self._data) / 2**20:.1f} MB of data; expected at most "
                f"{LARGEST_PAYLOAD / 2**20:.0f} MB: show fewer layers or a shorter prompt"
            )

    def fragment(self, guided: bool = True) -> str:
        """The view without code and style, for a page that brings both once; `guided`: with key and guide."""
        return (
            f'<figure class="osl-view"><figcaption>{self.caption}</figcaption>'
            + (self.key() + f'<p class="osl-guide">{self.guide}</p>' if guided else "")
            + '<div class="osl-stage" aria-busy="true"><noscript>This view needs JavaScript.</noscript></div>'
            + f'<script type="application/json">{self._data}</script></figure>\n'
        )

    def key(self) -> str:
        """The colour key alone, drawn by the same code as the tokens."""
        data = script_json({name: self.payload[name] for name in ("key", "floor")})
        return f'<div class="osl-key">share <span></span><script type="application/json">{data}</script></div>'

    def _repr_html_(self) -> str:
        return f"<style>{asset('view.css')}</style>\n{self.fragment()}<script>{runtime()}</script>\n"

    def __html__(self) -> str:
        return self._repr_html_()

    def __str__(self) -> str:
        return self._repr_html_()

    def show_code(self) -> str:
        return self._repr_html_()

    @property
    def local_src(self) -> str:
        return self._repr_html_()

    @property
    def cdn_src(self) -> str:
        return self._repr_html_()

    def __repr__(self) -> str:
        shown = len(self.payload["tokens"])
        return f"<View of {shown} tokens: display it in a notebook, or write str(view) to a file>"


class Views(View):
    """Views beside one another, one below the other on a phone; a layer picked in one is picked in all."""

    def __init__(self, views: Sequence[View], guide: str) -> None:
        shared = {name: views[0].payload[name] for name in ("key", "floor")}
        super().__init__({**shared, "tokens": [token for view in views for token in view.payload["tokens"]]}, "", guide)
        self.views = tuple(views)

    def fragment(self, guided: bool = True) -> str:
        inside = "".join(view.fragment(guided=False) for view in self.views)
        return (
            '<div class="osl-guided">'
            + (self.key() + f'<p class="osl-guide">{self.guide}</p>' if guided else "")
            + f'<div class="osl-pair osl-together">\n{inside}</div></div>\n'
        )
