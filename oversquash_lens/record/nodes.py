"""What one layer's MLP does to a signal at each position: its mean-square gain and a rigorous Lipschitz bound.

Row-vector convention, x̂ the normalised residual, c = act'(gate)·up and a = act(gate) (plain MLP: c = act'(pre),
no a). The Jacobian of the MLP with its norm is

    J = (1/r) (I - x̂x̂ᵀ/d) diag(γ₂) [W_gate diag(c) + W_in diag(a)] W_out,

where LayerNorm's centring also takes the mean out of each column of diag(γ₂)W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import InputError
from oversquash_lens.record.layout import Activation, LayerWeights

Slopes = list[Float[Tensor, "pos d_mlp"]]  # [c, a] of a gated MLP, [c] of a plain one

CHUNK = 1 << 24  # elements of [probe, pos, d_mlp] held at a time


@dataclass(frozen=True)
class MlpState:
    """One layer's MLP at the prompt's positions. Without a gate `gate` is what the activation reads, `up` None."""

    normalized: Float[Tensor, "pos d_model"]
    scale: Float[Tensor, " pos"]
    gate: Float[Tensor, "pos d_mlp"]
    up: Float[Tensor, "pos d_mlp"] | None

    def slopes(self, activation: Activation) -> Slopes:
        """[c, a] of a gated MLP, [c] of a plain one: how the output of each neuron follows its inputs."""
        value, slope = _value_and_slope(activation, self.gate)
        return [slope] if self.up is None else [slope * self.up, value]


def _value_and_slope(activation: Activation, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        x = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        value = activation.function(x)
        (slope,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), slope


def random_source(seed: int, layer: int = 0) -> torch.Generator:
    """Reproducible randomness on the CPU, another for each layer."""
    if not -(2**63) < seed < 2**63:
        raise InputError(f"seed={seed} came; expected a whole number of at most 63 bits")
    return torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)


def probe_directions(d_model: int, probes: int | None, seed: int, layer: int) -> Float[Tensor, "probe d_model"]:
    """Orthogonal directions of squared length d_model, anew for each layer; all of them where probes is None.

    The mean of ‖ω(I+J)‖² over such ω is an unbiased estimate of ‖I+J‖_F², exact when there are d_model of them.
    """
    if probes is None or probes >= d_model:
        return torch.eye(d_model, dtype=torch.float64) * d_model**0.5
    gaussian = torch.randn(d_model, probes, generator=random_source(seed, layer), dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q.T * d_model**0.5


def node_gain(
    state: MlpState, w: LayerWeights, slopes: Slopes, directions: Tensor, centred: bool
) -> Float[Tensor, " pos"]:
    """‖I + J‖_F²/d_model at every position (docs/theory.md, section 4), from probes that all positions share."""
    dtype = state.gate.dtype
    directions = directions.to(state.gate)
    pushed, offsets = _pushed(w, directions, dtype, centred)
    along = einsum(state.normalized, directions, "pos d, probe d -> probe pos") / directions.shape[1]
    inner = [state.gate] if state.up is None else [state.gate, state.up]
    inner = [x - offset for x, offset in zip(inner, offsets, strict=True)]
    radial = sum(x * slope for x, slope in zip(inner, slopes, strict=True))  # what the norm's projection takes away
    w_out, total = w.mlp_out.to(dtype), torch.zeros_like(state.scale)
    step = max(1, CHUNK // state.gate.numel())
    for start in range(0, len(directions), step):
        part = slice(start, start + step)
        hidden = pushed[0][part, None] * slopes[0]
        for push, slope in zip(pushed[1:], slopes[1:], strict=True):
            hidden.addcmul_(push[part, None], slope)
        hidden.addcmul_(along[part, :, None], radial, value=-1)
        out = (hidden @ w_out) / state.scale[:, None] + directions[part, None]
        total += out.square().sum((0, 2))
    return total / (len(directions) * directions.shape[1])


def _pushed(w: LayerWeights, directions: Tensor, dtype: torch.dtype, centred: bool) -> tuple[list, list]:
    """ω diag(γ₂) W for gate and in (multiplied once per layer, not per position), and the matching offsets."""
    gain = w.mlp_gain.to(dtype)
    scaled = (directions - directions.mean(1, keepdim=True) if centred else directions) * gain
    if w.mlp_gate is None:
        return [scaled @ w.mlp_in.to(dtype)], [w.mlp_in_offset.to(dtype)]
    return (
        [scaled @ w.mlp_gate.to(dtype), scaled @ w.mlp_in.to(dtype)],
        [w.mlp_gate_offset.to(dtype), w.mlp_in_offset.to(dtype)],
    )


def mlp_lipschitz(
    slopes: Slopes,
    gate_norm: Float[Tensor, ""],
    in_norm: Float[Tensor, ""],
    out_norm: Float[Tensor, ""],
) -> Float[Tensor, " pos"]:
    """Rigorous bound on ‖J‖₂ at every position, the norm's 1/r left out (docs/theory.md, section 3)."""
    steepest = [slope.abs().amax(1).double() for slope in slopes]
    norms = [in_norm] if len(slopes) == 1 else [gate_norm, in_norm]
    return sum(norm.to(slope) * slope for norm, slope in zip(norms, steepest, strict=True)) * out_norm.to(steepest[0])
