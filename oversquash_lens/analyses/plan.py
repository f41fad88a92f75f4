"""What a run will need of memory and time, said before it begins.

Bytes come from the model's shapes, seconds from these and a short timing of this machine at the same shapes. Both are
meant to be right within a factor of 1.5; `python -m benchmarks.forecast` sets them against runs.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from oversquash_lens.analyses.speed import measure_speed
from oversquash_lens.capture.architecture import read_architecture
from oversquash_lens.capture.route import choose_route
from oversquash_lens.capture.size import BASE, Size, device_of, kept_bytes, logits_bytes, record_bytes, size_of
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import Prompt, tokenize
from oversquash_lens.capture.weights import weights_known
from oversquash_lens.errors import InputError, one_line
from oversquash_lens.jacobian import costs
from oversquash_lens.jacobian.costs import Work
from oversquash_lens.jacobian.measured import MEMORY
from oversquash_lens.memory import available_bytes, in_words

Bytes = Mapping[str, int]


@dataclass(frozen=True)
class Asked:
    """What a run is of, and the routes that it would take now: of the recording, of the truth as it is, and frozen."""

    size: Size
    n: int
    probes: int | None
    memory: int
    recorded: str = "kept"
    truth: str = "whole"
    frozen: str = "whole"

    @property
    def products(self) -> int:
        return self.size.d_model if self.probes is None else self.probes

    def truth_bytes(self, route: str, spectral: bool = False) -> Bytes:
        return costs.truth_bytes(self.size, self.n, self.products, self.memory, spectral, route)

    def truth_work(self, route: str) -> Work:
        return costs.truth_work(self.size, self.n, self.products, route)

    def kept(self) -> Bytes:
        """The recording, while something else is done."""
        return kept_bytes(self.size, self.n, self.recorded)


@dataclass(frozen=True)
class Plan:
    """What one measure does: phases, each with what it holds at its fullest, and the work of all together."""

    phases: Mapping[str, Bytes]
    work: Mapping[str, Work]


@dataclass(frozen=True)
class Forecast:
    """Memory and time of one run, before it. `str(forecast)` is a table, `sentence` says whether it fits.

    `bytes` is the most that it holds at once beyond what the process holds already, in the phase `fullest`;
    `parts` says what holds them, `available` what there is. `seconds` is the wall time on this machine as it is now;
    `steps` says what takes it. `verdict` is "fits", "fits, leaner" (fewer backward products at a time) or
    "does not fit".
    """

    measure: str
    model: str
    n: int
    probes: int | None
    bytes: int
    available: int
    seconds: float
    verdict: str
    fullest: str
    parts: Bytes
    steps: Mapping[str, float]

    @property
    def fits(self) -> bool:
        return self.verdict != "does not fit"

    @property
    def sentence(self) -> str:
        what = f"{self.measure} of {self.n} tokens with {self.model}"
        needs = f"needs about {in_words(self.bytes)} of memory and {duration(self.seconds)}"
        there = f"{in_words(self.available)} are there"
        end = {
            "fits": f"{there}: it fits.",
            "fits, leaner": f"{there}: it will take fewer backward products at a time, and somewhat longer.",
            "does not fit": f"{there}: it does not fit. Take a shorter prompt, or dtype='bfloat16'.",
        }
        return f"{what} {needs}; {end[self.verdict]}"

    def to_dict(self) -> dict:
        return {
            "kind": "forecast",
            **{key: value for key, value in vars(self).items() if key not in ("parts", "steps")},
            "fits": self.fits,
            "sentence": self.sentence,
            "parts": dict(self.parts),
            "steps": dict(self.steps),
        }

    def __str__(self) -> str:
        parts = [f"{in_words(size):>9}  {name}" for name, size in by_size(self.parts)]
        steps = [f"{duration(seconds):>9}  {name}" for name, seconds in by_size(self.steps)]
        return "\n".join([self.sentence, "", f"memory, while {self.fullest}", *parts, "", "time", *steps])


def forecast(
    model: Any,
    prompt: Prompt | int,
    measure: str = "report",
    *,
    probes: int | None = 16,
    memory: int = MEMORY,
    chat: bool = False,
    bos: bool | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Forecast:
    """Memory and time that a measure of this prompt, or of any prompt of so many tokens, would take.

    `measure`: one of `MEASURES`; `probes` and `memory` as the measure itself takes them (None: the exact truth).
    Nothing of the model is run: shapes are counted, and one layer's worth of work is timed, within a few seconds.
    """
    if measure not in MEASURES:
        raise InputError(f"expected one of {', '.join(MEASURES)}, got measure {one_line(repr(measure), 60)}")
    n = _length(model, prompt, chat, bos)
    if probes is not None and not (isinstance(probes, int) and probes > 0):
        raise InputError(f"expected a whole number from 1 on, or None, got probes={one_line(repr(probes), 60)}")
    size, device = size_of(model), device_of(model)
    available = available_bytes(device)
    asked = _asked(model, size, n, probes, memory)
    plan, verdict = MEASURES[measure](asked), "fits"
    if _fullest(plan)[1] > available:
        lean = MEASURES[measure](replace(asked, memory=0))
        fits = _fullest(lean)[1] <= available
        plan, verdict = (lean, "fits, leaner") if fits else (plan, "does not fit")
    fullest, total = _fullest(plan)
    speed = measure_speed(size, n, next(model.parameters()).dtype, device, clock)
    work = dict(plan.work)
    if measure not in ("forward", "truth") and not weights_known(model):
        work["norms of the weights, once per model"] = costs.weights_work(size)
    steps = {name: each.seconds(speed) for name, each in work.items()}
    return Forecast(
        measure=measure,
        model=getattr(model.cfg, "model_name", None) or "this model",
        n=n,
        probes=probes,
        bytes=total,
        available=available,
        seconds=sum(steps.values()),
        verdict=verdict,
        fullest=fullest,
        parts=plan.phases[fullest],
        steps=steps,
    )


def _asked(model: Any, size: Size, n: int, probes: int | None, memory: int) -> Asked:
    architecture = read_architecture(model)
    routes = (costs.truth_route(Subject.of(model), n, freeze) for freeze in ((), ("attention",)))
    return Asked(size, n, probes, memory, choose_route(model, architecture, n), *routes)


def _length(model: Any, prompt: Any, chat: bool, bos: bool | None) -> int:
    if isinstance(prompt, str) or not hasattr(prompt, "__index__") or getattr(prompt, "ndim", 0):
        return len(tokenize(model, prompt, chat=chat, bos=bos).ids)
    n, n_ctx = operator.index(prompt), getattr(model.cfg, "n_ctx", None)
    if n < 2 or (n_ctx and n > n_ctx):
        raise InputError(f"expected 2 … {n_ctx}, what this model reads, got {n} tokens: give a number between them")
    return n


def _fullest(plan: Plan) -> tuple[str, int]:
    """The phase that holds most, and how much."""
    sums = {name: sum(parts.values()) for name, parts in plan.phases.items()}
    return max(sums.items(), key=lambda each: each[1])


def _forward(asked: Asked) -> Plan:
    size, n = asked.size, asked.n
    parts = {"the logits": logits_bytes(size, n), "one layer at work": 2 * size.scores(n), "the libraries": BASE}
    return Plan({"running the model": parts}, {"the pass": costs.forward_work(size, n)})


def _record(asked: Asked) -> Plan:
    work = {"recording": costs.record_work(asked.size, asked.n, asked.recorded)}
    return Plan({"recording": record_bytes(asked.size, asked.n, asked.recorded)}, work)


def _bound(asked: Asked) -> Plan:
    """Every variant of the bound, and the estimate, in one sweep."""
    plan = _record(asked)
    phases = {**plan.phases, "summing over paths": asked.kept() | costs.edge_bytes(asked.size, asked.n)}
    work = {"bounds and estimate": costs.bounds_work(asked.size, asked.n, asked.recorded)}
    return Plan(phases, plan.work | work)


def _flow(asked: Asked) -> Plan:
    """The estimate's flow, and that of even attention."""
    plan = _record(asked)
    phases = {**plan.phases, "following the flow": asked.kept() | costs.edge_bytes(asked.size, asked.n)}
    return Plan(phases, plan.work | {"flows": costs.flow_work(asked.size, asked.n, asked.recorded).times(2)})


def _truth(asked: Asked) -> Plan:
    return Plan({"measuring the truth": asked.truth_bytes(asked.truth)}, {"the truth": asked.truth_work(asked.truth)})


def _audit(asked: Asked) -> Plan:
    """The truth twice, as it is and with attention frozen, while the trace is kept; all bounds and the estimate."""
    plan, spectral = _bound(asked), asked.probes is None
    truths = {"measuring the truth": asked.kept() | asked.truth_bytes(asked.truth, spectral)}
    work = {"the truth": asked.truth_work(asked.truth)}
    if asked.n <= costs.MOST_FROZEN:
        phase = "measuring the truth with attention frozen"
        truths[phase] = asked.kept() | asked.truth_bytes(asked.frozen, spectral)
        work["the truth with attention frozen"] = asked.truth_work(asked.frozen)
    return Plan({**plan.phases, **truths}, plan.work | work)


def _report(asked: Asked) -> Plan:
    """An audit, the truth with the norms frozen, flows (all, even, of chosen tokens), four more estimates."""
    plan = _audit(asked)
    work = {"flows and routes": costs.flow_work(asked.size, asked.n, asked.recorded).times(3)}
    if asked.n <= costs.MOST_FROZEN:
        work["the truth with norms frozen"] = asked.truth_work(asked.truth)
        work["each assumption imposed"] = costs.estimate_work(asked.size, asked.n, asked.recorded).times(4)
    phases = {**plan.phases, "following the flow": asked.kept() | costs.edge_bytes(asked.size, asked.n)}
    return Plan(phases, plan.work | work)


MEASURES: dict[str, Callable[[Asked], Plan]] = {
    "forward": _forward,
    "record": _record,
    "bound": _bound,
    "flow": _flow,
    "truth": _truth,
    "audit": _audit,
    "report": _report,
}


def by_size(parts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(parts.items(), key=lambda each: -each[1])


def duration(seconds: float | int) -> str:
    """A time for people.

    >>> duration(0.2), duration(42.3), duration(754), duration(20_000)
    ('0.2 s', '42 s', '13 min', '5.6 h')
    """
    for limit, unit, of in ((9.95, "s", 1), (99.5, "s", 1), (5970, "min", 60)):
        if seconds < limit:
            return f"{seconds / of:.1f} {unit}" if limit < 10 else f"{seconds / of:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"
