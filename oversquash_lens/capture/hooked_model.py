"""What a hooked model is: the part of it that is used here, which class it is of, its norms and activations."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from oversquash_lens.errors import ModelError
from oversquash_lens.memory import Size, check_memory, record_bytes
from oversquash_lens.numerics import to_float64

if TYPE_CHECKING:
    from oversquash_lens.capture.architecture import Architecture


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
def known_class(module: str, name: str) -> type | None:
    """A class of TransformerLens, looked up when first asked for; None where this version has it not."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):  # version 4 raises ImportError for HookedTransformer, even for hasattr
        return None


def norm_gain(norm: Any, model: Any) -> Float[Tensor, " gain"]:
    """A norm's γ as it multiplies: ones where folded away, one more than what is stored where the class says so."""
    weight = getattr(norm, "w", None)
    if weight is None:
        weight = getattr(norm, "weight", None)
    if weight is None:
        return next(model.parameters()).detach().new_ones(model.cfg.d_model)
    offset = bool(getattr(getattr(norm, "config", None), "rmsnorm_uses_offset", False))
    return weight.detach() + 1 if offset else weight.detach()


def norm_bias(norm: Any) -> Float[Tensor, " d_model"] | None:
    bias = getattr(norm, "b", None)
    return bias.detach() if isinstance(bias, Tensor) else None


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


FINAL_GAIN = ("model", "restored", "unknown")


def software_versions() -> dict[str, str]:
    """Versions that a number depends on, for reports and saved traces."""
    found = {"python": platform.python_version()}
    for package in ("oversquash-lens", "transformer-lens", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass(frozen=True)
class About:
    """Where a number comes from; carried by every trace, profile and truth.

    `folded`: the model's LayerNorm gains were folded into its weights. `final_gain` says what then became of
    the last norm's gain γ₃ in y: "model" (the model applies it itself), "restored" (folded, but known, and
    multiplied back), "unknown" (folded and not recoverable: y lacks it; not comparable with the other two).
    """

    model: str
    model_class: str
    n_layers: int
    n_heads: int
    d_model: int
    dtype: str
    folded: bool
    final_gain: str
    bos: bool
    chat: bool
    versions: dict[str, str]

    def to_dict(self) -> dict:
        return asdict(self)

    def with_prompt(self, *, bos: bool, chat: bool) -> About:
        return replace(self, bos=bos, chat=chat)

    def __str__(self) -> str:
        parts = [f"{self.model} as {self.model_class} ({self.dtype})"]
        parts.append("starts with BOS" if self.bos else "no BOS")
        if self.chat:
            parts.append("chat template")
        if self.folded:
            parts.append(f"folded norms, final gain {self.final_gain}")
        return ", ".join(parts)


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
        active = {key: value for key, value in words.items() if isinstance(value, float) and value > 0}
        if active:
            key, value = next(iter(active.items()))
            raise ModelError(
                f"{name} is in training mode and drops out at random: {type(module).__name__} has {key} = {value:g}; "
                "expected a fixed function: call model.eval()"
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
