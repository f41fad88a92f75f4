"""What a sweep will take, said before it begins: how many prompts of which lengths, how long, how much memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from oversquash_lens.analyses.plan import Plan, plan
from oversquash_lens.capture.tokens import tokenize
from oversquash_lens.errors import InputError
from oversquash_lens.memory import in_words
from oversquash_lens.results import duration
from oversquash_lens.sweeps.prompts import SweepPrompt

LENGTHS = 5  # of the prompts' lengths, evenly spread over them, a forecast is made
NEEDS = {"flow": ("flow",), "squashing": ("flow", "flow"), "truth": ("truth",)}  # all other measures: "bound"


@dataclass(frozen=True)
class SweepPlan:
    """A forecast of a sweep on this machine, one process; `bytes` is what the longest prompt needs alone."""

    model: str
    prompts: int
    refused: int
    shortest: int
    median: int
    longest: int
    tokens: int
    seconds: float
    bytes: int
    available: int

    @property
    def fits(self) -> bool:
        return self.bytes <= self.available

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "sweep plan", **asdict(self), "fits": self.fits}

    def __str__(self) -> str:
        good = self.prompts - self.refused
        if not good:
            return f"none of the {self.prompts:,} prompts can be used by {self.model}"
        return (
            f"{good:,} prompts of {self.shortest} … {self.longest} tokens (median {self.median}, {self.tokens:,} in "
            f"all) with {self.model} need about {duration(self.seconds)}; {self.refused:,} cannot be used.\n"
            f"The longest needs about {in_words(self.bytes)} of memory, and {in_words(self.available)} are there: "
            + ("it fits." if self.fits else "it will be refused.")
        )


def sweep_plan(
    model: Any,
    prompts: Sequence[SweepPrompt],
    measures: Sequence[str],
    *,
    chat: bool = False,
    bos: bool | None = None,
    probes: int | None = 16,
) -> SweepPlan:
    """Tokenize all prompts and forecast some lengths; the time of those between is read off a straight line."""
    lengths = sorted(n for n in (_length(model, each, chat, bos) for each in prompts) if n)
    name = getattr(model.cfg, "model_name", None) or "this model"
    if not lengths:
        return SweepPlan(name, len(prompts), len(prompts), 0, 0, 0, 0, 0.0, 0, 0)
    steps = {lengths[round(i * (len(lengths) - 1) / (LENGTHS - 1))] for i in range(LENGTHS)}
    kinds = [kind for measure in measures for kind in NEEDS.get(measure, ())]
    kinds += ["bound"] * any(measure not in NEEDS for measure in measures)
    found = {n: [plan(model, n, kind, probes=probes) for kind in kinds] for n in sorted(steps)}
    per_token = {n: _seconds(each) / n for n, each in found.items()}
    seconds = sum(n * per_token[min(steps, key=lambda step: abs(step - n))] for n in lengths)
    longest = found[lengths[-1]]
    return SweepPlan(
        model=name,
        prompts=len(prompts),
        refused=len(prompts) - len(lengths),
        shortest=lengths[0],
        median=lengths[len(lengths) // 2],
        longest=lengths[-1],
        tokens=sum(lengths),
        seconds=seconds,
        bytes=max(each.bytes for each in longest),
        available=min(each.available for each in longest),
    )


def _length(model: Any, each: SweepPrompt, chat: bool, bos: bool | None) -> int:
    """Tokens of a prompt; 0 where it cannot be used."""
    options = {"chat": chat, "bos": bos} if each.text is not None else {}
    try:
        return len(tokenize(model, each.prompt, **options).ids)
    except InputError:
        return 0


def _seconds(found: Sequence[Plan]) -> float:
    """All measures of one prompt; the recording that each forecast holds is made once."""
    steps: dict[str, float] = {}
    for number, each in enumerate(found):
        shared = ("recording", "norms of the weights, once per model")
        steps |= {name if name in shared else f"{number} {name}": time for name, time in each.steps.items()}
    steps.pop("norms of the weights, once per model", None)
    return sum(steps.values())
