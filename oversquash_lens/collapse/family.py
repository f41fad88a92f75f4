"""Families of prompt pairs: for each length k two prompts that a listener should tell apart."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from oversquash_lens.capture.prefixes import Ids
from oversquash_lens.errors import InputError, one_line


@dataclass(frozen=True)
class Family:
    """`pair(k)`: the token ids of the two prompts of length k, as the model reads them (BOS included where wanted).

    `unit` is what k counts ("ones", "digits", "words"), `note` what a reader of the curve should know.
    """

    name: str
    pair: Callable[[int], tuple[Sequence[int], Sequence[int]]]
    unit: str = "length"
    note: str = ""

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
