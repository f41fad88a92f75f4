"""Appendix C.6: does a sliding window avoid over-squashing and collapse? The paper claims it without a figure."""

from __future__ import annotations

from oversquash_lens.capture.edits import edited_attention, sliding_window
from oversquash_lens.collapse import families
from oversquash_lens.collapse.curve import CollapseCurve, collapse_curve
from oversquash_lens.jacobian.measured import MeasuredSensitivity, measured_sensitivity
from oversquash_lens.paper.judging import exponent
from oversquash_lens.paper.run_config import RunConfig
from oversquash_lens.viz.chart import Chart, Panel, Series, Verdict
from oversquash_lens.viz.result_charts import curve_numbers

WIDTHS, QUICK_WIDTHS = (4, 8, 16, 32, 64, 128, None), (4, 16, 64, None)
START = 11  # ones at which a curve has left its first steps behind
HEARD_AT = 101  # ones in the prompt whose measured sensitivity is drawn


def window(config: RunConfig) -> Chart:
    """Collapse of counting, and who is heard, against the width of the attention window."""
    options = config.options
    wanted = config.lengths("window")
    widths = QUICK_WIDTHS if options.quick else WIDTHS
    family = families.counting(config.model, bos=options.bos)
    lengths, left_out = config.readable(wanted, family)
    heard_at = min(HEARD_AT, lengths[-1])
    prompt = list(family.pair(heard_at)[0])
    curves: dict[int | None, CollapseCurve] = {}
    heard: dict[int | None, MeasuredSensitivity] = {}
    for width in widths:
        with edited_attention(config.model, None if width is None else sliding_window(width)):
            curves[width] = collapse_curve(
                config.model, family, range(1, lengths[-1] + 1), ("float32",), progress=options.progress
            )
            heard[width] = measured_sensitivity(config.model, prompt, probes=options.probes, seed=options.seed)
    return Chart(
        "window",
        "Sliding-window attention (appendix C.6)",
        (_collapse(curves), _by_width(curves), _heard(heard), _early(heard)),
        _verdicts(curves, heard),
        config.label,
        setup=(
            "Counting ones; in every layer each position attends to the last `width` positions only, itself included.",
            f"Sensitivity: measured with {options.probes} probes on {heard_at} ones.",
        ),
        notes=left_out,
        columns=2,
        data={_name(width): curve_numbers(curve) for width, curve in curves.items()},
    )


def _name(width: int | None) -> str:
    return "whole prompt" if width is None else f"window of {width}"


def _collapse(curves: dict[int | None, CollapseCurve]) -> Panel:
    series = [
        Series(_name(width), tuple(map(float, curve.lengths)), tuple(curve.l1["float32"].tolist()))
        for width, curve in curves.items()
    ]
    return Panel("collapse", "ones", "change of y, L1", tuple(series), x_axis="log", y_axis="log")


def _by_width(curves: dict[int | None, CollapseCurve]) -> Panel:
    """L1 at a few lengths against the width; the widest is the whole prompt."""
    longest = next(iter(curves.values())).lengths[-1]
    x = tuple(float(width or longest) for width in curves)
    lengths = [k for k in (START, 101, 501) if k <= longest]
    series = [
        Series(f"{k} ones", x, tuple(curve.l1["float32"][k - 1].item() for curve in curves.values())) for k in lengths
    ]
    return Panel("collapse against width", "width of the window", "change of y, L1", tuple(series), "category", "log")


def _heard(heard: dict[int | None, MeasuredSensitivity]) -> Panel:
    series = [
        Series(_name(width), tuple(map(float, range(len(one.values)))), tuple(one.values.tolist()))
        for width, one in heard.items()
    ]
    y_label = "‖∂y_n/∂v_i‖, Frobenius"
    return Panel("measured sensitivity", "position", y_label, tuple(series), y_axis="log", zero="not heard")


def least_heard(one: MeasuredSensitivity) -> float:
    """Sensitivity that nine tokens of ten exceed: what over-squashing squashes."""
    return one.values.quantile(0.1).item()


def early_share(one: MeasuredSensitivity) -> float:
    """What the first half of the prompt makes of all sensitivity; in [0, 1], ½ where everybody is heard alike."""
    return one.share[: len(one.share) // 2].sum().item()


def _early(heard: dict[int | None, MeasuredSensitivity]) -> Panel:
    x = tuple(float(width or len(one.values)) for width, one in heard.items())
    y = tuple(early_share(one) for one in heard.values())
    return Panel(
        "share of the first half of the prompt",
        "width of the window",
        "share of the sensitivity",
        (Series("measured", x, y),),
        x_axis="category",
        reference=(0.5, "everybody alike"),
    )


def _verdicts(
    curves: dict[int | None, CollapseCurve], heard: dict[int | None, MeasuredSensitivity]
) -> tuple[Verdict, ...]:
    last = {width: curve.l1["float32"][-1].item() for width, curve in curves.items()}
    start = {width: curve.l1["float32"][START - 1].item() for width, curve in curves.items()}
    slopes = {
        width: exponent(curve.lengths, curve.l1["float32"].tolist(), beyond=10) for width, curve in curves.items()
    }
    longest = curves[None].lengths[-1]
    best = max((width for width in curves if width is not None), key=lambda width: last[width])
    least = {width: least_heard(one) for width, one in heard.items()}
    return (
        Verdict(
            "a sliding window avoids representational collapse",
            f"L1 at {longest} ones: {last[None]:.3g} without a window (exponent {slopes[None]:.2f}), at best "
            f"{last[best]:.3g} with one of {best} (exponent {slopes[best]:.2f})",
            last[best] >= start[best],
        ),
        Verdict(
            "a sliding window avoids over-squashing: the least heard tokens are heard better",
            f"sensitivity that nine tokens of ten exceed: {least[None]:.3g} without a window, "
            + ", ".join(f"{least[width]:.3g} with {width}" for width in least if width is not None),
            any(least[width] > least[None] for width in least if width is not None),
        ),
    )
