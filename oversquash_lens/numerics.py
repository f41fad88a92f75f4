"""Numbers wherever they lie: in float64, without autocast, as JSON, and how many positions a share is spread over."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def to_float64(x: Tensor) -> Tensor:
    """`x` in float64; on the CPU where its own device has none (Apple's)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


@contextmanager
def without_autocast() -> Iterator[None]:
    """What a caller lets the model do, round products to half precision, is not for the measures."""
    with ExitStack() as stack:
        for device in filter(torch.is_autocast_enabled, ("cpu", "cuda", "mps")):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def effective_number(share: Float[Tensor, "*rows pos"]) -> Float[Tensor, "*rows"]:
    """How many positions a share is spread over: exp of its entropy, from 1 (all on one) to n (uniform).

    >>> effective_number(torch.tensor([0.25, 0.25, 0.25, 0.25])).item()
    4.0
    """
    return torch.special.entr(share).sum(-1).exp()


def json_numbers(value: Tensor | list | float) -> Any:
    """Nested lists of floats with None in place of what JSON cannot hold.

    >>> json_numbers(torch.tensor([1.0, -math.inf]))
    [1.0, None]
    """
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [json_numbers(item) for item in value]
    return value if math.isfinite(value) else None
