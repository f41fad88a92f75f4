"""Changes of a model's attention while it runs: what the remedies of the paper and its successors do to the pattern.

Each edit takes a pattern [batch, head, dest, src] of non-negative rows and gives one whose rows sum to 1 again.
Masking scores before the softmax and dividing the surviving weights by their sum are the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import InputError
from oversquash_lens.record.hooks import attached
from oversquash_lens.record.layout import LAYER_HOOKS, model_layout

Edit = Callable[[Tensor], Tensor]

# Polynomial of the entropy that gives the inverse temperature, highest power first: Veličković et al. 2024,
# "Softmax is not enough (for sharp size generalisation)", section 5, as we recall it; its text was not at hand.
ADAPTIVE = (-0.037, 0.481, -2.3, 4.917, -1.791)
ADAPTIVE_FROM = 0.5  # nats of entropy below which a row stays as it is


def sliding_window(width: int, *, keep_first: bool = False) -> Edit:
    """Each position attends to the `width` last ones, itself included, and with `keep_first` to position 0 as well.

    >>> sliding_window(1)(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]))
    tensor([[[[1., 0.],
              [0., 1.]]]])
    """
    if width < 1:
        raise InputError(f"a window of {width} came; expected at least 1 position")

    def edit(pattern: Float[Tensor, "batch head dest src"]) -> Float[Tensor, "batch head dest src"]:
        dest, src = _positions(pattern)
        near = dest - src < width
        return _renormalised(pattern * (near | (src == 0) if keep_first else near))

    return edit


def without_first() -> Edit:
    """Nobody but position 0 itself attends to position 0: the attention sink is closed."""

    def edit(pattern: Float[Tensor, "batch head dest src"]) -> Float[Tensor, "batch head dest src"]:
        dest, src = _positions(pattern)
        return _renormalised(pattern * ((src > 0) | (dest == 0)))

    return edit


def adaptive_temperature() -> Edit:
    """Rows of high entropy are sharpened by an inverse temperature that is a polynomial of their entropy."""

    def edit(pattern: Float[Tensor, "batch head dest src"]) -> Float[Tensor, "batch head dest src"]:
        log = pattern.double().clamp(min=torch.finfo(pattern.dtype).tiny).log()  # its gradient stays finite at 0
        entropy = -(pattern * log).sum(-1, keepdim=True)
        power = sum(factor * entropy**i for i, factor in enumerate(reversed(ADAPTIVE)))
        power = torch.where(entropy > ADAPTIVE_FROM, power.clamp(min=1.0), 1.0)
        return _renormalised((power * log).exp() * (pattern > 0)).to(pattern.dtype)

    return edit


@contextmanager
def edited_attention(model: Any, edit: Edit | None) -> Iterator[None]:
    """The model attends by the edited pattern in every layer inside the `with`; `None` changes nothing."""
    if edit is None:
        yield
        return

    def change(pattern: Tensor, hook: Any = None) -> Tensor:
        return edit(pattern)

    layers = range(model_layout(model).n_layers)
    with attached(model, [(f"blocks.{i}.{LAYER_HOOKS['pattern']}", change) for i in layers]):
        yield


def _positions(pattern: Tensor) -> tuple[Tensor, Tensor]:
    """Column of destinations and row of sources; with a cache the destinations are the last of the sources."""
    dest, src = pattern.shape[-2:]
    places = torch.arange(src, device=pattern.device)
    return places[src - dest :, None], places[None, :]


def _renormalised(pattern: Tensor) -> Tensor:
    """Rows that sum to 1; a row whose every weight was cut away or underflowed spreads over nothing but itself."""
    total = pattern.sum(-1, keepdim=True)
    dest, src = _positions(pattern)
    return torch.where(total > 0, pattern / total.clamp(min=torch.finfo(pattern.dtype).tiny), (dest == src).to(pattern))
