"""What if: change the prompt or the attention, measure again, and set before and after side by side."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from oversquash_lens.analyses.audit import check_effort
from oversquash_lens.analyses.compare import spearman
from oversquash_lens.capture.about import About
from oversquash_lens.capture.architecture import Architecture, read_architecture
from oversquash_lens.capture.edits import Edit, EditedPrompt, edited_attention, edited_prompt, edited_trace
from oversquash_lens.capture.readings import read_alone
from oversquash_lens.capture.recorder import NODE_PROBES, record_tokens
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import Prompt, tokenize
from oversquash_lens.errors import InputError, one_line
from oversquash_lens.jacobian.measured import MEMORY, MeasuredSensitivity, measured_sensitivity
from oversquash_lens.paths.bounds import VARIANTS, path_bound
from oversquash_lens.paths.mean_field import mean_field_sensitivity
from oversquash_lens.paths.paths import PathProfile, effective_number, json_numbers

UNEDITED = "as it is"
ROUNDING = 1e-5  # decades that a float32 sensitivity moves by when nothing has changed
MEASURES = ("bound", "calibrated", "estimate", "truth")


@dataclass(frozen=True)
class Outcome:
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

    @property
    def estimate_heard(self) -> float:
        """Effective number of tokens that the last one hears, by the estimate: exp of its share's entropy, 1 … n."""
        return effective_number(self.estimate.share).item()

    @property
    def truth_heard(self) -> float:
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

    def to_dict(self) -> dict:
        profiles = {name: getattr(self, name).to_dict() for name in MEASURES}
        numbers = ("estimate_heard", "truth_heard", "collapse", "relative_collapse")
        plain = {"label": self.label, "tokens": list(self.tokens), "places": list(self.places)}
        return plain | profiles | {name: json_numbers(getattr(self, name)) for name in numbers}


@dataclass(frozen=True)
class Change:
    """log₁₀ of after over before, for each token that an edit kept; -inf where it can no longer be heard.

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
        """How many tokens the last one heard before and cannot hear now."""
        return int(torch.isneginf(self.calibrated).sum())

    @property
    def spearman(self) -> float:
        """Rank correlation of estimated and measured change over the tokens still heard: does the estimate know?

        nan where either changes by no more than rounding does.
        """
        heard = torch.isfinite(self.estimate) & torch.isfinite(self.truth)
        changes = self.estimate[heard], self.truth[heard]
        if not heard.any() or min(change.abs().max() for change in changes) < ROUNDING:
            return math.nan
        return spearman(*changes)

    def median(self, measure: str) -> float:
        """Median over the tokens still heard; nan if there are none."""
        change = getattr(self, measure)
        finite = change[torch.isfinite(change)]
        return finite.quantile(0.5).item() if len(finite) else math.nan

    def to_dict(self) -> dict:
        measures = {
            name: {"median": json_numbers(self.median(name)), "log10": json_numbers(getattr(self, name))}
            for name in MEASURES
        }
        numbers = {"cut_off": self.cut_off, "spearman": json_numbers(self.spearman)}
        return {"label": self.label, "places": list(self.places), **measures, **numbers}


@dataclass(frozen=True)
class WhatIf:
    """One prompt as it is and under each edit; `str(result)` is a table, `sentence` says what it says."""

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
    def sentence(self) -> str:
        return " ".join(self._said())

    def _said(self) -> list[str]:
        heard, n = self.before.truth_heard, len(self.before.tokens)
        said = [f"As it is, the last token hears {heard:.1f} of {n} tokens (measured)."]
        return said + [_in_words(self.before, *pair) for pair in zip(self.after, self.changes, strict=True)]

    def to_dict(self) -> dict:
        return {
            "kind": "what_if",
            "about": self.about.to_dict(),
            "sentence": self.sentence,
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
        console = Console(
            file=io.StringIO(), width=118, legacy_windows=False, force_jupyter=False, force_terminal=False
        )
        console.print(table)
        for text in (LEGEND, "", *self._said()):
            console.print(Text(text))
        return console.file.getvalue().rstrip()


HEAD = ("sound\nbound", "estimate", "truth", "ρ", "heard\n(estimate)", "collapse", "rel.")
LEGEND = (
    "Bounds, estimate and truth: median log₁₀ of after over before, over the tokens kept and still heard; the sound "
    "bound is calibrated_full. ρ: rank correlation of the estimated change with the measured one. Heard: effective "
    "number of tokens. Collapse: L1 distance that y moves when the last token is repeated; rel.: in L2, over y's norm."
)


def what_if(
    model: Any,
    prompt: Prompt,
    *edits: Any,
    variant: str = "proof",
    probes: int | None = 16,
    chat: bool = False,
    bos: bool | None = None,
    node_probes: int | None = NODE_PROBES,
    seed: int = 0,
    verify: bool = False,
    memory: int = MEMORY,
    progress: bool = False,
) -> WhatIf:
    """Measure a prompt as it is and again under each edit of `oversquash_lens.edits`, one at a time.

    What each edit does to the bound (`variant`, and the one that always holds), the mean-field estimate, the
    measured sensitivity (`probes` as in `measured_sensitivity`, the same ones throughout, so that differences have
    little noise) and the collapse distance. Every edit is checked before the model runs; three passes each.
    """
    architecture = read_architecture(model)
    _check_options(edits, variant, probes, node_probes)
    tokenized = tokenize(model, prompt, chat=chat, bos=bos)
    prompts = [EditedPrompt(tokenized, tuple(range(len(tokenized.ids))))]
    prompts += [edited_prompt(model, tokenized, edit) for edit in edits]
    for edit, edited in zip((None, *edits), prompts, strict=True):
        _check_room(architecture, edit, len(edited.prompt.ids))

    def measured(edit: Edit | None, edited: EditedPrompt) -> Outcome:
        tokens, places = edited
        with edited_attention(model, edit if edit is not None and edit.attend is not None else None):
            trace = record_tokens(model, tokens, node_probes=node_probes, seed=seed, verify=verify)
            truth = measured_sensitivity(model, tokens.ids, probes=probes, seed=seed, memory=memory)
            repeated, _ = read_alone(Subject.of(model), (*tokens.ids.tolist(), int(tokens.ids[-1])))
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
    return WhatIf(before.estimate.about, before, tuple(after))


def _check_options(edits: Sequence[Any], variant: str, probes: int | None, node_probes: int | None) -> None:
    if not edits:
        raise InputError("expected at least one, such as oversquash_lens.edits.window(32), got no edit")
    for edit in edits:
        if not isinstance(edit, Edit):
            raise InputError(
                "expected one that a function of oversquash_lens.edits makes, such as edits.window(32), got "
                f"{one_line(repr(edit), 60)} as an edit"
            )
        if edit.power is None:
            raise InputError(
                f"expected an edit under which the softmax's derivative is known, got {edit.label}: use it inside "
                "edited_attention(model, edit), with measured_sensitivity and collapse_curve"
            )
    if variant not in VARIANTS:
        raise InputError(f"expected one of {', '.join(VARIANTS)}, got variant {variant!r}")
    check_effort(probes, node_probes)


def _check_room(architecture: Architecture, edit: Edit | None, n: int) -> None:
    """The prompt with its last token repeated must fit, too."""
    if n + 1 > architecture.n_ctx:
        raise InputError(
            f"{'the prompt' if edit is None else edit.label}: {n} tokens came, {n + 1} with the last one repeated; "
            f"this model reads at most n_ctx = {architecture.n_ctx}: shorten the prompt"
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
        f"{outcome.truth_heard:.1f} ({outcome.estimate_heard:.1f})",
        f"{outcome.collapse:.3g}",
        f"{outcome.relative_collapse:.2g}",
    ]


def _in_words(before: Outcome, after: Outcome, change: Change) -> str:
    cut = f"; {change.cut_off} can no longer be heard" if change.cut_off else ""
    times, guess = (10 ** change.median(name) for name in ("truth", "estimate"))
    ranks = "" if math.isnan(change.spearman) else f", and ranks the changes with ρ = {change.spearman:.2f}"
    moves = (
        f"; the collapse distance is {after.collapse / before.collapse:.2f} times as large" if before.collapse else ""
    )
    return (
        f"Under “{after.label}” it hears {after.truth_heard:.1f} of {len(after.tokens)}{cut}; a token is heard "
        f"{times:.2f} times as loud as before (median; the estimate says {guess:.2f}{ranks}){moves}."
    )
