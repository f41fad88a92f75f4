"""Numbers wherever they lie: in float64, without autocast, as JSON, and how many positions a share is spread over."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode


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


def kl_divergence(log_p: Float[Tensor, " vocab"], log_q: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows"]:
    """KL(p ‖ q) of each row q, in nats, 0 or more; what p has no weight on does not count.

    >>> round(kl_divergence(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()).item(), 6)
    0.143841
    """
    return (log_p.exp() * (log_p - log_q)).nansum(-1).clamp(min=0)


def drawn_index(weights: Float[Tensor, " choice"], random: torch.Generator) -> int:
    """An index drawn with these weights (0 or more, not all 0, on the CPU), by one number of the generator."""
    steps = weights.double().cumsum(0)
    height = torch.rand((), generator=random, dtype=torch.float64) * steps[-1]
    return min(int(torch.searchsorted(steps, height, right=True)), len(steps) - 1)


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


class InDouble(TorchFunctionMode):
    """Within it a float64 tensor stays one where float32 is asked for.

    Hugging Face's classes do so in norms, softmax and rotations, whatever their weights are, to spare half precision
    the rounding; to float64 it is the largest rounding of all.

    >>> with InDouble():
    ...     torch.ones(1, dtype=torch.float64).float().softmax(0, dtype=torch.float32).dtype
    torch.float64
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(_widened(each) for each in args)
            kwargs = {key: _widened(each) for key, each in kwargs.items()}
        return func(*args, **kwargs)


def _widened(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


def spearman(first: Float[Tensor, " pos"], second: Float[Tensor, " pos"]) -> float:
    """Spearman's rank correlation in [-1, 1], ties sharing their mean rank; nan where one side is constant.

    >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 15.0])), 9)
    0.5
    """
    ranks = torch.stack([_ranks(first), _ranks(second)])
    centred = ranks - ranks.mean(1, keepdim=True)
    size = centred.norm(dim=1).prod()
    return (centred[0] @ centred[1] / size).item() if size > 0 else math.nan


def _ranks(values: Float[Tensor, " pos"]) -> Float[Tensor, " pos"]:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]
