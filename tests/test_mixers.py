"""Models without an attention pattern in every layer: what remains of the measures holds, and the rest is refused.

The truth is held against plain autograd through transformers' own model, before a bridge was put around it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from mixers import MIXERS, bridge_over, lacking_mixer, plain_mixer
from small_models import hooked
from torch.nn import functional
from zoo import CELLS, lacking, zoo

import oversquash_lens as osl
from oversquash_lens.capture import hooks as capture_hooks
from oversquash_lens.capture.subject import MEASURES, Subject
from oversquash_lens.errors import ModelError, OversquashError
from oversquash_lens.jacobian import routes

Model = Any
IDS = [1, 7, 9, 3, 20, 11, 5, 8, 30, 4]
FAMILY = (lambda k: [1, *[7] * k, 9], (1, 2, 5))


def made(name: str) -> tuple[Model, Model]:
    """transformers' own model, and a bridge over a copy of it."""
    if why := lacking_mixer(name):
        pytest.skip(why)
    plain = plain_mixer(name)
    return plain, bridge_over(copy.deepcopy(plain))


def plain_jacobian(model: Model, ids: list[int], *, frozen: bool = False) -> torch.Tensor:
    """‖∂y_n/∂(embedding)_i‖_F by autograd, an output at a time, through transformers alone; `frozen`: its softmax."""
    caught: dict[str, torch.Tensor] = {}
    embedding = model.get_input_embeddings()
    leaf = embedding(torch.tensor([ids])).detach().requires_grad_()
    softmax = functional.softmax
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: caught.update(y=inputs[0]))
    held = mock.patch.object(functional, "softmax", lambda *args, **kwargs: softmax(*args, **kwargs).detach())
    try:
        with held if frozen else mock.patch.object(functional, "softmax", softmax):
            model(inputs_embeds=leaf, use_cache=False)
    finally:
        handle.remove()
    y = caught["y"][0, -1]
    rows = [torch.autograd.grad(y[i], leaf, retain_graph=True)[0][0] for i in range(len(y))]
    return torch.stack(rows).double().square().sum((0, 2)).sqrt()


@cache
def scale_of(name: str) -> float:
    """What the embedding is multiplied by before it enters the first block."""
    return 4.0 if name == "recurrent-gemma" else 1.0  # √hidden_size


# ---------------------------------------------------------------- the truth, collapse and the hooks of the residuals


@pytest.mark.parametrize("name", MIXERS)
def test_the_truth_is_plain_autograds_and_collapse_that_of_passes_of_their_own(name: str) -> None:
    plain, model = made(name)
    assert osl.support(model)["truth"] == ("supported", "")
    found = osl.measured_sensitivity(model, IDS, probes=None).values
    expected = plain_jacobian(plain, IDS) / scale_of(name)
    assert torch.allclose(found, expected, rtol=1e-4)
    shared, alone = (osl.collapse_curve(model, *FAMILY, ("float32",), share=share) for share in (True, False))
    for key in ("l2", "linf", "logits"):
        a, b = (getattr(curve, key)["float32"].double() for curve in (shared, alone))
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)
    y = _outputs(plain, [[1, *[7] * k, 9] for k in (1, 2, 5)] + [[1, *[7] * k, 9] for k in (2, 3, 6)])
    distances = (torch.stack(y[:3]) - torch.stack(y[3:])).norm(dim=1)
    assert torch.allclose(shared.l2["float32"].double(), distances.double(), rtol=1e-3, atol=1e-5)


def _outputs(model: Model, prompts: list[list[int]]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: found.append(inputs[0][0, -1].detach())
    )
    try:
        with torch.no_grad():
            for ids in prompts:
                model(torch.tensor([ids]), use_cache=False)
    finally:
        handle.remove()
    return found


@pytest.mark.parametrize("name", MIXERS)
def test_the_residuals_of_the_last_token_are_the_models_own(name: str) -> None:
    plain, model = made(name)
    store: dict[str, Any] = {}
    entering: list[torch.Tensor] = []
    n_layers = len(model.blocks)
    layers = next(each for each in plain.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == n_layers)
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0][0, -1]))
    with torch.no_grad():
        model.run_with_hooks(torch.tensor([IDS]), fwd_hooks=osl.last_token_residual_hooks(model, store))
        plain(torch.tensor([IDS]), use_cache=False)
    kept = store["last_residual"]
    assert sorted(kept) == list(range(n_layers + 1))
    for layer, residual in enumerate(entering):
        assert torch.allclose(kept[layer][0], residual, rtol=1e-4, atol=1e-5), layer
    assert kept[n_layers].isfinite().all()


@pytest.mark.parametrize("name", [name for name, row in MIXERS.items() if row.patterns])
def test_latent_attention_shows_the_patterns_that_it_uses(name: str) -> None:
    plain, model = made(name)
    store: dict[str, Any] = {}
    with torch.no_grad():
        model.run_with_hooks(torch.tensor([IDS]), fwd_hooks=osl.attention_path_hooks(model, store))
        patterns = plain(torch.tensor([IDS]), output_attentions=True, use_cache=False).attentions
    for layer, pattern in enumerate(patterns):
        assert torch.allclose(store["attention"][layer], pattern, atol=1e-5)
    curve = osl.collapse_curve(model, lambda k: [1, *[7] * k], (1, 2, 5), ("float32",))
    assert not curve.attention_shift["float32"].isnan().any()
    assert curve.per_head["float32"].shape == (3, 4)
    if name in ("deepseek-v3-dense", "youtu"):  # whose only softmax is that of attention
        frozen = osl.measured_sensitivity(model, IDS, probes=None, freeze=("attention",)).values
        assert torch.allclose(frozen, plain_jacobian(plain, IDS, frozen=True), rtol=1e-4)


def test_what_no_layer_shows_is_nan_in_a_curve_and_said() -> None:
    _, model = made("mamba")
    curve = osl.collapse_curve(model, lambda k: [1, *[7] * k], (1, 2, 5), ("float32",), noise_floor=True)
    assert curve.attention_shift["float32"].isnan().all()
    assert curve.per_head["float32"].shape == (3, 0)
    assert curve.noise_floor["float32"].isfinite().any()
    assert "layers 0, 1 show no attention pattern" in osl.support(model)["collapse"].why
    assert "Collapse of" in repr(curve)


def test_an_embedding_that_later_layers_read_too_is_differentiated_as_a_whole() -> None:
    """Zamba 2 hands the embedding to each of its attention blocks: blocks cannot be differentiated one by one."""
    plain, model = made("zamba2")
    shown = Subject.of(model).function.shown
    assert shown.embedded
    assert not shown.linked
    with mock.patch.object(routes, "available_bytes", return_value=1):
        assert routes.truth_route(Subject.of(model), len(IDS), ()) == "whole"
    assert torch.allclose(
        osl.measured_sensitivity(model, IDS, probes=None).values, plain_jacobian(plain, IDS), rtol=1e-4
    )


@pytest.mark.parametrize("name", ["mamba", "jamba", "deepseek-v3", "lfm2"])
def test_blocks_differentiated_one_by_one_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = made(name)
    whole = osl.measured_sensitivity(model, IDS, probes=None).values
    monkeypatch.setattr(routes, "COMFORT", 1 << 40)
    assert routes.truth_route(Subject.of(model), len(IDS), ()) == "blocks"
    assert torch.allclose(osl.measured_sensitivity(model, IDS, probes=None).values, whole, rtol=1e-4)


def test_a_model_that_runs_only_with_a_cache_is_given_one() -> None:
    """Without one, Qwen3-Next's bridge of TransformerLens 3.9 asks for a kernel that transformers 5.23 renamed."""
    _, model = made("qwen3-next")
    subject = Subject.of(model)
    assert (model in capture_hooks.needing_cache) == (not subject.function.shown.linked)


def test_a_norm_that_an_edit_makes_another_is_not_frozen() -> None:
    """Upstream makes the norm of an edited divisor anew without the 1 that Qwen3-Next adds to its gain."""
    _, model = made("qwen3-next")
    verdict = osl.support(model)["norms frozen"]
    assert verdict.state == "refused"
    with pytest.raises(ModelError, match="norms frozen was asked of"):
        osl.measured_sensitivity(model, IDS, freeze=("norms",))


# ---------------------------------------------------------------- support and the measures agree


def _with_store(model: Model, attach: Callable[[Model, dict], list]) -> None:
    store: dict[str, Any] = {}
    with torch.no_grad():
        model.run_with_hooks(torch.tensor([IDS]), fwd_hooks=attach(model, store))
    assert all(len(kept) >= len(model.blocks) for kept in store.values())


def _edited(model: Model) -> None:
    with osl.edited_attention(model, osl.edits.window(1)):
        reach = osl.measured_sensitivity(model, IDS, probes=1).values
    if not any(hasattr(block, name) for block in model.blocks for name in ("mamba", "linear_attn")):
        assert reach[:-1].max() <= 1e-4 * reach[-1], "an edit that cuts everything off"


CALLS: dict[str, Callable[[Model], Any]] = {
    "printed bounds": lambda model: osl.path_bound(osl.record(model, IDS), "proof"),
    "calibrated": lambda model: osl.path_bound(osl.record(model, IDS), "calibrated"),
    "calibrated_full": lambda model: osl.path_bound(osl.record(model, IDS), "calibrated_full"),
    "mean_field": lambda model: osl.mean_field_sensitivity(osl.record(model, IDS)),
    "truth": lambda model: osl.measured_sensitivity(model, IDS, probes=1),
    "attention frozen": lambda model: osl.measured_sensitivity(model, IDS, probes=1, freeze=("attention",)),
    "norms frozen": lambda model: osl.measured_sensitivity(model, IDS, probes=1, freeze=("norms",)),
    "attention edits": _edited,
    "collapse": lambda model: osl.collapse_curve(model, *FAMILY, ("float64",)),
    "residual hooks": lambda model: _with_store(model, osl.last_token_residual_hooks),
    "path hooks": lambda model: _with_store(model, osl.attention_path_hooks),
}


def without_numbers(text: str) -> str:
    """Other tokens are recorded than those of the proof."""
    return re.sub(r"[0-9.e+-]+", "#", text)


def disagreements(model: Model) -> list[str]:
    """Measures that do other than what support says of them."""
    found = []
    verdicts = osl.support(model)
    assert tuple(verdicts) == MEASURES
    assert tuple(CALLS) == MEASURES
    for measure, verdict in verdicts.items():
        assert bool(verdict.why) or verdict.state != "refused"
        try:
            CALLS[measure](model)
        except OversquashError as error:
            if verdict.state != "refused":
                found.append(f"{measure}: {verdict.state}, but {error}")
            elif without_numbers(verdict.why) not in without_numbers(str(error)):
                found.append(f"{measure}: refused, because {verdict.why}, but it says {error}")
            elif "\n" in str(error) or "would not hold" in str(error):
                found.append(f"{measure}: {error}")
        else:
            if verdict.state == "refused":
                found.append(f"{measure}: refused, because {verdict.why}, but it runs")
    return found


@pytest.mark.parametrize("name", MIXERS)
def test_support_says_what_the_measures_do_of_mixers(name: str) -> None:
    assert disagreements(made(name)[1]) == []


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_support_says_what_the_measures_do_of_the_zoo(name: str, kind: str) -> None:
    if why := lacking(name, kind):
        pytest.skip(why)
    assert disagreements(zoo(name, kind)) == []


@pytest.mark.parametrize(
    "config",
    [
        {"positions": "shortformer"},
        {"act": "solu_ln"},
        {"n_layers": 1, "n_heads": 1},
        {"n_heads": 12},  # d_head 1
        {"use_split_qkv_input": True},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_support_says_what_the_measures_do_of_odd_structures(config: dict[str, Any]) -> None:
    try:
        model = hooked(3, **config)
    except ImportError:
        pytest.skip("no HookedTransformer")
    assert disagreements(model) == []


# ---------------------------------------------------------------- a sweep measures what remains


def test_a_sweep_measures_what_remains_and_says_what_was_refused(tmp_path: Path) -> None:
    _, model = made("mamba")
    rows = osl.sweep(model, [IDS, IDS[:6]], ["mean_field", "truth", "flow"], tmp_path / "rows.parquet").table()
    for row in rows.to_pylist():
        assert row["status"] == "done"
        assert "mean_field: tiny has no attention" in row["reason"]
        assert "flow: " in row["reason"]
        assert row["mean_field_share"] is None
        assert sum(row["truth_share"]) == pytest.approx(1)
    with pytest.raises(ModelError, match="mean_field was asked of"):
        osl.sweep(model, [IDS], ["mean_field"], tmp_path / "none.parquet")


@pytest.mark.parametrize("name", ["mamba", "jamba", "deepseek-v3", "lfm2"])
def test_the_flow_is_measured_without_attention_patterns(name: str) -> None:
    """Conserved, causal, and at the bottom the measured sensitivity."""
    _, model = made(name)
    found = osl.measured_flow(model, IDS, 3, target=7)
    assert found.conservation < 1e-3
    assert torch.equal(found.node[:, :3], torch.zeros(len(found.node), 3).double())
    assert torch.allclose(found.norms[0], osl.measured_sensitivity(model, IDS, target=7).values, rtol=1e-3)
    known = ~found.head.isnan().any(-1) if found.head.shape[1] else torch.zeros(len(found.stays), dtype=torch.bool)
    assert torch.equal(found.stays.isnan(), ~known)


def test_the_flow_of_a_model_that_hands_on_its_embedding_is_refused() -> None:
    _, model = made("zamba2")
    with pytest.raises(ModelError, match="hands its blocks more"):
        osl.measured_flow(model, IDS, target=7)
