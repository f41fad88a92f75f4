"""The one row recursion that every measure of this package is: u ← (u · node gain) · edge, in log space.

A measure says what one layer's edges (from position `src` to position `dest`) and node gains (the MLP's, at one
position) are; this module multiplies them along all causal paths that end at the last token. Only that one row
of the product is wanted, so it costs O(layer·pos²) time, and the edges come as blocks of rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.about import About
from oversquash_lens.errors import InputError, whole_number
from oversquash_lens.numerics import to_float64
from oversquash_lens.paths.factored import Factored

ROWS = 256  # rows of an edge matrix that are in memory at a time
FAINT = 1e-250  # below this share of the largest entry, sums are redone with logsumexp: no far token underflows

# (layer, start, stop) -> the edges into positions start … stop-1 from positions 0 … stop-1 (later ones are zero
# anyway and may be left out); none negative.
EdgeRows = Callable[[int, int, int], Float[Tensor, "dest src"]]


@dataclass(frozen=True)
class PathProfile:
    """How much of each position the last token hears, summed over all causal paths, at every layer.

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

    def __post_init__(self) -> None:
        if self.log_by_layer.ndim != 2 or self.log_by_layer.shape[1] != len(self.tokens):
            raise InputError(
                f"expected [layer+1, {len(self.tokens)}], got a profile over {len(self.tokens)} tokens with path "
                f"products of shape {tuple(self.log_by_layer.shape)}"
            )
        if torch.isnan(self.log_by_layer).any():
            raise InputError(
                f"the {self.kind} profile has NaN path products; expected finite logs or -inf: "
                "check the model's weights and activations for NaN"
            )

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
                f"variant {self.kind!r} has no values: the paper leaves its constant C unspecified; expected one that "
                "has it: use .share, which needs no constant, or another variant"
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
        """Each input position's part of all that the last token hears; sums to 1."""
        return self.log_by_layer[0].softmax(-1)

    @property
    def share_by_layer(self) -> Float[Tensor, "layer_plus_1 pos"]:
        """As `share`, counted from every layer on; each row sums to 1, the last is the last token alone."""
        return self.log_by_layer.softmax(-1)

    def to_dict(self) -> dict:
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


def json_numbers(value: Tensor | list | float) -> list | float | None:
    """Nested lists of floats with None in place of what JSON cannot hold.

    >>> json_numbers(torch.tensor([1.0, -math.inf]))
    [1.0, None]
    """
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [json_numbers(item) for item in value]
    return value if math.isfinite(value) else None


def effective_number(share: Float[Tensor, "*rows pos"]) -> Float[Tensor, "*rows"]:
    """How many positions a share is spread over: exp of its entropy, from 1 (all on one) to n (even).

    >>> effective_number(torch.tensor([0.25, 0.25, 0.25, 0.25])).item()
    4.0
    """
    return torch.special.entr(share).sum(-1).exp()


class PathKind(NamedTuple):
    """What of a block (whatever the caller's blocks are) is one kind of path's edges, and its nodes' log gains."""

    edges: Callable[[Any], Factored]
    log_node_gain: Float[Tensor, "layer pos"] | None = None


def log_path_sums(
    blocks: Callable[[int], Iterator[Any]], kinds: Sequence[PathKind], n: int, n_layers: int
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
    kinds: Sequence[PathKind],
) -> list[Float[Tensor, " pos"]]:
    """log(exp(log_row) · edges) for each kind, no entry lost to underflow."""
    shifts = [row.max() for row in log_rows]
    scaled = [(row - shift).exp() for row, shift in zip(log_rows, shifts, strict=True)]
    products = [torch.zeros_like(row) for row in log_rows]
    for block in blocks(layer):
        for kind, row, product in zip(kinds, scaled, products, strict=True):
            pushed = kind.edges(block).push(row)
            product[: len(pushed)] += pushed
    for i, kind in enumerate(kinds):
        faint = (products[i] < FAINT).nonzero()[:, 0]
        products[i] = products[i].log() + shifts[i]
        if len(faint):  # rare: only where one position hears another less than 1e-250 times the loudest
            edges = (kind.edges(block) for block in blocks(layer))
            products[i][faint] = _log_faint(log_rows[i], edges, faint)
    return products


def _log_faint(log_row: Float[Tensor, " pos"], blocks: Iterator[Factored], faint: Tensor) -> Float[Tensor, " faint"]:
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

    def blocks(layer: int) -> Iterator[Factored]:
        for start in range(0, n, ROWS):
            yield Factored(edge_rows(layer, start, min(start + ROWS, n)), start)

    return log_path_sums(blocks, [PathKind(lambda block: block, log_node_gain)], n, n_layers)[0]


@contextmanager
def without_autocast() -> Iterator[None]:
    """What a caller lets the model do, round products to half precision, is not for the measures."""
    with ExitStack() as stack:
        for device in filter(torch.is_autocast_enabled, ("cpu", "cuda", "mps")):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def count_paths(n: int, n_layers: int, tokens: Sequence[str] | None = None) -> PathProfile:
    """Number of causal paths from each of n positions to the last through `n_layers` layers.

    Null model: every edge of the causal mask counts 1, so `values` is binomial(n-i+L-1, L-1), i = 1 … n
    (exact to float64 rounding, in log space beyond). `tokens` name the positions, to set it against a prompt's profile.

    >>> count_paths(4, 2).values.round()
    tensor([4., 3., 2., 1.], dtype=torch.float64)
    """
    return _null_model("count_paths", n, n_layers, torch.ones_like, "every causal edge is 1", tokens)


def uniform_causal(n: int, n_layers: int, residual: float = 0.0, tokens: Sequence[str] | None = None) -> PathProfile:
    """Null model of pure mask geometry: every position attends evenly to itself and all earlier ones.

    `residual` in [0, 1) is the share of the residual stream in each layer: 0 is α_jk = 1/j alone, 0.5 is what
    attention rollout assumes. `values` sums to 1.

    >>> uniform_causal(4, 1).values
    tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    if not 0.0 <= residual < 1.0:
        raise InputError(f"expected 0 ≤ residual < 1, got residual={residual}")
    note = f"uniform causal attention, residual share {residual:g}"

    def weight(dest: Tensor) -> Tensor:
        return (1 - residual) / (dest + 1)

    return _null_model("uniform_causal", n, n_layers, weight, note, tokens, residual)


def _null_model(
    kind: str,
    n: int,
    n_layers: int,
    weight: Callable[[Tensor], Tensor],
    note: str,
    tokens: Sequence[str] | None,
    residual: float = 0.0,
) -> PathProfile:
    """Every causal edge into a position weighs the same, `residual` more on the diagonal."""
    whole_number("n", n)
    whole_number("n_layers", n_layers)

    def edge_rows(layer: int, start: int, stop: int) -> Float[Tensor, "dest src"]:
        dest = torch.arange(start, stop, dtype=torch.float64, device="cpu")[:, None]
        src = torch.arange(n, dtype=torch.float64, device="cpu")
        return weight(dest) * (src <= dest) + residual * (src == dest)

    names = tuple(str(i) for i in range(1, n + 1)) if tokens is None else tuple(tokens)
    return PathProfile(kind, names, log_path_products(edge_rows, n, n_layers), 0.0, None, (note,))
