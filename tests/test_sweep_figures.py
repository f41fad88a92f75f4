"""Bands over the prompts of a sweep, as a chart and as a drawn figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_sweeps import texts

import oversquash_lens as osl
from oversquash_lens.errors import InputError
from oversquash_lens.sweeps.result import SweepResult
from oversquash_lens.viz.chart import Chart
from oversquash_lens.viz.result_charts import ENDS, MIDDLE, bands_chart

MEASURES = ["mean_field", "proof", "flow", "squashing"]


@pytest.fixture(scope="module")
def swept(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    out = tmp_path_factory.mktemp("swept") / "rows.parquet"
    return osl.sweep(tiny, [*texts(12), "w5 " * 40], MEASURES, out)


def test_a_panel_for_each_measure_and_one_that_compares(swept: SweepResult) -> None:
    drawn = bands_chart(swept)
    titles = [panel.title for panel in drawn.panels]
    assert titles[:2] == ["Mean-field estimate", "Paper’s bound"]
    assert titles[2] == "Side by side: medians and quartiles"
    assert len(titles) == 5
    assert drawn.title == "Sensitivity of the last token, over 12 prompts; 1 refused"
    assert drawn.model == "tiny-random-llama as TransformerBridge (float64)"
    assert Chart.from_dict(drawn.to_dict()).to_csv() == drawn.to_csv()


def test_the_series_are_the_bands(swept: SweepResult) -> None:
    drawn = bands_chart(swept, ["proof", "flow"])
    for panel, band in zip(drawn.panels, (swept.bands("proof"), swept.bands("flow")), strict=True):
        middle, least, most = panel.series
        assert (middle.label, least.label, most.label) == (MIDDLE, ENDS, ENDS)
        assert (middle.x, middle.y, middle.low, middle.high) == (band.x, band.median, band.lower, band.upper)
        assert (least.y, most.y) == (band.least, band.most)
    beside = bands_chart(swept).panels[2]
    assert [one.label for one in beside.series] == ["Mean-field estimate", "Paper’s bound"]
    assert [one.y for one in beside.series] == [swept.bands(name).median for name in MEASURES[:2]]


def test_it_is_drawn_and_written(swept: SweepResult, tmp_path: Path) -> None:
    figure = osl.figures.bands(swept)
    assert len(figure.axes) == 5
    assert figure.texts[0].get_text().startswith("Sensitivity of the last token")
    paths = osl.figures.save(figure, tmp_path, "bands", ("png", "svg"))
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_what_cannot_be_drawn(swept: SweepResult) -> None:
    with pytest.raises(InputError, match="expected what sweep returns, got a list"):
        osl.figures.bands([])
    with pytest.raises(InputError, match="got no measure"):
        osl.figures.bands(swept, [])
    with pytest.raises(InputError, match="expected one of this sweep's"):
        osl.figures.bands(swept, ["truth"])
