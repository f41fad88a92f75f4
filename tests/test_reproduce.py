"""`reproduce`: the list of figures, the ones without a model, bad input, runs that fail."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oversquash_lens.errors import InputError, ModelError
from oversquash_lens.paper import reproduce as reproducing
from oversquash_lens.paper.reproduce import FIGURES, LENGTHS, Reproduced, chosen_figures, reproduce
from oversquash_lens.viz import reports as gallery
from oversquash_lens.viz.chart import Chart, Panel, Series, Verdict

SYNTHETIC = ("8", "9", "10")
WITH_A_MODEL = tuple(name for name in FIGURES if name not in SYNTHETIC)
FILES = ("pdf", "svg", "png", "csv", "json")
BEGINNING = {"pdf": b"%PDF-", "svg": b"<?xml", "png": b"\x89PNG\r\n\x1a\n", "csv": b"panel,series", "json": b"{"}


def rough(name: str, held: bool | None = True) -> Chart:
    """A chart that is quickly drawn; another verdict, another picture."""
    panel = Panel("", series=(Series("a", (1, 2), (1.0, 2.0 if held else 1.0)),))
    return Chart(name, f"Figure {name}", (panel,), (Verdict("a claim", "a number", held),))


def read(folder: Path, kind: str = "*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(kind))}


def numbers(text: str) -> float:
    return float(text) if text else math.nan


def check_files(one: Reproduced, folder: Path) -> None:
    """Five files that begin as such files do, the CSV with the JSON's numbers and the chart's."""
    assert one.files == {kind: folder / f"{one.name}.{kind}" for kind in FILES}
    for kind, path in one.files.items():
        assert path.read_bytes().startswith(BEGINNING[kind]), kind
    written = json.loads(one.files["json"].read_text("utf-8"))
    assert written == one.chart.to_dict()
    rows = list(csv.DictReader(one.files["csv"].read_text("utf-8").splitlines()))
    drawn = [row for row in rows if row["kind"] != "paths"]
    expected = [
        (panel["title"], line["label"], x, y)
        for panel in written["panels"]
        for line in panel["series"]
        for x, y in zip(line["x"], line["y"], strict=True)
    ]
    assert len(drawn) == len(expected) > 0
    for row, (panel, line, x, y) in zip(drawn, expected, strict=True):
        assert (row["panel"], row["series"], numbers(row["x"])) == (panel, line, x)
        assert numbers(row["y"]) == y or (y is None and not math.isfinite(numbers(row["y"])))


# ---------------------------------------------------------------- the list of figures


def test_every_figure_of_the_paper_has_a_recipe() -> None:
    assert tuple(FIGURES) == (*map(str, range(1, 13)), *gallery.AFTER_NUMBERS)
    assert {name for name, recipe in FIGURES.items() if recipe.synthetic} == set(SYNTHETIC)
    assert set(LENGTHS) <= set(WITH_A_MODEL)
    for name, recipe in FIGURES.items():
        assert recipe.title
        assert recipe.source.split(":")[1].removeprefix("figure_") == name


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        (["5"], ("5",)),
        (["12", "2", "10"], ("2", "10", "12")),
        (["window", "1", "window", "1"], ("1", "window")),
        ([8, 9], ("8", "9")),
        (["all"], tuple(FIGURES)),
        (["3", "all"], tuple(FIGURES)),
    ],
)
def test_figures_come_once_each_in_the_papers_order(asked: list, chosen: tuple[str, ...]) -> None:
    assert chosen_figures(asked) == chosen


@pytest.mark.parametrize(
    ("asked", "said"), [(["13"], "figure 13"), (["5", "shape", "0"], "figure 0 shape"), ([], "none")]
)
def test_unknown_figures_are_named(asked: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        chosen_figures(asked)
    assert "expected any of 1, 2, 3," in str(caught.value)


def test_the_synthetic_figures_need_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_models(monkeypatch)
    found = reproduce(list(SYNTHETIC), out=tmp_path)
    assert [one.name for one in found] == list(SYNTHETIC)
    for one in found:
        check_files(one, tmp_path)
        assert [verdict.held for verdict in one.chart.verdicts] == [True] * len(one.chart.verdicts)
    assert {path.name for path in tmp_path.iterdir()} == {
        "index.html",
        *(f"{name}.{kind}" for name in SYNTHETIC for kind in FILES),
    }


# ---------------------------------------------------------------- bad input, before any model is loaded


def forbid_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("oversquash_lens.models.loading.load_model", refuse)
    monkeypatch.setattr("oversquash_lens.models.loading.load_twin", refuse)


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown figure": (["5", "13"], {}, "expected any of 1, 2, 3, .* or all, got figure 13"),
    "no figure": ([], {}, r"got figure \(none\)"),
    "unknown option": ("5", {"lenght": 3, "quik": True}, r"expected some of bos, .*, got options \['lenght', 'quik'\]"),
    "longest, too short": (
        ["8", "2"],
        {"longest": 99},
        "expected at least 100, the shortest of figure 2, got a longest length of 99",
    ),
    "longest, zero": ("all", {"longest": 0, "quick": True}, "got a longest length of 0"),
    "number format": ("5", {"dtypes": ("float32", "float7")}, "got 'float7' as the format to compute in"),
    "computing in float8": ("5", {"dtypes": ("float8_e4m3",)}, "no device here computes in it"),
    "samples": ("3", {"samples": 0}, "expected at least 1, as a whole number, got samples=0"),
    "probes": ("ushape", {"probes": 0}, "expected at least 1, as a whole number, got probes=0"),
    "temperature": ("3", {"temperature": -0.5}, r"expected 0 \(greedy\) or more, got temperature=-0.5"),
    "a number as the model": ("5", {"model": 7}, "expected a name, a path or a hooked model, got a int as the model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_models(monkeypatch)
    figures, options, said = BAD[name]
    with pytest.raises(InputError, match=said) as caught:
        reproduce(figures, out=tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_models(monkeypatch)
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "taken" / "index.html").mkdir(parents=True)
    for out, said in (("file", "cannot be made"), ("file/below", "cannot be made"), ("taken", "is a folder")):
        with pytest.raises(InputError, match=said):
            reproduce("5", out=tmp_path / out)
    monkeypatch.setattr(os, "access", lambda *arguments, **options: False)
    with pytest.raises(InputError, match="cannot be written to"):
        reproduce("5", out=tmp_path / "locked")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    for name in ("1", "2"):
        with pytest.raises(ModelError, match="Unknown model"):
            reproduce(name, "no/such.gguf", tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- runs that are broken off


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], Chart]]:
    """Every figure's chart by name, made at once unless the test puts something else there."""
    makers: dict[str, Callable[[], Chart]] = {name: lambda name=name: rough(name) for name in FIGURES}
    monkeypatch.setattr(reproducing.Recipe, "chart", lambda self, config: makers[name_of(self)]())
    return makers


def name_of(recipe: reproducing.Recipe) -> str:
    (name,) = (name for name, each in FIGURES.items() if each is recipe)
    return name


@pytest.mark.parametrize("trouble", [InputError("a prompt too long"), KeyboardInterrupt()])
def test_a_recipe_that_fails_leaves_the_earlier_figures(trouble: BaseException, recipes: dict, tmp_path: Path) -> None:
    def fail() -> Chart:
        raise trouble

    recipes["5"] = fail
    done: list[Reproduced] = []
    with pytest.raises(type(trouble)):
        reproduce(["1", "3", "5", "12"], out=tmp_path, done=done.append)
    assert [one.name for one in done] == ["1", "3"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "index.html",
        *(f"{n}.{kind}" for n in "13" for kind in FILES),
    }
    page = (tmp_path / "index.html").read_text("utf-8")
    assert [f'id="figure-{name}"' in page for name in ("1", "3", "5", "12")] == [True, True, False, False]
    recipes["5"] = lambda: rough("5", held=False)
    reproduce(["5", "12"], out=tmp_path)
    page = (tmp_path / "index.html").read_text("utf-8")
    assert all(f'id="figure-{name}"' in page for name in ("1", "3", "5", "12"))
    assert "Of 4 claims, 3 held, 1 did not hold." in page


def test_a_disk_full_at_any_file_leaves_old_or_new(
    recipes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five files and the index: each is as it was or as it is to be, and no draft stays."""
    charts = rough("1", held=True), rough("1", held=False)
    states = []
    for folder, chart in zip((tmp_path / "old", tmp_path / "new"), charts, strict=True):
        recipes["1"] = lambda chart=chart: chart
        reproduce("1", out=folder)
        states.append(read(folder))
    old, new = states
    replace_, left = os.replace, [0]

    def fail(source: Any, target: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        replace_(source, target)

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(gallery.figures, "_as_bytes", lambda figure, kind, name: new[f"{name}.{kind}"])
    for at in range(6):
        left[0] = at
        with pytest.raises(InputError, match="No space left on device"):
            reproduce("1", out=tmp_path / "old")
        found = read(tmp_path / "old", "*.*")
        assert set(found) == set(old)
        assert sum(found[name] != old[name] for name in found) == at
        assert all(content in (old[name], new[name]) for name, content in found.items())


def test_what_was_made_says_itself(tmp_path: Path) -> None:
    (made,) = reproduce("9", out=tmp_path)
    assert repr(made).startswith("Figure 9: total variation of softmax(x) and softmax(x*)")
    assert len(repr(made).splitlines()) <= 12
    assert list(made.to_frame()["verdict"]) == [one.word for one in made.chart.verdicts]
    written = made.to_dict()
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert written["files"]["csv"] == str(tmp_path / "9.csv")
