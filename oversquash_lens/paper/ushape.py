"""Section 5's U-shape: is a planted fact heard better at the beginning and the end of a prompt than in the middle?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oversquash_lens.capture.prefixes import common
from oversquash_lens.capture.recorder import record
from oversquash_lens.capture.tokens import text_ids
from oversquash_lens.errors import InputError
from oversquash_lens.jacobian.measured import measured_sensitivity
from oversquash_lens.paper.run_config import RunConfig
from oversquash_lens.paths.profiles import mean_field_sensitivity
from oversquash_lens.viz.chart import Chart, Panel, Series, Verdict

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
    start, end = (common(text_ids(model, part, bos=bos), ids) for part in (head, head + FACT))
    return Planted(before / sentences, ids, slice(start, end), answered[common(ids, answered) :])


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
        truth = measured_sensitivity(config.model, ids, probes=options.probes, seed=options.seed)
        measured.append(truth.values[prompt.fact].square().sum().sqrt().item())
        field = mean_field_sensitivity(record(config.model, ids, seed=options.seed))
        estimated.append(field.values[prompt.fact].square().sum().sqrt().item())
        answered.append(log_probability(config.model, prompt))
    x = tuple(prompt.depth for prompt in prompts)
    heard = Panel(
        "what the last token hears of the fact",
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
        (heard, answer),
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
        f"a fact is heard better at both ends than in the middle ({how})",
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
