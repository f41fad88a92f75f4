"""Representational collapse: how far apart two prompts end that differ by little, such as one repeated token.

Theorem 4.2/B.3: where positional information decays with distance, a prompt and the same prompt with its last token
repeated end in representations whose distance goes to 0. docs/theory.md, section 6.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from oversquash_lens.capture.prefixes import Ids
from oversquash_lens.capture.subject import Subject
from oversquash_lens.collapse.families import Family, as_family
from oversquash_lens.collapse.pairs import PairRun
from oversquash_lens.collapse.precision import NumberFormat, computing_in, in_format, number_format
from oversquash_lens.errors import InputError, one_line
from oversquash_lens.identity import subject_identity
from oversquash_lens.numerics import json_numbers
from oversquash_lens.parts import RECORDED, Parts
from oversquash_lens.results import About, Result

FORMATS = ("float32", "bfloat16")
CRITERIA = ("epsilon", "bits", "top1")

LAYERED = ("by_layer", "attention_shift", "self_attention")  # [layer, length], the others begin with the length
DEFINITION = 1  # counts up when the same prompts give other numbers than before: curves of two are never mixed
FLOOR_POINTS = 9  # lengths at which the noise floor is measured where none are named, spread over all

Curves = dict[str, Float[Tensor, " length"]]


@dataclass(frozen=True, repr=False)
class CollapseCurve(Result):
    """Distances between the two prompts of each length, one entry per number format (the dicts' key: its name).

    Distances are of y, what the unembedding reads, in y's own units, where nothing else is said; from 0 on.
    """

    family: str
    unit: str
    lengths: tuple[int, ...]
    formats: tuple[NumberFormat, ...]
    l1: Curves
    l2: Curves
    linf: Curves
    relative: Curves
    """`l2` over the norm of the first prompt's y."""
    per_head: dict[str, Float[Tensor, "length head"]]
    """L∞ of the last layer's heads, each taken as z = Σ α v, before W_O: the paper does not say which per-head vector
    it draws; z is what a head itself has read, in coordinates of its own, and needs no weights to be told apart."""
    by_layer: dict[str, Float[Tensor, "layer_plus_1 length"]]
    """Relative L2 of the residual entering each layer (last row: leaving the last one)."""
    logits: Curves
    """Largest change of a logit."""
    bit_equal: dict[str, Bool[Tensor, " length"]]
    """Whether both y are equal to the last bit."""
    top1_agree: dict[str, Bool[Tensor, " length"]]
    """Whether both have the same most likely next token."""
    margin_shift: Curves
    """How much the margin of the best token over the second moved, in spacings of the format at the best logit."""
    attention_shift: dict[str, Float[Tensor, "layer length"]]
    """B.3's own assumption: the total variation δ(α_n, α*_{n+1}) (no ½) of the last attention rows, mean over heads;
    nan where the pair is not `covered`."""
    self_attention: dict[str, Float[Tensor, "layer length"]]
    """α*_{n+1,n+1}, mean over heads; nan as above."""
    noise_floor: Curves
    """`l1` between the same prompt read from the shared pass and from a batch of two; nan where not measured."""
    head_floor: Curves
    """The mean over heads of `per_head`, likewise."""
    covered: Bool[Tensor, " length"]
    """Whether the second prompt is the first with its last token repeated, as B.3 has it."""
    about: About
    notes: tuple[str, ...] = ()

    def _title(self) -> str:
        collapsed = ", ".join(
            f"{name} {'never' if first is None else f'from {first} on'}"
            for name, first in ((name, self.first_collapsed(name)) for name in self.l1)
        )
        return (
            f"Collapse of {self.family!r} at {len(self.lengths)} lengths ({self.unit}), relative distance below "
            f"machine epsilon: {collapsed}. {self.about}"
        )

    def _table(self) -> Mapping[str, Sequence[Any]]:
        """A row for each length and format."""
        columns = ("l1", "l2", "linf", "relative", "logits", "margin_shift", "bit_equal", "top1_agree", "noise_floor")
        table: dict[str, list[Any]] = {name: [] for name in ("length", "format", *columns, "covered")}
        for i, length in enumerate(self.lengths):
            for name in self.l1:
                row = {"length": length, "format": name, "covered": bool(self.covered[i])}
                row |= {key: getattr(self, key)[name][i].item() for key in columns}
                for key, value in row.items():
                    table[key].append(value)
        return table

    def _shown(self, most: int) -> tuple[list[str], list[list[str]], int]:
        """Lengths spread over all."""
        some = self.at([self.lengths[i] for i in _spread(len(self.lengths), max(1, most // len(self.formats)))])
        head, rows, _ = super(CollapseCurve, some)._shown(most)
        return head, rows, len(self.lengths) * len(self.formats)

    def first_collapsed(self, dtype: Any, criterion: str = "epsilon") -> int | None:
        """The length from which on every measured pair is the same to this format; None if the last is not.

        "epsilon": y's relative distance is below the format's machine epsilon. "bits": y is bit-equal. "top1": the
        same next token, its margin over the second moved by less than one rounding of the best logit.
        """
        if criterion not in CRITERIA:
            raise InputError(f"expected one of {', '.join(CRITERIA)}, got criterion {criterion!r}")
        fmt = self._format(dtype)
        same = {
            "epsilon": self.relative[fmt.name] < fmt.epsilon,
            "bits": self.bit_equal[fmt.name],
            "top1": self.top1_agree[fmt.name] & (self.margin_shift[fmt.name] < 1),
        }[criterion]
        apart = (~same).nonzero()
        first = int(apart[-1]) + 1 if len(apart) else 0
        return self.lengths[first] if first < len(self.lengths) else None

    def merging_layer(self, dtype: Any) -> tuple[int | None, ...]:
        """Per length, the first layer from which on the residuals' relative distance stays below machine epsilon."""
        fmt = self._format(dtype)
        same = self.by_layer[fmt.name] < fmt.epsilon
        stays = same.flip(0).long().cumprod(0).sum(0)
        layers = len(same)
        return tuple(layers - int(count) if count else None for count in stays)

    def at(self, lengths: Sequence[int]) -> CollapseCurve:
        """The same curve at some of its lengths."""
        at = [self.lengths.index(k) for k in _among(self.lengths, lengths)]
        fields: dict[str, Any] = {
            key: {name: values[:, at] if key in LAYERED else values[at] for name, values in curve.items()}
            for key, curve in vars(self).items()
            if isinstance(curve, dict)
        }
        return replace(self, lengths=tuple(lengths), covered=self.covered[at], **fields)

    def _format(self, dtype: Any) -> NumberFormat:
        fmt = number_format(dtype)
        if fmt not in self.formats:
            raise InputError(
                f"expected one of the formats that this curve holds, {', '.join(self.l1)}, got dtype {fmt.name!r}: "
                "measure this one too (dtypes=)"
            )
        return fmt

    def to_dict(self) -> dict:
        """Every field, and from which length on each format has collapsed by each of `CRITERIA`, as JSON takes them."""
        plain = {"family": self.family, "unit": self.unit, "lengths": list(self.lengths), "notes": list(self.notes)}
        named = {
            key: {
                name: json_numbers(values) if values.is_floating_point() else values.tolist()
                for name, values in curve.items()
            }
            for key, curve in vars(self).items()
            if isinstance(curve, dict)
        }
        collapsed = {c: {name: self.first_collapsed(name, c) for name in self.l1} for c in CRITERIA}
        covered = {"covered": self.covered.tolist(), "about": self.about.to_dict()}
        return {"kind": "collapse", **plain, **named, **covered, "first_collapsed": collapsed}


def collapse_curve(
    model: Any,
    family: Any,
    lengths: Sequence[Any] = (1, 11, 101),
    dtypes: Sequence[Any] = FORMATS,
    *,
    noise_floor: bool | Sequence[int] = False,
    share: bool = True,
    progress: bool = False,
) -> CollapseCurve:
    """Measure how far apart a family's two prompts end, at every length and in every number format.

    - `model`: a HookedTransformer or TransformerBridge; it is as it was afterwards.
    - `family`: a `Family` (see `oversquash_lens.families`), any function length -> token ids, then paired with itself
      one further on, or a tuple of two prompts' token ids.
    - `lengths`: increasing whole numbers from 1 on.
    - `dtypes`: what computes, and what is only stored or quantised: "float32", "bfloat16",
      "float32:store=float8_e4m3", "float32:weights=int4"; "float64" is float64 all through, where a model class asks
      for float32 too.
    - `noise_floor`: measure what rounding alone makes, at a few lengths or at those named; each costs a pass.
    - `share`: read prompts that begin one another off one forward pass, and run endings that differ against its
      key/value cache; False runs each prompt by itself.
    - `progress`: show a bar.

    Raises InputError for a family, lengths or formats that cannot be used with this model, HookMismatchError where a
    format overflows.
    """
    subject = Subject.of(model)
    subject.require("collapse")
    formats = tuple(dict.fromkeys(number_format(each) for each in dtypes))
    if not formats:
        raise InputError("expected at least one, such as 'float32', got no dtypes")
    chosen = as_family(family)
    lengths = _check_lengths(lengths)
    pairs = readable_pairs(subject, chosen, lengths)
    floor_at = _floor_lengths(noise_floor, lengths)
    runs: dict[NumberFormat, list[NumberFormat]] = {}
    for one in formats:
        runs.setdefault(replace(one, storage=None), []).append(one)
    found: dict[str, dict[str, Tensor]] = {}
    shared = True
    for computing, stores in tqdm(runs.items(), desc=chosen.name, unit="format", disable=not progress, leave=False):
        with subject.surroundings(), computing_in(subject.model, computing), subject.failures_named("reading"):
            run = PairRun(in_format(subject, computing), pairs, share)
            repeated = run.repeat([lengths.index(k) for k in floor_at])
            for one in stores:
                found[one.name] = {**run.distances(one), **run.floors(one, repeated)}
            shared &= run.readings.shared or not share
    fields: dict[str, Any] = {
        key: {one.name: found[one.name][key] for one in formats} for key in found[formats[0].name]
    }
    return CollapseCurve(
        family=chosen.name,
        unit=chosen.unit,
        lengths=lengths,
        formats=formats,
        covered=run.covered,
        about=_described(subject, pairs),
        notes=_notes(chosen.note, run.covered, shared),
        **fields,
    )


def _check_lengths(lengths: Sequence[Any]) -> tuple[int, ...]:
    lengths = lengths if isinstance(lengths, Iterable) else [lengths]
    try:
        found = tuple(map(operator.index, lengths))
    except TypeError:
        found = ()
    if not found or found[0] < 1 or found != tuple(sorted(set(found))):
        raise InputError(
            f"expected increasing whole numbers from 1 on, at least one, got lengths {one_line(list(lengths), 60)}"
        )
    return found


def _floor_lengths(noise_floor: bool | Sequence[int], lengths: Sequence[int]) -> Sequence[int]:
    if not isinstance(noise_floor, bool):
        return _among(lengths, noise_floor)
    return [lengths[i] for i in _spread(len(lengths), FLOOR_POINTS if noise_floor else 0)]


def _spread(total: int, most: int) -> list[int]:
    """At most so many indices below `total`, the first and the last among them, spread evenly.

    >>> _spread(10, 4), _spread(2, 4), _spread(10, 0)
    ([0, 3, 6, 9], [0, 1], [])
    """
    some = min(most, total)
    return sorted({round(step * (total - 1) / max(some - 1, 1)) for step in range(some)})


def _among(lengths: Sequence[int], asked: Sequence[int]) -> Sequence[int]:
    if missing := sorted(set(asked) - set(lengths)):
        raise InputError(f"expected some of the curve's own, got lengths {one_line(missing, 60)}")
    return asked


def readable_pairs(model: Any, family: Family, lengths: Sequence[int]) -> list[tuple[Ids, Ids]]:
    """The family's pairs; made one by one, so that the first that this model cannot read is also the last made."""
    subject = Subject.of(model)
    n_ctx, d_vocab = subject.architecture.n_ctx, subject.model.cfg.d_vocab
    pairs: list[tuple[Ids, Ids]] = []
    for k in lengths:
        (pair,) = family.pairs([k])
        longest = max(map(len, pair))
        if longest > n_ctx:
            fits = "no length that fits came before it, give shorter ones"
            if pairs:
                fits = f"{lengths[len(pairs) - 1]} is the longest that fits, leave out those beyond"
            raise InputError(
                f"expected at most n_ctx = {n_ctx} tokens, this model's, got family {family.name!r}: length {k} makes "
                f"{longest} tokens: {fits}"
            )
        for odd in {min(map(min, pair)), max(map(max, pair))}:
            if not 0 <= odd < d_vocab:
                raise InputError(
                    f"expected ids in 0 … {d_vocab - 1}, this model's vocabulary, got family "
                    f"{family.name!r}: token id {odd}"
                )
        pairs.append(pair)
    return pairs


def _described(subject: Subject, pairs: Sequence[tuple[Ids, Ids]]) -> About:
    """The label, which says BOS where every first prompt begins with it, and twice where one has it twice."""
    begin = getattr(getattr(subject.model, "tokenizer", None), "bos_token_id", None)
    bos = begin is not None and all(first[0] == begin for first, _ in pairs)
    doubled = bos and any(tuple(first[:2]) == (begin, begin) for first, _ in pairs)
    return subject.about.with_prompt(bos=bos, chat=False, doubled_bos=doubled)


def _notes(note: str, covered: Bool[Tensor, " length"], shared: bool) -> tuple[str, ...]:
    notes = [note] if note else []
    if not covered.all():
        notes.append(
            f"{int((~covered).sum())} of {len(covered)} pairs are outside Theorem B.3: their second prompt is not the "
            "first with its last token repeated"
        )
    if not shared:
        notes.append("the key/value cache did not answer as whole passes do; prompts that branch off were run whole")
    return tuple(notes)


COLUMNS = {"format": "word", "about": "word", "notes": "words", "tensors": "bytes"}  # tensors: safetensors
Kept = tuple[dict[str, Any], tuple[str, ...], dict[str, Tensor]]  # about, notes, tensors of one format


def kept_curve(
    model: Any,
    family: Family,
    lengths: Sequence[int],
    dtypes: Sequence[Any],
    *,
    noise_floor: bool = False,
    out: str | os.PathLike | None = None,
    progress: bool = False,
) -> CollapseCurve:
    """As `collapse_curve`, each format's curve kept in the parquet file `out` as it is made.

    `out`: what is in it already is not made again; curves of another model, family or other lengths are refused with
    an InputError, and so is a file of something else. None keeps nothing. The other arguments are `collapse_curve`'s.
    """
    formats = tuple(dict.fromkeys(number_format(each) for each in dtypes))
    groups: dict[NumberFormat, list[NumberFormat]] = {}
    for one in formats:  # what computes alike is run once
        groups.setdefault(replace(one, storage=None), []).append(one)
    found: dict[str, Kept] = {}
    parts = None if out is None else Parts(out, _settings(model, family, lengths, noise_floor), COLUMNS)
    with nullcontext() if parts is None else parts:
        if parts is not None:
            found |= {row["format"]: _kept(row) for row in parts.rows()}
        for group in groups.values():
            if missing := [one for one in group if one.name not in found]:
                curve = collapse_curve(model, family, lengths, missing, noise_floor=noise_floor, progress=progress)
                made = {one.name: _part(curve, one) for one in missing}
                if parts is not None:
                    parts.add([_row(name, part) for name, part in made.items()])
                found |= made
        if parts is not None:
            parts.finish()
    return _joined([found[one.name] for one in formats], family, lengths, formats)


def _settings(model: Any, family: Family, lengths: Sequence[int], noise_floor: bool) -> dict[str, Any]:
    """What a kept curve depends on."""
    subject = Subject.of(model)
    pairs = readable_pairs(subject.model, family, lengths)
    return {
        **{"kind": "collapse", "definition": DEFINITION, "model": subject_identity(subject)},
        **{"family": family.name, "lengths": list(lengths), "noise floor": noise_floor},
        "pairs": hashlib.sha256(repr(pairs).encode()).hexdigest(),
        RECORDED: {"versions": subject.about.versions},
    }


def _part(curve: CollapseCurve, fmt: NumberFormat) -> Kept:
    """One format's part of a curve, to the last bit."""
    tensors = {name: each[fmt.name].contiguous() for name, each in vars(curve).items() if isinstance(each, dict)}
    return asdict(curve.about), curve.notes, tensors | {"covered": curve.covered}


def _row(name: str, part: Kept) -> dict[str, Any]:
    from safetensors.torch import save

    about, notes, tensors = part
    return {"format": name, "about": json.dumps(about), "notes": list(notes), "tensors": save(tensors)}


def _kept(row: dict[str, Any]) -> Kept:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        about, tensors = json.loads(row["about"]), load(row["tensors"])
        About(**about)
        return about, tuple(row["notes"]), {"covered": tensors["covered"], **tensors}
    except (KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        name = one_line(repr(row["format"]), 60)
        raise InputError(f"the curve kept as {name} is damaged; expected what was kept: delete its file") from error


def _joined(
    parts: Sequence[Kept], family: Family, lengths: Sequence[int], formats: tuple[NumberFormat, ...]
) -> CollapseCurve:
    about, _, first = parts[0]
    names = [name for name in first if name != "covered"]
    return CollapseCurve(
        family=family.name,
        unit=family.unit,
        lengths=tuple(lengths),
        formats=formats,
        covered=first["covered"],
        about=About(**about),
        notes=tuple(dict.fromkeys(note for _, notes, _ in parts for note in notes)),
        **{
            name: {one.name: tensors[name] for one, (_, _, tensors) in zip(formats, parts, strict=True)}
            for name in names
        },
    )
