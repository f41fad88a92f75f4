"""What positions do to queries, keys and scores, where the hooks show these before it only."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def halves_turned(
    x: Float[Tensor, "pos head d_head"], cos: Float[Tensor, "pos rotary"], sin: Float[Tensor, "pos rotary"]
) -> Float[Tensor, "pos head d_head"]:
    """The first `rotary` coordinates turned, each of their first half with its like in the second (NeoX, Llama)."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    across = torch.cat((-second, first), -1)
    return torch.cat((turned * cos[:, None] + across * sin[:, None], rest), -1)


def halves_turned_back(
    x: Float[Tensor, "pos head d_head"], cos: Float[Tensor, "pos rotary"], sin: Float[Tensor, "pos rotary"]
) -> Float[Tensor, "pos head d_head"]:
    """What `halves_turned` was given, also where the turn stretched it (YaRN)."""
    stretched = cos.square() + sin.square()
    return halves_turned(x, cos / stretched, -sin / stretched)


def pairs_turned(x: Float[Tensor, "pos head d_head"], rotary_dim: int) -> Float[Tensor, "pos head d_head"]:
    """Neighbouring pairs of the first `rotary_dim` coordinates turned by the position, at base 10000 (GPT-J)."""
    if not rotary_dim:
        return x
    place = torch.arange(0, rotary_dim, 2, device=x.device, dtype=torch.float64)
    position = torch.arange(len(x), device=x.device, dtype=torch.float64)
    angle = position[:, None, None] * 10000.0 ** (-place / rotary_dim)
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    even, odd = x[..., :rotary_dim:2], x[..., 1:rotary_dim:2]
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
    return torch.cat((pairs.flatten(-2), x[..., rotary_dim:]), -1)


def linear_bias(heads: int, n: int, like: Tensor) -> Float[Tensor, "head pos"]:
    """ALiBi: what every score of a source position gains, counted from the first position (Press et al. 2022).

    Slopes are 2^(-8/h), 2^(-16/h), … for h heads; where h is no power of two, those of the next lower one and then
    every other of the next higher one.

    >>> linear_bias(2, 3, torch.zeros(1))
    tensor([[0.0000, 0.0625, 0.1250],
            [0.0000, 0.0039, 0.0078]])
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]
    places = torch.arange(n, device=like.device, dtype=torch.float32)
    return (torch.tensor(slopes, device=like.device)[:, None] * places).to(like.dtype)
