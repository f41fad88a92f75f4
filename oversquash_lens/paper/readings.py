"""How the paper's one-layer set-up can be read, and which readings meet its figures 8 and 10.

The text gives: one attention layer, d = 64, Gaussian q, k, v of variance 1/d with sinusoidal positions (figure 8); one
head, standard Gaussian tokens and four positional encodings (figure 10); the last token repeated. It leaves open how q,
k and v come from tokens, what the positions are added to, and the norm. Each reading below is one that the words
allow; all are computed, and none has a number of its own that could be tuned.

The layer that meets both figures is the paper's own, pre-norm and all: standard Gaussian tokens normed to length 1,
matrices of variance 1/d (so that q, k and v have it too), scores divided by √d, attention's output without the residual
stream. The figures differ in where sinusoids go and in the norm, and have to: at n = 5 the print has 1 in figure 10 and
0.07 in figure 8, at n = 1000 nearly the same in both, so no factor between norms takes one curve to the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from oversquash_lens.paper import published
from oversquash_lens.paper.agreement import Agreement, agree
from oversquash_lens.paper.gaussian_layer import NORMS, D, Reading, differences
from oversquash_lens.viz.chart import Table

ROOT = math.sqrt(D)

LAYER_8 = Reading("Gaussian tokens normed to length 1, matrices of variance 1/d, sinusoids added to q and k")
NORM_8 = "L∞"  # of the printed level; the norm of the paper's figure 5

LAYER_10 = replace(
    LAYER_8,
    name="Gaussian tokens, sinusoids added to them, normed to length 1, matrices of variance 1/d",
    places="tokens",
)
NORM_10 = "L1"

_VECTORS = Reading("", source="vectors", std=1 / ROOT, unit_tokens=False)

# How q, k, v come about, where positions go, what is compared: one step away from the stated reading each.
OTHERS_8 = (
    replace(_VECTORS, name="q, k, v themselves Gaussian, variance 1/d"),
    replace(_VECTORS, name="one Gaussian sequence is q, k and v, variance 1/d", source="shared"),
    replace(LAYER_8, name="no pre-norm, matrices of standard deviation 1/d", unit_tokens=False, weight_std=1 / D),
    replace(LAYER_8, name="residual stream kept, RMS norm after", output="normed"),
    replace(_VECTORS, name="q, k, v themselves Gaussian, variance 1/d; sinusoids added to v too", places="q, k, v"),
    replace(_VECTORS, name="q, k, v themselves Gaussian, variance 1/d; scores not divided", divisor=1.0),
    replace(_VECTORS, name="q, k, v themselves Gaussian, standard deviation 1/d", std=1 / D),
    replace(_VECTORS, name="q, k, v themselves Gaussian, variance 1", std=1.0),
    replace(LAYER_8, name="no pre-norm", unit_tokens=False),
    replace(LAYER_8, name="sinusoids divided by √d", position_scale=1 / ROOT),
    replace(LAYER_8, name="sinusoids added to the tokens", places="tokens"),
    replace(LAYER_8, name="sinusoids added to the tokens, no pre-norm", places="tokens", unit_tokens=False),
    replace(LAYER_8, name="sinusoids added to the tokens, residual stream kept", places="tokens", output="residual"),
    replace(LAYER_8, name="scores not divided", divisor=1.0),
    replace(LAYER_8, name="scores divided by d", divisor=float(D)),
)
OTHERS_10 = (
    replace(_VECTORS, name="q, k, v themselves Gaussian, divided by √d with their sinusoids", position_scale=1 / ROOT),
    replace(LAYER_10, name="no pre-norm, matrices of standard deviation 1/d", unit_tokens=False, weight_std=1 / D),
    replace(LAYER_10, name="scores divided by d", divisor=float(D)),
    replace(LAYER_10, name="scores not divided", divisor=1.0),
    replace(LAYER_10, name="ALiBi's bias after the division by √d", bias_inside=False),
    replace(LAYER_10, name="sinusoids added to q and k", places="q, k"),
    replace(_VECTORS, name="q, k, v themselves Gaussian, variance 1/d; sinusoids added to q and k"),
    replace(_VECTORS, name="q, k, v themselves Gaussian, variance 1; sinusoids added to q and k", std=1.0),
    replace(_VECTORS, name="one Gaussian sequence is q, k and v, variance 1/d", source="shared"),
    replace(LAYER_10, name="no pre-norm", unit_tokens=False),
    replace(LAYER_10, name="residual stream kept", output="residual"),
    replace(LAYER_10, name="residual stream kept, RMS norm after", output="normed"),
)

Compared = Mapping[str, Agreement]  # encoding -> how our curve sits beside the printed one


def table_8(lengths: tuple[int, ...], seeds: int) -> Table:
    """Every reading of figure 8 beside its printed curve: the stated one in every norm, others in their best."""
    return _table("8", (LAYER_8, *OTHERS_8), {"sinusoidal": published.FIGURE_8}, lengths, seeds)


def table_10(lengths: tuple[int, ...], seeds: int) -> Table:
    """As `table_8` for figure 10 and its four encodings."""
    return _table("10", (LAYER_10, *OTHERS_10), published.FIGURE_10, lengths, seeds)


def _table(
    figure: str,
    readings: Iterable[Reading],
    printed: Mapping[str, published.Printed],
    lengths: tuple[int, ...],
    seeds: int,
) -> Table:
    rows = []
    for place, reading in enumerate(readings):
        moved = differences(reading, printed, lengths, seeds)
        by_norm = {norm: _compare(moved, norm, printed, lengths) for norm in NORMS}
        closest = min(by_norm, key=lambda norm: worst_factor(by_norm[norm]))
        for norm in sorted(NORMS, key=lambda norm: worst_factor(by_norm[norm])) if place == 0 else (closest,):
            rows.append((reading.name, norm, *_cells(by_norm[norm])))
    exponents = ("exponent",) if len(printed) == 1 else tuple(f"exponent, {encoding}" for encoding in printed)
    columns = ("reading", "norm", *exponents, "level, ours / paper", "worst factor", "meets the print")
    return Table(f"Readings of figure {figure}; first the one that is drawn", columns, tuple(rows))


def _compare(
    moved: Mapping[str, Float[Tensor, "seed length d"]],
    norm: str,
    printed: Mapping[str, published.Printed],
    lengths: tuple[int, ...],
) -> Compared:
    return {
        encoding: agree(tuple(map(float, lengths)), NORMS[norm](moved[encoding]).mean(0).tolist(), curve)
        for encoding, curve in printed.items()
    }


def _cells(compared: Compared) -> tuple[float | str, ...]:
    each = compared.values()
    level = math.prod(one.level for one in each) ** (1 / len(compared))
    met = all(one.exponent_met and one.level_met for one in each)
    exponents = (round(one.exponent, 3) for one in each)
    return (*exponents, _rounded(level), _rounded(worst_factor(compared)), "yes" if met else "no")


def worst_factor(compared: Compared) -> float:
    """By how much a level is off at the worst length of the worst encoding; 1 is perfect."""
    return max(one.worst for one in compared.values())


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
