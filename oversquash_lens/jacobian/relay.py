"""Backward products of a long prompt: block by block, each run again when its turn comes, one block's graph at a time.

What is kept of the pass are the residuals that enter the blocks, O(n) a layer. Covectors are handed down from the last
block to the first, many together, so a block is run again once for all of them (gradient checkpointing does it once for
each batch). Where attention may be fused no [dest, src] is made at all, and memory is O(n) throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from oversquash_lens.capture import checks
from oversquash_lens.capture.architecture import Architecture
from oversquash_lens.capture.fused import fused_attention
from oversquash_lens.capture.hooked_model import HookedModel
from oversquash_lens.capture.tokens import TokenizedPrompt
from oversquash_lens.errors import HookMismatchError
from oversquash_lens.jacobian.costs import CARRIED, products_at_once
from oversquash_lens.jacobian.tape import (
    freezing_hooks,
    leaf_hook,
    on_the_record,
    output_hook,
    prediction_input,
    pulled_back,
    run,
)

Rows = Float[Tensor, "row one pos d_model"]


@dataclass(frozen=True)
class Call:
    """How the model called one of its blocks."""

    block: nn.Module
    arguments: tuple
    named: dict[str, Any]

    def residual(self) -> Float[Tensor, "one pos d_model"]:
        return self.arguments[0] if self.arguments else self.named["hidden_states"]

    def again(self, residual: Float[Tensor, "one pos d_model"]) -> Float[Tensor, "one pos d_model"]:
        """Call it once more, with this residual."""
        if self.arguments:
            return _written(self.block(residual, *self.arguments[1:], **self.named))
        return _written(self.block(**self.named | {"hidden_states": residual}))


@dataclass(frozen=True)
class Relay:
    """One pass of which each block can be run again. `output` is y_n, a function of `top`, the last residual."""

    output: Float[Tensor, " d_model"]
    top: Float[Tensor, "one pos d_model"]
    calls: list[Call]
    bytes_per_product: int
    ready: Callable[[list], AbstractContextManager]  # in it the blocks run as they did, with these hooks besides

    @property
    def leaf(self) -> Float[Tensor, "one pos d_model"]:
        """The residual that enters the first block."""
        return self.calls[0].residual()

    def products(
        self, covectors: Float[Tensor, "row d_model"], memory: int, progress: bool
    ) -> Iterator[Float[Tensor, "chunk pos d_model"]]:
        """covector · ∂y_n/∂v for all positions, as many covectors at a time as can be carried; float32 at least."""
        parts = covectors.split(max(1, memory // (CARRIED * self.leaf.numel() * max(4, self.leaf.element_size()))))
        steps = len(parts) * len(self.calls)
        with tqdm(total=steps, desc="backward products", unit="block", disable=not progress, leave=False) as bar:
            for part in parts:
                yield self._handed_down(part, memory, bar)

    def _handed_down(
        self, covectors: Float[Tensor, "row d_model"], memory: int, bar: Any
    ) -> Float[Tensor, "row pos d_model"]:
        with torch.inference_mode(False):
            rows = pulled_back(self.output, self.top, covectors.clone())
            for layer in reversed(range(len(self.calls))):
                rows = self._through(layer, rows, memory)
                bar.update()
        return rows[:, 0]

    def _through(self, layer: int, rows: Rows, memory: int) -> Rows:
        """Covectors of what the block writes become those of what it reads."""
        caught: dict[str, Tensor] = {}
        with self.ready([leaf_hook(caught)] if layer == 0 else []):
            leaf = self.calls[layer].residual().detach().requires_grad_()
            written = self.calls[layer].again(leaf)
            self._check_same(layer, written.detach())
            leaf, batch = caught.get("leaf", leaf), products_at_once(leaf.shape[1], memory, self.bytes_per_product)
            for part in rows.split(batch):  # views: each batch's rows take the place of their covectors
                part.copy_(pulled_back(written, leaf, part))
        checks.check_finite(f"layer {layer}, the derivative of the unembedding's input", rows)
        return rows

    def _check_same(self, layer: int, written: Tensor) -> None:
        """Dropout, or a user's hook that does another thing at its second call, would make it another function."""
        before = self.top if layer + 1 == len(self.calls) else self.calls[layer + 1].residual()
        before = before.detach().to(written)
        off = ((written - before).abs().max() / before.abs().max().clamp(min=1e-6)).item()
        if not off <= checks.TOLERANCE[written.dtype]:
            raise HookMismatchError(
                f"block {layer}, run a second time for the truth of a long prompt, differs from its first run by "
                f"{off:.2g} of its size; expected the same both times: no dropout (model.eval()), and no hook of yours "
                "that does something else at its second call"
            )


def relayed(
    model: HookedModel,
    architecture: Architecture,
    tokenized: TokenizedPrompt,
    freeze: Iterable[str],
    bytes_per_product: int,
    fused: bool = False,
) -> Relay:
    """Run the model once, keep how each block was called, and the graph of what lies behind the last of them."""
    caught: dict[str, Tensor] = {}
    calls: list[Call] = []
    frozen = freezing_hooks(architecture, freeze)

    def ready(hooks: list) -> AbstractContextManager:
        return _ready(model, [*hooks, *frozen], fused)

    with ready([output_hook(caught)]), _listening(list(model.blocks), calls, caught):
        run(model, tokenized)
    if len(calls) != len(model.blocks) or "top" not in caught:
        raise HookMismatchError(
            f"{len(calls)} of {len(model.blocks)} blocks ran; expected each to run once: a plain forward pass"
        )
    return Relay(prediction_input(caught["output"], architecture), caught["top"], calls, bytes_per_product, ready)


@contextmanager
def _ready(model: HookedModel, hooks: list, fused: bool) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(on_the_record(model, hooks))
        stack.enter_context(fused_attention(model, _unheard) if fused else nullcontext())
        yield


def _unheard(layer: int, key: str, value: Tensor) -> None:
    """Nobody asks what fused attention reads."""


@contextmanager
def _listening(blocks: list[nn.Module], calls: list[Call], caught: dict[str, Tensor]) -> Iterator[None]:
    """Within it blocks make no graph; `calls` hears how each is called, `caught["top"]` is what the last one wrote."""

    def enter(block: nn.Module, arguments: tuple, named: dict) -> None:
        calls.append(Call(block, arguments, named))
        torch.set_grad_enabled(False)

    def leave(block: nn.Module, arguments: tuple, written: Any) -> Any:
        torch.set_grad_enabled(True)
        if block is not blocks[-1]:
            return None
        caught["top"] = _written(written).detach().requires_grad_()
        return (caught["top"], *written[1:]) if isinstance(written, tuple) else caught["top"]

    handles = [block.register_forward_pre_hook(enter, prepend=True, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _written(output: Any) -> Float[Tensor, "one pos d_model"]:
    """What a block writes; some classes wrap it."""
    return output[0] if isinstance(output, tuple) else output
