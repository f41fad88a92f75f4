"""What one answer hangs on: the prediction, the words its target is sensitive to, where that runs, what is squashed.

All of it rests on one source, ‖∂F/∂v_i‖ of the target F, exact by one backward product at every length. Beside it, for
short prompts or on request, stands what happens when a token is really replaced.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import TokenizedPrompt, token_strings
from oversquash_lens.errors import ModelError, one_line, visible
from oversquash_lens.jacobian.measured import MEMORY, MeasuredSensitivity, measured_sensitivity
from oversquash_lens.jacobian.measured_flow import MeasuredFlow, measured_flow
from oversquash_lens.jacobian.targets import Target
from oversquash_lens.numerics import effective_number, json_numbers
from oversquash_lens.paths.squashing import Span
from oversquash_lens.swaps.substitution import Substitution, substitution

TOP_TOKENS = 5  # likeliest next tokens
NAMED = 3  # words in a sentence
REPLACED_UNASKED = 150  # tokens up to which they are replaced without being asked
DRAWS = 2  # replacements of each then, one uniform and one plausible
LONGEST_WORD = 8  # tokens
LONGEST_SENTENCE = 60  # tokens
SENTENCE_ENDS = ".!?\n。！？"  # a token that ends in one of these ends a sentence
SQUASHED = 1 / 3  # of an equal share: a sentence that has less is squashed


@dataclass(frozen=True)
class AnswerFindings:
    """One prompt's target: what is predicted, which words it is sensitive to, and where the first of them runs."""

    predicted: tuple[tuple[str, float], ...]
    """The likeliest next tokens and their probabilities."""
    sensitivity: MeasuredSensitivity
    """‖∂F/∂v_i‖ of the target F."""
    flow: MeasuredFlow
    """Of F, from the word with the largest share; its `width` is that of F's sensitivity at each layer."""
    null_share: Float[Tensor, " pos"]
    """What uniform attention with the same weights would leave each token, by the path sums of all outputs."""
    null_width: Float[Tensor, " layer_plus_1"]
    """Effective width with uniform attention, as `flow.width` counts it."""
    replaced: Substitution | None
    """What replacing each token does to the prediction; None where it was not measured."""
    not_replaced: str
    """Why it was not; empty where it was."""

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.sensitivity.tokens

    @property
    def share(self) -> Float[Tensor, " pos"]:
        return self.sensitivity.share

    @property
    def words(self) -> tuple[Span, ...]:
        """The prompt's words, the largest share of the sensitivity first; the last position apart, where it is read."""
        spans = [self._span(*ends) for ends in words_before_the_last(self.tokens)]
        return tuple(sorted(spans, key=lambda span: -span.share))

    @property
    def parts(self) -> tuple[Span, ...]:
        """Beginning, middle and end: the prompt in three."""
        n = len(self.tokens)
        return tuple(self._span(round(n * part / 3), round(n * (part + 1) / 3)) for part in range(3))

    @property
    def squashed(self) -> tuple[Span, ...]:
        """Sentences whose tokens have less than a third of an equal share, 1/n each, the smallest first.

        None of them holds one of the three words with the largest shares.
        """
        n, top = len(self.tokens), {i for word in self.words[:NAMED] for i in range(word.start, word.stop)}
        spans = [self._span(*ends) for ends in sentences_of(self.tokens) if top.isdisjoint(range(*ends))]
        low = [span for span in spans if span.share < SQUASHED * (span.stop - span.start) / n]
        return tuple(sorted(low, key=lambda span: span.share / (span.stop - span.start)))

    @property
    def effective_tokens(self) -> float:
        """Effective number of tokens that the target is sensitive to, exp of the share's entropy: 1 … n."""
        return effective_number(self.share.double()).item()

    @property
    def relative_width(self) -> Float[Tensor, " layer_plus_1"]:
        """Width of the sensitivity at each layer over that with uniform attention."""
        return self.flow.width / self.null_width

    @property
    def widest(self) -> int:
        """The layer where the target is sensitive to most positions."""
        return int(self.flow.width.argmax())

    @property
    def sentence(self) -> str:
        """All in a few sentences."""
        (token, probability), *_ = self.predicted
        named = ", ".join(f"{self.text(word)!r} ({word.share:.0%})" for word in self.words[:NAMED])
        thirds = ", ".join(
            f"{name} {part.share:.0%}" for name, part in zip(("beginning", "middle", "end"), self.parts, strict=True)
        )
        n = len(self.tokens)
        lost = [f"{self.text(s)!r} ({s.stop - s.start} of {n} tokens, {s.share:.1%})" for s in self.squashed]
        return visible(
            f"The likeliest next token is {token!r} ({probability:.0%}). The {self.sensitivity.target} is most "
            f"sensitive to {named}; by thirds of the prompt: {thirds}. "
            + (
                f"Most squashed: {'; '.join(lost[:NAMED])}."
                if lost
                else "No sentence has less than a third of an equal share."
            )
        )

    def text(self, span: Span) -> str:
        """A span's tokens as one text without the space around it, cut in the middle where it is long."""
        return one_line("".join(self.tokens[span.start : span.stop]).strip(), 60)

    def _span(self, start: int, stop: int) -> Span:
        return Span(start, stop, self.share[start:stop].sum().item(), self.null_share[start:stop].sum().item())

    def to_dict(self) -> dict[str, Any]:
        """Every field and what is derived from them, as JSON takes them."""
        tensors = ("null_share", "null_width", "relative_width")
        spans = ("words", "parts", "squashed")
        return {
            "sentence": self.sentence,
            "predicted": list(self.predicted),
            "sensitivity": self.sensitivity.to_dict(),
            "effective_tokens": self.effective_tokens,
            "flow": self.flow.to_dict(),
            "widest": self.widest,
            **{name: json_numbers(getattr(self, name)) for name in tensors},
            **{name: [vars(span) for span in getattr(self, name)] for name in spans},
            "replaced": None if self.replaced is None else self.replaced.to_dict(),
            "not_replaced": self.not_replaced,
        }


def answer_of(
    subject: Subject,
    tokenized: TokenizedPrompt,
    logits: Float[Tensor, " d_vocab"],
    target: Target,
    null: tuple[Float[Tensor, " pos"], Float[Tensor, " layer_plus_1"]],
    replaced: tuple[Substitution | None, str],
    *,
    memory: int = MEMORY,
    progress: bool = False,
) -> AnswerFindings:
    """Measure what a prompt's answer hangs on.

    `logits`: what the last token predicts. `null`: shares and widths with uniform attention. `replaced`: what
    `replaced_unasked` gives.
    """
    chances, ids = logits.double().softmax(-1).topk(min(TOP_TOKENS, len(logits)))
    predicted = tuple(zip(token_strings(subject.model, ids.cpu()), chances.tolist(), strict=True))
    sensitivity = measured_sensitivity(subject.model, tokenized.ids, target=target, memory=memory, progress=progress)
    word = _largest_word(sensitivity)
    flow = measured_flow(subject.model, tokenized.ids, slice(*word), target=target, memory=memory, progress=progress)
    return AnswerFindings(predicted, sensitivity, flow, *null, *replaced)


def _largest_word(sensitivity: MeasuredSensitivity) -> tuple[int, int]:
    """The word with the largest share."""
    words = words_before_the_last(sensitivity.tokens)
    return max(words, key=lambda word: sensitivity.values[slice(*word)].sum().item())


def replaced_unasked(
    subject: Subject, ids: Tensor, draws: int | None, unasked: int, seed: int, progress: bool, target: Any = None
) -> tuple[Substitution | None, str]:
    """Every token replaced, or None and why not; `unasked`: draws where nobody asked for a number of them."""
    if draws == 0:
        return None, "it was not asked for (draws=0)"
    if draws is None and len(ids) > REPLACED_UNASKED:
        return None, f"beyond {REPLACED_UNASKED} tokens it is measured on request (draws={unasked})"
    how: dict[str, Any] = {"target": target, "seed": seed, "progress": progress}
    try:
        if draws is None:
            return substitution(subject.model, ids, draws=unasked, method="nodes", **how), ""
        return substitution(subject.model, ids, draws=draws, **how), ""
    except ModelError as error:
        if draws is not None:
            raise
        return None, f"{error}; on request (draws={unasked}) every replaced prompt is run"


def words_of(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """The words that tokens spell, as (start, stop): letters and digits that no space parts; other tokens alone.

    Where no token has a space, as of a model without a tokenizer, every token is a word.

    >>> words_of(("The", " cap", "tain", " is", " Ros", "al", "ind", "."))
    [(0, 1), (1, 3), (3, 4), (4, 7), (7, 8)]
    """
    words: list[tuple[int, int]] = []
    spaced = any(token[:1].isspace() or token[-1:].isspace() for token in tokens)
    for i, token in enumerate(tokens):
        if spaced and words and _continues(tokens[i - 1], token) and i - words[-1][0] < LONGEST_WORD:
            words[-1] = (words[-1][0], i + 1)
        else:
            words.append((i, i + 1))
    return words


def words_before_the_last(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """The words without the last token, the prediction's own place; that one where there is no other."""
    return words_of(tokens[:-1]) or words_of(tokens)


def sentences_of(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """Sentences as (start, stop), by the marks that end them; longer ones are cut every 60 tokens.

    >>> sentences_of(("It", " is", " red", ".", " Why", "?"))
    [(0, 4), (4, 6)]
    """
    found, start = [], 0
    for i, token in enumerate(tokens, 1):
        if token.rstrip(" ")[-1:] in tuple(SENTENCE_ENDS) or i - start == LONGEST_SENTENCE or i == len(tokens):
            found.append((start, i))
            start = i
    return found


def _continues(before: str, token: str) -> bool:
    return _in_word(before[-1:]) and _in_word(token[:1])


def _in_word(character: str) -> bool:
    """Whether it is inside words of scripts that put spaces between them."""
    return character.isalnum() and unicodedata.east_asian_width(character) not in "WF"


def null_of(flow: Any) -> tuple[Float[Tensor, " pos"], Float[Tensor, " layer_plus_1"]]:
    """Shares of the inputs, and effective widths at each layer, of the sensitivity that a flow's paths add up to."""
    shares = (flow.log_above * flow.power).softmax(-1)
    return shares[0], effective_number(torch.as_tensor(shares))
