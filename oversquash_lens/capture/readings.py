"""What a model makes of the last token of many sequences, in as few passes as their common beginnings allow."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.architecture import FINAL_HOOKS, LAYER_HOOKS, Architecture
from oversquash_lens.capture.checks import TOLERANCE, logits_from
from oversquash_lens.capture.hooked_model import HookedModel
from oversquash_lens.capture.hooks import Hook, NamedHook, attached, hooks_on, last_logits_only, without_cache
from oversquash_lens.capture.prefixes import (
    Branch,
    Ids,
    PassPlan,
    Place,
    Start,
    Trunk,
    plan,
    run_branches,
    run_trunk,
    separate,
)
from oversquash_lens.capture.subject import Subject
from oversquash_lens.errors import HookMismatchError, ModelError, one_line

log = logging.getLogger(__name__)

ROWS = 64  # attention rows compared at a time: [head, ROWS, pos] stays in the processor's cache
GAP = 4  # rows at most this far apart are compared in one piece, those between them for nothing
# How far a shared pass may be from a sequence's own, relative: machine epsilons (float32's at least), and at most.
# Measured on SmolLM2: 15 in float32, 3 in bfloat16 (0.02); a window that the cache does not know of makes 0.1 … 0.7.
MISMATCH, WORST = 1000, 0.1

Wanted = tuple[int, int, int]  # a sequence, and the batch row and column of a pass where its last token is


@dataclass(frozen=True)
class Readings:
    """The last token of each sequence: residual stream, prediction's input, heads of the last layer, attention.

    `attention_shift` is the total variation (no ½) between the last token's attention row and that of the token
    before it, `self_attention` what the last token gives itself: mean over heads, nan where not asked for and in layers
    that show no pattern. `heads` has none where the last layer does not show what they read.
    """

    residuals: Float[Tensor, "layer_plus_1 sequence d_model"]
    prediction_input: Float[Tensor, "sequence d_model"]
    heads: Float[Tensor, "sequence head d_head"]
    attention_shift: Float[Tensor, "layer sequence"]
    self_attention: Float[Tensor, "layer sequence"]
    passes: int
    tokens: int
    shared: bool


def read(
    subject: Subject,
    sequences: Sequence[Ids],
    *,
    compared: Sequence[bool] = (),
    share: bool = True,
) -> Readings:
    """Run the model on what these sequences have in common once, and read each one's last token.

    `compared` marks the sequences (of two tokens at least) whose last attention row is set against the row before.
    Endings that branch off are checked on two of them against passes of their own: where the model takes no cache and
    mask, or does not answer with them as it does itself (a sliding window, positions that ignore the mask, a hook
    that edits one position), every ending is run whole instead, and `shared` is False. `share=False` runs each
    sequence by itself.
    """

    def reading(way: PassPlan, shared: bool) -> Readings:
        return _Reader(subject, sequences, compared or [False] * len(sequences)).run(way, shared)

    if not share:
        return reading(separate(sequences), False)
    # What carries a state beside keys and values cannot be taken back to where an ending leaves its trunk.
    branching = len(subject.function.shown.patterns) == subject.architecture.n_layers
    together = {ids for ids, asked in zip(sequences, compared, strict=False) if asked}
    way = plan(sequences, branching=branching, together=together)
    if not any(trunk.branches for trunk in way.trunks):
        return reading(way, True)
    try:
        found = reading(way, True)
        if _as_alone(subject, sequences, way, found):
            return found
    except Exception as error:
        # No class says beforehand which caches and masks it takes. What is wrong with more than these, the passes
        # without them raise again.
        log.debug("endings are run by themselves: %s", one_line(error))
    return reading(plan(sequences, branching=False), False)


def read_substituted(subject: Subject, base: Ids, branches: Sequence[Branch]) -> Readings:
    """The last token of `base`, and of it with each branch's tokens in their places; `base` is run once.

    `shared` is False where the model does not answer with its cache and a mask as it does by itself: then each branch
    is a pass of its own, and one that leaves gaps a ModelError.
    """
    trunk = Trunk(base, tuple(branches))
    ends = (Place(0, number, len(branch.suffix) - 1) for number, branch in enumerate(branches))
    way = PassPlan((trunk,), (Place(0, None, len(base) - 1), *ends))
    sequences = [base, *(substituted(base, branch) for branch in branches)]
    whole = [i for i, branch in enumerate(branches, 1) if _is_ending(base, branch)]
    try:
        found = _Reader(subject, sequences, [False] * len(sequences)).run(way, True)
        if all(_is_as_alone(subject, sequences[i], found.prediction_input[i]) for i in {*whole[:1], *whole[-1:]}):
            return found
        said = "passes with a cache and a mask differ from the model's own"
    except Exception as error:
        # No class says beforehand which caches and masks it takes. What is wrong with more than these, the passes
        # without them raise again.
        said = one_line(error)
        log.debug("branches are run by themselves: %s", said)
    if len(whole) < len(branches):
        raise ModelError(
            f"{subject.about.model} cannot recompute some positions alone: {said}; expected a model that takes a mask "
            "and positions: whole prompts can be run instead"
        )
    return _Reader(subject, sequences, [False] * len(sequences)).run(separate(sequences), False)


def substituted(base: Ids, branch: Branch) -> Ids:
    """The sequence that a branch stands for."""
    found = list(base)
    for place, token in zip(branch.places, branch.suffix, strict=True):
        found[place] = token
    return tuple(found)


def _is_ending(base: Ids, branch: Branch) -> bool:
    """Whether a branch has every token behind its first."""
    return len(branch.suffix) == len(base) - branch.places[0]


def read_alone(
    subject: Subject, ids: Ids, batch: int = 1
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "head d_head"]]:
    """The prediction's input and the last layer's heads of one prompt, `batch` times over in a pass of its own."""
    model, architecture = subject.model, subject.architecture
    kept = {"heads": torch.zeros(0, 1, dtype=architecture.dtype, device=subject.device)}

    def keep_heads(z: Tensor, hook: Any = None) -> None:
        kept["heads"] = z[0, -1].clone()

    def keep_prediction_input(y: Tensor) -> None:
        kept["y"] = _restored(y[0, -1], architecture).clone()

    with torch.no_grad(), attached(model, _heads_hook(subject, keep_heads)), _read(model, keep_prediction_input):
        run_trunk(model, ids, batch=batch)
    return kept["y"], kept["heads"]


def predictions(subject: Subject, ids: Ids) -> tuple[Float[Tensor, "pos d_model"], Float[Tensor, " d_vocab"]]:
    """The prediction's input at every position of one pass, and the model's own logits at the last."""
    model, kept = subject.model, {}

    def keep(y: Tensor) -> None:
        kept["y"] = _restored(y[0], subject.architecture).clone()

    with torch.no_grad(), _read(model, keep):
        logits = model(torch.tensor([ids], device=subject.device), **without_cache(model))[0, -1]
    return kept["y"], logits.to(torch.promote_types(logits.dtype, torch.float32))


def _heads_hook(subject: Subject, keep: Hook) -> list[NamedHook]:
    """On what the last layer's heads read, where a hook shows it."""
    name = f"blocks.{subject.architecture.n_layers - 1}.{LAYER_HOOKS['z']}"
    return [(name, keep)] if subject.function.shown.heads else []


def logits_of(subject: Subject, y: Float[Tensor, "sequence d_model"]) -> Float[Tensor, "sequence d_vocab"]:
    """The model's own logits of these prediction inputs, capped and scaled as it does, in float32 at least."""
    with torch.no_grad():
        logits = subject.model.unembed(_restored(y, subject.architecture, undo=True)[None])[0]
    return logits_from(subject.model, logits.to(torch.promote_types(logits.dtype, torch.float32)))


def _restored(y: Tensor, architecture: Architecture, *, undo: bool = False) -> Tensor:
    """y with the final gain that folding moved into the unembedding, as in every trace; or without it again."""
    gain = architecture.restore_gain
    if gain is None:
        return y
    return torch.where(gain == 0, 0, y / gain).to(y) if undo else (y * gain).to(y)


def _as_alone(subject: Subject, sequences: Sequence[Ids], way: PassPlan, found: Readings) -> bool:
    """Whether branches say what passes of their own say: the longest one, and the one that hides most of its trunk."""
    hidden: dict[int, int] = {}  # sequence -> how many tokens of its trunk its branch must not see
    for i, place in enumerate(way.places):
        if place.branch is not None:
            trunk = way.trunks[place.trunk]
            hidden[i] = len(trunk.ids) - trunk.branches[place.branch].fork
    some = {max(hidden, key=lambda i: len(sequences[i])), max(hidden, key=lambda i: hidden[i])}
    return all(_is_as_alone(subject, sequences[i], found.prediction_input[i]) for i in some)


def _is_as_alone(subject: Subject, ids: Ids, shared: Float[Tensor, " d_model"]) -> bool:
    alone = read_alone(subject, ids)[0].cpu().double()
    epsilon = max(torch.finfo(subject.architecture.dtype).eps, torch.finfo(torch.float32).eps)
    return bool((shared.to(alone) - alone).norm() <= min(MISMATCH * epsilon, WORST) * alone.norm())


class _Reader:
    """Fills one row per sequence, layer by layer, while the planned passes run."""

    def __init__(self, subject: Subject, sequences: Sequence[Ids], compared: Sequence[bool]) -> None:
        assert all(len(ids) > 1 for ids, asked in zip(sequences, compared, strict=True) if asked)
        model, architecture = subject.model, subject.architecture
        self.subject, self.model, self.architecture, self.compared = subject, model, architecture, compared
        count, layers = len(sequences), architecture.n_layers
        like: dict[str, Any] = {"fill_value": torch.nan, "dtype": architecture.dtype, "device": subject.device}
        self.like = like
        self.residuals = torch.full((layers + 1, count, architecture.d_model), **like)
        self.prediction_input = torch.full((count, architecture.d_model), **like)
        self.heads = torch.full((count, 0, 1), **like)
        self.patterns = subject.function.shown.patterns
        self.attention_shift = torch.full((layers, count), torch.nan, dtype=torch.float64, device="cpu")
        self.self_attention = torch.full((layers, count), torch.nan, dtype=torch.float64, device="cpu")
        self.passes = 0

    def run(self, way: PassPlan, shared: bool) -> Readings:
        rows = defaultdict(list)
        for sequence, place in enumerate(way.places):
            rows[place.trunk, place.branch].append((sequence, place.position))
        with torch.no_grad():
            for number, trunk in enumerate(way.trunks):
                with self._reading([(sequence, 0, at) for sequence, at in rows[number, None]]):
                    cache = run_trunk(self.model, trunk.ids, cached=bool(trunk.branches))

                def watch(starts: Sequence[Start], number: int = number) -> AbstractContextManager[None]:
                    return self._reading(
                        [(s, row, start + at) for branch, row, start in starts for s, at in rows[number, branch]]
                    )

                if trunk.branches:
                    run_branches(self.model, trunk, cache, watch, self.architecture.windows)
        self._check()
        return Readings(
            residuals=self.residuals,
            prediction_input=self.prediction_input,
            heads=self.heads,
            attention_shift=self.attention_shift,
            self_attention=self.self_attention,
            passes=self.passes,
            tokens=way.tokens,
            shared=shared,
        )

    @contextmanager
    def _reading(self, wanted: list[Wanted]) -> Iterator[None]:
        """Keep what is wanted of the pass made inside the `with`."""
        self.passes += 1
        sequence, row, column = torch.tensor(wanted, dtype=torch.long, device="cpu").reshape(-1, 3).T

        def keeper(into: Tensor) -> Hook:
            def keep(value: Tensor, hook: Any = None) -> None:
                into[sequence] = value[row, column].to(into)

            return keep

        def keep_heads(z: Tensor, hook: Any = None) -> None:
            if not self.heads.numel():
                self.heads = torch.full((len(self.heads), *z.shape[2:]), **self.like)
            keeper(self.heads)(z)

        def keep_prediction_input(y: Tensor) -> None:
            keeper(self.prediction_input)(_restored(y, self.architecture))

        layers = range(self.architecture.n_layers)
        hooks = [(f"blocks.{i}.{LAYER_HOOKS['residual']}", keeper(self.residuals[i])) for i in layers]
        hooks += [
            (self.architecture.final_hooks()["last"], keeper(self.residuals[-1])),
            *_heads_hook(self.subject, keep_heads),
            *self._attention_hooks([one for one in wanted if self.compared[one[0]]]),
        ]
        with attached(self.model, hooks), _read(self.model, keep_prediction_input):
            yield

    def _attention_hooks(self, wanted: list[Wanted]) -> list[NamedHook]:
        stretches = []
        for some in _stretches(wanted):
            sequence, row, column = torch.tensor(some, device="cpu").T
            stretches.append((sequence, int(row[0]), column))

        def compare(layer: int) -> Hook:
            def keep(pattern: Tensor, hook: Any = None) -> None:
                past = pattern.shape[3] - pattern.shape[2]
                for sequence, row, column in stretches:
                    first, last = int(column[0]), int(column[-1])
                    rows = pattern[row, :, first - 1 : last + 1, : past + last + 1]
                    _check_row(layer, rows[:, -1])
                    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
                    shift = rows.diff(dim=1).abs_().sum(2).mean(0)
                    itself = rows[:, 1:].diagonal(past + first, 1, 2).mean(0)
                    self.attention_shift[layer, sequence] = shift.cpu().double()[column - first]
                    self.self_attention[layer, sequence] = itself.cpu().double()[column - first]

            return keep

        layers = self.patterns if stretches else ()
        return [(f"blocks.{layer}.{LAYER_HOOKS['pattern']}", compare(layer)) for layer in layers]

    def _check(self) -> None:
        """Every hook fired for every sequence, and all came to finite numbers."""
        parts = {
            "residual stream": self.residuals[..., 0],  # a hook fills a row whole; NaN in it would be in y too
            "last layer's heads": self.heads[..., 0],
            "attention": self.attention_shift[list(self.patterns)][:, torch.tensor(self.compared, device="cpu")],
            "unembedding's input": self.prediction_input,
        }
        silent = self.subject.function.shown.heads and not self.heads.numel()
        for name, values in parts.items():
            if not torch.isfinite(values).all() or (silent and values is parts["last layer's heads"]):
                raise HookMismatchError(
                    f"the {name} holds NaN or infinite values, or its hook did not fire; expected finite activations: "
                    "check the model's weights, use a wider dtype (float32) if this one overflows, and load the model "
                    "with oversquash_lens.load_model()"
                )


def _stretches(wanted: list[Wanted]) -> list[list[Wanted]]:
    """Those whose columns lie close by in one batch row, together."""
    found: list[list[Wanted]] = []
    for one in sorted(wanted, key=lambda one: one[1:]):
        _, row, column = one
        if found and found[-1][0][1] == row and column - found[-1][-1][2] <= GAP and column - found[-1][0][2] < ROWS:
            found[-1].append(one)
        else:
            found.append([one])
    return found


def _check_row(layer: int, row: Float[Tensor, "head src"]) -> None:
    off = (row.sum(1, dtype=torch.float32) - 1).abs()
    wrong = off > TOLERANCE[row.dtype]  # NaN is told of when the pass is over
    if row[wrong].any():  # a head that is switched off has a row of nothing but 0
        raise HookMismatchError(
            f"layer {layer}: an attention row sums to 1 ± {off[wrong].max().item():.2g}; expected 1: this hook does "
            "not show the softmax that the model uses"
        )


@contextmanager
def _read(model: HookedModel, keep: Callable[[Tensor], None]) -> Iterator[None]:
    """What the unembedding reads, at all positions of a pass; it then gets the last one alone, for speed.

    A hook of the user's on the unembedding hears all positions, and is heard.
    """
    if any(hooks_on(module) for module in model.unembed.modules()):
        name = FINAL_HOOKS["prediction_input"]
        with attached(model, [(name, lambda y, hook=None: keep(y))]):
            yield
        return
    with last_logits_only(model):
        handle = model.unembed.register_forward_pre_hook(lambda unembed, inputs: keep(inputs[0]), prepend=True)
        try:
            yield
        finally:
            handle.remove()
