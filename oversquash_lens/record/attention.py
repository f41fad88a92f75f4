"""Attention as row blocks [head, dest, src]; the measures never see how they are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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
        if not 0 <= start < stop <= self.n_positions:
            raise InputError(
                f"rows {start}:{stop} came; expected 0 ≤ start < stop ≤ {self.n_positions}, the number of positions"
            )
        return self.pattern[:, start:stop]
