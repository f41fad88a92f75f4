"""A sweep as charts: what is heard along the prompt and how wide the paths are by layer, bands over all prompts."""

from __future__ import annotations

from collections.abc import Sequence

from oversquash_lens.errors import InputError
from oversquash_lens.sweeps.result import Bands, SweepResult
from oversquash_lens.viz.captions import NAMES
from oversquash_lens.viz.chart import Chart, Panel, Series

PLACE, HEARD = "place in the prompt: 0 first, 1 last token", "times an even share"
MIDDLE, ENDS = "median, band of quartiles", "least and most of any prompt"
BY_LAYER = {  # title, axis, and what the dashed line stands for
    "flow": ("Where it narrows", "effective width, positions", None),
    "squashing": ("Where it narrows, beside even attention", "times the width of even attention", "even attention"),
}


def bands_chart(result: SweepResult, measures: Sequence[str] | None = None) -> Chart:
    """A panel for each measure, and where several have shares one that sets them side by side."""
    found = [result.bands(measure) for measure in (result.measures if measures is None else measures)]
    if not found:
        raise InputError("expected some of the sweep's, got no measure: leave measures= out for all of them")
    shares = [one for one in found if one.by == "position"]
    panels = [_panel(one) for one in shares]
    panels += [_side_by_side(shares)] if len(shares) > 1 else []
    panels += [_panel(one) for one in found if one.by == "layer"]
    n = found[0].n
    refused = f"; {result.refused:,} refused" if result.refused else ""
    title = f"What the last token hears, over {n:,} prompt{'s' if n != 1 else ''}{refused}"
    return Chart("bands", title, tuple(panels), (), result.model)


def _panel(one: Bands) -> Panel:
    """Median and quartiles of one measure, and its extremes as thin lines."""
    middle = Series(MIDDLE, one.x, one.median, one.lower, one.upper)
    ends = (Series(ENDS, one.x, row, kind="floor") for row in (one.least, one.most))
    return _framed(one, None, (middle, *ends))


def _side_by_side(shares: Sequence[Bands]) -> Panel:
    series = (Series(_name(one), one.x, one.median, one.lower, one.upper) for one in shares)
    return _framed(shares[0], "Side by side: medians and quartiles", tuple(series))


def _framed(one: Bands, title: str | None, series: tuple[Series, ...]) -> Panel:
    if one.by == "layer":
        own, axis, even = BY_LAYER[one.measure]
        return Panel(own, "layer", axis, series, reference=(1.0, even) if even else None)
    return Panel(title or _name(one), PLACE, HEARD, series, y_axis="log", reference=(1.0, "even share"))


def _name(one: Bands) -> str:
    return NAMES.get(one.measure, one.measure)
