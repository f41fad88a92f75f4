"""Importable hook utilities: small closures for `run_with_hooks` or `model.hooks`, kept to be multiplied later.

store = {}
model.run_with_hooks(tokens, fwd_hooks=last_token_residual_hooks(model, store))
store["last_residual"][3]      # [batch, d_model], the last token's residual entering layer 3
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from oversquash_lens.capture.architecture import LAYER_HOOKS
from oversquash_lens.capture.passes import Hook, NamedHook
from oversquash_lens.capture.subject import Subject
from oversquash_lens.errors import ModelError

Store = dict[str, Any]


def last_token_residual_hooks(model: Any, store: Store, *, detach: bool = True) -> list[NamedHook]:
    """Hooks that keep the last token's residual stream at every layer.

    Each pass fills `store["last_residual"][l]` with [batch, d_model]: entering layer l for l < n_layers, leaving
    the last layer for l = n_layers. `detach=False` keeps the autograd graph. With padding on the right "last" is
    the last column. The hooks change no activation and hold no reference to the model.
    """
    architecture = Subject.of(model).architecture
    kept = store.setdefault("last_residual", {})
    names = [f"blocks.{i}.{LAYER_HOOKS['residual']}" for i in range(architecture.n_layers)]
    names.append(architecture.final_hooks()["last"])

    def keeper(layer: int) -> Hook:
        def keep(residual: Tensor, hook: Any = None) -> None:
            kept[layer] = _own(residual[:, -1], detach)

        return keep

    return [(name, keeper(layer)) for layer, name in enumerate(names)]


def attention_path_hooks(model: Any, store: Store, *, detach: bool = True) -> list[NamedHook]:
    """Hooks that keep what attention-path products are made of; `path_products(store)` multiplies them afterwards.

    Each pass fills `store["attention"][l]` with the pattern [batch, head, dest, src], and
    `store["attention_scale"][l]`, `store["mlp_scale"][l]` with the divisors of the two norms [batch, pos], where the
    architecture has them.
    Put them behind hooks of your own that edit patterns, or they see the pattern before the edit. Patterns are kept
    whole: memory grows as layer·head·pos².
    """
    architecture = Subject.of(model).architecture

    def keeper(key: str, layer: int) -> Hook:
        kept = store.setdefault(key, {})

        def keep(value: Tensor, hook: Any = None) -> None:
            kept[layer] = _own(value[..., 0] if key != "attention" else value, detach)

        return keep

    names = architecture.layer_hooks()
    if f"blocks.0.{LAYER_HOOKS['pattern']}" not in model.hook_dict:
        raise ModelError(
            f"{architecture.name} has no hook {LAYER_HOOKS['pattern']!r}; expected one that shows patterns"
        )
    hooks = {"attention": "pattern", "attention_scale": "attention_scale", "mlp_scale": "mlp_scale"}
    return [
        (f"blocks.{layer}.{names[name]}", keeper(key, layer))
        for layer in range(architecture.n_layers)
        for key, name in hooks.items()
        if name in names
    ]


def _own(value: Tensor, detach: bool) -> Tensor:
    """A copy: a view would keep the whole activation alive, and a later in-place edit would change it."""
    return value.detach().clone() if detach else value.clone()
