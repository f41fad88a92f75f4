"""Proof, on a few tokens, of what every measure takes for granted of a model; an error says by how much it fails.

At most six passes of at most eight tokens: the class's own, which is differentiated; one with later tokens changed and
a row of each pattern set to zero; one of fused attention; one of the transformers model inside, where `load_model` has
not made it before; and one with all tokens but the first changed, or two with the user's hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from oversquash_lens.capture.architecture import FINAL_HOOKS, LAYER_HOOKS, Architecture
from oversquash_lens.capture.checks import Predictions, apart, refuse_apart
from oversquash_lens.capture.fused import copied_projections_differ, fused_attention, why_not_fused
from oversquash_lens.capture.hooked_model import HookedModel, device_of, unwrapped, wrapped_model
from oversquash_lens.capture.hooks import (
    NamedHook,
    attached,
    hooked_places,
    named_weights,
    needing_cache,
    weights_fingerprint,
    without_cache,
    without_hooks,
)
from oversquash_lens.capture.tokens import proof_ids
from oversquash_lens.errors import ModelError, OversquashError, one_line

MIDDLE = 4  # the first position whose token the second pass changes
# How far two equal passes may be apart, relative to the largest logit: what the order of sums makes of it.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 2e-3}


@dataclass(frozen=True)
class Reference:
    """What the transformers model said of `ids` before it was wrapped or converted, and for which weights."""

    ids: Int[Tensor, "one pos"]
    predictions: Predictions
    weights: tuple


@dataclass(frozen=True)
class Function:
    """What was found of a model's function, the user's hooks apart.

    `not_compared`: why it was not held against transformers, empty where it was. `fused_obstacle`: what keeps fused
    attention out, or None. `shown`: what its hooks have shown. `later`: what was found when first asked for.
    """

    own: Predictions
    not_compared: str
    fused_obstacle: str | None
    shown: Shown
    later: dict[str, str] = field(default_factory=dict)


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


# ---------------------------------------------------------------- the function is one


def prove_function(model: HookedModel, architecture: Architecture) -> Function:
    """The class's own pass, the fused one and the transformers model inside agree; nobody's hook listens."""
    first, second = rows_of(model)
    changed = torch.cat([first[:, :MIDDLE], second[:, MIDDLE:]], 1)
    with without_hooks(model):
        watched = _Watched(model, architecture)
        caught: dict[str, Tensor] = {}
        last = getattr(model, "ln_final", model.unembed)
        with model.embed.register_forward_hook(watched.begin), last.register_forward_pre_hook(watched.end):
            own = _first_predictions(model, first, architecture.name, watched, caught)
        _refuse_not_finite(model, own, architecture)
        shown = watched.shown(caught.pop("y"), repeatable=model not in needing_cache)
        place = min(MIDDLE, first.shape[1]) - 1
        other = predictions(model, changed, architecture.name, watched.emptying(place))
        _prove_unmoved(model, architecture, first, own, other, place)
        shown = shown._replace(unused=watched.unused(place), heads=watched.mixed[-1] in watched.shapes)
        fused_obstacle = _prove_fused(model, architecture, first, own)
        not_compared = _prove_wrapped(model, architecture, first, own)
    return Function(own, not_compared, fused_obstacle, shown)


def _first_predictions(
    model: HookedModel, ids: Int[Tensor, "one pos"], name: str, watched: _Watched, caught: dict[str, Tensor]
) -> Predictions:
    """Without a key/value cache; where that fails and with one it does not, all passes are made with one."""
    needing_cache.discard(model)
    try:
        return predictions(model, ids, name, watched.hooks(), caught)
    except ModelError:
        if not without_cache(model):
            raise
        needing_cache.add(model)
        watched.shapes.clear()
        try:
            return predictions(model, ids, name, watched.hooks(), caught)
        except ModelError:
            needing_cache.discard(model)
        raise


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
    model: HookedModel,
    ids: Int[Tensor, "one pos"],
    name: str,
    hooks: Sequence[NamedHook] = (),
    graph: dict[str, Tensor] | None = None,
) -> Predictions:
    """The class's own pass; a ModelError where the model itself fails, or gives other than logits of every position.

    `graph` gets "y" with the graph that it was made in; without it none is made.
    """
    caught = {} if graph is None else graph
    try:
        with torch.set_grad_enabled(graph is not None), attached(model, hooks), listening(model.unembed, caught):
            logits = model(ids.clone().to(device_of(model)), **without_cache(model))
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


def listening(unembedding: nn.Module, caught: dict[str, Tensor]) -> RemovableHandle:
    """To be entered: within it `caught` gets what the unembedding reads."""
    return unembedding.register_forward_pre_hook(lambda module, inputs: caught.update(y=inputs[0]))


class Shown(NamedTuple):
    """What the hooks of two passes have shown; texts say what is in the way, empty where nothing is.

    `residuals`: of reading the residual stream before each layer and behind the last; `derivative`: of differentiating
    by the first of them; `scales`: of reading the norms' divisors; `unused`: of editing patterns. `patterns`: layers
    that show one. `linked`: a block enters with what the one before it left, and nothing else carries the embedding
    on. `embedded`: something does, and the embedding is what enters the first block. `heads`: what those of the last
    layer read is shown.
    """

    residuals: str
    derivative: str
    scales: str
    linked: bool
    embedded: bool
    patterns: tuple[int, ...]
    unused: str = ""
    heads: bool = False


class _Watched:
    """Listens to the first two passes."""

    def __init__(self, model: HookedModel, architecture: Architecture) -> None:
        self.points, layers = model.hook_dict, range(architecture.n_layers)
        self.entering, self.patterns, self.mixed = (
            [f"blocks.{i}.{LAYER_HOOKS[key]}" for i in layers] for key in ("residual", "pattern", "z")
        )
        self.leaving = [FINAL_HOOKS["last"].format(last=i) for i in layers]
        self.scales = [f"blocks.{i}.{name}" for i in layers for name in architecture.scale_hooks()]
        self.width = architecture.d_model
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self.values: dict[str, Tensor] = {}

    def _note(
        self, name: str, edit: Callable[[str, Tensor], Tensor] | None, value: Tensor, hook: Any = None
    ) -> Tensor | None:
        self.shapes.setdefault(name, []).append(tuple(value.shape))
        self.values[name] = value.detach()
        return None if edit is None else edit(name, value)

    def hooks(self) -> list[NamedHook]:
        """For the first pass; the residual stream that enters the first block begins a graph of its own."""
        names = [*self.entering, *self.leaving, *self.patterns, *self.scales]
        names = [*(name for name in names if name in self.points), FINAL_HOOKS["prediction_input"]]
        return [(name, partial(self._note, name, self._leaf if name == self.entering[0] else None)) for name in names]

    def begin(self, embed: nn.Module, inputs: tuple, output: Any) -> Tensor | None:
        """Forward hook of the embedding, which begins a graph, too."""
        return self._leaf("embed", output) if isinstance(output, Tensor) else None

    def end(self, norm: nn.Module, inputs: tuple) -> None:
        """Forward pre-hook of what comes behind the last block."""
        self.values["end"] = inputs[0].detach()

    def _leaf(self, name: str, value: Tensor) -> Tensor:
        self.values[name] = value.detach().clone().requires_grad_()
        return self.values[name]

    def shown(self, y: Tensor, repeatable: bool) -> Shown:
        """What the first pass has shown; `y` is what the unembedding read, with its graph.

        `repeatable`: whether a block may be run again, for it fills no cache.
        """
        n, last = y.shape[1], torch.zeros_like(y)
        last[:, -1] = 1
        stream = (1, n, self.width)
        fault = self._fault(self.entering[:1], stream) or self._fault([FINAL_HOOKS["prediction_input"]], tuple(y.shape))
        beside = same = False
        leaf, embedded = self.values.get(self.entering[0]), self.values.get("embed")
        if not fault and leaf is not None:
            leaves = [leaf] if embedded is None else [leaf, embedded]
            try:
                through, *rest = torch.autograd.grad(y, leaves, last, allow_unused=True)
                beside = any(each is not None for each in rest)
                same = embedded is not None and torch.equal(leaf, embedded)
                if through is None:
                    fault = "its prediction is no function of the residual stream that enters the first block"
                elif beside and not same:
                    fault = "its later layers read the embedding beside the residual stream"
            except RuntimeError as error:
                fault = f"its pass cannot be differentiated ({one_line(error, 120)})"
        equal = [
            a in self.values and b in self.values and torch.equal(self.values[a], self.values[b])
            for a, b in zip(self.leaving, [*self.entering[1:], "end"], strict=True)
        ]
        residuals = self._fault([*self.entering, self.leaving[-1]], stream)
        if not residuals and not equal[-1]:
            residuals = f"what {self.leaving[-1]} shows is not what the final norm reads"
        self.values.clear()
        return Shown(
            residuals=residuals,
            derivative=fault,
            scales=self._fault(self.scales, (1, n, 1), once=False),  # split inputs are normalised three times
            linked=repeatable and not beside and all(equal[:-1]),
            embedded=beside and same,
            patterns=tuple(
                layer
                for layer, name in enumerate(self.patterns)
                if [(len(each), each[-2:]) for each in self.shapes.get(name, [])] == [(4, (n, n))]
            ),
        )

    def _fault(self, names: Sequence[str], expected: tuple[int, ...], once: bool = True) -> str:
        for name in names:
            seen = self.shapes.get(name, [])
            if set(seen) != {expected} or (once and len(seen) > 1):
                came = " and ".join(str(list(each)) for each in seen[:3]) or "nothing"
                return f"the hook {name} shows {came}, not {list(expected)}{' once' * once}"
        return ""

    def emptying(self, place: int) -> list[NamedHook]:
        """For the second pass: `place` attends to nothing, so that its heads read nothing."""

        def empty(name: str, pattern: Tensor) -> Tensor:
            edited = pattern.clone()
            edited[..., place, :] = 0
            return edited

        found = [(name, partial(self._note, name, empty)) for name in self.patterns]
        found += [(name, partial(self._note, name, None)) for name in self.mixed]
        return [(name, hook) for name, hook in found if name in self.points]

    def unused(self, place: int) -> str:
        """Where the second pass has shown that a pattern is not what mixes the values; empty where it is in all."""
        for layer, name in enumerate(self.mixed):
            if name not in self.values or bool(self.values[name][:, place].ne(0).any()):
                return f"an edit of layer {layer}'s attention pattern does not reach what its heads read"
        return ""


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
    _refuse_not_finite(model, other, architecture)
    again = predictions(model, ids, architecture.name)
    differ = ((again.logits - own.logits).abs().max() / size).item()
    if differ > ROUNDING[architecture.dtype]:
        blamed = hooked_places(model)
        cause = f"the hooks of yours on {', '.join(blamed[:3])}" if blamed else "something random in its forward pass"
        raise ModelError(
            f"{architecture.name} is not a fixed function: two passes of the same tokens differ by {differ:.2g} of the "
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
    said = apart(own, fused, architecture)
    if said is not None and copied_projections_differ(model):
        return "its projections are copies that no longer are those of the module it wraps"
    refuse_apart(said, architecture, "the fused pass of transformers' own attention")
    return None


def _prove_wrapped(
    model: HookedModel, architecture: Architecture, ids: Int[Tensor, "one pos"], own: Predictions
) -> str:
    """Why the model was not compared with transformers, empty where they agree."""
    reference = _references.get(model)
    if reference is not None and reference.weights == weights_fingerprint(model):
        said = apart(own, reference.predictions, architecture)
        refuse_apart(said, architecture, "the transformers model it was made from")
        return ""
    inside = wrapped_model(model)
    if not hasattr(inside, "get_output_embeddings"):
        return f"not compared with transformers: this {type(model).__name__} has no transformers model inside"
    if getattr(model, "compatibility_mode", False):
        return "not compared with transformers: compatibility mode has processed the weights"
    try:
        with unwrapped(inside):
            other = wrapped_predictions(inside, ids)
    except Exception as error:
        return f"not compared with transformers: the model inside fails by itself ({one_line(error, 120)})"
    said = apart(own, other, architecture)
    if said is not None and copied_projections_differ(model):
        return "not compared with transformers: its projections are copies that were edited"
    refuse_apart(said, architecture, "the transformers model inside")
    return ""


def _refuse_not_finite(model: HookedModel, own: Predictions, architecture: Architecture) -> None:
    if bool(torch.isfinite(own.logits).all()) and bool(torch.isfinite(own.y).all()):
        return
    weights = dict(named_weights(model))  # HookedTransformer keeps the -inf that masks as one number
    broken = [name for name, each in weights.items() if each.numel() > 1 and not bool(torch.isfinite(each).all())]
    if broken:
        raise ModelError(
            f"the weights {broken[0].replace('_original_component.', '')} hold NaN or infinite values; expected finite "
            f"ones: load {architecture.name} again"
        )
    raise ModelError(
        f"{architecture.name} gives NaN or infinite logits for {len(own.y)} tokens; expected finite ones: check the "
        "hooks on it, or use a wider dtype (float32) if this one overflows"
    )


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(device="cpu", dtype=torch.float64)[0]
