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
from oversquash_lens.capture.fused import fused_attention, fused_shows_heads
from oversquash_lens.capture.hooks import Hook, NamedHook, attached, full_precision, last_logits_only, without_cache
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import TokenizedPrompt
from oversquash_lens.errors import HookMismatchError, ModelError
from oversquash_lens.jacobian.routes import CARRIED, product_bytes, products_at_once, truth_route
from oversquash_lens.jacobian.targets import Target

LIFTS = (2.0**13, 2.0**6, 1.0, 2.0**-7)  # of covectors in float16, until nothing overflows

Rows = Float[Tensor, "row one pos d_model"]


@dataclass(frozen=True)
class Prediction:
    """The end of a differentiable pass: y_n as `output`, what the unembedding read, and its logits, in one graph."""

    output: Float[Tensor, " d_model"]
    read: Float[Tensor, "one some d_model"]
    logits: Float[Tensor, " d_vocab"]
    gain: Float[Tensor, " d_model"] | None
    """What folding has moved from y_n into the unembedding; None where nothing."""

    def covector(self, target: Target) -> Float[Tensor, " d_model"]:
        """∂F/∂y_n, F being the target."""
        (gradient,) = torch.autograd.grad(target.of(self.logits), self.read, retain_graph=True)
        found = gradient[0, -1].detach()
        return found if self.gain is None else torch.where(self.gain == 0, 0, found / self.gain).to(found)


@dataclass(frozen=True)
class WholeGraph:
    """A pass whose whole graph is kept: y_n, and the residuals entering the first block that it is a function of."""

    prediction: Prediction
    leaf: Float[Tensor, "one pos d_model"]
    bytes_per_product: int

    @property
    def output(self) -> Float[Tensor, " d_model"]:
        return self.prediction.output

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

    prediction: Prediction
    top: Float[Tensor, "one pos d_model"]
    calls: list[BlockCall]
    bytes_per_product: int
    subject: Subject
    frozen: list[NamedHook]
    fused: bool

    @property
    def output(self) -> Float[Tensor, " d_model"]:
        return self.prediction.output

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
        with self.block(layer) as (leaf, leaving, _):
            batch = products_at_once(leaf.shape[1], memory, self.bytes_per_product)
            for part in rows.split(batch):  # views: each batch's rows take the place of their covectors
                part.copy_(vjp(leaving, leaf, part))
        checks.check_finite(f"layer {layer}, the derivative of the unembedding's input", rows)
        return rows

    @contextmanager
    def block(self, layer: int, watched: Sequence[str] = ()) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """A block run again: the residual that enters it, the one that leaves it, and what `watched` hooks showed.

        `watched` are keys of LAYER_HOOKS. All of it is in one graph, in which the first is the leaf.
        """
        caught: dict[str, Tensor] = {}
        hooks = [_leaf_hook(caught)] if layer == 0 else []
        hooks += [(f"blocks.{layer}.{LAYER_HOOKS[key]}", _watching_hook(caught, key)) for key in watched]
        with _differentiable(self.subject, [*hooks, *self.frozen], self.fused):
            leaf = self.calls[layer].residual().detach().requires_grad_()
            leaving = self.calls[layer].repeat(leaf)
            self._check_same(layer, leaving.detach())
            yield caught.pop("leaf", leaf), leaving, caught

    def block_at(
        self, layer: int, residual: Float[Tensor, "one pos d_model"], watched: Sequence[str] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What leaves a block, and what `watched` hooks show, where this residual enters it; without a graph."""
        caught: dict[str, Tensor] = {}
        hooks = [(f"blocks.{layer}.{LAYER_HOOKS[key]}", _watching_hook(caught, key)) for key in watched]
        with _differentiable(self.subject, [*hooks, *self.frozen], self.fused), torch.no_grad():
            return self.calls[layer].repeat(residual), caught

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


def checkpointed(subject: Subject, tokenized: TokenizedPrompt, *, patterns: bool = False) -> Checkpointed:
    """As `differentiate`, always a block at a time; fused where it pays and where hooks show what heads write.

    With `patterns`, attention is never fused, so that hooks show it.

    Raises ModelError for a model whose blocks take more than what the one before left, which cuts its paths in two.
    """
    if not subject.function.shown.linked:
        raise ModelError(
            f"{subject.about.model} hands its blocks more than what the one before left, so no layer's residual stream "
            "cuts its Jacobian in two; expected a plain stack of blocks: measured_sensitivity needs none"
        )
    n = len(tokenized.ids)
    route = truth_route(subject, n)
    fused = route == "fused" and fused_shows_heads(subject.model) and not patterns
    one = product_bytes(subject.size, n, "fused" if fused else "blocks")
    return _with_checkpoints(subject, tokenized, [], one, fused=fused)


def vjp(
    output: Tensor, leaf: Float[Tensor, "one pos d_model"], covectors: Float[Tensor, "row ..."]
) -> Float[Tensor, "row one pos d_model"]:
    """Each covector · ∂output/∂leaf, in float32 at least. Several go through the graph together, one goes alone."""
    return vjps(output, [leaf], covectors)[0]


def vjps(output: Tensor, leaves: Sequence[Tensor], covectors: Float[Tensor, "row ..."]) -> list[Tensor]:
    """As `vjp`, by each of several leaves of one graph."""
    covectors, dtype = covectors.to(output.device), output.dtype
    if dtype != torch.float16:
        found = _gradients(output, leaves, covectors.to(dtype))
        return [rows.to(torch.promote_types(dtype, torch.float32)) for rows in found]
    # Small derivatives would be 0 in float16: there they pass through lifted.
    size = covectors.float().flatten(1).norm(torch.inf, dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    unit = covectors.float() / size.view(-1, *[1] * output.ndim)
    for lift in LIFTS:
        found = [rows.float() / lift for rows in _gradients(output, leaves, (unit * lift).to(dtype))]
        if all(bool(torch.isfinite(rows).all()) for rows in found):
            break
    return [rows * size.view(-1, *[1] * (rows.ndim - 1)).to(rows) for rows in found]


def _gradients(output: Tensor, leaves: Sequence[Tensor], covectors: Float[Tensor, "row ..."]) -> list[Tensor]:
    """One product for each covector; anomaly detection asks for numbers that a batch of products has not."""
    keep: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    with full_precision(output.device):
        if len(covectors) == 1 or torch.is_anomaly_enabled():
            rows = [torch.autograd.grad(output, leaves, each, **keep) for each in covectors]
            return [torch.stack(each) for each in zip(*rows, strict=True)]
        return list(torch.autograd.grad(output, leaves, covectors, is_grads_batched=True, **keep))


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
        prediction = _run(subject, tokenized, caught)
    return WholeGraph(prediction, caught["leaf"], bytes_per_product)


def _with_checkpoints(
    subject: Subject, tokenized: TokenizedPrompt, frozen: list[NamedHook], bytes_per_product: int, fused: bool
) -> Checkpointed:
    """Run the model once, keep how each block was called, and the graph of what lies behind the last of them."""
    caught: dict[str, Tensor] = {}
    calls: list[BlockCall] = []
    blocks = list(subject.model.blocks)
    hooks = [_output_hook(subject.architecture, caught), *frozen]
    with _differentiable(subject, hooks, fused), _calls_kept(blocks, calls, caught):
        prediction = _run(subject, tokenized, caught)
    if len(calls) != len(blocks) or "top" not in caught:
        raise HookMismatchError(
            f"{len(calls)} of {len(blocks)} blocks ran; expected each to run once: a plain forward pass"
        )
    return Checkpointed(prediction, caught["top"], calls, bytes_per_product, subject, frozen, fused)


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


def _run(subject: Subject, tokenized: TokenizedPrompt, caught: dict[str, Tensor]) -> Prediction:
    """One forward pass; ids made in inference mode cannot be differentiated behind."""
    logits = subject.model(tokenized.batch(subject.model).clone(), **without_cache(subject.model))
    output = _prediction_input(caught["read"][0, -1], subject.architecture)
    return Prediction(output, caught["read"], logits[0, -1], subject.architecture.restore_gain)


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


def _watching_hook(caught: dict[str, Tensor], key: str) -> Hook:
    """Keeps what a hook shows, as a part of the graph: what it returns is what the model goes on with."""

    def watch(value: Tensor, hook: Any = None) -> Tensor:
        caught[key] = value.clone()
        return caught[key]

    return watch


def _leaf_at_embedding(subject: Subject, caught: dict[str, Tensor]) -> RemovableHandle:
    """Where later layers read the embedding, too: it is what enters the first one, so gradients end there."""
    _, start = _leaf_hook(caught)
    return subject.model.embed.register_forward_hook(lambda embed, inputs, output: start(output))


def _output_hook(architecture: Architecture, caught: dict[str, Tensor]) -> NamedHook:
    """Where gradients begin: what the unembedding reads at the last position."""

    return architecture.final_hooks()["prediction_input"], _watching_hook(caught, "read")


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
