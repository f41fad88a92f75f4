"""float64 wherever the numbers lie, and all through where classes ask for float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def to_float64(x: Tensor) -> Tensor:
    """`x` in float64; on the CPU where its own device has none (Apple's)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


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
