"""The folder of figures and its index page: every number in a file, every verdict in a word, nothing that could act."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_charts import ALL, collapse, decay, graph, marks
from small_results import EVIL
from test_page import Outline

from oversquash_lens.errors import InputError
from oversquash_lens.viz import figures
from oversquash_lens.viz.chart import Chart, Panel, Series, Table, Verdict
from oversquash_lens.viz.reports import write_chart, write_index

FILES = ("pdf", "svg", "png", "csv", "json")


def page_of(folder) -> Outline:
    return Outline(write_index(folder).read_text("utf-8"))


def text_of(outline: Outline) -> str:
    return re.sub(r"\s+", " ", " ".join(outline.text))


def rough(name: str, title: str = "A title", **rest: object) -> Chart:
    """A chart that is quickly drawn."""
    return Chart(name, title, (Panel("", series=(Series("a", (1, 2), (1.0, 2.0)),)),), (), **rest)


def write_json(folder, chart: Chart) -> None:
    """The chart's data without its pictures, which take time."""
    (folder / f"{chart.name}.json").write_text(json.dumps(chart.to_dict()))


# -- a chart as data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ALL)
def test_a_chart_survives_json(make) -> None:
    chart = make()
    values = json.loads(json.dumps(chart.to_dict(), allow_nan=False))
    again = Chart.from_dict(values)
    assert again.to_dict() == chart.to_dict() == values
    for one, other in zip(chart.panels, again.panels, strict=True):
        assert one.paths == other.paths
        assert (one.reference, one.x_axis, one.x_names) == (other.reference, other.x_axis, other.x_names)
        for mine, theirs in zip(one.series, other.series, strict=True):
            assert np.array_equal(mine.y, theirs.y, equal_nan=True)
    assert again.verdicts == chart.verdicts


@pytest.mark.parametrize("make", ALL)
def test_every_number_is_in_the_csv(make) -> None:
    chart = make()
    rows = list(csv.DictReader(chart.to_csv().splitlines()))
    expected = [
        (panel.title, one.label, one.kind, *row)
        for panel in chart.panels
        for one in panel.series
        for row in zip(one.x, one.y, one.low or [None] * len(one.x), one.high or [None] * len(one.x), strict=True)
    ]
    edges = [(panel.title, *edge) for panel in chart.panels if panel.paths for edge in panel.paths.edges]
    assert len(rows) == len(expected) + len(edges)
    for (panel, label, kind, *numbers), row in zip(
        expected, (row for row in rows if row["kind"] != "paths"), strict=True
    ):
        assert (row["panel"], row["series"], row["kind"]) == (panel, label, kind)
        found = [float(row[name]) if row[name] else None for name in ("x", "y", "low", "high")]
        assert all(
            a == b or (a is not b and math.isnan(a) and math.isnan(b)) for a, b in zip(found, numbers, strict=True)
        )
    for (panel, layer, *numbers), row in zip(edges, (row for row in rows if row["kind"] == "paths"), strict=True):
        assert (row["panel"], row["series"]) == (panel, f"layer {layer}")
        assert [int(row[name]) for name in ("x", "y", "low")] == numbers


def test_tensors_and_arrays_become_numbers() -> None:
    data = {"a": torch.tensor([1.0, math.inf]), "b": np.float32(0.5), 3: np.arange(2), "c": (True, None)}
    assert rough("x", data=data).to_dict()["data"] == {"a": [1.0, None], "b": 0.5, "3": [0, 1], "c": [True, None]}
    with pytest.raises(InputError, match="a set in it"):
        rough("x", data={"a": {1, 2}}).to_dict()


# -- files ---------------------------------------------------------------------------------------------------


def test_a_chart_becomes_five_files(tmp_path) -> None:
    chart = collapse()
    written = write_chart(chart, tmp_path / "made" / "here")
    assert {kind: path.name for kind, path in written.items()} == {kind: f"5.{kind}" for kind in FILES}
    assert {path.name for path in (tmp_path / "made" / "here").iterdir()} == {f"5.{kind}" for kind in FILES}
    assert json.loads(written["json"].read_text()) == chart.to_dict()
    assert written["csv"].read_text() == chart.to_csv()


def test_writing_twice_gives_the_same_bytes(tmp_path) -> None:
    both = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        for make in (marks, graph):
            write_chart(make(), folder)
        write_index(folder)
        both.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert both[0] == both[1]
    assert len(both[0]) == 11


def test_a_figure_made_again_replaces_the_first(tmp_path) -> None:
    write_chart(rough("5", "The first"), tmp_path)
    write_index(tmp_path)
    write_chart(rough("5", "The second"), tmp_path)
    text = text_of(page_of(tmp_path))
    assert "The second" in text
    assert "The first" not in text


def test_a_place_that_cannot_be_written_is_noticed_before_work(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda *args: False)  # chmod would not stop a test that root runs
    monkeypatch.setattr(figures, "chart", None)
    for write in (lambda: write_chart(decay(), tmp_path), lambda: write_index(tmp_path)):
        with pytest.raises(InputError, match="cannot be written to") as caught:
            write()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_name_that_leaves_the_folder_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="file name"):
        write_chart(rough("../5"), tmp_path / "in")
    assert not list(tmp_path.iterdir())


# -- the page ------------------------------------------------------------------------------------------------


def test_the_page_says_all_that_a_chart_says(tmp_path) -> None:
    write_chart(collapse(), tmp_path)
    outline = page_of(tmp_path)
    text = text_of(outline)
    chart = collapse()
    for said in (chart.title, chart.model, *chart.setup, *chart.notes, "Figure 5", "Readings"):
        assert said in text
    for verdict, word in zip(chart.verdicts, ("held", "did not hold", "not decided"), strict=True):
        assert str(verdict) == f"{word}: {verdict.claim} ({verdict.number})"
        assert str(verdict) in text
    assert "Of 3 claims, 1 held, 1 did not hold, 1 not decided." in text
    assert outline.row("L1") == ["L1", "296", "7.7"]
    assert outline.row("L2") == ["L2", "12.5", "–"]
    links = [attrs["href"] for tag, attrs in outline.tags if tag == "a" and not attrs["href"].startswith("#")]
    assert links == [f"5.{kind}" for kind in FILES]
    (image,) = [attrs for tag, attrs in outline.tags if tag == "img"]
    assert image["src"].startswith("data:image/png;base64,")
    assert chart.title in image["alt"]
    assert (int(image["width"]), int(image["height"])) == tuple(
        (figures.chart(chart).get_size_inches() * 200).astype(int)
    )


def test_a_figure_s_number_is_said_once(tmp_path) -> None:
    write_json(tmp_path, rough("5", "Figure 5: a picture"))
    text = text_of(page_of(tmp_path))
    assert "Figure 5 a picture" in text
    assert "Figure 5: a picture" not in text


def test_figures_stand_in_the_paper_s_order(tmp_path) -> None:
    order = ["1", "2", "5", "5-layers", "10", "12", "ushape", "window", "remedies", "another", "zebra"]
    for name in sorted(order):
        write_json(tmp_path, rough(name))
    outline = page_of(tmp_path)
    ids = [attrs["id"] for tag, attrs in outline.tags if tag == "section" and "id" in attrs]
    assert ids == [f"figure-{name}" for name in order]
    assert [attrs["href"] for tag, attrs in outline.tags if tag == "a" and attrs["href"].startswith("#")] == [
        f"#{each}" for each in ids
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"kind": "chart", ',
        b"\xff\xfe\x00",
        b'{"kind": "chart"}',
        b'{"kind": "chart", "panels": 3}',
        b"[" * 100_000,
        json.dumps({**collapse().to_dict(), "verdicts": [{"claim": "a", "number": "1", "held": "yes"}]}).encode(),
        json.dumps({**collapse().to_dict(), "panels": [{"title": "a"}]}).encode(),
        json.dumps({**collapse().to_dict(), "title": 3, "setup": None}).encode(),
        json.dumps({**collapse().to_dict(), "tables": [{"title": "t", "columns": ["a"], "rows": [1]}]}).encode(),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(content, tmp_path) -> None:
    write_json(tmp_path, rough("2", "An undamaged one"))
    (tmp_path / "5.json").write_bytes(content)
    outline = page_of(tmp_path)
    text = text_of(outline)
    assert "An undamaged one" in text
    assert "Files that cannot be read" in text
    assert "5.json" in text
    assert [attrs["id"] for tag, attrs in outline.tags if tag == "section" and "id" in attrs] == ["figure-2"]


def test_files_that_are_no_charts_are_left_alone(tmp_path) -> None:
    write_json(tmp_path, rough("2"))
    (tmp_path / "answers.json").write_text('{"kind": "answers"}')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "._2.json").write_bytes(b"\x00\x05\x16")  # as some systems lay beside a file
    text = text_of(page_of(tmp_path))
    assert "cannot be read" not in text.replace("2.png cannot be read", "")
    assert "answers" not in text
    assert (tmp_path / "answers.json").read_text() == '{"kind": "answers"}'


def test_a_lost_picture_is_said(tmp_path) -> None:
    write_chart(rough("2"), tmp_path)
    (tmp_path / "2.png").unlink()
    outline = page_of(tmp_path)
    assert "2.png cannot be read: No such file or directory" in text_of(outline)
    assert "2.png" not in [attrs.get("href") for _, attrs in outline.tags]


def test_an_empty_folder_has_a_page_too(tmp_path) -> None:
    assert "There is no figure in this folder yet." in text_of(page_of(tmp_path))


def test_nothing_in_a_chart_becomes_markup(tmp_path) -> None:
    quiet = Outline(write_index(_with_words(tmp_path / "quiet", ("word",) * len(EVIL))).read_text("utf-8"))
    html = write_index(_with_words(tmp_path / "loud", EVIL)).read_text("utf-8")
    loud = Outline(html)
    assert [tag for tag, _ in loud.tags] == [tag for tag, _ in quiet.tags]
    assert "script" not in {tag for tag, _ in loud.tags}
    assert not {name for _, attrs in loud.tags for name in attrs if name.startswith("on")}
    assert "</script><img src=x onerror=document.title='pwned'>" in text_of(loud)
    assert html.isascii()


def _with_words(folder, words):
    folder.mkdir()
    verdicts = tuple(Verdict(word, word, held) for word, held in zip(words, (True, False, None) * 4, strict=False))
    table = Table(words[0], words, (words, words))
    text = {"title": words[0], "model": words[1], "setup": words, "notes": words, "tables": (table,)}
    write_json(folder, replace(rough("1"), verdicts=verdicts, **text))
    (folder / "2.json").write_text("<img src=x onerror=document.title=1>")
    return folder


def test_the_page_loads_nothing_and_runs_nothing(tmp_path) -> None:
    write_chart(decay(), tmp_path)
    html = write_index(tmp_path).read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    assert "script-src" not in policy
    assert not re.search(r"<script|https?://|url\(|@import", html)
    assert all(attrs["src"].startswith("data:") for _, attrs in Outline(html).tags if "src" in attrs)


def test_the_page_is_accessible_in_its_markup(tmp_path) -> None:
    write_chart(collapse(), tmp_path)
    outline = page_of(tmp_path)
    tags = [tag for tag, _ in outline.tags]
    assert ("html", {"lang": "en"}) in outline.tags
    assert tags.count("h1") == 1
    assert tags.count("table") == tags.count("caption") == 1
    assert all(attrs.get("scope") == "col" for tag, attrs in outline.tags if tag == "th")
    signs = [attrs["aria-label"] for tag, attrs in outline.tags if tag == "span" and attrs.get("role") == "img"]
    assert signs == ["held", "did not hold", "not decided"]
    ids = {attrs["id"] for _, attrs in outline.tags if "id" in attrs}
    assert {attrs["href"][1:] for tag, attrs in outline.tags if tag == "a" and attrs["href"].startswith("#")} <= ids
