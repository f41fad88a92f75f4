"""Vector-Jacobian products of one forward pass: covector · ∂y_n/∂v, for all positions at once.

`differentiate` chooses between two ways to the same numbers. `WholeGraph` keeps the graph of the whole pass.
`Checkpointed` keeps the residuals that enter the blocks, O(n) a layer, and runs each block again when its turn comes,
with one block's graph at a time. Covectors go from the last block to the first, many together, so that a block is run
again once for all of them (the usual gradient checkpointing does it once for each batch). Where attention may be fused
no [dest, src] is made at all, and memory is O(n) throughout.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from oversquash_lens.capture import checks
from oversquash_lens.capture.architecture import LAYER_HOOKS, Architecture
from oversquash_lens.capture.fused import foreign_hooks, fused_attention, why_not_fused
from oversquash_lens.capture.hooks import NamedHook, attached, full_precision, last_logits_only, without_cache
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import TokenizedPrompt
from oversquash_lens.errors import HookMismatchError, InputError
from oversquash_lens.memory import BASE, MEMORY_VARIABLE, Size, available_bytes, in_words
from oversquash_lens.paths.blocks import ENTRIES, MOST_ROWS

LIFTS = (2.0**13, 2.0**6, 1.0, 2.0**-7)  # of covectors in float16, until nothing overflows

Rows = Float[Tensor, "row one pos d_model"]


@dataclass(frozen=True)
class WholeGraph:
    """A pass whose whole graph is kept: y_n, and the residuals entering the first block that it is a function of."""

    output: Float[Tensor, " d_model"]
    leaf: Float[Tensor, "one pos d_model"]
    bytes_per_product: int

    def products(
        self, covectors: Float[Tensor, "row d_model"], memory: int, progress: bool
    ) -> Iterator[Float[Tensor, "chunk pos d_model"]]:
        """covector · ∂y_n/∂v for all positions, a batch of covectors at a time; in float32 at least."""
        parts = covectors.split(products_at_once(self.leaf.shape[1], memory, self.bytes_per_product))
        for part in tqdm(parts, desc="backward products", unit="batch", disable=not progress, leave=False):
            rows = vjp(self.output, self.leaf, part)[:, 0]
            checks.check_finite("the derivative of the unembedding's input", rows)
            yield rows


@dataclass(frozen=True)
class BlockCall:
    """How the model called one of its blocks."""

    block: nn.Module
    arguments: tuple
    named: dict[str, Any]

    def residual(self) -> Float[Tensor, "one pos d_model"]:
        return self.arguments[0] if self.arguments else self.named["hidden_states"]

    def repeat(self, residual: Float[Tensor, "one pos d_model"]) -> Float[Tensor, "one pos d_model"]:
        """Call the block once more, with this residual."""
        if self.arguments:
            return _residual_of(self.block(residual, *self.arguments[1:], **self.named))
        return _residual_of(self.block(**self.named | {"hidden_states": residual}))


@dataclass(frozen=True)
class Checkpointed:
    """A pass of which each block can be run again. `output` is y_n, a function of `top`, the last residual.

    `frozen` are the hooks that hold parts of it fixed, `fused` whether attention is.
    """

    output: Float[Tensor, " d_model"]
    top: Float[Tensor, "one pos d_model"]
    calls: list[BlockCall]
    bytes_per_product: int
    subject: Subject
    frozen: list[NamedHook]
    fused: bool

    @property
    def leaf(self) -> Float[Tensor, "one pos d_model"]:
        """The residual that enters the first block."""
        return self.calls[0].residual()

    def products(
        self, covectors: Float[Tensor, "row d_model"], memory: int, progress: bool
    ) -> Iterator[Float[Tensor, "chunk pos d_model"]]:
        """covector · ∂y_n/∂v for all positions, as many covectors at a time as fit; in float32 at least."""
        parts = covectors.split(max(1, memory // (CARRIED * self.leaf.numel() * max(4, self.leaf.element_size()))))
        steps = len(parts) * len(self.calls)
        with tqdm(total=steps, desc="backward products", unit="block", disable=not progress, leave=False) as bar:
            for part in parts:
                with torch.inference_mode(False):
                    rows = vjp(self.output, self.top, part.clone())
                    for layer in reversed(range(len(self.calls))):
                        rows = self._through_block(layer, rows, memory)
                        bar.update()
                yield rows[:, 0]

    def _through_block(self, layer: int, rows: Rows, memory: int) -> Rows:
        """Covectors of the residual that leaves the block become those of the one that enters it."""
        caught: dict[str, Tensor] = {}
        first = [_leaf_hook(caught)] if layer == 0 else []
        with _differentiable(self.subject, [*first, *self.frozen], self.fused):
            leaf = self.calls[layer].residual().detach().requires_grad_()
            leaving = self.calls[layer].repeat(leaf)
            self._check_same(layer, leaving.detach())
            leaf, batch = caught.get("leaf", leaf), products_at_once(leaf.shape[1], memory, self.bytes_per_product)
            for part in rows.split(batch):  # views: each batch's rows take the place of their covectors
                part.copy_(vjp(leaving, leaf, part))
        checks.check_finite(f"layer {layer}, the derivative of the unembedding's input", rows)
        return rows

    def _check_same(self, layer: int, leaving: Tensor) -> None:
        """Dropout, or a user's hook that does another thing at its second call, would make it another function."""
        before = self.top if layer + 1 == len(self.calls) else self.calls[layer + 1].residual()
        before = before.detach().to(leaving)
        off = ((leaving - before).abs().max() / before.abs().max().clamp(min=1e-6)).item()
        if not off <= checks.TOLERANCE[leaving.dtype]:
            raise HookMismatchError(
                f"block {layer}, run a second time for the truth of a long prompt, differs from its first run by "
                f"{off:.2g} of its size; expected the same both times: no dropout (model.eval()), and no hook of yours "
                "that does something else at its second call"
            )


Differentiated = WholeGraph | Checkpointed


def differentiate(subject: Subject, tokenized: TokenizedPrompt, freeze: Iterable[str] = ()) -> Differentiated:
    """One forward pass of which products can be taken, on the route that `products.truth_route` chooses.

    `freeze`: "attention" and/or "norms", detached. Raises ModelError where attention cannot be, HookMismatchError for
    a pass that is no plain one.
    """
    n, freeze = len(tokenized.ids), tuple(freeze)
    for held in freeze:
        subject.require(f"{held} frozen")
    route = truth_route(subject, n, freeze)
    one, frozen = product_bytes(subject.size, n, route), _freezing_hooks(subject.architecture, freeze)
    if route == "whole":
        return _with_whole_graph(subject, tokenized, frozen, one)
    return _with_checkpoints(subject, tokenized, frozen, one, fused=route == "fused")


def vjp(
    output: Tensor, leaf: Float[Tensor, "one pos d_model"], covectors: Float[Tensor, "row ..."]
) -> Float[Tensor, "row one pos d_model"]:
    """Each covector · ∂output/∂leaf, in float32 at least. Several go through the graph together, one goes alone."""
    covectors, dtype = covectors.to(output.device), output.dtype
    if dtype != torch.float16:
        rows = _gradients(output, leaf, covectors.to(dtype))
        return rows.to(torch.promote_types(dtype, torch.float32))
    # Small derivatives would be 0 in float16: there they pass through lifted.
    size = covectors.float().flatten(1).norm(torch.inf, dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    unit = covectors.float() / size.view(-1, *[1] * output.ndim)
    for lift in LIFTS:
        rows = _gradients(output, leaf, (unit * lift).to(dtype)).float() / lift
        if torch.isfinite(rows).all():
            break
    return rows * size.view(-1, 1, 1, 1).to(rows)


def _gradients(output: Tensor, leaf: Tensor, covectors: Float[Tensor, "row ..."]) -> Tensor:
    """One product for each covector; anomaly detection asks for numbers that a batch of products has not."""
    with full_precision(output.device):
        if len(covectors) == 1 or torch.is_anomaly_enabled():
            rows = [torch.autograd.grad(output, leaf, each, retain_graph=True)[0] for each in covectors]
            return torch.stack(rows)
        return torch.autograd.grad(output, leaf, covectors, is_grads_batched=True, retain_graph=True)[0]


# ------------------------------------------------------------ the pass


def _with_whole_graph(
    subject: Subject, tokenized: TokenizedPrompt, frozen: list[NamedHook], bytes_per_product: int
) -> WholeGraph:
    """Run the model once with a leaf at the first residual, and keep the graph."""
    caught: dict[str, Tensor] = {}
    embedded = subject.function.shown.embedded
    hooks = [_output_hook(subject.architecture, caught), *frozen]
    with (
        _differentiable(subject, hooks if embedded else [_leaf_hook(caught), *hooks]),
        _leaf_at_embedding(subject, caught) if embedded else nullcontext(),
    ):
        _run(subject, tokenized)
    return WholeGraph(_prediction_input(caught["output"], subject.architecture), caught["leaf"], bytes_per_product)


def _with_checkpoints(
    subject: Subject, tokenized: TokenizedPrompt, frozen: list[NamedHook], bytes_per_product: int, fused: bool
) -> Checkpointed:
    """Run the model once, keep how each block was called, and the graph of what lies behind the last of them."""
    caught: dict[str, Tensor] = {}
    calls: list[BlockCall] = []
    blocks = list(subject.model.blocks)
    hooks = [_output_hook(subject.architecture, caught), *frozen]
    with _differentiable(subject, hooks, fused), _calls_kept(blocks, calls, caught):
        _run(subject, tokenized)
    if len(calls) != len(blocks) or "top" not in caught:
        raise HookMismatchError(
            f"{len(calls)} of {len(blocks)} blocks ran; expected each to run once: a plain forward pass"
        )
    output = _prediction_input(caught["output"], subject.architecture)
    return Checkpointed(output, caught["top"], calls, bytes_per_product, subject, frozen, fused)


@contextmanager
def _differentiable(subject: Subject, hooks: Sequence[NamedHook], fused: bool = False) -> Iterator[None]:
    """Hooks attached behind the user's own, gradients on whatever the caller's mode is, logits of the last token."""
    model = subject.model
    with (
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.enable_grad(),
        last_logits_only(model),
        attached(model, hooks),
        fused_attention(model, _ignore) if fused else nullcontext(),
    ):
        warnings.filterwarnings("ignore", module="transformer_lens")  # it warns of every edit of a divisor
        yield


def _ignore(layer: int, key: str, value: Tensor) -> None:
    """What fused attention tells a recording is of no use here."""


def _run(subject: Subject, tokenized: TokenizedPrompt) -> None:
    """One forward pass; ids made in inference mode cannot be differentiated behind."""
    subject.model(tokenized.batch(subject.model).clone(), **without_cache(subject.model))


@contextmanager
def _calls_kept(blocks: list[nn.Module], calls: list[BlockCall], caught: dict[str, Tensor]) -> Iterator[None]:
    """Within it blocks make no graph.

    `calls` gets how each is called, `caught["top"]` the residual that leaves the last one.
    """

    def enter(block: nn.Module, arguments: tuple, named: dict) -> None:
        calls.append(BlockCall(block, arguments, named))
        torch.set_grad_enabled(False)

    def leave(block: nn.Module, arguments: tuple, output: Any) -> Any:
        torch.set_grad_enabled(True)
        if block is not blocks[-1]:
            return None
        caught["top"] = _residual_of(output).detach().requires_grad_()
        return (caught["top"], *output[1:]) if isinstance(output, tuple) else caught["top"]

    handles = [block.register_forward_pre_hook(enter, prepend=True, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _residual_of(output: Any) -> Float[Tensor, "one pos d_model"]:
    """The residual that leaves a block; some classes wrap it."""
    return output[0] if isinstance(output, tuple) else output


# ------------------------------------------------------------ where gradients begin, end and stop


def _leaf_hook(caught: dict[str, Tensor]) -> NamedHook:
    """Where gradients end: the residual that enters the first layer."""

    def start(residual: Tensor, hook: Any = None) -> Tensor:
        caught["leaf"] = residual.detach().clone().requires_grad_()
        return caught["leaf"]

    return f"blocks.0.{LAYER_HOOKS['residual']}", start


def _leaf_at_embedding(subject: Subject, caught: dict[str, Tensor]) -> RemovableHandle:
    """Where later layers read the embedding, too: it is what enters the first one, so gradients end there."""
    _, start = _leaf_hook(caught)
    return subject.model.embed.register_forward_hook(lambda embed, inputs, output: start(output))


def _output_hook(architecture: Architecture, caught: dict[str, Tensor]) -> NamedHook:
    """Where gradients begin: what the unembedding reads at the last position."""

    def end(y: Tensor, hook: Any = None) -> None:
        caught["output"] = y[0, -1]

    return architecture.final_hooks()["prediction_input"], end


def _freezing_hooks(architecture: Architecture, freeze: tuple[str, ...]) -> list[NamedHook]:
    """Detach what is to be held fixed; the same in every pass."""

    def detach(value: Tensor, hook: Any = None) -> Tensor:
        return value.detach()

    keys = [LAYER_HOOKS["pattern"]] if "attention" in freeze else []
    final: list[NamedHook] = []
    if "norms" in freeze and architecture.normed:
        keys += architecture.scale_hooks()
        final = [(architecture.final_hooks()["final_scale"], detach)]
    return [(f"blocks.{i}.{key}", detach) for i in range(architecture.n_layers) for key in keys] + final


def _prediction_input(output: Float[Tensor, " d_model"], architecture: Architecture) -> Float[Tensor, " d_model"]:
    """y_n, its gain put back where it was folded away."""
    checks.check_finite("the unembedding's input", output)
    return output if architecture.restore_gain is None else output * architecture.restore_gain.to(output)


BATCH = 64  # backward products at a time even where memory allows more: no faster beyond, and the progress bar moves
TOGETHER = 1024  # positions of all products of a batch: more only fight for a processor's cache
TRUTH_ROUTES = ("whole", "blocks", "fused")  # the whole graph, one block's at a time, and that without [dest, src]
FUSED_FROM = 512  # tokens; shorter prompts gain nothing, and their truth is to the last digit what the class computes
COMFORT = 4  # a graph that takes less than one part in so many of the memory that is there is kept whole
CARRIED = 3  # rows of covectors from block to block, what becomes of them, and one batch's of each
# What autograd keeps of one layer: multiples of its activations, and of its [head, dest, src].
GRAPH = {"bridge": (1, 1), "hooked": (2, 3)}
FUSED = 8  # vectors of all heads that fused attention keeps besides: turned, repeated for each head, mixed
ALIVE = 0.4  # of the memory set aside for a batch of backward products, what they are seen to take
SPECTRAL = 4  # whole Jacobians, their copy, their Gram matrices and the eigenvalues' work space
MAPS = 8  # copies of a block of rows, all heads, that bounds and estimate work with
MOST_FROZEN = 2048  # tokens; of more, the truth is measured as it is and not also with attention or norms frozen


def truth_route(subject: Subject, n: int, freeze: Iterable[str] = ()) -> str:
    """One of `TRUTH_ROUTES`: how the truth of n tokens is measured with the memory that is there now."""
    model, size = subject.model, subject.size
    frozen = "attention" in freeze or next(foreign_hooks(model), None) is not None
    if n >= FUSED_FROM and not frozen and why_not_fused(model, subject.architecture) is None:
        return "fused"
    if not subject.function.shown.linked:
        return "whole"  # a block is no function of the one before it alone
    whole = sum(graph_bytes(size, n).values()) + product_bytes(size, n)
    return "whole" if COMFORT * whole <= available_bytes(subject.device) else "blocks"


def products_at_once(n: int, memory: int, one: int) -> int:
    """Backward products in a batch, each of which takes `one` bytes of `memory`."""
    return max(1, min(BATCH, memory // one, TOGETHER // n))


def product_bytes(size: Size, n: int, route: str = "whole") -> int:
    """About what one backward product keeps alive at its widest: attention of one layer, or its MLP."""
    attention = 0 if route == "fused" else 4 * size.n_heads * n * n
    widest = max(attention, 4 * n * (size.d_mlp or 4 * size.d_model))
    return (widest + 6 * n * size.d_model) * size.itemsize


def graph_bytes(size: Size, n: int, route: str = "whole") -> dict[str, int]:
    """One forward pass that can be differentiated, the backward products left out."""
    linear, square = GRAPH[size.kind]
    heads = n * size.n_heads * size.d_head * size.itemsize
    layer = linear * size.position(n) + (FUSED * heads if route == "fused" else square * size.scores(n))
    if size.kind == "hooked":  # grouped keys and values, repeated for every head, and their gradients' way back
        layer += 2 * size.d_model * size.d_head * size.n_heads * size.itemsize
    rest = {"the unembedding": size.unembedding, "the libraries": BASE}
    if route == "whole":
        return {"the graph of all layers": size.n_layers * layer} | rest
    residuals = (size.n_layers + 1) * n * size.d_model * size.itemsize
    return {"the graph of one layer": layer, "the residuals between layers": residuals} | rest


def truth_bytes(
    size: Size, n: int, products: int, memory: int, spectral: bool = False, route: str = "whole"
) -> dict[str, int]:
    """The most that measuring the truth by `products` backward products holds at once."""
    one, row = product_bytes(size, n, route), n * size.d_model * max(4, size.itemsize)
    chunk = min(products, products_at_once(n, memory, one))
    carried = chunk if route == "whole" else max(1, min(products, memory // (CARRIED * row)))
    at_once = round(ALIVE * chunk * one) + (2 if route == "whole" else CARRIED) * carried * row
    if spectral:
        at_once += SPECTRAL * min(max(memory, jacobian_bytes(size)), n * jacobian_bytes(size))
    return graph_bytes(size, n, route) | {"a batch of backward products": at_once}


def jacobian_bytes(size: Size) -> int:
    """∂y_n/∂v_i of one position."""
    return size.d_model**2 * size.itemsize


def block_bytes(size: Size, n: int) -> dict[str, int]:
    """A block of rows at work: bounds, estimate and flows take one layer after another, all through the same block."""
    entries = min(ENTRIES["cpu"], size.n_heads * min(MOST_ROWS, n) * n)
    return {"a block of rows": MAPS * entries * max(4, size.itemsize), "the libraries": BASE}


def fitting_memory(
    subject: Subject, n: int, memory: int, *, spectral: bool = False, freeze: Iterable[str] = ("attention",)
) -> int:
    """`memory` for backward products, or what of it there is: fewer products at a time are a little slower.

    Raises InputError where not even one fits beside the graph. Frozen attention needs most.
    """
    size, there = subject.size, available_bytes(subject.device)
    route = truth_route(subject, n, freeze)
    fixed = sum(graph_bytes(size, n, route).values())
    least = sum(truth_bytes(size, n, 1, 0, spectral, route).values())
    if least > there:
        raise InputError(
            f"the truth of {n} tokens needs at least {in_words(least)} of memory beyond what is in use, "
            f"{in_words(fixed)} of it for the graph, and {in_words(there)} are there; expected less than that: take a "
            f"shorter prompt, free some memory, or set {MEMORY_VARIABLE} if you know of more"
        )
    each = (ALIVE + 0.1 if route == "whole" else ALIVE + 1.1) + (SPECTRAL if spectral else 0)
    return max(1, min(memory, int((there - fixed) / each)))
