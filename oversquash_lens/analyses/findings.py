"""Everything that a report says of one prompt, from one recording: where its sensitivity lies, and how sure that is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.analyses.answer import DRAWS, AnswerFindings, answer_of, null_of, replaced_unasked
from oversquash_lens.analyses.audit import (
    Audit,
    Truths,
    audit_trace,
    check_audit,
    check_effort,
    recorded_truths,
)
from oversquash_lens.analyses.compare import Comparison, compare
from oversquash_lens.capture.readings import predictions
from oversquash_lens.capture.recorder import NODE_PROBES
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import Prompt
from oversquash_lens.capture.trace import Trace
from oversquash_lens.jacobian.measured import MEMORY, MeasuredSensitivity, measured_sensitivity
from oversquash_lens.jacobian.routes import MOST_FROZEN
from oversquash_lens.jacobian.targets import TOP, target_of
from oversquash_lens.numerics import effective_number, json_numbers
from oversquash_lens.paths.flow import Flow, flows
from oversquash_lens.paths.heaviest import HeavyEdge, HeavyPath, heaviest_edges, heaviest_paths
from oversquash_lens.paths.profiles import mean_field_sensitivity
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.paths.squashing import Squashing, squashing
from oversquash_lens.results import About, Result

EDGES, PATHS = 12, 8  # how many of the heaviest are named
LARGEST, DISTANT, MOST_SQUASHED = "largest", "distant", "most squashed"


@dataclass(frozen=True, repr=False)
class Findings(Result):
    """One prompt: what its answer hangs on, measured; the audit; and the forward-only estimate of the rest.

    `squashing`, `routes`, `edges` and `paths` are estimates. `routes` are flows from single tokens, by why they were
    chosen: the one with the largest share, that of the prompt's first half (`DISTANT`), and of the others the most
    squashed, which loses most against uniform attention.
    """

    answer: AnswerFindings
    audit: Audit
    squashing: Squashing
    routes: Mapping[str, Flow]
    edges: tuple[HeavyEdge, ...]
    paths: tuple[HeavyPath, ...]
    assumptions: tuple[Assumption, ...]

    _ranked_by = "target_share"

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.audit.tokens

    @property
    def about(self) -> About:
        return self.audit.about

    @property
    def effective_tokens(self) -> float:
        """Effective number of tokens that all outputs are sensitive to, exp of the measured share's entropy: 1 … n."""
        return effective_number(self.audit.truth.share.double()).item()

    @property
    def sentence(self) -> str:
        """What was found, in a few sentences."""
        measured = (
            f"All outputs are sensitive to {self.effective_tokens:.1f} of {len(self.tokens)} tokens (effective number)."
        )
        return f"{self.answer.sentence} {measured} {self.audit.sentence}"

    def __str__(self) -> str:
        return f"{self.about}, {len(self.tokens)} tokens\n{self.sentence}"

    def _title(self) -> str:
        return f"Findings for {len(self.tokens)} tokens, {self.about}: {self.answer.sentence}"

    def _table(self) -> Mapping[str, Sequence[Any]]:
        replaced = self.answer.replaced
        return {
            "position": range(len(self.tokens)),
            "token": self.tokens,
            "target_share": self.answer.share.tolist(),
            **({} if replaced is None else {"replaced": replaced.relative.tolist()}),
            "measured_share": self.audit.truth.share.tolist(),
            "estimated_share": self.squashing.share.tolist(),
            "uniform_share": self.squashing.null_share.tolist(),
        }

    def to_dict(self) -> dict:
        return {
            "kind": "findings",
            "about": self.about.to_dict(),
            "tokens": list(self.tokens),
            "sentence": self.sentence,
            "answer": self.answer.to_dict(),
            "effective_tokens": self.effective_tokens,
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
    beta: float | str = "measured",
    target: Any = None,
    draws: int | None = None,
    chat: bool = False,
    bos: bool | None = None,
    seed: int = 0,
    verify: bool = False,
    node_probes: int | None = NODE_PROBES,
    attention: str = "auto",
    memory: int = MEMORY,
    progress: bool = False,
) -> Findings:
    """Record a prompt once, measure what its answer hangs on and all outputs, and find out all that a report says.

    A prompt of more than `MOST_FROZEN` tokens is not measured again with attention or norms frozen (see `audit`), and
    the paper's assumptions, which that is for, are not imposed on the estimate either.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks of your own stay on.
        prompt: a text, or token ids [pos] or [1, pos].
        probes: backward products, None for the exact sensitivity.
        beta: what the printed bounds divide by, "measured" or one number.
        target: a number of the prediction, as `measured_sensitivity` takes it; None for the likeliest token's logit.
        draws: replacements of each token, 0 for none; None for two up to 150 tokens, where single positions can be
            recomputed alone (see `substitution`).
        chat: as `record` takes it, and so are bos, seed, verify, node_probes and attention.
        memory: bytes for a batch of backward products.
        progress: show a bar.

    Returns:
        `Findings`: the answer, the audit, the squashing, routes of a few tokens, heaviest edges and paths, and what
        each of the paper's assumptions costs.

    Raises:
        InputError: what cannot be used, or does not fit into memory.
        ModelError: a model of which the truth cannot be measured.
    """
    subject = Subject.of(model)
    check_effort(probes, node_probes, draws)
    tokenized = subject.tokenize(prompt, chat=chat, bos=bos)
    recording = {"node_probes": node_probes, "seed": seed, "verify": verify, "attention": attention}
    effort: dict[str, Any] = {"probes": probes, "seed": seed, "memory": memory, "progress": progress}
    check_audit(subject, len(tokenized.ids), probes)
    _, logits = predictions(subject, tuple(tokenized.ids.tolist()))
    chosen_target = target_of(subject.model, TOP if target is None else target, logits)  # refused before all the rest
    trace, truths = recorded_truths(subject, tokenized, recording, effort)
    norms_frozen = None
    if len(tokenized.ids) <= MOST_FROZEN:
        with warnings.catch_warnings():
            # TransformerLens says that an edited divisor costs the last digits; ours is detached, its value stays.
            warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")
            norms_frozen = measured_sensitivity(subject.model, tokenized.ids, freeze=("norms",), **effort)
    replaced = replaced_unasked(subject, tokenized.ids, draws, DRAWS, seed, progress, chosen_target)
    audited = audit_trace(trace, truths, beta, replaced)
    squashed = squashing(trace, profile=audited.mean_field)
    chosen = chosen_sources(squashed)
    routes = flows(trace, tuple(chosen.values()), profile=audited.mean_field)
    null = null_of(squashed.null)
    answer = answer_of(subject, tokenized, logits, chosen_target, null, replaced, memory=memory, progress=progress)
    return Findings(
        answer,
        audited,
        squashed,
        dict(zip(chosen, routes, strict=True)),
        heaviest_edges(squashed.flow, EDGES),
        heaviest_paths(squashed.flow, PATHS),
        assumptions(trace, truths, norms_frozen, audited.mean_field) if trace.n_positions <= MOST_FROZEN else (),
    )


def chosen_sources(squashed: Squashing) -> dict[str, int]:
    """Tokens whose routes say most, each but once, among those with any share at all."""
    share = squashed.share
    half = len(share) // 2
    largest, losing = share.argsort(descending=True, stable=True), (share - squashed.null_share).argsort(stable=True)
    orders = {LARGEST: largest, DISTANT: largest[largest < half], MOST_SQUASHED: losing}
    chosen: dict[str, int] = {}
    for why, order in orders.items():
        free = [i for i in order.tolist() if share[i] > 0 and i not in chosen.values()]
        if why == MOST_SQUASHED:
            free = [i for i in free if share[i] < squashed.null_share[i]]
        if free:
            chosen[why] = free[0]
    return chosen


@dataclass(frozen=True)
class Assumption:
    """One assumption: what it claims, what was found instead, and what imposing it does to the numbers.

    `imposed` holds the mean-field estimate that makes it against the truth, `estimate` the one that does not;
    `frozen` the truth with it imposed against the real truth, where that was measured.
    """

    name: str
    claim: str
    found: str
    estimate: Comparison
    imposed: Comparison
    frozen: Comparison | None = None

    @property
    def effect(self) -> str:
        """What it did, in a sentence or two."""
        said = []
        if self.frozen is not None:
            found = self.frozen
            typical, low, high = map(_times, (found.median_log10_ratio, found.min_log10_ratio, found.max_log10_ratio))
            said.append(
                f"Imposed on the model itself, it makes the measured sensitivity {typical} times what it is ({low} to "
                f"{high} over the tokens; rank correlation {_two(found.spearman)} with the real one)."
            )
        said.append(
            f"Imposed on the estimate, it takes the rank correlation with the truth from "
            f"{_two(self.estimate.spearman)} to {_two(self.imposed.spearman)}, and the typical size from "
            f"{_times(self.estimate.median_log10_ratio)} to {_times(self.imposed.median_log10_ratio)} times the truth."
        )
        return " ".join(said)

    def to_dict(self) -> dict:
        comparisons = ("estimate", "imposed", "frozen")
        numbers = {name: _numbers(getattr(self, name)) for name in comparisons}
        return {"name": self.name, "claim": self.claim, "found": self.found, "effect": self.effect, **numbers}


def assumptions(
    trace: Trace,
    truths: Truths,
    norms_frozen: MeasuredSensitivity | None = None,
    estimate: PathProfile | None = None,
) -> tuple[Assumption, ...]:
    """Each assumption of Theorem 5.1 on this trace, beside the truth; `norms_frozen` as `measured_sensitivity`
    gives it with freeze=("norms",); `estimate`: the trace's mean-field estimate, where it is known already. Four more
    of these, no pass of the model.
    """
    truth = truths.frobenius
    real = compare(estimate or mean_field_sensitivity(trace), truth)

    def imposed(**gains: Any) -> Comparison:
        return compare(mean_field_sensitivity(_with(trace, **gains)), truth)

    gains, weights = trace.gains, trace.gains.weights
    unchanged = 1 / trace.about.n_heads  # what a head passes on if its OV is a share of the identity
    mean = torch.full_like(weights.ov_gram, unchanged**2), torch.full_like(weights.ov_trace, unchanged)
    return (
        Assumption(
            "norms",
            "A norm divides by one constant per layer, the same at every position and whatever comes in.",
            f"The divisor of {_widest('attention’s norm', gains.attention_scale)}.",
            real,
            imposed(attention_scale=_alike(gains.attention_scale)),
            None if norms_frozen is None else compare(norms_frozen, truth),
        ),
        Assumption(
            "attention",
            "Attention weights do not depend on the input.",
            "They do: every query and key is a function of the tokens before it.",
            real,
            imposed(key=torch.zeros_like(gains.key), key_pull=torch.zeros_like(gains.key_pull)),
            None if truths.frozen_frobenius is None else compare(truths.frozen_frobenius, truth),
        ),
        Assumption(
            "heads",
            "Heads pass on what they read unchanged and weigh alike; their value and output matrices drop out.",
            f"The largest gain ‖OV‖₂ of a head ranges from {weights.ov_norm.min().item():.3g} to "
            f"{weights.ov_norm.max().item():.3g} over {weights.ov_norm.numel()} heads.",
            real,
            imposed(weights=replace(weights, ov_gram=mean[0], ov_trace=mean[1])),
        ),
        Assumption(
            "mlp",
            "An MLP multiplies every position by the same constant.",
            f"The root mean square gain of the {_widest('MLP with its residual', gains.node_gain.sqrt())}.",
            real,
            imposed(node_gain=_alike(gains.node_gain)),
        ),
    )


def _with(trace: Trace, **gains: Any) -> Trace:
    return replace(trace, gains=replace(trace.gains, **gains))


def _alike(values: Float[Tensor, "layer pos"]) -> Float[Tensor, "layer pos"]:
    """Each layer's geometric mean at all of its positions, as the printed bounds take it."""
    return values.log().mean(-1, keepdim=True).exp().expand_as(values)


def _widest(what: str, values: Float[Tensor, "layer pos"]) -> str:
    """The layer in which a gain differs most between positions, in words."""
    spread = values.amax(-1) / values.amin(-1)
    layer = int(spread.argmax())
    low, high = values[layer].min().item(), values[layer].max().item()
    return (
        f"{what} ranges from {low:.3g} to {high:.3g} over the positions of layer {layer}, "
        f"{spread[layer].item():.3g} times; in the median layer {spread.median().item():.3g} times"
    )


def _times(log10_ratio: float) -> str:
    return "–" if math.isnan(log10_ratio) else f"{10**log10_ratio:.2g}"


def _two(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _numbers(found: Comparison | None) -> dict | None:
    return None if found is None else {name: json_numbers(value) for name, value in asdict(found).items()}
