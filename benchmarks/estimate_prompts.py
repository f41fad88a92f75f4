"""The 96 prompts on which an estimate of ‖∂y_n/∂v_i‖ is held against the truth: eight of each of twelve kinds.

Ten kinds are real text (benchmarks/estimate_texts.py), two are made of random tokens. One half of the prompts is for
looking at, the other for judging.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from benchmarks.estimate_texts import TEXTS

KINDS = (
    "prose",
    "german",
    "french",
    "spanish",
    "code",
    "dialogue",
    "lists",
    "arithmetic",
    "tables",
    "chat",
    "repeated",
    "random",
)
REAL = KINDS[:-2]  # real text
SHORT = (16, 24, 32, 48, 64, 96, 128)  # tokens of the first seven of every kind; the eighth is long
LONG = {
    "prose": 512,
    "german": 384,
    "french": 320,
    "spanish": 256,
    "code": 512,
    "dialogue": 384,
    "lists": 320,
    "arithmetic": 256,
    "tables": 256,
    "chat": 512,
    "repeated": 512,
    "random": 256,
}
PERIODS = ("abc", "a.b", "abcde", "a", "ab", "a.b", "a b", "abcdefgh")  # see Sample; shortest first
SPECIAL = 20  # the first ids of SmolLM2 are special tokens
SEED = 2024


@dataclass(frozen=True)
class Sample:
    """One prompt: a text to be tokenised, or tokens to be made.

    `period` says how repeated tokens are made. Each letter is a random token, other letters are other tokens. "abc"
    repeats three of them over and over; "a b" repeats one in the first half and another in the second; "a.b" repeats
    one up to the last place, where another stands.
    """

    name: str
    kind: str  # one of KINDS
    text: str | None  # None where the tokens are made, not written
    length: int  # tokens at most; the text is cut there
    seed: int = 0  # of made tokens
    period: str = ""  # of repeated tokens


def samples() -> tuple[Sample, ...]:
    """All prompts, kind by kind, the shortest of each kind first."""
    return tuple(
        Sample(
            name=f"{kind}-{number + 1}",
            kind=kind,
            text=TEXTS[kind][number] if kind in REAL else None,
            length=length,
            seed=0 if kind in REAL else 100 * KINDS.index(kind) + number,
            period=PERIODS[number] if kind == "repeated" else "",
        )
        for kind in KINDS
        for number, length in enumerate((*SHORT, LONG[kind]))
    )


def halves() -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Two halves, with half of the prompts of each kind in either; always the same ones."""
    draw = random.Random(SEED)
    everything = samples()
    first = {
        sample
        for kind in KINDS
        for sample in draw.sample([s for s in everything if s.kind == kind], (len(SHORT) + 1) // 2)
    }
    return tuple(s for s in everything if s in first), tuple(s for s in everything if s not in first)


def tokens(sample: Sample, model: Any) -> Int[Tensor, " pos"]:
    """The ids of a prompt on this model, without BOS; a model without a tokenizer reads bytes of UTF-8."""
    if sample.text is None:
        return _made(sample, model)
    if model.tokenizer is None:
        return torch.tensor(list(sample.text.encode("utf-8"))[: sample.length])
    return model.to_tokens(sample.text, prepend_bos=False)[0][: sample.length]


def _made(sample: Sample, model: Any) -> Int[Tensor, " pos"]:
    generator = torch.Generator().manual_seed(sample.seed)
    lowest = 0 if model.tokenizer is None else SPECIAL
    if not sample.period:
        return torch.randint(lowest, model.cfg.d_vocab, (sample.length,), generator=generator)
    ids = lowest + torch.randperm(model.cfg.d_vocab - lowest, generator=generator)  # one for each letter, all different
    return torch.stack([ids[ord(letter) - ord("a")] for letter in _letters(sample.period, sample.length)])


def _letters(period: str, length: int) -> str:
    body, _, last = period.partition(".")
    stretches = body.split()
    ends = [(length - len(last)) * k // len(stretches) for k in range(len(stretches) + 1)]
    sizes = [end - start for start, end in pairwise(ends)]
    return "".join("".join(islice(cycle(s), size)) for s, size in zip(stretches, sizes, strict=True)) + last
