"""Swaps, held against passes of their own and against TransformerLens' own activation patching."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_models import NO_BRIDGE, NO_HOOKED, has_bridge, has_hooked
from torch import Tensor
from zoo import each, zoo

import oversquash_lens as osl
from oversquash_lens.swaps.swap import swap
from oversquash_lens.viz import result_charts

IDS = [1, 7, 9, 3, 20, 11, 5]
OTHER = [1, 7, 4, 3, 20, 12, 5]
N, FIRST = len(IDS), 2
needs_bridge = pytest.mark.skipif(not has_bridge(), reason=NO_BRIDGE)


def run(model: Any, ids: list[int], hooks: list = ()) -> tuple[Tensor, dict[str, Tensor]]:
    """The last logits, and what every hook of interest showed."""
    layers, kept = len(model.blocks), {}
    names = [f"blocks.{i}.{name}" for i in range(layers) for name in ("hook_resid_pre", "attn.hook_z")]
    names.append(f"blocks.{layers - 1}.hook_resid_post")

    def keeper(name: str) -> Any:
        return name, lambda value, hook: kept.update({name: value.detach().clone()})

    with torch.no_grad(), model.hooks(fwd_hooks=[*hooks, *map(keeper, names)]):
        return model(torch.tensor([ids]))[0, -1].double(), kept


def target(logits: Tensor) -> float:
    return (logits[3] - logits[4]).item()


@each("gpt2", "llama", "gemma2", "gpt-neox", "opt", "mixtral", "bloom")
def test_every_patch_is_a_pass_with_one_activation_replaced(family: str, kind: str) -> None:
    model = zoo(family, kind)
    found = swap(model, IDS, OTHER, (3, 4))
    (logits, _), (others, theirs) = run(model, IDS), run(model, OTHER)
    whole = target(others) - target(logits)
    assert found.effect == pytest.approx(whole, rel=1e-5)
    assert found.positions == (2, 5)
    for layer in range(len(model.blocks)):
        for at in range(N):
            name = f"blocks.{layer}.hook_resid_pre"

            def patch(value: Tensor, hook: Any, name: str = name, at: int = at) -> Tensor:
                value = value.clone()
                value[:, at] = theirs[name][:, at]
                return value

            moved = target(run(model, IDS, [(name, patch)])[0]) - target(logits)
            assert found.patched[layer, at].item() == pytest.approx(moved / whole, rel=1e-4, abs=1e-5)
        for head in range(model.cfg.n_heads):
            name = f"blocks.{layer}.attn.hook_z"

            def patch_head(value: Tensor, hook: Any, name: str = name, head: int = head) -> Tensor:
                value = value.clone()
                value[:, :, head] = theirs[name][:, :, head]
                return value

            moved = target(run(model, IDS, [(name, patch_head)])[0]) - target(logits)
            assert found.patched_heads[layer, head].item() == pytest.approx(moved / whole, rel=1e-4, abs=1e-5)


@pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)
def test_patching_is_transformer_lens_own() -> None:
    model = zoo("gpt2", "hooked")
    from transformer_lens import patching

    _, cache = model.run_with_cache(torch.tensor([OTHER]))
    found = swap(model, IDS, OTHER, (3, 4))
    with torch.no_grad():
        theirs = patching.get_act_patch_resid_pre(
            model, torch.tensor([IDS]), cache, lambda logits: logits[0, -1, 3] - logits[0, -1, 4]
        )
    shares = (theirs.double() - found.before) / found.effect
    assert torch.allclose(found.patched[:-1], shares, atol=1e-6)


@each("llama", "gpt2")
def test_the_difference_is_where_it_is(family: str, kind: str) -> None:
    model = zoo(family, kind)
    found = swap(model, IDS, OTHER, (3, 4))
    (logits, mine), (others, theirs) = run(model, IDS), run(model, OTHER)
    for layer in range(len(model.blocks)):
        name = f"blocks.{layer}.hook_resid_pre"
        expected = ((theirs[name] - mine[name])[0].norm(dim=-1) / mine[name][0].norm(dim=-1)).double()
        assert torch.allclose(found.spread[layer], expected, rtol=1e-6)
    assert (found.spread[:, :FIRST] == 0).all()
    p, q = logits.log_softmax(-1), others.log_softmax(-1)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-6)
    assert found.kept == bool(logits.argmax() == others.argmax())
    assert found.top_after[0][1] == pytest.approx(others.softmax(-1).max().item(), rel=1e-6)


@each("llama")
def test_shares_of_a_whole_layer_are_the_whole_effect(family: str, kind: str) -> None:
    """Entering layer 0 only the changed positions differ; leaving the last, only the last token counts."""
    model = zoo(family, kind)
    one = [*IDS[:3], 4, *IDS[4:]]
    found = swap(model, IDS, one, (3, 4))
    assert found.patched[0, 3].item() == pytest.approx(1, rel=1e-6)
    assert found.additivity[0].item() == pytest.approx(1, rel=1e-6)
    assert found.patched[-1].tolist() == [0.0] * (N - 1) + [1.0]


@each("llama", "gemma2", "gpt-neox")
def test_attribution_is_gradient_times_difference(family: str, kind: str) -> None:
    model = zoo(family, kind)
    found = swap(model, IDS, OTHER, (3, 4))
    (_, mine), (_, theirs) = run(model, IDS), run(model, OTHER)
    caught: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(value: Tensor, hook: Any) -> Tensor:
            caught[name] = value.detach().requires_grad_() if name == "blocks.0.hook_resid_pre" else value.clone()
            return caught[name]

        return name, keep

    with torch.enable_grad(), model.hooks(fwd_hooks=[keeper(name) for name in mine]):
        logits = model(torch.tensor([IDS]))[0, -1]
    gradients = dict(zip(caught, torch.autograd.grad(logits[3] - logits[4], [*caught.values()]), strict=True))
    shares = {name: gradients[name][0].double() * (theirs[name] - mine[name])[0].double() for name in mine}
    for layer in range(len(model.blocks)):
        node, head = shares[f"blocks.{layer}.hook_resid_pre"], shares[f"blocks.{layer}.attn.hook_z"]
        assert torch.allclose(found.attributed[layer], node.sum(-1) / found.effect, rtol=1e-4, atol=1e-6)
        assert torch.allclose(found.attributed_heads[layer], head.sum((0, 2)) / found.effect, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)
def test_attribution_is_the_derivative_of_patching() -> None:
    """Of a small change of an embedding the gradient says it all."""
    model = zoo("llama", "hooked")
    with torch.no_grad():
        model.W_E[4] = model.W_E[9] + 1e-4 * model.W_E[4]
    found = swap(model, IDS, [1, 7, 4, *IDS[3:]], (3, 4))
    assert torch.allclose(found.attributed[:-1], found.patched[:-1], atol=2e-3)
    assert torch.allclose(found.attributed_heads, found.patched_heads, atol=2e-3)
    assert torch.allclose(found.attributed.sum(-1), torch.ones(len(found.attributed)).double(), atol=2e-3)


@each("llama")
def test_patches_are_those_that_attribution_points_to(family: str, kind: str) -> None:
    model = zoo(family, kind)
    every, some = swap(model, IDS, OTHER, (3, 4)), swap(model, IDS, OTHER, (3, 4), patches=3)
    patched = ~some.patched.isnan() & (some.patched != 0)
    assert patched.sum() == 3 + 1  # and the last token at the top, which is the whole
    assert torch.allclose(some.patched[patched], every.patched[patched], rtol=1e-6)
    least = some.attributed[patched].abs().min()
    assert (some.attributed[some.patched.isnan()].abs() <= least).all()
    assert math.isnan(some.additivity[1])
    assert int((~some.patched_heads.isnan()).sum()) == 3
    nothing = swap(model, IDS, OTHER, (3, 4), patches=0)
    assert nothing.patched_heads.isnan().all()


def test_words_are_swapped_by_name() -> None:
    model = osl.load_model()
    prompt = "Alice lives in Paris. The committee met on Tuesday. Alice lives in"
    found = swap(model, prompt, {"Paris": "Rome"}, patches=4)
    assert found.swapped[3] == " Rome"
    assert "' Paris'" in found.target
    assert "' Rome'" in found.target
    assert found.before > 0 > found.after
    same = swap(model, prompt, prompt.replace("Paris", "Rome"), patches=4)
    assert torch.allclose(same.patched, found.patched, equal_nan=True)
    assert len(repr(found).splitlines()) <= 12
    assert found.to_dict()["effect"] == found.effect


@needs_bridge
@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (IDS, {}, "same tokens"),
        ([1, 7, 9], {}, "another prompt of 7 tokens"),
        ({99: 3}, {}, "expected a position"),
        ({2: [4, 5]}, {}, "which is 2"),
        (OTHER, {"target": (3, 3)}, "different tokens"),
        (OTHER, {"target": 10**9}, "expected one token"),
        (OTHER, {"patches": -1}, "patches"),
    ],
)
def test_what_cannot_be_swapped_is_said(change: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(osl.OversquashError, match=said) as caught:
        swap(zoo("llama", "bridge"), IDS, change, **options)
    assert "\n" not in str(caught.value)


@each("llama")
def test_a_swap_is_drawn(family: str, kind: str) -> None:
    """Two prompts side by side: what differs, what was patched; nodes that were not are gaps."""
    found = swap(zoo(family, kind), IDS, OTHER, (3, 4), patches=2)
    chart = result_charts.swap_chart(found)
    apart, patched, heads = (panel.heat for panel in chart.panels)
    assert apart.values == tuple(map(tuple, found.spread.tolist()))
    assert sum(math.isnan(value) for row in heads.values for value in row) == int(found.patched_heads.isnan().sum())
    assert all(math.isnan(value) or value >= 0 for row in patched.values for value in row)
    assert "→" in chart.panels[0].x_names[2]
    assert len(osl.figures.swap(found).axes) > 3
