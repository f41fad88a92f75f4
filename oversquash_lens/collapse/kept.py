"""A collapse curve made one compute format at a time, each kept when it is done: a broken-off run goes on from it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from oversquash_lens.capture.about import About
from oversquash_lens.capture.subject import Subject
from oversquash_lens.collapse.curve import CollapseCurve, collapse_curve, readable_pairs
from oversquash_lens.collapse.families import Family
from oversquash_lens.collapse.precision import NumberFormat, number_format
from oversquash_lens.parts import Parts

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
    about = subject.about
    pairs = readable_pairs(subject.model, family, lengths)
    return {
        **{"model": about.model, "class": about.model_class, "weights": about.dtype, "versions": about.versions},
        **{"family": family.name, "lengths": list(lengths), "noise floor": noise_floor},
        "pairs": hashlib.sha256(repr(pairs).encode()).hexdigest(),
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
    from safetensors.torch import load

    return json.loads(row["about"]), tuple(row["notes"]), load(row["tensors"])


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
