"""Measured flow, held against whole Jacobians, conservation and products taken another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import each, zoo

import oversquash_lens as osl
from oversquash_lens.jacobian.block_products import BlockProducts
from oversquash_lens.jacobian.measured_flow import MeasuredFlow, measured_flow
from oversquash_lens.viz import result_charts

IDS = [1, 7, 9, 3, 20, 11]
FAMILIES = [
    *("gpt2", "llama", "gpt-neox", "gpt-j", "qwen3", "gemma2", "mistral-window", "opt", "phi"),
    *("bloom", "mixtral", "attention-only"),
]


def made(family: str, kind: str) -> Any:
    return zoo(family, kind)


def residuals(model: Any) -> list[Tensor]:
    """Every residual of one pass in one graph, the first a leaf, and y_n."""
    caught: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> Tensor:
        caught.append(value.detach().requires_grad_() if not caught else value.clone())
        return caught[-1]

    layers = len(model.blocks)
    hooks = [(f"blocks.{i}.hook_resid_pre", keep) for i in range(layers)]
    hooks += [(f"blocks.{layers - 1}.hook_resid_post", keep), ("unembed.hook_in", keep)]
    if "unembed.hook_in" not in model.hook_dict:
        pytest.skip("this TransformerLens shows no input of the unembedding")
    with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        model(torch.tensor([IDS]))
    return caught


def jacobian(output: Tensor, leaf: Tensor) -> Tensor:
    """∂output/∂leaf as [out, pos, d_model], row by row."""
    rows = [torch.autograd.grad(each, leaf, retain_graph=True, allow_unused=True)[0] for each in output.flatten()]
    return torch.stack([torch.zeros_like(leaf) if row is None else row for row in rows])[:, 0].double()


def brute_force(model: Any, source: slice) -> Tensor:
    """⟨J, A_k B_k⟩ / ‖J‖² by whole Jacobians, [layer+1, pos]."""
    *streams, y = residuals(model)
    last = y[0, -1]
    whole = jacobian(last, streams[0])[:, source]
    found = []
    for stream in streams:
        after = jacobian(last, stream)
        row = []
        for k in range(len(IDS)):
            before = jacobian(stream[0, k], streams[0])[:, source]
            through = torch.einsum("od,dsv->osv", after[:, k], before)
            row.append((whole * through).sum() / whole.square().sum())
        found.append(torch.stack(row))
    return torch.stack(found)


@each("gpt2", "llama", "gpt-neox", "gemma2")
def test_all_directions_are_whole_jacobians(family: str, kind: str) -> None:
    model = made(family, kind)
    for source in (slice(2, 3), slice(1, 4)):
        found = measured_flow(model, IDS, source, probes=None)
        assert torch.allclose(found.node, brute_force(model, source), atol=1e-6)
        assert (found.error, found.probes) == (0, None)


@each(*FAMILIES)
@pytest.mark.parametrize("source", [None, 1])
def test_it_is_conserved_and_causal(family: str, kind: str, source: int | None) -> None:
    model = made(family, kind)
    for target in (None, "top", (3, 5), "log p(top)"):
        found = measured_flow(model, IDS, source, probes=None, target=target)
        limit = 1e-8 if kind == "hooked" and family != "mixtral" else 1e-4
        assert found.conservation < limit
        assert torch.allclose(found.node.sum(-1), torch.ones(len(found.node)).double(), atol=limit)
        assert torch.equal(found.node[-1, :-1], torch.zeros(len(IDS) - 1).double())
        if source is not None:
            assert torch.equal(found.node[:, :source], torch.zeros(len(found.node), source).double())
            assert found.node[0, source] == pytest.approx(1, abs=1e-9)


@each("gpt2", "llama", "gemma2", "qwen3", "mistral-window")
def test_what_stays_is_what_the_middle_residual_carries(family: str, kind: str) -> None:
    """Heads + stay = 1 by an own product: the gradient at hook_resid_mid times the tangent entering the layer."""
    model, source = made(family, kind), 2
    found = measured_flow(model, IDS, source, target=7)
    layers = range(len(model.blocks))
    caught: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(value: Tensor, hook: Any) -> Tensor:
            # As it is: on a bridge a new tensor here would enter the MLP alone.
            caught[name] = value.detach().requires_grad_() if name == "pre0" else value
            return caught[name]

        return hook

    hooks = [(f"blocks.{i}.hook_resid_{part}", keep(f"{part}{i}")) for i in layers for part in ("pre", "mid")]
    with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        logit = model(torch.tensor([IDS]))[0, -1, 7]
    start = torch.autograd.grad(logit, caught["pre0"], retain_graph=True)[0]
    start = torch.where(torch.arange(len(IDS))[None, :, None] == source, start, 0)
    total = start.double().square().sum()
    for layer in layers:
        middle = torch.autograd.grad(logit, caught[f"mid{layer}"], retain_graph=True)[0][0].double()
        moved = torch.einsum("apd,pd->a", jacobian(caught[f"pre{layer}"], caught["pre0"]), start[0].double())
        stays = (middle * moved.view(len(IDS), -1)).sum() / total
        assert found.stays[layer].item() == pytest.approx(stays.item(), abs=1e-6)
        assert found.stays[layer] + found.head[layer].sum() == pytest.approx(1, abs=1e-9)


@each("gpt2", "llama", "qwen3", "gpt-neox")
def test_each_head_carries_what_its_own_output_carries(family: str, kind: str) -> None:
    """Gradient times tangent at hook_z, head by head, by autograd of whole passes."""
    model, source = made(family, kind), 1
    found = measured_flow(model, IDS, source, target=7)
    caught: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> Tensor:
        caught.append(value if caught else value.detach().requires_grad_())
        return caught[-1]

    names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.attn.hook_z" for i in range(len(model.blocks)))]
    with torch.enable_grad(), model.hooks(fwd_hooks=[(name, keep) for name in names]):
        logit = model(torch.tensor([IDS]))[0, -1, 7]
    first, *rest = caught
    start = torch.autograd.grad(logit, first, retain_graph=True)[0]
    start = torch.where(torch.arange(len(IDS))[None, :, None] == source, start, 0)
    for layer, z in enumerate(rest):
        gradient = torch.autograd.grad(logit, z, retain_graph=True)[0].double()
        tangent = torch.einsum("apd,pd->a", jacobian(z, first), start[0].double()).view(z.shape)
        product = (gradient * tangent).reshape(len(IDS), model.cfg.n_heads, -1).sum((0, 2))
        assert torch.allclose(found.head[layer], product / start.double().square().sum(), atol=1e-6)


@each("gpt-neox", "gpt-j")
def test_heads_mlp_and_what_stays_sum_to_one_in_parallel_blocks(family: str, kind: str) -> None:
    model = made(family, kind)
    found = measured_flow(model, IDS, 1, probes=None)
    *streams, y = residuals(model)
    layer = len(streams) - 2
    whole = jacobian(y[0, -1], streams[0])[:, 1]
    after, before = jacobian(y[0, -1], streams[layer + 1]), jacobian(streams[layer][0], streams[0])[:, 1]
    through = torch.einsum("opd,pdv->ov", after, before.view(len(IDS), -1, before.shape[-1]))
    assert found.stays[layer].item() == pytest.approx(((whole * through).sum() / whole.square().sum()).item(), abs=1e-6)


@each("gpt2", "llama", "gemma2", "qwen3", "mistral-window", "bloom")
def test_edges_are_what_one_position_alone_moves_in_a_head(family: str, kind: str) -> None:
    """By whole Jacobians: the gradient at z_j times ∂z_j/∂x_i times the tangent of x_i alone."""
    model, source, n = made(family, kind), 1, len(IDS)
    found = measured_flow(model, IDS, source, target=7, edges=10**6)
    layers = range(len(model.blocks))
    caught: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(value: Tensor, hook: Any) -> Tensor:
            caught[name] = value.detach().requires_grad_() if name == "pre0" else value
            return caught[name]

        return hook

    hooks = [(f"blocks.{i}.hook_resid_pre", keep(f"pre{i}")) for i in layers]
    hooks += [(f"blocks.{i}.attn.hook_z", keep(f"z{i}")) for i in layers]
    with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        logit = model(torch.tensor([IDS]))[0, -1, 7]
    start = torch.autograd.grad(logit, caught["pre0"], retain_graph=True)[0][0]
    start = torch.where(torch.arange(n)[:, None] == source, start, 0).double()
    expected = {}
    for layer in layers:
        z, before = caught[f"z{layer}"], caught[f"pre{layer}"]
        gradient = torch.autograd.grad(logit, z, retain_graph=True)[0][0].double()
        tangent = torch.einsum("apd,pd->a", jacobian(before, caught["pre0"]), start).view(n, -1)
        by_source = torch.einsum("aid,id->ai", jacobian(z, before), tangent).view(*gradient.shape, n)
        shares = torch.einsum("jhd,jhdi->hji", gradient, by_source) / start.square().sum()
        assert torch.allclose(shares.sum((1, 2)), found.head[layer], atol=1e-5)
        for head, dest, src in shares.nonzero().tolist():
            if dest != src:
                expected[layer, head, dest, src] = shares[head, dest, src].item()
    came = {(edge.layer, edge.head, edge.dest, edge.src): edge.share for edge in found.edges}
    assert all(came.get(edge, 0) == pytest.approx(share, abs=1e-5) for edge, share in expected.items())
    assert all(edge in expected for edge, share in came.items() if abs(share) > 1e-5)
    sizes = [abs(edge.share) for edge in found.edges]
    assert sizes == sorted(sizes, reverse=True)
    assert measured_flow(model, IDS, source, target=7, edges=3).edges == found.edges[:3]


@each("llama", "gpt-neox")
def test_edges_of_all_outputs_are_those_of_their_directions_together(family: str, kind: str) -> None:
    """A basis in batches and at once; what a position hands on is what it has."""
    model = made(family, kind)
    whole = measured_flow(model, IDS, 1, probes=None, edges=40)
    apart = measured_flow(model, IDS, 1, probes=None, edges=40, memory=1)
    for one, other in zip(whole.edges, apart.edges, strict=True):
        assert one.share == pytest.approx(other.share, abs=1e-5)
    sketched = measured_flow(model, IDS, 1, probes=3, edges=40)
    shares = {(e.layer, e.head, e.dest, e.src): e.share for e in whole.edges}
    for edge in sketched.edges[:5]:
        known = shares.get((edge.layer, edge.head, edge.dest, edge.src), 0)
        assert edge.share == pytest.approx(known, abs=0.2)
    assert [e["share"] for e in whole.to_dict()["edges"]] == [e.share for e in whole.edges]


@each("opt")
def test_edges_that_do_not_make_up_their_head_are_refused(family: str, kind: str) -> None:
    if kind == "hooked":
        assert len(measured_flow(made(family, kind), IDS, 1, target=7, edges=2).edges) == 2
        return
    with pytest.raises(osl.OversquashError, match="edges differ from what it writes"):
        measured_flow(made(family, kind), IDS, 1, target=7, edges=2)


@each("llama")
def test_the_flow_of_a_target_is_that_of_its_gradient(family: str, kind: str) -> None:
    model = made(family, kind)
    found = measured_flow(model, IDS, 2, target=7)
    truth = osl.measured_sensitivity(model, IDS, target=7)
    assert found.total**0.5 == pytest.approx(truth.values[2].item(), rel=1e-9)
    assert torch.allclose(found.norms[0], truth.values, rtol=1e-9)
    assert found.target == truth.target


@each("llama")
def test_norms_of_all_directions_are_the_measured_sensitivities(family: str, kind: str) -> None:
    model = made(family, kind)
    found = measured_flow(model, IDS, probes=None)
    truth = osl.measured_sensitivity(model, IDS, probes=None)
    assert torch.allclose(found.norms[0], truth.values, rtol=1e-6)


@each("llama")
def test_all_tokens_count_alike(family: str, kind: str) -> None:
    """The flow of all tokens is the mean of each token's own."""
    model = made(family, kind)
    alone = [measured_flow(model, IDS, i, probes=None) for i in range(len(IDS))]
    found = measured_flow(model, IDS, probes=None)
    assert torch.allclose(found.node, torch.stack([each.node for each in alone]).mean(0), atol=1e-7)
    assert torch.allclose(found.head, torch.stack([each.head for each in alone]).mean(0), atol=1e-7)


@each("llama")
def test_the_estimate_is_near_all_directions_and_says_how_near(family: str, kind: str) -> None:
    model = made(family, kind)
    exact = measured_flow(model, IDS, 2, probes=None)
    apart, said, totals = [], [], []
    for seed in range(12):
        found = measured_flow(model, IDS, 2, probes=3, seed=seed)
        assert found.probes == 3
        assert found.conservation < 1e-4
        totals.append(found.total / exact.total)
        apart.append(0.5 * (found.node - exact.node).abs().sum(-1).max().item())
        said.append(found.error)
    assert sum(apart) / len(apart) < 0.1
    assert 0.3 < sum(said) / sum(apart) < 3
    assert sum(totals) / len(totals) == pytest.approx(1, abs=0.1)  # unbiased: no direction is counted twice


@each("llama")
def test_differences_agree_with_exact_tangents(monkeypatch: pytest.MonkeyPatch, family: str, kind: str) -> None:
    model = made(family, kind)
    exact = measured_flow(model, IDS, 1, target=7)
    monkeypatch.setattr(BlockProducts, "_forward", BlockProducts._differences)
    found = measured_flow(model, IDS, 1, target=7)
    assert found.conservation < 1e-2
    assert torch.allclose(found.node, exact.node, atol=5e-3)
    assert torch.allclose(found.head, exact.head, atol=5e-3)


@each("llama")
def test_sources_are_named_as_everywhere(family: str, kind: str) -> None:
    model = made(family, kind)
    text = osl.record(model, IDS).tokens[2]
    assert torch.equal(measured_flow(model, IDS, text, target=7).node, measured_flow(model, IDS, 2, target=7).node)
    assert measured_flow(model, IDS, slice(1, 3), target=7).source == slice(1, 3)
    with pytest.raises(osl.OversquashError, match="expected a position"):
        measured_flow(model, IDS, 17)
    with pytest.raises(osl.OversquashError, match="probes"):
        measured_flow(model, IDS, probes=0)


@each("llama")
def test_a_result_says_itself(family: str, kind: str) -> None:
    found: MeasuredFlow = measured_flow(made(family, kind), IDS, target=7)
    assert len(repr(found).splitlines()) <= 12
    assert "logit" in repr(found)
    assert len(found.to_frame()) == len(found.stays)
    kept = found.to_dict()
    assert kept["node"] == [[pytest.approx(each) for each in row] for row in found.node.tolist()]
    assert ((found.width >= 1) & (found.width <= len(IDS))).all()
    assert (found.negative >= 0).all()


@each("llama")
def test_it_is_drawn(family: str, kind: str) -> None:
    found = measured_flow(made(family, kind), IDS, 1, target=7)
    chart = result_charts.measured_flow_chart(found)
    nodes, heads = (panel.heat for panel in chart.panels)
    assert nodes.values == tuple(map(tuple, found.node.abs().tolist()))
    assert heads.values == tuple(map(tuple, found.head.abs().tolist()))
    assert "negative shares" in chart.notes[0]
    assert len(osl.figures.measured_flow(found).axes) > 2
