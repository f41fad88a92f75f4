"""Flow against a sum over every causal path, one by one, with heads split by a model in which each is alone."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Reading, geometric_mean, mean_field, mean_square_alone, read, reference
from small_models import CASES, NO_HOOKED, case, has_hooked, hooked, random_spec, tokens_for

import oversquash_lens as osl
from oversquash_lens.capture.attention import KeptAttention
from oversquash_lens.errors import InputError
from oversquash_lens.paths import blocks as block_module
from oversquash_lens.paths import flow as flow_module
from oversquash_lens.paths.flow import Flow, flows
from oversquash_lens.paths.kinds import KINDS
from oversquash_lens.paths.profiles import paths_of_trace

record = partial(osl.record, attention="kept")  # references read the model's own patterns

TIGHT = 1e-10  # absolute, of shares; the edges themselves agree to 1e-12 (test_bounds, test_mean_field)
FLOAT32_INSIDE = {"bridge-llama": 1e-5}

needs_hooked = pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)


def paths_of(kind: str, reading: Reading):
    return mean_field(reading) if kind == "mean_field" else reference(reading, kind)


def only_head(reading: Reading, layer: int, head: int) -> Reading:
    """The same reading in which all other heads of the layer look nowhere."""
    layers = list(reading.layers)
    pattern = torch.zeros_like(layers[layer].pattern)
    pattern[head] = layers[layer].pattern[head]
    layers[layer] = replace(layers[layer], pattern=pattern)
    return replace(reading, layers=layers)


def split(kind: str, reading: Reading, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """heads [head, dest, src] and own [dest] of one layer, from what is left where one head is alone."""
    if kind == "mean_field":
        alone, own = mean_square_alone(reading, layer)
        ratio = paths_of(kind, reading).edges[layer] / (alone.sum(0) + own.diag()).clamp(min=1e-300)
        return alone * ratio, own * ratio.diagonal()
    n_heads = len(reading.layers[layer].pattern)
    nobody = only_head(reading, layer, 0)
    nobody.layers[layer].pattern.zero_()
    own = paths_of(kind, nobody).edges[layer]
    alone = torch.stack([paths_of(kind, only_head(reading, layer, h)).edges[layer] - own for h in range(n_heads)])
    assert torch.allclose(own, torch.diag(own.diagonal()), atol=0)
    return alone, own.diagonal()


def every_path(edges: list[torch.Tensor], nodes: list[torch.Tensor], source: int | None) -> dict[tuple, float]:
    """Weight of each path (positions, lowest layer first) that ends at the last position."""
    n, n_layers = len(edges[0]), len(edges)
    found = {}
    for start in range(n) if source is None else [source]:
        for middle in itertools.combinations_with_replacement(range(start, n), n_layers - 1):
            path = (start, *middle, n - 1)
            steps = enumerate(itertools.pairwise(path))
            found[path] = math.prod(
                edges[layer][dest, src].item() * nodes[layer][dest].item() for layer, (src, dest) in steps
            )
    return found


def assert_flow(model: object, tokens: torch.Tensor, kind: str, source: int | None, tolerance: float = TIGHT) -> None:
    trace = record(model, tokens, node_probes=None)
    assert_flow_of(trace, read(model, tokens), kind, source, tolerance)


def assert_flow_of(trace: osl.Trace, reading: Reading, kind: str, source: int | None, tolerance: float) -> None:
    flow, paths = osl.flow(trace, kind, source), paths_of(kind, reading)
    weights = every_path(paths.edges, paths.nodes, source)
    total = math.fsum(weights.values())
    n_layers, n = len(paths.edges), reading.n
    node = torch.zeros(n_layers + 1, n, dtype=torch.float64)
    steps = torch.zeros(n_layers, n, n, dtype=torch.float64)
    for path, weight in weights.items():
        for layer, position in enumerate(path):
            node[layer, position] += weight / total
        for layer, (src, dest) in enumerate(itertools.pairwise(path)):
            steps[layer, dest, src] += weight / total
    assert math.expm1(flow.log_total - math.log(total)) == pytest.approx(0, abs=10 * tolerance)
    assert (flow.node - node).abs().max() <= tolerance
    for layer in range(n_layers):
        heads, own = split(kind, reading, layer)
        of_edge = steps[layer] / paths.edges[layer].clamp(min=1e-300)
        assert (flow.head_at[layer] - (heads * of_edge).sum(2)).abs().max() <= tolerance
        assert (flow.residual_at[layer] - own * of_edge.diagonal()).abs().max() <= tolerance
        edge = flow.edge(layer)
        assert (edge.heads - heads * of_edge).abs().max() <= tolerance
        assert (edge.residual - own * of_edge.diagonal()).abs().max() <= tolerance
    assert_conserved(flow, max(tolerance, TIGHT))


def assert_conserved(flow: Flow, tolerance: float = TIGHT) -> None:
    """The same whole at every layer, and everything adds up to it."""
    assert flow.imbalance <= tolerance
    assert (flow.node.sum(1) - 1).abs().max() <= tolerance
    assert (flow.head.sum(1) + flow.residual - 1).abs().max() <= tolerance
    assert (flow.head_at.sum(1) + flow.residual_at - flow.node[1:]).abs().max() <= tolerance
    assert flow.residual_at[flow.node[:-1] == 0].count_nonzero() == 0, "something stays where nothing was"
    assert flow.node.min() >= 0
    assert flow.head_at.min() >= 0
    assert flow.residual_at.min() >= 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_equals_a_sum_over_all_paths(name: str, kind: str) -> None:
    model, tokens = case(name)
    assert_flow(model, tokens, kind, None, FLOAT32_INSIDE.get(name, TIGHT))


@needs_hooked
@given(seed=st.integers(0, 10_000), n=st.integers(2, 5), kind=st.sampled_from(KINDS), data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_equals_path_sums_on_random_architectures(seed: int, n: int, kind: str, data: st.DataObject) -> None:
    source = data.draw(st.none() | st.integers(0, n - 1))
    assert_flow(hooked(seed, **random_spec(seed)), tokens_for(seed, n), kind, source)


@needs_hooked
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS))
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_is_conserved_on_longer_and_deeper_models(seed: int, kind: str) -> None:
    model = hooked(seed, **{**random_spec(seed), "n_layers": 7})
    trace = record(model, tokens_for(seed, 16))
    for flow in flows(trace, (None, 0, 7, 15), kind):
        assert_conserved(flow)


@needs_hooked
def test_sources_together_are_each_alone_and_add_up_to_all() -> None:
    trace = osl.record(hooked(3, n_layers=3), tokens_for(3, 6))
    every = flows(trace, range(6))
    whole = osl.flow(trace)
    for source, together in enumerate(every):
        alone = osl.flow(trace, source=source)
        assert together.source == source
        assert torch.allclose(together.node, alone.node, rtol=1e-12)
        assert together.log_total == alone.log_total
    parts = torch.tensor([flow.log_total - whole.log_total for flow in every], dtype=torch.float64).exp()
    assert torch.allclose(parts, whole.node[0], rtol=1e-12)
    mixture = sum(part * flow.node for part, flow in zip(parts, every, strict=True))
    assert torch.allclose(mixture, whole.node, rtol=1e-12)


@needs_hooked
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows three at a time change nothing."""
    trace = osl.record(hooked(4, n_layers=3, n_heads=4, d_model=16, kv_heads=2), tokens_for(4, 10))
    whole = osl.flow(trace, kind, 7)  # in the third block: those before it hold nothing
    monkeypatch.setattr(flow_module, "ROWS", 3)
    monkeypatch.setattr(block_module, "MOST_ROWS", 3)
    blocks = osl.flow(trace, kind, 7)
    for name in ("node", "head_at", "residual_at"):
        assert torch.allclose(getattr(blocks, name), getattr(whole, name), rtol=1e-10, atol=1e-14)
    assert torch.allclose(blocks.edge(1).heads, whole.edge(1).heads, rtol=1e-10, atol=1e-14)


@needs_hooked
@pytest.mark.parametrize("kind", KINDS)
def test_a_known_profile_saves_the_sweep_from_above(kind: str) -> None:
    trace = osl.record(hooked(4, n_layers=3, n_heads=4, d_model=16, kv_heads=2), tokens_for(4, 10))
    known = flows(trace, (None, 2), kind, profile=osl.profiles(trace, [kind])[kind])
    for one, other in zip(known, flows(trace, (None, 2), kind), strict=True):
        assert torch.allclose(one.node, other.node, rtol=1e-12)
        assert torch.allclose(one.head_at, other.head_at, rtol=1e-12)


@needs_hooked
@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_residual_stream_add_up_to_the_edges(kind: str) -> None:
    trace = osl.record(hooked(8, n_heads=4, d_model=16, positions="rotary", kv_heads=2), tokens_for(8, 9))
    for start, stop in ((0, 9), (4, 7)):
        edges = paths_of_trace(trace, kind).edge_block(1, start, stop)
        split, total = edges.by_head(), edges.dense()
        assert torch.allclose(split.total(start), total, rtol=1e-12, atol=1e-15)
        column = torch.rand(9, 2, dtype=torch.float64)
        assert torch.allclose(edges.column_product(column), total @ column[:stop], rtol=1e-12)
        row = torch.rand(9, dtype=torch.float64)
        assert torch.allclose(edges.row_product(row), row[start:stop] @ total, rtol=1e-12)
        assert torch.allclose(edges.head_products(column[:stop]), split.heads @ column[:stop], rtol=1e-12)
        assert split.heads.min() >= 0
        assert split.residual.min() >= 0


def faint_trace(dtype: torch.dtype, weight: float) -> osl.Trace:
    """A real trace whose attention is replaced: each position looks at itself, and by `weight` at the one before."""
    trace = osl.record(hooked(6, n_layers=12, dtype=dtype), tokens_for(6, 12))
    pattern = torch.eye(12, dtype=dtype) + weight * torch.diag(torch.ones(11, dtype=dtype), -1)
    pattern = pattern.expand(trace.about.n_heads, -1, -1).contiguous()
    return replace(trace, attention=(KeptAttention(pattern),) * 12)


@needs_hooked
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight", [1e-3, 1e-20, 1e-35])
@pytest.mark.parametrize("kind", ["rollout", "calibrated"])
def test_the_faintest_route_is_there(kind: str, weight: float, dtype: torch.dtype) -> None:
    """From position 0 to the last one every path takes 11 of the 12 layers: down to 1e-385, beyond any float."""
    flow = osl.flow(faint_trace(dtype, weight), kind, 0)
    assert_conserved(flow, 1e-5 if dtype == torch.float32 else TIGHT)
    if kind == "rollout":  # every layer is the same: the one layer of twelve in which it stays can be any
        assert torch.allclose(flow.residual, torch.full((12,), 1 / 24, dtype=torch.float64), rtol=1e-4)
        assert torch.allclose(flow.head.sum(1), torch.full((12,), 23 / 24, dtype=torch.float64), rtol=1e-4)
        assert torch.allclose(flow.edge(5).heads.sum(), flow.head[5].sum(), rtol=1e-6)
        assert flow.log_total == pytest.approx(math.log(12) + 11 * math.log(weight) - 11 * math.log(2), rel=1e-6)
    assert flow.receptive_field.tolist() == [1, *([2] * 11), 1]


@needs_hooked
def test_widths() -> None:
    trace = osl.record(hooked(2, n_layers=3), tokens_for(2, 7))
    flow = osl.flow(trace, "rollout")
    for shares, width in zip(flow.node.tolist(), flow.effective_width.tolist(), strict=True):
        assert width == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares if p)))
    assert flow.receptive_field.tolist() == [7, 7, 7, 1]
    assert osl.flow(trace, "rollout", 4).receptive_field.tolist() == [1, 3, 3, 1]
    assert flow.effective_width[-1] == 1
    assert flow.relative_width[-1] == 1
    assert torch.equal(flow.relative_width, flow.effective_width / flow.receptive_field)


@needs_hooked
def test_node_shares_of_the_prompt_are_the_profiles_shares() -> None:
    trace = osl.record(hooked(2), tokens_for(2, 7))
    assert torch.allclose(osl.flow(trace, "proof").node[0], osl.path_bound(trace, "proof").share, rtol=1e-12)
    squared = osl.mean_field_sensitivity(trace).values.square()
    assert torch.allclose(osl.flow(trace).node[0], squared / squared.sum(), rtol=1e-12)
    beta_1 = [geometric_mean(layer.r1) for layer in read(hooked(2), tokens_for(2, 7)).layers]
    assert min(abs(beta - 1) for beta in beta_1) > 1e-3
    assert not torch.allclose(osl.flow(trace, "proof", beta=1.0).node, osl.flow(trace, "proof").node, rtol=1e-3)


@needs_hooked
def test_json_has_every_number() -> None:
    flow = osl.flow(osl.record(hooked(2), tokens_for(2, 4)), source=1)
    written = json.loads(json.dumps(flow.to_dict(), allow_nan=False))
    assert written["source"] == 1
    assert written["paths"] == "mean_field"
    assert len(written["tokens"]) == 4
    assert torch.allclose(torch.tensor(written["head"], dtype=torch.float64), flow.head)
    assert torch.allclose(torch.tensor(written["node"], dtype=torch.float64), flow.node)


@needs_hooked
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"source": 5}, "expected a position 0 … 4, the text of a token or a slice of positions, got source=5"),
        ({"source": -1}, "got source=-1"),
        ({"source": "Alice"}, "slice of positions, got source='Alice', but no token is that"),
        ({"source": 1.5}, "got source=1.5"),
        ({"source": True}, "got source=True"),
        ({"source": ""}, "got source=''"),
        ({"source": "77"}, "got source='77'"),
        ({"source": "4:2"}, "got source='4:2'"),
        ({"source": slice(2, 2)}, "got source=slice(2, 2, None)"),
        ({"source": slice(0, 6)}, "got source=slice(0, 6, None)"),
        ({"source": slice(0, 4, 2)}, "got source=slice(0, 4, 2)"),
        ({"source": slice(-2, None)}, "got source=slice(-2, None, None)"),
        ({"kind": "prof"}, "expected one of mean_field, proof, theorem_5_1"),
        ({"kind": "prof"}, "got kind 'prof'"),
        ({"beta": 1.0}, "got beta=1.0 with 'mean_field'"),
        ({"kind": "calibrated", "beta": 2.0}, "got beta=2.0 with 'calibrated'"),
    ],
)
def test_bad_input_is_refused(arguments: dict, said: str) -> None:
    trace = osl.record(hooked(2), tokens_for(2, 5))
    with pytest.raises(InputError) as refusal:
        osl.flow(trace, **arguments)
    assert said in str(refusal.value)


@needs_hooked
def test_a_source_without_any_path_is_refused() -> None:
    trace = osl.record(hooked(2), tokens_for(2, 5))
    alone = KeptAttention(torch.eye(5, dtype=torch.float64).expand(trace.about.n_heads, -1, -1).contiguous())
    deaf = replace(trace, attention=(alone,) * trace.n_layers)
    with pytest.raises(InputError, match="got source=1, from which no path has any weight"):
        osl.flow(deaf, source=1)
    assert osl.flow(deaf).node[:, -1].tolist() == [1.0] * 3
    with pytest.raises(InputError, match="got no source"):
        flows(trace, ())
    with pytest.raises(InputError, match="expected 0 … 1, the layers of this flow, got layer 2"):
        osl.flow(trace).edge(2)


def test_the_real_model_conserves_every_kind(smollm2: object) -> None:
    trace = osl.record(smollm2, "Alice said that the school needed new books. Bob wanted a new roof. The answer is")
    for kind in KINDS:
        for flow in flows(trace, (None, 0, 9), kind):
            assert flow.imbalance <= 1e-10, kind
            assert (flow.head.sum(1) + flow.residual - 1).abs().max() <= 1e-10, kind


@needs_hooked
def test_what_is_no_trace_or_flow_is_told_what_to_do() -> None:
    model = hooked(2)
    flow = osl.flow(record(model, tokens_for(2, 5)))
    for function in (osl.flow, osl.squashing):
        with pytest.raises(InputError, match=r"expected a Trace, got a \w+: call record"):
            function(model)
    for function in (osl.heaviest_edges, osl.heaviest_paths):
        with pytest.raises(InputError, match="expected a Flow, got a HeadEdges: call flow"):
            function(flow.edge(0))


# -- sources -------------------------------------------------------------------------------------------------

TOKENS = ("Alice", " met", " Bob", ".", " Alice", " sk", "erry", " 7", "\n", "\n")


@pytest.mark.parametrize(
    ("source", "place"),
    [
        (3, 3),
        ("met", 1),
        (" met", 1),
        ("Bob", 2),
        (" Alice", 4),  # with its space it is that one alone
        ("skerry", slice(5, 7)),
        (" skerry", slice(5, 7)),
        ("Bob. Alice", slice(2, 5)),
        ("7", 7),  # the token's text comes before the number
        ("6", 6),
        ("2:4", slice(2, 4)),
        ("8:", slice(8, 10)),
        (slice(2, 4), slice(2, 4)),
        (slice(None, 3), slice(0, 3)),
        (slice(3, None), slice(3, 10)),
    ],
)
def test_a_source_is_an_index_a_text_or_a_slice(source: object, place: object) -> None:
    assert flow_module.position_of(TOKENS, source) == place


@pytest.mark.parametrize(("source", "said"), [("Alice", "at positions 0, 4"), ("\n", "at positions 8, 9")])
def test_a_text_that_is_there_several_times_is_refused_with_its_places(source: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        flow_module.position_of(TOKENS, source)


@needs_hooked
def test_a_span_is_its_positions_together() -> None:
    trace = osl.record(hooked(3, n_layers=3), tokens_for(3, 6))
    span = osl.flow(trace, source=slice(1, 4))
    alone = flows(trace, range(1, 4))
    parts = torch.tensor([flow.log_total - span.log_total for flow in alone], dtype=torch.float64).exp()
    assert parts.sum().item() == pytest.approx(1)
    mixture = sum(part * flow.node for part, flow in zip(parts, alone, strict=True))
    assert torch.allclose(mixture, span.node, rtol=1e-12)
    assert_conserved(span)
    assert json.loads(json.dumps(span.to_dict()))["source"] == [1, 4]


# -- what results say of themselves --------------------------------------------------------------------------


@needs_hooked
def test_results_say_what_matters_in_a_few_lines() -> None:
    trace = osl.record(hooked(3, n_layers=14), tokens_for(3, 15))
    flow = osl.flow(trace, source=3)
    results = {
        "mean_field": osl.mean_field_sensitivity(trace),
        "shares only": osl.path_bound(trace, "rollout"),
        "token 3": flow,
        "20 heaviest edges of mean_field": osl.heaviest_edges(flow),
        "10 heaviest paths of mean_field": osl.heaviest_paths(flow),
        "squashing index": osl.squashing(trace),
        "From the recording alone": osl.expected_error(trace),
    }
    for said, result in results.items():
        lines = repr(result).splitlines()
        assert 2 <= len(lines) <= 12
        assert said in lines[0]
        assert result._repr_html_().count("<tr>") >= len(lines) - 2
        json.dumps(result.to_dict(), allow_nan=False)
    frame = results["mean_field"].to_frame()
    assert list(frame.columns) == ["position", "token", "share", "log10_value"]
    assert frame["share"].sum() == pytest.approx(1)
    best = frame.sort_values("share").iloc[-1]
    assert repr(results["mean_field"]).splitlines()[2].split()[0] == str(best["position"])
    assert len(flow.to_frame()) == 14
    assert len(osl.heaviest_edges(flow).to_frame()) == 20
