"""What a hooked model is: the part of it that is used here, which class it is of, its norms and activations."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from oversquash_lens.errors import visible
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


DOUBLED_BOS = "the prompt begins with BOS twice: text that a chat template has made has it already; give bos=False"
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
    `doubled_bos`: the prompt begins with BOS twice, as text does that a chat template has made before.
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
    doubled_bos: bool = False

    def to_dict(self) -> dict:
        return asdict(self)

    def with_prompt(self, *, bos: bool, chat: bool, doubled_bos: bool = False) -> About:
        return replace(self, bos=bos, chat=chat, doubled_bos=doubled_bos)

    @property
    def remark(self) -> str:
        """What may not be meant as it came, empty where nothing is."""
        return DOUBLED_BOS if self.doubled_bos else ""

    def __str__(self) -> str:
        parts = [f"{self.model} as {self.model_class} ({self.dtype})"]
        parts.append("starts with BOS twice" if self.doubled_bos else "starts with BOS" if self.bos else "no BOS")
        if self.chat:
            parts.append("chat template")
        if self.folded:
            parts.append(f"folded norms, final gain {self.final_gain}")
        return visible(", ".join(parts))


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
