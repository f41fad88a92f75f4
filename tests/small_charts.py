"""Charts made by hand, one of each kind, for tests that draw."""

from __future__ import annotations

import math
from itertools import pairwise, product

from oversquash_lens.viz.chart import Chart, Heat, Panel, Paths, Route, Series, Table, Verdict

LENGTHS = (1, 2, 6, 11, 51, 101, 501, 1001, 2001)
PRECISION = 2.0**-7


def banded(label: str, values: tuple[float, ...]) -> Series:
    return Series(label, LENGTHS, values, tuple(0.7 * y for y in values), tuple(1.3 * y for y in values))


def collapse() -> Chart:
    """As the paper's figure 5: two by two, with bands, the paper's values, the floor and the precision."""
    falling = (0.95, 0.5, 0.3, 0.2, 0.09, 0.06, 0.02, 0.01, 0.005)
    ending = (0.93, 0.51, 0.31, 0.2, 0.1, 0.06, 0.02, 0.0, 0.0)

    def panel(title: str, y_axis: str, *rows: Series) -> Panel:
        published = Series("Gemma 7B", LENGTHS[:5], (0.95, 0.35, 0.2, 0.08, 0.04), kind="published")
        floor = Series("other batch shape", LENGTHS, (2e-5,) * 9, kind="floor")
        return Panel(title, "ones", "L∞", (*rows, published, floor), "category", y_axis, (PRECISION, "precision, 2⁻⁷"))

    return Chart(
        "5",
        "Representational collapse: n ones and n + 1 ones end in nearly the same vector",
        (
            panel("(a) count ones", "log", banded("float32", falling), banded("bfloat16", ending)),
            panel("(b) a title so long that it has to be broken into several lines", "log", banded("float32", falling)),
            panel("(c) copy ones", "linear", banded("float32", falling[:4] + (math.nan,) * 2 + falling[6:])),
            panel("(d) with commas", "linear", banded("float32", falling[::-1])),
        ),
        (
            Verdict("it falls below the precision", "0.005 at 2001", True),
            Verdict("the count survives", "k→k+3: 0.01", False),
            Verdict("the logits stay apart", "not measured", None),
        ),
        model="a model made by hand (float32), no BOS",
        setup=("Prompt: How many ones?", "Mean over heads, band from least to most."),
        notes=("Read off the print.",),
        tables=(Table("Readings", ("norm", "at 1", "at 2001"), (("L1", 296.0, 7.7), ("L2", 12.5, math.nan))),),
        data={"seeds": [1, 2], "levels": {"a": 0.5}},
    )


def histogram() -> Chart:
    """As figure 4: three rows of bars over one another, some of them not there."""
    x = tuple(range(0, 201, 5))
    return Chart(
        "4",
        "Numbers answered",
        (
            Panel(
                "Sum",
                "number",
                "answers",
                (
                    Series("true answer", x[1::2], (5.0,) * 20, kind="bars"),
                    Series(
                        "predicted", x, tuple(40.0 if value == 100 else float(value % 3) for value in x), kind="bars"
                    ),
                    Series("predicted with steps", x, tuple(float(value % 2) for value in x), kind="bars"),
                ),
            ),
        ),
        (Verdict("answers pile up at 100", "40", True),),
    )


def marks() -> Chart:
    """As figure 2: right, wrong and unanswered."""
    x = tuple(range(100, 501, 100))
    first, last = (1.0, 1.0, 1.0, 1.0, 0.0), (0.0, 1.0, math.nan, 0.0, 0.0)
    rows = (Series("first token", x, first, kind="marks"), Series("last token", x, last, kind="marks"))
    return Chart("2", "Copying", (Panel("(a)", "length", series=rows), Panel("(b)", "length", series=rows[:1])), ())


def decay() -> Chart:
    """As figure 10: log-log, the paper's values to one of the lines."""
    n = (5, 10, 50, 100, 500, 1000)
    lines = [Series(f"kind {k}", n, tuple(k * 7.0 / each for each in n)) for k in (1, 2, 3)]
    printed = Series("kind 1", n, tuple(8.0 / each for each in n), kind="published")
    panel = Panel("", "n", "L1", (*lines, printed), "log", "log", (PRECISION, "precision"), note="five seeds")
    return Chart("10", "Decay", (panel,), ())


def paths(token: int = 0, n: int = 5, n_layers: int = 3) -> Paths:
    """Path counts by brute force: every monotone way from `token` to the last position."""
    ways = [
        way
        for way in product(range(n), repeat=n_layers + 1)
        if way[0] == token and way[-1] == n - 1 and all(a <= b for a, b in pairwise(way))
    ]
    counts: dict[tuple[int, int, int], int] = {}
    for way in ways:
        for layer in range(n_layers):
            edge = (layer, way[layer], way[layer + 1])
            counts[edge] = counts.get(edge, 0) + 1
    return Paths(tuple("abcde"[:n]), n_layers, token, tuple((*edge, count) for edge, count in sorted(counts.items())))


def graph() -> Chart:
    """As figure 1: curves beside two drawings."""
    curves = tuple(Series(f"digit {d}", tuple(range(1, 101)), tuple(d / k for k in range(1, 101))) for d in (1, 2))
    panels = (Panel("(a)", "n", "L1", curves), Panel("(b)", paths=paths(0)), Panel("(c)", paths=paths(3)))
    return Chart("1", "Paths", panels, ())


def grid() -> Chart:
    """As figure 3: twelve panels, four to a row."""
    x = tuple(range(5, 200, 10))
    panels = tuple(
        Panel(
            f"{task}; {how}",
            "length",
            "absolute error",
            (Series("free", x, tuple(k * 0.1 * r for k in x)), Series("by likelihood", x, tuple(k * 0.05 for k in x))),
        )
        for r, how in enumerate(("no steps", "steps, zero-shot", "steps, few-shot"), 1)
        for task in ("sum", "count ones", "count ones, Bernoulli(0.7)", "count a word")
    )
    return Chart("3", "Error grows with length", panels, (), columns=4)


def many_legends() -> Chart:
    """Panels that share no label: each has its own legend."""
    panels = tuple(
        Panel(
            f"remedy {r}",
            "length",
            "L1",
            tuple(Series(f"remedy {r}, setting {s}", (1, 2, 3), (r, s, 1.0)) for s in range(4)),
        )
        for r in range(3)
    )
    return Chart("remedies", "Remedies", panels, ())


def heat() -> Chart:
    """A map of three rows and four columns, one cell of it not known, a number per row beside it."""
    values = ((0.25, 0.25, 0.25, 0.25), (0.7, 0.001, math.nan, 0.29), (0.0, 0.0, 0.0, 1.0))
    beside = Series("width", (0, 1, 2), (4.0, 1.9, 1.0))
    panel = Panel("", "token", "layer", (beside,), heat=Heat(values, 0.025, 1.0, "share"), x_names=tuple("abcd"))
    return Chart("flow", "Where it runs", (panel,), ())


def route() -> Chart:
    """Two layers, two positions alone and three gathered between them; 0.001 of the upper layer is not drawn."""
    made = Route(
        names=("a", "… 3 others, 30% at most", "e"),
        spans=((0, 1), (1, 4), (4, 5)),
        node=((1.0, 0.0, 0.0), (0.5, 0.3, 0.2), (0.0, 0.0, 1.0)),
        stays=((0.5, 0.0, 0.0), (0.0, 0.0, 0.2)),
        moves=((0, 0, 1, 0.3, "0.1"), (0, 0, 2, 0.2, "0.0+"), (1, 0, 2, 0.5, "1.1"), (1, 1, 2, 0.299, "1.0")),
        source=0,
        least=0.005,
    )
    return Chart("route", "The route", (Panel("", "token", "layer", route=made),), ())


DIAGRAMS = (heat, route)
ALL = (graph, marks, grid, histogram, collapse, decay, many_legends)
