"""A model whose layers lie on several devices, as `device_map` spreads them: one of its blocks is elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elsewhere import Elsewhere, is_there
from small_models import tokens_for
from zoo import lacking, zoo

import oversquash_lens as osl

CELLS = [("llama", "bridge"), ("gpt2", "bridge"), ("gpt2", "hooked"), ("gemma2", "bridge"), ("mixtral", "bridge")]


@pytest.fixture(params=CELLS, ids="-".join)
def spread(request: pytest.FixtureRequest) -> Any:
    name, kind = request.param
    if why := lacking(name, kind):
        pytest.skip(why)
    model, tokens = zoo(name, kind, dtype=torch.float32), tokens_for(6, 7)
    with Elsewhere() as there:
        for tensor in (*model.blocks[1].parameters(), *model.blocks[1].buffers()):
            tensor._elsewhere = True
        seen = []
        handle = model.blocks[1].register_forward_hook(lambda block, inputs, output: seen.append(output))
        yield model, tokens, there
        handle.remove()
    assert any(is_there(each[0] if isinstance(each, tuple) else each) for each in seen)


def all_measures(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    trace = osl.record(model, tokens)
    supported = [name for name in ("proof", "calibrated", "calibrated_full") if refused(trace, name) is None]
    found = {name: each.log_by_layer for name, each in osl.profiles(trace, [*supported, "mean_field"]).items()}
    found["flow"] = osl.flow(trace).head
    for i, each in enumerate(osl.record_batch(model, [tokens[0], tokens[0][:4]])):
        found[f"batch {i}"] = osl.mean_field_sensitivity(each).log_by_layer
    found["truth"] = osl.measured_sensitivity(model, tokens, probes=2).values
    return found


def refused(trace: osl.Trace, name: str) -> str | None:
    verdict = trace.support.get(name)
    return verdict.why if verdict is not None and verdict.state == "refused" else None


@pytest.mark.parametrize("route", ["whole", "blocks"])
def test_every_measure_is_what_it_is_on_one_device(spread: Any, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, there = spread
    monkeypatch.setattr("oversquash_lens.jacobian.products.truth_route", lambda *_: route)
    apart = all_measures(model, tokens)
    assert there.mixed == set()
    for tensor in (*model.blocks[1].parameters(), *model.blocks[1].buffers()):
        tensor._elsewhere = False
    for name, values in all_measures(model, tokens).items():
        assert torch.equal(apart[name].cpu(), values), name
