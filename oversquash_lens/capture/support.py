"""Which measures hold on which architecture: supported, approximate (with what is left out), or refused (why)."""

from __future__ import annotations

from typing import NamedTuple

from oversquash_lens.capture.architecture import Architecture
from oversquash_lens.errors import ModelError

STATES = ("supported", "approximate", "refused")
MEASURES = ("printed bounds", "calibrated", "calibrated_full", "mean_field", "truth", "attention frozen")
RECORDED = MEASURES[:4]  # what is made of a recording
FEW = 8  # tokens of the proof: what only longer prompts use is not seen by it


class Verdict(NamedTuple):
    """`state` is one of `STATES`; `why` says what is left out, unproven or in the way, empty where nothing is."""

    state: str
    why: str


def architecture_support(
    architecture: Architecture, *, unrecordable: str = "", patterns_used: bool = True, unproven: str = ""
) -> dict[str, Verdict]:
    """Verdicts by measure; `unrecordable`, `patterns_used` and `unproven` are what passes have shown."""
    experts = "a mixture of experts has no rigorous bound on what its router's choice does"
    hidden = "attention is computed out of the hooks' sight, so its weights cannot be held fixed"
    printed = [text for text, applies in _unprinted(architecture).items() if applies]
    left_out = [text for text, applies in _left_out(architecture).items() if applies]
    bound = _refused_if(architecture.experts, experts)
    found = {
        "printed bounds": _approximate(printed),
        "calibrated": bound,
        "calibrated_full": bound,
        "mean_field": _approximate(left_out),
        "truth": Verdict("supported", "; ".join(filter(None, (unproven, _by_length(architecture))))),
        "attention frozen": _refused_if(architecture.delegated or not patterns_used, hidden),
    }
    if architecture.obstacle is not None:
        unrecordable = f"{architecture.name} has {architecture.obstacle}"
    return found | dict.fromkeys(RECORDED, Verdict("refused", unrecordable)) if unrecordable else found


def refuse_unsupported(supported: dict[str, Verdict], measure: str, model: str) -> None:
    """Raise the ModelError that says why, where a measure is refused."""
    verdict = supported[measure]
    if verdict.state == "refused":
        others = ", ".join(name for name, other in supported.items() if other.state != "refused")
        raise ModelError(
            f"{measure} was asked of {model}: refused, because {verdict.why}; expected a model without that: ask for "
            f"one of {others} instead"
        )


def _by_length(architecture: Architecture) -> str:
    windows = sorted({window for window in architecture.windows if window is not None and window > FEW})
    return f"windows of {', '.join(map(str, windows))} are longer than the {FEW} tokens compared" if windows else ""


def _unprinted(architecture: Architecture) -> dict[str, bool]:
    """Where a model leaves the equations that the paper's theorem speaks of."""
    return {
        "attention and MLP work side by side, where the paper has one after the other": architecture.parallel,
        "norms of what attention and MLP write are not in the paper's model": architecture.post_norms,
        "a router has no Lipschitz constant, so only shares have a meaning": architecture.experts,
        "rows of attention sum to less than 1, the rest goes to a sink": architecture.sinks,
    }


def _left_out(architecture: Architecture) -> dict[str, bool]:
    """What the mean-field edges leave out beyond what they always do."""
    return {
        "the cross term of attention and MLP is left out": architecture.parallel,
        "post-norms are taken without their projection": architecture.post_norms,
        "norms of queries and keys are taken without their projection": architecture.qk_norm,
        "the slope of the scores' soft cap is taken as 1": architecture.soft_cap is not None,
    }


def _approximate(reasons: list[str]) -> Verdict:
    return Verdict("approximate", "; ".join(reasons)) if reasons else Verdict("supported", "")


def _refused_if(applies: bool, why: str) -> Verdict:
    return Verdict("refused", why) if applies else Verdict("supported", "")
