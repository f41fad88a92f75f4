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
    BASE,
    HELD,
    Size,
    available_bytes,
    in_words,
    kept_bytes,
    logits_bytes,
    record_bytes,
    resident_bytes,
)
from oversquash_lens.results import Result, duration

Bytes = dict[str, int]

SMALL = 64  # tokens of the pass that is timed
SWEEP = 1.5  # attentions: what all kinds of path in one sweep multiply for each [head, dest, src] of a layer
EDITED = 3  # copies of its [head, dest, src] that an edit adds to the graph of a layer
DIRECTIONS = 144  # pairs of directions through each MLP at the default number of node probes


@dataclass(frozen=True)
class Request:
    """What a run is of, and the routes that it would take now: of the recording, of the truth as it is, and frozen.

    `times`: how often the whole is done, as `plan` takes it; `new_tokens`: of each completion. `recast`:
    bytes of the weights in another number format.
    """

    size: Size
    n: int
    probes: int | None
    memory: int
    times: float | int = 1
    new_tokens: int = 0
    recast: int = 0
    recorded: str = "kept"
    truth: str = "whole"
    frozen: str = "whole"

    @property
    def products(self) -> int:
        """Backward products of one truth."""
        return self.size.d_model if self.probes is None else self.probes

    def truth_bytes(self, route: str, spectral: bool = False) -> Bytes:
        """The most that one truth holds."""
        return routes.truth_bytes(self.size, self.n, self.products, self.memory, spectral, route)

    def kept(self) -> Bytes:
        """The recording, while something else is done."""
        return kept_bytes(self.size, self.n, self.recorded, HELD)

    @property
    def one_pass(self) -> int:
        """Multiply-adds of one pass over the prompt, logits of the last position."""
        return self.size.pass_operations(self.n)

    @property
    def sweep(self) -> float:
        """Multiply-adds of one sweep over the layers' attention, all kinds of path together."""
        return SWEEP * self.size.attention_operations(self.n)

    def truth_operations(self, route: str) -> int:
        """A pass with its graph (once more, a block at a time), and backward products, their attention twice."""
        back = self.one_pass + self.size.attention_operations(self.n)
        return (1 if route == "whole" else 2) * self.one_pass + self.products * back


@dataclass(frozen=True)
class Course:
    """What one measure does: phases, each with what it holds at its fullest, and steps with their multiply-adds."""

    phases: Mapping[str, Bytes]
    steps: Mapping[str, float | int]

    def fullest(self) -> tuple[str, int]:
        """The phase that holds most, and how much."""
        sums = {name: sum(parts.values()) for name, parts in self.phases.items()}
        return max(sums.items(), key=lambda each: each[1])


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


def _forward(run: Request) -> Course:
    size, n = run.size, run.n
    parts = {"the logits": logits_bytes(size, n), "one layer at work": 2 * size.scores(n), "the libraries": BASE}
    return Course({"running the model": parts}, {"the pass": run.times * (run.one_pass + size.logits_operations(n))})


def _record(run: Request) -> Course:
    """A pass, its checks, and the nodes' gains from pairs of directions."""
    size = run.size
    pairs = DIRECTIONS * size.n_layers * size.matrices * (run.n + size.d_model) * size.d_mlp
    steps = {"recording": run.times * (run.one_pass + size.attention_operations(run.n) + pairs)}
    return Course({"recording": record_bytes(size, run.n, run.recorded)}, steps)


def _bound(run: Request) -> Course:
    """Every variant of the bound, and the estimate, in one sweep."""
    course = _record(run)
    phases = {**course.phases, "summing over paths": run.kept() | routes.block_bytes(run.size, run.n)}
    return Course(phases, {**course.steps, "bounds and estimate": run.times * run.sweep})


def _flow(run: Request) -> Course:
    """The estimate's flow and that of uniform attention, each in two sweeps."""
    course = _record(run)
    phases = {**course.phases, "following the flow": run.kept() | routes.block_bytes(run.size, run.n)}
    return Course(phases, {**course.steps, "flows": run.times * 4 * run.sweep})


def _truth(run: Request) -> Course:
    steps = {"the truth": run.times * run.truth_operations(run.truth)}
    return Course({"measuring the truth": run.truth_bytes(run.truth)}, steps)


def _audit(run: Request) -> Course:
    """The truth twice, as it is and with attention frozen, while the trace is kept; all bounds and the estimate."""
    course, spectral = _bound(run), run.probes is None
    phases = {**course.phases, "measuring the truth": run.kept() | run.truth_bytes(run.truth, spectral)}
    steps = {**course.steps, "the truth": run.times * run.truth_operations(run.truth)}
    if run.n <= routes.MOST_FROZEN:
        name = "the truth with attention frozen"
        phases[f"measuring {name}"] = run.kept() | run.truth_bytes(run.frozen, spectral)
        steps[name] = run.times * run.truth_operations(run.frozen)
    return Course(phases, steps)


def _report(run: Request) -> Course:
    """An audit, the truth with the norms frozen, flows (all, uniform, of chosen tokens), four more estimates."""
    course = _audit(run)
    steps = {**course.steps, "flows and routes": run.times * 6 * run.sweep}
    if run.n <= routes.MOST_FROZEN:
        steps["the truth with norms frozen"] = run.times * run.truth_operations(run.truth)
        steps["each assumption imposed"] = run.times * 4 * run.sweep
    phases = {**course.phases, "following the flow": run.kept() | routes.block_bytes(run.size, run.n)}
    return Course(phases, steps)


def _what_if(run: Request) -> Course:
    """Prompt and edits: each recorded, bounded, its truth measured, and run once more with the last token repeated.

    An edit of the attention is a hook inside it, so patterns are kept and no truth is fused.
    """
    edited = replace(run, recorded="kept", truth=run.frozen, times=run.times + 1)
    course = _bound(edited)
    layers = run.size.n_layers if edited.truth == "whole" else 1
    weights = {"the edited attention": EDITED * layers * run.size.scores(run.n)}
    phases = {**course.phases, "measuring the truth": edited.kept() | weights | edited.truth_bytes(edited.truth)}
    truth = {"the truth": edited.times * edited.truth_operations(edited.truth)}
    return Course(phases, {**course.steps, **truth, "the last token repeated": edited.times * edited.one_pass})


def _collapse(run: Request) -> Course:
    """The passes that read all pairs, and those that check endings against passes of their own, in each format."""
    size, n = run.size, run.n
    parts = {
        "one layer at work": 2 * size.scores(n) + size.position(n),
        "the weights in another format": run.recast,
        "keys and values": size.cache_bytes(n),
        "the unembedding": size.unembedding,
        "the libraries": BASE,
    }
    return Course({"reading the pairs": parts}, {"the passes": run.times * run.one_pass})


def _generate(run: Request) -> Course:
    """Completions: a pass over each prompt, and one of a single token for each token that follows."""
    size, n = run.size, run.n + run.new_tokens
    parts = {
        "the logits": logits_bytes(size, run.n),
        "one layer at work": 2 * size.scores(run.n),
        "keys and values": size.cache_bytes(n),
        "the libraries": BASE,
    }
    new = run.new_tokens * size.d_model * size.d_vocab + size.pass_operations(n) - run.one_pass
    return Course({"generating": parts}, {"the prompts": run.times * run.one_pass, "new tokens": run.times * new})


MEASURES: dict[str, Callable[[Request], Course]] = {
    "forward": _forward,
    "record": _record,
    "bound": _bound,
    "flow": _flow,
    "truth": _truth,
    "audit": _audit,
    "report": _report,
    "what_if": _what_if,
    "collapse": _collapse,
    "generate": _generate,
}


def by_size(parts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Largest first."""
    return sorted(parts.items(), key=lambda each: -each[1])
