"""A block of an edge matrix between diagonal factors, and what it makes of a row from above or a column from below."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.numerics import to_float64


@dataclass(frozen=True)
class Factored:
    """One block of an edge matrix, none negative: edge(j, k) = dest_j · core(j, k) · src_k + δ_jk own_j.

    Rows are the positions from `start` on. `core` is as large as the block and comes in the dtype that it was computed
    in; the factors are vectors, so in float64 they cost nothing. None stands for ones.
    """

    core: Float[Tensor, "dest src"]
    start: int
    own: Float[Tensor, " dest"] | None = None
    dest: Float[Tensor, " dest"] | None = None
    src: Float[Tensor, " src"] | None = None

    @property
    def positions(self) -> slice:
        return slice(self.start, self.start + len(self.core))

    def push(self, row: Float[Tensor, " pos"]) -> Float[Tensor, " src"]:
        """row · edges, of a row over all positions."""
        row = row[self.positions]
        product = _times(row if self.dest is None else row * _like(self.dest, row), self.core)
        if self.src is not None:
            product *= _like(self.src, product)
        if self.own is not None:
            product[self.positions] += row * _like(self.own, row)
        return product

    def receive(self, column: Float[Tensor, "pos source"]) -> Float[Tensor, "dest source"]:
        """edges · column, of columns over all positions."""
        core = to_float64(self.core)
        heard = column[: core.shape[1]]
        heard = heard if self.src is None else heard * _like(self.src, heard)[:, None]
        product = (core @ heard.to(core)).cpu()
        if self.dest is not None:
            product *= _like(self.dest, product)[:, None]
        if self.own is not None:
            product += column[self.positions] * _like(self.own, column)[:, None]
        return product

    def dense(self) -> Float[Tensor, "dest src"]:
        """The edges themselves, in float64."""
        edges = to_float64(self.core).cpu().clone()
        if self.dest is not None:
            edges *= _like(self.dest, edges)[:, None]
        if self.src is not None:
            edges *= _like(self.src, edges)
        if self.own is not None:
            edges.diagonal(offset=self.start).add_(_like(self.own, edges))
        return edges


def _times(row: Float[Tensor, " dest"], core: Float[Tensor, "dest src"]) -> Float[Tensor, " src"]:
    core = to_float64(core)
    return torch.mv(core.mT, row.to(core)).cpu()


def _like(factor: Tensor, vector: Tensor) -> Tensor:
    return factor.to(vector.device, vector.dtype)
