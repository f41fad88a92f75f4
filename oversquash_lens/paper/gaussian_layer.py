"""One attention layer on Gaussian tokens: how far its last output moves when the last token is repeated.

What figures 8 and 10 of the paper compute. Only the last row of attention is wanted, so a length costs O(pos · d), and
all lengths are prefixes of one sequence.

The text gives: one attention layer, d = 64, Gaussian q, k, v of variance 1/d with sinusoidal positions (figure 8); one
head, standard Gaussian tokens and four positional encodings (figure 10); the last token repeated. It leaves open how q,
k and v come from tokens, what the positions are added to, and the norm. A `Reading` is one way to fill that in. Each
reading below is one that the words allow; all are computed, and none has a number of its own that could be tuned.

The layer that meets both figures is the paper's own, pre-norm and all: standard Gaussian tokens normed to length 1,
matrices of variance 1/d (so that q, k and v have it too), scores divided by √d, attention's output without the residual
stream. The figures differ in where sinusoids go and in the norm, and have to: at n = 5 the print has 1 in figure 10 and
0.07 in figure 8, at n = 1000 nearly the same in both, so no factor between norms takes one curve to the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oversquash_lens.errors import InputError
from oversquash_lens.paper import published
from oversquash_lens.paper.published import Agreement, agree
from oversquash_lens.viz.chart import Table

D = 64  # width of the one head, in both figures
ENCODINGS = ("NoPE", "RoPE", "ALiBi", "sinusoidal")
SOURCES = ("tokens", "vectors", "shared")
PLACES = ("tokens", "q, k", "q, k, v")
OUTPUTS = ("attention", "residual", "normed")
BASE = 10000.0  # of the frequencies of sinusoidal and rotary positions alike
ALIBI_SLOPE = 2.0**-8  # Press et al. (2022): head h of H has slope 2^(-8h/H); here H = 1

Norm = Callable[[Float[Tensor, "... d"]], Float[Tensor, "..."]]
NORMS: Mapping[str, Norm] = MappingProxyType(
    {
        "L1": lambda difference: difference.abs().sum(-1),
        "L1/d": lambda difference: difference.abs().mean(-1),
        "L2": lambda difference: difference.norm(dim=-1),
        "L∞": lambda difference: difference.abs().amax(-1),
    }
)


@dataclass(frozen=True)
class Reading:
    """One way to read the paper's set-up of the layer; in which norm the difference is taken is chosen apart.

    `source`: what is drawn from a Gaussian of standard deviation `std`: the "tokens", which three Gaussian matrices of
    standard deviation `weight_std` project to q, k and v; or q, k and v themselves, as "vectors" of their own or
    "shared", one sequence that is all three.
    `unit_tokens`: each token is divided by its length before the projections: the layer's pre-norm, without a gain.
    `places`: what sinusoidal positions, times `position_scale`, are added to (tokens: before the pre-norm).
    `divisor`: of the scores. `bias_inside`: ALiBi's bias is added before that division, as softmax((q·k + bias)/√d).
    `output`: what is compared: attention's output alone, with the residual stream added, or that sum RMS-normed.
    """

    name: str
    source: str = "tokens"
    std: float = 1.0
    weight_std: float = 1 / math.sqrt(D)
    unit_tokens: bool = True
    places: str = "q, k"
    position_scale: float = 1.0
    divisor: float = math.sqrt(D)
    bias_inside: bool = True
    output: str = "attention"

    def __post_init__(self) -> None:
        for value, known in ((self.source, SOURCES), (self.places, PLACES), (self.output, OUTPUTS)):
            if value not in known:
                raise InputError(f"expected one of {'; '.join(known)}, got reading {self.name!r} with {value!r}")
        if self.source == "vectors" and self.output != "attention":
            raise InputError(
                f"reading {self.name!r} draws no tokens, so no residual stream; expected output='attention'"
            )


@dataclass(frozen=True)
class Draw:
    """What one seed gives: one sequence, or one each for q, k and v; and where tokens are drawn, three matrices."""

    sequences: Float[Tensor, "one_or_three pos d"]
    weights: Float[Tensor, "three d d"] | None


def draw(reading: Reading, length: int, seed: int) -> Draw:
    """The layer's random numbers, float64; the same seed gives every reading the same tokens."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if reading.source == "vectors":
        return Draw(reading.std * gaussian(3, length, D), None)
    sequences = reading.std * gaussian(1, length, D)
    return Draw(sequences, reading.weight_std * gaussian(3, D, D) if reading.source == "tokens" else None)


def sinusoids(positions: Int[Tensor, " pos"], d: int = D) -> Float[Tensor, "pos d"]:
    """Vaswani et al. (2017), section 3.5: sine and cosine in turn, of frequencies 1 … 1/10000; length √(d/2).

    >>> sinusoids(torch.tensor([0]), 4)
    tensor([[0., 1., 0., 1.]], dtype=torch.float64)
    """
    angles = _angles(positions, d)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def rotated(x: Float[Tensor, "... pos d"], positions: Int[Tensor, " pos"]) -> Float[Tensor, "... pos d"]:
    """RoPE (Su et al. 2021): coordinates 2i and 2i+1 turned by position · 10000^(-2i/d); keeps lengths."""
    angles = _angles(positions, x.shape[-1])
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _angles(positions: Int[Tensor, " pos"], d: int) -> Float[Tensor, "pos half"]:
    return positions[:, None] * BASE ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)


def residual_stream(
    reading: Reading, encoding: str, drawn: Draw, index: Int[Tensor, " pos"], positions: Int[Tensor, " pos"]
) -> Float[Tensor, "one_or_three pos d"]:
    """Tokens `index` of the draw as they enter the layer at `positions`."""
    tokens = drawn.sequences[:, index]
    if encoding == "sinusoidal" and reading.places == "tokens":
        tokens = tokens + reading.position_scale * sinusoids(positions)
    return tokens


def heads(
    reading: Reading, encoding: str, drawn: Draw, index: Int[Tensor, " pos"], positions: Int[Tensor, " pos"]
) -> Float[Tensor, "three pos d"]:
    """q, k and v of tokens `index` of the draw, standing at `positions`."""
    qkv = residual_stream(reading, encoding, drawn, index, positions)
    if reading.unit_tokens:
        qkv = qkv / qkv.norm(dim=-1, keepdim=True)
    if drawn.weights is not None:
        qkv = qkv @ drawn.weights
    qkv = qkv.expand(3, -1, -1)
    if encoding == "sinusoidal" and reading.places != "tokens":
        reached = torch.tensor([1.0, 1.0, float(reading.places == "q, k, v")], dtype=torch.float64)
        qkv = qkv + reached[:, None, None] * reading.position_scale * sinusoids(positions)
    if encoding == "RoPE":
        qkv = torch.cat([rotated(qkv[:2], positions), qkv[2:]])
    return qkv


def last_output(
    reading: Reading,
    encoding: str,
    q: Float[Tensor, " d"],
    k: Float[Tensor, "pos d"],
    v: Float[Tensor, "pos d"],
) -> Float[Tensor, " d"]:
    """Attention's output at the last position, whose query is `q`."""
    scores = k @ q / reading.divisor
    if encoding == "ALiBi":
        bias = -ALIBI_SLOPE * torch.arange(len(k) - 1, -1, -1, dtype=k.dtype)
        scores = scores + (bias / reading.divisor if reading.bias_inside else bias)
    return scores.softmax(-1) @ v


def repeated_token_difference(
    reading: Reading, encoding: str, drawn: Draw, lengths: Sequence[int]
) -> Float[Tensor, "length d"]:
    """Last output of a sequence with its last token repeated (n+1 tokens) minus that of the sequence (n tokens)."""
    ends = torch.tensor(lengths)
    every = torch.arange(max(lengths))
    q, k, v = heads(reading, encoding, drawn, every, every)
    q_again, k_again, v_again = heads(reading, encoding, drawn, ends - 1, ends)
    # Both sides' residual streams, where they are compared too: the repeated token stands one place further on.
    stream = residual_stream(reading, encoding, drawn, ends - 1, ends - 1)[0]
    stream_again = residual_stream(reading, encoding, drawn, ends - 1, ends)[0]
    rows = []
    for i, n in enumerate(lengths):
        once = last_output(reading, encoding, q[n - 1], k[:n], v[:n])
        keys, values = torch.cat([k[:n], k_again[i : i + 1]]), torch.cat([v[:n], v_again[i : i + 1]])
        twice = last_output(reading, encoding, q_again[i], keys, values)
        rows.append(_compared(reading, twice, stream_again[i]) - _compared(reading, once, stream[i]))
    return torch.stack(rows)


def _compared(reading: Reading, attention: Float[Tensor, " d"], stream: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    if reading.output == "attention":
        return attention
    total = attention + stream
    return total if reading.output == "residual" else total / total.square().mean().sqrt()


def differences(
    reading: Reading, encodings: Iterable[str], lengths: Sequence[int], seeds: int
) -> dict[str, Float[Tensor, "seed length d"]]:
    """`repeated_token_difference` by encoding, for seeds 0 … seeds-1."""
    rows: dict[str, list[Tensor]] = {encoding: [] for encoding in encodings}
    for seed in range(seeds):
        drawn = draw(reading, max(lengths), seed)
        for encoding, row in rows.items():
            row.append(repeated_token_difference(reading, encoding, drawn, lengths))
    return {encoding: torch.stack(row) for encoding, row in rows.items()}


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
