"""Reports on many prompts: a page each, an index that says of every prompt what was found or why nothing was."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from small_findings import findings_result
from small_models import case
from test_page import Outline

from oversquash_lens.errors import InputError, ModelError
from oversquash_lens.viz import reports as reports_module
from oversquash_lens.viz.report import render_page
from oversquash_lens.viz.reports import file_name, render_index, reports
from oversquash_lens.viz.words import one_line_text, visible_token

pytestmark = pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")
GOOD = findings_result()


@pytest.fixture
def asked(monkeypatch) -> list:
    """`findings` stands still, refuses prompts with "bad" in them, and says what it was asked."""
    calls: list = []

    def findings(model, prompt, **options):
        calls.append((prompt, options))
        if "bad" in str(prompt):
            raise InputError(f"expected better, got {prompt}")
        return GOOD

    monkeypatch.setattr(reports_module, "findings", findings)
    return calls


def test_every_prompt_has_a_page_and_a_row(asked, tmp_path):
    index = reports("model", ["Hello  there", ("A name", "some text"), [1, 2, 3]], tmp_path / "out", probes=4, seed=7)
    assert index == tmp_path / "out" / "index.html"
    assert sorted(os.listdir(tmp_path / "out")) == ["1-hello-there.html", "2-a-name.html", "3.html", "index.html"]
    assert [prompt for prompt, _ in asked] == ["Hello  there", "some text", [1, 2, 3]]
    assert all(options == {"probes": 4, "seed": 7} for _, options in asked)
    page = Outline(index.read_text("ascii"))
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links == ["1-hello-there.html", "2-a-name.html", "3.html"]
    answer, row = GOOD.answer, next(row for row in page.rows if row[0] == "A name")
    assert row[1:3] == ["some text", "·red"]
    assert row[3] == ", ".join(one_line_text(answer.text(word)) for word in answer.words[:2])
    numbers = [answer.effective_tokens, GOOD.squashing.null_effective_tokens, answer.widest, 0.93]
    assert row[4] == "11"
    assert [float(cell.replace("−", "-")) for cell in row[5:]] == pytest.approx(numbers, abs=0.051)
    assert page.row("prompt 3")[1] == "".join(map(visible_token, GOOD.tokens)).replace("·", " ")
    assert (tmp_path / "out" / "2-a-name.html").read_text("ascii") == render_page(GOOD, title="A name")
    assert "3 prompts, 3 reports." in "".join(page.text)


def test_a_prompt_that_cannot_be_used_has_a_row_and_the_others_go_on(asked, tmp_path):
    index = reports("model", ["one", "bad <b>", "two"], tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["1-one.html", "3-two.html", "index.html"]
    page = Outline(index.read_text())
    assert page.row("prompt 2") == ["prompt 2", "bad <b>", "expected better, got bad <b>"]
    assert "3 prompts, 2 reports; 1 could not be used." in "".join(page.text)


def test_where_no_prompt_can_be_used_the_first_reason_is_said(asked, tmp_path):
    with pytest.raises(InputError, match=r"none of the 2 prompts could be used; the first: expected better, got bad 1"):
        reports("model", ["bad 1", "bad 2"], tmp_path)
    assert os.listdir(tmp_path) == ["index.html"]


@pytest.mark.parametrize("error", [ModelError("no hook fired"), MemoryError()])
def test_what_fails_one_prompt_fails_no_other(monkeypatch, tmp_path, error):
    def findings(model, prompt, **options):
        if prompt == "b":
            raise error
        return GOOD

    monkeypatch.setattr(reports_module, "findings", findings)
    page = Outline(reports("model", ["a", "b"], tmp_path).read_text())
    assert page.row("prompt 2")[2] == (str(error) or "MemoryError")


def test_what_the_program_got_wrong_is_not_hidden_in_a_row(monkeypatch, tmp_path):
    def findings(model, prompt, **options):
        raise KeyError("ours")

    monkeypatch.setattr(reports_module, "findings", findings)
    with pytest.raises(KeyError):
        reports("model", ["a"], tmp_path)


@pytest.mark.parametrize("wrong", ["one text", b"bytes", None, 3])
def test_what_is_no_list_of_prompts_is_refused(asked, tmp_path, wrong):
    with pytest.raises(InputError, match=r"expected a list of texts|one text is not a file; expected one of prompts"):
        reports("model", wrong, tmp_path)
    assert not asked


def test_no_prompt_at_all_is_refused(asked, tmp_path):
    with pytest.raises(InputError, match="got no prompt"):
        reports("model", [], tmp_path)


def test_prompts_may_come_one_by_one(asked, tmp_path):
    assert reports("model", (text for text in ("a", "b")), tmp_path).is_file()
    assert [prompt for prompt, _ in asked] == ["a", "b"]


def test_prompts_of_one_name_do_not_meet(asked, tmp_path):
    reports("model", [("same", "x"), ("same", "y"), ("SAME!", "z")], tmp_path)
    assert len(os.listdir(tmp_path)) == 4


def test_a_read_only_folder_is_refused_before_the_model_runs(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)  # chmod would not stop a test that root runs
    with pytest.raises(InputError, match="cannot be written to"):
        reports("model", ["a"], tmp_path)
    assert not asked


def test_a_folder_that_is_a_file_is_refused(asked, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        reports("model", ["a"], tmp_path / "file")
    assert not asked


def test_a_full_disk_leaves_no_half_file(asked, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        reports("model", ["a"], tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_same_prompts_give_the_same_bytes(asked, tmp_path):
    for folder in ("one", "two"):
        reports("model", ["a", "bad", ("n", "c")], tmp_path / folder, title="T")
    for name in os.listdir(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_index_is_plain_markup_with_its_policy():
    page = render_index([])
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert Outline(page).tags[0] == ("html", {"lang": "en"})
    assert "0 prompts, 0 reports." in page


def test_files_are_numbered_so_that_they_sort():
    names = [file_name(number, 120, "a") for number in range(1, 121)]
    assert names == sorted(names)
    assert names[0] == "001-a.html"


def test_real_prompts_make_real_pages(tmp_path):
    model, tokens = case("ln-one-layer")
    index = reports(model, [("whole", tokens), ("short", tokens[:, :1]), ("part", tokens[:, :3])], tmp_path, probes=2)
    page = Outline(index.read_text())
    assert [page.row(name)[4] for name in ("whole", "part")] == [str(tokens.shape[1]), "3"]
    assert "expected at least two" in page.row("short")[2]
    assert Outline((tmp_path / "3-part.html").read_text()).row("into 0")


def test_what_is_not_known_is_a_dash(asked, tmp_path):
    rows = tuple(replace(row, spearman=float("nan")) for row in GOOD.audit.rows)
    entry = reports_module._entry(replace(GOOD, audit=replace(GOOD.audit, rows=rows)), "n", "b", "1.html")
    assert Outline(render_index([entry])).row("n")[8] == "–"
