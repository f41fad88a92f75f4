"""What each measure does, counted: the bytes that it holds at its fullest, and its multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from oversquash_lens.analyses.answer import DRAWS, REPLACED_UNASKED
from oversquash_lens.analyses.audit import DRAWS as AUDIT_DRAWS
from oversquash_lens.jacobian import routes
from oversquash_lens.memory import BASE, HELD, Size, kept_bytes, logits_bytes, record_bytes
from oversquash_lens.swaps.substitution import BEHIND, LAST

Bytes = dict[str, int]

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

    def fullest_bytes(self) -> Bytes:
        """What the fullest phase holds."""
        return self.phases[self.fullest()[0]]

    def fullest(self) -> tuple[str, int]:
        """The phase that holds most, and how much."""
        sums = {name: sum(parts.values()) for name, parts in self.phases.items()}
        return max(sums.items(), key=lambda each: each[1])


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


def _audit(run: Request, draws: int = AUDIT_DRAWS) -> Course:
    """The truth twice, as it is and with attention frozen, while the trace is kept; all bounds and the estimate.

    And the replacements that a short prompt is given unasked.
    """
    course, spectral = _bound(run), run.probes is None
    phases = {**course.phases, "measuring the truth": run.kept() | run.truth_bytes(run.truth, spectral)}
    steps = {**course.steps, "the truth": run.times * run.truth_operations(run.truth)}
    if run.n <= REPLACED_UNASKED:
        steps["replacing"] = run.times * draws * (BEHIND + LAST + 2) * run.one_pass
    if run.n <= routes.MOST_FROZEN:
        name = "the truth with attention frozen"
        phases[f"measuring {name}"] = run.kept() | run.truth_bytes(run.frozen, spectral)
        steps[name] = run.times * run.truth_operations(run.frozen)
    return Course(phases, steps)


def _report(run: Request) -> Course:
    """An audit, the truth with the norms frozen, flows (all, uniform, of chosen tokens), four more estimates.

    And the target's: its sensitivity and its flow.
    """
    course, target = _audit(run, DRAWS), _measured_flow(replace(run, probes=None))
    steps = {**course.steps, "flows and routes": run.times * 6 * run.sweep, **target.steps}
    if run.n <= routes.MOST_FROZEN:
        steps["the truth with norms frozen"] = run.times * run.truth_operations(run.truth)
        steps["each assumption imposed"] = run.times * 4 * run.sweep
    phases = {**course.phases, "following the flow": run.kept() | routes.block_bytes(run.size, run.n)}
    phases["measuring the target's flow"] = run.kept() | target.fullest_bytes()
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


def _measured_flow(run: Request) -> Course:
    """A target's flow: one product each way. With probes: sketch, basis and rest, each so many products each way.

    A backward product runs each block again; so does a forward one, as two passes or as a derivative of a derivative.
    """
    size, directions = run.size, 1 if run.probes is None else 3 * run.probes
    one = size.d_model * run.n * (size.n_layers + 1) * 4
    kept = {"gradients at every cut": 3 * one * max(1, min(directions, run.memory // (3 * one)))}
    steps = {
        "backward products": run.times * 2 * run.truth_operations("blocks") / max(1, run.products) * directions,
        "forward products": run.times * 3 * (run.one_pass + size.attention_operations(run.n)) * directions,
    }
    return Course({"measuring the flow": run.truth_bytes("blocks") | kept}, steps)


def _substitution(run: Request) -> Course:
    """`times` draws of every token, each an ending of half the prompt on average, against kept keys and values."""
    size, n = run.size, run.n
    parts = {
        "keys and values": size.cache_bytes(n),
        "one layer at work": 2 * size.scores(n) + size.position(n),
        "the unembedding": size.unembedding,
        "the libraries": BASE,
    }
    return Course({"replacing": parts}, {"the replaced endings": run.times * n / 2 * run.one_pass})


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
    "measured_flow": _measured_flow,
    "substitution": _substitution,
}
