"""Two claims of the paper that it prints no figure for, measured: the U-shape and sliding windows.

Section 5: is the last token more sensitive to a planted fact at the beginning and the end of a prompt than in the
middle? Appendix C.6: does a sliding window avoid over-squashing and collapse?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import oversquash_lens as osl
from oversquash_lens.capture.tokens import text_ids
from oversquash_lens.collapse import families
from oversquash_lens.collapse.curve import CollapseCurve, collapse_curve
from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured import MeasuredSensitivity
from oversquash_lens.paper.generator import common_beginning
from oversquash_lens.paper.published import exponent
from oversquash_lens.paper.reproduce import RunConfig
from oversquash_lens.viz.chart import Chart, Panel, Series, Verdict
from oversquash_lens.viz.result_charts import curve_numbers

FACT = " The code of the blue locker is 7."
OPENING = "Notes about the library."
QUESTION = " The code of the blue locker is"
ANSWER = " 7"
FILLERS = (
    " The library opens at nine and closes when the last reader leaves.",
    " A long corridor leads past the reading room to the garden.",
    " In spring the gardener plants herbs along the southern wall.",
    " The old clock above the door has been slow for years.",
    " Visitors often ask where the maps of the harbour are kept.",
    " Two cats sleep on the window sill whenever the sun shines.",
    " The bakery across the street smells of bread in the morning.",
    " A choir rehearses in the hall on the first Monday of the month.",
    " The roof was mended after the storm took some of its tiles.",
    " Children come in the afternoon to listen to stories.",
    " The oldest book of the house describes the stars.",
    " On market days the square is full of flowers and noise.",
)
FILLED, QUICK_FILLED = 24, 8  # filler sentences around the fact
PLACES, QUICK_PLACES = 9, 5


@dataclass(frozen=True)
class Planted:
    """A prompt with the fact at one depth in [0, 1], where the fact's tokens lie, and the right answer's tokens."""

    depth: float
    ids: tuple[int, ...]
    fact: slice
    answer: tuple[int, ...]


def planted(model: Any, sentences: int, before: int, bos: bool | None = None) -> Planted:
    """`sentences` fillers with the fact after the first `before` of them, then the question."""
    if not 0 <= before <= sentences:
        raise InputError(f"expected 0 … {sentences}, the number of filler sentences, got before={before}")
    fillers = [FILLERS[i % len(FILLERS)] for i in range(sentences)]
    head = "".join([OPENING, *fillers[:before]])
    text = "".join([head, FACT, *fillers[before:], QUESTION])
    ids, answered = text_ids(model, text, bos=bos), text_ids(model, text + ANSWER, bos=bos)
    start, end = (common_beginning(text_ids(model, part, bos=bos), ids) for part in (head, head + FACT))
    return Planted(before / sentences, ids, slice(start, end), answered[common_beginning(ids, answered) :])


def ushape(config: RunConfig) -> Chart:
    """Measured sensitivity and the mean-field estimate of the fact's tokens, and the answer's log-probability."""
    options = config.options
    sentences = QUICK_FILLED if options.quick else FILLED
    places = QUICK_PLACES if options.quick else PLACES
    depths = sorted({round(i * sentences / (places - 1)) for i in range(places)})
    prompts = [planted(config.model, sentences, before, options.bos) for before in depths]
    measured, estimated, answered = [], [], []
    for prompt in prompts:
        ids = list(prompt.ids)
        truth = osl.measured_sensitivity(config.model, ids, probes=options.probes, seed=options.seed)
        measured.append(truth.values[prompt.fact].square().sum().sqrt().item())
        field = osl.mean_field_sensitivity(osl.record(config.model, ids, seed=options.seed))
        estimated.append(field.values[prompt.fact].square().sum().sqrt().item())
        answered.append(log_probability(config.model, prompt))
    x = tuple(prompt.depth for prompt in prompts)
    sensitivity = Panel(
        "sensitivity of the last token to the fact",
        "depth of the fact (0 the beginning, 1 the end)",
        "‖∂y_n/∂fact‖, Frobenius",
        (
            Series(f"measured, {options.probes} probes", x, tuple(measured)),
            Series("mean-field estimate", x, tuple(estimated)),
        ),
        y_axis="log",
    )
    answer = Panel(
        "does it answer?",
        "depth of the fact",
        f"log p({ANSWER.strip()!r})",
        (Series("the answer", x, tuple(answered)),),
    )
    return Chart(
        "ushape",
        "U-shape: a planted fact at every depth (section 5)",
        (sensitivity, answer),
        (_verdict(x, measured, "measured"), _verdict(x, estimated, "mean-field estimate")),
        config.label,
        setup=(
            f"{sentences} filler sentences of ours, {len(prompts[0].ids)} tokens; the fact{FACT!r}, asked for by"
            f"{QUESTION!r}; root of the summed squares over the fact's tokens.",
        ),
        columns=2,
    )


def ends_over_middle(depths: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Both ends over the mean of the middle third; both above 1: a U.

    >>> ends_over_middle([0.0, 0.5, 1.0], [3.0, 1.0, 2.0])
    (3.0, 2.0)
    """
    middle = [value for depth, value in zip(depths, values, strict=True) if abs(depth - 0.5) < 1 / 6 + 1e-9]
    mean = sum(middle) / len(middle)
    return values[0] / mean, values[-1] / mean


def _verdict(depths: Sequence[float], values: Sequence[float], how: str) -> Verdict:
    first, last = ends_over_middle(depths, values)
    return Verdict(
        f"the last token is more sensitive to a fact at either end than in the middle ({how})",
        f"over the mean of the middle third: {first:.2f} at the beginning, {last:.2f} at the end",
        min(first, last) > 1,
    )


def log_probability(model: Any, prompt: Planted) -> float:
    """Joint log-probability, natural log, of the answer's tokens after the prompt."""
    ids, answer = prompt.ids, prompt.answer
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *answer]], device=model.W_E.device))[0]
    rows = logits[len(ids) - 1 : -1].double().log_softmax(-1)
    return rows[range(len(answer)), list(answer)].sum().item()


WIDTHS, QUICK_WIDTHS = (4, 8, 16, 32, 64, 128, None), (4, 16, 64, None)
START = 11  # ones at which a curve has left its first steps behind
PROBED_AT = 101  # ones in the prompt whose measured sensitivity is drawn


def window(config: RunConfig) -> Chart:
    """Collapse of counting, and the sensitivity to each token, against the width of the attention window."""
    options = config.options
    wanted = config.lengths("window")
    widths = QUICK_WIDTHS if options.quick else WIDTHS
    family = families.counting(config.model, bos=options.bos)
    lengths, left_out = config.readable(wanted, family)
    probed_at = min(PROBED_AT, lengths[-1])
    prompt = list(family.pair(probed_at)[0])
    curves: dict[int | None, CollapseCurve] = {}
    measured: dict[int | None, MeasuredSensitivity] = {}
    for width in widths:
        with osl.edited_attention(config.model, None if width is None else osl.edits.window(width)):
            curves[width] = collapse_curve(
                config.model, family, range(1, lengths[-1] + 1), ("float32",), progress=options.progress
            )
            measured[width] = osl.measured_sensitivity(config.model, prompt, probes=options.probes, seed=options.seed)
    return Chart(
        "window",
        "Sliding-window attention (appendix C.6)",
        (_collapse(curves), _by_width(curves), _by_position(measured), _early(measured)),
        _verdicts(curves, measured),
        config.label,
        setup=(
            "Counting ones; in every layer each position attends to the last `width` positions only, itself included.",
            f"Sensitivity: measured with {options.probes} probes on {probed_at} ones.",
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


def _by_position(measured: dict[int | None, MeasuredSensitivity]) -> Panel:
    series = [
        Series(_name(width), tuple(map(float, range(len(one.values)))), tuple(one.values.tolist()))
        for width, one in measured.items()
    ]
    y_label = "‖∂y_n/∂v_i‖, Frobenius"
    return Panel("measured sensitivity", "position", y_label, tuple(series), y_axis="log", zero="no sensitivity")


def lowest_decile(one: MeasuredSensitivity) -> float:
    """Sensitivity that nine tokens of ten exceed: what over-squashing squashes."""
    return one.values.quantile(0.1).item()


def early_share(one: MeasuredSensitivity) -> float:
    """What the first half of the prompt makes of all sensitivity; in [0, 1], ½ where all tokens count alike."""
    return one.share[: len(one.share) // 2].sum().item()


def _early(measured: dict[int | None, MeasuredSensitivity]) -> Panel:
    x = tuple(float(width or len(one.values)) for width, one in measured.items())
    y = tuple(early_share(one) for one in measured.values())
    return Panel(
        "share of the first half of the prompt",
        "width of the window",
        "share of the sensitivity",
        (Series("measured", x, y),),
        x_axis="category",
        reference=(0.5, "all tokens alike"),
    )


def _verdicts(
    curves: dict[int | None, CollapseCurve], measured: dict[int | None, MeasuredSensitivity]
) -> tuple[Verdict, ...]:
    last = {width: curve.l1["float32"][-1].item() for width, curve in curves.items()}
    start = {width: curve.l1["float32"][START - 1].item() for width, curve in curves.items()}
    slopes = {
        width: exponent(curve.lengths, curve.l1["float32"].tolist(), beyond=10) for width, curve in curves.items()
    }
    longest = curves[None].lengths[-1]
    best = max((width for width in curves if width is not None), key=lambda width: last[width])
    least = {width: lowest_decile(one) for width, one in measured.items()}
    return (
        Verdict(
            "a sliding window avoids representational collapse",
            f"L1 at {longest} ones: {last[None]:.3g} without a window (exponent {slopes[None]:.2f}), at best "
            f"{last[best]:.3g} with one of {best} (exponent {slopes[best]:.2f})",
            last[best] >= start[best],
        ),
        Verdict(
            "a sliding window avoids over-squashing: the sensitivity to the least influential tokens grows",
            f"sensitivity that nine tokens of ten exceed: {least[None]:.3g} without a window, "
            + ", ".join(f"{least[width]:.3g} with {width}" for width in least if width is not None),
            any(least[width] > least[None] for width in least if width is not None),
        ),
    )
