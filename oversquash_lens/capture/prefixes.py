"""Many token sequences as few forward passes: what is a prefix of another is read off that one's pass.

A causal model's activations at a position know nothing of what follows, so a sequence that begins another costs
nothing; one that shares a beginning with another branches off it and costs its own ending only.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Branch:
    """`suffix` follows the first `fork` tokens of a trunk."""

    fork: int
    suffix: Ids


@dataclass(frozen=True)
class Trunk:
    """A sequence run whole, and those that leave it on the way."""

    ids: Ids
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Place:
    """Where a sequence's last token is computed: row `position` of a trunk's own pass, or of one of its branches."""

    trunk: int
    branch: int | None
    position: int


@dataclass(frozen=True)
class Home:
    """Where a sequence that begins no other is run; its first `shared` tokens are its trunk's."""

    trunk: int
    branch: int | None
    fork: int
    shared: int


@dataclass(frozen=True)
class Plan:
    """`places[i]` belongs to the i-th sequence that was planned for."""

    trunks: tuple[Trunk, ...]
    places: tuple[Place, ...]

    @property
    def tokens(self) -> int:
        """How many tokens are run in all."""
        return sum(len(t.ids) + sum(len(b.suffix) for b in t.branches) for t in self.trunks)


def plan(sequences: Sequence[Ids], *, branching: bool = True, together: Set[Ids] = frozenset()) -> Plan:
    """The fewest trunks for these sequences; without `branching` only whole prefixes are shared.

    A sequence branches off where at least half of it is shared; else it is a trunk itself. The last token of a
    sequence in `together` is run in one pass with the token before it: where it would be the first of a branch, the
    branch begins one token earlier.

    >>> plan([(7, 1), (7, 1, 1), (8, 2)]).trunks
    (Trunk(ids=(7, 1, 1), branches=()), Trunk(ids=(8, 2), branches=()))
    >>> plan([(7, 8, 1, 1, 1), (7, 8, 2)]).trunks
    (Trunk(ids=(7, 8, 1, 1, 1), branches=(Branch(fork=2, suffix=(2,)),)),)
    """
    waiting = sorted(_leaves(set(sequences)), key=len, reverse=True)
    trunks: list[Trunk] = []
    homes: dict[Ids, Home] = {}
    while waiting:
        ids = waiting.pop(0)
        homes[ids] = Home(len(trunks), None, 0, 0)
        branches, others = [], []
        for leaf in waiting:
            shared = common(ids, leaf)
            fork = shared - 1 if leaf[: shared + 1] in together else shared
            if branching and 2 * fork >= len(leaf):
                homes[leaf] = Home(len(trunks), len(branches), fork, shared)
                branches.append(Branch(fork, leaf[fork:]))
            else:
                others.append(leaf)
        trunks.append(Trunk(ids, tuple(branches)))
        waiting = others
    return Plan(tuple(trunks), _places(sequences, homes))


def apart(sequences: Sequence[Ids]) -> Plan:
    """Every sequence in a pass of its own: the way that sharing is checked against."""
    places = tuple(Place(number, None, len(ids) - 1) for number, ids in enumerate(sequences))
    return Plan(tuple(Trunk(ids, ()) for ids in sequences), places)


def _leaves(sequences: Set[Ids]) -> list[Ids]:
    """Those that begin no other; in lexical order a prefix stands right before what it begins."""
    ordered = sorted(sequences)
    return [one for one, after in zip(ordered, [*ordered[1:], ()], strict=False) if after[: len(one)] != one]


def common(a: Ids, b: Ids) -> int:
    """Length of the common beginning, by halving: slices compare fast, Python loops do not.

    >>> common((7, 1, 1), (7, 1, 2))
    2
    """
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _places(sequences: Sequence[Ids], homes: dict[Ids, Home]) -> tuple[Place, ...]:
    """Each sequence in the leaf that it begins, found by one walk in lexical order; trunks before branches."""
    found: dict[Ids, Place] = {}
    home = Home(0, None, 0, 0)
    for one in sorted(set(sequences), reverse=True):
        home = homes.get(one, home)
        aside = len(one) > home.shared
        found[one] = Place(home.trunk, home.branch if aside else None, len(one) - 1 - (home.fork if aside else 0))
    return tuple(found[one] for one in sequences)
