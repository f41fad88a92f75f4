"""The report: one file, whole or not there, with every number of the audit and nothing that could act."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from small_results import EVIL, TOKENS, audit_result

from oversquash_lens.errors import InputError
from oversquash_lens.measure.audit import Audit
from oversquash_lens.render import page as page_module
from oversquash_lens.render.html import visible_token
from oversquash_lens.render.page import render_page, report

VOID = {"meta", "link", "br", "img", "input"}


class Outline(HTMLParser):
    """Elements with their attributes, table cells by row, and whether every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)
        if "tr" in self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row and row[0].startswith(first))


@pytest.fixture(scope="module")
def outline() -> Outline:
    return Outline(render_page(audit_result()))


def test_page_shows_every_audit_row(outline):
    dash = "–"
    sizes = ["+1.25", "−0.75", "+3.00", "‖J‖₂", "2 of 11", "no"]
    assert outline.row("Paper’s bound proof") == ["Paper’s bound proof", "−0.50", *sizes]
    assert outline.row("Theorem 5.1")[1:] == ["0.25", dash, dash, dash, dash, dash, "no"]
    assert outline.row("Calibrated bound, nothing frozen")[-1] == "yes"
    assert outline.row("Mean-field estimate")[1:6] == ["0.93", "−0.09", "−0.55", "+0.22", "‖J‖F"]


def test_page_shows_every_token_with_its_numbers(outline):
    result = audit_result()
    for i, token in enumerate(TOKENS):
        row = next(row for row in outline.rows if row[0] == str(i))
        true, estimate = result.truth.values[i].item(), result.mean_field.values[i].item()
        assert row[1] == visible_token(token)
        assert float(row[2]) == pytest.approx(true, rel=1e-3)
        assert float(row[3]) == pytest.approx(estimate, rel=1e-3)
        assert float(row[4].replace("−", "-")) == pytest.approx(math.log10(estimate / true), abs=0.006)


def test_standard_errors_are_shown_where_probes_measured():
    outline = Outline(render_page(audit_result(exact=False)))
    row = next(row for row in outline.rows if row[0] == "0")
    assert float(row[3]) == pytest.approx(0.06 * float(row[2]), rel=0.05)


def test_page_says_sentence_model_and_assumptions(outline):
    text = " ".join(outline.text)
    result = audit_result()
    for expected in (
        result.sentence,
        str(result.about),
        "torch 2.13.0",
        "11 tokens",
        "assumed by proof <of course>",
    ):
        assert expected in text


def test_page_is_accessible_in_its_markup(outline):
    tags = [tag for tag, _ in outline.tags]
    assert ("html", {"lang": "en"}) in outline.tags
    assert tags.count("caption") == tags.count("table") == 2
    assert tags.count("h1") == 1
    assert all(attrs.get("scope") in ("row", "col", "colgroup") for tag, attrs in outline.tags if tag == "th")
    assert any(attrs.get("name") == "viewport" for _, attrs in outline.tags)


def test_page_loads_nothing(outline):
    for tag, attrs in outline.tags:
        assert "src" not in attrs, tag
        assert attrs.get("href", "data:,") == "data:,"


def test_policy_allows_only_the_page_s_own_script():
    page = render_page(audit_result())
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    script = re.search(r"</main>\n<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}';" in policy
    assert page.index("Content-Security-Policy") < page.index("<title>")


def test_bundle_is_inlined_once():
    page = render_page(audit_result())
    assert page.count("var CircuitsVis=") == 1
    assert page.isascii()
    assert len(page) < 1.5e6
    assert page == render_page(audit_result())  # the same audit, the same bytes


def test_nothing_that_users_control_becomes_markup(monkeypatch):
    evil = "".join(EVIL)
    tokens = tuple(f"{token}{i}" for i, token in enumerate(EVIL))
    result = audit_result(tokens, model=evil)
    profile = replace(result.mean_field, notes=(evil,), kind=evil)
    row = replace(result.rows[0], name=evil, compared_with=evil)
    monkeypatch.setattr(Audit, "sentence", evil)
    result = replace(result, mean_field=profile, rows=(row, *result.rows))
    page = Outline(render_page(result, title=evil))
    assert not {"img", "svg", "b"} & {tag for tag, _ in page.tags}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert [tag for tag, _ in page.tags].count("script") == 1 + 1 + 5  # the code, the key's data, five views' data
    assert "<img src=x onerror=document.title='pwned'>" in "".join(page.text)


def test_long_prompts_stay_small():
    page = render_page(audit_result(tuple(f" w{i}" for i in range(2048)), n_layers=30))
    assert len(page) < 6e6
    assert "summed" in page


@pytest.mark.parametrize("wrong", [None, "model", 3])
def test_what_is_no_audit_is_refused(wrong):
    with pytest.raises(InputError, match="expected an Audit"):
        render_page(wrong)


# -- writing -------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> list:
    """`audit` stands still and says what it was asked."""
    calls: list = []

    def audit(model, prompt, **options):
        calls.append((model, prompt, options))
        return audit_result()

    monkeypatch.setattr(page_module, "audit", audit)
    return calls


def test_report_writes_the_page_and_returns_its_place(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = report("model", "prompt", probes=4, chat=True, seed=7, title="My title")
    assert path == tmp_path / "report.html"
    assert path.read_text("utf-8") == render_page(audit_result(), title="My title")
    assert asked == [("model", "prompt", {"probes": 4, "chat": True, "bos": None, "seed": 7})]
    assert os.listdir(tmp_path) == ["report.html"]


def test_report_replaces_an_older_one(asked, tmp_path):
    (tmp_path / "r.html").write_text("old")
    assert "<!doctype html>" in report("model", "prompt", tmp_path / "r.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("place", "message"),
    [("", "is a folder"), ("missing/r.html", "does not exist"), ("file/r.html", "does not exist")],
)
def test_a_place_that_cannot_be_is_refused_before_the_model_runs(asked, tmp_path, place, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=message):
        report("model", "prompt", tmp_path / place)
    assert not asked


def test_a_read_only_folder_is_refused_before_the_model_runs(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)  # chmod would not stop a test that root runs
    with pytest.raises(InputError, match="cannot be written to"):
        report("model", "prompt", tmp_path / "r.html")
    assert not asked


def test_a_failing_disk_leaves_the_old_report_and_nothing_else(asked, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    (tmp_path / "r.html").write_text("old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        report("model", "prompt", tmp_path / "r.html")
    assert os.listdir(tmp_path) == ["r.html"]
    assert (tmp_path / "r.html").read_text() == "old"


def test_a_failing_audit_writes_nothing(tmp_path, monkeypatch):
    def audit(model, prompt, **options):
        raise InputError("an empty prompt came")

    monkeypatch.setattr(page_module, "audit", audit)
    with pytest.raises(InputError, match="empty prompt"):
        report("model", "", tmp_path / "r.html")
    assert not os.listdir(tmp_path)
