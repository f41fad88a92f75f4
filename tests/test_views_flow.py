"""Views of a flow: every number they carry is the flow's, long prompts are summed, nothing weighs too much."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from small_results import EVIL, TOKENS, about, flow_result, measured_flow_result, profile, swap_result, truth

from oversquash_lens.errors import InputError
from oversquash_lens.paths.flow import Flow
from oversquash_lens.paths.heaviest import heaviest_by_layer, heaviest_edges
from oversquash_lens.viz.html import View
from oversquash_lens.viz.token_strips import bins_for, millionths
from oversquash_lens.viz.views import activations, heads, layers, prompts, route, swap
from oversquash_lens.viz.words import named, percent, visible_token

LONG = tuple(f" w{i}" for i in range(600))
VIEWS = (heads, route, activations, layers)


def data_in(view: View) -> dict:
    """What a fragment's last JSON block holds, as a browser would read it."""
    blocks = re.findall(r'<script type="application/json">(.*?)</script>', view.fragment(), re.DOTALL)
    return json.loads(blocks[-1])


def spans_in(places: list[str]) -> list[tuple[int, int]]:
    numbers = [[int(number) for number in re.findall(r"\d+", place)] for place in places]
    return [(found[0], found[-1] + 1) for found in numbers]


def squares(payload: dict, layer: int) -> torch.Tensor:
    """[head, dest, src] of a payload's triangles, in shares."""
    n, flat = len(payload["tokens"]), torch.tensor(payload["patterns"][str(layer)], dtype=torch.float64)
    found = torch.zeros(len(flat), n, n, dtype=torch.float64)
    place = 0
    for dest in range(n):
        found[:, dest, : dest + 1] = flat[:, place : place + dest + 1] / 1e6
        place += dest + 1
    assert place == flat.shape[1]
    return found


# -- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [None, 3])
def test_layers_carry_the_nodes_of_a_flow(source):
    flow = flow_result(source=source)
    payload = data_in(layers(flow))
    assert payload["labels"] == ["layer 0", "layer 1", "layer 2", "layer 3"]
    assert payload["parts"] == 1_000_000
    shares = torch.tensor(payload["shares"], dtype=torch.float64) / payload["parts"]
    torch.testing.assert_close(shares, flow.node, rtol=5e-3, atol=6e-7)


def test_the_map_carries_every_head_and_what_stays():
    flow = flow_result(n_layers=4, n_heads=3)
    payload = data_in(heads(flow))
    assert payload["columns"] == ["head 0", "head 1", "head 2", "what stays"]
    for row, head, residual in zip(payload["table"], flow.head.tolist(), flow.residual.tolist(), strict=True):
        assert row == pytest.approx([*head, residual], rel=5e-3)
        assert sum(row) == pytest.approx(1, abs=5e-3)
    layer, head = payload["start"]
    assert layer == int(flow.head.sum(-1).argmax())
    assert flow.head[layer, head] == flow.head[layer].max()


def test_patterns_are_the_flow_over_every_edge():
    flow = flow_result()
    payload = data_in(heads(flow))
    assert list(payload["patterns"]) == ["0", "1", "2"]
    for layer in range(3):
        torch.testing.assert_close(squares(payload, layer), flow.edge(layer).heads, rtol=5e-3, atol=6e-7)


def test_the_route_tells_the_heaviest_moves_of_each_layer():
    flow = flow_result(n_layers=3, source=2)
    payload = data_in(route(flow))
    assert payload["view"] == "route"
    for layer in range(3):
        edges = flow.edge(layer).heads
        edges.diagonal(dim1=1, dim2=2).zero_()
        head, dest, src = (int(i) for i in torch.unravel_index(edges.argmax(), edges.shape))
        share = f"{100 * edges.max().item():.3g} %"
        names = [f"token {i} {visible_token(TOKENS[i])}" for i in (src, dest)]
        assert payload["moves"][layer][0] == f"head {head} brings {share} from {names[0]} to {names[1]}"
        assert f"{100 * flow.residual[layer].item():.3g} %" in payload["stays"][layer]
    assert payload["shares"] == data_in(layers(flow))["shares"]
    edges = heaviest_edges(flow, 5)
    assert [layer for layer, _ in payload["heaviest"]] == [edge.layer for edge in edges]
    assert [words for _, words in payload["heaviest"]] == [
        f"head {edge.head} brings {percent(edge.share, 3)} from {named(TOKENS, edge.src)} to {named(TOKENS, edge.dest)}"
        for edge in edges
    ]


def test_moves_of_each_layer_are_the_heaviest_edges_there():
    flow = flow_result(LONG[:300], n_layers=2, n_heads=2)  # more positions than one block of rows
    by_layer = heaviest_by_layer(flow, 4)
    everywhere = heaviest_edges(flow, 4)
    assert [edge.layer for edges in by_layer for edge in edges] == [0] * 4 + [1] * 4
    merged = sorted((edge for edges in by_layer for edge in edges), key=lambda edge: -edge.share)
    assert tuple(merged[:4]) == everywhere


def test_activations_carry_what_each_head_brings_where():
    flow = flow_result(n_heads=3)
    payload = data_in(activations(flow))
    brought = torch.tensor(payload["millionths"]).permute(1, 2, 0) / 1e6  # [layer, head and residual, token]
    torch.testing.assert_close(brought[:, :3].double(), flow.head_at, rtol=5e-3, atol=6e-7)
    torch.testing.assert_close(brought[:, 3].double(), flow.residual_at, rtol=5e-3, atol=6e-7)
    assert payload["heads"] == ["0", "1", "2", "residual stream"]
    layer, head = payload["start"]
    assert flow.head[layer, head] == flow.head.max()


def test_millionths_have_three_digits():
    assert millionths(torch.tensor([1.0, 0.98765, 0.0123456, 1.6e-6, 4e-7, 0.0])).tolist() == [
        1_000_000,
        988_000,
        12_300,
        2,
        0,
        0,
    ]


def test_captions_name_the_source():
    assert "from all tokens" in heads(flow_result()).caption
    assert "Route of token 4 ·Tuesday" in route(flow_result(source=4)).caption


# -- long prompts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [heads, route, activations])
def test_long_prompts_are_summed_and_nothing_is_dropped(view):
    flow = flow_result(LONG, n_layers=2, source=77)
    made = view(flow)
    payload = data_in(made)
    spans = spans_in(payload["places"])
    assert spans[0][0] == 0
    assert [stop for _, stop in spans[:-1]] == [start for start, _ in spans[1:]]
    assert spans[-1][1] == len(LONG)
    assert {(77, 78), (599, 600)} <= set(spans)  # where the paths start and end
    assert "summed" in made.caption


def test_bins_of_patterns_hold_their_edges():
    flow = flow_result(LONG, n_layers=1)
    payload = data_in(heads(flow))
    spans, edges = spans_in(payload["places"]), flow.edge(0).heads
    assert len(spans) <= 48
    expected = torch.stack(
        [torch.stack([edges[:, a:b, c:d].sum((1, 2)) for c, d in spans], dim=-1) for a, b in spans], dim=-2
    )
    torch.testing.assert_close(squares(payload, 0), expected, rtol=5e-3, atol=6e-7)


def test_bins_of_activations_hold_their_tokens():
    flow = flow_result(LONG, n_layers=2)
    payload = data_in(activations(flow))
    for (start, stop), cell in zip(spans_in(payload["places"]), payload["millionths"], strict=True):
        expected = flow.head_at[:, :, start:stop].sum(-1)
        torch.testing.assert_close(torch.tensor(cell)[:, :2] / 1e6, expected.float(), rtol=5e-3, atol=6e-7)


@pytest.mark.parametrize("most", [16, 24, 48, 128, 512])
@pytest.mark.parametrize("n", [1, 16, 17, 129, 600])
def test_no_more_bins_than_asked_for(n, most):
    weights = torch.rand(3, n, generator=torch.Generator().manual_seed(n))
    bins = bins_for([str(i) for i in range(n)], weights, most)
    assert len(bins.bins) <= most
    assert sum(bins.widths) == n
    torch.testing.assert_close(bins.sums(weights).sum(-1), weights.sum(-1))


@pytest.mark.parametrize(("n_layers", "n_heads", "kilobytes"), [(30, 9, 250), (4, 40, 250)])
def test_patterns_stay_small(n_layers, n_heads, kilobytes):
    made = heads(flow_result(LONG[:120], n_layers, n_heads))
    payload = data_in(made)
    assert len(json.dumps(payload)) < 1000 * kilobytes
    assert (n_heads + 1) * len(payload["tokens"]) ** 2 <= 25_000
    shown = [int(layer) for layer in payload["patterns"]]
    assert ("Patterns come for" in made.caption) == (len(shown) < n_layers)
    moved = flow_result(LONG[:120], n_layers, n_heads).head.sum(-1)
    assert set(shown) == set(moved.topk(len(shown)).indices.tolist())


def test_activations_of_many_heads_have_fewer_bins():
    payload = data_in(activations(flow_result(LONG[:120], n_layers=40, n_heads=99)))
    assert len(payload["tokens"]) * 40 * 100 <= 200_000
    assert sum(payload["widths"]) == 120


# -- two prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [flow_result, profile, truth], ids=["flow", "profile", "truth"])
def test_two_prompts_share_one_scale(make):
    short, long = make(tokens=TOKENS[:4]), make(tokens=LONG[:50])
    pair = prompts(short, long)
    one, other = (data_in(view) for view in pair.views)
    assert len(one["tokens"]) == 4
    assert len(other["tokens"]) == 50
    assert one["floor"] == other["floor"] == 0.1 / 50
    assert "of the longer prompt" in pair.guide
    assert pair.fragment().count('class="osl-view"') == 2
    assert pair.fragment().count('class="osl-key"') == 1
    assert str(pair) == pair._repr_html_()
    assert str(pair).isascii()


def test_the_first_rows_of_two_prompts_are_their_shares():
    one, other = profile(), profile(tokens=TOKENS[:5], seed=4)
    for view, result in zip(prompts(one, other).views, (one, other), strict=True):
        assert view.payload["shares"][0] == pytest.approx(result.share.tolist(), rel=5e-4)


def test_results_of_two_kinds_are_no_pair():
    with pytest.raises(InputError, match=r"expected two results of one kind, got a Flow and a PathProfile"):
        prompts(flow_result(), profile())
    with pytest.raises(InputError, match=r"expected two results of .*, got nothing"):
        prompts(flow_result(), None)


# -- measured ------------------------------------------------------------------------------------------------


def test_a_measured_flow_is_shown_with_its_signs():
    flow = measured_flow_result(source=2)
    payload = data_in(route(flow))
    assert payload["view"] == "route"
    shares = torch.tensor(payload["shares"], dtype=torch.float64) / payload["parts"]
    assert (shares < 0).any()
    torch.testing.assert_close(shares, flow.node, rtol=5e-3, atol=6e-7)
    assert data_in(layers(flow))["shares"] == payload["shares"]
    for layer in range(3):
        carried = {f"head {head} carries": flow.head[layer, head].item() for head in range(2)}
        carried["the MLP writes"] = flow.mlp[layer].item()
        name, share = max(carried.items(), key=lambda each: abs(each[1]))
        assert payload["moves"][layer][0] == f"{name} {percent(share, 3)}"
        assert payload["stays"][layer] == f"{percent(flow.stays[layer].item(), 3)} stays where it is"
    order = flow.head.abs().flatten().argsort(descending=True)[:5].tolist()
    assert [layer for layer, _ in payload["heaviest"]] == [i // 2 for i in order]
    assert "Blue is below 0" in route(flow).guide
    assert "measured: sensitivity of the logit of ' red' to token 2 ·met, exact" in route(flow).caption


@pytest.mark.parametrize("parallel", [False, True])
def test_a_row_of_measured_heads_sums_to_1(parallel):
    flow = measured_flow_result(parallel=parallel)
    payload = data_in(heads(flow))
    assert payload["columns"] == ["head 0", "head 1", "what stays", *(["MLP"] if parallel else [])]
    assert payload["patterns"] == {}
    for layer, row in enumerate(payload["table"]):
        assert row[:3] == pytest.approx([*flow.head[layer].tolist(), flow.stays[layer].item()], rel=5e-3)
        assert sum(row) == pytest.approx(1, abs=0.02)
    assert payload["start"] == list(divmod(int(flow.head.abs().argmax()), 2))


def test_a_layer_that_shows_no_heads_is_said_to():
    flow = measured_flow_result()
    head, stays = flow.head.clone(), flow.stays.clone()
    head[1], stays[1] = math.nan, math.nan
    flow = replace(flow, head=head, stays=stays)
    assert data_in(heads(flow))["table"][1] == [None, None, None]
    assert data_in(route(flow))["stays"][1] == "no heads are shown"


def test_a_flow_without_heads_has_a_route_only():
    none = replace(measured_flow_result(), head=torch.zeros(3, 0, dtype=torch.float64))
    assert data_in(route(none))["heaviest"] == []
    with pytest.raises(InputError, match="a model that shows none: use route"):
        heads(none)


def test_two_measured_flows_share_a_scale():
    pair = prompts(measured_flow_result(), measured_flow_result(TOKENS[:6]))
    assert len(pair.views) == 2
    assert "Blue is below 0" in pair.guide
    with pytest.raises(InputError, match="one kind"):
        prompts(measured_flow_result(), flow_result())


def test_activations_of_a_measured_flow_are_not_known():
    with pytest.raises(InputError, match="got a MeasuredFlow, which has no shares of a head by position"):
        activations(measured_flow_result())


def test_a_swap_shows_where_it_differs_and_what_patching_says():
    found = swap_result()
    left, right = (data_in(view) for view in swap(found).views)
    torch.testing.assert_close(torch.tensor(left["shares"]).double(), found.spread, rtol=5e-3, atol=1e-6)
    assert (left["unit"], right["unit"]) == ("relative difference", "share of the effect")
    known = ~torch.isnan(found.patched)
    for layer, row in enumerate(right["shares"]):
        for i, share in enumerate(row):
            assert (share is None) == (not known[layer, i])
            if share is not None:
                assert share == pytest.approx(found.patched[layer, i].item(), rel=5e-3)
    said = swap(found).views[1].caption
    assert f"({int(known.sum())} of {known.numel()} patched)" in said
    assert "from 2 to −1.5" in said
    assert "·met replaced by ·sat" in swap(found).views[0].caption
    with pytest.raises(InputError, match="expected a Swap, got a Flow"):
        swap(flow_result())


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [heads, route, activations])
@pytest.mark.parametrize("wrong", [None, "a prompt", profile(), truth()])
def test_what_is_no_flow_is_refused(view, wrong):
    with pytest.raises(InputError, match=r"expected a MeasuredFlow or a Flow, got .*: call measured_flow or flow"):
        view(wrong)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5])
def test_numbers_that_are_no_shares_are_named(view, bad):
    flow = flow_result()
    node = flow.node.clone()
    node[1, 2] = bad
    with pytest.raises(InputError, match=r"token 2 \(·met\): .*measure again in float32"):
        view(replace(flow, node=node))


@pytest.mark.parametrize("name", ["head_at", "residual_at"])
def test_a_bad_number_of_a_head_is_named(name):
    flow = flow_result()
    values = getattr(flow, name).clone()
    values[..., 4] = math.nan
    with pytest.raises(InputError, match=r"got nan as the share of token 4 \(·Tuesday\)"):
        heads(replace(flow, **{name: values}))


@pytest.mark.parametrize("view", [heads, route, activations])
def test_an_empty_flow_is_refused(view):
    none = torch.zeros(1, 0, dtype=torch.float64)
    empty = Flow(
        "mean_field", (), None, none, torch.zeros(0, 2, 0), torch.zeros(0, 0), none, none, flow_result().edges, about()
    )
    with pytest.raises(InputError, match=r"got an empty flow \(0 tokens, 0 layers\)"):
        view(empty)


@pytest.mark.parametrize("view", VIEWS)
def test_no_token_can_leave_its_place(view):
    text = view(flow_result(EVIL, source=1)).fragment()
    assert text.isascii()
    assert text.count("</script") == 2  # the key's and the data's own
    assert not re.search(r"<(img|svg|!--)", text)
    shown = "".join(data_in(view(flow_result(EVIL)))["tokens"])
    assert not re.search(r"<[a-zA-Z/!?]|&[a-zA-Z#]", shown)  # no tag, comment or entity for innerHTML
