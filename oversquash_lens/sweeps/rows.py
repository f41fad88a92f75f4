"""What a sweep finds out of one prompt: the table of measures, and the columns that each of them fills."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.trace import Trace
from oversquash_lens.errors import InputError, one_line, one_of
from oversquash_lens.jacobian.measured import measured_sensitivity
from oversquash_lens.numerics import effective_number
from oversquash_lens.paths.flow import Flow, flow
from oversquash_lens.paths.kinds import VARIANTS
from oversquash_lens.paths.profiles import profiles
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.paths.squashing import squashing

Values = dict[str, Any]
NUMBER, COUNT, ROW, WORD, IDS, WORDS = "number", "count", "row", "word", "ids", "words"  # types of columns

# Every row has these, whatever is measured.
ALWAYS = {
    "index": COUNT,  # the prompt's place among all, from 0
    "name": WORD,
    "status": WORD,  # "done" or "refused"
    "reason": WORD,  # why it was refused
    "text": WORD,
    "token_ids": IDS,
    "tokens": WORDS,
    "n_tokens": COUNT,
    "seconds": NUMBER,  # recording and measuring; of a batch, by its tokens
}
# What is said of any distribution of shares over positions.
SUMMARY = {
    "heard": NUMBER,  # effective number of positions: exp of the share's entropy, 1 … n
    "first": NUMBER,  # share of the first token
    "last": NUMBER,  # … of the last one itself
    "first_third": NUMBER,  # shares of the three thirds of the prompt; they sum to 1
    "middle_third": NUMBER,
    "last_third": NUMBER,
}
PROFILE = {
    "share": ROW,  # per position, sums to 1
    "log_value": ROW,  # natural log of the sensitivity per position; null where the constant is unspecified
    "heard_by_layer": ROW,  # effective number of positions that are heard from each layer on
    **SUMMARY,
}
FLOW = {
    "width": ROW,  # effective width per layer: entering 0 … leaving the last
    "narrowest": COUNT,  # the layer on entering which it is least
    "narrowest_width": NUMBER,
    "steepest": COUNT,  # the layer across which it falls by the largest factor
    "residual": ROW,  # per layer, the share of the paths that stays in the residual stream
}
SQUASHING = {
    "heard": NUMBER,
    "null_heard": NUMBER,  # the same with even attention
    "index": NUMBER,  # 0 as with even attention, 1 if one token alone is heard
    "relative_width": ROW,  # effective width over that of even attention, per layer
    "narrowest": COUNT,
}
TRUTH = {"share": ROW, "log_value": ROW, "standard_error": ROW, **SUMMARY}


@dataclass(frozen=True)
class Effort:
    """What is measured of each prompt, and how; all of it belongs to a sweep's identity."""

    measures: tuple[str, ...]
    chat: bool = False
    bos: bool | None = None
    node_probes: int | None = 2
    probes: int | None = 16
    seed: int = 0
    verify: bool = False
    attention: str = "auto"


@dataclass(frozen=True)
class Measured:
    """One recorded prompt, its profiles, and the model for measures that run it again."""

    subject: Subject
    trace: Trace
    profiles: Mapping[str, PathProfile]
    effort: Effort


@dataclass(frozen=True)
class Measure:
    """One name that a sweep takes: what it means, which columns it fills (behind its name), how it is supported.

    `definition` counts up when the same prompt gives other numbers than before: rows of two are never mixed.
    """

    meaning: str
    columns: Mapping[str, str]
    values: Callable[[Measured], Values]
    support: str
    profile: str | None = None
    definition: int = 1


def profile_values(profile: PathProfile) -> Values:
    logs = profile.log_values
    share = profile.share
    return {
        "share": share.tolist(),
        "log_value": None if logs.isnan().any() else logs.tolist(),
        "heard_by_layer": effective_number(profile.share_by_layer).tolist(),
        **summary(share),
    }


def summary(share: Float[Tensor, " pos"]) -> Values:
    """The columns of SUMMARY of shares that sum to 1."""
    n = len(share)
    one, two = round(n / 3), round(2 * n / 3)
    return {
        "heard": effective_number(share).item(),
        "first": share[0].item(),
        "last": share[-1].item(),
        "first_third": share[:one].sum().item(),
        "middle_third": share[one:two].sum().item(),
        "last_third": share[two:].sum().item(),
    }


def flow_values(measured: Measured) -> Values:
    found: Flow = flow(measured.trace)
    width = found.effective_width
    narrowest = int(width[:-1].argmin())
    return {
        "width": width.tolist(),
        "narrowest": narrowest,
        "narrowest_width": width[narrowest].item(),
        "steepest": int((width[:-1] / width[1:]).argmax()),
        "residual": found.residual.tolist(),
    }


def squashing_values(measured: Measured) -> Values:
    found = squashing(measured.trace)
    numbers = {name: getattr(found, name) for name in ("index", "narrowest")}
    numbers |= {"heard": found.effective_tokens, "null_heard": found.null_effective_tokens}
    return numbers | {"relative_width": found.relative_width.tolist()}


def truth_values(measured: Measured) -> Values:
    effort, trace = measured.effort, measured.trace
    found = measured_sensitivity(measured.subject.model, trace.token_ids, probes=effort.probes, seed=effort.seed)
    share = found.values / found.values.sum()
    return {
        "share": share.tolist(),
        "log_value": found.values.log().tolist(),
        "standard_error": found.standard_error.tolist(),
        **summary(share.double()),
    }


def _profiled(kind: str, meaning: str, support: str = "printed bounds") -> Measure:
    return Measure(meaning, PROFILE, lambda measured: profile_values(measured.profiles[kind]), support, kind)


MEASURES: dict[str, Measure] = {
    "mean_field": _profiled("mean_field", "the mean-field estimate of the sensitivity", "mean_field"),
    **{name: _profiled(name, f"the bound, variant {name}") for name in VARIANTS if not name.startswith("calibrated")},
    **{name: _profiled(name, f"the bound, variant {name}", name) for name in VARIANTS if name.startswith("calibrated")},
    "flow": Measure("where the mean-field paths run: effective width by layer", FLOW, flow_values, "mean_field"),
    "squashing": Measure("the same against even attention", SQUASHING, squashing_values, "mean_field"),
    "truth": Measure("the measured sensitivity, from backward probes", TRUTH, truth_values, "truth"),
}


def checked_measures(measures: Any) -> tuple[str, ...]:
    """Names of MEASURES, each once, in the table's order: their order does not make another run."""
    names = [measures] if isinstance(measures, str) else measures
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"expected names out of {', '.join(MEASURES)}, got measures={one_line(repr(measures), 60)}: give a list "
            "of some of them"
        )
    for name in names:
        one_of("measure", name, MEASURES)
    return tuple(name for name in MEASURES if name in names)


def columns(measures: Sequence[str]) -> dict[str, str]:
    """Name and type of every column of the rows."""
    found = dict(ALWAYS)
    for name in measures:
        found |= {f"{name}_{column}": kind for column, kind in MEASURES[name].columns.items()}
    return found


def measured_values(subject: Subject, trace: Trace, effort: Effort) -> Values:
    """The measures' columns of one recorded prompt."""
    kinds = [MEASURES[name].profile for name in effort.measures if MEASURES[name].profile]
    measured = Measured(subject, trace, profiles(trace, kinds) if kinds else {}, effort)
    found: Values = {}
    for name in effort.measures:
        values = MEASURES[name].values(measured)
        found |= {f"{name}_{column}": value for column, value in values.items()}
    return found
