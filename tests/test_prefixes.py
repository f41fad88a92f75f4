"""plan() and separate(): every sequence at its place, and never more tokens than each alone would cost."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
from hypothesis import given

from oversquash_lens.capture.prefixes import Branch, PassPlan, Place, Trunk, branch_mask, plan, separate

Ids = tuple[int, ...]
# Few kinds of token, so that beginnings are shared often; a long common beginning, so that branching pays.
TOKENS = st.integers(0, 2)
SEQUENCES = st.lists(st.lists(TOKENS, min_size=1, max_size=9).map(tuple), min_size=1, max_size=12)
LED = st.tuples(st.lists(TOKENS, min_size=0, max_size=12), SEQUENCES).map(
    lambda drawn: [(*drawn[0], *one) for one in drawn[1]]
)


def run(trunk: Trunk, branch: int | None) -> Ids:
    """What the model reads, from the first token on, in a trunk's pass or in a branch of it."""
    if branch is None:
        return trunk.ids
    leaving = trunk.branches[branch]
    return trunk.ids[: leaving.fork] + leaving.suffix


def read_off(whole: PassPlan, place: Place) -> Ids:
    """The sequence that ends at a place, spelled out."""
    trunk = whole.trunks[place.trunk]
    fork = 0 if place.branch is None else trunk.branches[place.branch].fork
    assert place.position >= 0
    ids = run(trunk, place.branch)
    assert fork + place.position < len(ids)
    return ids[: fork + place.position + 1]


def counted(whole: PassPlan) -> int:
    """Tokens that are really run, counted anew."""
    return sum(len(t.ids) for t in whole.trunks) + sum(len(b.suffix) for t in whole.trunks for b in t.branches)


@given(SEQUENCES | LED)
def test_every_sequence_is_found_at_its_place(sequences: list[Ids]) -> None:
    for whole in (plan(sequences), plan(sequences, branching=False), separate(sequences)):
        assert [read_off(whole, place) for place in whole.places] == sequences


@given(SEQUENCES | LED)
def test_no_plan_runs_more_tokens_than_each_sequence_alone(sequences: list[Ids]) -> None:
    alone = sum(map(len, sequences))
    shared, whole = plan(sequences), plan(sequences, branching=False)
    assert separate(sequences).tokens == counted(separate(sequences)) == alone
    assert shared.tokens == counted(shared) <= whole.tokens == counted(whole) <= sum(map(len, set(sequences))) <= alone


@given(SEQUENCES | LED, st.randoms(use_true_random=False))
def test_a_last_token_lies_in_one_pass_with_the_one_before_it_where_asked(sequences: list[Ids], random: Any) -> None:
    """Their attention rows are compared, and a branch's pass does not hold the trunk's rows."""
    together = {ids for ids in sequences if random.random() < 0.5}
    whole = plan(sequences, together=together)
    assert [read_off(whole, place) for place in whole.places] == sequences
    # The plan is greedy: now and then it is a token shorter with this demand than without.
    assert whole.tokens == counted(whole) <= sum(map(len, set(sequences)))
    for place, ids in zip(whole.places, sequences, strict=True):
        assert place.position >= 1 or len(ids) == 1 or ids not in together


@given(SEQUENCES | LED)
def test_a_branch_leaves_its_trunk_and_shares_at_least_half(sequences: list[Ids]) -> None:
    for trunk in plan(sequences).trunks:
        for number, branch in enumerate(trunk.branches):
            ids = run(trunk, number)
            assert ids in sequences
            assert 0 < branch.fork < len(ids) <= len(trunk.ids)
            assert 2 * branch.fork >= len(ids)
            assert ids != trunk.ids[: len(ids)], "what lies on the trunk needs no branch"


@given(SEQUENCES | LED)
def test_without_branching_trunks_are_the_sequences_that_begin_no_other(sequences: list[Ids]) -> None:
    leaves = {a for a in sequences if not any(b[: len(a)] == a for b in sequences if b != a)}
    whole = plan(sequences, branching=False)
    assert sorted(trunk.ids for trunk in whole.trunks) == sorted(leaves)
    assert not any(trunk.branches for trunk in whole.trunks)


@given(st.lists(TOKENS, min_size=1, max_size=30), st.sets(st.integers(1, 30), min_size=1))
def test_a_chain_of_prefixes_costs_its_longest_one(ids: list[int], lengths: set[int]) -> None:
    chain = [tuple(ids[:k]) for k in sorted(lengths) if k <= len(ids)] or [tuple(ids)]
    whole = plan(chain)
    assert whole.trunks == (Trunk(chain[-1], ()),)
    assert whole.places == tuple(Place(0, None, len(one) - 1) for one in chain)
    assert whole.tokens == len(chain[-1])


@given(SEQUENCES | LED, st.randoms(use_true_random=False))
def test_order_and_repetition_change_no_cost(sequences: list[Ids], random: Any) -> None:
    shuffled = [*sequences, *sequences[:3]]
    random.shuffle(shuffled)
    assert plan(shuffled).tokens == plan(sequences).tokens


def test_counting_up_to_a_thousand_is_one_trunk() -> None:
    question = tuple(range(100, 110))
    ones = [question + (1,) * k for k in range(1, 1002)]
    whole = plan([ids for pair in pairwise(ones) for ids in pair])
    assert whole.trunks == (Trunk(ones[-1], ()),)
    assert whole.tokens == 1011


def test_endings_behind_each_length_cost_the_endings_only() -> None:
    """The text that follows is branched off at every length; the longest one is the trunk."""
    question, tail = tuple(range(100, 110)), (7, 8, 9)
    whole = plan([question + (1,) * k + tail for k in range(1, 31)])
    assert whole.trunks[0].ids == question + (1,) * 30 + tail
    assert whole.trunks[0].branches == tuple(Branch(10 + k, tail) for k in range(29, 0, -1))
    assert len(whole.trunks) == 1


def test_a_repeated_token_that_leaves_the_trunk_takes_the_token_before_along() -> None:
    """The pair (…, 1), (…, 1, 1) beside a longer trunk (…, 1, 5, …): the branch begins with the 1 they share."""
    lead = (9, 8, 7, 6)
    first, second, other = (*lead, 1), (*lead, 1, 1), (*lead, 1, 5, 5, 5)
    whole = plan([first, second, other], together={second})
    assert whole.trunks == (Trunk(other, (Branch(4, (1, 1)),)),)
    assert whole.places == (Place(0, None, 4), Place(0, 0, 1), Place(0, None, 7))
    assert plan([first, second, other]).trunks == (Trunk(other, (Branch(5, (1,)),)),)


def test_so_does_one_in_the_middle_of_a_branch() -> None:
    lead = (9, 8, 7, 6)
    second, longer, other = (*lead, 1, 1), (*lead, 1, 1, 2), (*lead, 1, 5, 5, 5)
    whole = plan([second, longer, other], together={second, other})
    assert whole.trunks == (Trunk(other, (Branch(4, (1, 1, 2)),)),)
    assert whole.places == (Place(0, 0, 1), Place(0, 0, 2), Place(0, None, 7))


def test_a_branch_whose_first_token_is_not_compared_costs_its_own_tokens_only() -> None:
    lead = (9, 8, 7, 6)
    pair, other = ((*lead, 1), (*lead, 1, 2)), (*lead, 5, 5, 5)
    whole = plan([*pair, other], together={pair[1], other})
    assert whole.places == (Place(0, 0, 0), Place(0, 0, 1), Place(0, None, 6))
    assert whole.trunks == (Trunk((*lead, 5, 5, 5), (Branch(4, (1, 2)),)),)


def test_what_shares_less_than_half_is_a_trunk_of_its_own() -> None:
    whole = plan([(1, 2, 3, 3, 3, 3), (1, 2, 4, 4, 4)])
    assert [trunk.ids for trunk in whole.trunks] == [(1, 2, 3, 3, 3, 3), (1, 2, 4, 4, 4)]


def test_nothing_planned_is_nothing_run() -> None:
    assert plan([]) == PassPlan((), ())
    assert plan([]).tokens == 0


BRANCHES = st.integers(1, 6).flatmap(
    lambda n: st.lists(
        st.lists(st.integers(0, n + 2), min_size=1, max_size=4, unique=True).map(sorted), min_size=1, max_size=3
    ).map(lambda branches: (n, branches))
)


@given(BRANCHES, st.none() | st.integers(1, 5))
def test_a_token_of_a_branch_sees_what_it_would_in_its_own_pass(drawn, window: int | None) -> None:
    """The trunk's earlier tokens that its branch leaves in place, and its branch's own; both within the window."""
    n, places = drawn
    branches = [Branch(min(each), (0,) * len(each), tuple(each)) for each in places]
    mask = branch_mask(branches, n, window)
    tokens = [(number, position) for number, each in enumerate(places) for position in each]
    keys = [(None, position) for position in range(n)] + tokens
    assert mask.shape == (len(tokens), len(keys))
    for row, (own, position) in zip(mask.tolist(), tokens, strict=True):
        for seen, (branch, at) in zip(row, keys, strict=True):
            near = window is None or position - at < window
            if branch is None:
                assert seen == (at < position and at not in places[own] and near)
            else:
                assert seen == (branch == own and at <= position and near)
