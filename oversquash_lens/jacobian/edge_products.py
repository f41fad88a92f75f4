"""A measured flow by edges: how much of what a head writes at `dest` comes from the residual at `src`.

With weights P and values v a head writes z_j = Σ_i P_ji v_i. Its derivative along the tangent of position i's residual
alone, times the covector g_j at z_j, is the share of the edge i → j:

    P_ji [g_j · dv_i + (g_j · (v_i − z_j)) ds_ji],

ds_ji being the score's tangent as the key of i moves. As the query of j moves, all of its row does: g · dq at the
query, which belongs to j itself and is added to the edge j → j. A head's edges sum to its share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.architecture import LAYER_HOOKS
from oversquash_lens.capture.attention import per_head
from oversquash_lens.capture.subject import Subject
from oversquash_lens.errors import HookMismatchError, InputError, ModelError
from oversquash_lens.memory import available_bytes, in_words
from oversquash_lens.paths.heaviest import HeavyEdge

SHOWN = ("query", "key", "value", "scores", "pattern")  # hooks that all have to be there
MAPS = 8  # copies of one layer's [head, dest, src] that a product along it works with
OFF = 1e-2  # the largest deviation of a head's edges from its share, of the largest share of a head


@dataclass(frozen=True)
class EdgeTangents:
    """What moves in one layer's attention, [row, 1, pos, head, d_head] and [row, 1, head, dest, src], and where."""

    query: Tensor
    value: Tensor
    scores: Tensor
    """Tangents of the scores as keys alone move."""
    pattern: Float[Tensor, "one head dest src"]
    values: Float[Tensor, "one pos kv_head d_head"]

    def along(
        self, written: Float[Tensor, "row pos head d_head"], asked: Float[Tensor, "row pos head d_head"]
    ) -> Float[Tensor, "head dest src"]:
        """The edges' shares by the gradients at z and at the queries, summed over rows."""
        pattern, n_heads = self.pattern[0].detach().float(), written.shape[2]
        values = per_head(self.values[0].detach().float(), n_heads, 1)
        total = torch.zeros_like(pattern)
        for g, own, dv, dq, ds in zip(
            written, asked, self.value[:, 0], self.query[:, 0], self.scores[:, 0], strict=True
        ):
            g, by_value = g.float().transpose(0, 1), per_head(dv.float(), n_heads, 1)
            told = g @ values.permute(1, 2, 0)
            told = told - (pattern * told).sum(-1, keepdim=True)
            total += pattern * (g @ by_value.permute(1, 2, 0) + told * ds.float())
            total.diagonal(dim1=1, dim2=2).add_((own * dq).sum(-1).float().T)
        return total


class EdgeShares:
    """The sums of all heads' edges over the products of a flow."""

    def __init__(self, subject: Subject, n: int) -> None:
        size = subject.size
        self.map_bytes = 4 * size.n_heads * n * n
        self.bytes_per_product = MAPS * self.map_bytes
        needed, there = (size.n_layers + MAPS) * self.map_bytes, available_bytes(subject.device)
        if needed > there:
            raise InputError(
                f"the edges of {n} tokens take {in_words(needed)} of memory, and {in_words(there)} are there; "
                "expected less: leave edges out, or take a shorter prompt"
            )
        known = subject.model.hook_dict
        missing = [key for key in SHOWN if f"blocks.0.{LAYER_HOOKS[key]}" not in known]
        if missing:
            raise ModelError(
                f"{subject.about.model} has no hook that shows the {missing[0]} of its first layer; expected one on "
                "queries, keys, values, scores and pattern: leave edges out, heads are measured without"
            )
        self.layers: dict[int, Tensor] = {}

    def add(self, layer: int, shares: Float[Tensor, "head dest src"]) -> None:
        shares = shares.cpu()
        self.layers[layer] = self.layers[layer] + shares if layer in self.layers else shares

    def heaviest(self, k: int, head: Float[Tensor, "layer head"], total: float) -> tuple[HeavyEdge, ...]:
        """The k largest by size between positions; as parts of `total`, as `head` are, which they are held to.

        Raises HookMismatchError where a head's edges do not sum to what it writes.
        """
        largest, found = head.nan_to_num().abs().max().item(), []
        for layer, sums in self.layers.items():
            shares = sums / total
            off = (shares.sum((1, 2), dtype=torch.float64) - head[layer]).abs().max().item()
            if not off <= OFF * largest:
                raise HookMismatchError(
                    f"layer {layer}: a head's edges differ from what it writes by {off / largest:.2g} of the largest "
                    "head; expected their sum: its hooks do not show all that its output is made of; leave edges out"
                )
            moving = shares - torch.diag_embed(shares.diagonal(dim1=1, dim2=2))
            at = moving.abs().flatten().topk(min(k, moving.numel())).indices
            for place, share in zip(at.tolist(), moving.flatten()[at].tolist(), strict=True):
                head_at, rest = divmod(place, shares.shape[1] * shares.shape[2])
                dest, src = divmod(rest, shares.shape[2])
                found.append(HeavyEdge(layer, head_at, dest, src, share))
        return tuple(sorted((each for each in found if each.share), key=lambda each: -abs(each.share))[:k])
