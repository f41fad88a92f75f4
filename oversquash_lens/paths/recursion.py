"""The one row recursion that every measure of this package is: u ← (u · node gain) · edge, in log space.

A kind of path says what one layer's edges (from position `src` to position `dest`) and node gains (the MLP's, at one
position) are; this module multiplies them along all causal paths that end at the last token. Only that one row
of the product is wanted, so it costs O(layer·pos²) time, and the edges come as blocks of rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import InputError
from oversquash_lens.numerics import json_numbers, to_float64, without_autocast
from oversquash_lens.paths.blocks import EdgeBlock
from oversquash_lens.results import About, Result

ROWS = 256  # rows of an edge matrix that are in memory at a time
FAINT = 1e-250  # below this share of the largest entry, sums are redone with logsumexp: no distant token underflows

# (layer, start, stop) -> the edges into positions start … stop-1 from positions 0 … stop-1 (later ones are zero
# anyway and may be left out); none negative.
EdgeRows = Callable[[int, int, int], Float[Tensor, "dest src"]]


@dataclass(frozen=True, repr=False)
class PathProfile(Result):
    """How sensitive the last token is to each position, summed over all causal paths, at every layer.

    `log_by_layer[l, i]` is the natural log of the sum over paths from position i entering layer l to the last
    position leaving the last layer (row `n_layers` is the last token alone), the constant left out. -inf means
    that no path exists. `log_constant` is the log of C; nan where the paper leaves C unspecified.
    """

    kind: str
    tokens: tuple[str, ...]
    log_by_layer: Float[Tensor, "layer_plus_1 pos"]
    log_constant: float
    about: About | None = None
    notes: tuple[str, ...] = ()

    _ranked_by = "share"

    def __post_init__(self) -> None:
        if self.log_by_layer.ndim != 2 or self.log_by_layer.shape[1] != len(self.tokens):
            raise InputError(
                f"expected [layer+1, {len(self.tokens)}], got a profile over {len(self.tokens)} tokens with path "
                f"products of shape {tuple(self.log_by_layer.shape)}"
            )
        if torch.isnan(self.log_by_layer).any():
            raise InputError(
                f"expected finite logs or -inf, got NaN path products in the {self.kind} profile: "
                "check the model's weights and activations for NaN"
            )

    def _title(self) -> str:
        total = self.log_values.logsumexp(-1).item() / math.log(10)
        size = f"log₁₀ of the total {total:.3f}" if math.isfinite(total) else "shares only"
        model = f", {self.about.model}" if self.about else ""
        return f"{self.kind} profile of {len(self.tokens)} tokens, {self.n_layers} layers{model}: {size}"

    def _table(self) -> dict[str, Any]:
        table: dict[str, Any] = {"position": range(len(self.tokens)), "token": self.tokens, "share": self.share}
        sized = not math.isnan(self.log_constant)
        return table | ({"log10_value": self.log_values / math.log(10)} if sized else {})

    @property
    def n_layers(self) -> int:
        return self.log_by_layer.shape[0] - 1

    @property
    def log_values(self) -> Float[Tensor, " pos"]:
        """Natural log of the sensitivity to each input position, constant included (nan where C is unspecified)."""
        return self.log_by_layer[0] + self.log_constant

    @property
    def values(self) -> Float[Tensor, " pos"]:
        """Sensitivity to each input position; inf where it passes float64 (a warning says so)."""
        if math.isnan(self.log_constant):
            raise InputError(
                f"expected a kind that has values, got {self.kind!r}, whose constant C the paper leaves unspecified: "
                "use .share, which needs no constant, or another kind"
            )
        values = self.log_values.exp()
        if torch.isinf(values).any():
            warnings.warn(
                f"the {self.kind} profile passes the range of float64: .values holds inf, .log_values is exact",
                RuntimeWarning,
                stacklevel=2,
            )
        return values

    @property
    def share(self) -> Float[Tensor, " pos"]:
        """Each input position's part of the sum over all positions; sums to 1."""
        return self.log_by_layer[0].softmax(-1)

    @property
    def share_by_layer(self) -> Float[Tensor, "layer_plus_1 pos"]:
        """As `share`, counted from every layer on; each row sums to 1, the last is the last token alone."""
        return self.log_by_layer.softmax(-1)

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON-able values; -inf and nan become null, as JSON has neither."""
        return {
            "kind": self.kind,
            "tokens": list(self.tokens),
            "log_by_layer": json_numbers(self.log_by_layer),
            "log_constant": json_numbers(self.log_constant),
            "share": json_numbers(self.share),
            "notes": list(self.notes),
            "about": self.about.to_dict() if self.about else None,
        }


class PathFactors(NamedTuple):
    """What a path's weight is the product of: edges, made of a block (whatever the caller's blocks are), and the log
    of the nodes' gains."""

    edges: Callable[[Any], EdgeBlock]
    log_node_gain: Float[Tensor, "layer pos"] | None = None


def log_path_sums(
    blocks: Callable[[int], Iterator[Any]], kinds: Sequence[PathFactors], n: int, n_layers: int
) -> list[Float[Tensor, "layer_plus_1 pos"]]:
    """`log_path_products` of several kinds of path in one sweep, each layer's `blocks` gone through once for all."""
    row = torch.full((n,), -math.inf, dtype=torch.float64, device="cpu")
    row[-1] = 0.0
    rows = [[row] for _ in kinds]
    for layer in reversed(range(n_layers)):
        above = [found[-1] for found in rows]
        for i, kind in enumerate(kinds):
            if kind.log_node_gain is not None:
                above[i] = above[i] + to_float64(kind.log_node_gain[layer]).cpu()
        with without_autocast():
            below = _log_below(above, blocks, layer, kinds)
        for found, each in zip(rows, below, strict=True):
            found.append(each)
    return [torch.stack(found[::-1]) for found in rows]


def _log_below(
    log_rows: Sequence[Float[Tensor, " pos"]],
    blocks: Callable[[int], Iterator[Any]],
    layer: int,
    kinds: Sequence[PathFactors],
) -> list[Float[Tensor, " pos"]]:
    """log(exp(log_row) · edges) for each kind, no entry lost to underflow."""
    shifts = [row.max() for row in log_rows]
    scaled = [(row - shift).exp() for row, shift in zip(log_rows, shifts, strict=True)]
    products = [torch.zeros_like(row) for row in log_rows]
    for block in blocks(layer):
        for kind, row, product in zip(kinds, scaled, products, strict=True):
            below = kind.edges(block).row_product(row)
            product[: len(below)] += below
    for i, kind in enumerate(kinds):
        faint = (products[i] < FAINT).nonzero()[:, 0]
        products[i] = products[i].log() + shifts[i]
        if len(faint):  # rare: only where one position's sum is less than 1e-250 of the largest
            edges = (kind.edges(block) for block in blocks(layer))
            products[i][faint] = _log_faint(log_rows[i], edges, faint)
    return products


def _log_faint(log_row: Float[Tensor, " pos"], blocks: Iterator[EdgeBlock], faint: Tensor) -> Float[Tensor, " faint"]:
    """The same in logarithms throughout, for the positions `faint`."""
    parts = []
    for edges in blocks:
        rows = edges.dense()
        rows = torch.nn.functional.pad(rows, (0, len(log_row) - rows.shape[1]))
        parts.append(torch.logsumexp(log_row[edges.positions, None] + rows[:, faint].log(), dim=0))
    return torch.stack(parts).logsumexp(dim=0)


def log_path_products(
    edge_rows: EdgeRows,
    n: int,
    n_layers: int,
    log_node_gain: Float[Tensor, "layer pos"] | None = None,
) -> Float[Tensor, "layer_plus_1 pos"]:
    """Log of the weighted count of causal paths from every position, at every layer, to the last position.

    Row l is log(e_nᵀ N⁽ᴸ⁻¹⁾E⁽ᴸ⁻¹⁾ ⋯ N⁽ˡ⁾E⁽ˡ⁾), N = diag(node gain), E = edges (docs/theory.md, section 2). Exact to
    rounding whatever the spread of the entries: linear arithmetic scaled by the row's largest entry, and
    logsumexp for the entries that this would push below `FAINT`.

    >>> log_path_products(lambda layer, start, stop: torch.ones(3, 3).tril()[start:stop], 3, 2)[0].exp().round()
    tensor([3., 2., 1.], dtype=torch.float64)
    """

    def blocks(layer: int) -> Iterator[EdgeBlock]:
        for start in range(0, n, ROWS):
            yield EdgeBlock(edge_rows(layer, start, min(start + ROWS, n)), start)

    return log_path_sums(blocks, [PathFactors(lambda block: block, log_node_gain)], n, n_layers)[0]
