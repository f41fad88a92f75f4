"""Backward and forward products of one prompt at every cut of the model: residuals, heads, MLPs; block by block.

Backward products are made with the graph of one block at a time. Forward products are their derivative by the covector,
or central differences where attention is fused, which has no second derivative on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from oversquash_lens.capture.architecture import LAYER_HOOKS
from oversquash_lens.jacobian.edge_products import SHOWN, EdgeShares, EdgeTangents
from oversquash_lens.jacobian.products import Checkpointed, vjp, vjps
from oversquash_lens.jacobian.routes import products_at_once

WATCHED = ("z", "mlp_out")  # where heads and MLP write, before W_O and norms behind them
GRADIENTS = (*WATCHED, "query")  # of what is watched, where gradients are wanted too


@dataclass(frozen=True)
class Contributions:
    """What some covectors' products say; of each alone along a first axis `row`, or of all together without it."""

    node: Float[Tensor, "*row layer_plus_1 pos"]
    head: Float[Tensor, "*row layer head"]
    mlp: Float[Tensor, "*row layer"]
    squares: Float[Tensor, "*row layer_plus_1 pos"]
    """‖g_k⁽ˡ⁾‖²."""

    @property
    def total(self) -> float:
        """The sum at the bottom, where backward products alone say it."""
        return self.node[0].sum().item()

    @property
    def conservation(self) -> float:
        return (self.node.sum(-1) / self.total - 1).abs().max().item()

    def together(self, other: Contributions | None = None) -> Contributions:
        """The sum over this one's rows, and the mean over the other's."""
        names = ("node", "head", "mlp", "squares")
        sums = [getattr(self, name).sum(0) for name in names]
        means = [0] * len(names) if other is None else [getattr(other, name).mean(0) for name in names]
        return Contributions(*(own + rest for own, rest in zip(sums, means, strict=True)))


@dataclass
class Gradients:
    """g⁽ˡ⁾ at every residual, and what it is at each layer's heads and MLP, one list entry a layer, [row, pos, …]."""

    residual: list[Tensor]
    watched: list[dict[str, Tensor]]


@dataclass
class BlockProducts:
    """Backward and forward products of one prompt, a block at a time, each block run again when its turn comes."""

    made: Checkpointed
    memory: int
    progress: bool
    edges: EdgeShares | None = None
    """Where the sums of each head's edges go, if they are asked for."""
    by_differences: bool = field(init=False)
    """Fused attention has no second derivative on the CPU: there tangents are central differences."""
    watched: list[tuple[str, ...]] = field(init=False)
    """Of WATCHED, what each layer has a hook for."""

    def __post_init__(self) -> None:
        self.by_differences = self.made.fused
        known = self.made.subject.model.hook_dict
        wanted = WATCHED if self.edges is None else (*WATCHED, *SHOWN)
        self.watched = [
            tuple(key for key in wanted if f"blocks.{layer}.{LAYER_HOOKS[key]}" in known)
            for layer in range(self.layers)
        ]

    @property
    def n(self) -> int:
        return self.made.leaf.shape[1]

    @property
    def layers(self) -> int:
        return len(self.made.calls)

    def starts(self, covectors: Float[Tensor, "row d_model"]) -> Float[Tensor, "row pos d_model"]:
        """g⁽⁰⁾ of each covector, in float64."""
        return torch.cat([rows.cpu().double() for rows in self.made.products(covectors, self.memory, self.progress)])

    def contributions(
        self, covectors: Float[Tensor, "row d_model"], weights: Float[Tensor, " pos"], step: float, part: float = 1.0
    ) -> Contributions:
        """g · t at every cut, of each covector alone; as many at a time as their gradients fit into memory.

        Each counts as much as `part` says in the sums of edges.
        """
        kept = (1 + len(WATCHED)) * (self.layers + 1) * self.made.leaf.numel() * 4
        kept += self.edges.bytes_per_product if self.edges else 0
        parts = []
        for some in tqdm(
            covectors.split(max(1, self.memory // kept)), desc="flow", disable=not self.progress, leave=False
        ):
            parts.append(self.along(self.gradients(some), weights, step, part))
        names = ("node", "head", "mlp", "squares")
        return Contributions(*(torch.cat([getattr(each, name) for each in parts]) for name in names))

    def along(
        self, gradients: Gradients, weights: Float[Tensor, " pos"], step: float, part: float = 1.0
    ) -> Contributions:
        """As `contributions`, of gradients that are there."""
        start = gradients.residual[0].double() * weights[:, None].to(gradients.residual[0].device)
        products = Cuts(gradients, self.edges, part)
        self.tangents(start, step, products)
        return products.found()

    def gradients(self, covectors: Float[Tensor, "row d_model"]) -> Gradients:
        made = self.made
        with torch.inference_mode(False):
            rows = vjp(made.output, made.top, covectors.to(made.output.dtype))
            found = Gradients([rows[:, 0]], [])
            for layer in reversed(range(self.layers)):
                watched = [key for key in self.watched[layer] if key in GRADIENTS]
                with made.block(layer, watched) as (leaf, leaving, caught):
                    leaves = [leaf, *caught.values()]
                    rows, *others = self._in_batches(leaving, leaves, rows)
                found.residual.insert(0, rows[:, 0])
                found.watched.insert(0, {key: each[:, 0] for key, each in zip(caught, others, strict=True)})
        return found

    def _in_batches(self, output: Tensor, leaves: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        batch = products_at_once(self.n, self.memory, self.made.bytes_per_product)
        parts = [vjps(output, leaves, part) for part in rows.split(batch)]
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    def tangents(
        self, start: Float[Tensor, "row pos d_model"], step: float, products: Cuts | None = None
    ) -> Float[Tensor, "row pos d_model"]:
        """Forward products along `start`, up to the last residual; `products` gets those of every layer on the way."""
        moving, through = start, self._differences if self.by_differences else self._forward
        with torch.inference_mode(False):
            for layer in range(self.layers):
                if products:
                    products.enter(moving)
                moving, shown, edges = through(layer, moving, self.watched[layer] if products else (), step)
                if products:
                    products.watch(layer, shown, edges)
            if products:
                products.enter(moving)
        return moving

    def outputs(self, moving: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row d_model"]:
        """What tangents of the last residual make of y_n, in float64."""
        dummy = torch.zeros_like(self.made.output, requires_grad=True)
        (back,) = torch.autograd.grad(self.made.output, self.made.top, dummy, create_graph=True)
        return vjps(back, [dummy], moving[:, None])[0].double().cpu()

    def _forward(
        self, layer: int, moving: Float[Tensor, "row pos d_model"], watched: Sequence[str], step: float
    ) -> tuple[Tensor, dict[str, Tensor], EdgeTangents | None]:
        """Exact, as the derivative of backward products by their covector."""
        with self.made.block(layer, watched) as (leaf, leaving, caught):
            every = dict(caught)
            for key in ("scores", "pattern"):  # [dest, src]: a head's tangents come through queries, keys and values
                caught.pop(key, None)
            first, *rest = self._moved(leaf, [leaving, *caught.values()], moving[:, None])
            shown = dict(zip(caught, rest, strict=True))
            edges = None
            if "pattern" in every:
                (scored,) = self._moved(every["key"], [every["scores"]], shown["key"])
                edges = EdgeTangents(shown["query"], shown["value"], scored, every["pattern"], every["value"])
        return first[:, 0], {key: each[:, 0] for key, each in shown.items() if key in WATCHED}, edges

    def _moved(self, leaf: Tensor, outputs: list[Tensor], moving: Float[Tensor, "row ..."]) -> list[Tensor]:
        """Tangents of outputs as the leaf moves."""
        dummies = [torch.zeros_like(each, requires_grad=True) for each in outputs]
        (back,) = torch.autograd.grad(outputs, leaf, dummies, create_graph=True)
        return self._in_batches(back, dummies, moving)

    def _differences(
        self, layer: int, moving: Float[Tensor, "row pos d_model"], watched: Sequence[str], step: float
    ) -> tuple[Tensor, dict[str, Tensor], None]:
        """Central differences, their step a part of the residual where it moves most."""
        residual = self.made.calls[layer].residual().detach()
        size = residual[0].norm(dim=-1).clamp(min=torch.finfo(residual.dtype).tiny)
        found = []
        for row in moving.to(residual.dtype):
            length = step / (row.norm(dim=-1) / size).max().clamp(min=torch.finfo(residual.dtype).tiny)
            (above, shown), (below, other) = (
                self.made.block_at(layer, residual + sign * length * row, watched) for sign in (1, -1)
            )
            ends = {"": (above, below), **{key: (shown[key], other[key]) for key in shown}}
            found.append({key: (a - b)[0] / (2 * length) for key, (a, b) in ends.items()})
        stacked = {key: torch.stack([each[key] for each in found]) for key in found[0]}
        return stacked.pop(""), stacked, None


class Cuts:
    """Gradients times tangents at every cut of the model, as the tangents come by."""

    def __init__(self, gradients: Gradients, edges: EdgeShares | None = None, part: float = 1.0) -> None:
        self.gradients, self.edges, self.part = gradients, edges, part
        self.node: list[Tensor] = []
        self.watched: list[dict[str, Tensor]] = []

    def enter(self, moving: Float[Tensor, "row pos d_model"]) -> None:
        self.node.append((self.gradients.residual[len(self.node)].double() * moving.double()).sum(-1).cpu())

    def watch(self, layer: int, shown: dict[str, Tensor], edges: EdgeTangents | None = None) -> None:
        own = self.gradients.watched[layer]
        sums = {}
        for key, value in shown.items():
            over = (1, 3) if key == "z" else (1, 2)
            sums[key] = (own[key].double() * value.double()).sum(over).cpu()
        self.watched.append(sums)
        if self.edges is not None and edges is not None:
            self.edges.add(layer, edges.along(own["z"], own["query"]) * self.part)

    def found(self) -> Contributions:
        node = torch.stack(self.node, 1)
        rows, layers = len(node), len(self.watched)
        heads = max((each["z"].shape[1] for each in self.watched if "z" in each), default=0)
        nothing = {"z": node.new_full((rows, heads), math.nan), "mlp_out": node.new_zeros(rows)}
        head, mlp = (torch.stack([each.get(key, nothing[key]) for each in self.watched], 1) for key in WATCHED)
        squares = torch.stack([each.double().square().sum(-1).cpu() for each in self.gradients.residual], 1)
        assert head.shape[1] == mlp.shape[1] == layers
        return Contributions(node, head, mlp, squares)
