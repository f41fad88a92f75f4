"""Findings made by hand, for tests of pages: no model, no forward pass, numbers that one can recompute."""

from __future__ import annotations

from dataclasses import replace

import torch
from small_results import TOKENS, audit_result, flow_result, measured_flow_result, substitution_result, truth

from oversquash_lens.analyses.answer import AnswerFindings, null_of
from oversquash_lens.analyses.compare import Comparison
from oversquash_lens.analyses.findings import DISTANT, LARGEST, MOST_SQUASHED, Assumption, Findings
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.heaviest import heaviest_edges, heaviest_paths
from oversquash_lens.paths.squashing import Squashing
from oversquash_lens.results import About

REAL = Comparison(0.93, -0.09, -0.55, 0.22)
IMPOSED = Comparison(0.41, 0.5, -1.0, 2.0)
FROZEN = Comparison(0.875, -1.0, -2.0, 1.0)


def findings_result(
    tokens: tuple[str, ...] = TOKENS,
    *,
    model: str = "a model made by hand",
    n_layers: int = 3,
    exact: bool = True,
    origin: About | None = None,
) -> Findings:
    audit = audit_result(tokens, model=model, n_layers=n_layers, exact=exact)
    real, null = flow_result(tokens, n_layers), flow_result(tokens, n_layers, seed=5)
    sources = dict(zip((LARGEST, DISTANT, MOST_SQUASHED), range(min(3, len(tokens))), strict=False))
    found = Findings(
        answer=answer_result(tokens, n_layers, null),
        audit=audit,
        squashing=Squashing(real, null, audit.mean_field.share, _share(null)),
        routes={why: flow_result(tokens, n_layers, source=source) for why, source in sources.items()},
        edges=heaviest_edges(real, 5),
        paths=heaviest_paths(real, 3),
        assumptions=(
            Assumption("attention", "Attention stands still.", "It moves.", REAL, IMPOSED, FROZEN),
            Assumption("heads", "Heads are alike.", "They are not.", REAL, IMPOSED),
        ),
    )
    return found if origin is None else with_origin(found, origin)


def answer_result(tokens: tuple[str, ...], n_layers: int, null: Flow, replaced: bool = True) -> AnswerFindings:
    predicted = ((" red", 0.5), (tokens[0], 0.25))
    sensitivity = replace(truth(tokens, seed=3), target="logit of ' red'")
    flow = measured_flow_result(tokens, n_layers, source=slice(0, min(2, len(tokens))))
    substituted = substitution_result(tokens, n_layers=n_layers) if replaced else None
    return AnswerFindings(
        predicted, sensitivity, flow, *null_of(null), substituted, "" if replaced else "it was not asked for"
    )


def with_origin(found: Findings, origin: About) -> Findings:
    """The same findings, as if of another model."""
    squashing = replace(found.squashing, flow=replace(found.squashing.flow, about=origin))
    return replace(found, audit=replace(found.audit, about=origin), squashing=squashing)


def _share(flow: Flow) -> torch.Tensor:
    return (0.5 * flow.log_above[0]).softmax(-1)
