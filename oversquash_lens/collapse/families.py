"""Families of prompt pairs: for each length k two prompts that a model should tell apart.

`Family` takes any function; the ready ones are built from what the model's own tokenizer makes of digits, separators
and words.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

from oversquash_lens.capture.prefixes import Ids, common
from oversquash_lens.capture.tokens import text_ids, tokenize
from oversquash_lens.errors import InputError, one_line, whole_number

if TYPE_CHECKING:
    import pandas

HOW_MANY_ONES = "How many ones are in the following sequence?"  # figure 5's prompt
COPY_NUMBER = "Can you copy the following number?"
PROBE = 24  # digits on which a tokenizer is tried: it merges these if it merges any


@dataclass(frozen=True, repr=False)
class Family:
    """A pair of prompts for each length k, as token ids."""

    name: str
    pair: Callable[[int], tuple[Sequence[int], Sequence[int]]]
    """The two prompts of length k, as the model reads them (BOS included where wanted)."""
    unit: str = "length"
    """What k counts: "ones", "digits", "words", …"""
    note: str = ""
    """What a reader of the curve should know."""

    def __repr__(self) -> str:
        return f"Family({self.name!r}, k in {self.unit}{f', {self.note!r}' if self.note else ''})"

    def to_dict(self) -> dict:
        """What describes the family; the prompts themselves are in `pairs` and `to_frame`."""
        return {"kind": "family", "name": self.name, "unit": self.unit, "note": self.note}

    def to_frame(self, lengths: Sequence[int] = (1, 2, 3)) -> pandas.DataFrame:
        """The pairs of these lengths as a pandas DataFrame: a row each, with both prompts' token ids."""
        import pandas

        pairs = self.pairs(lengths)
        table = {
            "length": list(lengths),
            "first": [list(first) for first, _ in pairs],
            "second": [list(second) for _, second in pairs],
            "repeats_last": [repeats_last(*pair) for pair in pairs],
        }
        return pandas.DataFrame(table)

    def pairs(self, lengths: Sequence[int]) -> list[tuple[Ids, Ids]]:
        """The pairs of these lengths, checked: two different prompts of at least two tokens each."""
        return [self._checked(k) for k in lengths]

    def _checked(self, k: int) -> tuple[Ids, Ids]:
        if not callable(self.pair):
            raise InputError(
                f"expected a function that gives two token lists for a length, got family {self.name!r}: "
                f"{one_line(repr(self.pair), 60)} as pair: give one"
            )
        pair = self.pair(k)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InputError(
                f"family {self.name!r}: pair({k}) gave a {type(pair).__name__}; expected two token lists: let it "
                "return a tuple of both"
            )
        first, second = (_ids(self.name, k, one) for one in pair)
        if first == second:
            raise InputError(
                f"family {self.name!r}: its two prompts of length {k} are equal ({len(first)} tokens); expected two "
                "that differ: change one of them"
            )
        return first, second


def as_family(family: Any, *, step: int = 1) -> Family:
    """A Family as it is; a function length -> token ids, paired with itself `step` further on; or two prompts' ids.

    >>> as_family(lambda k: [7] + [1] * k).pairs([2])
    [((7, 1, 1), (7, 1, 1, 1))]
    """
    if isinstance(family, Family):
        return family
    if callable(family):
        name = getattr(family, "__name__", "your function").strip("<>")
        return Family(name, lambda k: (family(k), family(k + step)))
    if isinstance(family, tuple) and len(family) == 2:
        return Family("two prompts", lambda k: family, "pair")
    raise InputError(
        "expected a Family, a function length -> token ids, or a tuple of two prompts' token ids, got a "
        f"{type(family).__name__} as the family: see oversquash_lens.families for ready ones"
    )


def repeats_last(first: Ids, second: Ids) -> bool:
    """Whether `second` is `first` with its last token repeated: the pair that Theorem B.3 speaks of."""
    return second == (*first, first[-1])


# ------------------------------------------------------------ ready families


def counting(model: Any, *, question: str = HOW_MANY_ONES, spaced: bool = False, bos: bool | None = None) -> Family:
    """k ones against k + 1 after `question` (figure 5 a; with COPY_NUMBER figure 5 c).

    `spaced` writes a space between the ones. As in every family, `model` is asked for its tokenizer only, and `bos`
    None begins as the tokenizer does by itself, True or False forces or forbids BOS.
    """
    family = separated(model, question=question, separator=" " if spaced else "", every=1, bos=bos)
    return replace(family, name=f"counting ones{', spaced' if spaced else ''}")


def copying(model: Any, *, question: str = COPY_NUMBER, bos: bool | None = None) -> Family:
    """k ones against k + 1, to be copied (figure 5 c)."""
    return replace(separated(model, question=question, separator="", bos=bos), name="copying ones")


def separated(
    model: Any,
    *,
    question: str = COPY_NUMBER,
    separator: str = ",",
    every: int = 3,
    counted_from: str = "left",
    step: int = 1,
    bos: bool | None = None,
) -> Family:
    """k ones against k + step, a `separator` after every `every`-th, groups counted from "left" or "right".

    With `step=every` the place in the group stays and only the count changes; with `step=1` both do. Raises InputError
    for a tokenizer that merges these digits.
    """
    if counted_from not in ("left", "right"):
        raise InputError(f"expected 'left' or 'right', got counted_from={counted_from!r}")
    if not all(type(each) is int and each >= 1 for each in (every, step)):
        raise InputError(f"expected both to be at least 1, got every={every!r}, step={step!r}")
    spell = _Spelling(model, question, separator, bos)

    def breaks(k: int) -> Collection[int]:
        if not separator:
            return ()
        lead = (k % every if counted_from == "right" else 0) or every
        return range(lead, k, every)

    @lru_cache(maxsize=8 * step)  # a curve's next pairs begin where these end
    def ids(k: int) -> Ids:
        return spell([1] * k, breaks(k))

    spell.check([1] * PROBE, breaks(PROBE))
    where = f" with {separator!r} every {every} from the {counted_from}" if separator else ""
    further = f", k against k+{step}" if step > 1 else ""
    return Family(f"ones{where}{further}", lambda k: (ids(k), ids(k + step)), "ones", question)


def sampled_digits(model: Any, *, question: str = HOW_MANY_ONES, bos: bool | None = None, seed: int = 0) -> Family:
    """k − 1 digits drawn uniformly from `seed`, then one 1 against two (figure 5 b)."""
    spell = _Spelling(model, question, "", bos)
    spell.check([digit for pair in product(range(10), repeat=2) for digit in pair])  # any two digits side by side
    digits: list[int] = []
    source = random.Random(seed)

    def ids(k: int, ones: int) -> Ids:
        while len(digits) < k:
            digits.append(source.randrange(10))
        return spell(digits[: k - 1] + [1] * ones)

    return Family(f"sampled digits, seed {seed}", lambda k: (ids(k, 1), ids(k, 2)), "digits", question)


def alternating(model: Any, *, question: str = HOW_MANY_ONES, step: int = 1, bos: bool | None = None) -> Family:
    """The first k digits of 1010… against the first k + step (after the counter-example of Proposition B.4).

    With `step=1` the two end in different digits; with `step=2` only the count differs.
    """
    whole_number("step", step)
    spell = _Spelling(model, question, "", bos)
    spell.check([(i + 1) % 2 for i in range(PROBE)])

    def ids(k: int) -> Ids:
        return spell([(i + 1) % 2 for i in range(k)])

    further = f", k against k+{step}" if step > 1 else ""
    return Family(f"interleaved ones and zeros{further}", lambda k: (ids(k), ids(k + step)), "digits", question)


def word_list(
    model: Any,
    words: Sequence[str],
    *,
    question: str = "How many words are in the following list?",
    bos: bool | None = None,
) -> Family:
    """The first k words against the same with the last one repeated; `words` is gone through again and again."""
    if isinstance(words, str) or not words or not all(words):
        raise InputError(
            f"expected a sequence of at least one, none empty, got {one_line(repr(words), 60)} as the words"
        )
    begun = f"{question} {words[0]}"
    start = text_ids(model, begun, bos=bos)
    later = [_continuation(model, begun, f" {word}", bos) for word in words]

    def ids(k: int) -> Ids:
        return start + tuple(token for i in range(1, k) for token in later[i % len(words)])

    def pair(k: int) -> tuple[Ids, Ids]:
        return ids(k), ids(k) + later[(k - 1) % len(words)]

    written = text_ids(model, f"{question} {' '.join(words)}", bos=bos)
    if written != ids(len(words)):
        raise InputError(
            f"the tokenizer of {model.cfg.model_name} writes these words otherwise beside one another than each alone "
            f"({len(written)} tokens against {len(ids(len(words)))}); expected words whose tokens do not merge: give "
            "token ids by a function of your own"
        )
    return Family(f"{len(words)} words in turn", pair, "words", question)


def followed_by(model: Any, family: Family, text: str) -> Family:
    """The same pairs with `text` behind, such as " Answer:": outside B.3, the repeated token is not the last."""
    if not isinstance(family, Family):
        raise InputError(
            f"expected a Family, got a {type(family).__name__} as the family: make one with a function of "
            "oversquash_lens.families"
        )
    tail = text_ids(model, text, bos=False)

    def pair(k: int) -> tuple[Ids, Ids]:
        first, second = family.pair(k)
        return (*first, *tail), (*second, *tail)

    return Family(f"{family.name}, then {text!r}", pair, family.unit, family.note)


def two_prompts(model: Any, first: str, second: str, *, bos: bool | None = None) -> Family:
    """A pair of prompts of one's own; its only length is 1."""
    ids_of_first, ids_of_second = (tuple(tokenize(model, text, bos=bos).ids.tolist()) for text in (first, second))
    return Family("two prompts", lambda k: (ids_of_first, ids_of_second), "pair", f"{first!r} against {second!r}")


# ------------------------------------------------------------ token by token


class _Spelling:
    """Digits and separators after a question, token by token, exactly as the tokenizer writes the whole text."""

    def __init__(self, model: Any, question: str, separator: str, bos: bool | None) -> None:
        if not isinstance(question, str):
            raise InputError(f"expected a text such as 'How many ones are there?', got question={question!r}")
        begun = f"{question} 1"
        self.model, self.question, self.separator, self.bos = model, question, separator, bos
        self.first = [_continuation(model, question, f" {digit}", bos) for digit in range(10)]
        self.start = text_ids(model, begun, bos=bos)[: -len(self.first[1])]  # the question, as a digit leaves it
        self.next = [_continuation(model, begun, str(digit), bos) for digit in range(10)]
        self.broken = [_continuation(model, begun, f"{separator}{digit}", bos) for digit in range(10)]

    def __call__(self, digits: Sequence[int], breaks: Collection[int] = ()) -> Ids:
        """The question, then these digits, a separator before each index of `breaks`."""
        tokens = [*self.start, *self.first[digits[0]]]
        for i, digit in enumerate(digits[1:], 1):
            tokens += (self.broken if i in breaks else self.next)[digit]
        return tuple(tokens)

    def check(self, digits: Sequence[int], breaks: Collection[int] = ()) -> None:
        """Compare with the tokenizer's own way on one number; it merges digits here if it merges any."""
        number = "".join(f"{self.separator if i in breaks else ''}{digit}" for i, digit in enumerate(digits))
        written = text_ids(self.model, f"{self.question} {number}", bos=self.bos)
        if written != self(digits, breaks):
            cost = (len(written) - len(self.start)) / len(digits)
            raise InputError(
                f"the tokenizer of {self.model.cfg.model_name} merges the digits of {number[:24]!r}: {cost:.2f} tokens "
                "a digit; expected each digit to be a token of its own: use spaced=True or another separator, or give "
                "token ids by a function of your own"
            )


def _continuation(model: Any, before: str, text: str, bos: bool | None) -> Ids:
    """The tokens that `text` adds behind `before`; all that differs where the two merge."""
    start, both = text_ids(model, before, bos=bos), text_ids(model, before + text, bos=bos)
    return both[common(start, both) :]


def _ids(name: str, k: int, ids: Any) -> Ids:
    """One prompt as plain numbers, from a sequence or a tensor [pos] or [1, pos]."""
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    try:
        if len(values) == 1 and isinstance(values[0], list):
            values = values[0]
        found = tuple(map(operator.index, values))
    except TypeError as error:
        raise InputError(
            f"expected token ids, whole numbers, got family {name!r}: a {type(ids).__name__} as a prompt of length "
            f"{k}: make them with model.tokenizer"
        ) from error
    if len(found) < 2:
        raise InputError(f"expected at least 2, got family {name!r}: a prompt of {len(found)} tokens for length {k}")
    return found
