"""What one layer's MLP does to a signal at each position: its mean-square gain and a rigorous Lipschitz bound.

Row-vector convention, x̂ the normalised residual, c = act'(gate)·up and a = act(gate) (plain MLP: c = act'(pre),
no a). The Jacobian of the MLP with its norm is

    J = (1/r) (I - x̂x̂ᵀ/d) diag(γ₂) [W_gate diag(c) + W_in diag(a)] W_out,

where LayerNorm's centring also takes the mean out of each column of diag(γ₂)W. Without a norm r = 1 and nothing is
taken away; a norm of what the MLP writes multiplies J from the right by (I - ôôᵀ/d) diag(γ_post)/ρ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.activations import Activation
from oversquash_lens.capture.parameters import LayerWeights
from oversquash_lens.errors import InputError, one_line
from oversquash_lens.numerics import to_float64

Slopes = list[Float[Tensor, "pos d_mlp"]]  # [c, a] of a gated MLP, [c] of a plain one

CHUNK = 1 << 24  # elements of [probe, pos, d_mlp] held at a time
BLOCK = 1 << 18  # elements of [pos, d_mlp] at a time where a cache holds them; an accelerator takes CHUNK
PAIRS = 72  # pairs of directions that tell as much of ‖J‖_F² as one direction does through the whole MLP


@dataclass(frozen=True)
class MlpState:
    """One layer's MLP at the prompt's positions. Without a gate `gate` is what the activation reads, `up` None.

    `norms` is the architecture's: "layer", "rms" or "none". `post_scale`, `post_normalized`: divisor and result of a
    norm of what the MLP writes, None without one.
    """

    normalized: Float[Tensor, "pos d_model"]
    scale: Float[Tensor, " pos"]
    gate: Float[Tensor, "pos d_mlp"]
    up: Float[Tensor, "pos d_mlp"] | None
    norms: str
    post_scale: Float[Tensor, " pos"] | None = None
    post_normalized: Float[Tensor, "pos d_model"] | None = None

    def blocks(self) -> Iterator[MlpState]:
        """The same, some positions at a time."""
        n, step = len(self.gate), BLOCK if self.gate.device.type == "cpu" else CHUNK
        step = max(1, step // self.gate.shape[1])
        for start in range(0, n, step):
            part = {key: value[start : start + step] for key, value in vars(self).items() if isinstance(value, Tensor)}
            yield replace(self, **part)

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
        raise InputError(f"expected a whole number of at most 63 bits, got seed={one_line(repr(seed), 60)}: give 0")
    return torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)


def probe_directions(d_model: int, probes: int | None, seed: int, layer: int) -> Float[Tensor, "probe d_model"]:
    """Orthogonal directions of squared length d_model, anew for each layer; all of them where probes is None.

    The mean of ‖ω(I+J)‖² over such ω is an unbiased estimate of ‖I+J‖_F², exact when there are d_model of them.
    """
    if probes is None or probes >= d_model:
        return torch.eye(d_model, dtype=torch.float64, device="cpu") * d_model**0.5
    gaussian = torch.randn(d_model, probes, generator=random_source(seed, layer), dtype=torch.float64, device="cpu")
    return torch.linalg.qr(gaussian).Q.T * d_model**0.5


class Directions:
    """ω(I + J) in full. The mean of its square is exact where the ω are a whole basis."""

    def __init__(self, state: MlpState, w: LayerWeights, directions: Float[Tensor, "probe d_model"]) -> None:
        self.w, self.directions = w, directions.to(state.gate)
        self.pushed = _pushed(w, self.directions, state.norms == "layer")
        self.offsets = _offsets(w, state.gate.dtype)
        self.w_out = w.mlp_out.to(state.gate)

    def gain(self, state: MlpState, slopes: Slopes) -> Float[Tensor, " pos"]:
        """‖I + J‖_F²/d_model at every position (docs/theory.md, section 4)."""
        directions, total = self.directions, torch.zeros_like(state.scale)
        if state.norms != "none":
            radial = _radial(state, slopes, self.offsets)
            along = einsum(state.normalized, directions, "pos d, probe d -> probe pos") / directions.shape[1]
        step = max(1, CHUNK // state.gate.numel())
        for start in range(0, len(directions), step):
            part = slice(start, start + step)
            hidden = self.pushed[0][part, None] * slopes[0]
            for push, slope in zip(self.pushed[1:], slopes[1:], strict=True):
                hidden.addcmul_(push[part, None], slope)
            if state.norms != "none":
                hidden.addcmul_(along[part, :, None], radial, value=-1)
            out = (hidden @ self.w_out) / state.scale[:, None]
            out = _through_post_norm(out, state, self.w) + directions[part, None]
            total += out.square().sum((0, 2))
        return total / (len(directions) * directions.shape[1])


class Pairs:
    """ωJη for every pair of some ω and some η: its mean square is an unbiased estimate of ‖J‖_F², that of ωJω of tr J.

    ‖I + J‖_F² = d_model + 2 tr J + ‖J‖_F². What a pair makes of each neuron is known beforehand, so all positions and
    all pairs together are one matrix product.
    """

    def __init__(
        self,
        state: MlpState,
        w: LayerWeights,
        entering: Float[Tensor, "into d_model"],
        leaving: Float[Tensor, "out d_model"],
    ) -> None:
        self.entering, self.leaving = entering.to(state.gate), leaving.to(state.gate)
        directions = torch.cat([self.leaving, self.entering])
        self.out, back = (w.mlp_out.to(state.gate) @ directions.T).split([len(leaving), len(entering)], dim=1)
        pushed = [push.T for push in _pushed(w, self.entering, state.norms == "layer")]
        self.pairs = [(push[:, :, None] * self.out[:, None]).flatten(1) for push in pushed]
        self.traces = [(push * back).mean(1) for push in pushed]
        self.offsets = _offsets(w, state.gate.dtype)

    def gain(self, state: MlpState, slopes: Slopes) -> Float[Tensor, " pos"]:
        """‖I + J‖_F²/d_model at every position (docs/theory.md, section 4)."""
        d_model = state.normalized.shape[1]
        products = sum(slope @ pairs for slope, pairs in zip(slopes, self.pairs, strict=True))
        products = products.view(-1, len(self.entering), len(self.leaving))
        trace = sum(slope @ each for slope, each in zip(slopes, self.traces, strict=True))
        if state.norms != "none":
            out = _radial(state, slopes, self.offsets) @ self.out / d_model
            products.addcmul_((state.normalized @ self.entering.T)[:, :, None], out[:, None], value=-1)
            trace = trace - (out * (state.normalized @ self.leaving.T)).mean(1)
        diagonal = 1 + trace / (d_model * state.scale)
        square = products.square().mean((1, 2)) / (d_model * state.scale.square())
        return torch.maximum(2 * diagonal - 1 + square, diagonal.square())  # ‖M‖_F² ≥ (tr M)²/d_model for every M


def layer_probes(state: MlpState, w: LayerWeights, probes: int | None, seed: int, layer: int) -> Directions | Pairs:
    """Probes that all positions share, drawn anew for each layer and multiplied into its weights once.

    Pairs of directions, at a quarter of the cost of whole ones, unless every direction is asked for; a norm of what
    the MLP writes turns each position's another way, so there whole ones are taken, too.
    """
    d_model = state.normalized.shape[1]
    if probes is None or probes >= d_model or state.post_scale is not None:
        return Directions(state, w, probe_directions(d_model, probes, seed, layer))
    return Pairs(state, w, *pair_directions(d_model, probes, seed, layer))


def pair_directions(d_model: int, probes: int, seed: int, layer: int) -> tuple[Tensor, Tensor]:
    """Directions in and directions out, orthogonal among themselves; `PAIRS` pairs of them for each probe."""
    each = math.ceil((PAIRS * probes) ** 0.5)
    return tuple(probe_directions(d_model, each, seed, place) for place in (layer, ~layer))


def _radial(state: MlpState, slopes: Slopes, offsets: list[Tensor]) -> Float[Tensor, "pos d_mlp"]:
    """How the neurons follow the one direction that the norm takes away, the position's own."""
    radial = (state.gate - offsets[0]).mul_(slopes[0])
    return radial if state.up is None else radial.addcmul_(state.up - offsets[1], slopes[1])


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
        total = to_float64(torch.zeros(len(entering), device=entering.device))
        for direction in directions.to(update):
            (pulled,) = torch.autograd.grad(update, leaf, direction.expand_as(update), retain_graph=True)
            total += to_float64((pulled + direction).detach()).square().sum(1)
    return total / (len(directions) * directions.shape[1])


def _pushed(
    w: LayerWeights, directions: Float[Tensor, "probe d_model"], centred: bool
) -> list[Float[Tensor, "probe d_mlp"]]:
    """ω diag(γ₂) W for gate and in: multiplied once per layer, not per position."""
    scaled = (directions - directions.mean(1, keepdim=True) if centred else directions) * w.mlp_gain.to(directions)
    return [scaled @ matrix.to(directions) for matrix in _entering(w)]


def _entering(w: LayerWeights) -> list[Float[Tensor, "d_model d_mlp"]]:
    return [w.mlp_in] if w.mlp_gate is None else [w.mlp_gate, w.mlp_in]


def _offsets(w: LayerWeights, dtype: torch.dtype) -> list[Float[Tensor, " d_mlp"]]:
    found = [w.mlp_in_offset] if w.mlp_gate is None else [w.mlp_gate_offset, w.mlp_in_offset]
    return [each.to(dtype) for each in found]


def mlp_lipschitz(
    slopes: Slopes,
    gate_norm: Float[Tensor, ""],
    in_norm: Float[Tensor, ""],
    out_norm: Float[Tensor, ""],
) -> Float[Tensor, " pos"]:
    """Rigorous bound on ‖J‖₂ at every position, the norm's 1/r left out (docs/theory.md, section 3)."""
    steepest = [to_float64(slope.abs().amax(1)) for slope in slopes]
    norms = [in_norm] if len(slopes) == 1 else [gate_norm, in_norm]
    return sum(norm.to(slope) * slope for norm, slope in zip(norms, steepest, strict=True)) * out_norm.to(steepest[0])
