"""The paper's lemmas: closed forms against plain softmaxes, bounds that are never violated, storage by brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oversquash_lens.collapse.lemmas import (
    alternating_total_variation,
    averaging_counting_limit,
    counting_limit,
    largest_weight,
    last_weights,
    ratio_representation,
    softmax_total_variation,
    total_variation,
    total_variation_bound,
)
from oversquash_lens.collapse.precision import number_format, stored
from oversquash_lens.errors import InputError

ROUNDING = 1e-12
STORAGE = ("bfloat16", "float16", "float8_e4m3", "float8_e5m2")


def random(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


scores = st.lists(st.floats(-8, 8), min_size=1, max_size=40).map(lambda each: torch.tensor(each, dtype=torch.float64))


def test_total_variation_carries_no_half_and_takes_batches() -> None:
    p = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
    q = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    assert total_variation(p, q).tolist() == [[2.0, 0.5]]
    assert torch.equal(total_variation(p, q), total_variation(q, p))


@given(x=scores, shift=st.floats(-5, 5), seed=st.integers(0, 9))
def test_softmax_total_variation_is_a_distance_of_distributions(x: torch.Tensor, shift: float, seed: int) -> None:
    other = random(seed, len(x), scale=3)
    found = softmax_total_variation(x, other).item()
    weights = [[math.exp(each) for each in row.tolist()] for row in (x, other)]
    p, q = ([each / math.fsum(row) for each in row] for row in weights)
    assert found == pytest.approx(math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)), abs=ROUNDING)
    assert 0 <= found <= 2 + ROUNDING
    assert softmax_total_variation(x + shift, x).item() <= ROUNDING  # a shift of all scores is no change


# ---------------------------------------------------------------- B.1


@given(x=scores)
def test_b1_at_every_length(x: torch.Tensor) -> None:
    found = last_weights(x)
    for k in range(1, len(x) + 1):
        before = x[:k].softmax(0)[-1].item()
        after = torch.cat([x[:k], x[k - 1 : k]]).softmax(0)[-1].item()
        assert found.before[k - 1].item() == pytest.approx(before, rel=1e-9)
        assert found.after[k - 1].item() == pytest.approx(after, rel=1e-9)
        assert after == pytest.approx(before / (1 + before), rel=1e-9)
        assert before - after == pytest.approx(before**2 / (1 + before), rel=1e-6, abs=1e-15)
        spread = (x[:k].max() - x[:k].min()).item()
        assert found.bound[k - 1].item() == pytest.approx(largest_weight(k, spread), rel=1e-9)
    assert (found.after < found.before).all()
    assert (found.before <= found.bound * (1 + ROUNDING)).all()


def test_b1_decays_like_one_over_n_for_bounded_scores() -> None:
    x = torch.rand(8, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = last_weights(x)
    assert found.before.shape == (8, 4000)
    k = torch.arange(1, 4001)
    assert (found.before * k <= math.e).all()  # scores in [0, 1]: at most e/k
    assert found.before[:, -1].max() < 1e-3
    assert last_weights(torch.zeros(5)).before.tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])


def test_the_largest_weight_is_reached() -> None:
    x = torch.tensor([2.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert x.softmax(0)[0].item() == pytest.approx(largest_weight(4, 2.5), rel=1e-12)


# ---------------------------------------------------------------- B.2 and B.4


@given(x=scores, scale=st.floats(0, 6), decay=st.floats(0, 3), seed=st.integers(0, 99))
def test_b2_bound_is_never_violated(x: torch.Tensor, scale: float, decay: float, seed: int) -> None:
    """Differences of every size and every decay along the sequence."""
    position = torch.arange(1, len(x) + 1, dtype=torch.float64)
    x_star = x + random(seed, len(x), scale=scale) * position**-decay
    truth = softmax_total_variation(x, x_star).item()
    assert truth <= total_variation_bound(x, x_star) + ROUNDING
    assert truth <= total_variation_bound(x_star, x) + ROUNDING
    assert total_variation_bound(x, x_star) <= 2


@given(share=st.floats(0.01, 0.99), jump=st.floats(-4, 4), n=st.integers(2, 60))
def test_b2_bound_with_two_levels_of_scores(share: float, jump: float, n: int) -> None:
    """Two levels are the extreme case of the proof: some positions move by `jump`, the others do not."""
    moved = torch.arange(n) < max(1, int(share * n))
    x_star = torch.where(moved, math.log((1 - share) / share) - jump / 2, 0.0).double()
    x = x_star + jump * moved
    assert softmax_total_variation(x, x_star).item() <= total_variation_bound(x, x_star) + ROUNDING


def test_b2_collapses_as_the_sequence_grows() -> None:
    """The set-up of figure 9: 200 scores differ, however many follow."""
    bounds, truths = [], []
    for n in (1_000, 10_000, 100_000, 1_000_000):
        x_star = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        x = x_star.clone()
        x[:200] += 0.1 * x_star[:200].roll(1)
        truths.append(softmax_total_variation(x, x_star).item())
        bounds.append(total_variation_bound(x, x_star))
    assert all(truth <= bound for truth, bound in zip(truths, bounds, strict=True))
    assert truths == sorted(truths, reverse=True)
    assert bounds[1] < bounds[0]
    assert bounds[-1] < 1e-4
    assert bounds[-1] < 6 * truths[-1]  # it falls as fast as the truth, not only to the same limit


@pytest.mark.parametrize("n", [*range(1, 12), 100, 101])
def test_b4_closed_form(n: int) -> None:
    x = torch.arange(1, n + 1, dtype=torch.float64) % 2
    assert alternating_total_variation(n) == pytest.approx(softmax_total_variation(x, 1 - x).item(), abs=1e-14)


def test_b4_does_not_collapse_and_meets_the_sharp_bound() -> None:
    limit = 2 * (math.e - 1) / (math.e + 1)
    assert [alternating_total_variation(n) for n in (2, 4, 1000)] == pytest.approx([limit] * 3, abs=1e-15)
    assert alternating_total_variation(100_001) == pytest.approx(limit, abs=1e-4)
    x = torch.arange(10, dtype=torch.float64) % 2
    assert total_variation_bound(x, 1 - x) == pytest.approx(limit, abs=1e-15)


# ---------------------------------------------------------------- B.9


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_layers", [1, 2, 4])
def test_b9_only_the_ratio_survives_without_mask(n_layers: int, seed: int) -> None:
    found = {
        digits: ratio_representation(digits, n_layers=n_layers, seed=seed)
        for digits in ("10", "1100", "0101010", "100")
    }
    assert (found["10"] - found["1100"]).abs().max() <= ROUNDING
    assert (found["10"] - ratio_representation("01" * 50 + "10", n_layers=n_layers, seed=seed)).abs().max() <= ROUNDING
    assert (found["10"] - found["100"]).abs().max() > 1e-3
    assert (found["10"] - found["0101010"]).abs().max() > 1e-3
    assert (found["10"] - ratio_representation("1100", n_layers=n_layers, seed=seed + 1)).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_b9_a_causal_mask_tells_them_apart_from_two_layers_on(seed: int) -> None:
    for n_layers in (2, 4):
        one, two = (ratio_representation(d, n_layers=n_layers, causal=True, seed=seed) for d in ("10", "1100"))
        assert (one - two).abs().max() > 1e-3
    # The last token of a single layer sees all tokens either way.
    masked, open_ = (ratio_representation("1100", causal=causal, seed=seed) for causal in (True, False))
    assert (masked - open_).abs().max() <= ROUNDING


# ---------------------------------------------------------------- B.10


def averages(v0: torch.Tensor, v1: torch.Tensor, n: int) -> torch.Tensor:
    """Representations after 1 … n ones behind one v0, summed up one by one: [n, d_model]."""
    total = torch.cat([v0[None], v1.expand(n, -1)]).cumsum(0)
    return total[1:] / torch.arange(2, n + 2, dtype=torch.float64)[:, None]


def relative_distances(y: torch.Tensor) -> torch.Tensor:
    return (y[1:] - y[:-1]).norm(dim=1) / y[:-1].norm(dim=1)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("d_model", [1, 3, 64])
@pytest.mark.parametrize("seed", range(4))
def test_b10_nothing_is_lost_in_storage_above_the_limit(storage: str, d_model: int, seed: int) -> None:
    fmt = number_format(f"float64:store={storage}")
    y = averages(random(seed, d_model, scale=3), random(seed + 100, d_model), 3000)
    relative = relative_distances(y)
    equal = (stored(y, fmt)[1:] == stored(y, fmt)[:-1]).all(1)
    assert equal.any()
    assert not (equal & (relative > fmt.epsilon / (1 - fmt.epsilon / 2))).any()
    limit = counting_limit(relative, fmt)
    assert limit is not None
    assert (relative[limit - 1 :] < fmt.epsilon).all()
    assert limit == 1 or relative[limit - 2] >= fmt.epsilon


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
@pytest.mark.parametrize(("v0", "v1"), [(0.0, 1.0), (-1.0, 1.0), (5.0, 1.0), (1.0, 1.99), (3.0, -0.7)])
def test_b10_one_number_stops_counting_by_twice_the_limit(storage: str, v0: float, v1: float) -> None:
    """Past it steps are below half a spacing, so of three of them in a row one crosses no rounding boundary."""
    fmt = number_format(f"float64:store={storage}")
    ends = [torch.tensor([v], dtype=torch.float64) for v in (v0, v1)]
    limit = averaging_counting_limit(*ends, fmt)
    kept = stored(averages(*ends, 4 * limit), fmt)[:, 0]
    first = int((kept[1:] == kept[:-1]).nonzero()[0]) + 1
    print(f"\n{storage}, {v0:g} then {v1:g}: limit {limit}, first equal neighbours after {first} ones")
    assert 0.9 * limit <= first <= 2 * limit + 3


@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100), storage=st.sampled_from(STORAGE[:2]))
def test_b10_closed_form_is_where_the_steps_pass_epsilon(seed: int, scale: float, storage: str) -> None:
    fmt = number_format(f"float64:store={storage}")
    v0, v1 = random(seed, 5, scale=scale), random(seed + 1, 5)
    limit = averaging_counting_limit(v0, v1, fmt)
    y = averages(v0, v1, limit + 3)
    steps = (y[1:] - y[:-1]).norm(dim=1) / v1.norm()
    assert counting_limit(steps * (1 - ROUNDING), fmt) in (limit, limit - 1)
    assert counting_limit(steps * (1 + ROUNDING), fmt) in (limit, limit + 1)


def test_b10_limits_by_format() -> None:
    nothing, one = torch.zeros(2), torch.ones(2)
    limits = {name: averaging_counting_limit(nothing, one, name) for name in ("bfloat16", "float16", "float32")}
    assert limits == {"bfloat16": 10, "float16": 31, "float32": 2895}
    assert averaging_counting_limit(one, one, "bfloat16") == 1  # nothing ever moves
    assert averaging_counting_limit(one, nothing, "bfloat16") is None  # relative to nothing, everything moves


def test_b10_never_and_at_once() -> None:
    curve = torch.tensor([0.5, 0.001, 0.4])
    assert counting_limit(curve, "bfloat16") is None
    assert counting_limit(curve[:2], "bfloat16") == 2
    assert counting_limit(curve[1:2], "bfloat16") == 1
    assert counting_limit(torch.tensor([0.001, math.nan]), "bfloat16") is None


@pytest.mark.parametrize("n", [0, -3])
def test_lengths_that_are_none(n: int) -> None:
    for measure in (alternating_total_variation, lambda n: largest_weight(n, 1.0)):
        with pytest.raises(InputError, match="expected at least 1, as a whole number, got n="):
            measure(n)


@pytest.mark.parametrize(("digits", "options"), [("1a", {}), ("", {}), ("²", {}), ("10", {"n_layers": 0})])
def test_sequences_that_are_none(digits: str, options: dict) -> None:
    with pytest.raises(InputError, match="expected digits"):
        ratio_representation(digits, **options)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(InputError, match="heads that divide d_model"):
        ratio_representation("10", d_model=16, n_heads=3)
