"""Figures of a flow: the numbers drawn are the flow's, whatever the tokens are and however long the prompt is."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from small_charts import DIAGRAMS, heat, route
from small_results import EVIL, TOKENS, flow_result, profile, truth
from test_figures import check_sheet, drawn, legend_labels, same, tick_labels, words

from oversquash_lens.errors import InputError
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.squashing import Squashing
from oversquash_lens.viz import figures
from oversquash_lens.viz.chart import Chart, Heat, Panel, Route
from oversquash_lens.viz.diagrams import GATHERED, MOST_COLUMNS, MOVES, STAYS
from oversquash_lens.viz.reports import write_chart, write_index
from oversquash_lens.viz.result_charts import (
    MOST_ALONE,
    heads_panel,
    map_panel,
    route_chart,
    route_of,
    route_panel,
    width_panel,
)
from oversquash_lens.viz.style import COLOURS, DPI, RAMP, printable, short
from oversquash_lens.viz.words import visible_token

BITING = (*EVIL, "$x$", "$\\frac{", "漢字", " a very long token indeed, too long for any axis", "\x00\x1b", " is")
SIZES = {  # positions, layers, heads
    "one layer, two tokens": (2, 1, 1),
    "five tokens, many layers": (5, 30, 9),
    "a sentence": (47, 12, 4),
    "three hundred tokens": (300, 6, 3),
}
MAKERS = (figures.flow, figures.heads, figures.width, figures.route)


def sized(name: str, **rest: object) -> Flow:
    n, layers, heads = SIZES[name]
    return flow_result(tuple(f" t{i}" for i in range(n)), layers, heads, **rest)


def shares_of_edges(flow: Flow, layer: int) -> np.ndarray:
    """[head, dest, src] of one layer from the whole rows above and below it: u · edge · f / (u · f)."""
    n = len(flow.tokens)
    heads = flow.edges.edge_block(layer, 0, n).by_head().heads
    above, below = flow.log_above[layer + 1].exp(), flow.log_below[layer].exp()
    total = (flow.log_above + flow.log_below)[layer].exp().sum()
    return (above[:, None] * heads * below / total).numpy()


def entropy_number(shares: torch.Tensor) -> np.ndarray:
    """Effective width in another way: 2 to the entropy in bits."""
    rows = [[share for share in row if share > 0] for row in shares.tolist()]
    return np.array([2 ** -sum(share * math.log2(share) for share in row) for row in rows])


def cells(axes) -> np.ndarray:
    """What stands in each cell of a map; every cell is a block of equal pixels."""
    (image,) = axes.images
    shown = np.ma.filled(image.get_array(), math.nan)
    left, right, bottom, top = image.get_extent()
    rows = round(top - bottom)
    times = shown.shape[0] // rows
    assert (left, bottom, top, right) == (-0.5, -0.5, rows - 0.5, right)
    blocks = shown.reshape(rows, times, -1, times)
    assert np.array_equal(blocks, np.broadcast_to(blocks[:, :1, :, :1], blocks.shape), equal_nan=True)
    assert image.get_interpolation() == "none"
    assert image.origin == "lower"
    return blocks[:, 0, :, 0]


# -- the map -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("source", [None, 0])
def test_the_map_holds_the_node_shares_and_the_curve_the_width(size, source) -> None:
    flow = sized(size, source=source)
    figure = figures.flow(flow)
    check_sheet(shown(figure))
    axes, beside, bar = figure.axes
    n = len(flow.tokens)
    assert same(cells(axes), flow.node.clamp(0.1 / n, 1))
    norm = axes.images[0].norm
    assert (norm.vmin, norm.vmax) == (0.1 / n, 1)
    assert norm(math.sqrt(0.1 / n)) == pytest.approx(0.5)  # logarithmic
    (curve,) = beside.lines
    assert same(curve.get_xdata(), entropy_number(flow.node)) or np.allclose(
        curve.get_xdata(), entropy_number(flow.node), rtol=1e-9
    )
    assert list(curve.get_ydata()) == list(range(flow.n_layers + 1))
    assert beside.get_ylim() == axes.get_ylim()
    assert next(iter(tick_labels(bar.yaxis))) == f"≤ {0.1 / n:.2g}"
    assert tick_labels(bar.yaxis)["1"] == 1


def test_layer_0_is_at_the_bottom_and_the_first_token_at_the_left() -> None:
    flow = flow_result()
    figure = shown(figures.flow(flow))
    axes = figure.axes[0]
    picture = np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255
    image = axes.images[0]
    for layer, position in itertools.product(range(flow.n_layers + 1), range(len(flow.tokens))):
        x, y = axes.transData.transform((position, layer))
        expected = image.cmap(image.norm(max(flow.node[layer, position].item(), image.norm.vmin)))
        assert np.allclose(picture[picture.shape[0] - 1 - int(y), int(x)], expected[:3], atol=0.01)


def shown(figure: Figure) -> Figure:
    FigureCanvasAgg(figure).draw()
    return figure


def test_names_stand_below_the_map_while_they_fit_and_numbers_beyond() -> None:
    axes = shown(figures.flow(flow_result())).axes[0]
    assert tick_labels(axes.xaxis) == {visible_token(token): i for i, token in enumerate(TOKENS)}
    axes = shown(figures.flow(sized("a sentence"))).axes[0]
    assert list(tick_labels(axes.xaxis)) == [f"·t{i}" for i in range(47)]
    axes = shown(figures.flow(sized("three hundred tokens"))).axes[0]
    assert {label: place for label, place in tick_labels(axes.xaxis).items() if 0 <= place < 300} == {
        str(i): i for i in range(0, 300, 50)
    }


def test_a_map_too_wide_for_paper_keeps_its_peaks() -> None:
    flow = flow_result(tuple(map(str, range(1100))), 1, 1)
    figure = shown(figures.flow(flow))
    found = cells(figure.axes[0])
    starts = range(0, 1100, 3)
    assert len(starts) <= MOST_COLUMNS
    expected = [[flow.node[layer, i : i + 3].max().item() for i in starts] for layer in range(2)]
    assert same(found, np.clip(expected, 0.1 / 1100, 1))
    assert "each column shows the largest of 3 positions" in words(figure)
    assert figure.axes[0].get_xlim() == (-0.5, 1099.5)


def test_cells_that_are_not_known_are_grey_and_zeros_are_white() -> None:
    figure = drawn(heat())
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    assert math.isnan(cells(axes)[1, 2])
    picture = np.asarray(figure.canvas.buffer_rgba())
    colour = {
        (row, column): to_hex(picture[picture.shape[0] - 1 - int(y), int(x), :3] / 255)
        for row, column in itertools.product(range(3), range(4))
        for x, y in [axes.transData.transform((column, row))]
    }
    assert colour[1, 2] == "#b9bdc2"
    assert colour[2, 0] == RAMP[0] == "#ffffff"
    assert colour[2, 3] == RAMP[-1]
    assert "grey: not known" in words(figure)
    assert "grey" not in words(figures.flow(flow_result()))


def test_the_map_s_colours_are_even_steps_for_everybody() -> None:
    """CIELAB lightness falls evenly; in full protanopia and deuteranopia (Machado et al. 2009) it still falls."""
    matrices = (
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    )
    for matrix in matrices:
        rgb = np.array([to_rgb(colour) for colour in RAMP])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        luminance = np.clip(linear @ np.transpose(matrix), 0, 1) @ [0.2126, 0.7152, 0.0722]
        steps = -np.diff(116 * np.cbrt(luminance))
        assert steps.min() > 6
        assert steps.max() < 15
        if matrix is matrices[0]:
            assert np.allclose(steps, 10.5, atol=0.3)


# -- heads and width -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_the_heads_and_the_residual_stream_are_all_there_is(size) -> None:
    flow = sized(size)
    figure = shown(figures.heads(flow))
    check_sheet(figure)
    axes, beside, _ = figure.axes
    norm = axes.images[0].norm
    assert norm.vmin == pytest.approx(0.1 / (SIZES[size][2] + 1))
    assert flow.head.max() <= norm.vmax <= 1
    brought = np.array([shares_of_edges(flow, layer).sum((1, 2)) for layer in range(flow.n_layers)])
    assert np.allclose(cells(axes), np.clip(brought, norm.vmin, norm.vmax), rtol=1e-9)
    (curve,) = beside.lines
    assert np.allclose(curve.get_xdata(), 1 - brought.sum(1), rtol=1e-9)
    assert list(curve.get_ydata()) == list(range(flow.n_layers))
    assert tick_labels(axes.xaxis) == {str(head): head for head in range(SIZES[size][2])}


def test_the_width_of_a_flow_is_one_line() -> None:
    flow = flow_result()
    figure = shown(figures.width(flow))
    check_sheet(figure)
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == [0, 1, 2, 3]
    assert np.allclose(line.get_ydata(), entropy_number(flow.node), rtol=1e-9)
    assert f"of {len(TOKENS)} positions" in words(figure)


def test_the_width_of_a_squashing_stands_beside_that_of_uniform_attention() -> None:
    flow, null = flow_result(), flow_result(seed=7)
    share = profile().share
    squashing = Squashing(flow, null, share, share)
    figure = shown(figures.width(squashing))
    check_sheet(figure)
    lines = figure.axes[0].lines
    assert [to_hex(line.get_color()).upper() for line in lines] == list(COLOURS[:2])
    for line, each in zip(lines, (flow, null), strict=True):
        assert np.allclose(line.get_ydata(), entropy_number(each.node), rtol=1e-9)
    assert legend_labels(figure.legends[0]) == ["this model", "uniform attention, all else the same"]
    relative = (entropy_number(flow.node) / entropy_number(null.node))[:-1]
    assert f"layer {relative.argmin()}: {relative.min():.2f} times as wide" in words(figure).replace("\n", " ")


# -- the route -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("source", [None, 1])
def test_a_route_is_the_flow_gathered(size, source) -> None:
    flow = sized(size, source=source)
    made = route_of(flow)
    n = len(flow.tokens)
    assert [i for start, end in made.spans for i in range(start, end)] == list(range(n))
    alone = {start for start, end in made.spans if end - start == 1}
    assert n - 1 in alone
    assert source is None or (source in alone and made.spans[made.source] == (source, source + 1))
    assert len(alone) == n if n <= 12 else len(alone) <= MOST_ALONE + 2 + len(made.spans) / 2
    peaks = flow.node.amax(0)
    left = {i for start, end in made.spans if end - start > 1 for i in range(start, end)}
    assert all(peaks[i] < 0.03 or (peaks >= peaks[i]).sum() > MOST_ALONE for i in left)
    where = np.repeat(np.arange(len(made.spans)), [end - start for start, end in made.spans])
    for layer in range(flow.n_layers + 1):
        assert np.allclose(np.bincount(where, flow.node[layer], len(made.spans)), made.node[layer])
    drawn_share = []
    for layer in range(flow.n_layers):
        edges = shares_of_edges(flow, layer)
        moved = np.zeros((len(edges), len(made.spans), len(made.spans)))
        np.add.at(moved, np.ix_(range(len(edges)), where, where), edges)
        whole = moved.sum(0)
        stays = np.bincount(where, flow.residual_at[layer], len(made.spans)) + whole.diagonal()
        assert np.allclose(made.stays[layer], stays)
        assert whole.sum() - whole.trace() + stays.sum() == pytest.approx(1)  # nothing is lost on the way
        expected = {
            (at, to): whole[to, at] for to, at in zip(*np.nonzero(whole >= made.least), strict=True) if to != at
        }
        found = {(at, to): share for where_it_is, at, to, share, _ in made.moves if where_it_is == layer}
        assert found == pytest.approx(expected)
        for where_it_is, at, to, share, head in made.moves:
            if where_it_is == layer:
                most = moved[:, to, at]
                assert head.rstrip("+") == f"{layer}.{most.argmax()}"
                assert head.endswith("+") == (most.max() < 0.5 * share)
        drawn_share.append(sum(found.values()) + stays[stays >= made.least].sum())
    assert made.left_out == pytest.approx(1 - min(drawn_share), abs=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("source", [None, 1])
def test_lines_are_as_wide_as_their_shares(size, source) -> None:
    flow = sized(size, source=source)
    made = route_of(flow)
    figure = shown(figures.route(flow))
    check_sheet(figure)
    axes = figure.axes[0]
    lines = {
        to_hex(each.get_color()[0]).upper(): list(zip(each.get_segments(), each.get_linewidths(), strict=True))
        for each in axes.collections
        if isinstance(each, LineCollection)
    }
    expected = [((at, layer), (to, layer + 1), share) for layer, at, to, share, _ in made.moves]
    moves = [(*map(tuple, ends.tolist()), width) for ends, width in lines.get(MOVES.upper(), [])]
    assert [move[:2] for move in moves] == [move[:2] for move in expected]
    stays = {(round(ends[0][0]), round(ends[0][1])): width for kind in (STAYS, GATHERED)
             for ends, width in lines.get(kind.upper(), [])}  # fmt: skip
    shares = {(stop, layer): share for layer, row in enumerate(made.stays) for stop, share in enumerate(row)
              if share >= made.least}  # fmt: skip
    assert stays.keys() == shares.keys()
    pairs = [(width, share) for (*_, width), (*_, share) in zip(moves, expected, strict=True)]
    pairs += [(stays[place], shares[place]) for place in stays]
    scale = max(width for width, _ in pairs) / max(share for _, share in pairs)
    assert all(width == pytest.approx(max(0.3, scale * share)) for width, share in pairs)
    gathered = {round(ends[0][0]) for ends, _ in lines.get(GATHERED.upper(), [])}
    assert all(made.is_gathered(stop) for stop in gathered)
    marks = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata())}
    assert marks == {(len(made.spans) - 1, flow.n_layers)} | ({(made.source, 0)} if source is not None else set())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("source", [None, 1])
def test_heads_names_cover_nothing(size, source) -> None:
    flow = sized(size, source=source)
    figure = figures.route(flow)
    figure.dpi = DPI  # at a screen's 100, type is up to a tenth wider than on paper
    axes = shown(figure).axes[0]
    names = [text for text in axes.texts if re.fullmatch(r"\d+\.\d+\+?", text.get_text())]
    heads = {head for *_, head in route_of(flow).moves}
    assert {text.get_text() for text in names} <= heads
    boxes = [Text.get_window_extent(text) for text in names]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    point, along = figure.dpi / 72, np.linspace(0, 1, 400)[:, None]
    drawn_lines = [
        (axes.transData.transform(ends[0] * (1 - along) + ends[1] * along), width)
        for lines in axes.collections
        for ends, width in zip(lines.get_segments(), lines.get_linewidths(), strict=True)
    ]
    moves = route_of(flow).moves
    first = len(drawn_lines) - len(moves)
    for box, text in zip(boxes, names, strict=True):
        middle = [(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2]
        on = [i for i, (run, _) in enumerate(drawn_lines) if np.hypot(*(run - middle).T).min() < 2 * point]
        assert len(on) == 1  # a name interrupts its own line
        assert moves[on[0] - first][-1] == text.get_text()
        for run, width in drawn_lines[: on[0]] + drawn_lines[on[0] + 1 :]:
            gap = np.maximum(np.maximum([box.x0, box.y0] - run, run - [box.x1, box.y1]), 0)
            assert np.hypot(*gap.T).min() > point * (width / 2 - 0.7)
    if size == "a sentence":
        assert len(names) > 10


def test_gathered_positions_say_how_many_and_how_much() -> None:
    flow = sized("three hundred tokens", source=200)
    made = route_of(flow)
    assert made.names[0] == "… 200 others, none"  # nothing flows back
    gathered = [i for i in range(len(made.spans)) if made.is_gathered(i)]
    for i in gathered:
        start, end = made.spans[i]
        most = flow.node[:, start:end].sum(1).max().item()
        rest = made.names[i].removeprefix(f"… {end - start} others, ")
        assert rest == ("none" if most == 0 else "below 1%" if most < 0.005 else f"{most:.0%} at most")
    axes = shown(figures.route(flow)).axes[0]
    labels = [tick.label1 for tick in axes.xaxis.get_major_ticks()]
    assert [label.get_text().replace("\n", " ") for label in labels] == list(made.names)
    assert len(gathered) > 1


def test_names_of_the_longest_route_have_room() -> None:
    """Every position that may stand alone does, with gathered ones on either side."""
    stops = 2 * (MOST_ALONE + 2) + 1
    spans = tuple((10 * i, 10 * i + (10 if i % 2 == 0 else 1)) for i in range(stops))
    names = tuple("… 1000 others, 12% at most" if i % 2 == 0 else "·a long token…" for i in range(stops))
    even = (1 / stops,) * stops
    made = Route(names, spans, (even,) * 31, (even,) * 30, (), None, 0.005)
    figure = shown(figures.chart(Chart("r", "A long route", (Panel("", "token", "layer", route=made),), ())))
    check_sheet(figure)
    labels = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    for one, other in itertools.pairwise(labels):
        assert one.x1 < other.x0 + 1


def test_one_token_is_a_flow_too() -> None:
    flow = flow_result((" alone",), 2, 2)
    for make in MAKERS:
        check_sheet(shown(make(flow)))
    made = route_of(flow)
    assert (made.names, made.moves, made.node) == (("·alone",), (), ((1.0,),) * 3)


def test_a_route_of_few_tokens_shows_each() -> None:
    figure = shown(figures.route(flow_result(("a", "b", "c", "d", "e"), 2, 2, source=2)))
    assert list(tick_labels(figure.axes[0].xaxis)) == list("abcde")
    assert figure.get_figwidth() == 5.0
    assert shown(figures.route(sized("a sentence"))).get_figwidth() == 7.2


# -- tokens, words, files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_tokens_that_bite_are_drawn(make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = make(flow_result(BITING, source=len(EVIL)))
        for kind in figures.FORMATS:
            figure.savefig(io.BytesIO(), format=kind)
    check_sheet(shown(figure))
    assert "$x$" in words(figure)
    if make in (figures.flow, figures.route):
        labels = [tick.label1.get_text() for tick in figure.axes[0].xaxis.get_major_ticks()]
        names = {short([printable(visible_token(token))])[0] for token in BITING}
        assert {label for label in labels if "others" not in label} <= names
        assert len(labels) == len(BITING) or make is figures.route
        assert max(len(line) for label in labels for line in label.split("\n")) <= 17


@pytest.mark.parametrize("make", MAKERS)
def test_words_are_glyphs_and_a_map_is_one_picture(make, tmp_path) -> None:
    pdf, svg, _ = (path.read_bytes() for path in figures.save(make(sized("a sentence")), tmp_path, "a"))
    pictures = 2 if make in (figures.flow, figures.heads) else 0  # map and colour bar
    assert svg.count(b"<image") == pdf.count(b"/Subtype /Image") == pictures
    assert svg.count(b'<use xlink:href="#DejaVuSans-') > 50
    assert b"/Type0" in pdf
    assert b"/Type3" not in pdf
    assert len(svg) < 300_000
    assert len(pdf) < 100_000


def test_two_processes_write_the_same_bytes(tmp_path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from small_results import flow_result\n"
        "from oversquash_lens.viz import figures\n"
        "flow = flow_result(tuple(f' t{i}' for i in range(47)), 12, 4, source=3)\n"
        "for make in (figures.flow, figures.heads, figures.width, figures.route):\n"
        "    figures.save(make(flow), sys.argv[1], make.__name__)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(figures.__file__).parents[2])])
    found = []
    for run in ("1", "2"):
        env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": run, "PADDING": "x" * 1000 * int(run)}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / run)], env=env, check=True, timeout=300)
        files = sorted((tmp_path / run).iterdir())
        found.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    assert found[0] == found[1]
    assert len(found[0]) == 12


@pytest.mark.parametrize("make", MAKERS)
def test_a_figure_says_whose_paths_it_shows(make) -> None:
    figure = make(flow_result(source=4))
    assert figure.get_label().endswith("Mean-field estimate, from ·Tuesday (token 4)")
    assert "a model made by hand as HookedTransformer" in words(figure)
    assert make(flow_result(kind="rollout")).get_label().endswith("Attention rollout, from all tokens")


@pytest.mark.parametrize("size", SIZES)
def test_layers_are_whole_numbers(size) -> None:
    flow = sized(size)
    for make, which in (
        (figures.flow, "yaxis"),
        (figures.heads, "yaxis"),
        (figures.route, "yaxis"),
        (figures.width, "xaxis"),
    ):
        axes = shown(make(flow)).axes[0]
        labels = {label for label, place in tick_labels(getattr(axes, which)).items() if 0 <= place <= flow.n_layers}
        assert {"0", "1"} <= labels or {"0", "5", "10"} <= labels or {"0", "2", "4"} <= labels or labels == {"0"}
        assert all(label.isdigit() for label in labels)
        assert labels != {"0"} or (make is figures.heads and flow.n_layers == 1)


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_panels_of_every_kind_stand_on_one_sheet(columns) -> None:
    flow = flow_result()
    panels = (map_panel(flow, "(a) a map"), route_panel(flow, "(b) a route"))
    panels += (heads_panel(flow, "(c) heads"), width_panel(flow, flow_result(seed=7), "(d) width"))
    figure = shown(figures.chart(Chart("all", "All at once", panels, (), columns=columns)))
    check_sheet(figure)
    assert [axes.get_title(loc="left")[:3] for axes in figure.axes if axes.get_title(loc="left")] == [
        "(a)", "(b)", "(c)", "(d)",
    ]  # fmt: skip


def test_a_notebook_gets_a_png() -> None:
    payload, _ = figures.flow(flow_result())._repr_png_()
    assert payload.startswith(b"\x89PNG")


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("value", [None, "flow", profile(), truth(), torch.ones(2, 2)])
def test_what_is_no_flow_is_refused(make, value) -> None:
    with pytest.raises(InputError, match=f"expected a Flow, got a {type(value).__name__}") as caught:
        make(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", ["node", "head_at", "residual_at"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5])
def test_shares_that_are_no_shares_are_refused(make, name, bad) -> None:
    flow = flow_result()
    spoilt = getattr(flow, name).clone()
    spoilt[0, 0] = bad
    with pytest.raises(InputError, match=r"NaN, negative or infinite shares.*record again"):
        make(replace(flow, **{name: spoilt}))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Heat(((1.0,), (1.0, 2.0)), 0.1, 1.0, ""), r"rows of \[1, 2\] numbers"),
        (lambda: Heat((), 0.1, 1.0, ""), "rows of"),
        (lambda: Heat(((),), 0.1, 1.0, ""), "not 0"),
        (lambda: Heat(((1.0,),), 0.0, 1.0, ""), "expected 0 < low < high"),
        (lambda: Heat(((1.0,),), 0.5, math.nan, ""), "expected 0 < low < high"),
        (lambda: Route(("a",), ((0, 1),), ((1.0,),), ((1.0,),), (), None, 0.1), "one more row of shares"),
        (lambda: Route(("a", "b"), ((0, 1),), ((1.0,),) * 2, ((1.0,),), (), None, 0.1), "one number of stops"),
        (lambda: Panel("p", heat=heat().panels[0].heat, route=route().panels[0].route), "2 diagrams"),
    ],
)
def test_charts_that_cannot_be_are_refused(call, said) -> None:
    with pytest.raises(InputError, match=said):
        call()


# -- as data -------------------------------------------------------------------------------------------------


def charts() -> list[Chart]:
    return [make() for make in DIAGRAMS] + [route_chart(flow_result(source=1))]


@pytest.mark.parametrize("chart", charts(), ids=lambda chart: chart.title)
def test_a_diagram_survives_json(chart) -> None:
    values = json.loads(json.dumps(chart.to_dict(), allow_nan=False))
    again = Chart.from_dict(values)
    assert again.to_dict() == chart.to_dict() == values
    assert again.panels[0].route == chart.panels[0].route
    if chart.panels[0].heat is not None:
        assert np.array_equal(again.panels[0].heat.values, chart.panels[0].heat.values, equal_nan=True)
    for kind in ("heat", "route"):
        if values["panels"][0][kind] is not None:
            values["panels"][0][kind].popitem()
            with pytest.raises(InputError, match="damaged chart"):
                Chart.from_dict(values)


def test_charts_written_before_there_were_maps_are_read() -> None:
    values = heat().to_dict()
    for kind in ("heat", "route"):
        del values["panels"][0][kind]
    assert Chart.from_dict(values).panels[0].diagram is None


def test_every_cell_and_edge_is_in_the_csv() -> None:
    rows = list(csv.DictReader(heat().to_csv().splitlines()))
    values = heat().panels[0].heat.values
    found = {(row["series"], int(row["x"])): float(row["y"]) for row in rows if row["kind"] == "map"}
    assert found == pytest.approx(
        {(f"row {i}", j): value for i, row in enumerate(values) for j, value in enumerate(row)}, nan_ok=True
    )
    assert [float(row["y"]) for row in rows if row["kind"] == "line"] == [4.0, 1.9, 1.0]
    made = route().panels[0].route
    rows = list(csv.DictReader(route().to_csv().splitlines()))
    moves = [(row["series"], row["x"], row["y"], float(row["low"])) for row in rows if row["kind"] == "moves"]
    places = ["0", "1–3", "4"]
    assert moves == [
        (f"layer {layer}, head {head}", places[at], places[to], share) for layer, at, to, share, head in made.moves
    ]
    for kind, table, column in (("node", made.node, "y"), ("stays", made.stays, "low")):
        found = [(row["series"], row["x"], float(row[column])) for row in rows if row["kind"] == kind]
        assert found == [
            (f"layer {layer}", place, share)
            for layer, shares in enumerate(table)
            for place, share in zip(places, shares, strict=True)
        ]
    assert made.left_out == pytest.approx(0.001)


def test_a_gallery_shows_them(tmp_path) -> None:
    for make in DIAGRAMS:
        write_chart(make(), tmp_path)
    page = write_index(tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "cannot be read" not in page
