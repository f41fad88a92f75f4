"""Proof, on a few tokens, of what every measure takes for granted of a model; an error says by how much it fails.

At most six passes of at most eight tokens: the class's own; one with later tokens changed and a row of each pattern
halved; one of fused attention; one of the transformers model inside, where `load_model` has not made it before; and one
with all tokens but the first changed, or two with the user's hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from oversquash_lens.capture.architecture import LAYER_HOOKS, Architecture
from oversquash_lens.capture.checks import TOLERANCE
from oversquash_lens.capture.fused import copied_projections_differ, fused_attention, why_not_fused
from oversquash_lens.capture.hooked_model import HookedModel, wrapped_model
from oversquash_lens.capture.hooks import (
    NamedHook,
    all_modules,
    attached,
    hooked_places,
    named_weights,
    weights_fingerprint,
    without_cache,
    without_hooks,
)
from oversquash_lens.errors import ModelError, OversquashError, one_line

TOKENS = 8
MIDDLE = 4  # the first position whose token the second pass changes
# How far two equal passes may be apart, relative to the largest logit: what the order of sums makes of it.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 2e-3}


class Predictions(NamedTuple):
    """What one pass makes of some tokens, in float64 on the CPU; `y`: the prediction's input."""

    logits: Float[Tensor, "pos d_vocab"]
    y: Float[Tensor, "pos d_model"]


@dataclass(frozen=True)
class Reference:
    """What the transformers model said of `ids` before it was wrapped or converted, and for which weights."""

    ids: Int[Tensor, "one pos"]
    predictions: Predictions
    weights: tuple


@dataclass(frozen=True)
class Function:
    """What was found of a model's function, hooks apart.

    `not_compared`: why it was not held against transformers, empty where it was. `patterns_used`: whether the patterns
    that hooks show are the ones that mix the values. `fused_obstacle`: what keeps fused attention out, or None.
    """

    own: Predictions
    not_compared: str
    patterns_used: bool
    fused_obstacle: str | None


_references: WeakKeyDictionary[Any, Reference] = WeakKeyDictionary()


def keep_reference(model: HookedModel, ids: Int[Tensor, "one pos"], predictions: Predictions) -> None:
    """Remember what the transformers model predicted that this one was made from; its weights are as they are now."""
    _references[model] = Reference(ids, predictions, weights_fingerprint(model))


def wrapped_predictions(model: Any, ids: Int[Tensor, "one pos"]) -> Predictions:
    """What a transformers model predicts by itself."""
    caught: dict[str, Tensor] = {}
    cache = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    with torch.no_grad(), listening(model.get_output_embeddings(), caught):
        logits = model(input_ids=ids.to(next(model.parameters()).device), **cache).logits
    return Predictions(_wide(logits), _wide(caught["y"]))


def proof_ids(d_vocab: int, tokenizer: Any, n_ctx: int) -> tuple[Int[Tensor, "one pos"], Int[Tensor, "one pos"]]:
    """Two rows of up to eight ordinary tokens that differ at every position."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    ordinary = [i for i in range(d_vocab) if i not in special] or list(range(d_vocab))
    step = max(1, len(ordinary) // (TOKENS + 3))
    places = range(1, 1 + step * min(TOKENS, n_ctx), step)
    rows = [[ordinary[(place + shift) % len(ordinary)] for place in places] for shift in (0, 1)]
    first, second = (torch.tensor([row], device="cpu") for row in rows)
    return first, second


# ---------------------------------------------------------------- the function is one


def prove_function(model: HookedModel, architecture: Architecture) -> Function:
    """The class's own pass, the fused one and the transformers model inside agree; nobody's hook listens."""
    first, second = rows_of(model)
    changed = torch.cat([first[:, :MIDDLE], second[:, MIDDLE:]], 1)
    with without_hooks(model):
        before, after = _Mixed(model), _Mixed(model)
        own = predictions(model, first, architecture.name, before.hooks())
        _refuse_not_finite(model, own, architecture)
        place = min(MIDDLE, first.shape[1]) - 1
        other = predictions(model, changed, architecture.name, after.hooks(halved=place))
        _prove_unmoved(model, architecture, first, own, other, place)
        fused_obstacle = _prove_fused(model, architecture, first, own)
        not_compared = _prove_wrapped(model, architecture, first, own)
    return Function(own, not_compared, before.differs(after, place), fused_obstacle)


def prove_sequence(model: HookedModel, architecture: Architecture, function: Function, hooked: bool) -> bool:
    """Two passes agree, and no later token changes an earlier position, with the user's hooks where there are any.

    Returns False where these hooks cannot be tried, for they need other tokens than these few.
    """
    first, second = rows_of(model)
    with without_hooks(model, users=not hooked):
        start = min(MIDDLE, first.shape[1] - 1) if hooked else 1
        changed = torch.cat([first[:, :start], second[:, start:]], 1)
        try:
            own = predictions(model, first, architecture.name) if hooked else function.own
            other = predictions(model, changed, architecture.name)
        except ModelError:
            if hooked:
                return False  # without the hooks it ran
            raise
        _prove_unmoved(model, architecture, first, own, other, start)
    return True


def rows_of(model: HookedModel) -> tuple[Int[Tensor, "one pos"], Int[Tensor, "one pos"]]:
    """The tokens of the proof: those of the model's reference where it has one, so that they can be compared."""
    first, second = proof_ids(model.cfg.d_vocab, model.tokenizer, model.cfg.n_ctx)
    reference = _references.get(model)
    return (first if reference is None else reference.ids), second


def predictions(
    model: HookedModel, ids: Int[Tensor, "one pos"], name: str, hooks: Sequence[NamedHook] = ()
) -> Predictions:
    """The class's own pass; a ModelError where the model itself fails, or gives other than logits of every position."""
    caught: dict[str, Tensor] = {}
    try:
        with torch.no_grad(), attached(model, hooks), listening(model.unembed, caught):
            logits = model(ids.clone().to(model.W_E.device), **without_cache(model))
    except OversquashError:
        raise
    except Exception as error:
        raise ModelError(
            f"{name} does not run: its own forward pass of {ids.shape[1]} tokens ends in {type(error).__name__}: "
            f"{one_line(error, 160)}; expected logits: see that model(tokens) works"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape or "y" not in caught:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"{name} gives {shape} for {ids.shape[1]} tokens; expected logits [1, {ids.shape[1]}, d_vocab]: a causal "
            "decoder of text"
        )
    return Predictions(_wide(logits), _wide(caught["y"]))


@contextmanager
def listening(unembedding: nn.Module, caught: dict[str, Tensor]) -> Iterator[None]:
    def keep(module: nn.Module, inputs: tuple) -> None:
        caught["y"] = inputs[0]

    handle = unembedding.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


class _Mixed:
    """What the first layer's heads make of the values, and patterns halved at one position in another pass."""

    def __init__(self, model: HookedModel) -> None:
        self.points, self.layers = model.hook_dict, len(model.blocks)
        self.z: Tensor | None = None

    def hooks(self, halved: int | None = None) -> list[NamedHook]:
        def keep(z: Tensor, hook: Any = None) -> None:
            self.z = z.detach().clone()

        def halve(pattern: Tensor, hook: Any = None) -> Tensor:
            edited = pattern.clone()
            edited[..., halved, :] *= 0.5
            return edited

        found: list[NamedHook] = [(f"blocks.0.{LAYER_HOOKS['z']}", keep)]
        if halved is not None:
            found += [(f"blocks.{i}.{LAYER_HOOKS['pattern']}", halve) for i in range(self.layers)]
        return [(name, hook) for name, hook in found if name in self.points]

    def differs(self, other: _Mixed, place: int) -> bool:
        return self.z is not None and other.z is not None and not torch.equal(self.z[:, place], other.z[:, place])


def _prove_unmoved(
    model: HookedModel,
    architecture: Architecture,
    ids: Int[Tensor, "one pos"],
    own: Predictions,
    other: Predictions,
    stop: int,
) -> None:
    """Positions before `stop`, whose tokens and all tokens before are the same in both passes, are the same."""
    size = own.logits.abs().max().clamp(min=1e-6)
    off = (own.logits - other.logits)[:stop].abs().amax(-1) / size
    if not stop or bool((off <= ROUNDING[architecture.dtype]).all()):
        return
    if not bool(off.isfinite().all()):
        raise ModelError(
            f"{architecture.name} gives NaN or infinite logits on {ids.shape[1]} tokens; expected finite ones: check "
            "its weights and the hooks on it, or use a wider dtype (float32) if this one overflows"
        )
    again = predictions(model, ids, architecture.name)
    apart = ((again.logits - own.logits).abs().max() / size).item()
    if apart > ROUNDING[architecture.dtype]:
        blamed = hooked_places(model)
        cause = f"the hooks of yours on {', '.join(blamed[:3])}" if blamed else "something random in its forward pass"
        raise ModelError(
            f"{architecture.name} is not a fixed function: two passes of the same tokens differ by {apart:.2g} of the "
            f"largest logit, which {cause} may do; expected equal passes: call model.eval(), or remove what is random"
        )
    place = int(off.argmax())
    raise ModelError(
        f"{architecture.name} is not causal: later tokens change the logits of position {place} by "
        f"{off[place].item():.2g} of the largest; expected a causal decoder, for which every measure here is made"
    )


# ---------------------------------------------------------------- fused attention, and transformers


def _prove_fused(
    model: HookedModel, architecture: Architecture, ids: Int[Tensor, "one pos"], own: Predictions
) -> str | None:
    """What keeps fused attention out, None where it gives the class's own predictions."""
    obstacle = why_not_fused(model, architecture)
    if obstacle is not None:
        return obstacle
    try:
        with fused_attention(model, lambda layer, key, value: None):
            fused = predictions(model, ids, architecture.name)
    except ModelError as error:
        return f"its fused pass fails ({one_line(error, 160)})"
    said = _apart(own, fused, architecture)
    if said is not None and copied_projections_differ(model):
        return "its projections are copies that no longer are those of the module it wraps"
    _refuse_apart(said, architecture, "the fused pass of transformers' own attention")
    return None


def _prove_wrapped(
    model: HookedModel, architecture: Architecture, ids: Int[Tensor, "one pos"], own: Predictions
) -> str:
    """Why the model was not compared with transformers, empty where they agree."""
    reference = _references.get(model)
    if reference is not None and reference.weights == weights_fingerprint(model):
        said = _apart(own, reference.predictions, architecture)
        _refuse_apart(said, architecture, "the transformers model it was made from")
        return ""
    inside = wrapped_model(model)
    if not hasattr(inside, "get_output_embeddings"):
        return f"not compared with transformers: this {type(model).__name__} has no transformers model inside"
    if getattr(model, "compatibility_mode", False):
        return "not compared with transformers: compatibility mode has processed the weights"
    try:
        with _unwrapped(inside):
            other = wrapped_predictions(inside, ids)
    except Exception as error:
        return f"not compared with transformers: the model inside fails by itself ({one_line(error, 120)})"
    said = _apart(own, other, architecture)
    if said is not None and copied_projections_differ(model):
        return "not compared with transformers: its projections are copies that were edited"
    _refuse_apart(said, architecture, "the transformers model inside")
    return ""


@contextmanager
def _unwrapped(inside: nn.Module) -> Iterator[None]:
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


def _apart(own: Predictions, other: Predictions, architecture: Architecture) -> str | None:
    """By how much two predictions of the same tokens differ where that is more than rounding; None where it is not.

    In half precision a router near a tie may flip at one position, so there the median over positions counts.
    """
    ours, theirs = own.logits.log_softmax(-1), other.logits.log_softmax(-1)
    if ours.shape != theirs.shape:
        return f"{theirs.shape[-1]} logits instead of {ours.shape[-1]}"
    found = {"log-probabilities": (ours - theirs).abs().amax(-1) / ours.abs().max().clamp(min=1.0)}
    if not architecture.folded and own.y.shape == other.y.shape:
        found["what the unembedding reads"] = (own.y - other.y).norm(dim=-1) / own.y.norm(dim=-1).clamp(min=1e-6)
    half = architecture.dtype.itemsize < 4
    for what, off in found.items():
        most = (off.median() if half else off.max()).item()
        if not most <= TOLERANCE[architecture.dtype]:
            return f"{what} differ by {most:.2g} of their size"
    return None


def _refuse_apart(said: str | None, architecture: Architecture, route: str) -> None:
    if said is not None:
        kind = "HookedTransformer" if architecture.hooked else "TransformerBridge"
        raise ModelError(
            f"{architecture.name} as a {kind} computes another function than {route}: {said} on {TOKENS} tokens, "
            f"expected at most {TOLERANCE[architecture.dtype]:.2g}; a measure of it would describe neither: load it as "
            "the other class, or with another version of transformer-lens"
        )


def _refuse_not_finite(model: HookedModel, own: Predictions, architecture: Architecture) -> None:
    if bool(torch.isfinite(own.logits).all()) and bool(torch.isfinite(own.y).all()):
        return
    broken = [name for name, weight in named_weights(model) if not bool(torch.isfinite(weight).all())]
    if broken:
        raise ModelError(
            f"the weights {broken[0].replace('_original_component.', '')} hold NaN or infinite values; expected finite "
            f"ones: load {architecture.name} again"
        )
    raise ModelError(
        f"{architecture.name} gives NaN or infinite logits for {TOKENS} tokens; expected finite ones: use a wider "
        "dtype (float32) if this one overflows"
    )


# ---------------------------------------------------------------- dropout


def refuse_dropout(model: HookedModel, name: str) -> None:
    """A module in training mode that drops something out, found by its probability and not by `.training` alone."""
    for module in all_modules(model):
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


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(device="cpu", dtype=torch.float64)[0]
