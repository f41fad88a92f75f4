"""The words beside a view, the numbers as it carries them, and its colour key."""

from __future__ import annotations

import math
from collections.abc import Iterable

from oversquash_lens.jacobian.measured import MeasuredSensitivity
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.viz.html import MEANINGS, escape, visible_token

NAMES = {
    "truth": "Measured truth",
    "mean_field": "Mean-field estimate",
    "proof": "Paper’s bound",
    "proof, β = 1": "Paper’s bound with β = 1",
    "theorem_5_1": "Theorem 5.1 as printed",
    "theorem_b5": "Theorem B.5 as printed",
    "multi_head": "Multi-head bound",
    "rollout": "Attention rollout",
    "calibrated": "Calibrated bound, attention frozen",
    "calibrated_full": "Calibrated bound, nothing frozen",
    "count_paths": "Number of causal paths",
    "uniform_causal": "Uniform causal attention",
}
GLOSSES = {
    "mean_field": "path sensitivity from one forward pass, no gradient",
    "proof": "weighted count of attention paths, as in the proof of Theorem B.5",
    "theorem_5_1": "weighted count of attention paths, as the main text prints it",
    "theorem_b5": "weighted count of attention paths, as the appendix states it",
    "multi_head": "weighted count of attention paths, summed over heads",
    "rollout": "attention and residual stream in equal parts",
    "calibrated": "holds on a real model while the attention weights stand still",
    "calibrated_full": "holds on a real model",
    "count_paths": "null model: every edge of the causal mask counts 1",
    "uniform_causal": "null model: even attention to all earlier positions",
}


def caption(result: PathProfile | MeasuredSensitivity | Flow, topic: str = "Flow") -> str:
    """Name of the result and what it is, as HTML; `topic` is what is shown of a flow."""
    if isinstance(result, Flow):
        name, gloss = topic, f"{NAMES.get(result.kind, result.kind)}, paths {_origin(result)}"
    elif isinstance(result, PathProfile):
        name, gloss = NAMES.get(result.kind, result.kind), GLOSSES.get(result.kind, "")
    else:
        name = NAMES["truth"]
        gloss = "how far the last output moves with this token’s embedding: " + (
            "exact, by autograd" if result.exact else f"by autograd, {result.probes} random probes"
        )
        if result.freeze:
            gloss += f", {' and '.join(result.freeze)} frozen"
    return f"<strong>{escape(name)}</strong> <span>{escape(gloss)}</span>"


def _origin(flow: Flow) -> str:
    if flow.source is None:
        return "from all tokens to the last one"
    return f"from {named(flow.tokens, flow.source)} alone to the last one"


def named(tokens: tuple[str, ...], i: int) -> str:
    """A position in words; tokens count from 0.

    >>> named(("The", " cat"), 1)
    'token 1 ·cat'
    """
    return f"token {i} {visible_token(tokens[i], 24)}"


def percent(share: float) -> str:
    """A share in words, three digits.

    >>> percent(0.04132), percent(1.0), percent(2e-7)
    ('4.13 %', '100 %', 'less than 0.001 %')
    """
    return "less than 0.001 %" if share < 1e-5 else f"{100 * share:.3g} %"


def rounded(number: float, digits: int = 4) -> float:
    return float(f"{number:.{digits}g}")


def colour_key(floor: float) -> list[tuple[str, float]]:
    """Labels and shares of the colour key: the floor and every power of ten above it.

    >>> colour_key(0.002)
    [('≤ 0.002', 0.002), ('0.01', 0.01), ('0.1', 0.1), ('1', 1.0)]
    """
    tens = [10.0**power for power in range(math.floor(math.log10(1.5 * floor)) + 1, 1)]
    return [(f"≤ {plain(floor)}", floor)] + [(plain(ten), ten) for ten in tens]


def plain(number: float) -> str:
    """Two digits without an exponent.

    >>> plain(0.002), plain(1e-5), plain(1.0)
    ('0.002', '0.00001', '1')
    """
    return f"{number:.2g}" if number >= 1e-4 else f"{float(f'{number:.2g}'):.12f}".rstrip("0")


def guide(meaning: str, even: str, floor: float, tokens: Iterable[str], walk: str = "") -> str:
    """How to read a view, as HTML: what colour means; of the marks that stand for white space, those that occur."""
    shown = "".join({visible_token(token) for token in tokens})
    marks = ", ".join(text for mark, text in MEANINGS.items() if mark in shown)
    walk = walk or "Hover over a token, tap it or walk to it with the arrow keys for the number."
    return escape(
        f"Colour is {meaning}, on a logarithmic scale: none at {plain(floor)} ({even}) or less, full at 1. "
        f"{walk} Tokens count from 0{'; ' if marks else ''}{marks}."
    )
