"""Figures 8, 9 and 10, which need no language model, and the paths of figure 1(b)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.collapse.lemmas import softmax_total_variation
from oversquash_lens.errors import InputError
from oversquash_lens.paper import published
from oversquash_lens.paper.gaussian_layer import (
    ENCODINGS,
    LAYER_8,
    LAYER_10,
    NORM_8,
    NORM_10,
    NORMS,
    differences,
    table_8,
    table_10,
)
from oversquash_lens.paper.published import (
    agree,
    close_verdict,
    decline_verdict,
    exponent_verdict,
    level_verdict,
    spread_verdict,
)
from oversquash_lens.viz.chart import Chart, Panel, Paths, Series

LENGTHS_8 = tuple(published.FIGURE_8.points)
LENGTHS_9 = (500, 750, 1000, 1500, 2000, 2500, 3000, 4000, 5000, 10000)
LENGTHS_10 = tuple(published.FIGURE_10["ALiBi"].points)
SEEDS = 5
MODEL = "no language model: random numbers"
PERTURBED, NOISE = 200, 0.1  # figure 9: the first 200 entries of x get noise, uniform on [0, 0.1]
WITHIN_9 = 0.1
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
FAN_OUT = 5000  # figure 10: where the paper's four curves part


def figure_8(seeds: int = SEEDS, lengths: Sequence[int] | None = None) -> Chart:
    """One layer with sinusoidal positions: the last output before and after its token is repeated."""
    lengths = _checked(seeds, LENGTHS_8 if lengths is None else lengths)
    layer, norm = LAYER_8, NORM_8
    moved = differences(layer, ("sinusoidal",), lengths, seeds)["sinusoidal"]
    curves = {name: banded("sinusoidal", lengths, measure(moved)) for name, measure in NORMS.items()}
    agreements = {name: agree(each.x, each.y, published.FIGURE_8) for name, each in curves.items()}
    compared = {"sinusoidal": agreements[norm]}
    series = (curves[norm], published.FIGURE_8.series())
    return Chart(
        "8",
        "Figure 8: convergence with sinusoidal positions",
        (_panel("one attention layer, d = 64", f"distance of the last outputs, {norm}", series),),
        verdicts=(
            decline_verdict("the representations of n and n+1 tokens converge", (curves[norm],)),
            exponent_verdict(compared),
            level_verdict(compared),
        ),
        model=MODEL,
        setup=(
            f"Reading: {layer.name}; scores divided by √d; attention's output alone; its change in {norm}. "
            f"Mean and min–max over {seeds} seeds.",
        ),
        notes=(
            f"The paper names L1. Summed over coordinates it is {agreements['L1'].level:.2g} times as high as printed, "
            f"in their mean {agreements['L1/d'].level:.2g} times, with about the printed slope. {norm}, the norm of "
            "the paper's figure 5, has the printed level too. The table has every reading.",
        ),
        tables=(table_8(lengths, seeds),) if len(agreements[norm].lengths) > 1 else (),
        data={"agreement": {name: asdict(one) for name, one in compared.items()}},
    )


def figure_9(seeds: int = SEEDS, lengths: Sequence[int] | None = None) -> Chart:
    """Total variation of two softmaxes whose first 200 scores differ: Lemma B.2 at work."""
    lengths = _checked(seeds, LENGTHS_9 if lengths is None else lengths)
    curve = banded("total variation", lengths, torch.stack([total_variations(lengths, seed) for seed in range(seeds)]))
    compared = [agree(curve.x, curve.y, each) for each in (published.FIGURE_9, published.FIGURE_9_RECOMPUTED)]
    return Chart(
        "9",
        "Figure 9: total variation of softmax(x) and softmax(x*)",
        (_panel("scores of length n", "total variation, Σ|p − p*|", (curve, published.FIGURE_9.series()), "linear"),),
        verdicts=(
            decline_verdict("the total variation goes to 0 as n grows (Lemma B.2)", (curve,)),
            close_verdict(compared, WITHIN_9),
        ),
        model=MODEL,
        setup=(
            f"x uniform on [0, 1]; x* is x with noise uniform on [0, {NOISE:g}] on its first {PERTURBED} entries; no ½ "
            f"in the total variation. Mean and min–max over {seeds} seeds, float64.",
        ),
        notes=(
            "Printed values of one digit (2000, 5000, 10000) are coarse: 0.002 may be anything from 0.0015 to 0.0025. "
            "3000 and 4000 could not be read off the print; an earlier computation stands in for it in the verdict.",
        ),
        data={"agreement": dict(zip(("printed", "recomputed"), map(asdict, compared), strict=True))},
    )


def figure_10(seeds: int = SEEDS, lengths: Sequence[int] | None = None) -> Chart:
    """As figure 8, for four ways to tell a layer the positions."""
    lengths = _checked(seeds, LENGTHS_10 if lengths is None else lengths)
    layer, norm = LAYER_10, NORM_10
    moved = differences(layer, ENCODINGS, lengths, seeds)
    curves = {encoding: banded(encoding, lengths, NORMS[norm](each)) for encoding, each in moved.items()}
    compared = {name: agree(one.x, one.y, published.FIGURE_10[name]) for name, one in curves.items()}
    parted = {name: dict(zip(one.x, one.y, strict=True))[FAN_OUT] for name, one in curves.items() if FAN_OUT in one.x}
    series = (*curves.values(), *_printed_10())
    return Chart(
        "10",
        "Figure 10: convergence under four positional encodings",
        (_panel("one attention layer, one head, d = 64", f"distance of the last outputs, {norm}", series),),
        verdicts=(
            decline_verdict("the representations converge whatever tells the positions", tuple(curves.values())),
            exponent_verdict(compared),
            level_verdict(compared),
            spread_verdict(parted, published.FIGURE_10_AT_5000, "ALiBi", FAN_OUT),
        ),
        model=MODEL,
        setup=(
            f"Reading: {layer.name}; scores divided by √d, ALiBi's bias (slope 2⁻⁸) with them; attention's output "
            f"alone; its change in {norm}. Mean and min–max over {seeds} seeds.",
        ),
        notes=(
            "All readings that meet the print have q, k and v of variance about 1/d, L1 summed over coordinates, and "
            "ALiBi's bias inside the division by √d: added after it, the last few hundred tokens alone share the "
            "attention, and the curve levels off. The paper's four curves lie on one another up to 1000.",
        ),
        tables=(table_10(lengths, seeds),) if len(compared["NoPE"].lengths) > 1 else (),
        data={"agreement": {name: asdict(one) for name, one in compared.items()}},
    )


def figure_1_paths(n: int = 5, n_layers: int = 3, tokens: Sequence[int] = (1, 4)) -> tuple[Panel, ...]:
    """Figure 1(b), counted: over each edge, the causal paths from an early and from a late token to the last one.

    One panel each; tokens are numbered from 1, as the paper does. There are binomial(n-i+L-1, L-1) from token i.
    """
    if not 1 <= min(tokens) <= max(tokens) <= n or n_layers < 1:
        raise InputError(f"expected tokens 1 … n, n_layers ≥ 1, got tokens {tuple(tokens)} of {n}, {n_layers} layers")
    names = tuple(f"v{place}".translate(SUBSCRIPTS) for place in range(1, n + 1))
    return tuple(
        Panel(
            f"(b) token {token} of {n}",
            "token",
            "layer",
            paths=Paths(names, n_layers, token - 1, counted_edges(n, n_layers, token - 1)),
        )
        for token in tokens
    )


def counted_edges(n: int, n_layers: int, token: int) -> tuple[tuple[int, int, int, int], ...]:
    """(layer, source, destination, paths over this edge) of all causal paths from position `token` to position n-1.

    Paths from the token up to the edge's source, times paths from its destination on to the last position.

    >>> counted_edges(2, 2, 0)
    ((0, 0, 0, 1), (0, 0, 1, 1), (1, 0, 1, 1), (1, 1, 1, 1))
    """
    up = [[int(place == token) for place in range(n)]]
    down = [[int(place == n - 1) for place in range(n)]]
    for _ in range(n_layers):
        up.append(list(accumulate(up[-1])))
        down.append(list(accumulate(down[-1][::-1]))[::-1])
    down.reverse()
    return tuple(
        (layer, source, destination, up[layer][source] * down[layer + 1][destination])
        for layer in range(n_layers)
        for source in range(token, n)
        for destination in range(source, n)
        if up[layer][source] * down[layer + 1][destination]
    )


def total_variations(lengths: Sequence[int], seed: int) -> Float[Tensor, " length"]:
    """Total variation (0 … 2) of softmax(x) and softmax(x*) for each length, x a prefix of one sequence."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(max(lengths), generator=generator, dtype=torch.float64)
    noisy = x.clone()
    noise = NOISE * torch.rand(PERTURBED, generator=generator, dtype=torch.float64)
    noisy[:PERTURBED] += noise[: len(x)]
    return torch.stack([softmax_total_variation(x[:n], noisy[:n]) for n in lengths])


def banded(label: str, lengths: Sequence[int], values: Float[Tensor, "seed length"]) -> Series:
    """Mean over seeds, with the band from the smallest to the largest."""
    low, high = values.amin(0).tolist(), values.amax(0).tolist()
    return Series(label, tuple(map(float, lengths)), tuple(values.mean(0).tolist()), tuple(low), tuple(high))


def _panel(title: str, y_label: str, series: tuple[Series, ...], y_axis: str = "log") -> Panel:
    return Panel(title, "length n", y_label, series, "category", y_axis, reference=published.PRECISION)


def _printed_10() -> tuple[Series, ...]:
    """What the print shows: one curve for all four encodings up to 1000, then the fan's two ends."""
    low, high = published.FIGURE_10_AT_5000
    together = published.FIGURE_10["NoPE"].series()
    return (
        together,
        Series(f"paper at {FAN_OUT}: lowest", (float(FAN_OUT),), (low,), kind="published"),
        Series(f"paper at {FAN_OUT}: ALiBi", (float(FAN_OUT),), (high,), kind="published"),
    )


def _checked(seeds: int, lengths: Sequence[int]) -> tuple[int, ...]:
    if seeds < 1:
        raise InputError(f"expected at least 1, got seeds={seeds}")
    lengths = tuple(lengths)
    whole = bool(lengths) and all(isinstance(length, int) and length >= 1 for length in lengths)
    if not whole or list(lengths) != sorted(set(lengths)):
        raise InputError(f"expected whole numbers from 1 on, each larger than the one before, got lengths {lengths}")
    return lengths
