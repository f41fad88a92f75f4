"""Replace a token, a word or a whole paragraph by another one, and see how far the prediction moves.

The finite effect of position i: Δ_i = y_n(prompt with i replaced) − y_n(prompt), over several replacements. It is what
representational collapse measures for one family of prompts (`collapse_curve`), with the same passes: the prompt runs
once, and each replaced prompt runs its own ending against the keys and values of the part before it.

Where the endings are too many, node substitution recomputes only i, the few tokens behind it and the last ones; every
other position keeps the keys and values of the ordinary pass. Nothing is linearised, and its cost does not grow with
the prompt. It is exact where these positions are everything behind i.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from oversquash_lens.capture.hooked_model import is_hooked_transformer
from oversquash_lens.capture.prefixes import Branch, Ids
from oversquash_lens.capture.readings import logits_of, predictions, read_substituted
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import Prompt
from oversquash_lens.collapse.precision import NumberFormat, computing_in, in_format, number_format, stored
from oversquash_lens.errors import InputError, ModelError, one_line, whole_number
from oversquash_lens.identity import subject_identity
from oversquash_lens.jacobian.targets import Target, target_of
from oversquash_lens.numerics import json_numbers, kl_divergence
from oversquash_lens.parts import RECORDED, Parts
from oversquash_lens.results import About, Result
from oversquash_lens.swaps.replacements import Chances, Span, given_replacements, spans_of

METHODS = ("auto", "exact", "nodes")
BEHIND, LAST = 3, 4  # node substitution recomputes so many tokens behind the one replaced, and before the last one
BUDGET = 200_000  # tokens of replaced endings that "auto" runs exactly: about 220 tokens of prompt, 8 draws each
AT_ONCE = 1024  # replaced prompts whose last tokens are held at a time
LOGITS = 64  # of which so many distributions over the vocabulary at a time
# Spearman's ρ with the real effect over the positions of a prompt, median of nine prompts that had no part in choosing
# BEHIND and LAST; half of the draws reaches 0.82 to 0.90 with the other half.
NODES_RHO = {2: 0.72, 4: 0.79}


@dataclass(frozen=True, repr=False)
class Substitution(Result):
    """How far the prediction moves when a token, or a span of them, is really replaced; one row a span."""

    tokens: tuple[str, ...]
    spans: tuple[Span, ...]
    """Positions start … stop-1 that are replaced together."""
    replacements: tuple[tuple[Ids, ...], ...]
    """The ids that each draw puts there, [span][draw]."""
    plausible: tuple[bool, ...]
    """Of each draw, whether it is from the model's own prediction at that place; else uniform over the vocabulary."""
    distances: Float[Tensor, "span draw"]
    """‖Δy_n‖₂, in units of y."""
    kls: Float[Tensor, "span draw"]
    """KL divergence of the replaced prompt's next-token distribution from the prompt's, in nats."""
    kept: Bool[Tensor, "span draw"]
    """Whether the likeliest next token is the same."""
    effects: Float[Tensor, "span draw"]
    """The target's change, in logits or nats; nan without one."""
    arrival: Float[Tensor, "layer_plus_1 span"]
    """‖Δx_n⁽ˡ⁾‖/‖x_n⁽ˡ⁾‖, mean over draws: where in the model the last token learns of it."""
    collapsed: Mapping[str, Float[Tensor, " span"]]
    """By number format, the share of draws whose y differs by less than the format's machine epsilon of its size."""
    size: float
    """‖y_n‖ of the prompt itself."""
    target: str
    method: str
    """"exact" or "nodes"."""
    method_reason: str
    about: About

    @property
    def distance(self) -> Float[Tensor, " span"]:
        """Geometric mean of `distances` over draws: of all means the one that other draws repeat best."""
        return self.distances.log().mean(-1).exp()

    @property
    def mean_distance(self) -> Float[Tensor, " span"]:
        """Arithmetic mean of `distances` over draws."""
        return self.distances.mean(-1)

    @property
    def relative(self) -> Float[Tensor, " span"]:
        """`distance` over ‖y_n‖."""
        return self.distance / self.size

    @property
    def share(self) -> Float[Tensor, " span"]:
        """Each span's part of the sum of `distance`; sums to 1."""
        return self.distance / self.distance.sum()

    @property
    def kl(self) -> Float[Tensor, " span"]:
        """Mean of `kls` over draws."""
        return self.kls.mean(-1)

    @property
    def effect(self) -> Float[Tensor, " span"]:
        """Mean of `effects` over draws."""
        return self.effects.mean(-1)

    @property
    def kept_share(self) -> Float[Tensor, " span"]:
        """Share of draws that leave the likeliest next token as it is."""
        return self.kept.double().mean(-1)

    def of(self, plausible: bool) -> Substitution:
        """The same by the plausible draws alone, or by the uniform ones: they answer different questions."""
        at = [i for i, each in enumerate(self.plausible) if each == plausible]
        if not at:
            raise InputError(f"expected some {'plausible' if plausible else 'uniform'} draws, got none: draw more")
        drawn = {name: getattr(self, name)[:, at] for name in ("distances", "kls", "kept", "effects")}
        texts = tuple(tuple(row[i] for i in at) for row in self.replacements)
        return replace(self, replacements=texts, plausible=(plausible,) * len(at), **drawn)

    _ranked_by = "distance"

    def _title(self) -> str:
        n = len(self.tokens)
        many = f"{len(self.spans)} of {n} tokens" if all(b - a == 1 for a, b in self.spans) else f"spans of {n} tokens"
        of = f"; target: {self.target}" if self.target else ""
        return (
            f"{many}, each replaced {len(self.plausible)} times ({self.method}: {self.method_reason}){of}; {self.about}"
        )

    def _table(self) -> Mapping[str, Sequence[Any]]:
        texts = ["".join(self.tokens[a:b]) for a, b in self.spans]
        columns = ("distance", "relative", "kl", "kept_share", *(["effect"] if self.target else []))
        numbers = {name: getattr(self, name).tolist() for name in columns}
        return {"position": [a for a, _ in self.spans], "stop": [b for _, b in self.spans], "text": texts, **numbers}

    def to_dict(self) -> dict[str, Any]:
        """Every field and the means, as JSON takes them."""
        tensors = (*DRAWN, "arrival", "distance", "mean_distance", "relative", "kl", "effect", "kept_share")
        plain = {name: getattr(self, name) for name in ("size", "target", "method", "method_reason")}
        lists = {name: list(getattr(self, name)) for name in ("tokens", "spans", "plausible", "replacements")}
        numbers = {name: json_numbers(getattr(self, name).double()) for name in tensors}
        collapsed = {name: json_numbers(each) for name, each in self.collapsed.items()}
        about = {"about": self.about.to_dict()}
        return {"kind": "substitution", **lists, **plain, **numbers, "collapsed": collapsed, **about}


DRAWN = ("distances", "kls", "kept", "effects")


def substitution(
    model: Any,
    prompt: Prompt,
    positions: Sequence[Any] | None = None,
    draws: int = 8,
    method: str = "auto",
    *,
    replacements: Sequence[Sequence[Any]] | None = None,
    target: Any = None,
    dtypes: Sequence[Any] = (),
    out: str | os.PathLike | None = None,
    chat: bool = False,
    bos: bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Substitution:
    """Replace tokens of a prompt by others and measure how far the prediction moves.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks of your own stay on.
        prompt: a text, or token ids [pos] or [1, pos].
        positions: what to replace: positions, texts of tokens, or slices, each of which is one span that is replaced
            as a whole (a word, a sentence, a retrieved paragraph); None for every token by itself.
        draws: replacements of each, the first half uniform over the vocabulary, the other half from the model's own
            prediction at that place (the first token's are all uniform); never the token itself.
        method: "exact" runs every replaced prompt, "nodes" recomputes single tokens and their neighbours only (see the
            module's docstring), "auto" is exact up to 200,000 tokens of replaced endings, then nodes where it can be.
        replacements: given instead of drawn: for each position a list of token ids, texts, or (of spans) lists of ids,
            of as many tokens as they replace.
        target: a number of the prediction whose change is reported too, as `measured_sensitivity` takes it.
        dtypes: number formats, as `collapse_curve` takes them, in which replaced prompts are compared besides the
            model's own; one that computes otherwise runs everything again.
        out: a parquet file that keeps what was measured as it comes; the same call goes on with it after a crash.
        chat: as `record` takes it, and so is bos.
        seed: of the draws; the global random state is left alone.
        progress: show a bar.

    Returns:
        A `Substitution`: distances, divergences and effects [span, draw], and their means.

    Raises:
        InputError: a position, a replacement or a target that cannot be used.
        ModelError: method="nodes" for a model whose positions cannot be recomputed alone.
    """
    whole_number("draws", draws)
    if method not in METHODS:
        raise InputError(f"expected one of {', '.join(METHODS)}, got method={one_line(repr(method), 60)}")
    subject = Subject.of(model)
    tokenized = subject.tokenize(prompt, chat=chat, bos=bos)
    base: Ids = tuple(tokenized.ids.tolist())
    spans = spans_of(tokenized, positions)
    formats = tuple(number_format(each) for each in dtypes)
    y, logits = predictions(subject, base)
    check_logits(subject, y, logits)
    chosen = None if target is None else target_of(subject.model, target, logits)
    if replacements is None:
        chances = Chances(subject, y, base)
        plausible = tuple(draw >= (draws + 1) // 2 for draw in range(draws))
        texts = tuple(chances.drawn(span, plausible, seed) for span in spans)
    else:
        texts = given_replacements(subject, tokenized, spans, replacements)
        plausible = (False,) * len(texts[0])
    way, reason = _choose(subject, base, spans, len(plausible), method)
    run = _Run(subject, base, spans, texts, way, chosen, formats)
    fields = _measured(run, out, progress)
    return Substitution(
        tokens=tokenized.tokens,
        spans=spans,
        replacements=texts,
        plausible=plausible,
        size=y[-1].double().norm().item(),
        target="" if chosen is None else chosen.label,
        method=way,
        method_reason=reason,
        about=tokenized.described(subject.about),
        collapsed={name[len(COLLAPSED) :]: fields.pop(name) for name in [*fields] if name.startswith(COLLAPSED)},
        **fields,
    )


def check_logits(subject: Subject, y: Float[Tensor, "pos d_model"], logits: Float[Tensor, " d_vocab"]) -> None:
    """What the distributions are made of must be what the model itself predicts."""
    ours = logits_of(subject, y[-1:])[0]
    off = ((ours - logits).abs().max() / logits.abs().max().clamp(min=1e-6)).item()
    if not off <= (1e-3 if logits.dtype.itemsize >= 4 and subject.architecture.dtype.itemsize >= 4 else 0.05):
        raise ModelError(
            f"{subject.about.model} does something to its logits behind the unembedding that is not known here (they "
            f"differ by {off:.2g} of the largest); expected a cap or a factor that its config names"
        )


# ------------------------------------------------------------ how it is run


def _choose(subject: Subject, base: Ids, spans: Sequence[Span], draws: int, method: str) -> tuple[str, str]:
    """ "exact" or "nodes", and why."""
    cost = draws * sum(len(base) - start for start, _ in spans)
    obstacle = _why_no_nodes(subject, spans)
    if method == "nodes":
        if obstacle:
            raise ModelError(
                f'expected single tokens of a model that takes positions and a mask, for {obstacle}: "exact"'
            )
        return "nodes", f"asked for; {_expected(draws)}"
    if method == "exact":
        return "exact", "asked for"
    if cost <= BUDGET:
        return "exact", f"{cost:,} tokens of replaced endings"
    if obstacle:
        return "exact", f"{cost:,} tokens of replaced endings, and nodes are no choice: {obstacle}"
    return "nodes", f"instead of {cost:,} tokens of replaced endings; {_expected(draws)}"


def _expected(draws: int) -> str:
    known = max((each for each in NODES_RHO if each <= draws), default=None)
    return "" if known is None else f"ranks the real effects at about ρ = {NODES_RHO[known]:.2f}"


def _why_no_nodes(subject: Subject, spans: Sequence[Span]) -> str:
    if any(stop - start > 1 for start, stop in spans):
        return "spans are replaced as wholes"
    if subject.architecture.biased and not is_hooked_transformer(subject.model):
        return "its scores have a bias that is counted from a mask of two axes"
    return ""


@dataclass(frozen=True)
class _Run:
    """All replaced prompts of one call."""

    subject: Subject
    base: Ids
    spans: tuple[Span, ...]
    texts: tuple[tuple[Ids, ...], ...]
    method: str
    target: Target | None
    formats: tuple[NumberFormat, ...]

    def groups(self) -> list[range]:
        """Indices of spans that are read together."""
        size = max(1, AT_ONCE // len(self.texts[0]))
        return [range(at, min(at + size, len(self.spans))) for at in range(0, len(self.spans), size)]

    def identity(self) -> dict[str, Any]:
        """What the numbers depend on."""
        target = None if self.target is None else vars(self.target)
        return {
            **{"what": "substitution", "definition": DEFINITION, "model": subject_identity(self.subject)},
            **{"ids": self.base, "spans": self.spans, "replacements": self.texts, "method": self.method},
            **{"target": target, "formats": [each.name for each in self.formats]},
            RECORDED: {"versions": self.subject.about.versions},
        }

    def branches(self, group: range) -> list[Branch]:
        return [self._branch(self.spans[i], new) for i in group for new in self.texts[i]]

    def _branch(self, span: Span, new: Ids) -> Branch:
        start, stop = span
        n = len(self.base)
        if self.method == "exact" or n - start <= BEHIND + LAST + 2:
            return Branch(start, (*new, *self.base[stop:]))
        behind = (*range(start, start + BEHIND + 1), *range(n - 1 - LAST, n))
        return Branch(start, (*new, *(self.base[i] for i in behind[1:])), behind)

    def measure(self, group: range) -> dict[str, Tensor]:
        """The fields of a `Substitution` for some spans, those along spans by their first axis."""
        draws = len(self.texts[0])
        found = read_substituted(self.subject, self.base, self.branches(group))
        y = found.prediction_input
        moved = (y[1:] - y[0]).double().norm(dim=-1).cpu().view(len(group), draws)
        residuals = found.residuals.double()
        change = (residuals[:, 1:] - residuals[:, :1]).norm(dim=-1) / residuals[:, :1].norm(dim=-1)
        fields = {
            "distances": moved,
            "arrival": change.view(len(change), len(group), draws).mean(-1).T.cpu(),
            **{name: each.view(len(group), draws) for name, each in self._predicted(y).items()},
        }
        own = number_format(str(self.subject.architecture.dtype).removeprefix("torch."))
        computed = {own: y}
        for fmt in (own, *self.formats):
            computing = replace(fmt, storage=None)
            if computing not in computed:
                with computing_in(self.subject.model, computing):
                    subject = in_format(self.subject, computing)
                    computed[computing] = read_substituted(subject, self.base, self.branches(group)).prediction_input
            collapsed = _collapsed(computed[computing], fmt).double()
            fields[COLLAPSED + fmt.name] = collapsed.view(len(group), draws).mean(-1)
        return fields

    def _predicted(self, y: Float[Tensor, "sequence d_model"]) -> dict[str, Tensor]:
        """KL, whether the top token stayed, and the target's change, of every sequence but the first."""
        before = logits_of(self.subject, y[:1])
        log_p, top = before[0].double().log_softmax(-1), before.argmax(-1)
        parts: dict[str, list[Tensor]] = {"kls": [], "kept": [], "effects": []}
        for some in y[1:].split(LOGITS):
            logits = logits_of(self.subject, some)
            log_q = logits.double().log_softmax(-1)
            parts["kls"].append(kl_divergence(log_p, log_q).cpu())
            parts["kept"].append((logits.argmax(-1) == top).cpu())
            effect = torch.full((len(some),), math.nan, dtype=torch.float64, device="cpu")
            if self.target is not None:
                effect = (self.target.of(logits) - self.target.of(before)).double().cpu()
            parts["effects"].append(effect)
        return {name: torch.cat(each) for name, each in parts.items()}


def _collapsed(y: Float[Tensor, "sequence d_model"], fmt: NumberFormat) -> Bool[Tensor, " row"]:
    """Whether each but the first is the first to this format's machine epsilon."""
    values = stored(y, fmt)
    change = (values[1:] - values[0]).norm(dim=-1) / values[0].norm()
    return (change < fmt.epsilon).cpu()


COLLAPSED = "collapsed "
DEFINITION = 1  # of what is kept; a change of what the numbers mean counts it up
COLUMNS = {"span": "number", "tensors": "bytes"}  # tensors: safetensors


def _measured(run: _Run, out: Any, progress: bool) -> dict[str, Tensor]:
    """Every group's fields, put together; what the file `out` has already is not made again."""
    from safetensors.torch import load, save

    parts = None if out is None else Parts(out, run.identity(), COLUMNS)
    with nullcontext() if parts is None else parts:
        found = {} if parts is None else {row["span"]: load(row["tensors"]) for row in parts.rows()}
        for group in tqdm(run.groups(), desc="replacing", unit="group", disable=not progress, leave=False):
            if group.start not in found:
                found[group.start] = {name: each.contiguous() for name, each in run.measure(group).items()}
                if parts is not None:
                    parts.add([{"span": group.start, "tensors": save(found[group.start])}])
        if parts is not None:
            parts.finish()
    fields = {name: torch.cat([found[group.start][name] for group in run.groups()]) for name in found[0]}
    return fields | {"arrival": fields["arrival"].T}
