"""What a kept result depends on: a model's identity, in which no change that moves a number goes unseen."""

from __future__ import annotations

import functools
import hashlib
import json
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from oversquash_lens.capture.hooked_model import wrapped_model
from oversquash_lens.capture.hooks import KINDS, full_precision, hooks_on, named_modules
from oversquash_lens.capture.proof import listening, proof_ids
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import TOKENS
from oversquash_lens.results import software_versions

CHUNK = 1 << 22  # numbers of a weight at a time
MASK = 1 << 16  # numbers of a buffer of whole numbers
PROJECTIONS = 16  # numbers kept of y, and as many of the log-probabilities
# Of these, each the size of 1: what other processors' rounding makes of it; weights themselves compare exactly.
APART = {torch.float64: 1e-7, torch.float32: 3e-4}
COARSE = 0.1  # in formats of 16 bits
TEXT = 'The 3 cats,\n\t"naïve" 漢字 don\'t  sit: x_1 = 2.50; </s> <s>'
DEPTH = 5  # of functions in closures of functions …


def subject_identity(subject: Subject) -> dict[str, Any]:
    """`model_identity` of a subject, with its label and the settings that its architecture was read from."""
    about, architecture = subject.about, subject.architecture
    plain = {k: v for k, v in vars(architecture).items() if isinstance(v, str | int | float | bool | tuple | None)}
    plain = {k: v for k, v in plain.items() if k not in ("name", "fused_obstacle")}
    label = {"model": about.model, "class": about.model_class, "dtype": about.dtype}
    return label | {"architecture": _digest(plain)} | model_identity(subject.model, subject.model.tokenizer)


@torch.no_grad()
def model_identity(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What numbers of a model depend on, as JSON, for any model of torch: two that are equal here compute the same.

    A sum over every bit of the weights, and the code, constants and tensors of hooks and edits, compare exactly; what
    the model makes of the proof's tokens under its hooks, and its buffers, compare within a tolerance, so that other
    processors agree. The tokenizer is known by what it makes of a text.
    """
    owners = [owner for owner in (model, wrapped_model(model)) if isinstance(owner, nn.Module)]
    weights = _each_once(pair for owner in owners for pair in nn.Module.named_parameters(owner))
    buffers = _each_once(pair for owner in owners for pair in nn.Module.named_buffers(owner))
    tables = {name: buffer for name, buffer in buffers.items() if buffer.is_floating_point() and not buffer.is_meta}
    whole = weights | {name: _thinned(buffer) for name, buffer in buffers.items() if name not in tables}
    means = [_projected(table.detach().cpu().double(), 1) for _, table in sorted(tables.items())]
    dtype = next(iter(model.parameters())).dtype
    versions = software_versions()
    for name in ("python", "oversquash-lens"):  # measures have numbers of definition instead
        versions.pop(name)
    return {
        "weights": _digest({name: _checksum(weight) for name, weight in whole.items()}),
        "hooks": _hooks(model),
        "computes": {"values": _outputs(model, tokenizer), "tolerance": APART.get(dtype, COARSE)},
        "buffers": {"values": [each for row in means for each in row], "tolerance": APART[torch.float32]},
        "tokenizer": _digest(_spelling(model, tokenizer)),
        "versions": versions,
    }


def _each_once(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    found = {id(weight): (name, weight) for name, weight in named if weight.numel()}
    return dict(found.values())


def _thinned(buffer: Tensor) -> Tensor:
    """Of a mask of all positions by all positions, in every layer, as many numbers as are looked at quickly."""
    return buffer.reshape(-1)[:: max(1, buffer.numel() // MASK)]


def _digest(found: Any) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True, default=repr).encode()).hexdigest()[:32]


def _checksum(weight: Tensor) -> list[Any]:
    """Shape, type, and a sum of all its bits that knows their places; exact on every device."""
    flat = torch.view_as_real(weight) if weight.is_complex() else weight
    found = [list(weight.shape), str(weight.dtype)]
    if weight.is_meta or not weight.numel() or weight.layout != torch.strided:
        return found
    flat = flat.detach().reshape(-1)
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.dtype.itemsize])
    total = 0
    for start in range(0, len(bits), CHUNK):
        some = bits[start : start + CHUNK].long()
        total += int((some * torch.arange(2 * start + 1, 2 * (start + len(some)), 2, device=some.device)).sum())
    return [*found, total % 2**64]


def _projected(table: Tensor, count: int) -> list[float]:
    """A table's size-free products with fixed rows of signs, each of about the size of 1."""
    flat = table.reshape(-1).nan_to_num(0.0, 1.0, -1.0)
    places = torch.arange(len(flat), device="cpu")
    unit = flat / flat.norm().clamp(min=1e-300)
    signs = [((places * 2654435761 + row * 40503) // 65536 % 2) * 2.0 - 1 for row in range(1, count + 1)]
    return [float(unit @ row.double()) for row in signs]


def _hooks(model: Any) -> dict[str, str]:
    """A mark of every forward hook on a model, the user's and those of edits, by its place and number there."""
    found: dict[str, str] = {}
    for module, place in named_modules(model):
        here = set(hooks_on(module, ours=True))
        hooks = [hook for kind in KINDS for key, hook in getattr(module, kind).items() if key in here]
        found |= {f"{place} {number}": _digest(_described(hook, DEPTH)) for number, hook in enumerate(hooks)}
    return found


def _outputs(model: Any, tokenizer: Any) -> list[float]:
    """Projections of y and of the log-probabilities that the model makes of the proof's tokens; none if it cannot."""
    plain = not hasattr(model, "cfg")
    unembedding = model.get_output_embeddings() if plain else model.unembed
    vocabulary = model.get_input_embeddings().weight.shape[0] if plain else model.cfg.d_vocab
    ids, _ = proof_ids(vocabulary, tokenizer, getattr(model if plain else model.cfg, "n_ctx", None) or TOKENS)
    caught: dict[str, Tensor] = {}
    device = next(iter(model.parameters())).device
    try:
        with full_precision(device), listening(unembedding, caught):
            out = model(ids.to(device))
    except Exception:  # a hook that needs other tokens; its own code is in the identity
        return []
    logits = out if isinstance(out, Tensor) else out.logits
    wide = [caught["y"].detach().cpu().double(), logits.detach().cpu().double().log_softmax(-1)]
    return [each for one in wide for each in _projected(one, PROJECTIONS)]


def _spelling(model: Any, tokenizer: Any) -> list[Any]:
    """What becomes of a text, with the special tokens that the model's own rule adds, and the chat template."""
    if tokenizer is None:
        return []
    try:
        ids = model.to_tokens(TEXT, truncate=False)[0].tolist() if hasattr(model, "to_tokens") else []
    except Exception as error:  # of the tokenizer's own kinds; the same where the tokenizer is the same
        ids = [type(error).__name__]
    return [ids, list(tokenizer(TEXT)["input_ids"]), str(getattr(tokenizer, "chat_template", None))]


PLAIN = str | bytes | int | float | complex | bool | None | slice | range | torch.dtype | torch.device


def _described(thing: Any, depth: int) -> Any:
    """Code and constants of what a hook is made of, as JSON; lists and dicts of anything else are memory: left out."""
    if isinstance(thing, PLAIN):
        return repr(thing)
    if not depth:
        return type(thing).__qualname__
    inner = functools.partial(_described, depth=depth - 1)
    if isinstance(thing, Tensor):
        return _checksum(thing)
    if type(thing).__module__ == "numpy" and hasattr(thing, "tobytes"):
        return [str(thing.dtype), list(thing.shape), hashlib.sha256(thing.tobytes()).hexdigest()]
    if isinstance(thing, tuple | frozenset):
        return sorted(map(str, map(inner, thing))) if isinstance(thing, frozenset) else list(map(inner, thing))
    if isinstance(thing, list | set | dict):
        held = [*thing.keys(), *thing.values()] if isinstance(thing, dict) else list(thing)
        simple = all(isinstance(each, PLAIN | tuple) for each in held)
        return sorted(map(repr, held)) if isinstance(thing, set) and simple else repr(thing) if simple and held else ""
    if isinstance(thing, functools.partial):
        return [inner(thing.func), inner(thing.args), {k: inner(v) for k, v in thing.keywords.items()}]
    if isinstance(thing, types.MethodType):
        return [inner(thing.__func__), inner(thing.__self__)]
    if isinstance(thing, types.CodeType):
        return [thing.co_code.hex(), list(map(inner, thing.co_consts)), list(thing.co_names)]
    if isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or () if cell != types.CellType()]
        known = {n: thing.__globals__[n] for n in thing.__code__.co_names if n in thing.__globals__}
        used = {n: value for n, value in known.items() if not isinstance(value, types.ModuleType | type)}
        made = [thing.__code__, tuple(cells), thing.__defaults__, *used.items(), *(thing.__kwdefaults__ or {}).items()]
        return list(map(inner, made))
    if isinstance(thing, nn.Module):
        return [type(thing).__qualname__, [_checksum(p) for p in thing.parameters()]]
    called = vars(type(thing)).get("__call__")
    return [type(thing).__qualname__, inner(called), {k: inner(v) for k, v in getattr(thing, "__dict__", {}).items()}]
