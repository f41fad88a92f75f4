"""float64 wherever the numbers lie."""

from __future__ import annotations

from torch import Tensor


def to_float64(x: Tensor) -> Tensor:
    """`x` in float64; on the CPU where its own device has none (Apple's)."""
    return (x.cpu() if x.device.type == "mps" else x).double()
