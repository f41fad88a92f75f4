"""Everything that a report says of one prompt, from one recording: how much is heard, where it is lost, how sure."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oversquash_lens.analyses.assumptions import Assumption, assumptions
from oversquash_lens.analyses.audit import Audit, Truths, check_effort, held_against, measure_truths
from oversquash_lens.capture.about import About
from oversquash_lens.capture.recorder import NODE_PROBES, record_tokens
from oversquash_lens.capture.tokens import Prompt, tokenize
from oversquash_lens.capture.trace import Trace
from oversquash_lens.jacobian.costs import MOST_FROZEN, check_audit
from oversquash_lens.jacobian.measured import MEMORY, MeasuredSensitivity, measured_sensitivity
from oversquash_lens.numerics import effective_number
from oversquash_lens.paths.flow import Flow, flows
from oversquash_lens.paths.heaviest import HeavyEdge, HeavyPath, heaviest_edges, heaviest_paths
from oversquash_lens.paths.squashing import Squashing, squashing

EDGES, PATHS = 12, 8  # how many of the heaviest are named
MOST_HEARD, FROM_AFAR, MOST_SQUASHED = "most heard", "from afar", "most squashed"


@dataclass(frozen=True)
class Findings:
    """One prompt: the audit, the squashing, a few tokens' routes, the heaviest edges and paths, the assumptions.

    `routes` are flows from single tokens, by why they were chosen: the most heard, the most heard of the prompt's
    first half, and of the others the most squashed, which loses most against even attention.
    """

    audit: Audit
    squashing: Squashing
    routes: Mapping[str, Flow]
    edges: tuple[HeavyEdge, ...]
    paths: tuple[HeavyPath, ...]
    assumptions: tuple[Assumption, ...]

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.audit.tokens

    @property
    def about(self) -> About:
        return self.audit.about

    @property
    def heard(self) -> float:
        """Effective number of tokens that the last one hears, from the measured truth: 1 … n."""
        return effective_number(self.audit.truth.share.double()).item()

    @property
    def sentence(self) -> str:
        return f"{self.squashing.sentence} Measured, it hears {self.heard:.1f}. {self.audit.sentence}"

    def to_dict(self) -> dict:
        return {
            "kind": "findings",
            "about": self.about.to_dict(),
            "tokens": list(self.tokens),
            "sentence": self.sentence,
            "heard": self.heard,
            "audit": self.audit.to_dict(),
            "squashing": self.squashing.to_dict(),
            "routes": {why: route.to_dict() for why, route in self.routes.items()},
            "edges": [edge.to_dict() for edge in self.edges],
            "paths": [path.to_dict() for path in self.paths],
            "assumptions": [each.to_dict() for each in self.assumptions],
        }


def findings(
    model: Any,
    prompt: Prompt,
    *,
    probes: int | None = None,
    chat: bool = False,
    bos: bool | None = None,
    beta: float | str = "measured",
    node_probes: int | None = NODE_PROBES,
    seed: int = 0,
    verify: bool = False,
    attention: str = "auto",
    memory: int = MEMORY,
    progress: bool = False,
) -> Findings:
    """Record a prompt once, measure the truth, and find out all that a report says; options as `audit`'s.

    A prompt of more than `MOST_FROZEN` tokens is not measured again with attention or norms frozen (see `audit`), and
    the paper's assumptions, which that is for, are not imposed on the estimate either.
    """
    check_effort(probes, node_probes)
    tokenized = tokenize(model, prompt, chat=chat, bos=bos)
    check_audit(model, len(tokenized.ids), probes)
    trace = record_tokens(model, tokenized, node_probes=node_probes, seed=seed, verify=verify, attention=attention)
    effort = {"probes": probes, "seed": seed, "memory": memory, "progress": progress}
    frozen = len(tokenized.ids) <= MOST_FROZEN
    truths = measure_truths(model, tokenized, trace.about, frozen=frozen, **effort)
    if not frozen:
        return find(trace, truths, beta=beta)
    with warnings.catch_warnings():
        # TransformerLens says that an edited divisor costs the last digits; ours is detached, its value stays.
        warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")
        norms_frozen = measured_sensitivity(model, tokenized.ids, freeze=("norms",), **effort)
    return find(trace, truths, norms_frozen, beta)


def find(
    trace: Trace, truths: Truths, norms_frozen: MeasuredSensitivity | None = None, beta: float | str = "measured"
) -> Findings:
    """The findings of a recorded prompt whose truth is measured already: no pass of the model."""
    held = held_against(truths, trace, beta)
    squashed = squashing(trace, profile=held.mean_field)
    chosen = chosen_sources(squashed)
    routes = flows(trace, tuple(chosen.values()), profile=held.mean_field)
    return Findings(
        held,
        squashed,
        dict(zip(chosen, routes, strict=True)),
        heaviest_edges(squashed.flow, EDGES),
        heaviest_paths(squashed.flow, PATHS),
        assumptions(trace, truths, norms_frozen, held.mean_field) if trace.n_positions <= MOST_FROZEN else (),
    )


def chosen_sources(squashed: Squashing) -> dict[str, int]:
    """Tokens whose routes tell most, each but once, among those that are heard at all."""
    share = squashed.share
    half = len(share) // 2
    loudest, losing = share.argsort(descending=True, stable=True), (share - squashed.null_share).argsort(stable=True)
    orders = {MOST_HEARD: loudest, FROM_AFAR: loudest[loudest < half], MOST_SQUASHED: losing}
    chosen: dict[str, int] = {}
    for why, order in orders.items():
        free = [i for i in order.tolist() if share[i] > 0 and i not in chosen.values()]
        if why == MOST_SQUASHED:
            free = [i for i in free if share[i] < squashed.null_share[i]]
        if free:
            chosen[why] = free[0]
    return chosen
