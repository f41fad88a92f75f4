"""What if: change the prompt or the attention, measure again, and set before and after side by side."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from oversquash_lens.analyses.audit import check_effort
from oversquash_lens.capture.architecture import Architecture
from oversquash_lens.capture.edits import Edit, EditedPrompt, edited_attention, edited_prompt, edited_trace
from oversquash_lens.capture.readings import predictions, read_alone
from oversquash_lens.capture.recorder import NODE_PROBES, record_tokens
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import Prompt
from oversquash_lens.errors import InputError, one_line
from oversquash_lens.jacobian.measured import MEMORY, MeasuredSensitivity, measured_sensitivity
from oversquash_lens.jacobian.targets import target_of
from oversquash_lens.numerics import effective_number, json_numbers, spearman
from oversquash_lens.paths.kinds import VARIANTS
from oversquash_lens.paths.profiles import mean_field_sensitivity, path_bound
from oversquash_lens.paths.recursion import PathProfile
from oversquash_lens.results import About, Result

UNEDITED = "as it is"
ROUNDING = 1e-5  # decades that a float32 sensitivity moves by when nothing has changed
OPPOSITE = 0.02  # decades, 5 %: changes of more than that, to opposite sides, contradict each other
MEASURES = ("bound", "calibrated", "estimate", "truth")


@dataclass(frozen=True, repr=False)
class Outcome(Result):
    """Everything measured under one edit, or under none.

    `places` says where each token stood before the edit, None where the edit put it in. `bound` is of the variant
    asked for, `calibrated` the one that always holds, `estimate` the mean-field's. `collapse` is the L1 distance
    between y of this prompt and y of it with its last token repeated (the pair of Theorem 4.2), under the same
    edit, in y's own units; `relative_collapse` their L2 distance over the norm of the first.
    """

    label: str
    tokens: tuple[str, ...]
    places: tuple[int | None, ...]
    bound: PathProfile
    calibrated: PathProfile
    estimate: PathProfile
    truth: MeasuredSensitivity
    collapse: float
    relative_collapse: float

    _ranked_by = "measured_share"

    @property
    def estimated_tokens(self) -> float:
        """Effective number of tokens by the estimate: exp of the entropy of its share, 1 … n."""
        return effective_number(self.estimate.share).item()

    @property
    def measured_tokens(self) -> float:
        """The same as measured."""
        return effective_number(self.truth.share).item()

    def log_values(self, measure: str) -> Float[Tensor, " pos"]:
        """Natural log of one of MEASURES at every token, -inf where no path of attention reaches the last one.

        Autograd leaves rounding errors there. Where the paper leaves a bound's constant open it is left out.
        """
        profile = getattr(self, measure)
        if isinstance(profile, MeasuredSensitivity):
            reached = torch.isfinite(self.calibrated.log_by_layer[0])
            return profile.values.double().log().masked_fill(~reached, -math.inf)
        return profile.log_by_layer[0] if math.isnan(profile.log_constant) else profile.log_values

    def _title(self) -> str:
        return f"“{self.label}”: {len(self.tokens)} tokens, effective number {self.measured_tokens:.1f}"

    def _table(self) -> Mapping[str, Sequence[Any]]:
        shares = {"measured_share": self.truth.share.tolist(), "estimated_share": self.estimate.share.tolist()}
        return {"position": range(len(self.tokens)), "token": self.tokens, "place_before": self.places, **shares}

    def to_dict(self) -> dict:
        profiles = {name: getattr(self, name).to_dict() for name in MEASURES}
        numbers = ("estimated_tokens", "measured_tokens", "collapse", "relative_collapse")
        plain = {"label": self.label, "tokens": list(self.tokens), "places": list(self.places)}
        return plain | profiles | {name: json_numbers(getattr(self, name)) for name in numbers}


@dataclass(frozen=True, repr=False)
class Change(Result):
    """log₁₀ of after over before, for each token that an edit kept; -inf where no path reaches the last one any more.

    `places` are the kept tokens' places before the edit.
    """

    label: str
    places: tuple[int, ...]
    bound: Float[Tensor, " kept"]
    calibrated: Float[Tensor, " kept"]
    estimate: Float[Tensor, " kept"]
    truth: Float[Tensor, " kept"]

    @property
    def cut_off(self) -> int:
        """How many tokens that had a path to the last one have none now."""
        return int(torch.isneginf(self.calibrated).sum())

    @property
    def spearman(self) -> float:
        """Rank correlation of estimated and measured change over the tokens still connected: does the estimate know?

        nan where either changes by no more than rounding does.
        """
        connected = torch.isfinite(self.estimate) & torch.isfinite(self.truth)
        changes = self.estimate[connected], self.truth[connected]
        if not connected.any() or min(change.abs().max() for change in changes) < ROUNDING:
            return math.nan
        return spearman(*changes)

    def median(self, measure: str) -> float:
        """Median over the tokens still connected; nan if there are none."""
        change = getattr(self, measure)
        finite = change[torch.isfinite(change)]
        return finite.quantile(0.5).item() if len(finite) else math.nan

    def _title(self) -> str:
        return f"“{self.label}”: log10 of after over before for {len(self.places)} tokens, {self.cut_off} cut off"

    def _table(self) -> Mapping[str, Sequence[Any]]:
        return {"place_before": self.places, **{name: getattr(self, name).tolist() for name in MEASURES}}

    def to_dict(self) -> dict:
        measures = {
            name: {"median": json_numbers(self.median(name)), "log10": json_numbers(getattr(self, name))}
            for name in MEASURES
        }
        numbers = {"cut_off": self.cut_off, "spearman": json_numbers(self.spearman)}
        return {"label": self.label, "places": list(self.places), **measures, **numbers}


@dataclass(frozen=True, repr=False)
class WhatIf(Result):
    """One prompt as it is and under each edit.

    `str(result)` is a table, `sentence` says what it says, `notes` where estimate and truth contradict each other.
    """

    about: About
    before: Outcome
    after: tuple[Outcome, ...]

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        return (self.before, *self.after)

    @property
    def changes(self) -> tuple[Change, ...]:
        """What each edit did, token by token, in the order of `after`."""
        return tuple(_change(self.before, outcome) for outcome in self.after)

    @property
    def notes(self) -> tuple[str, ...]:
        """Where the estimate says that an edit raises what the truth says that it lowers, or the other way round."""
        pairs = zip(self.after, self.changes, strict=True)
        return tuple(note for outcome, change in pairs for note in _contradictions(self.before, outcome, change))

    @property
    def sentence(self) -> str:
        """What each edit did, in words."""
        return " ".join(self._said())

    def _said(self) -> list[str]:
        number, n = self.before.measured_tokens, len(self.before.tokens)
        said = [f"As it is, the effective number of tokens is {number:.1f} of {n} (measured)."]
        return said + [_in_words(self.before, *pair) for pair in zip(self.after, self.changes, strict=True)]

    def _title(self) -> str:
        warned = "; estimate and truth point in opposite directions, see notes" if self.notes else ""
        many = f"{len(self.after)} edit{'s' if len(self.after) > 1 else ''}"
        return f"{many} of {len(self.before.tokens)} tokens, {self.about}; median log10 of after over before{warned}"

    def _table(self) -> Mapping[str, Sequence[Any]]:
        pairs = [*zip(self.outcomes, (None, *self.changes), strict=True)]
        return {
            "edit": [outcome.label for outcome in self.outcomes],
            "tokens": [len(outcome.tokens) for outcome in self.outcomes],
            "cut_off": [None if change is None else change.cut_off for _, change in pairs],
            **{name: [None if each is None else each.median(name) for _, each in pairs] for name in MEASURES},
            "spearman": [None if change is None else change.spearman for _, change in pairs],
            "effective_tokens": [outcome.measured_tokens for outcome in self.outcomes],
            "collapse": [outcome.collapse for outcome in self.outcomes],
        }

    def to_dict(self) -> dict:
        return {
            "kind": "what_if",
            "about": self.about.to_dict(),
            "sentence": self.sentence,
            "notes": list(self.notes),
            "before": self.before.to_dict(),
            "after": [outcome.to_dict() for outcome in self.after],
            "changes": [change.to_dict() for change in self.changes],
        }

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(f"{self.about}, {len(self.before.tokens)} tokens"), title_justify="left")
        table.add_column("edit", min_width=18)
        for name in ("tokens", "cut\noff", self.before.bound.kind, *HEAD):
            table.add_column(name, justify="right", overflow="fold")
        for outcome, change in zip(self.outcomes, (None, *self.changes), strict=True):
            table.add_row(Text(outcome.label), *_cells(outcome, change))
        out = io.StringIO()
        console = Console(file=out, width=118, legacy_windows=False, force_jupyter=False, force_terminal=False)
        console.print(table)
        for text in (LEGEND, "", *self._said(), *self.notes):
            console.print(Text(text))
        return out.getvalue().rstrip()


HEAD = ("sound\nbound", "estimate", "truth", "ρ", "eff. no.\n(estimate)", "collapse", "rel.")
LEGEND = (
    "Bounds, estimate and truth: median log₁₀ of after over before, over the tokens kept and still connected; the "
    "sound bound is calibrated_full. ρ: rank correlation of the estimated change with the measured one. Eff. no.: "
    "effective number of tokens. Collapse: L1 distance that y moves when the last token is repeated; rel.: in L2, over "
    "y's norm."
)


def what_if(
    model: Any,
    prompt: Prompt,
    *edits: Any,
    variant: str = "proof",
    probes: int | None = 16,
    target: Any = None,
    chat: bool = False,
    bos: bool | None = None,
    seed: int = 0,
    verify: bool = False,
    node_probes: int | None = NODE_PROBES,
    memory: int = MEMORY,
    progress: bool = False,
) -> WhatIf:
    """Measure a prompt as it is and again under each edit of `oversquash_lens.edits`, one at a time.

    What each edit does to the bound, the mean-field estimate, the measured sensitivity and the collapse distance.
    Every edit is checked before the model runs; three passes each.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompt: a text, or token ids [pos] or [1, pos].
        edits: one or more, such as `edits.ablate_head(23, 1)`.
        variant: of the bound, as in `path_bound`; `calibrated_full`, which always holds, is measured besides.
        probes: as in `measured_sensitivity`, the same ones throughout, so that differences have little noise.
        target: a number of the prediction, as `measured_sensitivity` takes it, whose sensitivity is measured instead of
            that of all outputs; "top" is the likeliest token of the prompt as it is, throughout.
        chat: as `record` takes it, and so are bos, seed, verify and node_probes.
        memory: bytes for a batch of backward products.
        progress: show a bar.

    Returns:
        A `WhatIf`: an outcome of the prompt as it is, and one under each edit.

    Raises:
        InputError: no edit, one whose softmax has no known derivative, or a prompt that fills the context.
        ModelError: an edit of the attention where an edit does not reach it.
    """
    subject = Subject.of(model)
    _check_options(edits, variant, probes, node_probes)
    tokenized = subject.tokenize(prompt, chat=chat, bos=bos)
    prompts = [EditedPrompt(tokenized, tuple(range(len(tokenized.ids))))]
    prompts += [edited_prompt(subject.model, tokenized, edit) for edit in edits]
    for edit, edited in zip((None, *edits), prompts, strict=True):
        _check_length(subject.architecture, edit, len(edited.prompt.ids))
    hooked = subject.model
    chosen = None
    if target is not None:
        chosen = target_of(hooked, target, predictions(subject, tuple(tokenized.ids.tolist()))[1])

    def measured(edit: Edit | None, edited: EditedPrompt) -> Outcome:
        tokens, places = edited
        with edited_attention(hooked, edit if edit is not None and edit.attend is not None else None):
            trace = record_tokens(hooked, tokens, node_probes=node_probes, seed=seed, verify=verify)
            how: dict[str, Any] = {"target": chosen, "seed": seed, "memory": memory}
            truth = measured_sensitivity(hooked, tokens.ids, probes=probes, **how)
            repeated, _ = read_alone(subject, (*tokens.ids.tolist(), int(tokens.ids[-1])))
        trace = trace if edit is None else edited_trace(trace, edit)
        y = trace.prediction_input
        moved = repeated.to(y) - y
        return Outcome(
            label=UNEDITED if edit is None else edit.label,
            tokens=trace.tokens,
            places=places,
            bound=path_bound(trace, variant),
            calibrated=path_bound(trace, "calibrated_full"),
            estimate=mean_field_sensitivity(trace),
            truth=replace(truth, about=trace.about),
            collapse=moved.abs().sum().item(),
            relative_collapse=(moved.norm() / y.norm()).item(),
        )

    pairs = tqdm([*zip((None, *edits), prompts, strict=True)], desc="what if", disable=not progress, leave=False)
    before, *after = [measured(*pair) for pair in pairs]
    return WhatIf(before.truth.about, before, tuple(after))


def _check_options(edits: Sequence[Any], variant: str, probes: int | None, node_probes: int | None) -> None:
    if not edits:
        raise InputError(
            "expected at least one edit, got none: give one of oversquash_lens.edits, such as edits.window(32)"
        )
    for edit in edits:
        if not isinstance(edit, Edit):
            raise InputError(
                f"expected an edit, got {one_line(repr(edit), 60)}: make one by a function of oversquash_lens.edits, "
                "such as edits.window(32)"
            )
        if edit.power is None:
            raise InputError(
                f"expected an edit under which the softmax's derivative is known, got {edit.label}: use it inside "
                "edited_attention(model, edit), with measured_sensitivity and collapse_curve"
            )
    if variant not in VARIANTS:
        raise InputError(f"expected one of {', '.join(VARIANTS)}, got variant {variant!r}")
    check_effort(probes, node_probes)


def _check_length(architecture: Architecture, edit: Edit | None, n: int) -> None:
    """The prompt with its last token repeated must fit, too."""
    if n + 1 > architecture.n_ctx:
        what = "the prompt" if edit is None else edit.label
        raise InputError(
            f"expected at most n_ctx = {architecture.n_ctx} tokens, what this model reads, got {what}: {n} tokens, "
            f"{n + 1} with the last one repeated; shorten the prompt"
        )


def _change(before: Outcome, after: Outcome) -> Change:
    kept = [(old, new) for new, old in enumerate(after.places) if old is not None]
    old, new = (torch.tensor(places, device="cpu") for places in zip(*kept, strict=True))
    changes = {name: (after.log_values(name)[new] - before.log_values(name)[old]) / math.log(10) for name in MEASURES}
    return Change(after.label, tuple(old.tolist()), **changes)


def _cells(outcome: Outcome, change: Change | None) -> list[str]:
    """One row of the table behind the label; nothing changes where there is no edit."""
    numbers = [math.nan] * (len(MEASURES) + 1) if change is None else [*map(change.median, MEASURES), change.spearman]
    return [
        str(len(outcome.tokens)),
        "–" if change is None else str(change.cut_off),
        *("–" if math.isnan(number) else f"{round(number, 2) + 0.0:.2f}" for number in numbers),  # no -0.00
        f"{outcome.measured_tokens:.1f} ({outcome.estimated_tokens:.1f})",
        f"{outcome.collapse:.3g}",
        f"{outcome.relative_collapse:.2g}",
    ]


def _contradictions(before: Outcome, after: Outcome, change: Change) -> list[str]:
    """Sentences on what estimate and truth say opposite things of."""
    moved = {
        "a typical token's sensitivity": (change.median("estimate"), change.median("truth")),
        "the effective number of tokens": (
            math.log10(after.estimated_tokens / before.estimated_tokens),
            math.log10(after.measured_tokens / before.measured_tokens),
        ),
    }
    return [
        f"Under “{change.label}” estimate and truth point in opposite directions: by the estimate {what} "
        f"{'rises' if estimated > 0 else 'falls'}, measured it {'rises' if measured > 0 else 'falls'}. Believe the "
        "measured one."
        for what, (estimated, measured) in moved.items()
        if estimated * measured < 0 and min(abs(estimated), abs(measured)) > OPPOSITE
    ]


def _in_words(before: Outcome, after: Outcome, change: Change) -> str:
    cut = f"; {change.cut_off} can no longer reach the last one" if change.cut_off else ""
    times, guess = (10 ** change.median(name) for name in ("truth", "estimate"))
    ranks = "" if math.isnan(change.spearman) else f", and ranks the changes with ρ = {change.spearman:.2f}"
    moves = (
        f"; the collapse distance is {after.collapse / before.collapse:.2f} times as large" if before.collapse else ""
    )
    return (
        f"Under “{after.label}” it is {after.measured_tokens:.1f} of {len(after.tokens)}{cut}; the sensitivity to a "
        f"token is {times:.2f} times what it was (median; the estimate says {guess:.2f}{ranks}){moves}."
    )
