"""The bounds against sums over paths written out one by one, the paper's lemmas, and the exact Jacobian.

That the sound ones hold on models of every kind is shown in test_soundness.py.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import (
    LIPSCHITZ,
    PRINTED,
    SOUND,
    VARIANTS,
    Paths,
    activation_slope_sup,
    brute_force,
    exact_jacobian,
    geometric_mean,
    matrix_product,
    read,
    reference,
    spectral,
)
from small_models import (
    CASES,
    HOOKED_CASES,
    NO_HOOKED,
    case,
    has_hooked,
    hooked,
    random_spec,
    silent_mlps,
    tokens_for,
)

import oversquash_lens as osl
from oversquash_lens.capture.hooked_model import ACTIVATIONS
from oversquash_lens.errors import InputError
from oversquash_lens.paths.recursion import PathProfile, log_path_products
from oversquash_lens.paths.squashing import count_paths, uniform_causal

record = partial(osl.record, attention="kept")  # references read the model's own patterns

TIGHT = 1e-12  # relative; float64 against float64
# A Llama on Bridge is rotated in float32, so ‖q‖ and ‖k‖ change by that much between projection and score.
ROTATED_IN_FLOAT32 = {("bridge-llama", "calibrated_full"): 1e-6}
SOUND_SLACK = 1e-9
NO_CONSTANT = ("theorem_5_1", "rollout")
WITH_BETA = tuple(variant for variant in PRINTED if variant != "rollout")

needs_hooked = pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)


def worst_relative_error(logs: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest |exp(logs)/wanted − 1|; where a path sum is 0 the log must be -inf."""
    none = wanted == 0
    assert torch.equal(torch.isneginf(logs), none), "a path where none is, or none where one is"
    return (logs[~none].exp() / wanted[~none] - 1).abs().max().item()


def assert_matches(profile: PathProfile, paths: Paths, tolerance: float = TIGHT) -> None:
    """Every layer's row and the constant of `profile` equal those of `paths`, path by path."""
    n = len(paths.edges[0])
    assert profile.log_by_layer.dtype == torch.float64
    assert profile.log_by_layer.shape == (len(paths.edges) + 1, n)
    sums = brute_force(paths.edges, paths.nodes, n)
    assert worst_relative_error(profile.log_by_layer, sums) <= tolerance
    if math.isnan(paths.log_constant):
        assert math.isnan(profile.log_constant)
    else:
        assert math.expm1(profile.log_constant - paths.log_constant) == pytest.approx(0, abs=tolerance)
        values = sums[0] * math.exp(paths.log_constant)
        assert torch.allclose(profile.values, values, rtol=3 * tolerance, atol=0)
        assert torch.equal(profile.log_values, profile.log_by_layer[0] + profile.log_constant)
    assert torch.allclose(profile.share, sums[0] / sums[0].sum(), rtol=3 * tolerance, atol=0)


def package_lipschitz() -> dict[str, float]:
    """The package's own Lipschitz constants of the activations (checked against a grid below)."""
    return {name: ACTIVATIONS[name].lipschitz for name in LIPSCHITZ}


# --- every variant is the sum over paths that the theory says ---


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_sum_over_all_paths(name: str, variant: str) -> None:
    model, tokens = case(name)
    profile = osl.path_bound(record(model, tokens), variant=variant)
    assert profile.kind == variant
    expected = reference(read(model, tokens), variant, lipschitz=package_lipschitz())
    assert_matches(profile, expected, ROTATED_IN_FLOAT32.get((name, variant), TIGHT))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", WITH_BETA)
def test_variant_with_given_beta_equals_sum_over_all_paths(name: str, variant: str) -> None:
    model, tokens = case(name)
    profile = osl.path_bound(record(model, tokens), variant=variant, beta=1.0)
    assert_matches(profile, reference(read(model, tokens), variant, beta=1.0, lipschitz=package_lipschitz()))


@needs_hooked
@given(seed=st.integers(0, 10_000), n=st.integers(2, 6))
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_variants_equal_path_sums_on_random_architectures(seed: int, n: int) -> None:
    model, tokens = hooked(seed, **random_spec(seed)), tokens_for(seed, n)
    trace, reading = record(model, tokens), read(model, tokens)
    for variant in VARIANTS:
        expected = reference(reading, variant, lipschitz=package_lipschitz())
        assert_matches(osl.path_bound(trace, variant=variant), expected)


@pytest.mark.parametrize("name", CASES)
def test_last_row_is_the_last_token_alone(name: str) -> None:
    model, tokens = case(name)
    last = osl.path_bound(record(model, tokens)).log_by_layer[-1]
    assert last[-1] == 0
    assert torch.isneginf(last[:-1]).all()


@pytest.mark.parametrize("variant", NO_CONSTANT)
def test_no_values_where_the_paper_leaves_the_constant_open(variant: str) -> None:
    model, tokens = case(CASES[-1])
    profile = osl.path_bound(record(model, tokens), variant=variant)
    with pytest.raises(InputError, match="share"):
        _ = profile.values
    assert profile.share.sum().item() == pytest.approx(1, abs=TIGHT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shares_sum_to_one_at_every_layer(variant: str) -> None:
    model, tokens = case(CASES[-2])
    by_layer = osl.path_bound(record(model, tokens), variant=variant).share_by_layer
    assert torch.allclose(by_layer.sum(-1), torch.ones(len(by_layer), dtype=torch.float64), rtol=TIGHT)


def test_printed_forms_differ_as_the_paper_prints_them() -> None:
    """The three forms use different divisors, so on a model whose β₁ and β₂ differ their profiles differ."""
    model, tokens = case("bridge-gpt2")
    trace, reading = record(model, tokens), read(model, tokens)
    betas = [(geometric_mean(layer.r1), geometric_mean(layer.r2)) for layer in reading.layers]
    assert all(abs(one / two - 1) > 0.01 for one, two in betas), "a model that cannot tell them apart"
    shares = {name: osl.path_bound(trace, variant=name).share for name in PRINTED[:3]}
    for one, two in (("proof", "theorem_5_1"), ("proof", "theorem_b5"), ("theorem_5_1", "theorem_b5")):
        assert (shares[one] / shares[two]).log().abs().max() > 1e-4, (one, two)


@pytest.mark.parametrize(
    ("variant", "beta"),
    [("unknown", "measured"), ("proof", -1.0), ("proof", 0.0), ("proof", math.nan), ("proof", "one")]
    + [(variant, 1.0) for variant in ("rollout", *SOUND)],  # these have no β to be given
)
def test_bad_arguments_are_refused(variant: str, beta: str | float) -> None:
    model, tokens = case(CASES[-1])
    trace = record(model, tokens)
    with pytest.raises(InputError):
        osl.path_bound(trace, variant=variant, beta=beta)


# --- constants of the activations ---


@pytest.mark.parametrize("act", sorted(LIPSCHITZ))
def test_lipschitz_constant_is_the_slopes_least_upper_bound(act: str) -> None:
    exact = activation_slope_sup(act)
    assert exact - 1e-9 <= LIPSCHITZ[act] <= exact + 1e-9  # the reference's own
    assert exact <= package_lipschitz()[act] <= exact + 1e-3


def test_no_activation_of_the_package_is_steeper_than_its_constant() -> None:
    grid = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    for name, act in ACTIVATIONS.items():
        x = grid.clone().requires_grad_(True)
        steepest = torch.autograd.grad(act.function(x).sum(), x)[0].abs().max().item()
        assert steepest <= act.lipschitz <= steepest + 1e-3, name


# --- Lemmas B.6 and B.7, Proposition B.8 = 5.2 ---


def stochastic(seed: int, n: int, n_layers: int) -> torch.Tensor:
    """Random row-stochastic lower-triangular matrices, no zero below the diagonal, [layer, dest, src]."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(n_layers, n, n, generator=generator, dtype=torch.float64)
    return scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)


def rollout_of(matrices: torch.Tensor) -> torch.Tensor:
    """The package's rollout of given attention, [layer+1, pos]."""
    n_layers, n = matrices.shape[:2]
    store = {"attention": {index: matrix[None, None] for index, matrix in enumerate(matrices)}}
    store |= {f"{norm}_scale": {i: torch.ones(1, n) for i in range(n_layers)} for norm in ("attention", "mlp")}
    return osl.path_products(store, variant="rollout")


@given(seed=st.integers(0, 10_000), n=st.integers(2, 9))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_lemma_b6_largest_eigenvalue_is_one_and_simple(seed: int, n: int) -> None:
    """Row-stochastic, triangular, every row but the first with two non-zeros: 1 is the top, once."""
    (matrix,) = stochastic(seed, n, 1)
    values = torch.linalg.eigvals(matrix).abs().sort(descending=True).values
    assert values[0].item() == pytest.approx(1, abs=1e-9)
    assert values[1].item() < 1 - 1e-9


@pytest.mark.parametrize("name", CASES)
def test_lemma_b6_holds_of_recorded_attention(name: str) -> None:
    model, tokens = case(name)
    trace = record(model, tokens)
    n = tokens.shape[1]
    for attention in trace.attention:
        matrix = attention.rows(0, n).double().mean(0)
        assert torch.count_nonzero(matrix.triu(1)) == 0
        values = torch.linalg.eigvals(matrix).abs().sort(descending=True).values
        assert values[0].item() == pytest.approx(1, abs=1e-6)
        assert values[1].item() < 1 - 1e-6


@given(seed=st.integers(0, 10_000), n=st.integers(1, 9), n_layers=st.integers(1, 6))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_lemma_b7_products_stay_row_stochastic(seed: int, n: int, n_layers: int) -> None:
    matrices = stochastic(seed, n, n_layers)
    rows = rollout_of(matrices)
    halves = [(matrix + torch.eye(n, dtype=torch.float64)) / 2 for matrix in matrices]
    ones = [torch.ones(n, dtype=torch.float64)] * n_layers
    assert torch.allclose(rows.sum(-1), torch.ones(n_layers + 1, dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(rows, matrix_product(halves, ones), rtol=1e-12, atol=0)
    product = torch.eye(n, dtype=torch.float64)
    for matrix in matrices:
        product = matrix @ product
    assert torch.count_nonzero(product.triu(1)) == 0


@pytest.mark.parametrize("n", [2, 5, 12])
def test_proposition_b8_the_last_token_hears_only_the_first(n: int) -> None:
    """β₁ = β₂ = σ_ψ = 1 and β₃ = 4^L make the bound [(½(Λ+I))^L]_{n,i}, and that tends to e₁."""
    (matrix,) = stochastic(n, n, 1)
    half = (matrix + torch.eye(n, dtype=torch.float64)) / 2
    second = half.diagonal()[1:].max().item()  # a triangular matrix has its eigenvalues on the diagonal
    depth = math.ceil(math.log(1e-12) / math.log(second))  # enough for second^depth to be 1e-12
    edges = (matrix + torch.eye(n, dtype=torch.float64)).expand(depth, n, n)
    log_paths = log_path_products(lambda layer, start, stop: edges[layer, start:stop], n, depth)
    left = depth - torch.arange(depth + 1, dtype=torch.float64)  # layers above each row
    log_constant = left * (math.log(1 + 1) - math.log(4))  # Π(σ_ψ/β₂ + 1)/β₃
    bound = (log_paths + log_constant[:, None]).exp()
    assert torch.allclose(bound[0], torch.linalg.matrix_power(half, depth)[-1], rtol=1e-7, atol=1e-290)
    distance = (bound - torch.eye(n, dtype=torch.float64)[0]).abs().sum(-1)  # [layer+1], rows from all layers
    assert distance[0] < 1e-6
    assert (distance[:-1] <= distance[1:] + 1e-8).all(), "the deeper, the nearer to the first token"


# --- null models ---


@given(n=st.integers(1, 40), n_layers=st.integers(1, 12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_count_paths_is_a_binomial_coefficient(n: int, n_layers: int) -> None:
    profile = count_paths(n, n_layers)
    for layer in range(n_layers):
        left = n_layers - layer
        counts = torch.tensor([math.comb(n - i + left - 1, left - 1) for i in range(1, n + 1)]).double()
        assert torch.allclose(profile.log_by_layer[layer].exp(), counts, rtol=1e-12, atol=0)
    counts = torch.tensor([math.comb(n - i + n_layers - 1, n_layers - 1) for i in range(1, n + 1)]).double()
    assert torch.allclose(profile.values, counts, rtol=1e-12, atol=0)


def test_count_paths_by_enumeration() -> None:
    ones, nodes = torch.ones(5, 5, dtype=torch.float64).tril(), torch.ones(5, dtype=torch.float64)
    got = count_paths(5, 4).log_by_layer
    assert worst_relative_error(got, brute_force([ones] * 4, [nodes] * 4, 5)) <= TIGHT


@pytest.mark.parametrize("n", [1, 2, 7, 600])
def test_uniform_causal_in_one_layer_is_even(n: int) -> None:
    assert (uniform_causal(n, 1).values * n - 1).abs().max() <= 1e-12


@pytest.mark.parametrize(("n", "n_layers"), [(5, 2), (6, 4), (30, 9)])
def test_uniform_causal_is_the_power_of_the_even_matrix(n: int, n_layers: int) -> None:
    even = torch.ones(n, n, dtype=torch.float64).tril() / torch.arange(1, n + 1)[:, None]
    paths = matrix_product([even] * n_layers, [torch.ones(n, dtype=torch.float64)] * n_layers)
    profile = uniform_causal(n, n_layers)
    assert worst_relative_error(profile.log_by_layer, paths) <= TIGHT
    assert profile.values.sum().item() == pytest.approx(1, abs=TIGHT)
    assert profile.values.argmax() == 0, "mask geometry alone favours the first token"


# --- log space: nothing overflows, nothing underflows ---


def test_two_hundred_layers_do_not_overflow() -> None:
    """512 positions, 200 layers: binomial(710, 199) and larger, beyond float64 once gains are added."""
    n, depth = 512, 200
    logs = count_paths(n, depth).log_values
    i = torch.arange(1, n + 1, dtype=torch.float64)
    upper, lower = n - i + depth - 1, torch.tensor(depth - 1.0, dtype=torch.float64)
    expected = torch.lgamma(upper + 1) - torch.lgamma(lower + 1) - torch.lgamma(upper - lower + 1)
    assert torch.allclose(logs, expected, rtol=1e-10, atol=1e-9)
    edges = 1e12 * torch.ones(n, n, dtype=torch.float64).tril()
    grown = log_path_products(lambda layer, start, stop: edges[start:stop], n, depth)[0]
    assert torch.allclose(grown, expected + depth * math.log(1e12), rtol=1e-10)
    assert grown.max() > 1000, "exp of it is far beyond float64: the test must reach there"


def test_far_tokens_do_not_underflow() -> None:
    """A chain that steps back by one position, 1e-9 each time: [E^L]_{n,i} = binom(L, n-i)·1e-9^(n-i)."""
    n, depth = 120, 200
    edges = torch.eye(n, dtype=torch.float64) + 1e-9 * torch.diag(torch.ones(n - 1), -1).double()
    logs = log_path_products(lambda layer, start, stop: edges[start:stop], n, depth)[0]
    steps = torch.arange(n - 1, -1, -1)
    expected = torch.tensor(
        [math.log(math.comb(depth, s)) + s * math.log(1e-9) for s in steps.tolist()], dtype=torch.float64
    )
    assert expected.min() < -2000, "exp of it is far below float64: the test must reach there"
    assert torch.allclose(logs, expected, rtol=1e-11, atol=1e-9)


def test_node_gains_enter_at_the_destination() -> None:
    generator = torch.Generator().manual_seed(3)
    edges = [torch.rand(5, 5, generator=generator, dtype=torch.float64).tril() for _ in range(4)]
    nodes = [0.1 + torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(4)]
    logs = log_path_products(lambda layer, start, stop: edges[layer][start:stop], 5, 4, torch.stack(nodes).log())
    assert worst_relative_error(logs, brute_force(edges, nodes, 5)) <= TIGHT
    assert worst_relative_error(logs, matrix_product(edges, nodes)) <= TIGHT


# --- soundness ---


def test_theorem_b5_as_printed_is_no_bound() -> None:
    """ψ = 0: σ_ψ^L is 0, so the statement promises that nothing reaches y_n; the truth is positive."""
    model, tokens = case("bridge-gpt2")
    with silent_mlps(model):
        trace = record(model, tokens)
        truth = osl.measured_sensitivity(model, tokens, probes=None, norm="spectral", freeze=("attention",))
        bound = osl.path_bound(trace, variant="theorem_b5")
        assert (bound.values == 0).all()
        assert (truth.values > 1e-3).all()
        assert torch.isfinite(bound.log_by_layer[0]).all(), "[(Λ+I)^L]_{n,i} > 0 even on the theorem's own terms"
        sound = osl.path_bound(trace, variant="calibrated")
        assert (sound.values >= truth.values * (1 - SOUND_SLACK)).all()


@pytest.mark.parametrize("name", CASES)
def test_calibrated_bounds_hold_against_row_by_row_autograd(name: str) -> None:
    """With a truth that shares no code with the package."""
    model, tokens = case(name)
    trace = record(model, tokens)
    frozen = spectral(exact_jacobian(model, tokens, freeze_attention=True))
    full = spectral(exact_jacobian(model, tokens))
    assert (osl.path_bound(trace, variant="calibrated").values >= frozen * (1 - SOUND_SLACK)).all()
    assert (osl.path_bound(trace, variant="calibrated_full").values >= full * (1 - SOUND_SLACK)).all()


@needs_hooked
def test_calibrated_is_reached_where_nothing_is_lost() -> None:
    """One layer, no MLP, identity OV: the bound is the truth along what no norm projects out."""
    model = hooked(0, norm="RMS", n_layers=1, n_heads=1, d_model=12, act="relu")
    tokens = tokens_for(0, 2)
    with torch.no_grad(), silent_mlps(model):
        for name, parameter in model.named_parameters():
            if name.endswith(".w"):
                parameter.fill_(1)
            if name.endswith(("W_V", "W_O")):
                parameter.copy_(torch.eye(12).reshape(parameter.shape))
        truth = spectral(exact_jacobian(model, tokens, freeze_attention=True))
        reading = read(model, tokens)
        bound = osl.path_bound(record(model, tokens), variant="calibrated").values
    (layer,) = reading.layers
    expected = (torch.tensor([0.0, 1.0]) + layer.pattern[0, -1] / layer.r1) / reading.r3[-1]
    assert torch.allclose(bound, expected, rtol=1e-12, atol=0)
    assert torch.allclose(bound, truth, rtol=1e-9, atol=0)


def test_case_names_cover_both_classes() -> None:
    assert set(HOOKED_CASES) < set(CASES)
    assert any(name.startswith("bridge-") for name in CASES)
