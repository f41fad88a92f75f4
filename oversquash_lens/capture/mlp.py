"""A layer's MLP as a recording sees it: what it writes, checked, its mean-square gain and a bound on it.

Row-vector convention, x̂ the normalised residual, c = act'(gate)·up and a = act(gate) (plain MLP: c = act'(pre),
no a). The Jacobian of the MLP with its norm is

    J = (1/r) (I - x̂x̂ᵀ/d) diag(γ₂) [W_gate diag(c) + W_in diag(a)] W_out,

where LayerNorm's centring also takes the mean out of each column of diag(γ₂)W. Without a norm r = 1 and nothing is
taken away; a norm of what the MLP writes multiplies J from the right by (I - ôôᵀ/d) diag(γ_post)/ρ.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from oversquash_lens.capture import checks
from oversquash_lens.capture.checks import PassContext, Pop
from oversquash_lens.capture.hooked_model import Activation, is_a
from oversquash_lens.capture.weights import LayerWeights, MlpWeights
from oversquash_lens.errors import InputError, one_line
from oversquash_lens.numerics import to_float64

Slopes = list[Float[Tensor, "pos d_mlp"]]  # [c, a] of a gated MLP, [c] of a plain one

CHUNK = 1 << 24  # elements of [probe, pos, d_mlp] held at a time
BLOCK = 1 << 18  # elements of [pos, d_mlp] at a time where a cache holds them; an accelerator takes CHUNK
PAIRS = 72  # pairs of directions that say as much of ‖J‖_F² as one direction does through the full MLP


class PostNorm(NamedTuple):
    """A norm of what the MLP writes: its divisors, its result before the gain, the gain."""

    scale: Float[Tensor, " pos"]
    normalized: Float[Tensor, "pos d_model"]
    gain: Float[Tensor, " d_model"]
    centred: bool


@dataclass(frozen=True)
class MlpState:
    """One layer's MLP at the prompt's positions.

    `pre` holds what the activation reads and, of a gated MLP, what its value is multiplied by. `norms` is the
    architecture's: "layer", "rms" or "none".
    """

    normalized: Float[Tensor, "pos d_model"]
    scale: Float[Tensor, " pos"]
    pre: tuple[Float[Tensor, "pos d_mlp"], ...]
    norms: str
    post_norm: PostNorm | None = None

    def blocks(self) -> Iterator[MlpState]:
        """The same, some positions at a time."""
        n, d_mlp = self.pre[0].shape
        step = max(1, (BLOCK if self.scale.device.type == "cpu" else CHUNK) // d_mlp)
        for start in range(0, n, step):
            yield self.at(slice(start, start + step))

    def at(self, rows: Any) -> MlpState:
        """The same at some positions."""
        post = self.post_norm
        return MlpState(
            normalized=self.normalized[rows],
            scale=self.scale[rows],
            pre=tuple(each[rows] for each in self.pre),
            norms=self.norms,
            post_norm=None if post is None else post._replace(scale=post.scale[rows], normalized=post.normalized[rows]),
        )

    def slopes(self, activation: Activation) -> Slopes:
        """[c, a] of a gated MLP, [c] of a plain one: how the output of each neuron follows its inputs."""
        value, slope = _value_and_slope(activation, self.pre[0])
        return [slope] if len(self.pre) == 1 else [slope * self.pre[1], value]


class MlpRecord(NamedTuple):
    """`update`: what is written to the residual, at the rows that the gate follows; `kept`: what the Trace keeps."""

    update: Tensor
    kept: dict[str, Tensor]


def no_mlp(like: Tensor) -> dict[str, Tensor]:
    """What the Trace keeps where a layer has attention only; `like`: one number per position."""
    ones = torch.ones_like(like)
    return {"mlp_scale": ones, "node_gain": ones, "mlp_lipschitz": 0 * ones, "mlp_sigma": 0 * ones[0]}


def dense_mlp(context: PassContext, layer: int, w: LayerWeights, x: Tensor, scale: Tensor, pop: Pop) -> MlpRecord:
    """A plain or gated MLP that reads x through a norm with divisors `scale`."""
    architecture, work, mlp, post_norm = context.architecture, context.work, w.mlp, None
    assert mlp is not None, "a dense MLP has its matrices"
    if w.mlp_post_gain is not None:
        shown = work(pop("mlp_post_scale").reshape(len(x))), work(pop("mlp_post_normalized"))
        post_norm = PostNorm(*shown, work(w.mlp_post_gain), architecture.centred)
    state = MlpState(
        normalized=context.normalized(x, scale) if architecture.pre_norms else work(x),
        scale=work(scale).to(x.device),
        pre=tuple(work(pop(key)) for key in (("pre", "pre_linear") if architecture.gated else ("pre",))),
        norms=architecture.norms if architecture.pre_norms else "none",
        post_norm=post_norm,
    )
    rows = context.rows(len(x))
    post = work(pop("post")[rows])
    check_mlp(context.name(layer, "pre"), state.at(rows), post, w.mlp_gain, mlp, architecture.dtype)
    update = post @ work(mlp.output)
    update = update if mlp.output_bias is None else update + work(mlp.output_bias)
    if post_norm is not None:
        seen, name = post_norm.normalized[rows], context.name(layer, "mlp_post_normalized")
        divisors = post_norm.scale[rows]
        checks.check_norm(context.name(layer, "mlp_post_scale"), update, divisors, architecture)
        computed, what = context.normalized(update, divisors), "what the MLP writes, normalised"
        checks.check_same(name, computed, seen, what, "hook_normalized", architecture.dtype)
        update = seen * post_norm.gain
    return MlpRecord(update, _gains(context, layer, w, mlp, state))


def _gains(context: PassContext, layer: int, w: LayerWeights, mlp: MlpWeights, state: MlpState) -> dict[str, Tensor]:
    norms = context.weights
    in_norm, out_norm = norms.mlp_in_norm[layer], norms.mlp_out_norm[layer]
    entering = [in_norm] if len(state.pre) == 1 else [norms.mlp_gate_norm[layer], in_norm]
    probes = context.per_layer(
        "probes", layer, lambda: layer_probes(state, mlp, w.mlp_gain, context.node_probes, context.seed, layer)
    )
    gains, sigmas = [], []
    for block in state.blocks():
        slopes = block.slopes(mlp.activation)
        gains.append(probes.gain(block, slopes))
        sigmas.append(mlp_lipschitz(slopes, entering, out_norm))
    sigma = torch.cat(sigmas)
    if state.post_norm is not None:
        sigma = sigma / to_float64(state.post_norm.scale)
    lipschitz = mlp.activation.lipschitz
    everywhere = len(state.pre) == 1 and state.post_norm is None and math.isfinite(lipschitz)
    return {
        "node_gain": to_float64(torch.cat(gains)),
        "mlp_lipschitz": sigma / to_float64(state.scale),
        # Where no global constant exists: the largest over this prompt's activations.
        "mlp_sigma": in_norm * lipschitz * out_norm if everywhere else sigma.max(),
    }


def experts(context: PassContext, layer: int, w: LayerWeights, x: Tensor, written: Tensor) -> MlpRecord:
    """A mixture of experts is run again by itself, with its router, and differentiated; no bound is known."""
    architecture, work, rows = context.architecture, context.work, context.rows(len(x))
    module = context.model.blocks[layer].mlp
    rerun: list[Tensor] = []
    device = next(module.parameters()).device

    def normed(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if architecture.centred else x
        return x / (x.square().mean(-1, keepdim=True) + architecture.eps).sqrt()

    def update(entering: Tensor) -> Tensor:
        inside = (normed(entering) if architecture.pre_norms else entering) * w.mlp_gain.to(entering)
        inside = inside if w.mlp_norm_bias is None else inside + w.mlp_norm_bias.to(inside)
        out = module.forward(inside.to(device, x.dtype)[None])  # not what a block hangs on the call
        out = work((out[0] if isinstance(out, tuple) else out).to(x.device).reshape(x.shape)) * architecture.multiplier
        out = out if w.mlp_post_gain is None else normed(out) * w.mlp_post_gain.to(out)
        rerun.append(out.detach())
        return out

    directions = probe_directions(architecture.d_model, context.node_probes, context.seed, layer)
    with _without_hooks(module):
        gain = to_float64(node_gain_by_backward(update, work(x), directions))
    written, place = work(written[rows]), context.name(layer, "mlp_out")
    checks.check_same(place, rerun[0][rows], written, "the experts run again", "hook_mlp_out", architecture.dtype)
    unknown = torch.full_like(gain, torch.nan)
    return MlpRecord(written, {"node_gain": gain, "mlp_lipschitz": unknown, "mlp_sigma": unknown[0]})


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Within the block the module's hook points call no hook."""
    points = [each for each in module.modules() if is_a(each, "transformer_lens.hook_points", "HookPoint")]
    before = [(point._forward_hooks, point._backward_hooks) for point in points]
    try:
        for point in points:
            point._forward_hooks, point._backward_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for point, (forward, backward) in zip(points, before, strict=True):
            point._forward_hooks, point._backward_hooks = forward, backward


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

    def __init__(
        self,
        state: MlpState,
        mlp: MlpWeights,
        gain: Float[Tensor, " d_model"],
        directions: Float[Tensor, "probe d_model"],
    ) -> None:
        pre = state.pre[0]
        self.directions = directions.to(pre)
        self.pushed = _pushed(mlp, gain, self.directions, state.norms == "layer")
        self.offsets = [each.to(pre.dtype) for each in mlp.offsets]
        self.w_out = mlp.output.to(pre)

    def gain(self, state: MlpState, slopes: Slopes) -> Float[Tensor, " pos"]:
        """‖I + J‖_F²/d_model at every position (docs/theory.md, section 4)."""
        directions, total = self.directions, torch.zeros_like(state.scale)
        if state.norms != "none":
            radial = _radial(state, slopes, self.offsets)
            along = einsum(state.normalized, directions, "pos d, probe d -> probe pos") / directions.shape[1]
        step = max(1, CHUNK // state.pre[0].numel())
        for start in range(0, len(directions), step):
            part = slice(start, start + step)
            hidden = self.pushed[0][part, None] * slopes[0]
            for push, slope in zip(self.pushed[1:], slopes[1:], strict=True):
                hidden.addcmul_(push[part, None], slope)
            if state.norms != "none":
                hidden.addcmul_(along[part, :, None], radial, value=-1)
            out = (hidden @ self.w_out) / state.scale[:, None]
            out = _through_post_norm(out, state) + directions[part, None]
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
        mlp: MlpWeights,
        gain: Float[Tensor, " d_model"],
        entering: Float[Tensor, "into d_model"],
        leaving: Float[Tensor, "out d_model"],
    ) -> None:
        pre = state.pre[0]
        self.entering, self.leaving = entering.to(pre), leaving.to(pre)
        directions = torch.cat([self.leaving, self.entering])
        self.out, back = (mlp.output.to(pre) @ directions.T).split([len(leaving), len(entering)], dim=1)
        pushed = [push.T for push in _pushed(mlp, gain, self.entering, state.norms == "layer")]
        self.pairs = [(push[:, :, None] * self.out[:, None]).flatten(1) for push in pushed]
        self.traces = [(push * back).mean(1) for push in pushed]
        self.offsets = [each.to(pre.dtype) for each in mlp.offsets]

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


def layer_probes(
    state: MlpState, mlp: MlpWeights, gain: Float[Tensor, " d_model"], probes: int | None, seed: int, layer: int
) -> Directions | Pairs:
    """Probes that all positions share, drawn anew for each layer and multiplied into its weights once.

    Pairs of directions, at a quarter of the cost of whole ones, unless every direction is asked for; a norm of what
    the MLP writes turns each position's another way, so there whole ones are taken, too.
    """
    d_model = state.normalized.shape[1]
    if probes is None or probes >= d_model or state.post_norm is not None:
        return Directions(state, mlp, gain, probe_directions(d_model, probes, seed, layer))
    return Pairs(state, mlp, gain, *pair_directions(d_model, probes, seed, layer))


def pair_directions(d_model: int, probes: int, seed: int, layer: int) -> tuple[Tensor, Tensor]:
    """Directions in and directions out, orthogonal among themselves; `PAIRS` pairs of them for each probe."""
    each = math.ceil((PAIRS * probes) ** 0.5)
    return probe_directions(d_model, each, seed, layer), probe_directions(d_model, each, seed, ~layer)


def _radial(state: MlpState, slopes: Slopes, offsets: list[Tensor]) -> Float[Tensor, "pos d_mlp"]:
    """How the neurons follow the one direction that the norm takes away, the position's own."""
    radial = (state.pre[0] - offsets[0]).mul_(slopes[0])
    return radial if len(state.pre) == 1 else radial.addcmul_(state.pre[1] - offsets[1], slopes[1])


def _through_post_norm(out: Float[Tensor, "probe pos d_model"], state: MlpState) -> Float[Tensor, "probe pos d_model"]:
    """What a norm behind the MLP makes of a change of what it writes."""
    if state.post_norm is None:
        return out
    if state.post_norm.centred:
        out = out - out.mean(-1, keepdim=True)
    unit = state.post_norm.normalized
    along = einsum(out, unit, "probe pos d, pos d -> probe pos") / unit.shape[1]
    return (out - along[:, :, None] * unit) * (state.post_norm.gain.to(out) / state.post_norm.scale[:, None])


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
            (product,) = torch.autograd.grad(update, leaf, direction.expand_as(update), retain_graph=True)
            total += to_float64((product + direction).detach()).square().sum(1)
    return total / (len(directions) * directions.shape[1])


def _pushed(
    mlp: MlpWeights, gain: Float[Tensor, " d_model"], directions: Float[Tensor, "probe d_model"], centred: bool
) -> list[Float[Tensor, "probe d_mlp"]]:
    """ω diag(γ₂) W for gate and in: multiplied once per layer, not per position."""
    scaled = (directions - directions.mean(1, keepdim=True) if centred else directions) * gain.to(directions)
    return [scaled @ matrix.to(directions) for matrix in mlp.entering]


def mlp_lipschitz(
    slopes: Slopes, entering: Sequence[Float[Tensor, ""]], out_norm: Float[Tensor, ""]
) -> Float[Tensor, " pos"]:
    """Rigorous bound on ‖J‖₂ at every position, the norm's 1/r left out (docs/theory.md, section 3).

    `entering`: the norms of W_gate and W_in of a gated MLP, of W_in alone of a plain one.
    """
    steepest = [to_float64(slope.abs().amax(1)) for slope in slopes]
    total = torch.stack([norm.to(slope) * slope for norm, slope in zip(entering, steepest, strict=True)]).sum(0)
    return total * out_norm.to(steepest[0])


def check_mlp(
    name: str,
    state: MlpState,
    post: Float[Tensor, "row d_mlp"],
    gain: Float[Tensor, " d_model"],
    mlp: MlpWeights,
    dtype: torch.dtype,
) -> None:
    """Pre-activations from norm, gain and weights, and activations from these, at the state's positions."""
    inside = state.normalized * gain.to(post)
    computed = [
        inside @ weight.to(post) + offset.to(post) for weight, offset in zip(mlp.entering, mlp.offsets, strict=True)
    ]
    matrices = ("W_in",) if len(computed) == 1 else ("W_gate", "W_in")
    for matrix, own, seen, hook in zip(matrices, computed, state.pre, ("hook_pre", "hook_pre_linear"), strict=False):
        checks.check_same(name, own, seen, f"norm · gain · {matrix}", hook, dtype)
    out = mlp.activation.function(state.pre[0])
    out = out if len(state.pre) == 1 else out * state.pre[1]
    out = out if mlp.post_bias is None else out + mlp.post_bias.to(post)
    checks.check_same(name, out, post, "activation(pre)", "hook_post", dtype)
