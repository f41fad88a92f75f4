"""Sliding windows: the widths whose outcome is known without computing it, and the verdict on made-up curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_generators import KINDS, loaded

from oversquash_lens.collapse.curve import CollapseCurve, collapse_curve
from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured import MeasuredSensitivity, measured_sensitivity
from oversquash_lens.paper import sensitivity_figures as recipe
from oversquash_lens.paper.reproduce import Options, RunConfig
from oversquash_lens.paper.sensitivity_figures import START, early_share, lowest_decile, window
from oversquash_lens.viz.chart import Chart

HOOKED = KINDS[1:]
WIDE = 1000  # more positions than any prompt here has
LONGEST = 13


@pytest.fixture(scope="module", params=HOOKED)
def chart(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chart:
    folder = tmp_path_factory.mktemp("window")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "QUICK_WIDTHS", (1, 4, WIDE, None))
        return window(RunConfig(Options(loaded(request.param), quick=True, longest=LONGEST, probes=3), folder))


def rows(chart: Chart, title: str) -> dict[str, Sequence[float]]:
    (panel,) = (panel for panel in chart.panels if panel.title == title)
    return {one.label: one.y for one in panel.series}


def test_a_window_of_one_hears_one_token_and_cannot_count(chart: Chart) -> None:
    """Each position attends to itself alone, which no rotation changes: every 1 ends in the same vector."""
    assert max(rows(chart, "collapse")["window of 1"]) < 1e-6
    assert min(rows(chart, "collapse")["whole prompt"]) > 0.1
    heard = rows(chart, "measured sensitivity")["window of 1"]
    assert max(heard[:-1]) < 1e-6 * heard[-1]
    shares = dict(
        zip((1, 4, WIDE, None), rows(chart, "share of the first half of the prompt")["measured"], strict=True)
    )
    assert shares[1] < 1e-6
    assert 0.01 < shares[None] < 1


def test_a_window_beyond_the_prompt_changes_nothing(chart: Chart) -> None:
    for title in ("collapse", "measured sensitivity"):
        found = rows(chart, title)
        wide, whole = found[f"window of {WIDE}"], found["whole prompt"]
        assert wide == pytest.approx(whole, rel=1e-4)
        assert found["window of 4"] != pytest.approx(whole, rel=1e-2)


def test_against_the_width_are_the_same_numbers(chart: Chart) -> None:
    (row,) = rows(chart, "collapse against width").values()
    assert list(row) == [row[START - 1] for row in rows(chart, "collapse").values()]
    (panel,) = (panel for panel in chart.panels if panel.title == "collapse against width")
    assert panel.series[0].x == (1.0, 4.0, WIDE, LONGEST)
    assert all(len(row) == LONGEST for row in rows(chart, "collapse").values())


def test_longest_is_the_longest_and_too_short_is_refused(tmp_path: Path) -> None:
    assert RunConfig(Options(longest=13), tmp_path).lengths("window") == (11, 12, 13)
    with pytest.raises(InputError, match=r"expected at least 11, the shortest of figure window, got .* of 10"):
        window(RunConfig(Options(longest=10), tmp_path))


# ---------------------------------------------------------------- made-up results


@pytest.fixture(scope="module")
def curve() -> CollapseCurve:
    return collapse_curve(loaded(HOOKED[0]), lambda k: [0, 40] + [7] * k, range(1, 14), ("float32",))


@pytest.fixture(scope="module")
def sensitivity() -> MeasuredSensitivity:
    return measured_sensitivity(loaded(HOOKED[0]), [0, 40, *[7] * 9], probes=2)


def heard(one: MeasuredSensitivity, values: Sequence[float]) -> MeasuredSensitivity:
    return replace(one, values=torch.tensor(values, dtype=one.values.dtype))


def test_the_lowest_decile_and_the_early_share_by_hand(sensitivity: MeasuredSensitivity) -> None:
    one = heard(sensitivity, [5.0, 1.0, 2.0, 3.0, 4.0, 10.0, 9.0, 8.0, 7.0, 6.0, 11.0])
    assert lowest_decile(one) == pytest.approx(2.0)  # of 11 numbers the second smallest
    assert early_share(one) == pytest.approx(15 / 66)
    assert early_share(heard(sensitivity, [1.0] * 11)) == pytest.approx(5 / 11)


@pytest.mark.parametrize(
    ("with_window", "collapse_held", "least", "squash_held"),
    [
        ([9.0] * 13, True, 2.0, True),
        ([9.0] * 10 + [8.0, 8.0, 7.9], False, 0.5, False),
        ([9.0] * 10 + [8.0, 1.0, 8.0], True, 1.0, False),
    ],
)
def test_the_verdict_flips(
    with_window: list[float],
    collapse_held: bool,
    least: float,
    squash_held: bool,
    curve: CollapseCurve,
    sensitivity: MeasuredSensitivity,
) -> None:
    def of(values: Any) -> CollapseCurve:
        return replace(curve, l1={"float32": torch.tensor(values)})

    falling = [1.0 / k for k in range(1, 14)]
    curves = {4: of(falling), 16: of(with_window), None: of(falling)}
    sensitivities = {
        4: heard(sensitivity, [0.1] * 11),
        16: heard(sensitivity, [least] * 11),
        None: heard(sensitivity, [1.0] * 11),
    }
    collapsed, squashed = recipe._verdicts(curves, sensitivities)
    assert (collapsed.held, squashed.held) == (collapse_held, squash_held)
    assert f"at best {with_window[-1]:.3g} with one of 16" in collapsed.number
    assert "0.0769 without a window (exponent -1.00)" in collapsed.number
    assert f"1 without a window, 0.1 with 4, {least:.3g} with 16" in squashed.number
