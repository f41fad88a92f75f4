"""One prompt recorded on every route: how far the measures of rows made anew lie from those of kept patterns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from small_models import tokens_for
from zoo import CELLS, float64_throughout, lacking, zoo

import oversquash_lens as osl
from oversquash_lens.capture.architecture import ROUTES, read_architecture
from oversquash_lens.capture.fused import AttentionRoute, why_not_fused
from oversquash_lens.capture.recorder import Recorder, record_on
from oversquash_lens.capture.subject import Subject
from oversquash_lens.errors import ModelError
from oversquash_lens.paths.kinds import VARIANTS

LENGTH = 12  # more than the window of the windowed ones, and none of them


def tolerance(name: str, kind: str, dtype: torch.dtype) -> float:
    """How far measures may lie apart, relative to their size.

    transformers computes softmax or rotations of float64 models in float32, at least in most of its classes: there
    kept patterns are no more exact than that, and rows made anew in float64 are the better ones.
    """
    if dtype == torch.float32:
        return 1e-4
    return 1e-10 if float64_throughout(name, kind) else 1e-5


@dataclass(frozen=True)
class Difference:
    """One cell of the zoo on one route: the largest relative difference of every measure; `why` if there is none."""

    family: str
    kind: str
    route: str
    why: str = ""
    measures: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        return max(self.measures.values(), default=math.nan)


def on_route(model: Any, tokens: Any, route: str, **how: Any) -> osl.Trace:
    """The trace of one route and no other, whatever `attention="auto"` would have chosen."""
    subject = Subject.of(model)
    recorder = Recorder(subject, how.pop("node_probes", None), 0, **how, route=AttentionRoute(route, "asked for"))
    return record_on(subject, subject.tokenize(tokens), recorder)


def differences(kept: osl.Trace, other: osl.Trace) -> dict[str, float]:
    """Every measure's largest difference, relative to what it is (shares of a flow: to their layer's largest)."""
    found = {}
    for variant in VARIANTS:
        try:
            one, two = (osl.path_bound(trace, variant) for trace in (kept, other))
        except ModelError:  # a mixture of experts has no rigorous bounds
            continue
        found[variant] = _of_logs(one.log_by_layer, two.log_by_layer)
    one, two = (osl.mean_field_sensitivity(trace) for trace in (kept, other))
    found["mean_field"] = max(_of_logs(one.log_by_layer, two.log_by_layer), abs(one.log_constant - two.log_constant))
    one, two = (osl.flow(trace) for trace in (kept, other))
    for name in ("node", "head", "residual", "effective_width"):
        a, b = getattr(one, name), getattr(two, name)
        largest = a.abs().amax(-1, keepdim=True) if a.ndim > 1 else a.abs().amax()
        found[f"flow.{name}"] = ((a - b).abs() / largest.clamp(min=1e-300)).max().item()
    return found


def compare(dtype: torch.dtype, cells: tuple[tuple[str, str], ...] = CELLS) -> Iterator[Difference]:
    """Every cell that the installed versions can make and the package records, on both routes that keep no pattern."""
    for name, kind in cells:
        if lacking(name, kind) is None:
            yield from compared(name, kind, dtype)


def compared(name: str, kind: str, dtype: torch.dtype) -> list[Difference]:
    """Nothing for a model that cannot be recorded at all, or on one route only."""
    model, tokens = zoo(name, kind, dtype=dtype), tokens_for(4, LENGTH)
    architecture = read_architecture(model)
    if architecture.obstacle is not None or (architecture.delegated and architecture.rotation == "unknown"):
        return []
    kept, found = on_route(model, tokens, "kept"), []
    for route in ROUTES[1:]:
        why = why_not_fused(model, architecture) if route == "fused" else None
        if why is None:
            found.append(Difference(name, kind, route, "", differences(kept, on_route(model, tokens, route))))
        else:
            found.append(Difference(name, kind, route, why))
    return found


def table(found: list[Difference]) -> str:
    """One line per cell: the worst measure and its difference, on each route."""
    lines = [f"{'family':16}{'class':12}{'recomputed':>32}{'fused':>32}"]
    for one, two in zip(found[::2], found[1::2], strict=True):
        cells = [f"{each.worst:.1e} {_worst_measure(each)}" if not each.why else "–" for each in (one, two)]
        lines.append(
            f"{one.family:16}{one.kind:12}{cells[0]:>32}{cells[1]:>32}" + (f"  ({two.why})" if two.why else "")
        )
    return "\n".join(lines)


def _of_logs(one: torch.Tensor, two: torch.Tensor) -> float:
    assert torch.equal(one.isinf(), two.isinf())  # no path is gained or lost
    return torch.expm1((one - two)[one.isfinite()].abs()).max().item()


def _worst_measure(difference: Difference) -> str:
    return max(difference.measures, key=difference.measures.get)
