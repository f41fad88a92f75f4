"""The one-layer set-up of figures 8 and 10: last rows against whole attention matrices, parts against identities."""

from __future__ import annotations

import cmath
import math
from dataclasses import replace

import pytest
import torch

from oversquash_lens.errors import InputError
from oversquash_lens.paper import gaussian_layer
from oversquash_lens.paper.gaussian_layer import ENCODINGS, NORMS, D, Reading

LENGTHS = (1, 2, 5, 12)
SHAPES = {
    "stated, figure 8": gaussian_layer.LAYER_8,
    "stated, figure 10": gaussian_layer.LAYER_10,
    "vectors": Reading("", source="vectors", std=0.3, unit_tokens=False, places="q, k, v"),
    "shared": Reading("", source="shared", std=0.2, unit_tokens=False, position_scale=0.5),
    "residual": replace(gaussian_layer.LAYER_10, output="residual", bias_inside=False, divisor=1.0),
    "normed": replace(gaussian_layer.LAYER_10, output="normed", unit_tokens=False, weight_std=1 / D),
}


# An independent layer: whole attention matrices, positions one at a time, rotations as complex numbers.


def position_vector(place: int) -> torch.Tensor:
    entries = []
    for pair in range(D // 2):
        angle = place / 10000 ** (2 * pair / D)
        entries += [math.sin(angle), math.cos(angle)]
    return torch.tensor(entries, dtype=torch.float64)


def turned(vector: torch.Tensor, place: int) -> torch.Tensor:
    entries = []
    for pair in range(D // 2):
        number = complex(vector[2 * pair], vector[2 * pair + 1])
        number *= cmath.exp(1j * place / 10000 ** (2 * pair / D))
        entries += [number.real, number.imag]
    return torch.tensor(entries, dtype=torch.float64)


def naive_outputs(reading: Reading, encoding: str, drawn: gaussian_layer.Draw, index: list[int]) -> torch.Tensor:
    """Output at every position of the sequence of tokens `index`, through a masked n × n attention matrix."""
    three = []
    for which in range(3):
        rows = [drawn.sequences[min(which, len(drawn.sequences) - 1), token] for token in index]
        if encoding == "sinusoidal" and reading.places == "tokens":
            rows = [row + reading.position_scale * position_vector(place) for place, row in enumerate(rows)]
        stream = torch.stack(rows)
        if reading.unit_tokens:
            rows = [row / row.square().sum().sqrt() for row in rows]
        if drawn.weights is not None:
            rows = [drawn.weights[which].T @ row for row in rows]
        if encoding == "sinusoidal" and reading.places != "tokens" and "qkv"[which] in reading.places:
            rows = [row + reading.position_scale * position_vector(place) for place, row in enumerate(rows)]
        if encoding == "RoPE" and which < 2:
            rows = [turned(row, place) for place, row in enumerate(rows)]
        three.append(torch.stack(rows))
    q, k, v = three
    n = len(index)
    distance = (torch.arange(n)[:, None] - torch.arange(n)).double()
    bias = -distance / 256 if encoding == "ALiBi" else torch.zeros(n, n, dtype=torch.float64)
    scores = (q @ k.T + bias) / reading.divisor if reading.bias_inside else q @ k.T / reading.divisor + bias
    pattern = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)
    out = pattern @ v if reading.output == "attention" else pattern @ v + stream
    return out / out.square().mean(-1, keepdim=True).sqrt() if reading.output == "normed" else out


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_last_rows_are_those_of_full_attention(shape: str, encoding: str) -> None:
    reading = SHAPES[shape]
    drawn = gaussian_layer.draw(reading, max(LENGTHS), seed=3)
    ours = gaussian_layer.repeated_token_difference(reading, encoding, drawn, LENGTHS)
    for row, n in zip(ours, LENGTHS, strict=True):
        once = naive_outputs(reading, encoding, drawn, [*range(n)])
        twice = naive_outputs(reading, encoding, drawn, [*range(n), n - 1])
        torch.testing.assert_close(row, twice[-1] - once[-1], rtol=1e-9, atol=1e-13)


def test_without_positions_one_token_repeated_changes_nothing() -> None:
    drawn = gaussian_layer.draw(gaussian_layer.LAYER_10, 1, seed=0)
    for encoding in ("NoPE", "RoPE", "ALiBi"):
        moved = gaussian_layer.repeated_token_difference(gaussian_layer.LAYER_10, encoding, drawn, (1,))
        assert moved.abs().max() < 1e-15


def test_without_positions_the_change_is_what_the_repeated_token_draws() -> None:
    """v*_{n+1} - v_n = α* (v - v_n), α* the weight of the repeated token: exact, whatever the scores."""
    reading, n = gaussian_layer.LAYER_10, 9
    drawn = gaussian_layer.draw(reading, n, seed=1)
    q, k, v = gaussian_layer.heads(reading, "NoPE", drawn, torch.arange(n), torch.arange(n))
    weights = (torch.cat([k, k[-1:]]) @ q[-1] / math.sqrt(D)).exp()
    weight = (weights / weights.sum())[-1]
    before = gaussian_layer.last_output(reading, "NoPE", q[-1], k, v)
    moved = gaussian_layer.repeated_token_difference(reading, "NoPE", drawn, (n,))[0]
    torch.testing.assert_close(moved, weight * (v[-1] - before), rtol=1e-10, atol=1e-14)


def test_rotation_keeps_lengths_and_sees_distances_only() -> None:
    x, y = torch.randn(2, 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    products = []
    for place in (0, 7, 4000):
        at, further = torch.tensor([place]), torch.tensor([place + 3])
        a, b = gaussian_layer.rotated(x, at), gaussian_layer.rotated(y, further)
        assert a.norm().item() == pytest.approx(x.norm().item(), rel=1e-12)
        products.append((a * b).sum().item())
    assert products[1:] == pytest.approx([products[0]] * 2, rel=1e-9)


def test_the_stated_layer_has_q_k_v_of_variance_one_over_d() -> None:
    """What the paper says of figure 8's q, k and v; a matrix of 64² entries knows it to 2 %."""
    drawn = gaussian_layer.draw(gaussian_layer.LAYER_8, 2000, seed=0)
    qkv = gaussian_layer.heads(gaussian_layer.LAYER_8, "NoPE", drawn, torch.arange(2000), torch.arange(2000))
    assert D * qkv.square().mean((1, 2)) == pytest.approx([1.0] * 3, rel=0.1)


def test_a_seed_is_a_seed_and_lengths_are_prefixes() -> None:
    one = gaussian_layer.differences(gaussian_layer.LAYER_8, ["sinusoidal"], (5, 20), 2)["sinusoidal"]
    more = gaussian_layer.differences(gaussian_layer.LAYER_8, ["RoPE", "sinusoidal"], (5, 20), 3)["sinusoidal"]
    assert torch.equal(one, more[:2])
    assert not torch.equal(more[0], more[1])


def test_norms_are_what_their_names_say() -> None:
    vector = torch.tensor([3.0, -4.0])
    assert {name: norm(vector).item() for name, norm in NORMS.items()} == {"L1": 7, "L1/d": 3.5, "L2": 5, "L∞": 4}


def test_a_reading_of_unknown_words_is_refused() -> None:
    for wrong in ({"source": "dice"}, {"places": "v"}, {"output": "logits"}):
        with pytest.raises(InputError, match="expected one of"):
            Reading("wrong", **wrong)
    with pytest.raises(InputError, match="no residual stream"):
        Reading("wrong", source="vectors", output="normed")
