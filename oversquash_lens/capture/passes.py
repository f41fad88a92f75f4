"""What a forward pass of ours leaves out: logits and a key/value cache that nobody uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from oversquash_lens.capture.architecture import HookedModel


@contextmanager
def last_logits_only(model: HookedModel, lengths: Sequence[int] | None = None) -> Iterator[None]:
    """The unembedding gets the last position alone, unless somebody's hook listens there.

    `lengths`: of the prompts of a batch that is padded on the right; the last position of all rows without it.
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.unembed.modules()):
        yield
        return

    def cut(unembed: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        if lengths is None:
            return (x[:, -1:], *inputs[1:])
        last = torch.tensor(lengths, device=x.device) - 1
        return (x[torch.arange(len(last), device=x.device), last][:, None], *inputs[1:])

    handle = model.unembed.register_forward_pre_hook(cut, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def without_cache(model: HookedModel) -> dict[str, bool]:
    """What tells transformers' model inside a bridge to keep no keys and values for tokens to come."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    return {"use_cache": False} if hasattr(config, "use_cache") else {}
