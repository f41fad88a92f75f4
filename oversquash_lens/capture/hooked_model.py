"""A hooked model's own surface: what both of TransformerLens' classes answer to, and which of them a model is."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class HookedModel(Protocol):
    """The surface that HookedTransformer and TransformerBridge share and that we use."""

    cfg: Any
    tokenizer: Any
    blocks: Any
    embed: Any
    unembed: Any

    @property
    def hook_dict(self) -> dict[str, Any]: ...

    @property
    def W_E(self) -> Tensor: ...  # noqa: N802

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...

    def to_tokens(self, *args: Any, **kwargs: Any) -> Tensor: ...

    def parameters(self, recurse: bool = True) -> Iterator[Tensor]: ...

    def modules(self) -> Iterator[Any]: ...


def is_hooked_transformer(model: Any) -> bool:
    """Whether a model is a HookedTransformer or of a class made from it; the rest are bridges."""
    return is_a(model, "transformer_lens", "HookedTransformer")


def wrapped_model(model: Any) -> Any:
    """The transformers model inside a bridge; None for a HookedTransformer."""
    return getattr(model, "original_model", None)


def wrapped_config(model: Any) -> Any:
    """transformers' config of what a bridge wraps; None for a HookedTransformer."""
    return getattr(wrapped_model(model), "config", None)


def weight_of(module: Any, name: str) -> Tensor | None:
    """A weight by its TransformerLens name; None where the module has none, or (latent attention) refuses to say."""
    try:
        found = getattr(module, name, None)
    except NotImplementedError:
        return None
    return found if isinstance(found, Tensor) else None


def is_a(thing: Any, module: str, name: str) -> bool:
    kind = known_class(module, name)
    return kind is not None and isinstance(thing, kind)


def is_a_class(found: type, module: str, name: str) -> bool:
    """Whether a class is one of TransformerLens' or made from it."""
    kind = known_class(module, name)
    return kind is not None and issubclass(found, kind)


@cache
def known_class(module: str, name: str) -> type | None:
    """A class of TransformerLens, looked up when first asked for; None where this version has it not."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):  # version 4 raises ImportError for HookedTransformer, even for hasattr
        return None
