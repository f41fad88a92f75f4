"""Backward products through one forward pass whose whole graph is kept: covector · ∂y_n/∂v, all positions at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from oversquash_lens.capture import checks
from oversquash_lens.capture.architecture import LAYER_HOOKS, Architecture
from oversquash_lens.capture.hooked_model import HookedModel
from oversquash_lens.capture.passes import NamedHook, attached, last_logits_only, without_cache
from oversquash_lens.capture.tokens import TokenizedPrompt
from oversquash_lens.jacobian.costs import products_at_once

LIFTS = (2.0**13, 2.0**6, 1.0, 2.0**-7)  # of covectors in float16, until nothing overflows


@dataclass(frozen=True)
class Tape:
    """One forward pass ready to be differentiated: y_n and the embeddings that it is a function of."""

    output: Float[Tensor, " d_model"]
    leaf: Float[Tensor, "one pos d_model"]
    bytes_per_product: int

    def products(
        self, covectors: Float[Tensor, "row d_model"], memory: int, progress: bool
    ) -> Iterator[Float[Tensor, "chunk pos d_model"]]:
        """covector · ∂y_n/∂v for all positions, a batch of covectors at a time; in float32 at least."""
        parts = covectors.split(products_at_once(self.leaf.shape[1], memory, self.bytes_per_product))
        for part in tqdm(parts, desc="backward products", unit="batch", disable=not progress, leave=False):
            rows = pulled_back(self.output, self.leaf, part)[:, 0]
            checks.check_finite("the derivative of the unembedding's input", rows)
            yield rows


def taped(
    model: HookedModel,
    architecture: Architecture,
    tokenized: TokenizedPrompt,
    freeze: Iterable[str],
    bytes_per_product: int,
) -> Tape:
    """Run the model once with a leaf at the first residual, the named parts detached, and keep the graph."""
    caught: dict[str, Tensor] = {}
    hooks = [leaf_hook(caught), output_hook(caught), *freezing_hooks(architecture, freeze)]
    with on_the_record(model, hooks):
        run(model, tokenized)
    return Tape(prediction_input(caught["output"], architecture), caught["leaf"], bytes_per_product)


def pulled_back(
    output: Tensor, leaf: Float[Tensor, "one pos d_model"], covectors: Float[Tensor, "row ..."]
) -> Float[Tensor, "row one pos d_model"]:
    """Each covector · ∂output/∂leaf, in float32 at least. Several go through the graph together, one goes alone."""
    covectors, dtype = covectors.to(output.device), output.dtype
    if dtype != torch.float16:
        rows = _rows(output, leaf, covectors.to(dtype))
        return rows.to(torch.promote_types(dtype, torch.float32))
    # Small derivatives would be 0 in float16: there they pass through lifted.
    size = covectors.float().flatten(1).norm(torch.inf, dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    unit = covectors.float() / size.view(-1, *[1] * output.ndim)
    for lift in LIFTS:
        rows = _rows(output, leaf, (unit * lift).to(dtype)).float() / lift
        if torch.isfinite(rows).all():
            break
    return rows * size.view(-1, 1, 1, 1).to(rows)


def _rows(output: Tensor, leaf: Tensor, covectors: Float[Tensor, "row ..."]) -> Tensor:
    if len(covectors) == 1:
        return torch.autograd.grad(output, leaf, covectors[0], retain_graph=True)[0][None]
    return torch.autograd.grad(output, leaf, covectors, is_grads_batched=True, retain_graph=True)[0]


@contextmanager
def on_the_record(model: HookedModel, hooks: Sequence[NamedHook]) -> Iterator[None]:
    """Hooks attached behind the user's own, gradients on whatever the caller's mode is, logits of the last token."""
    with torch.inference_mode(False), torch.enable_grad(), last_logits_only(model), attached(model, hooks):
        yield


def run(model: HookedModel, tokenized: TokenizedPrompt) -> None:
    """One forward pass; ids made in inference mode cannot be differentiated behind."""
    model(tokenized.batch(model).clone(), **without_cache(model))


def leaf_hook(caught: dict[str, Tensor]) -> NamedHook:
    """Where gradients end: the residual that enters the first layer."""

    def start(residual: Tensor, hook: Any = None) -> Tensor:
        caught["leaf"] = residual.detach().clone().requires_grad_()
        return caught["leaf"]

    return f"blocks.0.{LAYER_HOOKS['residual']}", start


def output_hook(caught: dict[str, Tensor]) -> NamedHook:
    """Where gradients begin: what the unembedding reads at the last position."""

    def end(y: Tensor, hook: Any = None) -> None:
        caught["output"] = y[0, -1]

    return "unembed.hook_in", end


def freezing_hooks(architecture: Architecture, freeze: Iterable[str]) -> list[NamedHook]:
    """Detach what is to be held fixed; the same in every pass."""

    def detach(value: Tensor, hook: Any = None) -> Tensor:
        return value.detach()

    keys = [LAYER_HOOKS["pattern"]] if "attention" in freeze else []
    final = []
    if "norms" in freeze and architecture.normed:
        keys += architecture.scale_hooks()
        final = [(architecture.final_hooks()["final_scale"], detach)]
    return [(f"blocks.{i}.{key}", detach) for i in range(architecture.n_layers) for key in keys] + final


def prediction_input(output: Float[Tensor, " d_model"], architecture: Architecture) -> Float[Tensor, " d_model"]:
    """y_n, its gain put back where it was folded away."""
    checks.check_finite("the unembedding's input", output)
    return output if architecture.restore_gain is None else output * architecture.restore_gain.to(output)
