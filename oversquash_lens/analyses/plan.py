"""What a run will need of memory and time, said before it begins.

Bytes are counted from the model's shapes: the tensors that are alive together where a run holds most. Seconds are one
small pass, timed, times the work of the passes that a measure makes: so many multiply-adds per token and so many per
pair of tokens; a backward product counts as a pass. `python -m benchmarks.planned` compares both with runs.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from oversquash_lens.analyses.courses import MEASURES, Bytes, Request
from oversquash_lens.capture.fused import choose_route
from oversquash_lens.capture.hooks import last_logits_only, without_cache
from oversquash_lens.capture.prefixes import plan as shared_passes
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import Prompt
from oversquash_lens.capture.weights import weights_known
from oversquash_lens.collapse.curve import FORMATS
from oversquash_lens.collapse.precision import number_format
from oversquash_lens.errors import InputError, one_line, whole_number
from oversquash_lens.jacobian import routes
from oversquash_lens.jacobian.measured import MEMORY
from oversquash_lens.memory import (
    available_bytes,
    in_words,
    resident_bytes,
)
from oversquash_lens.results import Result, duration

SMALL = 64  # tokens of the pass that is timed


@dataclass(frozen=True, repr=False)
class Plan(Result):
    """Memory and time of one run, before it. `str(plan)` is a table, `sentence` says whether it fits.

    `bytes` is the most that it holds at once beyond the `resident` ones that the process holds already, in the phase
    `fullest`; `parts` says what holds them, `available` what there is. `seconds` is the wall time on this machine as
    it is now, `steps` says what takes it; `passes` is the same work in passes over the prompt. `verdict` is "fits",
    "fits, leaner" (fewer backward products at a time) or "does not fit".
    """

    measure: str
    model: str
    n: int
    probes: int | None
    bytes: int
    available: int
    resident: int
    passes: float | int
    seconds: float | int
    verdict: str
    fullest: str
    parts: Bytes
    steps: Mapping[str, float | int]

    @property
    def fits(self) -> bool:
        """Whether the run would not be refused now."""
        return self.verdict != "does not fit"

    @property
    def sentence(self) -> str:
        """All in one line."""
        what = f"{self.measure} of {self.n} tokens with {self.model}"
        needs = f"needs about {in_words(self.bytes)} of memory beyond the {in_words(self.resident)} in use"
        work = f"and the work of {self.passes:.3g} passes, about {duration(self.seconds)}"
        there = f"{in_words(self.available)} are there"
        end = {
            "fits": f"{there}: it fits.",
            "fits, leaner": f"{there}: it will take fewer backward products at a time, and somewhat longer.",
            "does not fit": f"{there}: it does not fit. Take a shorter prompt, or dtype='bfloat16'.",
        }
        return f"{what} {needs} {work}; {end[self.verdict]}"

    def to_dict(self) -> dict:
        """JSON-able."""
        return {
            "kind": "plan",
            **{key: value for key, value in vars(self).items() if key not in ("parts", "steps")},
            "fits": self.fits,
            "sentence": self.sentence,
            "parts": dict(self.parts),
            "steps": dict(self.steps),
        }

    def _title(self) -> str:
        return self.sentence

    def _table(self) -> Mapping[str, Sequence[Any]]:
        parts, steps = by_size(self.parts), by_size(self.steps)
        return {
            "what": [name for name, _ in (*parts, *steps)],
            "bytes": [*(size for _, size in parts), *[None] * len(steps)],
            "seconds": [*[None] * len(parts), *(seconds for _, seconds in steps)],
        }

    def __str__(self) -> str:
        parts = [f"{in_words(size):>9}  {name}" for name, size in by_size(self.parts)]
        steps = [f"{duration(seconds):>9}  {name}" for name, seconds in by_size(self.steps)]
        time_head = f"time (one pass of {min(SMALL, self.n)} tokens was timed, and its work multiplied)"
        return "\n".join([self.sentence, "", f"memory, while {self.fullest}", *parts, "", time_head, *steps])


def plan(
    model: Any,
    prompt: Prompt | int,
    measure: str = "report",
    *,
    probes: int | None = 16,
    times: float | int = 1,
    new_tokens: int = 0,
    chat: bool = False,
    bos: bool | None = None,
    memory: int = MEMORY,
    clock: Callable[[], float] = time.perf_counter,
) -> Plan:
    """Memory and time that a measure of this prompt, or of any prompt of so many tokens, would take.

    `measure`: one of `MEASURES`. `probes` and `memory` (bytes) as the measure itself takes them (None: the exact
    truth). `times`: how often it is done: the edits of "what_if", the number formats of "collapse", the questions of
    "generate", the prompts of any other. `new_tokens`: of each completion of "generate". `chat`, `bos` as `record`
    takes them. `clock`: what counts seconds.

    One pass of at most 64 tokens is run and timed; everything else is counted. Bytes are meant to be right within a
    factor of 1.3, seconds within about 2. Raises InputError for an unknown measure, or for a prompt or
    number of tokens that the model does not read.
    """
    subject = Subject.of(model)
    if measure not in MEASURES:
        raise InputError(f"expected one of {', '.join(MEASURES)}, got measure {one_line(repr(measure), 60)}")
    n = _length(subject, prompt, chat, bos)
    if probes is not None:
        whole_number("probes", probes, otherwise=", or None for the exact truth")
    return _planned(subject, measure, _request(subject, n, probes, memory, times, new_tokens), clock)


def plan_collapse(
    model: Any,
    pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    dtypes: Sequence[Any] = FORMATS,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Plan:
    """As `plan`, of a collapse curve: `pairs` of token ids, one for each length, in these number formats.

    Prompts that begin alike share a pass, so the tokens that are really run are counted.
    """
    formats = {replace(number_format(each), storage=None) for each in dtypes}
    subject = Subject.of(model)
    sequences = list(dict.fromkeys(ids for pair in pairs for ids in pair))
    longest = max(map(len, sequences))
    times = len(formats) * shared_passes(sequences).tokens / longest
    own = subject.architecture.dtype
    other = max(each.dtype.itemsize * (each.dtype != own or bool(each.weights)) for each in formats)
    return _planned(subject, "collapse", _request(subject, longest, 1, MEMORY, times, 0, other), clock)


def _planned(subject: Subject, measure: str, request: Request, clock: Callable[[], float]) -> Plan:
    available, size = available_bytes(subject.device), subject.size
    course, verdict = MEASURES[measure](request), "fits"
    if course.fullest()[1] > available:
        lean = MEASURES[measure](replace(request, memory=0))
        fits = lean.fullest()[1] <= available
        course, verdict = (lean, "fits, leaner") if fits else (course, "does not fit")
    fullest, total = course.fullest()
    work = dict(course.steps)
    if "recording" in work and not weights_known(subject.model):
        work["norms of the weights, once per model"] = size.gram_operations
    small = min(SMALL, request.n)
    pace = _small_pass_seconds(subject, small, clock) / size.pass_operations(small)
    steps = {name: pace * operations for name, operations in work.items()}
    return Plan(
        measure=measure,
        model=subject.about.model,
        n=request.n,
        probes=request.probes,
        bytes=total,
        available=available,
        resident=resident_bytes(subject.device),
        passes=sum(work.values()) / request.one_pass,
        seconds=sum(steps.values()),
        verdict=verdict,
        fullest=fullest,
        parts=course.phases[fullest],
        steps=steps,
    )


def _request(
    subject: Subject, n: int, probes: int | None, memory: int, times: float | int, new_tokens: int, other: int = 2
) -> Request:
    truth, frozen = (routes.truth_route(subject, n, freeze) for freeze in ((), ("attention",)))
    recorded = choose_route(subject.model, subject.architecture, n)
    hooked: Any = subject.model
    recast = other * sum(weight.numel() for weight in hooked.parameters())
    return Request(subject.size, n, probes, memory, times, new_tokens, recast, recorded, truth, frozen)


def _length(subject: Subject, prompt: Any, chat: bool, bos: bool | None) -> int:
    if isinstance(prompt, str) or not hasattr(prompt, "__index__") or getattr(prompt, "ndim", False):
        return len(subject.tokenize(prompt, chat=chat, bos=bos).ids)
    n, n_ctx = operator.index(prompt), subject.architecture.n_ctx
    if not 2 <= n <= n_ctx:
        raise InputError(f"expected 2 … {n_ctx}, what this model reads, got {n} tokens: give a number between them")
    return n


def _small_pass_seconds(subject: Subject, n: int, clock: Callable[[], float]) -> float | int:
    """Seconds of one pass of n tokens; a first one, of two tokens, makes what a model makes once."""
    model, device = subject.model, subject.device
    ids = (torch.arange(n, device=device) % model.cfg.d_vocab)[None]

    def once(ids: torch.Tensor) -> None:
        model(ids, **without_cache(model))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()

    with torch.no_grad(), last_logits_only(model):
        once(ids[:, :2])
        begun = clock()
        once(ids)
        return clock() - begun


def by_size(parts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Largest first."""
    return sorted(parts.items(), key=lambda each: -each[1])
