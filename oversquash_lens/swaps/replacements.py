"""What takes the place of a token or a span: given, or drawn uniformly or from the model's own prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.mlp import random_source
from oversquash_lens.capture.prefixes import Ids
from oversquash_lens.capture.readings import logits_of
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import TokenizedPrompt, text_ids
from oversquash_lens.errors import InputError, one_line
from oversquash_lens.numerics import drawn_index
from oversquash_lens.paths.flow import position_of, span_of

Span = tuple[int, int]  # positions start … stop-1


def spans_of(tokenized: TokenizedPrompt, positions: Sequence[Any] | None) -> tuple[Span, ...]:
    n = len(tokenized.ids)
    if positions is None:
        return tuple((i, i + 1) for i in range(n))
    if isinstance(positions, str | int | slice):
        positions = [positions]
    found = [position_of(tokenized.tokens, each) for each in positions]
    if not found:
        raise InputError("expected at least one position, text or slice, got none: leave positions= out for all tokens")
    return tuple(map(span_of, found))


def given_replacements(
    subject: Subject, tokenized: TokenizedPrompt, spans: Sequence[Span], replacements: Sequence[Sequence[Any]]
) -> tuple[tuple[Ids, ...], ...]:
    if isinstance(replacements, str) or len(replacements) != len(spans):
        raise InputError(
            f"expected a list of replacements for each of the {len(spans)} positions, got {len(replacements)}: give "
            "positions= and as many lists"
        )
    found = tuple(
        tuple(aligned(subject, tokenized, span, each) for each in row)
        for span, row in zip(spans, replacements, strict=True)
    )
    if len(sizes := {len(row) for row in found}) != 1 or sizes == {0}:
        raise InputError(
            f"expected as many replacements for each position, got {sorted(sizes)}: give lists of one length, not empty"
        )
    return found


def aligned(subject: Subject, tokenized: TokenizedPrompt, span: Span, new: Any) -> Ids:
    """The ids that take a span's place: of a text with the old one's leading space, and as many tokens."""
    start, stop = span
    old = "".join(tokenized.tokens[start:stop])
    if isinstance(new, str):
        space = old[: len(old) - len(old.lstrip())]
        text = new if new[:1].isspace() or not space else space + new
        ids = text_ids(subject.model, text)
    else:
        text, ids = repr(new), (new,) if type(new) is int else tuple(new)
    if len(ids) != stop - start:
        raise InputError(
            f"expected {stop - start} token{'s' if stop - start > 1 else ''} in place of {old!r}, got {text!r}, which "
            f"is {len(ids)}: choose a replacement of as many tokens, or give a span (a slice) that is as long"
        )
    if not all(type(each) is int and 0 <= each < subject.model.cfg.d_vocab for each in ids):
        raise InputError(
            f"expected ids in 0 … {subject.model.cfg.d_vocab - 1}, got {one_line(repr(ids), 60)}: give such ids"
        )
    return ids


class Chances:
    """Replacements drawn for a position, other than what stands there: ordinary tokens all alike, or as predicted."""

    def __init__(self, subject: Subject, y: Float[Tensor, "pos d_model"], base: Ids) -> None:
        self.subject, self.y, self.base = subject, y, base
        special = getattr(getattr(subject.model, "tokenizer", None), "all_special_ids", None) or ()
        self.ordinary = torch.ones(subject.model.cfg.d_vocab, dtype=torch.float64, device="cpu")
        self.ordinary[[each for each in special if each < len(self.ordinary)]] = 0

    def drawn(self, span: Span, plausible: Sequence[bool], seed: int) -> tuple[Ids, ...]:
        """Each draw's ids; the same for a position whatever else is asked for."""
        columns = [self._at(position, plausible, random_source(seed, position)) for position in range(*span)]
        return tuple(zip(*columns, strict=True))

    def _at(self, position: int, plausible: Sequence[bool], random: torch.Generator) -> list[int]:
        uniform = self.ordinary.clone()
        uniform[self.base[position]] = 0
        likely = uniform
        if position and any(plausible):
            logits = logits_of(self.subject, self.y[position - 1 : position])[0]
            likely = uniform * logits.double().cpu().softmax(0)[: len(uniform)]
            likely = likely if likely.sum() > 0 else uniform
        return [drawn_index(likely if each else uniform, random) for each in plausible]
