"""Which measures hold on which architecture: supported, approximate (with what is left out), or refused (why)."""

from __future__ import annotations

from typing import Any, NamedTuple

from oversquash_lens.capture.architecture import Architecture, read_architecture
from oversquash_lens.errors import ModelError

STATES = ("supported", "approximate", "refused")
MEASURES = ("printed bounds", "calibrated", "calibrated_full", "mean_field", "truth", "attention frozen")


class Verdict(NamedTuple):
    """`state` is one of `STATES`; `why` says what is left out or in the way, and is empty where nothing is."""

    state: str
    why: str


def support(model: Any) -> dict[str, Verdict]:
    """What may be said of a HookedTransformer or TransformerBridge, measure by measure (keys: `MEASURES`).

    Read from the model's structure; no pass is made. Raises ModelError for a model that cannot be recorded at all,
    and so does a refused measure when it is asked for.
    """
    return architecture_support(read_architecture(model))


def architecture_support(architecture: Architecture) -> dict[str, Verdict]:
    experts = "a mixture of experts has no rigorous bound on what its router's choice does"
    frozen = "attention is computed out of the hooks' sight, so its weights cannot be held fixed"
    printed = [text for text, applies in _unprinted(architecture).items() if applies]
    left_out = [text for text, applies in _left_out(architecture).items() if applies]
    bound = _refused_if(architecture.experts, experts)
    return {
        "printed bounds": _approximate(printed),
        "calibrated": bound,
        "calibrated_full": bound,
        "mean_field": _approximate(left_out),
        "truth": Verdict("supported", ""),
        "attention frozen": _refused_if(architecture.delegated, frozen),
    }


def refuse_unsupported(supported: dict[str, Verdict], measure: str, model: str) -> None:
    """Raise the ModelError that says why, where a measure is refused."""
    verdict = supported[measure]
    if verdict.state == "refused":
        others = ", ".join(name for name, other in supported.items() if other.state != "refused")
        raise ModelError(
            f"{measure} was asked of {model}: refused, because {verdict.why}; expected a model without that: ask for "
            f"one of {others} instead"
        )


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
