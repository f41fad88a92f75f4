"""The elementwise functions of MLPs, each with a rigorous bound on its slope."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Activation:
    """An MLP's elementwise function and an upper bound on the absolute value of its derivative."""

    function: Callable[[Tensor], Tensor]
    lipschitz: float


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_GELU_TANH = Activation(_gelu_tanh, 1.1290)  # sup 1.128993
ACTIVATIONS = {
    "relu": Activation(torch.relu, 1.0),
    "silu": Activation(functional.silu, 1.0999),  # sup 1.099839
    "swish": Activation(functional.silu, 1.0999),
    "gelu": Activation(functional.gelu, 1.1290),  # sup 1.128904
    "gelu_new": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "quick_gelu": Activation(_quick_gelu, 1.0999),
    "tanh": Activation(torch.tanh, 1.0),
}
