"""The mean-square gain of a node against the whole Jacobian by autograd, for every kind of MLP and norm."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import oversquash_lens as osl
from oversquash_lens.capture import mlp as mlp_module
from oversquash_lens.capture.hooked_model import ACTIVATIONS
from oversquash_lens.capture.mlp import MlpState, PostNorm, layer_probes
from oversquash_lens.capture.weights import MlpWeights

D_MODEL, D_MLP, N = 20, 28, 5
EPS = 1e-5
KINDS = list(itertools.product((False, True), ("layer", "rms", "none"), (False, True)))
NAMES = [f"{'gated' if gated else 'plain'}-{norms}{'-post' if post else ''}" for gated, norms, post in KINDS]


class Mlp:
    """A random MLP with its norms, as a function of the residual and as a recording would have seen it."""

    def __init__(self, gated: bool, norms: str, post: bool, strength: float = 1.0) -> None:
        make = torch.Generator().manual_seed(3)

        def draw(*shape: int, spread: float = 1.0) -> torch.Tensor:
            return spread * torch.randn(*shape, generator=make, dtype=torch.float64)

        self.norms, self.act = norms, ACTIVATIONS["silu" if gated else "gelu_new"]
        self.gain, self.bias = 1 + 0.3 * draw(D_MODEL), draw(D_MODEL, spread=0.2)
        self.w_gate = draw(D_MODEL, D_MLP, spread=D_MODEL**-0.5) if gated else None
        self.w_in, self.w_out = draw(D_MODEL, D_MLP, spread=D_MODEL**-0.5), draw(D_MLP, D_MODEL, spread=D_MLP**-0.5)
        self.w_out = strength * self.w_out
        self.post_gain = 1 + 0.3 * draw(D_MODEL) if post and norms != "none" else None
        self.x = draw(N, D_MODEL, spread=2.0)

    def normalise(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.norms == "none":
            return x, torch.ones_like(x[..., :1])
        x = x - x.mean(-1, keepdim=True) if self.norms == "layer" else x
        scale = (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        return x / scale, scale

    def inside(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        entering = self.normalise(x)[0] * self.gain + self.bias
        if self.w_gate is None:
            return entering @ self.w_in, None
        return entering @ self.w_gate, entering @ self.w_in

    def written(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.inside(x)
        post = self.act.function(gate)
        return (post if up is None else post * up) @ self.w_out

    def node(self, x: torch.Tensor) -> torch.Tensor:
        out = self.written(x)
        return x + (out if self.post_gain is None else self.normalise(out)[0] * self.post_gain)

    def exact(self) -> torch.Tensor:
        jacobians = [torch.autograd.functional.jacobian(self.node, each) for each in self.x]
        return torch.stack([each.square().sum() for each in jacobians]) / D_MODEL

    def state(self) -> MlpState:
        normalized, scale = self.normalise(self.x)
        gate, up = self.inside(self.x)
        post_norm = None
        if self.post_gain is not None:
            unit, divisor = self.normalise(self.written(self.x))
            post_norm = PostNorm(divisor[:, 0], unit, self.post_gain, self.norms == "layer")
        return MlpState(normalized, scale[:, 0], (gate,) if up is None else (gate, up), self.norms, post_norm)

    def weights(self) -> MlpWeights:
        entering = (self.w_in,) if self.w_gate is None else (self.w_gate, self.w_in)
        return MlpWeights(
            activation=self.act,
            entering=entering,
            offsets=tuple(self.bias @ weight for weight in entering),
            post_bias=None,
            output=self.w_out,
            output_bias=None,
        )

    def gains(self, probes: int | None, seed: int = 0) -> torch.Tensor:
        state = self.state()
        measured = layer_probes(state, self.weights(), self.gain, probes, seed, 0)
        return torch.cat([measured.gain(block, block.slopes(self.act)) for block in state.blocks()])


@pytest.mark.parametrize(("gated", "norms", "post"), KINDS, ids=NAMES)
@pytest.mark.parametrize("probes", [None, D_MODEL, 10 * D_MODEL])
def test_all_directions_are_the_whole_jacobian(gated: bool, norms: str, post: bool, probes: int | None) -> None:
    mlp = Mlp(gated, norms, post)
    assert torch.allclose(mlp.gains(probes), mlp.exact(), rtol=2e-5 if norms != "none" else 1e-12)  # eps is left out


@pytest.mark.parametrize(("gated", "norms", "post"), KINDS, ids=NAMES)
@pytest.mark.parametrize("probes", [1, 3])
def test_probes_are_unbiased(gated: bool, norms: str, post: bool, probes: int) -> None:
    """Mean over 400 draws within 4.5 standard errors at each of 5 positions (p < 1e-3 over all cases)."""
    mlp = Mlp(gated, norms, post)
    exact = mlp.gains(None)
    drawn = torch.stack([mlp.gains(probes, seed) for seed in range(400)])
    scatter = drawn.std(0)
    assert (scatter > 1e-3 * exact).all(), "so few probes must scatter"
    assert ((drawn.mean(0) - exact).abs() < 4.5 * scatter / 20).all()


@pytest.mark.parametrize("norms", ["layer", "rms", "none"])
def test_all_pairs_are_the_whole_jacobian(norms: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides a whole basis: nothing is left to chance."""
    mlp = Mlp(True, norms, post=False)
    monkeypatch.setattr(mlp_module, "PAIRS", D_MODEL**2)
    assert torch.allclose(mlp.gains(1), mlp.gains(None), rtol=1e-11)


@pytest.mark.parametrize("block", [1, 2 * D_MLP, 1 << 20])
def test_blocks_of_positions_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = Mlp(True, "rms", post=False)
    whole = mlp.gains(2)
    monkeypatch.setattr(mlp_module, "BLOCK", block)
    assert torch.allclose(mlp.gains(2), whole, rtol=1e-12)
    monkeypatch.setattr(mlp_module, "CHUNK", 3 * D_MLP)
    assert torch.allclose(mlp.gains(None), mlp.exact(), rtol=2e-5)


def test_a_node_that_undoes_its_input_has_no_negative_gain() -> None:
    """J = -0.999 I: the sum 1 + 2 tr J/d + ‖J‖²/d nearly cancels, and noise must not push it below zero."""
    mlp = Mlp(False, "none", post=False)
    mlp.act = ACTIVATIONS["relu"]
    mlp.bias = torch.zeros(D_MODEL, dtype=torch.float64)
    mlp.gain = torch.ones(D_MODEL, dtype=torch.float64)
    mlp.x = mlp.x.abs()
    mlp.w_in = torch.eye(D_MODEL, D_MLP, dtype=torch.float64)
    mlp.w_out = -0.999 * torch.eye(D_MLP, D_MODEL, dtype=torch.float64)
    assert torch.allclose(mlp.exact(), torch.full((N,), 1e-6, dtype=torch.float64), rtol=1e-6)
    for seed in range(20):
        assert (mlp.gains(1, seed) > 0).all()


def test_the_default_is_off_by_the_error_that_is_stated(smollm2: Any) -> None:
    """docs/theory.md, section 4: 0.02 in log10, root mean square over layers and positions."""
    ids = torch.tensor(smollm2.tokenizer("Once upon a time there")["input_ids"])
    exact = osl.record(smollm2, ids, node_probes=None).gains.node_gain
    errors = [(osl.record(smollm2, ids, seed=seed).gains.node_gain / exact).log10() for seed in range(2)]
    assert torch.stack(errors).square().mean().sqrt() < 0.03
