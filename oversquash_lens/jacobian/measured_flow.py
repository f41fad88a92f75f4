"""Where the sensitivity runs, measured: through which positions, heads and MLPs the last token depends on a source.

The residual stream at every layer l cuts the Jacobian in two, J_i = Σ_k A_k B_k with A_k = ∂y_n/∂v_k⁽ˡ⁾ and
B_k = ∂v_k⁽ˡ⁾/∂v_i, so ⟨J_i, A_k B_k⟩ / ‖J_i‖² are shares of the positions k that sum to 1 at every layer: exact for
any differentiable model, signed, free of every assumption of the path sums. For a covector u let g⁽ˡ⁾ = u A⁽ˡ⁾
(backward) and t⁽ˡ⁾ be the tangent that starts as V_i = w_i g_i⁽⁰⁾ at the source's positions (forward). Then
g_k⁽ˡ⁾ · t_k⁽ˡ⁾, summed over an orthonormal basis of u, is the node's part of the trace of J W Jᵀ. A target F has one
covector, so its flow is exact; that of all outputs is estimated by Hutch++: Meyer, Musco, Musco and Woodruff (2021).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.mlp import random_source
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import Prompt
from oversquash_lens.errors import HookMismatchError, whole_number
from oversquash_lens.jacobian.block_products import BlockProducts, Contributions
from oversquash_lens.jacobian.edge_products import EdgeShares
from oversquash_lens.jacobian.measured import MEMORY
from oversquash_lens.jacobian.products import checkpointed
from oversquash_lens.jacobian.targets import target_of
from oversquash_lens.numerics import effective_number, json_numbers
from oversquash_lens.paths.flow import Source, position_of, span_of
from oversquash_lens.paths.heaviest import HeavyEdge
from oversquash_lens.results import About, Result

STEP = 2e-3  # of central differences: the largest move of a position, relative to its residual
RETRIES = (1.0, 1 / 3, 3.0)  # factors of the step, until the flow is conserved within `KEPT`
KEPT, KEPT_IN_HALF = 1e-2, 0.05
# Mean over runs of the true total variation over what the scatter of the residual probes says, at the worst layer.
OPTIMISM = 1.25
NORMAL = 0.8  # E|x| of a standard normal number, √(2/π)


@dataclass(frozen=True, repr=False)
class MeasuredFlow(Result):
    """Shares of a measured sensitivity by the positions, heads and MLPs that it runs through. Signed; 1 in sum."""

    tokens: tuple[str, ...]
    source: int | slice | None
    """None: all tokens, each counted alike."""
    target: str
    """The number F of the prediction, in words; empty where it is all of y_n."""
    node: Float[Tensor, "layer_plus_1 pos"]
    """Share of the residual stream of each position, entering each layer and leaving the last; sums to 1 there."""
    head: Float[Tensor, "layer head"]
    """Share that each head writes; nan in a layer that shows no heads, no columns where none does."""
    stays: Float[Tensor, " layer"]
    """Share that no head and, in a block that computes both side by side, no MLP writes: with them it sums to 1.

    nan in a layer that shows no heads.
    """
    mlp: Float[Tensor, " layer"]
    """Share that each MLP writes; 0 where there is none."""
    norms: Float[Tensor, "layer_plus_1 pos"]
    """‖∂y_n/∂v_k⁽ˡ⁾‖ (of F with a target): how sensitive the prediction is to each position at each layer."""
    total: float
    """‖J‖² of the source: Σ of the flow before it was divided by its sum."""
    conservation: float
    """Largest relative deviation of a layer's sum from `total`; rounding, and the step of differences."""
    error: float
    """Expected total variation of `node` at its worst layer from that of all directions; 0 where exact."""
    probes: int | None
    """Directions of the sketch and as many of the rest; None where exact."""
    edges: tuple[HeavyEdge, ...]
    """The edges between positions that carry most, as many as were asked for; signed, the largest by size first."""
    about: About

    @property
    def negative(self) -> Float[Tensor, " layer_plus_1"]:
        """Sum of the negative shares of each layer, as a positive number: paths that cancel others."""
        return self.node.clamp(max=0).sum(-1).neg()

    @property
    def width(self) -> Float[Tensor, " layer_plus_1"]:
        """Effective number of positions that the prediction is sensitive to at each layer, by `norms`: 1 … n."""
        return effective_number(self.norms / self.norms.sum(-1, keepdim=True))

    def _title(self) -> str:
        of = f"the {self.target}" if self.target else "all outputs"
        how = f"error about {self.error:.2f}" if self.error else "exact"
        source = "all tokens" if self.source is None else repr("".join(self.tokens[slice(*span_of(self.source))]))
        return f"where the sensitivity of {of} to {source} runs, measured ({how}): {self.about}"

    def _table(self) -> Mapping[str, Sequence[Any]]:
        """One row a layer, the lowest first."""
        layers = range(len(self.stays))
        top = self.node[:-1].argmax(-1).tolist()
        table = {
            "layer": layers,
            "width": self.width[:-1].tolist(),
            "stays": self.stays.tolist(),
            "mlp": self.mlp.tolist(),
            "largest_position": top,
            "its_share": self.node[:-1].amax(-1).tolist(),
        }
        if self.head.shape[1]:
            largest = self.head.abs().argmax(-1)
            table |= {"largest_head": largest.tolist(), "head_share": self.head[layers, largest].tolist()}
        return table

    def to_dict(self) -> dict[str, Any]:
        """Every field and the widths, as JSON takes them."""
        tensors = {name: json_numbers(getattr(self, name)) for name in (*_TENSORS, "width", "negative")}
        source = [self.source.start, self.source.stop] if isinstance(self.source, slice) else self.source
        rest = {name: getattr(self, name) for name in ("target", "total", "conservation", "error", "probes")}
        start = {"kind": "measured_flow", "tokens": list(self.tokens), "source": source}
        edges = [edge.to_dict() for edge in self.edges]
        return {**start, **rest, **tensors, "edges": edges, "about": self.about.to_dict()}


_TENSORS = ("node", "head", "stays", "mlp", "norms")


def measured_flow(
    model: Any,
    prompt: Prompt,
    source: Source | object | None = None,
    probes: int | None = 8,
    *,
    target: Any = None,
    edges: int = 0,
    chat: bool = False,
    bos: bool | None = None,
    seed: int = 0,
    memory: int = MEMORY,
    progress: bool = False,
) -> MeasuredFlow:
    """Measure through which positions, heads and MLPs the last token depends on a source.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks of your own stay on.
        prompt: a text, or token ids [pos] or [1, pos].
        source: a position, the text of a token or of some that follow one another, a slice of positions, or None for
            all tokens, each of which counts alike.
        probes: directions of the sketch, and as many of the rest: 8 are within a total variation of 0.02 (median) of
            all directions, at three times as many backward and forward products; None takes all d_model directions.
        target: a number F of the prediction, as `measured_sensitivity` takes it: its flow is exact by one product each
            way, and `probes` is without effect.
        edges: how many of the heaviest edges (layer, head, dest, src) to keep: what a head writes at `dest` because of
            the residual at `src`, as its value and its key; what the query of `dest` does stays at `dest`. A head's
            edges sum to its share. Their time and memory grow with the square of the prompt.
        chat: as `record` takes it, and so is bos.
        seed: draws the probes; the global random state is left alone.
        memory: bytes that a batch of products may take.
        progress: show a bar.

    Returns:
        A `MeasuredFlow`: signed shares [layer+1, pos], [layer, head] and [layer], and what keeps them honest.

    Raises:
        InputError: a source or target that cannot be used, or a prompt that does not fit into memory.
        ModelError: edges of a model that shows no attention scores.
        HookMismatchError: a pass that cannot be repeated, or whose flow is not conserved.
    """
    if probes is not None:
        whole_number("probes", probes, otherwise=", or None for all directions")
    whole_number("edges", edges, least=0)
    subject = Subject.of(model)
    subject.require("truth")
    tokenized = subject.tokenize(prompt, chat=chat, bos=bos)
    place = None if source is None else position_of(tokenized.tokens, source)
    made = checkpointed(subject, tokenized, patterns=edges > 0)
    way = BlockProducts(made, memory, progress, EdgeShares(subject, len(tokenized.ids)) if edges else None)
    label, basis = "", None
    if target is not None:
        chosen = target_of(subject.model, target, made.prediction.logits.detach())
        label, basis = chosen.label, made.prediction.covector(chosen)[None].double().cpu()
    elif probes is None or 2 * probes >= len(made.output):
        basis = torch.eye(len(made.output), dtype=torch.float64, device="cpu")
    for step in (STEP * factor for factor in RETRIES):
        found, error = (
            _all(way, basis, place, step) if basis is not None else _hutch(way, probes or 0, place, seed, step)
        )
        if found.conservation <= KEPT or not way.by_differences:
            break
    limit = KEPT if subject.architecture.dtype.itemsize >= 4 else KEPT_IN_HALF
    if not found.conservation <= limit:
        raise HookMismatchError(
            f"the flow's sum differs by {found.conservation:.2g} of itself between layers; expected at most {limit:g}: "
            "a hook of yours does another thing at its second call, or the dtype is too narrow (float32)"
        )
    share = found.node / found.total
    head, mlp = found.head / found.total, found.mlp / found.total
    moved = head.sum(-1) if head.shape[1] else torch.full_like(mlp, math.nan)
    return MeasuredFlow(
        tokens=tokenized.tokens,
        source=place,
        target=label,
        node=share,
        head=head,
        stays=1 - moved - (mlp if subject.architecture.parallel else 0),
        mlp=mlp,
        norms=found.squares.sqrt(),
        total=found.total,
        conservation=found.conservation,
        error=error,
        probes=probes if basis is None else None,
        edges=way.edges.heaviest(edges, head, found.total) if way.edges else (),
        about=tokenized.described(subject.about),
    )


def _all(way: BlockProducts, basis: Tensor, place: int | slice | None, step: float) -> tuple[Contributions, float]:
    """The sum over a whole basis, exact but for rounding."""
    if len(basis) == 1:  # a target's: the gradients that it is weighed by are those that it is made of
        gradients = way.gradients(basis)
        own = gradients.residual[0].double().cpu().square().sum((0, 2))
        return way.along(gradients, _weights(place, own, way.n), step).together(), 0.0
    squares = None if place is not None else way.starts(basis).square().sum((0, 2))
    return way.contributions(basis, _weights(place, squares, way.n), step).together(), 0.0


def _hutch(
    way: BlockProducts, probes: int, place: int | slice | None, seed: int, step: float
) -> tuple[Contributions, float]:
    """Hutch++: the directions that J W Jᵀ makes of some random ones exactly, and the mean over others without these."""
    random = random_source(seed)
    omega = torch.randn(2 * probes, len(way.made.output), generator=random, dtype=torch.float64, device="cpu")
    sketch, rest = omega.split(probes)
    starts = way.starts(omega if place is None else sketch)
    weights = _weights(place, starts.square().sum(-1).mean(0), way.n)
    moved = way.outputs(way.tangents(starts[:probes] * weights[:, None], step))
    basis = torch.linalg.qr(moved.T).Q.T
    rest = rest - rest @ basis.T @ basis
    exact, others = way.contributions(basis, weights, step), way.contributions(rest, weights, step, 1 / probes)
    both = exact.together(others)
    apart = others.node - (both.node / both.total) * others.node.sum(-1, keepdim=True)
    scatter = apart.std(0) / probes**0.5 / both.total if probes > 1 else torch.full_like(both.node, math.nan)
    return both, OPTIMISM * 0.5 * NORMAL * scatter.sum(-1).max().item()


def _weights(place: int | slice | None, squares: Float[Tensor, " pos"] | None, n: int) -> Float[Tensor, " pos"]:
    """w of the source's positions: 1 of those asked for, or 1/‖J_i‖² of all, so that each counts alike."""
    if place is None:
        assert squares is not None
        return torch.where(squares > 0, 1 / squares, 0.0)
    weights = torch.zeros(n, dtype=torch.float64, device="cpu")
    weights[place] = 1.0
    return weights
