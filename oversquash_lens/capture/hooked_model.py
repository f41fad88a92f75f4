"""What a hooked model is: the part of it that is used here, which class it is of, its norms and activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from oversquash_lens.errors import ModelError
from oversquash_lens.memory import Size, check_memory, record_bytes
from oversquash_lens.numerics import to_float64
from oversquash_lens.results import About, software_versions

if TYPE_CHECKING:
    from oversquash_lens.capture.architecture import Architecture


class _Surface(type(Protocol)):  # type: ignore[misc]  # from Python 3.12 on its own check overlooks submodules
    def __instancecheck__(cls, model: Any) -> bool:
        own = {*getattr(model, "__dict__", ()), *getattr(model, "_modules", ())}  # first, for hasattr may make a dict
        rest = {"cfg", "blocks", "embed", "unembed", "hook_dict", "to_tokens"} - own
        return all(hasattr(type(model), each) or hasattr(model, each) for each in rest)


@runtime_checkable
class HookedModel(Protocol, metaclass=_Surface):
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


_points: WeakKeyDictionary[Any, tuple[list[ref], dict[str, ref]]] = WeakKeyDictionary()


def hook_points(model: HookedModel) -> dict[str, Any]:
    """The model's hook points by name, kept while its modules are the same: a bridge's `hook_dict` takes long."""
    modules = [ref(module) for module in model.modules()]
    if model not in _points or _points[model][0] != modules:
        _points[model] = modules, {name: ref(point) for name, point in model.hook_dict.items()}
    return {name: point() for name, point in _points[model][1].items()}


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
    """A weight by its TransformerLens name; None where the module has none, or cannot say what it would be.

    A bridge's latent attention, and one whose heads differ from its config's, raise errors of their own kinds.
    """
    try:
        found = getattr(module, name, None)
    except Exception:
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
def known_class(module: str, name: str) -> Any:
    """A class or table of TransformerLens, looked up when first asked for; None where this version has it not."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):  # version 4 raises ImportError for HookedTransformer, even for hasattr
        return None


def norm_gain(norm: Any, model: Any, width: int | None = None) -> Float[Tensor, " gain"]:
    """A norm's γ as it multiplies: ones of `width` (d_model) where there is none, those of heads apart one after
    another, one more than what is stored where the module that a bridge wraps adds one (Gemma, Nemotron).
    """
    weight = _stored(norm, "w", "weight")
    if weight is None:
        return next(model.parameters()).detach().new_ones(width or model.cfg.d_model)
    weight = weight.detach().flatten()
    offset = getattr(getattr(norm, "config", None), "rmsnorm_uses_offset", False) or _adds_one(norm, weight)
    return weight + 1 if offset else weight


def norm_bias(norm: Any) -> Float[Tensor, " d_model"] | None:
    bias = _stored(norm, "b", "bias")
    return None if bias is None else bias.detach().flatten()


def norms(model: Any, hooks: dict[str, Any]) -> str:
    """One of "layer" (subtracts the mean), "rms" or "none"."""
    if not any(f"blocks.0.{name}.hook_scale" in hooks for name in ("ln1", "ln1_post")):
        return "none"
    return "rms" if "RMS" in str(getattr(model.cfg, "normalization_type", "LN") or "LN") else "layer"


def norm_behind(model: Any, hooks: dict[str, Any]) -> str | None:
    """What the name of a norm of what attention writes adds to `ln1`; None where there is no such norm.

    It is `ln1` itself where what that norm gives is what attention adds to the residual (OLMo 2).
    """
    if "blocks.0.ln1_post.hook_scale" in hooks:
        return "_post"
    if is_hooked_transformer(model):
        listed = known_class("transformer_lens.utilities.architectures", "POST_NORM_ARCHITECTURES") or ()
        return "" if getattr(model.cfg, "original_architecture", None) in listed else None
    added = hooks.get("blocks.0.hook_attn_out")
    return "" if added is not None and added is hooks.get("blocks.0.ln1.hook_out") else None


def norms_across_heads(model: Any, norm: Any) -> bool:
    """Whether one norm takes the queries of all heads together: it then has a gain for every coordinate of them."""
    queries = weight_of(getattr(model.blocks[0], "attn", None), "W_Q")
    if norm is None or queries is None:
        return False
    weight = weight_of(norm, "w") if weight_of(norm, "w") is not None else weight_of(norm, "weight")
    return weight is not None and weight.ndim == 1 and weight.numel() != queries.shape[2]


def head_norms(attn: Any) -> tuple[Any, Any] | None:
    """The norms of queries and of keys; None without them. Llama 4 has one for both, in the module that it wraps."""
    query = getattr(attn, "q_norm", None)
    if query is not None:
        return query, attn.k_norm
    both = getattr(getattr(attn, "original_component", None), "qk_norm", None)
    return None if both is None else (both, both)


def clip(block: Any) -> float | None:
    """c where queries, keys and values are cut to ±c (OLMo, MPT)."""
    component = getattr(getattr(block, "attn", None), "original_component", None)
    found = (getattr(owner, "clip_qkv", None) for owner in (component, getattr(component, "config", None)))
    return next((float(each) for each in found if each), None)


def centres(norm: Any) -> bool:
    """Whether a norm takes the mean away, as LayerNorm does; its own class knows better than a config."""
    parts = _norms_of_heads(norm)
    wrapped = parts[0] if parts else getattr(norm, "original_component", None)
    said = getattr(norm, "uses_rms_norm", None)
    return isinstance(wrapped, torch.nn.LayerNorm) if said is None else not said


def _stored(norm: Any, *names: str) -> Tensor | None:
    """A norm's parameter by the first of these names that it has; of norms for heads apart, all of them."""
    for name in names:
        parts = [weight_of(part, name) for part in _norms_of_heads(norm)] or [weight_of(norm, name)]
        if parts[0] is not None:
            return torch.stack([part for part in parts if part is not None])
    return None


def _norms_of_heads(norm: Any) -> list[Any]:
    """Each head's own norm, where they are modules of their own (StableLM)."""
    return list(getattr(getattr(norm, "original_component", None), "norms", None) or ())


def _adds_one(norm: Any, weight: Float[Tensor, " gain"]) -> bool:
    """Whether the module that a bridge wraps multiplies by one more than its weight, found by what it makes of ±1."""
    component = getattr(norm, "original_component", None)
    own = weight_of(component, "weight")
    if not isinstance(component, torch.nn.Module) or own is None:
        return False
    signs = 1.0 - 2.0 * (torch.arange(weight.numel(), device=weight.device) % 2).to(weight)
    inputs = signs.view(own.shape)
    with torch.no_grad():  # .forward, so that nobody's hook is called
        seen = (component.forward(inputs) - component.forward(-inputs)).flatten() / 2
    return bool((seen - signs * (weight + 1)).norm() < (seen - signs * weight).norm())


def is_folded(model: Any) -> bool:
    """Whether the norms' gains were folded into the weights behind them."""
    if getattr(model.cfg, "normalization_type", None) in ("LNPre", "RMSPre"):
        return True
    if not getattr(model, "compatibility_mode", False):
        return False
    norms = [
        getattr(model, "ln_final", None),
        *(getattr(block, name, None) for block in model.blocks for name in ("ln1", "ln2")),
    ]
    return all(bool((norm_gain(norm, model) == 1).all()) for norm in norms if norm is not None)


def folded_final_gain(model: Any) -> Float[Tensor, " d_model"] | None:
    """γ₃ of a folded model whose embedding was tied: then W_U = γ₃ · W_Eᵀ up to a shift; None where it was not."""
    embed, unembed = getattr(model, "W_E", None), getattr(model, "W_U", None)
    if embed is None or unembed is None or embed.T.shape != unembed.shape:
        return None
    some = slice(0, 4096)  # as many tokens say as much as all
    embed, unembed = to_float64(embed.detach()[some].T), to_float64(unembed.detach()[:, some])
    embed = embed - embed.mean(1, keepdim=True)  # centring the unembedding over the vocabulary shifts it
    unembed = unembed - unembed.mean(1, keepdim=True)
    gain = (embed * unembed).sum(1) / embed.square().sum(1)
    residual = (unembed - gain[:, None] * embed).norm() / unembed.norm()
    return gain if bool(residual < 1e-3) else None


@dataclass(frozen=True)
class Activation:
    """An MLP's elementwise function and an upper bound on the absolute value of its derivative."""

    function: Callable[[Tensor], Tensor]
    lipschitz: float


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_GELU_TANH = Activation(_gelu_tanh, 1.1290)  # sup 1.128993
ACTIVATIONS = {
    "relu": Activation(torch.relu, 1.0),
    "silu": Activation(functional.silu, 1.0999),  # sup 1.099839
    "swish": Activation(functional.silu, 1.0999),
    "gelu": Activation(functional.gelu, 1.1290),  # sup 1.128904
    "gelu_new": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "quick_gelu": Activation(_quick_gelu, 1.0999),
    "tanh": Activation(torch.tanh, 1.0),
}
# What transformers' configs call an MLP's activation, and what its modules call the function itself.
ACTIVATION_WORDS = ("hidden_activation", "hidden_act", "activation_function", "activation")
ACTIVATION_MODULES = ("act_fn", "act", "activation_fn", "activation", "gelu_impl")


def activation_name(model: Any) -> Any:
    """A bridge's own word for it is not always true; what it wraps knows better."""
    config = wrapped_config(model)
    named = (getattr(config, word, None) for word in ACTIVATION_WORDS)
    return next((each for each in named if isinstance(each, str)), None) or getattr(model.cfg, "act_fn", None)


def activation_of(model: Any, layer: int) -> Activation | None:
    """What a layer's MLP applies to each neuron by itself: the function that its modules hold, else the config's.

    A function that is none of `ACTIVATIONS` has no bound on its slope. None where none is found, or where neurons act
    on one another (SoLU). Recording checks it against what the MLP shows.
    """
    block, named = model.blocks[layer], ACTIVATIONS.get(activation_name(model))
    mlp = getattr(block, "mlp", None)
    owners = [owner for owner in (mlp, getattr(mlp, "original_component", None)) if owner is not None]
    owners += [getattr(block, "original_component", None)]  # OPT's layers hold their MLP's parts themselves
    found = (getattr(owner, word, None) for owner in owners for word in ACTIVATION_MODULES)
    own = next((each for each in found if callable(each)), None)
    if own is None:
        return named
    wide = torch.promote_types(model.W_E.dtype, torch.float32)
    points = torch.linspace(-6, 6, 49, dtype=wide, device=model.W_E.device)
    with torch.no_grad():
        together, apart = own(points), own(points[:, None])[:, 0]
        if not torch.allclose(together, apart, atol=1e-6):
            return None
        known = (each for each in ACTIVATIONS.values() if torch.allclose(each.function(points), together, atol=1e-5))
        return next(known, Activation(own, math.inf))


def describe(model: HookedModel, architecture: Architecture) -> About:
    """The label that every result carries."""
    return About(
        model=getattr(model.cfg, "model_name", None) or "unnamed",
        model_class=type(model).__name__,
        n_layers=architecture.n_layers,
        n_heads=architecture.n_heads,
        d_model=architecture.d_model,
        dtype=str(architecture.dtype).removeprefix("torch."),
        folded=architecture.folded,
        final_gain=architecture.final_gain_state,
        bos=False,
        chat=False,
        versions=software_versions(),
    )


def size_of(model: Any) -> Size:
    """The shapes of a HookedTransformer or TransformerBridge, as its cfg and its first weight tell them."""
    cfg = model.cfg
    heads = cfg.n_heads
    gated = bool(getattr(cfg, "gated_mlp", False))
    experts = getattr(cfg, "experts_per_token", None) or 1
    return Size(
        n_layers=len(model.blocks),
        n_heads=heads,
        n_kv_heads=getattr(cfg, "n_key_value_heads", None) or heads,
        d_head=getattr(cfg, "d_head", None) or cfg.d_model // heads,
        d_model=cfg.d_model,
        d_mlp=(getattr(cfg, "d_mlp", None) or 0) * experts,
        matrices=3 if gated else 2,
        d_vocab=cfg.d_vocab,
        itemsize=next(model.parameters()).dtype.itemsize,
        kind="hooked" if is_hooked_transformer(model) else "bridge",
    )


def device_of(model: Any) -> Any:
    """Where the model's first weight lies."""
    return next(model.parameters()).device


def check_recording(model: Any, n: int, route: str = "kept", *, verify: bool = False) -> None:
    """Refuse a recording that would not fit, with the numbers, before it begins."""
    name = getattr(model.cfg, "model_name", None) or "this model"
    needed = record_bytes(size_of(model), n, route, verify=verify)
    check_memory(needed, device_of(model), f"recording {n} tokens with {name}")


@contextmanager
def unwrapped(inside: nn.Module) -> Iterator[None]:
    """Within the block the transformers model has its own modules back, where the bridge put components around them."""
    before: list[tuple[nn.Module, str, nn.Module]] = []
    waiting, seen = [inside], {id(inside)}
    while waiting:
        owner = waiting.pop()
        for name, child in list(owner._modules.items()):
            own = child
            while own is not None and own._modules.get("_original_component") is not None:
                own = own._modules["_original_component"]
            if own is not child and child is not None:
                before.append((owner, name, child))
                owner._modules[name] = own
            if own is not None and id(own) not in seen:
                seen.add(id(own))
                waiting.append(own)
    try:
        yield
    finally:
        for owner, name, child in before:
            owner._modules[name] = child


def refuse_dropout(modules: Sequence[nn.Module], name: str) -> None:
    """A module in training mode that drops something out, found by its probability and not by `.training` alone."""
    for module in modules:
        if not module.training:
            continue
        words = {key: value for key, value in vars(module).items() if "drop" in key or key == "p"}
        if not isinstance(module, nn.modules.dropout._DropoutNd):
            words.pop("p", None)
        for key, value in words.items():
            if isinstance(value, float) and value > 0:
                raise ModelError(
                    f"{name} is in training mode and drops out at random: {type(module).__name__} has {key} = "
                    f"{value:g}; expected a fixed function: call model.eval()"
                )


LIBRARIES = ("transformers.", "transformer_lens.", "torch.", "accelerate.")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def settings_fingerprint(model: HookedModel, modules: Sequence[nn.Module]) -> tuple:
    """Changes with the settings of either config, the mode of any module, and what a module of another library holds.

    An adapter (PEFT) is switched on and off by such a word, and no weight changes.
    """
    owners = [model.cfg, wrapped_config(model)]
    owners += [module for module in modules if not f"{type(module).__module__}.".startswith(LIBRARIES)]
    words = [
        (key, repr(value))
        for owner in owners
        for key, value in (sorted(vars(owner).items()) if owner is not None else ())
        if key not in _OF_EVERY_MODULE and _is_plain(value)
    ]
    return tuple(words), bytes(module.training for module in modules)


def _is_plain(value: Any) -> bool:
    kept = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else [value]
    return all(isinstance(each, str | int | float | bool | None | torch.dtype) for each in kept)
