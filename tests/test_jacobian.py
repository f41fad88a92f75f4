"""The measured sensitivity against autograd taken one row at a time, and against closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import exact_jacobian, frobenius, linear_jacobian, read, spectral
from small_models import CASES, NO_HOOKED, case, has_hooked, hooked, silent_mlps, tokens_for

import oversquash_lens as osl
from oversquash_lens.errors import InputError

FREEZES = [(), ("attention",), ("norms",), ("attention", "norms")]
NORMS = {"fro": frobenius, "spectral": spectral}
# Its norms, softmax and rotations are float32 inside.
TOLERANCE = {"bridge-llama": 1e-5}

needs_hooked = pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)
quiet = pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")


def row_by_row(model: object, tokens: torch.Tensor, freeze: tuple[str, ...]) -> torch.Tensor:
    return exact_jacobian(model, tokens, freeze_attention="attention" in freeze, freeze_norms="norms" in freeze)


@quiet
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("norm", "freeze"), list(itertools.product(NORMS, FREEZES)))
def test_exact_equals_row_by_row_autograd(name: str, norm: str, freeze: tuple[str, ...]) -> None:
    model, tokens = case(name)
    measured = osl.measured_sensitivity(model, tokens, probes=None, norm=norm, freeze=freeze)
    truth = NORMS[norm](row_by_row(model, tokens, freeze))
    assert measured.exact
    assert measured.probes is None
    assert (measured.norm, measured.freeze) == (norm, freeze)
    assert torch.count_nonzero(measured.standard_error) == 0
    assert torch.allclose(measured.values.double(), truth, rtol=TOLERANCE.get(name, 1e-10), atol=0)
    assert measured.share.sum().item() == pytest.approx(1, abs=1e-6)
    assert torch.allclose(measured.share.double(), truth / truth.sum(), rtol=1e-5)


@quiet
@pytest.mark.parametrize("name", CASES)
def test_vocabulary_steps_are_what_each_word_would_do(name: str) -> None:
    """√mean_w ‖J_i (v_i(w) − v_i)‖², word by word, v_i(w) being read off a pass with w at i."""
    model, tokens = case(name)
    measured = osl.measured_sensitivity(model, tokens, probes=None, norm="vocabulary")
    jacobian = row_by_row(model, tokens, ())
    words = torch.arange(model.cfg.d_vocab)
    entering: list[torch.Tensor] = []
    for place in range(tokens.shape[1]):
        each = tokens.repeat(len(words), 1)
        each[:, place] = words
        with torch.no_grad():
            hook = ("blocks.0.hook_resid_pre", lambda v, hook, place=place: entering.append(v[:, place].double()))
            model.run_with_hooks(each, fwd_hooks=[hook])
    steps = torch.stack([each - each[tokens[0, place]] for place, each in enumerate(entering)])
    moved = torch.einsum("pod,pwd->pwo", jacobian, steps)
    expected = moved.square().sum(-1).mean(-1).sqrt()
    assert torch.allclose(measured.values, expected, rtol=TOLERANCE.get(name, 1e-9) * 10, atol=1e-12)
    probed = osl.measured_sensitivity(model, tokens, probes=400, norm="vocabulary")
    assert ((probed.values - expected).abs() <= 5 * probed.standard_error + 1e-9).all()


@quiet
@pytest.mark.parametrize("name", CASES)
def test_freezing_changes_the_jacobian(name: str) -> None:
    """The four freezes measure four different things (else a freeze that does nothing would pass)."""
    model, tokens = case(name)
    results = [osl.measured_sensitivity(model, tokens, probes=None, freeze=freeze).values for freeze in FREEZES]
    for one, two in itertools.combinations(results, 2):
        assert ((one / two).log().abs() > 1e-4).any()


@quiet
@pytest.mark.parametrize("name", CASES)
def test_all_frozen_without_mlps_is_a_product_of_linear_maps(name: str) -> None:
    """Π_l (I + Σ_h A_h ⊗ C·diag(γ)·OV_h/r) and the last norm, closed form."""
    model, tokens = case(name)
    with silent_mlps(model):
        measured = osl.measured_sensitivity(model, tokens, probes=None, norm="spectral", freeze=("attention", "norms"))
        linear = linear_jacobian(read(model, tokens), centred="ln" in name or "gpt2" in name)
    assert torch.allclose(measured.values.double(), spectral(linear), rtol=TOLERANCE.get(name, 1e-10), atol=0)


@needs_hooked
def test_without_mlp_or_attention_only_the_final_norm_is_left() -> None:
    """y = γ₃·v/r: frozen, its Jacobian is diag(γ₃)/r, so ‖·‖_F = ‖γ₃‖/r and ‖·‖₂ = max|γ₃|/r."""
    model, tokens = hooked(4, norm="RMS", n_layers=2), tokens_for(4, 3)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_O.zero_()
    with silent_mlps(model):
        reading = read(model, tokens)
        got = {
            norm: osl.measured_sensitivity(model, tokens, probes=None, norm=norm, freeze=("norms",)).values
            for norm in NORMS
        }
    wanted = {"fro": reading.gain3.norm(), "spectral": reading.gain3.abs().max()}
    for norm, values in got.items():
        assert torch.count_nonzero(values[:-1]) == 0
        assert values[-1].item() == pytest.approx((wanted[norm] / reading.r3[-1]).item(), rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_spectral_and_frobenius_bound_each_other(name: str) -> None:
    model, tokens = case(name)
    fro = osl.measured_sensitivity(model, tokens, probes=None).values
    top = osl.measured_sensitivity(model, tokens, probes=None, norm="spectral").values
    assert (top <= fro * (1 + 1e-9)).all()
    assert (fro <= top * model.cfg.d_model**0.5 * (1 + 1e-9)).all()


@pytest.mark.parametrize("freeze", [(), ("attention",)])
def test_probes_agree_with_exact_within_their_standard_error(freeze: tuple[str, ...]) -> None:
    """64 probes: all errors below 4 standard errors (Gaussian: 6e-5 each), and their mean square near 1.

    z² averages over the positions of all models; its mean must lie in [0.4, 2.2] (a standard error half or
    twice as large as the scatter would give 4 or 0.25).
    """
    scores = []
    for name in CASES:
        if name.startswith("bridge") or has_hooked():
            model, tokens = case(name)
            exact = osl.measured_sensitivity(model, tokens, probes=None, freeze=freeze).values.double()
            for seed in range(4):
                probed = osl.measured_sensitivity(model, tokens, probes=64, freeze=freeze, seed=seed)
                assert not probed.exact
                assert probed.probes == 64
                assert (probed.standard_error > 0).all()
                scores.append((probed.values.double() - exact) / probed.standard_error.double())
    z = torch.cat(scores)
    assert len(z) >= 40
    assert z.abs().max() < 4
    assert 0.4 < z.square().mean() < 2.2


def test_standard_error_shrinks_with_the_root_of_the_number_of_probes() -> None:
    model, tokens = case("bridge-gpt2")
    few, many = (osl.measured_sensitivity(model, tokens, probes=k).standard_error.mean() for k in (32, 512))
    assert 2.5 < few / many < 6.5  # √16 = 4


def test_probes_repeat_with_their_seed() -> None:
    model, tokens = case("bridge-llama")
    first, again, other = (osl.measured_sensitivity(model, tokens, probes=4, seed=seed).values for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_drawing_probes_leaves_the_global_random_state_alone() -> None:
    model, tokens = case("bridge-llama")
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    osl.measured_sensitivity(model, tokens, probes=4, seed=3)
    osl.record(model, tokens)
    assert torch.equal(torch.rand(3), wanted)


def n_hooks(model: object) -> int:
    return sum(len(point._forward_hooks) + len(point._backward_hooks) for point in model.hook_dict.values())


@quiet
@pytest.mark.parametrize("name", CASES)
def test_measuring_leaves_the_model_as_it_was(name: str) -> None:
    model, tokens = case(name)
    with torch.no_grad():
        before = model(tokens).clone()
    hooks, wants = n_hooks(model), [parameter.requires_grad for parameter in model.parameters()]
    osl.measured_sensitivity(model, tokens, probes=None, freeze=("attention", "norms"))
    osl.measured_sensitivity(model, tokens, probes=2)
    with torch.no_grad():
        assert torch.equal(model(tokens), before)
    assert n_hooks(model) == hooks
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["ln-plain-learned", "bridge-llama"])
def test_works_inside_no_grad_and_on_frozen_weights(name: str) -> None:
    model, tokens = case(name)
    truth = frobenius(exact_jacobian(model, tokens))
    wants = [parameter.requires_grad for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        with torch.no_grad():
            values = osl.measured_sensitivity(model, tokens, probes=None).values
    finally:
        for parameter, want in zip(model.parameters(), wants, strict=True):
            parameter.requires_grad_(want)
    assert torch.allclose(values.double(), truth, rtol=TOLERANCE.get(name, 1e-10), atol=0)


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_a_small_memory_budget_changes_nothing(norm: str) -> None:
    model, tokens = case("bridge-gpt2")
    whole, pieces = (
        osl.measured_sensitivity(model, tokens, probes=None, norm=norm, memory=budget).values for budget in (1 << 30, 1)
    )
    assert torch.allclose(whole, pieces, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["ln-plain-learned", "bridge-gpt2"])
def test_exact_costs_no_pass_per_position(name: str) -> None:
    """The number of forward passes does not grow with the prompt."""
    model, _ = case(name)
    passes = {}
    for n in (3, 12):
        count = 0

        def tick(value: torch.Tensor, hook: object = None) -> None:
            nonlocal count
            count += 1

        with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", tick)]):
            osl.measured_sensitivity(model, tokens_for(0, n), probes=None)
        passes[n] = count
    assert 1 <= passes[3] == passes[12] <= 3


@pytest.mark.parametrize(
    "bad",
    [{"norm": "nuclear"}, {"freeze": ("mlp",)}, {"probes": 0}, {"probes": -3}, {"norm": "spectral"}],
    ids=["norm", "freeze", "no probes", "negative probes", "spectral from probes"],
)
def test_bad_arguments_are_refused(bad: dict) -> None:
    model, tokens = case("bridge-gpt2")
    with pytest.raises(InputError):
        osl.measured_sensitivity(model, tokens, **bad)
