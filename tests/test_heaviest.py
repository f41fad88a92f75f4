"""The heaviest edges and paths against all of them, one by one."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import read
from small_models import NO_HOOKED, has_hooked, hooked, random_spec, tokens_for
from test_flow import every_path, paths_of, split

import oversquash_lens as osl
from oversquash_lens.errors import InputError
from oversquash_lens.paths import heaviest
from oversquash_lens.paths.kinds import KINDS

record = partial(osl.record, attention="kept")  # references read the model's own patterns
pytestmark = pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 6),
    n_layers=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
    k=st.sampled_from([1, 3, 12, 100]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_heaviest_paths_are_the_heaviest_of_all(
    seed: int, n: int, n_layers: int, kind: str, k: int, data: st.DataObject
) -> None:
    source = data.draw(st.none() | st.integers(0, n - 1))
    model, tokens = hooked(seed, **{**random_spec(seed), "n_layers": n_layers}), tokens_for(seed, n)
    found = osl.heaviest_paths(osl.flow(record(model, tokens, node_probes=None), kind, source), k)
    reading = read(model, tokens)
    paths = paths_of(kind, reading)
    weights = every_path(paths.edges, paths.nodes, source)
    total = math.fsum(weights.values())
    expected = sorted((weight / total for weight in weights.values() if weight), reverse=True)[:k]
    assert [path.share for path in found] == pytest.approx(expected, rel=1e-9)
    assert len({path.positions for path in found}) == len(found)
    for path in found:
        assert path.share == pytest.approx(weights[path.positions] / total, rel=1e-9)
        for layer, head, src, dest in path.moves:
            assert (path.positions[layer], path.positions[layer + 1]) == (src, dest)
            assert head == split(kind, reading, layer)[0][:, dest, src].argmax()
        moving = [layer for layer in range(n_layers) if path.positions[layer] != path.positions[layer + 1]]
        assert [layer for layer, head in enumerate(path.heads) if head is not None] == moving


@pytest.mark.parametrize("moving", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_heaviest_edges_are_the_heaviest_of_all(kind: str, moving: bool) -> None:
    flow = osl.flow(osl.record(hooked(5, n_layers=3, n_heads=4, d_model=16), tokens_for(5, 8)), kind, 1)
    every = {}
    for layer in range(3):
        heads, own = flow.edge(layer)
        for dest in range(8):
            if not moving:
                every[layer, None, dest, dest] = own[dest].item()
            for head in range(4):
                for src in range(dest + (not moving)):
                    every[layer, head, dest, src] = heads[head, dest, src].item()
    for k in (1, 7, 10_000):
        found = osl.heaviest_edges(flow, k, moving=moving)
        expected = sorted((share for share in every.values() if share > 0), reverse=True)[:k]
        assert [edge.share for edge in found] == pytest.approx(expected, rel=1e-9)
        for edge in found:
            assert edge.share == pytest.approx(every[edge.layer, edge.head, edge.dest, edge.src], rel=1e-9)
        assert len({(edge.layer, edge.head, edge.dest, edge.src) for edge in found}) == len(found)
        if moving:
            by_layer = heaviest.heaviest_by_layer(flow, k)
            for layer, edges in enumerate(by_layer):
                shares = sorted(
                    (share for place, share in every.items() if place[0] == layer and share > 0), reverse=True
                )
                assert [edge.share for edge in edges] == pytest.approx(shares[:k], rel=1e-9)
                assert {edge.layer for edge in edges} <= {layer}


def test_blocks_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = osl.flow(osl.record(hooked(9, n_layers=4), tokens_for(9, 12)))
    edges, paths = osl.heaviest_edges(flow, 30, moving=False), osl.heaviest_paths(flow, 30)
    monkeypatch.setattr(heaviest, "ROWS", 5)
    monkeypatch.setattr(heaviest, "BLOCK", 2)
    assert [vars(edge) for edge in osl.heaviest_edges(flow, 30, moving=False)] == [
        {**vars(edge), "share": pytest.approx(edge.share, rel=1e-10)} for edge in edges
    ]
    again = osl.heaviest_paths(flow, 30)
    assert [path.share for path in again] == pytest.approx([path.share for path in paths], rel=1e-10)
    assert {path.positions for path in again[:20]} == {path.positions for path in paths[:20]}


def test_few_paths_are_all_of_them() -> None:
    """One layer: a path from each position, and their shares are everything."""
    flow = osl.flow(osl.record(hooked(9, n_layers=1), tokens_for(9, 5)))
    found = osl.heaviest_paths(flow, 50)
    assert len(found) == 5
    assert sum(path.share for path in found) == pytest.approx(1)
    assert torch.allclose(
        torch.tensor([p.share for p in sorted(found, key=lambda p: p.positions)]).double(), flow.node[0]
    )
    assert found[0].to_dict() == {
        "positions": list(found[0].positions),
        "heads": list(found[0].heads),
        "share": found[0].share,
    }


def test_bad_k_is_refused() -> None:
    flow = osl.flow(osl.record(hooked(9), tokens_for(9, 5)))
    for function in (osl.heaviest_edges, osl.heaviest_paths):
        with pytest.raises(InputError, match="expected at least 1, as a whole number, got k=0"):
            function(flow, 0)
