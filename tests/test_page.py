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
import torch
from small_findings import findings_result
from small_results import EVIL, TOKENS

from oversquash_lens.analyses.audit import Audit
from oversquash_lens.errors import InputError
from oversquash_lens.viz import report as page_module
from oversquash_lens.viz.html import render
from oversquash_lens.viz.report import render_page, report, width_curve
from oversquash_lens.viz.words import percent, span_text, visible_token

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
    return Outline(render_page(findings_result()))


def test_page_shows_every_audit_row(outline):
    dash = "–"
    sizes = ["+1.25", "−0.75", "+3.00", "‖J‖₂", "2 of 11", "no"]
    assert outline.row("Paper’s bound proof") == ["Paper’s bound proof", "−0.50", "0.40", *sizes]
    assert outline.row("Theorem 5.1")[1:] == ["0.25", dash, dash, dash, dash, dash, dash, "no"]
    assert outline.row("Calibrated bound, nothing frozen")[-1] == "yes"
    assert outline.row("Mean-field estimate")[1:7] == ["0.93", "0.30", "−0.09", "−0.55", "+0.22", "‖J‖F"]


def test_page_shows_every_token_with_its_numbers(outline):
    result = findings_result()
    audit, squashing = result.audit, result.squashing
    answer = result.answer
    head = ["no.", "token", "target", "share, target", "when replaced, y moves by", "all outputs", "estimate"]
    assert next(row for row in outline.rows if row[:2] == head[:2])[:7] == head
    for i, token in enumerate(TOKENS):
        row = next(row for row in outline.rows if row[0] == str(i))
        true, estimate = audit.truth.values[i].item(), audit.mean_field.values[i].item()
        assert row[1] == visible_token(token)
        assert float(row[2]) == pytest.approx(answer.sensitivity.values[i].item(), rel=1e-3)
        assert float(row[5]) == pytest.approx(true, rel=1e-3)
        assert float(row[6]) == pytest.approx(estimate, rel=1e-3)
        assert float(row[7].replace("−", "-")) == pytest.approx(math.log10(estimate / true), abs=0.006)
        wanted = (answer.share, answer.replaced.relative, audit.truth.share, squashing.share, squashing.null_share)
        shares = [100 * share[i].item() for share in wanted]
        cells = [*row[3:5], *row[8:11]]
        assert [float(cell.removesuffix(" %")) for cell in cells] == pytest.approx(shares, rel=0.06)


def test_standard_errors_are_shown_where_probes_measured():
    outline = Outline(render_page(findings_result(exact=False)))
    row = next(row for row in outline.rows if row[0] == "0")
    assert float(row[6]) == pytest.approx(0.06 * float(row[5]), rel=0.05)


def test_page_says_sentence_model_and_assumptions(outline):
    text = " ".join("".join(outline.text).split())
    result = findings_result()
    for expected in (
        result.audit.sentence,
        str(result.about),
        "torch 2.13.0",
        "of 11 tokens",
        "assumed by proof <of course>",
        "Attention stands still.",
        "It moves.",
    ):
        assert expected in text


def test_the_headline_rests_on_the_target(outline):
    text, result = " ".join("".join(outline.text).split()), findings_result()
    answer = result.answer
    first, second, third = answer.words[:3]
    said = [f"{span_text(TOKENS, word.start, word.stop)} ({percent(word.share)})" for word in (first, second, third)]
    begins, middle, ends = (percent(part.share) for part in answer.parts)
    for expected in (
        "The next token is most likely ·red (50 %).",
        f"The logit of ' red' depends most on {said[0]}, {said[1]} and {said[2]}.",
        f"the prompt’s beginning has {begins} of the sensitivity, its middle {middle}, its end {ends}.",
        f"{answer.effective_tokens:.1f}",
        f"{result.effective_tokens:.1f}",
        "rank correlation of the one-pass estimate with the measured sensitivity of all outputs",
    ):
        assert expected in text
    total = sum(word.share for word in answer.words)
    assert total == pytest.approx(1 - answer.share[-1].item())  # the last position is where it is read


def test_a_squashed_sentence_is_named_and_holds_no_word_of_the_headline():
    tokens = ("Ann", " lives", " in", " Rome", ".", " It", " is", " warm", ".", " She", " lives", " in")
    result = findings_result(tokens)
    loud = torch.full((12,), 1.0, dtype=torch.float64)
    loud[5:9] = 0.1
    loud[[0, 3, 9]] = 3.0
    sensitivity = replace(result.answer.sensitivity, values=loud)
    answer = replace(result.answer, sensitivity=sensitivity)
    assert [(span.start, span.stop) for span in answer.squashed] == [(5, 9)]
    text = " ".join("".join(Outline(render_page(replace(result, answer=answer))).text).split())
    assert "Most squashed: ·It·is·warm., 4 of 12 tokens with 2.8 %." in text
    top = replace(sensitivity, values=loud.index_fill(0, torch.tensor([6]), 50.0))
    assert replace(answer, sensitivity=top).squashed[:1] != answer.squashed  # it holds the loudest word now
    even = replace(answer, sensitivity=replace(sensitivity, values=torch.ones(12, dtype=torch.float64)))
    text = "".join(Outline(render_page(replace(result, answer=even))).text)
    assert "No sentence has less than a third of an equal share." in text
    assert "Most squashed: " not in text


def test_what_was_not_replaced_is_said():
    result = findings_result()
    answer = replace(result.answer, replaced=None, not_replaced="it was not asked for (draws=0)")
    outline = Outline(render_page(replace(result, answer=answer)))
    assert "Nothing was replaced: it was not asked for (draws=0)." in "".join(outline.text)
    assert "when replaced, y moves by" not in {cell for row in outline.rows for cell in row}


def test_what_an_assumption_does_is_said_with_its_numbers(outline):
    text = " ".join("".join(outline.text).split())
    assert "makes the measured sensitivity 0.1 times what it is (0.01 to 10 over the tokens" in text
    assert "rank correlation 0.88 with the real one" in text
    assert "rank correlation with the truth from 0.93 to 0.41" in text
    assert "typical size from 0.81 to 3.2 times the truth" in text
    assert text.count("Imposed on the model itself") == 1


def test_every_layer_s_width_is_in_its_table(outline):
    answer = findings_result().answer
    flow = answer.flow
    for layer in range(len(flow.stays) + 1):
        row = outline.row(f"into {layer}" if layer < len(flow.stays) else "out of the last")
        assert float(row[1]) == pytest.approx(flow.width[layer].item(), rel=0.01)
        assert float(row[2]) == pytest.approx(answer.null_width[layer].item(), rel=0.01)
    shares = [float(cell.removesuffix(" %").replace("−", "-")) for cell in outline.row("into 1")[4:6]]
    assert shares == pytest.approx([100 * flow.stays[1].item(), 100 * flow.mlp[1].item()], rel=0.06)
    leading = int(flow.head[1].abs().argmax())
    assert outline.row("into 1")[6] == str(leading)


def test_the_curve_says_what_the_widths_are():
    answer = findings_result().answer
    curve = render("curve.svg.j2", curve=width_curve(answer))
    widths = re.findall(r"(?:layer (\d)|last layer): ([\d.]+) positions; uniform attention ([\d.]+)<", curve)
    assert len(widths) == 4
    for (_, real, null), wide, even in zip(widths, answer.flow.width, answer.null_width, strict=True):
        assert (float(real), float(null)) == pytest.approx((wide.item(), even.item()), rel=1e-3)
    heights = [float(point.split(",")[1]) for point in re.findall(r'real" points="([^"]+)"', curve)[0].split()]
    order = answer.flow.width.argsort(descending=True).tolist()
    assert sorted(range(4), key=lambda layer: heights[layer]) == order  # the wider, the higher
    assert re.search(r'class="widest" cx="([\d.]+)"', curve)


def test_a_width_that_is_no_number_is_refused():
    answer = findings_result().answer
    broken = replace(answer, flow=replace(answer.flow, norms=torch.full_like(answer.flow.norms, math.nan)))
    with pytest.raises(InputError, match="not all finite"):
        width_curve(broken)


def test_the_heaviest_edges_and_paths_are_listed(outline):
    result = findings_result()
    for edge in result.edges:
        source, dest = (
            f"{visible_token(TOKENS[edge.src])} {edge.src}",
            f"{visible_token(TOKENS[edge.dest])} {edge.dest}",
        )
        row = next(row for row in outline.rows if row[:4] == [source, dest, str(edge.layer), str(edge.head)])
        assert float(row[4].removesuffix(" %")) == pytest.approx(100 * edge.share, rel=0.06)
    table = next(i for i, row in enumerate(outline.rows) if row == ["path", "share"])
    rows = outline.rows[table + 1 : table + 1 + len(result.paths)]
    for path, (text, share) in zip(result.paths, rows, strict=True):
        assert float(share.removesuffix(" %")) == pytest.approx(100 * path.share, rel=0.06)
        assert text.count("→") == len(path.moves)
        assert text.startswith(f"{visible_token(TOKENS[path.positions[0]])} {path.positions[0]}")


def test_infinite_and_missing_numbers_are_shown():
    result = findings_result()
    values = result.audit.truth.values.clone()
    values[1], values[2] = math.inf, math.nan
    row = replace(result.audit.rows[-1], spearman=math.nan, median_log10_ratio=math.inf)
    audit = replace(result.audit, truth=replace(result.audit.truth, values=values))
    with pytest.raises(InputError, match="look for NaN or infinite values"):
        render_page(replace(result, audit=audit))
    page = Outline(render_page(replace(result, audit=replace(result.audit, rows=(row, *result.audit.rows[:-1])))))
    assert page.row("Mean-field estimate")[1:4] == ["–", "0.30", "+∞"]


def test_page_is_accessible_in_its_markup(outline):
    tags = [tag for tag, _ in outline.tags]
    assert ("html", {"lang": "en"}) in outline.tags
    assert tags.count("caption") == tags.count("table") == 7
    assert tags.count("h1") == 1
    assert all(attrs.get("scope") in ("row", "col", "colgroup") for tag, attrs in outline.tags if tag == "th")
    assert any(attrs.get("name") == "viewport" for _, attrs in outline.tags)


def test_page_loads_nothing(outline):
    for tag, attrs in outline.tags:
        assert "src" not in attrs, tag
        assert re.fullmatch(r"data:,|#[a-z]+", attrs.get("href", "data:,")), tag


def test_every_link_on_the_page_leads_somewhere(outline):
    places = [attrs["id"] for _, attrs in outline.tags if "id" in attrs]
    links = [attrs["href"][1:] for tag, attrs in outline.tags if tag == "a"]
    assert len(links) == 6
    assert places == links  # in the order of the page


def test_policy_allows_only_the_page_s_own_script():
    page = render_page(findings_result())
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    script = re.search(r"</main>\n<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}';" in policy
    assert page.index("Content-Security-Policy") < page.index("<title>")


def test_bundle_is_inlined_once():
    page = render_page(findings_result())
    assert page.count("var CircuitsVis=") == 1
    assert page.isascii()
    assert len(page) < 1.6e6
    assert page == render_page(findings_result())  # the same audit, the same bytes


def test_nothing_that_users_control_becomes_markup(monkeypatch):
    evil = "".join(EVIL)
    tokens = tuple(f"{token}{i}" for i, token in enumerate(EVIL))
    result = findings_result(tokens, model=evil)
    profile = replace(result.audit.mean_field, notes=(evil,), kind=evil)
    row = replace(result.audit.rows[-1], compared_with=evil)
    other = replace(result.audit.rows[0], name=evil)
    monkeypatch.setattr(Audit, "sentence", evil)
    audit = replace(result.audit, mean_field=profile, rows=(row, other, *result.audit.rows))
    said = replace(result.assumptions[0], claim=evil, found=evil)
    page = Outline(render_page(replace(result, audit=audit, assumptions=(said,)), title=evil))
    assert not {"img", "b", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    views = [attrs for _, attrs in page.tags if attrs.get("class") == "osl-view"]
    keys = [attrs for _, attrs in page.tags if attrs.get("class") == "osl-key"]
    assert [tag for tag, _ in page.tags].count("script") == 1 + len(views) + len(keys)  # the code, and their data
    assert "<img src=x onerror=document.title='pwned'>" in "".join(page.text).replace("·", " ")


def test_long_prompts_stay_small():
    page = render_page(findings_result(tuple(f" w{i}" for i in range(900)), n_layers=6))
    assert len(page) < 3e6
    assert "summed" in page


@pytest.mark.parametrize("wrong", [None, "model", 3])
def test_what_is_no_audit_is_refused(wrong):
    with pytest.raises(InputError, match="expected Findings"):
        render_page(wrong)


# -- writing -------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> list:
    """`findings` stands still and says what it was asked."""
    calls: list = []

    def findings(model, prompt, **options):
        calls.append((model, prompt, options))
        return findings_result()

    monkeypatch.setattr(page_module, "findings", findings)
    return calls


def test_report_writes_the_page_and_returns_its_place(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = report("model", "prompt", probes=4, chat=True, seed=7, title="My title")
    assert path == tmp_path / "report.html"
    assert path.read_text("utf-8") == render_page(findings_result(), title="My title")
    how = {"probes": 4, "target": None, "draws": None, "chat": True, "bos": None, "seed": 7}
    assert asked == [("model", "prompt", how)]
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


def test_a_failing_measure_writes_nothing(tmp_path, monkeypatch):
    def findings(model, prompt, **options):
        raise InputError("got an empty prompt")

    monkeypatch.setattr(page_module, "findings", findings)
    with pytest.raises(InputError, match="empty prompt"):
        report("model", "", tmp_path / "r.html")
    assert not os.listdir(tmp_path)
