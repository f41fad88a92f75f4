"""Where the paths run: the sum over causal paths, split by layer, position, head and residual stream.

With u⁽ˡ⁾ the row from the last token down to layer l and f⁽ˡ⁾ the column from the prompt up to it, u⁽ˡ⁾·f⁽ˡ⁾ is the
whole sum at every layer, so u_k f_k / (u·f) is a distribution over positions: the part of the paths that pass
through position k on entering layer l (docs/theory.md, section 9). What enters a position is split by the heads
that bring it and the residual stream that keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.about import About
from oversquash_lens.capture.trace import Trace, check_trace
from oversquash_lens.errors import InputError
from oversquash_lens.paths.block import Block
from oversquash_lens.paths.edges import Edges, Parts
from oversquash_lens.paths.paths import FAINT, PathProfile, effective_number, json_numbers, without_autocast
from oversquash_lens.paths.profiles import path_weighing
from oversquash_lens.paths.weighing import Weighing, layer_blocks

ROWS = 256  # rows of a layer's edges looked at together


@runtime_checkable
class LayerEdges(Protocol):
    """Any layer's edges into positions start … stop-1 from positions 0 … stop-1."""

    def rows(self, layer: int, start: int, stop: int) -> Float[Tensor, "dest src"]: ...

    def parts(self, layer: int, start: int, stop: int) -> Parts: ...


@dataclass(frozen=True, repr=False)
class Flow:
    """How the paths that reach the last token are spread over positions and heads, layer by layer.

    `node[l, k]` is the share of them that pass through position k on entering layer l (row n_layers: on leaving
    the last layer); every row sums to 1. `head_at[l, h, j]` is the share that head h of layer l brings to position
    j, `residual_at[l, j]` what stays there; both together sum to 1 in each layer. `source` None counts the paths
    from all input positions, i those from position i alone.

    Shares are of the kind's own path sum: for the mean-field estimate of squared sensitivity.
    """

    kind: str
    tokens: tuple[str, ...]
    source: int | None
    node: Float[Tensor, "layer_plus_1 pos"]
    head_at: Float[Tensor, "layer head pos"]
    residual_at: Float[Tensor, "layer pos"]
    log_above: Float[Tensor, "layer_plus_1 pos"]  # u, natural log
    log_below: Float[Tensor, "layer_plus_1 pos"]  # f, natural log
    edges: LayerEdges = field(compare=False)
    about: About
    power: float = 1.0  # the sensitivity that the kind speaks of is the path sum to this power
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        where = "all tokens" if self.source is None else f"token {self.source}"
        return f"<Flow of {self.kind} paths from {where}: {len(self.tokens)} tokens, {self.n_layers} layers>"

    @property
    def n_layers(self) -> int:
        return self.node.shape[0] - 1

    @property
    def head(self) -> Float[Tensor, "layer head"]:
        """Share that each head moves; with `residual` it sums to 1 in each layer."""
        return self.head_at.sum(-1)

    @property
    def residual(self) -> Float[Tensor, " layer"]:
        """Share that stays where it is."""
        return self.residual_at.sum(-1)

    @property
    def effective_width(self) -> Float[Tensor, layer_plus_1]:
        """Number of positions that the paths pass through at each layer: exp of the shares' entropy, 1 … n."""
        return effective_number(self.node)

    @property
    def receptive_field(self) -> Float[Tensor, layer_plus_1]:
        """Number of positions that any path passes through at each layer, by the causal mask and by zero weights."""
        return (torch.isfinite(self.log_above) & torch.isfinite(self.log_below)).sum(-1).double()

    @property
    def relative_width(self) -> Float[Tensor, layer_plus_1]:
        """Effective width over receptive field, in (0, 1]: 1 where every position that could is used alike."""
        return self.effective_width / self.receptive_field

    @property
    def log_total(self) -> float:
        """Natural log of the path sum itself, the constant left out."""
        return (self.log_above + self.log_below)[-1].logsumexp(-1).item()

    @property
    def imbalance(self) -> float:
        """Largest relative deviation of u·f between layers: 0 but for rounding, as flow is conserved."""
        totals = (self.log_above + self.log_below).logsumexp(-1)
        return torch.expm1(totals - totals[-1]).abs().max().item()

    def edge(self, layer: int) -> Parts:
        """Share that runs over every edge of one layer: heads [head, dest, src] and own [dest]; sums to 1."""
        if not 0 <= layer < self.n_layers:
            raise InputError(f"expected 0 … {self.n_layers - 1}, the layers of this flow, got layer {layer}")
        n = len(self.tokens)
        heads = torch.zeros(self.head_at.shape[1], n, n, dtype=torch.float64, device="cpu")
        for start in range(0, n, ROWS):
            stop = min(start + ROWS, n)
            heads[:, start:stop, :stop] = self.edge_rows(layer, start, stop)
        return Parts(heads, self.residual_at[layer])

    def edge_rows(self, layer: int, start: int, stop: int) -> Float[Tensor, "head dest src"]:
        """As `edge`, the heads' part into positions start … stop-1 from positions 0 … stop-1."""
        heads = self.edges.parts(layer, start, stop).heads.cpu().double()
        below = self.log_below[layer, :stop]
        # Below the source nothing is reached, all of `below` is -inf: no share, and no NaN.
        weights = heads * (below - below.max().clamp(min=torch.finfo(below.dtype).min)).exp()
        brought = self.head_at[layer, :, start:stop]
        total = weights.sum(-1)
        faint = (total < FAINT) & (brought > 0)
        shares = weights * (brought / total.clamp(min=FAINT))[..., None]
        for head, dest in faint.nonzero().tolist():  # rare, as in the row recursion
            shares[head, dest] = brought[head, dest] * (heads[head, dest].log() + below).softmax(-1)
        return shares

    def to_dict(self) -> dict:
        """JSON-able: shares by node and by head, widths. `head_at` is left out: megabytes on a long prompt."""
        tensors = ("node", "head", "residual", "effective_width", "receptive_field")
        return {
            "kind": "flow",
            "paths": self.kind,
            "source": self.source,
            "tokens": list(self.tokens),
            **{name: json_numbers(getattr(self, name)) for name in tensors},
            "log_total": json_numbers(self.log_total),
            "notes": list(self.notes),
            "about": self.about.to_dict(),
        }


def flow(trace: Trace | object, kind: str = "mean_field", source: Any = None, beta: float | str = "measured") -> Flow:
    """Where the paths from the prompt, or from position `source` alone, run on their way to the last token.

    `kind` is "mean_field" or a variant of `path_bound` (`beta` as there). O(layer·pos²), two sweeps over the same
    edges. Raises InputError for a position that the prompt has not, or from which no path has any weight.
    """
    return flows(trace, (source,), kind, beta)[0]


def flows(
    trace: Trace | object,
    sources: Sequence[Any],
    kind: str = "mean_field",
    beta: float | str = "measured",
    profile: PathProfile | None = None,
) -> tuple[Flow, ...]:
    """As `flow` for several sources (None: all positions), at little more than the cost of one.

    `profile`: this kind's own, where it is known already, as from `profiles`; it saves the sweep from above.
    """
    check_trace(trace)
    if not isinstance(sources, Sequence) or isinstance(sources, str) or not sources:
        came = "no source" if isinstance(sources, Sequence) else f"a {type(sources).__name__}"
        raise InputError(
            f"expected a list of positions of the prompt, or of None for all of them together, got {came}: give at "
            "least one, such as [None]"
        )
    n = trace.n_positions
    for source in sources:
        if source is not None and (type(source) is not int or not 0 <= source < n):
            raise InputError(f"expected a position 0 … {n - 1} of this prompt, or None for all, got source={source!r}")
    weighing = path_weighing(trace, kind, beta)
    log_above = (profile or weighing.profile()).log_by_layer / weighing.power
    with without_autocast():
        log_below, head_part, own_part = _columns(weighing, sources)
    found = []
    for i, source in enumerate(sources):
        logs = log_above + log_below[i]
        if torch.isneginf(logs[-1]).all():
            raise InputError(
                f"expected one that the last token can hear, got source={source}, from which no path has any weight "
                "(its attention was cut off, or is too faint for this dtype): choose another position"
            )
        node = logs.softmax(-1)
        entered = node[1:, None]
        shares = entered * head_part[i], entered[:, 0] * own_part[i]
        found.append(
            Flow(
                weighing.kind,
                trace.tokens,
                source,
                node,
                *shares,
                log_above,
                log_below[i],
                weighing,
                trace.about,
                weighing.power,
                weighing.notes,
            )
        )
    return tuple(found)


def _columns(
    weighing: Weighing, sources: Sequence[int | None]
) -> tuple[
    Float[Tensor, "source layer_plus_1 pos"],
    Float[Tensor, "source layer head pos"],
    Float[Tensor, "source layer pos"],
]:
    """From the prompt upwards: log of the paths that reach each position, and who brought them there."""
    trace, blocks = weighing.trace, layer_blocks(weighing.trace)
    column = torch.full((trace.n_positions, len(sources)), -math.inf, dtype=torch.float64, device="cpu")
    for i, source in enumerate(sources):
        column[source if source is not None else slice(None), i] = 0.0
    columns, heads, own = [column], [], []
    for layer in range(trace.n_layers):
        stayed = torch.isfinite(column)  # where nothing was, nothing stays: the heads brought it all
        column, head_part = _log_received(weighing.edges, blocks(layer), column)
        if weighing.log_node_gain is not None:
            column = column + weighing.log_node_gain[layer].cpu().double()[:, None]
        brought = head_part.sum(0)
        head_part = torch.where(stayed | (brought == 0), head_part, head_part / brought)
        columns.append(column)
        heads.append(head_part)
        own.append(torch.where(stayed, 1 - brought, 0.0).clamp(min=0))
    return (
        torch.stack(columns).permute(2, 0, 1),
        torch.stack(heads).permute(3, 0, 1, 2),
        torch.stack(own).permute(2, 0, 1),
    )


def _log_received(
    edges: Edges, blocks: Iterable[Block], log_column: Float[Tensor, "pos source"]
) -> tuple[Float[Tensor, "pos source"], Float[Tensor, "head pos source"]]:
    """log(edges · exp(log_column)), no entry lost to underflow, and each head's part of it."""
    shift = log_column.amax(0)
    column = (log_column - shift).exp()
    reached = torch.isfinite(log_column.cummax(0).values)
    received, heads = [], []
    for block in blocks:
        at, whole = slice(block.start, block.stop), edges.factored(block).receive(column)
        times = edges.brought(block, column[: block.stop])
        log_whole, part = whole.log() + shift, times.cpu().double() / whole.clamp(min=FAINT)
        # What the mask lets nobody hear is truly 0; what merely fell below the range is computed again.
        faint = (whole < _faintest(times)) & reached[at]
        if faint.any():
            parts = edges.parts(block)
            for dest in faint.any(1).nonzero()[:, 0].tolist():
                one = Parts(parts.heads[:, dest].cpu().double(), parts.own[dest].cpu().double())
                log_whole[dest], part[:, dest] = _in_logarithms(one, block.start + dest, log_column[: block.stop])
        received.append(log_whole)
        heads.append(part / part.sum(0).clamp(min=1.0))  # rounding must not make more of the parts than of the whole
    return torch.cat(received), torch.cat(heads, dim=1)


def _faintest(times: Tensor) -> float:
    """Products below this share of the largest entry have lost digits in the dtype that the heads are computed in."""
    return FAINT if times.dtype == torch.float64 else 1e-30


def _in_logarithms(
    parts: Parts, dest: int, log_column: Float[Tensor, "src source"]
) -> tuple[Float[Tensor, " source"], Float[Tensor, "head source"]]:
    """The same for one position: rare, where one source is fainter than 1e-30 of another."""
    brought = (parts.heads.log()[:, :, None] + log_column).logsumexp(1)
    own = parts.own.log() + log_column[dest]
    whole = torch.cat([brought, own[None]]).logsumexp(0)
    return whole, torch.where(torch.isneginf(whole), 0.0, (brought - whole).exp())
