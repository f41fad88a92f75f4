"""HTML from templates that escape what they are given, CircuitsVis' code, and the one class that every view is."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import circuitsvis
from circuitsvis.utils.render import RenderedHTML
from markupsafe import Markup

from oversquash_lens.errors import InputError, OversquashError
from oversquash_lens.viz import words

if TYPE_CHECKING:
    import jinja2

SCRIPTS = ("view.js", "view_strip.js", "view_grid.js", "view_flow.js", "view_all.js")  # one scope, in this order
LARGEST_PAYLOAD = 4 * 2**20  # bytes of data in one view; beyond it browsers turn slow


@cache
def environment() -> jinja2.Environment:
    """The templates of this folder: all that they are given is escaped, and what they do not know is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("oversquash_lens.viz"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_without_surrogates,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(
        visible=words.visible_token,
        one_line=words.one_line_text,
        percent=words.percent,
        count=words.count,
        measure_name=words.measure_name,
        subscript=_with_subscript,
        number=words.number,
    )
    return made


def _without_surrogates(value: Any) -> Any:
    """A lone surrogate is a character that neither HTML nor UTF-8 has: it is written out."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return value


def _with_subscript(text: str) -> Markup:
    """‖J‖_F as HTML."""
    return Markup(Markup.escape(_without_surrogates(text)).replace("_F", Markup("<sub>F</sub>")))


def render(template: str, **values: Any) -> str:
    """HTML in ASCII, so that no missing charset can garble it; `values` are escaped where the template shows them.

    >>> render("text.html.j2", text='<b> & "ψ" \\ud800')
    '&lt;b&gt; &amp; &#34;&#968;&#34; \\\\ud800'
    """
    text = environment().get_template(template).render(**values)
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def page(
    template: str,
    title: str,
    *,
    script: str = "",
    styles: Sequence[str] = ("page.css",),
    classes: str = "",
    **values: Any,
) -> str:
    """One self-contained HTML page, in ASCII, of a template that extends page.html.j2; `script` is our own code.

    It loads no file, font or picture and runs no script but this one: its hash stands in the page's policy.
    """
    allowed = ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
        allowed = f"script-src 'sha256-{digest}'; "
    policy = (
        f"default-src 'none'; {allowed}style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    return render(
        template,
        title=title,
        policy=Markup(policy),
        styles=Markup("".join(map(asset, styles))),
        script=Markup(script),
        classes=f"osl-page {classes}".strip(),
        **values,
    )


def inert(text: str) -> str:
    """Text that no HTML parser can take for markup, yet reads the same.

    CircuitsVis sets a token as innerHTML in the strip and as plain text in the hover box, so entities would
    show in the second. A word joiner (U+2060, no width) behind every `<` and `&` leaves no tag and no entity.

    >>> inert("<b>&amp;").replace("\\u2060", "|")
    '<|b>&|amp;'
    """
    return re.sub("[<&]", "\\g<0>\u2060", text)


def script_json(value: object) -> Markup:
    """JSON that can stand inside a <script> element: ASCII, and no character that could end it.

    >>> str(script_json({"a": "</script>&"}))
    '{"a":"\\\\u003c/script\\\\u003e\\\\u0026"}'
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@cache
def asset(name: str) -> str:
    """One of our own style sheets or scripts."""
    return resources.files(__package__).joinpath("templates").joinpath(name).read_text("utf-8")


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
    `payload` is what `view_all.js` draws. `title`, `gloss` (what it is), `notes` and `guide` (how to read it; said
    once on a page) are text, escaped where they are shown.
    """

    template = "view.html.j2"

    def __init__(self, payload: dict, title: str, gloss: str, notes: Sequence[str] = (), guide: str = "") -> None:
        self.payload, self.title, self.gloss, self.guide = payload, title, gloss, guide
        self.notes = tuple(note for note in notes if note)
        self.data = script_json(payload)
        if len(self.data) > LARGEST_PAYLOAD:
            raise InputError(
                f"expected at most {LARGEST_PAYLOAD / 2**20:.0f} MB of data, got a view that would carry "
                f"{len(self.data) / 2**20:.1f} MB: show fewer layers or a shorter prompt"
            )

    @property
    def caption(self) -> str:
        """Title, gloss and notes as one text."""
        return " ".join([f"{self.title}: {self.gloss}", *self.notes])

    @property
    def key(self) -> Markup:
        """Data of the colour key, which is drawn by the same code as the tokens."""
        return script_json({name: self.payload[name] for name in ("key", "floor")})

    def fragment(self, guided: bool = True) -> Markup:
        """The view without code and style, for a page that brings both once; `guided`: with key and guide."""
        return Markup(render(self.template, view=self, guided=guided))

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

    template = "views.html.j2"

    def __init__(self, views: Sequence[View], guide: str) -> None:
        shared = {name: views[0].payload[name] for name in ("key", "floor")}
        tokens = [token for view in views for token in view.payload["tokens"]]
        super().__init__({**shared, "tokens": tokens}, "", "", guide=guide)
        self.views = tuple(views)
