"""A collapse curve made one compute format at a time, each kept when it is done: a broken-off run goes on from it."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from oversquash_lens.capture.about import About
from oversquash_lens.capture.architecture import describe, read_architecture
from oversquash_lens.collapse.curve import CollapseCurve, collapse_curve, readable_pairs
from oversquash_lens.collapse.families import Family
from oversquash_lens.collapse.precision import NumberFormat, number_format
from oversquash_lens.paper.runs import AnswerFile


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
    """As `collapse_curve`, each format's curve appended to the file `out`; what is in it already is not made again."""
    formats = tuple(dict.fromkeys(number_format(each) for each in dtypes))
    about = describe(model, read_architecture(model))
    pairs = readable_pairs(model, family, lengths)
    settings = {
        **{"model": about.model, "class": about.model_class, "weights": about.dtype, "versions": about.versions},
        **{"family": family.name, "lengths": list(lengths), "noise floor": noise_floor},
        "pairs": hashlib.sha256(repr(pairs).encode()).hexdigest(),
    }
    groups: dict[NumberFormat, list[NumberFormat]] = {}
    for one in formats:  # what computes alike is run once
        groups.setdefault(replace(one, storage=None), []).append(one)
    with AnswerFile(out, settings) as file:
        for group in groups.values():
            missing = [one for one in group if (one.name,) not in file.answers]
            if missing:
                curve = collapse_curve(model, family, lengths, missing, noise_floor=noise_floor, progress=progress)
                file.append([((one.name,), _packed(curve, one)) for one in missing])
        return _joined([file.answers[one.name,] for one in formats], family, lengths, formats)


def _packed(curve: CollapseCurve, fmt: NumberFormat) -> dict[str, Any]:
    """One format's part of a curve as JSON, to the last bit; a number format's name is the key of its tensors."""
    tensors = {name: each[fmt.name] for name, each in vars(curve).items() if isinstance(each, dict)}
    about, notes = asdict(curve.about), list(curve.notes)
    return {
        "tensors": {name: _text(tensor) for name, tensor in (tensors | {"covered": curve.covered}).items()},
        "about": about,
        "notes": notes,
    }


def _joined(
    parts: Sequence[dict[str, Any]], family: Family, lengths: Sequence[int], formats: tuple[NumberFormat, ...]
) -> CollapseCurve:
    tensors = [{name: _tensor(text) for name, text in part["tensors"].items()} for part in parts]
    names = [name for name in tensors[0] if name != "covered"]
    return CollapseCurve(
        family=family.name,
        unit=family.unit,
        lengths=tuple(lengths),
        formats=formats,
        covered=tensors[0]["covered"],
        about=About(**parts[0]["about"]),
        notes=tuple(dict.fromkeys(note for part in parts for note in part["notes"])),
        **{name: {one.name: held[name] for one, held in zip(formats, tensors, strict=True)} for name in names},
    )


def _text(tensor: Tensor) -> list[Any]:
    """[dtype, shape, bytes in base64]: JSON's own numbers have neither nan nor infinity."""
    tensor = tensor.contiguous()
    data = base64.b64encode(tensor.numpy().tobytes()).decode("ascii")
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), data]


def _tensor(text: list[Any]) -> Tensor:
    dtype, shape, data = text
    return torch.frombuffer(bytearray(base64.b64decode(data)), dtype=getattr(torch, dtype)).reshape(shape)
