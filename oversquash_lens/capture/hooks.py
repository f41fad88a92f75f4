"""Hooks: how ours are attached and in what surroundings a pass runs, and the closures that a user attaches."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn

from oversquash_lens.capture.architecture import FINAL_HOOKS, LAYER_HOOKS
from oversquash_lens.capture.hooked_model import (
    LIBRARIES,
    HookedModel,
    hook_points,
    is_a,
    wrapped_config,
    wrapped_model,
)
from oversquash_lens.errors import HookMismatchError, ModelError, OversquashError

Hook = Callable[..., Tensor | None]  # a returned tensor takes the place of what the hook saw
NamedHook = tuple[str, Hook]
PATIENCE = 600  # seconds that one thread waits for another's capture of the same model
KINDS = ("_forward_hooks", "_forward_pre_hooks")


class _Capture:
    """Who is capturing a model: a lock that one thread may take several times over, and that thread."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.thread: int | None = None
        self.depth = 0
        self.compiled = False  # whether a module of the model was compiled in place, as the last door has seen it


_captures: WeakKeyDictionary[Any, _Capture] = WeakKeyDictionary()
_captures_lock = threading.Lock()
_attached: set[int] = set()  # ids of the hooks of ours that hang on some model's hook points


@contextmanager
def surroundings(model: HookedModel) -> Iterator[None]:
    """Within the block the model is this thread's own, autocast is off, inference mode is no-grad mode.

    Modules that `module.compile()` has compiled in place run eagerly, so that their hooks fire. Raises OversquashError
    where another thread keeps a capture of the same model open for `PATIENCE` seconds.
    """
    with ExitStack() as stack:
        stack.enter_context(_alone(model))
        stack.enter_context(full_precision(next(iter(model.parameters())).device))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())  # leaving inference mode has turned gradients on
        if _captures[model].compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Within the block autocast is off, on this device and the CPU."""
    with ExitStack() as stack:
        for kind in sorted({device.type, "cpu"}):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _alone(model: HookedModel) -> Iterator[None]:
    with _captures_lock:
        capture = _captures.setdefault(model, _Capture())
    if not capture.lock.acquire(timeout=PATIENCE):
        raise OversquashError(
            f"another thread has kept a capture of this model open for {PATIENCE} s; expected one capture of a model "
            "at a time: close that recording, or give each thread a model of its own"
        )
    capture.thread, capture.depth = threading.get_ident(), capture.depth + 1
    try:
        yield
    finally:
        capture.depth -= 1
        if not capture.depth:
            capture.thread = None
        capture.lock.release()


def check_pass(model: HookedModel) -> None:
    """At the beginning of a pass that our hooks listen to: it is the capturing thread's own, and in full precision."""
    capture = _captures.get(model)
    if capture is not None and capture.thread not in (None, threading.get_ident()):
        raise OversquashError(
            "a forward pass was begun in one thread while another captures this model; expected one thread at a time: "
            "wait for the capture to end, or give each thread a model of its own"
        )
    device = next(iter(model.parameters())).device.type
    if torch.is_autocast_enabled(device):
        raise OversquashError(
            f"torch.autocast({device!r}) is on inside a capture; expected it to be off, for its rounding is not the "
            "model's own: run the model outside it, or enter it before the recording, which turns it off"
        )


def uncompiled(model: Any) -> Any:
    """The model inside what `torch.compile(model)` gives; any other as it is."""
    return getattr(model, "_orig_mod", model)


def all_modules(model: HookedModel) -> Iterator[nn.Module]:
    """Every module of a model once, those of what a bridge wraps included."""
    seen: set[int] = set()
    for owner in (model, wrapped_model(model)):
        for module in owner.modules() if isinstance(owner, nn.Module) else ():
            if id(module) not in seen:
                seen.add(id(module))
                yield module


def note_compiled(model: HookedModel, modules: Sequence[nn.Module]) -> None:
    """Remember whether passes of this model have to be told to run eagerly, so that hooks fire."""
    with _captures_lock:
        capture = _captures.setdefault(model, _Capture())
    capture.compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in modules)


def ordinary_tensors(modules: Sequence[nn.Module]) -> None:
    """Replace what was made inside torch.inference_mode() by equal tensors that can be differentiated, for good.

    Weights that several modules share go on being shared. A model on the meta device is refused: it has no numbers.
    """
    copies: dict[int, Tensor] = {}
    for module in modules:
        stored: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for kept in stored:
            for name, value in kept.items():
                if value is None:
                    continue
                if value.device.type == "meta":
                    raise ModelError(
                        f"the weight {name!r} lies on the meta device, which holds no numbers; expected a model with "
                        "its weights: load it onto a device such as 'cpu'"
                    )
                if value.is_inference():
                    if id(value) not in copies:
                        with torch.inference_mode(False), torch.no_grad():
                            copy: Tensor = value.clone()
                        if isinstance(value, nn.Parameter):
                            copy = nn.Parameter(copy, value.requires_grad)
                        copies[id(value)] = copy
                    kept[name] = copies[id(value)]


# ---------------------------------------------------------------- our own hooks


@contextmanager
def attached(model: HookedModel, hooks: Sequence[NamedHook]) -> Iterator[None]:
    """Attach our hooks, and on leaving, whatever happened, remove these and no others.

    Passes inside are made in `surroundings`. The hooks survive the model's own reset_hooks(). When a pass begins they
    move behind every other hook of their points, so that what they see is what the model goes on to use.
    """
    handles: list[tuple[Any, Any]] = []
    with ExitStack() as stack:
        stack.enter_context(surroundings(model))
        points, lent = _hook_points(model)
        stack.callback(_detach, handles, lent)
        for name, hook in hooks:
            if name not in points:
                raise HookMismatchError(
                    f"the model has no hook point {name!r}; expected TransformerLens' standard hooks"
                )
            point = points[name]
            point.add_hook(hook, is_permanent=True)
            handles.append((point, point.fwd_hooks[-1]))
            _attached.add(point.fwd_hooks[-1].hook.id)

        stack.callback(model.embed.register_forward_pre_hook(partial(_move_last, model, handles)).remove)
        yield


def _move_last(model: HookedModel, handles: list[tuple[Any, Any]], embed: Any, inputs: tuple) -> None:
    check_pass(model)
    for _, handle in handles:
        waiting = handle.hook.hooks_dict_ref()
        if waiting is not None and handle.hook.id in waiting:
            waiting.move_to_end(handle.hook.id)


def _detach(handles: list[tuple[Any, Any]], lent: Any) -> None:
    if lent is not None:
        lent.remove()
    for point, handle in handles:
        handle.hook.remove()
        _attached.discard(handle.hook.id)
        point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


def _hook_points(model: HookedModel) -> tuple[dict[str, Any], Any]:
    """The model's hook points. TransformerLens 2 has none before the unembedding: it is lent one, with its handle."""
    points, name = hook_points(model), FINAL_HOOKS["prediction_input"]
    if name in points or not isinstance(getattr(model, "unembed", None), nn.Module):
        return points, None
    point = type(next(iter(points.values())))()
    handle = model.unembed.register_forward_pre_hook(lambda unembed, inputs: (point(inputs[0]), *inputs[1:]))
    return points | {name: point}, handle


# ---------------------------------------------------------------- whose hooks: ours, the libraries', the user's


def hooks_on(module: nn.Module, *, ours: bool = False) -> list[int]:
    """Ids of the user's forward hooks of any kind on one module, with `ours` of ours as well; of no library's own."""
    if not (module._forward_hooks or module._forward_pre_hooks):
        return []
    point = is_a(module, "transformer_lens.hook_points", "HookPoint")  # wraps whatever hook it is given in its own
    return [
        number
        for kind in KINDS
        for number, hook in getattr(module, kind).items()
        if (ours if _is_ours(number, hook) else point or not _module_of(hook).startswith(LIBRARIES))
    ]


def _module_of(hook: Any) -> str:
    hook = getattr(hook, "func", hook)  # of a partial
    return f"{getattr(hook, '__module__', None) or type(hook).__module__}."


def hooked_places(model: HookedModel) -> list[str]:
    """Names of what has a forward hook of the user's."""
    return [name for module, name in named_modules(model) if hooks_on(module)]


def named_modules(model: Any) -> list[tuple[nn.Module, str]]:
    """Every module once; a hook point by the shortest of its names."""
    points: dict[int, str] = {}
    for name, point in getattr(model, "hook_dict", {}).items():
        points[id(point)] = min(points.get(id(point), name), name, key=len)
    found: dict[int, tuple[nn.Module, str]] = {}
    for owner in (model, wrapped_model(model)):
        for name, module in owner.named_modules() if isinstance(owner, nn.Module) else ():
            named = points.get(id(module), name.replace("_original_component.", "")) or "the model"
            found.setdefault(id(module), (module, named))
    return list(found.values())


@contextmanager
def without_hooks(model: HookedModel, *, users: bool = True) -> Iterator[None]:
    """Within the block neither our hooks nor (unless `users` is False) the user's are called; libraries' own are.

    Backward hooks are never called: what is differentiated here is no step of the user's.
    """
    before: list[tuple[nn.Module, str, OrderedDict]] = []
    for module in all_modules(model):
        for kind in ("_backward_hooks", "_backward_pre_hooks"):
            if hooks := getattr(module, kind):
                before.append((module, kind, hooks))
                setattr(module, kind, OrderedDict())
        theirs = set(hooks_on(module))
        for kind in KINDS:
            hooks = getattr(module, kind)
            silenced = {n for n, hook in hooks.items() if (users if n in theirs else _is_ours(n, hook))}
            if silenced:
                before.append((module, kind, hooks))
                kept = OrderedDict((n, hook) for n, hook in hooks.items() if n not in silenced)
                setattr(module, kind, kept)
    try:
        yield
    finally:
        for module, kind, hooks in before:
            setattr(module, kind, hooks)


def _is_ours(number: int, hook: Callable) -> bool:
    return number in _attached or _module_of(hook).startswith("oversquash_lens.")


# ---------------------------------------------------------------- what a pass leaves out


@contextmanager
def last_logits_only(model: HookedModel, lengths: Sequence[int] | None = None) -> Iterator[None]:
    """The unembedding gets the last position alone, unless somebody's hook listens there.

    `lengths`: of the prompts of a batch that is padded on the right; the last position of all rows without it.
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.unembed.modules()):
        yield
        return

    handle = model.unembed.register_forward_pre_hook(partial(_last_alone, lengths), prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _last_alone(lengths: Sequence[int] | None, unembed: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = inputs[0]
    if lengths is None:
        return (x[:, -1:], *inputs[1:])
    last = torch.tensor(lengths, device=x.device) - 1
    return (x[torch.arange(len(last), device=x.device), last][:, None], *inputs[1:])


needing_cache: WeakSet[Any] = WeakSet()  # models of which a pass without it has failed


def without_cache(model: HookedModel) -> dict[str, bool]:
    """What tells transformers' model inside a bridge to keep no keys and values for tokens to come, where it may."""
    return {"use_cache": False} if model not in needing_cache and hasattr(wrapped_config(model), "use_cache") else {}


Store = dict[str, Any]


def last_token_residual_hooks(model: Any, store: Store, *, detach: bool = True) -> list[NamedHook]:
    """Hooks that keep the last token's residual stream at every layer.

    `store` is a dict of yours. Each pass fills `store["last_residual"][l]` with [batch, d_model]: entering layer l for
    l < n_layers, leaving the last layer for l = n_layers. `detach=False` keeps the autograd graph. With padding on the
    right "last" is the last column. The hooks change no activation and hold no reference to the model.
    """
    from oversquash_lens.capture.subject import Subject  # whose proof attaches hooks

    subject = Subject.of(model)
    subject.require("residual hooks")
    architecture = subject.architecture
    kept = store.setdefault("last_residual", {})
    names = [f"blocks.{i}.{LAYER_HOOKS['residual']}" for i in range(architecture.n_layers)]
    names.append(architecture.final_hooks()["last"])
    return [(name, partial(_keep_last, kept, layer, detach)) for layer, name in enumerate(names)]


def _keep_last(kept: dict, layer: int, detach: bool, residual: Tensor, hook: Any = None) -> None:
    kept[layer] = _own(residual[:, -1], detach)


def attention_path_hooks(model: Any, store: Store, *, detach: bool = True) -> list[NamedHook]:
    """Hooks that keep what attention-path products are made of; `path_products(store)` multiplies them afterwards.

    `store` is a dict of yours. Each pass fills `store["attention"][l]` with the pattern [batch, head, dest, src], and
    `store["attention_scale"][l]`, `store["mlp_scale"][l]` with the divisors of the two norms [batch, pos], where the
    architecture has them. Put them behind hooks of your own that edit patterns, or they see the pattern before the
    edit. Patterns are kept entire: memory grows as layer·head·pos². `detach=False` keeps the autograd graph.
    """
    from oversquash_lens.capture.subject import Subject  # whose proof attaches hooks

    subject = Subject.of(model)
    subject.require("path hooks")
    architecture = subject.architecture
    names = architecture.layer_hooks()
    hooks = {"attention": "pattern", "attention_scale": "attention_scale", "mlp_scale": "mlp_scale"}
    return [
        (f"blocks.{layer}.{names[name]}", partial(_keep, store.setdefault(key, {}), layer, key == "attention", detach))
        for layer in range(architecture.n_layers)
        for key, name in hooks.items()
        if name in names
    ]


def _keep(kept: dict, layer: int, whole: bool, detach: bool, value: Tensor, hook: Any = None) -> None:
    kept[layer] = _own(value if whole else value[..., 0], detach)


def _own(value: Tensor, detach: bool) -> Tensor:
    """A copy: a view would keep the whole activation alive, and a later in-place edit would change it."""
    return value.detach().clone() if detach else value.clone()


SAMPLES = 64  # numbers of a large weight that its fingerprint looks at; of a small one it looks at all
SMALL = 4096


def weights_fingerprint(model: HookedModel) -> tuple:
    """Changes when a weight does: where it lies, how often it was written, and a sample of its numbers."""
    marks, samples = [], []
    for _, weight in named_weights(model):
        marks.append((weight.data_ptr(), weight._version, tuple(weight.shape), weight.dtype))
        samples.append(_sample(weight))
    home = samples[0].device if samples else torch.device("cpu")
    digest = torch.cat([each.to(home) for each in samples]).cpu() if samples else torch.zeros(0, device="cpu")
    return tuple(marks), digest.numpy().tobytes()


def named_weights(model: HookedModel) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer once."""
    seen: set[int] = set()
    for owner in (model, wrapped_model(model)):
        if isinstance(owner, nn.Module):
            for name, weight in (*nn.Module.named_parameters(owner), *nn.Module.named_buffers(owner)):
                if id(weight) not in seen:
                    seen.add(id(weight))
                    yield name, weight.detach()


def _sample(weight: Tensor) -> Float[Tensor, " number"]:
    if not weight.is_contiguous():
        return weight.reshape(-1)[:: max(1, weight.numel() // SAMPLES)].float()
    flat = weight.view(-1)
    return (flat if weight.numel() <= SMALL else flat[:: weight.numel() // SAMPLES]).float()


def hooks_fingerprint(modules: Sequence[nn.Module]) -> tuple[int, ...]:
    """The user's forward hooks by their ids, which are never given twice."""
    return tuple(number for module in modules for number in hooks_on(module))
