"""A layer's MLP as a recording sees it: what it writes, checked, its mean-square gain and a bound on it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from oversquash_lens.record import gate
from oversquash_lens.record.nodes import MlpState, layer_probes, mlp_lipschitz, node_gain_by_backward, probe_directions
from oversquash_lens.record.parameters import LayerWeights
from oversquash_lens.record.whole import Whole
from oversquash_lens.record.wide import wide

Pop = Callable[[str], Tensor]  # key -> what that hook saw


class MlpRecord(NamedTuple):
    """`update`: what is written to the residual, at the rows that the gate follows; `kept`: what the Trace keeps."""

    update: Tensor
    kept: dict[str, Tensor]


def no_mlp(like: Tensor) -> dict[str, Tensor]:
    """What the Trace keeps where a layer has attention only; `like`: one number per position."""
    ones = torch.ones_like(like)
    return {"mlp_scale": ones, "node_gain": ones, "mlp_lipschitz": 0 * ones, "mlp_sigma": 0 * ones[0]}


def dense_mlp(whole: Whole, layer: int, w: LayerWeights, x: Tensor, scale: Tensor, pop: Pop) -> MlpRecord:
    """A plain or gated MLP that reads x through a norm with divisors `scale`."""
    layout, work = whole.layout, whole.work
    post_norm = {}
    if layout.post_norms:
        post_norm["post_scale"] = work(pop("mlp_post_scale").reshape(len(x)))
        post_norm["post_normalized"] = work(pop("mlp_post_normalized"))
    state = MlpState(
        normalized=whole.normalized(x, scale),
        scale=work(scale).to(x.device),
        gate=work(pop("pre")),
        up=work(pop("pre_linear")) if layout.gated else None,
        norms=layout.norms,
        **post_norm,
    )
    rows = whole.rows(len(x))
    post = work(pop("post")[rows])
    gate.check_mlp(whole.name(layer, "pre"), state, post, w, layout, rows)
    update = post @ work(w.mlp_out)
    update = update if w.mlp_out_bias is None else update + work(w.mlp_out_bias)
    if layout.post_norms:
        update = _normalised_update(whole, layer, w, update, state, rows)
    return MlpRecord(update, _gains(whole, layer, w, state))


def _normalised_update(
    whole: Whole, layer: int, w: LayerWeights, update: Tensor, state: MlpState, rows: Tensor
) -> Tensor:
    scale, seen = state.post_scale[rows], state.post_normalized[rows]
    gate.check_norm(whole.name(layer, "mlp_post_scale"), update, scale, whole.layout)
    own, place = whole.normalized(update, scale), whole.name(layer, "mlp_post_normalized")
    gate.check_same(place, own, seen, "what the MLP writes, normalised", "hook_normalized", whole.layout.dtype)
    return seen * whole.work(w.mlp_post_gain)


def _gains(whole: Whole, layer: int, w: LayerWeights, state: MlpState) -> dict[str, Tensor]:
    act, norms = whole.layout.activation, whole.weights
    in_norm, out_norm = norms.mlp_in_norm[layer], norms.mlp_out_norm[layer]
    probes = whole.once("probes", layer, lambda: layer_probes(state, w, whole.node_probes, whole.seed, layer))
    gains, sigmas = [], []
    for block in state.blocks():
        slopes = block.slopes(act)
        gains.append(probes.gain(block, slopes))
        sigmas.append(mlp_lipschitz(slopes, norms.mlp_gate_norm[layer], in_norm, out_norm))
    sigma = torch.cat(sigmas)
    if state.post_scale is not None:
        sigma = sigma / wide(state.post_scale)
    everywhere = state.up is None and state.post_scale is None
    return {
        "node_gain": wide(torch.cat(gains)),
        "mlp_lipschitz": sigma / wide(state.scale),
        # Where no global constant exists: the largest over this prompt's activations.
        "mlp_sigma": in_norm * act.lipschitz * out_norm if everywhere else sigma.max(),
    }


def experts(whole: Whole, layer: int, w: LayerWeights, x: Tensor, written: Tensor) -> MlpRecord:
    """A mixture of experts is run again by itself, with its router, and differentiated; no bound is known."""
    layout, work, rows = whole.layout, whole.work, whole.rows(len(x))
    module, again = whole.model.blocks[layer].mlp, []
    device = next(module.parameters()).device

    def update(entering: Tensor) -> Tensor:
        inside = entering - entering.mean(-1, keepdim=True) if layout.centred else entering
        if layout.normed:
            inside = inside / (inside.square().mean(-1, keepdim=True) + layout.eps).sqrt()
        inside = inside * w.mlp_gain.to(inside)
        inside = inside if w.mlp_norm_bias is None else inside + w.mlp_norm_bias.to(inside)
        out = module(inside.to(device, x.dtype)[None])
        out = work((out[0] if isinstance(out, tuple) else out).to(x.device).reshape(x.shape))
        again.append(out.detach())
        return out

    directions = probe_directions(layout.d_model, whole.node_probes, whole.seed, layer)
    with _unheard(module):
        gain = wide(node_gain_by_backward(update, work(x), directions))
    written, place = work(written[rows]), whole.name(layer, "mlp_out")
    gate.check_same(place, again[0][rows], written, "the experts run again", "hook_mlp_out", layout.dtype)
    unknown = torch.full_like(gain, torch.nan)
    return MlpRecord(written, {"node_gain": gain, "mlp_lipschitz": unknown, "mlp_sigma": unknown[0]})


@contextmanager
def _unheard(module: nn.Module) -> Iterator[None]:
    """Within the block the module's hook points call nobody, so running it again goes unnoticed."""
    points = [each for each in module.modules() if type(each).__name__ == "HookPoint"]
    before = [(point._forward_hooks, point._backward_hooks) for point in points]
    try:
        for point in points:
            point._forward_hooks, point._backward_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for point, (forward, backward) in zip(points, before, strict=True):
            point._forward_hooks, point._backward_hooks = forward, backward
