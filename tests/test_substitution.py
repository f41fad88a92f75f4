"""Substitution, held against passes of its own and against node substitution done by hooks on whole passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import NO_BRIDGE, bridge, has_bridge
from torch import Tensor
from zoo import each, zoo

import oversquash_lens as osl
from oversquash_lens.capture.subject import Subject
from oversquash_lens.swaps import substitution as module
from oversquash_lens.swaps.replacements import Chances
from oversquash_lens.swaps.substitution import substitution

IDS = [1, 7, 9, 3, 20, 11, 5, 8, 2, 4, 13, 17, 6]
N = len(IDS)
FAMILIES = [
    "gpt2",
    "llama",
    "mistral-window",
    "gemma2",
    "gemma3",
    "gpt-neox",
    "qwen3",
    "phi",
    "opt",
    "bloom",
    "mixtral",
]
needs_bridge = pytest.mark.skipif(not has_bridge(), reason=NO_BRIDGE)


def own_pass(model: Any, ids: list[int]) -> tuple[Tensor, Tensor]:
    """y_n and the logits of a plain pass."""
    kept: dict[str, Tensor] = {}
    handle = model.ln_final.register_forward_hook(lambda module, inputs, y: kept.update(y=y[0, -1].double()))
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1].double()
    handle.remove()
    return kept["y"], logits


def replaced(start: int, new: list[int]) -> list[int]:
    return [*IDS[:start], *new, *IDS[start + len(new) :]]


@each(*FAMILIES)
def test_given_replacements_are_passes_of_their_own(family: str, kind: str) -> None:
    model = zoo(family, kind)
    positions = [0, 3, slice(5, 8), N - 1]
    texts = [[[4], [5]], [[6], [7]], [[4, 4, 4], [1, 2, 3]], [[9], [8]]]
    found = substitution(model, IDS, positions, method="exact", replacements=texts, target=(3, 4))
    y, logits = own_pass(model, IDS)
    assert found.size == pytest.approx(y.norm().item(), rel=1e-6)
    for i, (start, _) in enumerate(found.spans):
        for draw, new in enumerate(texts[i]):
            other, theirs = own_pass(model, replaced(start, new))
            assert found.distances[i, draw].item() == pytest.approx((other - y).norm().item(), rel=1e-5, abs=2e-6)
            p, q = logits.log_softmax(-1), theirs.log_softmax(-1)
            assert found.kls[i, draw].item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-4, abs=1e-9)
            assert bool(found.kept[i, draw]) == bool(logits.argmax() == theirs.argmax())
            effect = (theirs[3] - theirs[4]) - (logits[3] - logits[4])
            assert found.effects[i, draw].item() == pytest.approx(effect.item(), rel=1e-4, abs=1e-5)


def by_hooks(model: Any, ids: list[int], recomputed: set[int]) -> Tensor:
    """y_n of a whole pass in which every position that is not recomputed has the keys and values of IDS."""
    layers, base = range(len(model.blocks)), {}
    names = [f"blocks.{i}.attn.hook_{part}" for i in layers for part in "kv"]

    def keep(value: Tensor, hook: Any) -> None:
        base[hook.name] = value.clone()

    def restore(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        rest = [i for i in range(N) if i not in recomputed]
        value[:, rest] = base[hook.name][:, rest]
        return value

    with torch.no_grad(), model.hooks(fwd_hooks=[(name, keep) for name in names]):
        model(torch.tensor([IDS]))
    with model.hooks(fwd_hooks=[(name, restore) for name in names]):
        return own_pass(model, ids)[0]


@pytest.mark.parametrize(("behind", "last"), [(3, 4), (1, 2), (0, 0), (N, N)])
@each("gpt2", "llama", "mistral-window", "gemma2", "gemma3", "qwen3", "mixtral", "bloom")
def test_nodes_keep_all_other_keys_and_values(
    family: str, kind: str, behind: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEHIND", behind)
    monkeypatch.setattr(module, "LAST", last)
    model = zoo(family, kind)
    if (family, kind) == ("bloom", "bridge"):
        with pytest.raises(osl.OversquashError, match="mask of two axes"):
            substitution(model, IDS, draws=2, method="nodes")
        return
    found = substitution(model, IDS, range(N), method="nodes", replacements=[[7 + i % 3] for i in range(N)])
    y, _ = own_pass(model, IDS)
    for i in range(N):
        nodes = {*range(i, i + behind + 1), *range(N - 1 - last, N)}
        if N - i <= behind + last + 2:
            nodes = set(range(i, N))
        other = by_hooks(model, replaced(i, [7 + i % 3]), nodes)
        assert found.distances[i, 0].item() == pytest.approx((other - y).norm().item(), rel=1e-5, abs=2e-6)


@each("llama")
def test_the_last_token_learns_of_it_where_it_can(family: str, kind: str) -> None:
    model = zoo(family, kind)
    found = substitution(model, IDS, draws=4)
    assert torch.equal(found.arrival[0, :-1], torch.zeros(N - 1).double())
    embedded = model.W_E.detach().double()
    moved = [(embedded[new[0]] - embedded[IDS[-1]]).norm() for new in found.replacements[-1]]
    assert found.arrival[0, -1].item() == pytest.approx((sum(moved) / 4 / embedded[IDS[-1]].norm()).item(), rel=1e-6)
    assert (found.arrival[-1] > 0).all()


@each("llama")
def test_draws_are_others_tokens_and_depend_on_the_position_alone(family: str, kind: str) -> None:
    model = zoo(family, kind)
    every = substitution(model, IDS, draws=6, seed=3)
    assert every.plausible == (False, False, False, True, True, True)
    for i, row in enumerate(every.replacements):
        assert all(len(new) == 1 and new[0] != IDS[i] for new in row)
    some = substitution(model, IDS, [2, slice(4, 6)], draws=6, seed=3)
    assert some.replacements[0] == every.replacements[2]
    assert some.replacements[1] == tuple((a[0], b[0]) for a, b in zip(*every.replacements[4:6], strict=True))
    assert torch.allclose(some.distances[0], every.distances[2])
    assert substitution(model, IDS, [2], draws=6, seed=4).replacements != some.replacements[:1]
    uniform, plausible = every.of(False), every.of(True)
    assert torch.equal(torch.cat([uniform.distances, plausible.distances], 1), every.distances)
    logs = torch.stack([uniform.distance.log(), plausible.distance.log()]).mean(0)
    assert torch.allclose(every.distance.log(), logs)


@needs_bridge
def test_plausible_draws_follow_the_models_own_prediction() -> None:
    """A chi-square of many draws at one place against the distribution that the model predicts there."""
    model = zoo("llama", "bridge")
    draws, place = 4000, 5
    with torch.no_grad():
        chances = model(torch.tensor([IDS]))[0, place - 1].double().softmax(-1)
    special = set(getattr(model.tokenizer, "all_special_ids", ()))
    chances[[IDS[place], *special]] = 0
    chances /= chances.sum()
    found = Chances(Subject.of(model), module.predictions(Subject.of(model), tuple(IDS))[0], tuple(IDS))
    drawn = torch.tensor([new for (new,) in found.drawn((place, place + 1), (True,) * draws, 0)])
    counts = torch.bincount(drawn, minlength=len(chances)).double()
    likely = chances > 5 / draws
    square = ((counts - draws * chances).square() / (draws * chances).clamp(min=1e-9))[likely].sum()
    assert square < likely.sum() + 5 * (2 * likely.sum()) ** 0.5
    assert counts[chances == 0].sum() == 0


@each("gemma2", "llama")
def test_logits_are_the_models_own(family: str, kind: str) -> None:
    """Capped ones, too."""
    model = zoo(family, kind)
    subject = Subject.of(model)
    y, logits = module.predictions(subject, tuple(IDS))
    assert torch.allclose(logits.double(), own_pass(model, IDS)[1], rtol=1e-5)
    assert torch.allclose(module.logits_of(subject, y[-1:])[0], logits, rtol=1e-5)


@needs_bridge
def test_number_formats_collapse_when_the_distance_is_below_their_epsilon() -> None:
    model = bridge(3, "llama")
    found = substitution(model, IDS, [1, N - 1], draws=2, dtypes=["float64:store=bfloat16", "bfloat16"])
    assert set(found.collapsed) == {"float64", "float64:store=bfloat16", "bfloat16"}
    assert all(((each >= 0) & (each <= 1)).all() for each in found.collapsed.values())
    same = substitution(model, IDS, [1], replacements=[[IDS[1]]], dtypes=["float64:store=bfloat16"])
    assert same.distances.item() < 1e-6
    assert same.collapsed["float64:store=bfloat16"].item() == 1


@needs_bridge
def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 8)
    model, out = zoo("llama", "bridge"), tmp_path / "found.parquet"
    whole = substitution(model, IDS, draws=4)
    measure, calls = module._Run.measure, []

    def stops(run: Any, group: range) -> Any:
        calls.append(group.start)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(run, group)

    monkeypatch.setattr(module._Run, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        substitution(model, IDS, draws=4, out=out)
    found = substitution(model, IDS, draws=4, out=out)
    assert calls == [0, 2, 4, 4, 6, 8, 10, 12]
    assert torch.allclose(found.distances, whole.distances)
    assert torch.allclose(found.arrival, whole.arrival)
    with pytest.raises(osl.OversquashError):
        substitution(model, IDS, draws=4, seed=1, out=out)


@needs_bridge
def test_auto_says_what_it_took_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo("llama", "bridge")
    assert substitution(model, IDS, draws=2).method == "exact"
    monkeypatch.setattr(module, "BUDGET", 10)
    found = substitution(model, IDS, draws=4)
    assert found.method == "nodes"
    assert "ρ = 0.79" in found.method_reason
    spans = substitution(model, IDS, [slice(2, 4)], draws=4)
    assert spans.method == "exact"
    assert "spans" in spans.method_reason


def test_texts_are_aligned_or_refused() -> None:
    model = osl.load_model()
    prompt = "Alice lives in Paris. Bob lives in Rome. Alice lives in"
    found = substitution(model, prompt, ["Paris"], replacements=[["Berlin", " Rome"]], target=("Paris", "Berlin"))
    assert [model.tokenizer.decode(list(new)) for new in found.replacements[0]] == [" Berlin", " Rome"]
    assert found.effects[0, 0] < 0
    with pytest.raises(osl.OversquashError, match="which is 2"):
        substitution(model, prompt, ["Paris"], replacements=[["Constantinopolitan"]])
    with pytest.raises(osl.OversquashError, match="which is at positions"):
        substitution(model, prompt, ["Alice"])


@needs_bridge
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"draws": 0}, "draws"),
        ({"method": "group"}, "method"),
        ({"positions": []}, "at least one position"),
        ({"positions": [99]}, "expected a position"),
        ({"replacements": [[3]]}, "13 positions"),
        ({"positions": [1], "replacements": [[999999]]}, "ids in"),
        ({"positions": [1], "replacements": [[[1, 2]]]}, "which is 2"),
        ({"target": 10**9}, "expected one token"),
    ],
)
def test_what_cannot_be_used_is_said(given: dict[str, Any], said: str) -> None:
    with pytest.raises(osl.OversquashError, match=said) as caught:
        substitution(zoo("llama", "bridge"), IDS, **given)
    assert "\n" not in str(caught.value)


@each("llama")
def test_a_result_says_itself(family: str, kind: str) -> None:
    found = substitution(zoo(family, kind), IDS, draws=2, target=3)
    assert len(repr(found).splitlines()) <= 12
    assert len(found.to_frame()) == N
    kept = found.to_dict()
    assert kept["distances"] == found.distances.tolist()
    assert set(kept["collapsed"]) == set(found.collapsed)


@each("llama")
def test_it_is_seen_on_the_tokens(family: str, kind: str) -> None:
    model = zoo(family, kind)
    found = substitution(model, IDS, draws=2)
    assert found.share.sum().item() == pytest.approx(1)
    assert "replaced" in str(osl.views.positions(found))
    with pytest.raises(osl.OversquashError, match="spans"):
        osl.views.positions(substitution(model, IDS, [2], draws=2))
