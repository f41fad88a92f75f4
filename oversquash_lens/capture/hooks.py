"""Importable hook utilities: small closures for `run_with_hooks` or `model.hooks`, and how we attach our own.

store = {}
model.run_with_hooks(tokens, fwd_hooks=last_token_residual_hooks(model, store))
store["last_residual"][3]      # [batch, d_model], the last token's residual entering layer 3
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module

from oversquash_lens.capture.architecture import FINAL_HOOKS, LAYER_HOOKS, HookedModel, read_architecture
from oversquash_lens.errors import HookMismatchError

Hook = Callable[..., Tensor | None]  # a returned tensor takes the place of what the hook saw
NamedHook = tuple[str, Hook]
Store = dict[str, Any]


def last_token_residual_hooks(model: Any, store: Store, *, detach: bool = True) -> list[NamedHook]:
    """Hooks that keep the last token's residual stream at every layer.

    Each pass fills `store["last_residual"][l]` with [batch, d_model]: entering layer l for l < n_layers, leaving
    the last layer for l = n_layers. `detach=False` keeps the autograd graph. With padding on the right "last" is
    the last column. The hooks change no activation and hold no reference to the model.
    """
    architecture = read_architecture(model)
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
    architecture = read_architecture(model)

    def keeper(key: str, layer: int) -> Hook:
        kept = store.setdefault(key, {})

        def keep(value: Tensor, hook: Any = None) -> None:
            kept[layer] = _own(value[..., 0] if key != "attention" else value, detach)

        return keep

    names = architecture.layer_hooks()
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


@contextmanager
def attached(model: HookedModel, hooks: Sequence[NamedHook]) -> Iterator[None]:
    """Attach our hooks, and on leaving, whatever happened, remove these and no others.

    They survive the model's own reset_hooks(). When a pass begins they move behind every other hook of their points,
    so that what they see is what the model goes on to use.
    """
    handles = []
    points, lent = _hook_points(model)
    try:
        for name, hook in hooks:
            if name not in points:
                raise HookMismatchError(
                    f"the model has no hook point {name!r}; expected TransformerLens' standard hooks"
                )
            point = points[name]
            point.add_hook(hook, is_permanent=True)
            handles.append((point, point.fwd_hooks[-1]))

        def move_last(embed: Any, inputs: tuple) -> None:
            for _, handle in handles:
                waiting = handle.hook.hooks_dict_ref()
                if waiting is not None and handle.hook.id in waiting:
                    waiting.move_to_end(handle.hook.id)

        beginning = model.embed.register_forward_pre_hook(move_last)
        try:
            yield
        finally:
            beginning.remove()
    finally:
        if lent is not None:
            lent.remove()
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


def _hook_points(model: HookedModel) -> tuple[dict[str, Any], Any]:
    """The model's hook points. TransformerLens 2 has none before the unembedding: it is lent one, with its handle."""
    points = model.hook_dict  # a bridge builds it anew at every look
    name = FINAL_HOOKS["prediction_input"]
    if name in points or not isinstance(getattr(model, "unembed", None), Module):
        return points, None
    point = type(next(iter(points.values())))()
    handle = model.unembed.register_forward_pre_hook(lambda unembed, inputs: (point(inputs[0]), *inputs[1:]))
    return points | {name: point}, handle
