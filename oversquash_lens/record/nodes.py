"""What one layer's MLP does to a signal at each position: its mean-square gain and a rigorous Lipschitz bound.

Row-vector convention, x̂ the normalised residual, c = act'(gate)·up and a = act(gate) (plain MLP: c = act'(pre),
no a). The Jacobian of the MLP with its norm is

    J = (1/r) (I - x̂x̂ᵀ/d) diag(γ₂) [W_gate diag(c) + W_in diag(a)] W_out,

where LayerNorm's centring also takes the mean out of each column of diag(γ₂)W. Without a norm r = 1 and nothing is
taken away; a norm of what the MLP writes multiplies J from the right by (I - ôôᵀ/d) diag(γ_post)/ρ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import InputError, one_line
from oversquash_lens.record.activations import Activation
from oversquash_lens.record.parameters import LayerWeights
from oversquash_lens.record.wide import wide

Slopes = list[Float[Tensor, "pos d_mlp"]]  # [c, a] of a gated MLP, [c] of a plain one

CHUNK = 1 << 24  # elements of [probe, pos, d_mlp] held at a time


@dataclass(frozen=True)
class MlpState:
    """One layer's MLP at the prompt's positions. Without a gate `gate` is what the activation reads, `up` None.

    `norms` is the layout's: "layer", "rms" or "none". `post_scale`, `post_normalized`: divisor and result of a norm
    of what the MLP writes, None without one.
    """

    normalized: Float[Tensor, "pos d_model"]
    scale: Float[Tensor, " pos"]
    gate: Float[Tensor, "pos d_mlp"]
    up: Float[Tensor, "pos d_mlp"] | None
    norms: str
    post_scale: Float[Tensor, " pos"] | None = None
    post_normalized: Float[Tensor, "pos d_model"] | None = None

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
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) < seed < 2**63:
        raise InputError(f"seed={one_line(repr(seed), 60)} came; expected a whole number of at most 63 bits: give 0")
    return torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)


def probe_directions(d_model: int, probes: int | None, seed: int, layer: int) -> Float[Tensor, "probe d_model"]:
    """Orthogonal directions of squared length d_model, anew for each layer; all of them where probes is None.

    The mean of ‖ω(I+J)‖² over such ω is an unbiased estimate of ‖I+J‖_F², exact when there are d_model of them.
    """
    if probes is None or probes >= d_model:
        return torch.eye(d_model, dtype=torch.float64, device="cpu") * d_model**0.5
    gaussian = torch.randn(d_model, probes, generator=random_source(seed, layer), dtype=torch.float64, device="cpu")
    return torch.linalg.qr(gaussian).Q.T * d_model**0.5


def node_gain(state: MlpState, w: LayerWeights, slopes: Slopes, directions: Tensor) -> Float[Tensor, " pos"]:
    """‖I + J‖_F²/d_model at every position (docs/theory.md, section 4), from probes that all positions share."""
    dtype = state.gate.dtype
    directions = directions.to(state.gate)
    pushed, offsets = _pushed(w, directions, dtype, state.norms == "layer")
    along, radial = _projection(state, slopes, directions, offsets)
    w_out, total = w.mlp_out.to(dtype), torch.zeros_like(state.scale)
    step = max(1, CHUNK // state.gate.numel())
    for start in range(0, len(directions), step):
        part = slice(start, start + step)
        hidden = pushed[0][part, None] * slopes[0]
        for push, slope in zip(pushed[1:], slopes[1:], strict=True):
            hidden.addcmul_(push[part, None], slope)
        if radial is not None:
            hidden.addcmul_(along[part, :, None], radial, value=-1)
        out = (hidden @ w_out) / state.scale[:, None]
        out = _through_post_norm(out, state, w) + directions[part, None]
        total += out.square().sum((0, 2))
    return total / (len(directions) * directions.shape[1])


def _projection(
    state: MlpState, slopes: Slopes, directions: Tensor, offsets: list
) -> tuple[Float[Tensor, "probe pos"] | None, Float[Tensor, "pos d_mlp"] | None]:
    """What the norm's projection takes away: how much of each direction, times which change of the neurons."""
    if state.norms == "none":
        return None, None
    along = einsum(state.normalized, directions, "pos d, probe d -> probe pos") / directions.shape[1]
    inner = [state.gate] if state.up is None else [state.gate, state.up]
    inner = [x - offset for x, offset in zip(inner, offsets, strict=True)]
    return along, sum(x * slope for x, slope in zip(inner, slopes, strict=True))


def _through_post_norm(
    out: Float[Tensor, "probe pos d_model"], state: MlpState, w: LayerWeights
) -> Float[Tensor, "probe pos d_model"]:
    """What a norm behind the MLP makes of a change of what it writes."""
    if state.post_scale is None:
        return out
    if state.norms == "layer":
        out = out - out.mean(-1, keepdim=True)
    unit = state.post_normalized
    along = einsum(out, unit, "probe pos d, pos d -> probe pos") / unit.shape[1]
    return (out - along[:, :, None] * unit) * (w.mlp_post_gain.to(out) / state.post_scale[:, None])


def node_gain_by_backward(
    block_update: Callable[[Tensor], Tensor], entering: Float[Tensor, "pos d_model"], directions: Tensor
) -> Float[Tensor, " pos"]:
    """`node_gain` of any MLP that treats positions apart, from backward products: a mixture of experts and its router.

    `block_update` maps [pos, d_model], the residual that its norm reads, to what the MLP adds to it.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = entering.detach().clone().requires_grad_()
        update = block_update(leaf)
        total = wide(torch.zeros(len(entering), device=entering.device))
        for direction in directions.to(update):
            (pulled,) = torch.autograd.grad(update, leaf, direction.expand_as(update), retain_graph=True)
            total += wide((pulled + direction).detach()).square().sum(1)
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
    steepest = [wide(slope.abs().amax(1)) for slope in slopes]
    norms = [in_norm] if len(slopes) == 1 else [gate_norm, in_norm]
    return sum(norm.to(slope) * slope for norm, slope in zip(norms, steepest, strict=True)) * out_norm.to(steepest[0])
