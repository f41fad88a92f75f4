"""Nothing that a token, a model's name, a title, a prompt's name or a version brings is ever markup, or runs.

In the browser the page's policy is taken away, so that escaping alone stands between these strings and the reader.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser

import pytest
from evil_strings import CORPUS
from small_findings import findings_result, with_origin
from small_results import about

from oversquash_lens.analyses import answer
from oversquash_lens.viz.report import render_page
from oversquash_lens.viz.reports import Entry, file_name, render_index
from oversquash_lens.viz.words import one_line_text, visible_token

ALLOWED = {
    *("html", "head", "meta", "link", "title", "style", "body", "main", "script", "noscript", "nav", "section"),
    *("footer", "h1", "h2", "h3", "p", "a", "bdi", "span", "strong", "small", "code", "sub", "div", "figure"),
    *("figcaption", "details", "summary", "dl", "dt", "dd", "table", "caption", "thead", "tbody", "tr", "th", "td"),
    *("svg", "g", "line", "text", "polyline", "circle", "ol", "li", "h4"),
}
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>\n')


class Markup(HTMLParser):
    """Every element with its attributes, and all text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.found[-1:] and self.found[-1][0] not in ("script", "style"):
            self.text += data


def dangerous(html: str) -> list[str]:
    """Elements that we never write, handlers, links out, and comments or declarations that were not ours."""
    markup = Markup(html)
    found = [tag for tag, _ in markup.found if tag not in ALLOWED]
    for tag, attrs in markup.found:
        found += [f"{tag} {name}" for name in attrs if name.startswith("on")]
        href = attrs.get("href") or ""
        found += [] if re.fullmatch(r"(#[a-z]+|data:,|[\w-]+\.html)?", href) else [f"{tag} href={href}"]
    return found


def everywhere(text: str):
    """Findings that carry the string as a token, in a model's name and class, and in a version."""
    origin = replace(about(f"model {text}"), model_class=f"C{text}", versions={f"torch{text}": text})
    return with_origin(findings_result(("The", text, f" {text}", "end"), model=text), origin)


@pytest.fixture(autouse=True)
def every_token_a_word(monkeypatch):
    """So that the text changes no number of rows."""
    monkeypatch.setattr(answer, "words_of", lambda tokens: [(i, i + 1) for i in range(len(tokens))])
    monkeypatch.setattr(answer, "sentences_of", lambda tokens: [(0, len(tokens))])


@cache
def harmless() -> list[str]:
    """The same page's elements where the string is a word."""
    return [tag for tag, _ in Markup(render_page(everywhere("word"), title="On word")).found]


@pytest.mark.parametrize("number", range(len(CORPUS)))
def test_no_string_becomes_markup(number):
    text = CORPUS[number]
    page = render_page(everywhere(text), title=f"On {text}")
    assert page.isascii()
    assert dangerous(page) == []
    markup = Markup(page)
    assert [tag for tag, _ in markup.found] == harmless()
    assert visible_token(text) in markup.text
    assert one_line_text(f"On {text}") in markup.text


def test_no_string_becomes_markup_in_the_index():
    entries = [Entry(text, text, "1.html", 3, text, (text, text), 1.0, 2.0, 0, 0.9) for text in CORPUS]
    entries += [Entry(text, text, error=text) for text in CORPUS]
    page = render_index(entries, CORPUS[0])
    assert page.isascii()
    assert dangerous(page) == []
    assert len(re.findall("<tr>", page)) == 1 + 2 * len(CORPUS)
    assert "script-src" not in page
    assert "<script" not in page
    for text in CORPUS:
        assert one_line_text(text) in Markup(page).text


@pytest.mark.parametrize("number", range(len(CORPUS)))
def test_no_name_leaves_its_folder(number):
    assert re.fullmatch(r"07(-[a-z0-9]+)*\.html", file_name(7, 12, CORPUS[number]))


@pytest.mark.parametrize("name", ["../../etc/passwd", "C:\\x", "CON", "a/b", ".hidden", "x" * 5000, "-rf", "é.html"])
def test_names_of_files_are_safe(name):
    made = file_name(1, 3, name)
    assert re.fullmatch(r"1(-[a-z0-9]+)*\.html", made)
    assert len(made) < 60


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u202eb", "a‹U+202E›b"),
        ("\x1b[31m", "‹U+001B›[31m"),
        ("\ud800", "‹U+D800›"),
        ("two words", "two words"),
        ("x" * 500, "x" * 400 + "… (+100 characters)"),
        ("", ""),
    ],
)
def test_names_show_what_cannot_be_seen(text, shown):
    assert one_line_text(text) == shown


@pytest.mark.browser
def test_nothing_runs_in_a_browser_even_without_the_policy(opened):
    origin = replace(about("".join(CORPUS)), versions={text: text for text in CORPUS})
    found = with_origin(findings_result(CORPUS, model=CORPUS[0]), origin)
    html = render_page(found, title="".join(CORPUS[:12]))
    assert len(POLICY.findall(html)) == 1
    for page in (opened(POLICY.sub("", html)), opened(html)):
        for view in page.views()[:3]:
            assert page.tokens(view) == [visible_token(text).replace(" ", "") for text in CORPUS]
        for i in (0, 3, 27, 45, 51, 53, 61):
            assert visible_token(CORPUS[i])[:40] in page.hover(page.views()[0], i)
        for layer in ("1", "2", "3"):  # what is drawn only when it is asked for
            for button in page.driver.find_elements("css selector", f".osl-view input[value='{layer}']"):
                page.ask("arguments[0].click()", button)
        page.until("return !document.querySelector('.osl-stage[aria-busy=true]')")
        assert page.ask("return window.pwned") is None
        assert page.ask("return document.title") == one_line_text("".join(CORPUS[:12]))
        assert page.ask("return document.querySelectorAll('img, iframe, object, embed, base, form, video').length") == 0
        assert page.ask("return document.querySelectorAll('main script:not([type])').length") == 0
        assert page.ask("return getComputedStyle(document.body).display") != "none"
        assert page.complaints() == []


@pytest.mark.browser
def test_nothing_runs_in_the_index_even_without_the_policy(opened):
    entries = [Entry(text, text, "1.html", 3, text, (text, text), 1.0, 2.0, 0, 0.9) for text in CORPUS]
    page = opened(POLICY.sub("", render_index([*entries, *(Entry(text, text, error=text) for text in CORPUS)])))
    assert page.ask("return window.pwned") is None
    assert page.ask("return document.querySelectorAll('tbody tr').length") == 2 * len(CORPUS)
    assert page.ask("return document.querySelectorAll('main :is(img, iframe, script, svg, style)').length") == 0
    assert page.complaints() == []
