"""What a forward pass that is made for a recording leaves out: logits that nobody reads, a cache that nobody asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from oversquash_lens.capture.hooked_model import HookedModel


@contextmanager
def last_logits_only(model: HookedModel) -> Iterator[None]:
    """The unembedding gets the last position alone, unless somebody's hook listens there."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.unembed.modules()):
        yield
        return

    def cut(unembed: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][:, -1:], *inputs[1:])

    handle = model.unembed.register_forward_pre_hook(cut, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def without_cache(model: HookedModel) -> dict[str, bool]:
    """What tells transformers' model inside a bridge to keep no keys and values for tokens to come."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    return {"use_cache": False} if hasattr(config, "use_cache") else {}
