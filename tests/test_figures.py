"""Figures: what is drawn is what the chart says, nothing covers anything, and the same chart gives the same bytes."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import StepPatch
from matplotlib.text import Annotation, Text
from small_charts import ALL, LENGTHS, PRECISION, collapse, decay, graph, grid, histogram, many_legends, marks, paths
from small_results import EVIL, TOKENS, profile, truth

from oversquash_lens.errors import InputError, visible
from oversquash_lens.paths.squashing import count_paths
from oversquash_lens.viz import figures
from oversquash_lens.viz.chart import Chart, Panel, Series
from oversquash_lens.viz.style import COLOURS, MARKERS, RIGHT, SOFT, WRONG, log_ticks, printable, scale
from oversquash_lens.viz.words import axis_number, visible_token


def one_panel(*series: Series, **rest: object) -> Chart:
    return Chart("one", "One", (Panel("", "x", "y", series, **rest),), ())


def drawn(chart: Chart) -> Figure:
    figure = figures.chart(chart)
    figure.draw_without_rendering()
    return figure


def rows(axes) -> dict[tuple, list[tuple[float, float]]]:
    """Points of the axes' lines by what they look like: colour, line style and marker."""
    return {
        (to_hex(line.get_color()), line.get_linestyle(), line.get_marker()): list(zip(*line.get_data(), strict=True))
        for line in axes.lines
    }


def same(one, other) -> bool:
    return np.shape(one) == np.shape(other) and np.allclose(
        np.asarray(one, float), np.asarray(other, float), rtol=1e-12, equal_nan=True
    )


def tick_labels(axis) -> dict[str, float]:
    return {tick.label1.get_text(): tick.get_loc() for tick in axis.get_major_ticks()}


def words(figure: Figure) -> str:
    """Every text of the figure."""
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def legend_labels(owner) -> list[str]:
    return [text.get_text() for text in owner.get_texts()]


# -- lines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [collapse, decay, grid, many_legends])
def test_every_number_of_every_series_is_drawn_at_its_place(make) -> None:
    chart = make()
    for panel, axes in zip(chart.panels, drawn(chart).axes, strict=True):
        found = [np.transpose(line.get_data()) for line in axes.lines]
        values = sorted({x for one in panel.series for x in one.x})
        for one in panel.series:
            x = [values.index(each) for each in one.x] if panel.x_axis == "category" else one.x
            zero = tick_labels(axes.yaxis).get("0", math.nan)
            y = [zero if panel.y_axis == "log" and each == 0 else each for each in one.y]
            assert any(len(row) == len(x) and same(row, np.transpose([x, y])) for row in found), one.label
        if panel.x_axis == "category":
            assert tick_labels(axes.xaxis) == {axis_number(value): place for place, value in enumerate(values)}
        assert axes.get_yscale() == ("linear" if panel.y_axis == "linear" else "log")


def test_bands_run_from_low_to_high() -> None:
    chart = collapse()
    for panel, axes in zip(chart.panels, drawn(chart).axes, strict=True):
        bands = [each for each in axes.collections if isinstance(each, PolyCollection)]
        series = [one for one in panel.series if one.low is not None]
        assert len(bands) == len(series) > 0
        for one, band in zip(series, bands, strict=True):
            corners = np.concatenate([path.vertices for path in band.get_paths()])
            for place, (low, high) in enumerate(zip(one.low, one.high, strict=True)):
                ends = corners[np.isclose(corners[:, 0], place), 1]
                if high > 0:
                    assert ends.min() == pytest.approx(low)
                    assert ends.max() == pytest.approx(high)
                else:
                    assert math.isnan(high) == (len(ends) == 0)
            assert band.get_facecolor()[0][3] < 0.3


def test_gaps_stay_gaps_and_lone_points_are_seen() -> None:
    y = [float(k) for k in range(100)]
    y[10] = y[50] = y[52] = math.nan
    (line,) = drawn(one_panel(Series("a", tuple(range(100)), tuple(y)))).axes[0].lines
    assert same(line.get_ydata(), y)
    assert list(line.get_markevery()) == [51]  # no line reaches it
    assert line.get_marker() == MARKERS[0]


def test_long_lines_have_no_markers() -> None:
    (line,) = drawn(one_panel(Series("a", tuple(range(100)), tuple(range(100))))).axes[0].lines
    assert line.get_marker() in ("None", None, "")


def test_zero_on_a_log_axis_stands_at_the_edge_and_says_so() -> None:
    figure = drawn(collapse())
    axes = figure.axes[0]
    bottom = axes.get_ylim()[0]
    assert tick_labels(axes.yaxis)["0"] == pytest.approx(bottom)
    (edge,) = [line for line in axes.lines if line.get_marker() == "v" and line.get_linestyle() == "None"]
    assert list(edge.get_xdata()) == [7, 8]
    assert np.allclose(edge.get_ydata(), bottom)
    assert "▼ 0 = bit-equal" in [text.get_text() for text in axes.texts]
    assert "0" not in tick_labels(figure.axes[1].yaxis)
    assert bottom < min(min(one.y) for one in collapse().panels[1].series)


def test_infinity_and_negative_numbers_on_a_log_axis() -> None:
    chart = one_panel(Series("a", (1, 2, 3, 4), (1.0, math.inf, -2.0, 10.0)), y_axis="log")
    axes = drawn(chart).axes[0]
    top = axes.get_ylim()[1]
    line, edge = axes.lines
    assert same(line.get_ydata(), [1.0, top, math.nan, 10.0])
    assert edge.get_marker() == "^"
    assert list(edge.get_xdata()) == [2]
    (note,) = [text.get_text() for text in axes.texts]
    assert "▲ infinity" in note
    assert "negative numbers have no place" in note


def test_the_reference_is_a_dashed_line_at_its_value() -> None:
    figure = drawn(collapse())
    for axes in figure.axes:
        (line,) = [line for line in axes.lines if same(line.get_ydata(), [PRECISION, PRECISION])]
        assert list(line.get_xdata()) == [0, 1]  # of the axes' width
        assert line.is_dashed()
    assert "precision, 2⁻⁷" in legend_labels(figure.legends[0])


def test_what_the_paper_printed_is_open_dotted_and_grey() -> None:
    figure = drawn(collapse())
    for axes in figure.axes:
        (line,) = [line for line in axes.lines if line.get_linestyle() == ":"]
        assert line.get_markerfacecolor() == "white"
        assert line.get_color() == SOFT
        assert line.get_linewidth() < 1
    assert "paper (Gemma 7B)" in legend_labels(figure.legends[0])


def test_what_belongs_to_a_line_has_its_colour() -> None:
    figure = drawn(decay())
    (line,) = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert line.get_color() == COLOURS[0]
    assert "paper (kind 1)" in legend_labels(figure.legends[0])
    floor = Series("a", (1, 2), (0.1, 0.1), kind="floor")
    figure = drawn(one_panel(Series("a", (1, 2), (1.0, 2.0)), floor))
    assert [line.get_color() for line in figure.axes[0].lines] == [COLOURS[0]] * 2
    assert legend_labels(figure.legends[0]) == ["a", "a: rounding alone"]


def test_the_floor_is_a_thin_grey_line() -> None:
    for axes in drawn(collapse()).axes:
        (line,) = [line for line in axes.lines if len(line.get_ydata()) == 9 and same(line.get_ydata(), [2e-5] * 9)]
        assert line.get_color() == SOFT
        assert line.get_linewidth() < 1


def test_a_label_looks_the_same_in_every_panel() -> None:
    figure = drawn(grid())
    looks = {tuple((line.get_color(), line.get_marker()) for line in axes.lines) for axes in figure.axes}
    assert looks == {tuple(zip(COLOURS[:2], MARKERS[:2], strict=True))}
    assert [legend_labels(each) for each in figure.legends] == [["free", "by likelihood"]]


def test_panels_without_shared_labels_have_their_own_legends() -> None:
    figure = drawn(many_legends())
    assert not figure.legends
    for r, axes in enumerate(figure.axes):
        assert sorted(legend_labels(axes.get_legend())) == [f"remedy {r}, setting {s}" for s in range(4)]


def test_colours_are_told_apart_by_the_colour_blind() -> None:
    """Brettel-like check in Machado et al. (2009)'s full deuteranopia and protanopia: no two colours come close."""
    matrices = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    }
    for matrix in matrices.values():
        seen = []
        for colour in COLOURS:
            rgb = np.asarray(to_rgba(colour)[:3])
            linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
            mixed = np.clip(np.asarray(matrix) @ linear, 0, 1)
            seen.append(np.where(mixed <= 0.0031308, 12.92 * mixed, 1.055 * mixed ** (1 / 2.4) - 0.055))
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.14


# -- other kinds ---------------------------------------------------------------------------------------------


def test_bars_stand_where_the_numbers_are() -> None:
    chart = histogram()
    axes = drawn(chart).axes[0]
    outlines = [patch for patch in axes.patches if isinstance(patch, StepPatch)]
    for one, outline in zip(chart.panels[0].series, outlines, strict=True):
        values, edges, _ = outline.get_data()
        middles = (np.asarray(edges[:-1]) + edges[1:]) / 2
        height = dict(zip(np.round(middles, 6).tolist(), values, strict=True))
        assert all(height[x] == y for x, y in zip(one.x, one.y, strict=True))
        assert sum(values) == sum(one.y)
        assert np.allclose(np.diff(edges)[values > 0], 5)
    assert [outline.get_fill() for outline in outlines] == [True, False, False]
    assert axes.get_ylim()[0] == 0


def test_marks_are_counted_and_placed() -> None:
    chart = marks()
    for panel, axes in zip(chart.panels, drawn(chart).axes, strict=True):
        found = {
            (float(x), float(y), to_hex(line.get_color()).upper())
            for line in axes.lines
            for x, y in zip(*line.get_data(), strict=True)
        }
        expected = {
            (x, row, RIGHT if mark else WRONG)
            for row, one in enumerate(panel.series)
            for x, mark in zip(one.x, one.y, strict=True)
            if not math.isnan(mark)
        }
        assert found == expected
        assert list(tick_labels(axes.yaxis)) == [one.label for one in panel.series]
        assert axes.yaxis_inverted()


def test_right_and_wrong_have_different_shapes_and_a_legend() -> None:
    figure = drawn(marks())
    shapes = {to_hex(line.get_color()).upper(): len(line.get_marker().vertices) for line in figure.axes[0].lines}
    assert len(set(shapes.values())) == 2
    assert sorted(legend_labels(figure.legends[0])) == ["right", "wrong"]


@pytest.mark.parametrize("token", range(5))
def test_paths_are_drawn_edge_by_edge(token) -> None:
    graph = paths(token)
    figure = drawn(Chart("p", "p", (Panel("", paths=graph),), ()))
    (edges,) = [each for each in figure.axes[0].collections if isinstance(each, LineCollection)]
    drawn_edges = [tuple(map(tuple, segment.tolist())) for segment in edges.get_segments()]
    assert drawn_edges == [((source, layer), (to, layer + 1)) for layer, source, to, _ in graph.edges]
    counts = [count for *_, count in graph.edges]
    assert np.array_equal(np.argsort(np.argsort(edges.get_linewidths())), np.argsort(np.argsort(counts)))
    opacity = edges.get_colors()[:, 3]
    assert all(
        (opacity[i] > opacity[j]) == (counts[i] > counts[j]) for i, j in itertools.permutations(range(len(counts)), 2)
    )
    assert graph.total == math.comb(4 - token + 2, 2) == round(count_paths(5, 3).values[token].item())
    assert f"{graph.total} paths from {'abcde'[token]} to the last token" in words(figure)


def test_nodes_hold_the_number_of_paths_through_them() -> None:
    figure = drawn(Chart("p", "p", (Panel("", paths=paths(0)),), ()))
    axes = figure.axes[0]
    written = {
        tuple(map(int, text.get_position())): int(text.get_text()) for text in axes.texts if text.get_text().isdigit()
    }
    below, above = count_paths(5, 1).values, count_paths(5, 2).values  # one and two layers, by position
    expected = {(place, 1): round(above[place].item()) for place in range(5)}
    expected |= {(place, 2): (place + 1) * round(below[place].item()) for place in range(5)}
    assert written == expected | {(0, 0): 15, (4, 3): 15}
    fills = {(line.get_xdata()[0], line.get_ydata()[0]): line.get_markerfacecolor() for line in axes.lines}
    assert [place for place, fill in fills.items() if fill == COLOURS[1]] == [(0, 0)]
    assert [place for place, fill in fills.items() if fill == COLOURS[0]] == [(4, 3)]
    assert list(tick_labels(axes.xaxis)) == list("abcde")
    assert list(tick_labels(axes.yaxis)) == ["embeddings", "after layer 0", "after layer 1", "after layer 2"]


def test_a_panel_in_which_nothing_was_measured_says_so() -> None:
    lost = Series("a", (1, 2), (math.nan, math.nan))
    figure = drawn(Chart("n", "n", (Panel("empty"), Panel("lost", series=(lost,), y_axis="log")), ()))
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["nothing measured"] * 2


# -- the sheet -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ALL)
def test_nothing_covers_anything_and_all_is_on_the_sheet(make) -> None:
    check_sheet(drawn(make()))


def check_sheet(figure: Figure) -> None:
    sheet = figure.bbox
    boxes = [axes.get_tightbbox() for axes in figure.axes]  # with labels, title, note and own legend
    boxes += [legend.get_window_extent() for legend in figure.legends]
    boxes += [text.get_window_extent() for text in figure.texts if text.get_text()]
    for box in boxes:
        assert sheet.x0 - 1 <= box.x0 < box.x1 <= sheet.x1 + 1
        assert sheet.y0 - 1 <= box.y0 < box.y1 <= sheet.y1 + 1
    for one, other in itertools.combinations(boxes, 2):
        overlap = one.intersection(one, other)
        assert overlap is None or min(overlap.width, overlap.height) < 1
    for axes in figure.axes:
        plot = axes.get_window_extent()
        above = [axes.title, axes._left_title, *(text for text in axes.texts if isinstance(text, Annotation))]
        heads = [each.get_window_extent() for each in above if not hasattr(each, "get_text") or each.get_text()]
        assert all(head.y0 >= plot.y1 - 1 for head in heads)
        assert plot.height > 30
        if axes.get_legend():
            assert axes.get_legend().get_window_extent().x0 >= plot.x1 - 1
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
            for one, other in itertools.pairwise(sorted(labels, key=lambda box: (box.x0, box.y0))):
                overlap = one.intersection(one, other)
                assert overlap is None or min(overlap.width, overlap.height) < 0.5


def test_panels_stand_in_the_asked_number_of_columns() -> None:
    for chart, shape in ((grid(), (3, 4)), (collapse(), (2, 2)), (replace(collapse(), columns=4), (1, 4))):
        grids = [axes.get_subplotspec().get_geometry()[:2] for axes in figures.chart(chart).axes]
        assert set(grids) == {shape}


def test_long_titles_are_broken() -> None:
    chart = replace(collapse(), title="word " * 60)
    figure = drawn(chart)
    title = figure.texts[0]
    assert title.get_text().split() == chart.title.split()
    assert title.get_window_extent().width <= figure.bbox.width


def test_words_are_shown_as_they_are() -> None:
    """No TeX in a dollar, no crash and no warning from what the font does not have."""
    hostile = ("$x_1$ and $y", "漢字", "\x00\ud800", r"\$\frac{", "<b>&amp;", "_hidden", "👩‍👧")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for word in hostile:
            series = (Series(word, (1, 2), (1.0, 2.0)), Series(f"{word} printed", (1, 2), (1.0, 2.0), kind="published"))
            panel = Panel(word, word, word, series, reference=(1.0, word), note=word)
            figure = figures.chart(Chart("w", word, (panel,), (), model=word))
            for kind in figures.FORMATS:
                figure.savefig(io.BytesIO(), format=kind)
            assert words(figure).count(printable(word)) >= 7


def test_figures_need_no_pyplot_and_import_matplotlib_when_drawing() -> None:
    code = (
        "import sys; from oversquash_lens.viz import figures, reports\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from small_charts import decay\n"
        "figures.chart(decay())\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(figures.__file__).parents[2])])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True, timeout=300)


def test_a_notebook_gets_a_png() -> None:
    payload, size = figures.chart(decay())._repr_png_()
    assert payload.startswith(b"\x89PNG")
    assert size["width"] / size["height"] == pytest.approx(
        np.divide(*imread(io.BytesIO(payload)).shape[1::-1]), rel=0.01
    )


# -- results -------------------------------------------------------------------------------------------------


def test_a_profile_is_drawn_as_shares() -> None:
    result = profile()
    axes = drawn_figure(figures.profile(result)).axes[0]
    assert same(axes.lines[0].get_ydata(), result.share)
    assert same(axes.lines[1].get_ydata(), [1 / len(TOKENS)] * 2)
    assert tick_labels(axes.xaxis) == {visible_token(token): i for i, token in enumerate(TOKENS)}
    assert axes.get_yscale() == "log"


def test_a_profile_is_drawn_as_powers_of_ten() -> None:
    result = profile(constant=50.0)
    axes = drawn_figure(figures.profile(result, "log10")).axes[0]
    assert same(axes.lines[0].get_ydata(), result.log_values / math.log(10))
    assert axes.get_yscale() == "linear"


def test_positions_without_a_path_stand_at_the_edge() -> None:
    result = profile()
    result.log_by_layer[0, 3] = -math.inf
    figure = drawn_figure(figures.profile(result))
    assert "▼ 0 = no path" in words(figure)
    (edge,) = [line for line in figure.axes[0].lines if line.get_marker() == "v"]
    assert list(edge.get_xdata()) == [3]
    assert "▼ minus infinity" in words(figures.profile(result, "log10"))


def test_the_truth_is_drawn_with_its_standard_error() -> None:
    result = truth(exact=False)
    for value, of in (("share", lambda row: row / result.values.sum()), ("log10", torch.log10)):
        figure = drawn_figure(figures.sensitivity(result, value))
        assert same(figure.axes[0].lines[0].get_ydata(), of(result.values))
        corners = np.concatenate([path.vertices for path in figure.axes[0].collections[0].get_paths()])
        ends = [corners[np.isclose(corners[:, 0], i), 1] for i in range(len(TOKENS))]
        assert same([end.min() for end in ends], of(result.values - result.standard_error))
        assert same([end.max() for end in ends], of(result.values + result.standard_error))
        assert "16 probes" in words(figure)
    assert not figures.sensitivity(truth(exact=True)).axes[0].collections


def test_names_of_a_long_prompt_are_thinned() -> None:
    axes = drawn_figure(figures.profile(profile(tokens=tuple(f" word{i}" for i in range(700))))).axes[0]
    labels = tick_labels(axes.xaxis)
    assert 20 < len(labels) < 80
    assert all(label == f"·word{int(place)}" for label, place in labels.items())
    assert len(axes.lines[0].get_ydata()) == 700


def test_tokens_that_bite_are_drawn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.profile(profile(tokens=EVIL))
        figure.savefig(io.BytesIO(), format="svg")
    assert len(tick_labels(figure.axes[0].xaxis)) == len(EVIL)
    assert max(map(len, tick_labels(figure.axes[0].xaxis))) <= 16


def drawn_figure(figure: Figure) -> Figure:
    figure.draw_without_rendering()
    return figure


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [collapse, marks, graph])
def test_the_same_chart_gives_the_same_bytes(make, tmp_path) -> None:
    first = [path.read_bytes() for path in figures.save(make(), tmp_path, "a")]
    with matplotlib.rc_context(
        {"font.size": 20, "axes.facecolor": "black", "text.usetex": False, "svg.hashsalt": None}
    ):
        second = [path.read_bytes() for path in figures.save(make(), tmp_path / "more", "a")]
        assert matplotlib.rcParams["font.size"] == 20
    assert first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "a.png", "a.svg", "more"]


@pytest.mark.parametrize("kind", ["pdf", "svg", "png"])
def test_savefig_gives_the_same_bytes_whatever_the_users_settings(kind: str, tmp_path) -> None:
    """matplotlib's own `savefig` of our figures, by name and by format, and with metadata of the user's."""
    figures.chart(collapse()).savefig(tmp_path / f"a.{kind}")
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": "mine", "savefig.dpi": 50, "savefig.facecolor": "r"}):
        out = io.BytesIO()
        figures.chart(collapse()).savefig(out, format=kind)
    assert out.getvalue() == (tmp_path / f"a.{kind}").read_bytes()
    figures.chart(collapse()).savefig(tmp_path / f"b.{kind}", metadata={"Title": "my title"})
    assert b"my title" in (tmp_path / f"b.{kind}").read_bytes()
    assert b"CreationDate" not in (tmp_path / f"b.{kind}").read_bytes()
    copy.deepcopy(figures.chart(collapse())).savefig(tmp_path / f"c.{kind}")
    assert (tmp_path / f"c.{kind}").read_bytes() == (tmp_path / f"a.{kind}").read_bytes()


@pytest.mark.parametrize("evil", ["=1+1", "+1", "-1+2", "@SUM(A1)", "\t=1", "\r=1", " =1", "=HYPERLINK(1)", "＝1+1"])
def test_no_cell_of_a_csv_file_is_a_formula(evil: str) -> None:
    panel = Panel(title=evil, series=(Series(evil, (-1, 2), (-0.5, math.nan)),))
    rows = list(csv.reader(io.StringIO(Chart("n", "n", (panel,), ()).to_csv())))
    shown = f"'{visible(evil)}"
    assert rows[1] == [shown, shown, "line", "-1", "-0.5", "", ""]  # numbers stay numbers


def test_files_are_what_their_names_say(tmp_path) -> None:
    figure = figures.chart(collapse())
    pdf, svg, png = figures.save(figure, tmp_path, "figure-5")
    assert pdf.read_bytes().startswith(b"%PDF")
    assert b"CreationDate" not in pdf.read_bytes()
    assert b"/Type3" not in pdf.read_bytes()
    assert b"<dc:date>" not in svg.read_bytes()
    assert b"<dc:title>Representational collapse" in svg.read_bytes()
    height, width, _ = imread(png).shape
    assert (width, height) == tuple((figure.get_size_inches() * 200).astype(int))


def test_only_the_asked_formats_are_written(tmp_path) -> None:
    assert [path.name for path in figures.save(decay(), tmp_path, "x", ["svg"])] == ["x.svg"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.svg"]


def test_a_figure_of_the_user_s_own_can_be_saved(tmp_path) -> None:
    figure = Figure()
    figure.add_subplot().plot([1, 2])
    assert len(figures.save(figure, tmp_path, "own")) == 3


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda folder: figures.chart("a chart"), "got str|of a str"),
        (lambda folder: figures.chart(Chart("n", "n", (), ())), "at least one panel"),
        (lambda folder: figures.profile(truth()), "expected a PathProfile"),
        (lambda folder: figures.sensitivity(profile()), "expected what measured_sensitivity returns"),
        (lambda folder: figures.profile(profile(), "shares"), "'share', 'log10'"),
        (lambda folder: figures.profile(profile(constant=math.nan), "log10"), "constant C is unspecified"),
        (lambda folder: figures.save(decay(), folder, "../up"), "file name"),
        (lambda folder: figures.save(decay(), folder, ""), "file name"),
        (lambda folder: figures.save(decay(), folder, "x", ["pdf", "gif"]), "gif"),
        (lambda folder: figures.save("x", folder, "x"), "expected a Chart or a matplotlib Figure"),
        (lambda folder: figures.save(decay(), folder / "file" / "deeper", "x"), "cannot be made"),
        (lambda folder: Series("a", (1,), (1.0, 2.0)), "as many y as x"),
        (lambda folder: Series("a", (1,), (1.0,), low=(1.0,)), "half a band"),
        (lambda folder: Series("a", (1,), (0.5,), kind="marks"), r"expected 1 \(right\)"),
        (lambda folder: Panel("a", series=(*marks().panels[0].series, Series("a", (1,), (1.0,)))), "its own panel"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(call, said, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=said) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_to_is_noticed_before_drawing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda *args: False)  # chmod would not stop a test that root runs
    monkeypatch.setattr(figures, "chart", None)
    with pytest.raises(InputError, match="cannot be written to"):
        figures.save(decay(), tmp_path, "x")


# -- scales --------------------------------------------------------------------------------------------------

values = st.lists(st.floats(-1e300, 1e300) | st.sampled_from([0.0, math.inf, -math.inf, math.nan]), max_size=12)


@settings(deadline=None)
@given(values, st.sampled_from(["linear", "log", "category"]), st.booleans())
@example([5e-324], "linear", False)
def test_a_scale_holds_what_it_was_made_for(numbers, kind, from_zero) -> None:
    assume(kind != "log" or not any(0 < value < 1e-290 for value in numbers))  # float64 ends there
    made = scale(kind, numbers, from_zero=from_zero)
    assert math.isfinite(made.bottom)
    assert made.bottom < made.top < math.inf
    places = made.at(numbers)
    for value, place in zip(numbers, places, strict=True):
        if math.isnan(value) or (kind == "log" and -math.inf < value < 0):
            continue
        if kind != "category":
            assert made.bottom <= place <= made.top
        elif math.isfinite(value):
            assert made.categories[int(place)] == value
    known = [(v, p) for v, p in zip(numbers, places, strict=True) if math.isfinite(v) and math.isfinite(p)]
    assert [p for _, p in sorted(known)] == sorted(p for _, p in known)  # order is kept


@given(st.floats(-300, 280), st.floats(0.1, 20))
def test_ticks_of_a_log_axis_are_where_their_labels_say(power, decades) -> None:
    low, high = 10.0**power, 10.0 ** (power + decades)
    ticks = log_ticks(low, high)
    assert len({label for _, label in ticks}) == len(ticks) <= 9
    for place, label in ticks:
        assert low * 0.999 <= place <= high * 1.001
        assert read(label) == pytest.approx(place)


@given(st.floats(-1e12, 1e12) | st.integers(-(10**6), 10**6))
def test_numbers_on_axes_can_be_read_back(value) -> None:
    assert read(axis_number(value)) == pytest.approx(value, rel=1e-3, abs=1e-300)


def read(label: str) -> float:
    plain = label.replace("−", "-").replace(",", "").translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    if not set(label) & set("⁰¹²³⁴⁵⁶⁷⁸⁹"):
        return float(plain)
    sign = -1 if plain.startswith("-") else 1
    digits, _, rest = plain.lstrip("-").rpartition("·")
    return sign * float(digits or 1) * 10.0 ** int(rest.removeprefix("10"))


def test_lengths_are_labelled_with_their_numbers() -> None:
    axes = drawn(one_panel(Series("a", LENGTHS, LENGTHS), x_axis="category")).axes[0]
    assert list(tick_labels(axes.xaxis)) == [str(length) for length in LENGTHS]
