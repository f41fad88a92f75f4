"""A layer's MLP as a recording sees it: what it writes, checked, its mean-square gain and a bound on it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from oversquash_lens.capture import checks
from oversquash_lens.capture.hooked_model import is_a
from oversquash_lens.capture.nodes import MlpState, layer_probes, mlp_lipschitz, node_gain_by_backward, probe_directions
from oversquash_lens.capture.parameters import LayerWeights
from oversquash_lens.capture.pass_context import PassContext
from oversquash_lens.numerics import to_float64

Pop = Callable[[str], Tensor]  # key -> what that hook saw


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
    architecture, work = context.architecture, context.work
    post_norm = {}
    if architecture.post_norms:
        post_norm["post_scale"] = work(pop("mlp_post_scale").reshape(len(x)))
        post_norm["post_normalized"] = work(pop("mlp_post_normalized"))
    state = MlpState(
        normalized=context.normalized(x, scale),
        scale=work(scale).to(x.device),
        gate=work(pop("pre")),
        up=work(pop("pre_linear")) if architecture.gated else None,
        norms=architecture.norms,
        **post_norm,
    )
    rows = context.rows(len(x))
    post = work(pop("post")[rows])
    checks.check_mlp(context.name(layer, "pre"), state, post, w, architecture, rows)
    update = post @ work(w.mlp_out)
    update = update if w.mlp_out_bias is None else update + work(w.mlp_out_bias)
    if architecture.post_norms:
        update = _normalised_update(context, layer, w, update, state, rows)
    return MlpRecord(update, _gains(context, layer, w, state))


def _normalised_update(
    context: PassContext, layer: int, w: LayerWeights, update: Tensor, state: MlpState, rows: Tensor
) -> Tensor:
    scale, seen = state.post_scale[rows], state.post_normalized[rows]
    checks.check_norm(context.name(layer, "mlp_post_scale"), update, scale, context.architecture)
    own, place = context.normalized(update, scale), context.name(layer, "mlp_post_normalized")
    checks.check_same(
        place, own, seen, "what the MLP writes, normalised", "hook_normalized", context.architecture.dtype
    )
    return seen * context.work(w.mlp_post_gain)


def _gains(context: PassContext, layer: int, w: LayerWeights, state: MlpState) -> dict[str, Tensor]:
    act, norms = context.architecture.activation, context.weights
    in_norm, out_norm = norms.mlp_in_norm[layer], norms.mlp_out_norm[layer]
    probes = context.once("probes", layer, lambda: layer_probes(state, w, context.node_probes, context.seed, layer))
    gains, sigmas = [], []
    for block in state.blocks():
        slopes = block.slopes(act)
        gains.append(probes.gain(block, slopes))
        sigmas.append(mlp_lipschitz(slopes, norms.mlp_gate_norm[layer], in_norm, out_norm))
    sigma = torch.cat(sigmas)
    if state.post_scale is not None:
        sigma = sigma / to_float64(state.post_scale)
    everywhere = state.up is None and state.post_scale is None
    return {
        "node_gain": to_float64(torch.cat(gains)),
        "mlp_lipschitz": sigma / to_float64(state.scale),
        # Where no global constant exists: the largest over this prompt's activations.
        "mlp_sigma": in_norm * act.lipschitz * out_norm if everywhere else sigma.max(),
    }


def experts(context: PassContext, layer: int, w: LayerWeights, x: Tensor, written: Tensor) -> MlpRecord:
    """A mixture of experts is run again by itself, with its router, and differentiated; no bound is known."""
    architecture, work, rows = context.architecture, context.work, context.rows(len(x))
    module, again = context.model.blocks[layer].mlp, []
    device = next(module.parameters()).device

    def update(entering: Tensor) -> Tensor:
        inside = entering - entering.mean(-1, keepdim=True) if architecture.centred else entering
        if architecture.normed:
            inside = inside / (inside.square().mean(-1, keepdim=True) + architecture.eps).sqrt()
        inside = inside * w.mlp_gain.to(inside)
        inside = inside if w.mlp_norm_bias is None else inside + w.mlp_norm_bias.to(inside)
        out = module(inside.to(device, x.dtype)[None])
        out = work((out[0] if isinstance(out, tuple) else out).to(x.device).reshape(x.shape))
        again.append(out.detach())
        return out

    directions = probe_directions(architecture.d_model, context.node_probes, context.seed, layer)
    with _unheard(module):
        gain = to_float64(node_gain_by_backward(update, work(x), directions))
    written, place = work(written[rows]), context.name(layer, "mlp_out")
    checks.check_same(place, again[0][rows], written, "the experts run again", "hook_mlp_out", architecture.dtype)
    unknown = torch.full_like(gain, torch.nan)
    return MlpRecord(written, {"node_gain": gain, "mlp_lipschitz": unknown, "mlp_sigma": unknown[0]})


@contextmanager
def _unheard(module: nn.Module) -> Iterator[None]:
    """Within the block the module's hook points call nobody, so running it again goes unnoticed."""
    points = [each for each in module.modules() if is_a(each, "transformer_lens.hook_points", "HookPoint")]
    before = [(point._forward_hooks, point._backward_hooks) for point in points]
    try:
        for point in points:
            point._forward_hooks, point._backward_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for point, (forward, backward) in zip(points, before, strict=True):
            point._forward_hooks, point._backward_hooks = forward, backward
