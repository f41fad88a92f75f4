"""On which route attention is recorded: the rule of `attention="auto"`, and what is in the way of the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from oversquash_lens.capture.architecture import Architecture, read_architecture
from oversquash_lens.capture.fused import why_not_fused
from oversquash_lens.capture.hooked_model import HookedModel
from oversquash_lens.capture.passes import hooks_on
from oversquash_lens.capture.size import device_of, record_bytes, size_of
from oversquash_lens.errors import InputError, ModelError, one_line
from oversquash_lens.memory import available_bytes

ATTENTION = ("auto", "kept", "recomputed")
COMFORT = 16  # patterns that take less than one part in so many of the memory that is there are kept


class Route(str):
    """The name of a route, one of `architecture.ROUTES`, and `why` it was taken."""

    why: str

    def __new__(cls, name: str, why: str) -> Route:
        made = super().__new__(cls, name)
        made.why = why
        return made


ASKED_KEPT = Route("kept", "asked for")


def choose_route(model: HookedModel, architecture: Architecture, n: int, attention: str = "auto") -> Route:
    """One of `architecture.ROUTES` for a prompt of n tokens, and why.

    "kept" keeps the patterns. "recomputed" keeps queries, keys and log-normalisers: in a pass of fused attention
    where the class allows one (`why_not_fused`), else in the class's own pass. Neither hears a hook of somebody else
    inside attention, so there "recomputed" is an InputError. "auto" takes fused attention where the class allows it and
    nobody's hook is inside attention; otherwise it keeps the patterns where that takes less than a sixteenth of the
    memory there is, or where they cannot be recomputed or would not be heard; otherwise it recomputes them.
    """
    check_attention(attention)
    if attention == "kept":
        return ASKED_KEPT
    somebody = next(foreign_hooks(model), None)
    if attention == "recomputed":
        _refuse_recomputed(architecture, somebody)
    elif somebody is not None:
        return Route("kept", f"a hook of yours on {somebody} changes or reads what rows made anew would not")
    obstacle = why_not_fused(model, architecture)
    if obstacle is None:
        return Route("fused", "fused attention gives the class's own predictions")
    if attention == "recomputed":
        return Route("recomputed", f"asked for; not fused: {obstacle}")
    if architecture.rotation == "unknown":
        return Route("kept", f"its rows cannot be made anew; not fused: {obstacle}")
    if patterns_fit(model, n, COMFORT):
        return Route("kept", f"the patterns fit into memory {COMFORT} times; not fused: {obstacle}")
    return Route("recomputed", f"the patterns do not fit into memory {COMFORT} times; not fused: {obstacle}")


def planned_route(model: Any, n: int, attention: str = "auto") -> Route:
    """The route that recording n tokens would take now."""
    return choose_route(model, read_architecture(model), n, attention)


def own_route(architecture: Architecture, model: HookedModel, attention: str) -> Route:
    """The route within the pass that somebody else makes."""
    if attention == "recomputed":
        _refuse_recomputed(architecture, next(foreign_hooks(model), None))
    return Route(check_attention(attention, ATTENTION[1:]), "asked for")


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


def _refuse_recomputed(architecture: Architecture, somebody: str | None) -> None:
    if somebody is not None:
        raise InputError(
            "expected none inside attention, for rows made anew do not hear it, got attention='recomputed' with a "
            f"hook of yours on {somebody}: record with attention='kept', or remove the hook"
        )
    if architecture.rotation == "unknown":
        raise ModelError(
            f"attention='recomputed' was asked of {architecture.name}, whose hooks do not show how positions turn its "
            "queries and keys; expected a model that shows it: record with attention='kept'"
        )


def patterns_fit(model: HookedModel, n: int, times: int = 1) -> bool:
    """Whether there is memory to record n tokens with their patterns, so many times over."""
    return times * sum(record_bytes(size_of(model), n).values()) < available_bytes(device_of(model))
