"""Attention as row blocks [head, dest, src]; the measures never see how they are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import InputError


@runtime_checkable
class AttentionRows(Protocol):
    """One layer's attention, asked for a block of rows at a time."""

    @property
    def n_positions(self) -> int: ...

    def rows(self, start: int, stop: int) -> Float[Tensor, "head dest src"]:
        """α^h_jk for dest positions start … stop-1 and every src position; rows sum to 1."""
        ...


@dataclass(frozen=True)
class KeptAttention:
    """A whole layer's pattern as the model made it, in its own dtype."""

    pattern: Float[Tensor, "head dest src"]

    @property
    def n_positions(self) -> int:
        return self.pattern.shape[-1]

    def rows(self, start: int, stop: int) -> Float[Tensor, "head dest src"]:
        _check(start, stop, self.n_positions)
        return self.pattern[:, start:stop]


@dataclass(frozen=True)
class UniformAttention:
    """Every head looks evenly at its own position and all earlier ones: what the causal mask alone would do."""

    n_positions: int
    n_heads: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    def rows(self, start: int, stop: int) -> Float[Tensor, "head dest src"]:
        _check(start, stop, self.n_positions)
        positions = torch.arange(self.n_positions, dtype=self.dtype, device=self.device)
        dest = positions[start:stop, None]
        seen = positions <= dest
        return (seen / (dest + 1)).expand(self.n_heads, -1, -1)


def _check(start: int, stop: int, n: int) -> None:
    if not 0 <= start < stop <= n:
        raise InputError(f"rows {start}:{stop} came; expected 0 ≤ start < stop ≤ {n}, the number of positions")
