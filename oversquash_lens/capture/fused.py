"""A forward pass of a TransformerBridge that makes no attention pattern: transformers' own modules, fused attention.

A bridge computes its patterns itself, eagerly, so that hooks can show them. Within `fused_attention` each of its
attention blocks hands over to the module that it wraps, and transformers' table of attention functions sends that one's
queries, keys and values here, where they are reported to the recording. All other hooks go on firing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from oversquash_lens.capture.architecture import Architecture, read_architecture
from oversquash_lens.capture.attention import halves_turned_back, per_head
from oversquash_lens.capture.hooked_model import HookedModel, device_of, size_of, wrapped_model
from oversquash_lens.capture.hooks import hooks_on
from oversquash_lens.errors import InputError, ModelError, one_line
from oversquash_lens.memory import available_bytes, record_bytes

NAME = "oversquash_lens"  # in transformers' tables
Report = Callable[[int, str, Tensor], None]  # layer, key of LAYER_HOOKS or checks.REPORTED, [1, pos, head, d_head]
Tables = tuple[Tensor, Tensor]  # cosines and sines of the positions, [1, pos, rotary]
_CPU_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"


def why_not_fused(model: HookedModel, architecture: Architecture) -> str | None:
    """What keeps this model's attention from being fused; None where nothing does."""
    if architecture.fused_obstacle is not None:
        return architecture.fused_obstacle
    original = wrapped_model(model)
    can_switch = getattr(original, "_can_set_attn_implementation", None)
    if can_switch is None:
        return f"a {type(model).__name__} over no transformers model computes its attention itself"
    if any(getattr(block, "attn", None) is None for block in model.blocks):
        return "not every block of it has attention"
    reasons = {
        "its scores are capped, which fused attention does not know": architecture.soft_cap is not None,
        "its attention sinks are a term of the softmax that fused attention does not know": architecture.sinks,
        "its scores have a bias of the position": architecture.biased,
        "transformers' code for it does not look its attention function up": not can_switch(),
        "compatibility mode has processed the weights, and the module that it wraps does not read these": (
            getattr(model, "compatibility_mode", False) and "query" in _silent(model.blocks[0].attn)
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def fused_shows_heads(model: HookedModel) -> bool:
    """Whether the hook of what heads write fires in a pass of fused attention, in every block."""
    return not any("z" in _silent(block.attn) for block in model.blocks)


def copied_projections_differ(model: HookedModel) -> bool:
    """Whether a bridge's own copies of joint projections are no longer those of the modules that it wraps."""
    for block in model.blocks:
        split = getattr(getattr(block, "attn", None), "split_qkv_matrix", None)
        if split is None:
            continue
        for name, fresh in zip(("q", "k", "v"), split(block.attn.original_component), strict=True):
            copy = getattr(getattr(block.attn, name), "original_component", None)
            if copy is None or not torch.equal(copy.weight, fresh.weight.to(copy.weight)):
                return True
    return False


@contextmanager
def fused_attention(model: HookedModel, report: Report) -> Iterator[None]:
    """Within the block the model attends by fused attention; `report` gets what no hook shows."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    wrapped = [block.attn.original_component for block in model.blocks]
    configs = {id(each.config): each.config for each in (wrapped_model(model), *wrapped)}.values()
    before = [config._attn_implementation for config in configs]
    try:
        for layer, (block, component) in enumerate(zip(model.blocks, wrapped, strict=True)):
            listener = _Listener(component, layer, report, _silent(block.attn))
            block.attn.__dict__["forward"] = listener.forward  # not a submodule, and found before the class's own
            component.__dict__[NAME] = listener
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
        for block, component in zip(model.blocks, wrapped, strict=True):
            block.attn.__dict__.pop("forward", None)
            component.__dict__.pop(NAME, None)


@dataclass
class _Listener:
    """One layer's attention: what transformers hands to its attention function is reported."""

    component: Any
    layer: int
    report: Report
    silent: frozenset[str]
    tables: Tables | None = field(default=None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.tables = kwargs.get("position_embeddings")
        try:
            return self.component(*args, **kwargs)
        finally:
            self.tables = None

    def inputs(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        if "query" in self.silent:
            self.report(self.layer, "query", self._before(query))
            self.report(self.layer, "key", self._before(key))
            self.report(self.layer, "value", value)
        self.report(self.layer, "turned_query", query)
        self.report(self.layer, "turned_key", key)
        self.report(self.layer, "scale", torch.tensor([scale], dtype=torch.float64, device="cpu"))

    def output(self, z: Float[Tensor, "1 pos head d_head"], sums: Float[Tensor, "1 head pos"] | None) -> None:
        self.report(self.layer, "log_normaliser", z.new_empty(1, 0) if sums is None else sums)
        if "z" in self.silent:
            self.report(self.layer, "z", z)

    def _before(self, turned: Float[Tensor, "1 pos head d_head"]) -> Float[Tensor, "1 pos head d_head"]:
        """Queries or keys before positions turned them."""
        if self.tables is None:
            return turned
        cos, sin = self.tables
        return halves_turned_back(turned[0], cos[0], sin[0])[None]


def _attend(
    module: Any,
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head pos d_head"],
    value: Float[Tensor, "batch kv_head pos d_head"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "batch pos head d_head"], None]:
    """transformers' attention function of that name."""
    listener, scale = module.__dict__[NAME], query.shape[-1] ** -0.5 if scaling is None else scaling
    listener.inputs(query, key, value, scale)
    key, value = (per_head(each, query.shape[1], axis=1) for each in (key, value))
    if attention_mask is None and not dropout and query.device.type == "cpu" and hasattr(torch.ops.aten, _CPU_KERNEL):
        kernel = getattr(torch.ops.aten, _CPU_KERNEL)  # what the function below calls, less its log-normalisers
        mixed, sums = kernel(query, key, value, 0.0, True, scale=scale)
    else:
        causal, sums = attention_mask is None, None
        mixed = functional.scaled_dot_product_attention(query, key, value, attention_mask, dropout, causal, scale=scale)
    mixed = mixed.transpose(1, 2).contiguous()
    listener.output(mixed, sums)
    return mixed, None


def _silent(attn: Any) -> frozenset[str]:
    """Projections whose hooks do not fire when the wrapped module runs: it has others in their place."""
    inside = {id(module) for module in attn.original_component.modules()}
    places = {"query": "q", "key": "k", "value": "v", "z": "o"}
    return frozenset(key for key, name in places.items() if id(getattr(attn, name, None)) not in inside)


ATTENTION = ("auto", "kept", "recomputed")
COMFORT = 16  # patterns that take less than one part in so many of the memory that is there are kept


class AttentionRoute(str):
    """The name of a route, one of `architecture.ROUTES`, and `why` it was taken."""

    why: str

    def __new__(cls, name: str, why: str) -> AttentionRoute:
        made = super().__new__(cls, name)
        made.why = why
        return made


ASKED_KEPT = AttentionRoute("kept", "asked for")


def choose_route(model: HookedModel, architecture: Architecture, n: int, attention: str = "auto") -> AttentionRoute:
    """One of `architecture.ROUTES` for a prompt of n tokens, and why.

    "kept" keeps the patterns. "recomputed" keeps queries, keys and log-normalisers: in a pass of fused attention
    where the class allows one (`why_not_fused`), else in the class's own pass. Neither hears a hook of somebody else
    inside attention, so there "recomputed" is an InputError. "auto" takes fused attention where the class allows it and
    nobody's hook is inside attention; otherwise it keeps the patterns where that takes less than a sixteenth of the
    memory there is, or where they cannot be recomputed or would not be heard; otherwise it recomputes them.
    """
    check_attention(attention)
    if attention == "kept":
        return _kept(architecture, ASKED_KEPT.why)
    somebody = next(foreign_hooks(model), None)
    if attention == "recomputed":
        _refuse_unheard(somebody)
    elif somebody is not None:
        return _kept(architecture, f"a hook of yours on {somebody} changes or reads what rows made anew would not")
    obstacle = why_not_fused(model, architecture)
    if obstacle is None:
        return AttentionRoute("fused", "fused attention gives the class's own predictions")
    if attention == "recomputed":
        _refuse_unturned(architecture)
        return AttentionRoute("recomputed", f"asked for; not fused: {obstacle}")
    if architecture.rotation == "unknown":
        return _kept(architecture, f"its rows cannot be made anew; not fused: {obstacle}")
    if patterns_fit(model, n, COMFORT):
        return AttentionRoute("kept", f"the patterns fit into memory {COMFORT} times; not fused: {obstacle}")
    return AttentionRoute("recomputed", f"the patterns do not fit into memory {COMFORT} times; not fused: {obstacle}")


def planned_route(model: Any, n: int, attention: str = "auto") -> AttentionRoute:
    """The route that recording n tokens would take now."""
    return choose_route(model, read_architecture(model), n, attention)


def own_route(architecture: Architecture, model: HookedModel, attention: str) -> AttentionRoute:
    """The route within the pass that somebody else makes."""
    if attention == "recomputed":
        _refuse_unheard(next(foreign_hooks(model), None))
        _refuse_unturned(architecture)
    route = AttentionRoute(check_attention(attention, ATTENTION[1:]), "asked for")
    return _kept(architecture, route.why) if route == "kept" else route


def can_keep(architecture: Architecture) -> bool:
    """Whether patterns can be kept: something shows the queries and keys that make them."""
    return not (architecture.delegated and architecture.rotation == "unknown")


def _kept(architecture: Architecture, why: str) -> AttentionRoute:
    """The route that keeps patterns; a ModelError where they cannot be."""
    if not can_keep(architecture):
        raise ModelError(
            f"{architecture.name} leaves attention to transformers' own module, and no hook shows how positions turn "
            "its queries and keys, so kept patterns cannot be held against them; expected record() with "
            "attention='auto' or 'recomputed' and no hook inside attention, where its attention can be fused"
        )
    return AttentionRoute("kept", why)


def check_attention(attention: Any, known: tuple[str, ...] = ATTENTION) -> str:
    if attention not in known:
        raise InputError(
            f"expected one of {', '.join(map(repr, known))}, got attention={one_line(repr(attention), 60)}"
        )
    return attention


def foreign_hooks(model: HookedModel) -> Iterator[str]:
    """Names of what inside the attention blocks has a forward hook that no library has put there."""
    for layer, block in enumerate(model.blocks):
        attn = getattr(block, "attn", None)
        for name, module in () if attn is None else attn.named_modules():
            if hooks_on(module, ours=True):
                yield f"blocks.{layer}.attn.{name}".rstrip(".")


def _refuse_unheard(somebody: str | None) -> None:
    if somebody is not None:
        raise InputError(
            "expected none inside attention, for rows made anew do not hear it, got attention='recomputed' with a "
            f"hook of yours on {somebody}: record with attention='kept', or remove the hook"
        )


def _refuse_unturned(architecture: Architecture) -> None:
    if architecture.rotation == "unknown":
        raise ModelError(
            f"attention='recomputed' was asked of {architecture.name}, whose hooks do not show how positions turn its "
            "queries and keys; expected a model that shows it: record with attention='kept'"
        )


def patterns_fit(model: HookedModel, n: int, times: int = 1) -> bool:
    """Whether there is memory to record n tokens with their patterns, so many times over."""
    return times * sum(record_bytes(size_of(model), n).values()) < available_bytes(device_of(model))
