"""Several kinds of path on one trace in one sweep over its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oversquash_lens.capture.trace import Trace, check_trace
from oversquash_lens.errors import InputError, one_line
from oversquash_lens.paths.bounds import PRINTED, VARIANTS, bound_weighing
from oversquash_lens.paths.mean_field import mean_field_weighing
from oversquash_lens.paths.paths import PathProfile
from oversquash_lens.paths.weighing import Weighing, weigh

KINDS = ("mean_field", *VARIANTS)


def profiles(trace: Trace | object, kinds: Any = KINDS, beta: float | str = "measured") -> dict[str, PathProfile]:
    """`path_bound` of several variants, and with "mean_field" `mean_field_sensitivity`, at little more than one's cost.

    The attention of each layer is computed once for all of them, a block of rows at a time: O(layer·pos²) time, and
    memory that does not grow with pos² unless the trace's own attention does. `beta` goes to the printed variants.
    """
    check_trace(trace)
    if isinstance(kinds, str) or not isinstance(kinds, Sequence) or not kinds:
        raise InputError(
            f"expected a list of {', '.join(KINDS)}, got kinds={one_line(repr(kinds), 60)}: give at least one"
        )
    weighings = [path_weighing(trace, kind, beta if kind in PRINTED else "measured") for kind in dict.fromkeys(kinds)]
    return {found.kind: found for found in weigh(weighings)}


def path_weighing(trace: Trace, kind: Any, beta: float | str = "measured") -> Weighing:
    """Edges, node gains and constant of any kind of path."""
    if kind == "mean_field":
        if beta != "measured":
            raise InputError(f"expected no beta, got beta={beta!r} with kind 'mean_field': it uses none")
        return mean_field_weighing(trace)
    if kind not in VARIANTS:
        raise InputError(f"expected one of {', '.join(KINDS)}, got kind {one_line(repr(kind), 60)}")
    return bound_weighing(trace, kind, beta)
