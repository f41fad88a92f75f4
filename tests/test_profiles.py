"""Blocks of attention against definitions written out, and one sweep for many kinds against one for each."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import NO_HOOKED, has_hooked, hooked, tokens_for

import oversquash_lens as osl
from oversquash_lens.capture.attention import KeptAttention, UniformAttention, per_head
from oversquash_lens.errors import InputError
from oversquash_lens.paths import blocks as block_module
from oversquash_lens.paths.blocks import Buffers, EdgeBlock, LayerAttention
from oversquash_lens.paths.kinds import KINDS
from oversquash_lens.paths.recursion import FAINT, PathFactors, log_path_products, log_path_sums

needs_hooked = pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)


def small_trace(seed: int = 5, n: int = 11, **spec: object) -> osl.Trace:
    spec = {"n_layers": 3, "n_heads": 4, "d_model": 16, "kv_heads": 2, **spec}
    return osl.record(hooked(seed, **spec), tokens_for(seed, n), attention="kept")


def distances(trace: osl.Trace, layer: int) -> torch.Tensor:
    """‖o_k - ō_j‖ from the differences themselves, in float64: [head, dest, src]."""
    rows = trace.attention[layer].rows(0, trace.n_positions).double()
    value = per_head(trace.gains.value[layer].double(), len(rows))
    output = value @ trace.gains.weights.output_factor[layer].double().mT
    return (output[:, None] - (rows @ output)[:, :, None]).norm(dim=-1)


# -- one block -----------------------------------------------------------------------------------------------


@needs_hooked
@pytest.mark.parametrize(("start", "stop"), [(0, 11), (4, 9), (10, 11)])
def test_a_block_holds_what_the_definitions_say(start: int, stop: int) -> None:
    trace = small_trace()
    gains, weights = trace.gains, trace.gains.weights
    for index in range(trace.n_layers):
        block = LayerAttention.of(trace, index).block(start, stop)
        rows = trace.attention[index].rows(start, stop)[:, :, :stop]
        distance = distances(trace, index)[:, start:stop, :stop]
        scale = weights.score_scale[index].abs()
        queries, keys = gains.query_norm[index][:, start:stop], per_head(gains.key_norm[index], 4)[:, :stop]
        response = rows * distance * queries[:, :, None] * scale
        assert torch.allclose(block.key_response("output_factor"), response, rtol=1e-10, atol=1e-14)
        by_query = (rows * distance * keys[:, None]).sum(-1) * scale
        assert torch.allclose(block.query_response("output_factor"), by_query, rtol=1e-10)
        assert torch.allclose(block.head_sum, rows.sum(0), rtol=1e-12)
        ov = weights.ov_norm[index]
        assert torch.allclose(block.weighted_head_sum("ov_norm"), (rows * ov[:, None, None]).sum(0), rtol=1e-12)
        mean_square = torch.einsum("ajk,bjk,ab->jk", rows, rows, weights.ov_gram[index])
        assert torch.allclose(block.value_mean_square, mean_square, rtol=1e-10, atol=1e-14)
        assert block.value_mean_square.min() >= 0
        each = queries / (1 + ov[:, None])  # any weight of head and destination
        squared = (response.square() * each[:, :, None]).sum(0)
        assert torch.allclose(
            block.weighted_squared_key_response("output_factor", each), squared, rtol=1e-10, atol=1e-14
        )
        deviation = (rows * distance).square().sum(-1)
        assert torch.allclose(block.value_deviation("output_factor"), deviation, rtol=1e-10, atol=1e-14)
        key = per_head(gains.key[index], 4)[:, :stop]
        away = key[:, None] - (rows @ key)[:, :, None]
        spread = (rows * away.square().sum(-1)).sum(-1)
        assert torch.allclose(block.key_deviation, spread, rtol=1e-9, atol=1e-12)


@needs_hooked
def test_distances_survive_cancellation_in_float32() -> None:
    """Values that are nearly alike, far from 0: products lose every digit of their distances, differences none."""
    trace = small_trace(dtype=torch.float32)
    value = trace.gains.value
    alike = value[:, :, :1] + 1e-5 * value[:, :, :1].norm(dim=-1, keepdim=True) * torch.randn_like(value)
    blind = tuple(KeptAttention(each.rows(0, 11)) for each in trace.attention)
    trace = replace(trace, gains=replace(trace.gains, value=alike), attention=blind)
    for index in range(trace.n_layers):
        block = LayerAttention.of(trace, index).block(0, 11)
        scale = trace.gains.query_norm[index] * trace.gains.weights.score_scale[index].abs()
        factor, distance = block.attention * scale[:, :, None], distances(trace, index)
        size = block.layer.outputs("output_factor").mean_square.sqrt().max()
        off = (block.key_response("output_factor") - factor * distance).abs()
        assert (off <= 0.01 * factor * distance + 1e-6 * factor * size).all()  # products are off by 3e-4 of the size
        assert distance.max() < 1e-4 * size


@needs_hooked
def test_the_mean_that_the_model_made_is_the_one_computed_from_rows() -> None:
    trace = small_trace()
    assert all(each.mixed is not None for each in trace.attention)
    bare = replace(trace, attention=tuple(KeptAttention(each.rows(0, 11)) for each in trace.attention))
    for kind, found in osl.profiles(trace).items():
        other = osl.profiles(bare, [kind])[kind]
        assert torch.allclose(found.log_by_layer, other.log_by_layer, rtol=1e-9, atol=1e-9)


@needs_hooked
def test_blocks_cover_all_rows_once_and_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(block_module.ENTRIES, "cpu", 4 * 11 * 3)
    buffers = Buffers()
    layer = LayerAttention.of(small_trace(), 0, buffers)
    covered, addresses = [], set()
    for block in layer.blocks():
        covered += range(block.start, block.stop)
        addresses.add(block.key_response("output_factor").data_ptr())
    assert covered == list(range(11))
    assert len(addresses) < len(list(layer.blocks()))
    taken = buffers.take("moved output_factor", (2, 2), torch.zeros(1, dtype=torch.float64))
    assert buffers.take("moved output_factor", (3,), taken).data_ptr() == taken.data_ptr()


# -- a block of edges ----------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_products_of_an_edge_block_are_those_of_its_matrix(seed: int, start: int, rows: int, plain: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = start + rows + 2

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    stop = start + rows
    factors = {} if plain else {"diagonal": draw(rows), "dest": draw(rows), "src": draw(stop)}
    edges = EdgeBlock(draw(rows, stop), start, **factors)
    matrix = edges.dense()
    if not plain:
        expected = factors["dest"][:, None] * edges.core * factors["src"]
        expected[range(rows), range(start, stop)] += factors["diagonal"]
        assert torch.allclose(matrix, expected, rtol=1e-14)
    row, column = draw(n), draw(n, 3)
    assert torch.allclose(edges.row_product(row), row[start:stop] @ matrix, rtol=1e-12)
    assert torch.allclose(edges.column_product(column), matrix @ column[:stop], rtol=1e-12)
    split = edges.by_head()  # a bare matrix counts as one head
    assert torch.equal(split.total(start), matrix)
    assert torch.allclose(edges.head_products(column[:stop]), (matrix @ column[:stop])[None], rtol=1e-12)


def test_kinds_in_one_sweep_do_not_disturb_each_other_even_where_one_underflows() -> None:
    n, faint, strong = 6, 1e-120, 0.5
    chains = [
        torch.eye(n, dtype=torch.float64) + weight * torch.diag(torch.ones(n - 1).double(), -1)
        for weight in (faint, strong)
    ]
    gains = torch.rand(4, n, dtype=torch.float64).log()

    def blocks(layer: int):
        yield from ((start, min(start + 4, n)) for start in range(0, n, 4))

    kinds = [
        PathFactors(lambda at, chain=chain: EdgeBlock(chain[slice(*at), : at[1]], at[0]), gain)
        for chain, gain in zip(chains, (None, gains), strict=True)
    ]
    both = log_path_sums(blocks, kinds, n, 4)
    for chain, kind, found in zip(chains, kinds, both, strict=True):
        alone = log_path_products(lambda layer, a, b, chain=chain: chain[a:b], n, 4, kind.log_node_gain)
        assert torch.equal(torch.isneginf(found), torch.isneginf(alone))
        assert torch.allclose(found.exp(), alone.exp(), rtol=1e-12)
    log_three_steps = 3 * math.log(faint) + math.log(math.comb(4, 3))
    assert 3 * math.log(faint) < math.log(FAINT)
    assert both[0][0, n - 4].item() == pytest.approx(log_three_steps, rel=1e-12)


# -- all kinds at once ---------------------------------------------------------------------------------------


@needs_hooked
@pytest.mark.parametrize("spec", [{}, {"parallel_attn_mlp": True}, {"dtype": torch.float32}, {"kv_heads": None}])
def test_one_sweep_gives_what_each_measure_gives_alone(spec: dict) -> None:
    trace = small_trace(8, **spec)
    found = osl.profiles(trace)
    assert tuple(found) == KINDS
    for kind, profile in found.items():
        alone = osl.mean_field_sensitivity(trace) if kind == "mean_field" else osl.path_bound(trace, kind)
        assert torch.equal(profile.log_by_layer, alone.log_by_layer)
        assert profile.notes == alone.notes
        assert profile.log_constant == alone.log_constant or math.isnan(alone.log_constant)


@needs_hooked
def test_attention_is_asked_for_each_block_but_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Watched(KeptAttention):
        def causal(self, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
            asked.append((start, stop))
            return super().causal(start, stop, out)

    trace = small_trace()
    watched = replace(trace, attention=tuple(Watched(each.pattern, each.mixed) for each in trace.attention))
    monkeypatch.setitem(block_module.ENTRIES, "cpu", 4 * 11 * 5)
    osl.profiles(watched)
    whole = [at for at in asked if at != (0, 1)]
    assert sorted(whole) == sorted(3 * [(0, 5), (5, 10), (10, 11)])


@needs_hooked
def test_beta_goes_to_the_printed_variants() -> None:
    trace = small_trace()
    found = osl.profiles(trace, ["proof", "calibrated", "proof"], beta=1.0)
    assert list(found) == ["proof", "calibrated"]
    assert torch.equal(found["proof"].log_by_layer, osl.path_bound(trace, "proof", 1.0).log_by_layer)


@needs_hooked
def test_uniform_attention_has_no_mean_to_lend() -> None:
    trace = small_trace()
    uniform = replace(trace, attention=(UniformAttention(11, 4, torch.float64),) * 3)
    assert torch.isfinite(osl.profiles(uniform, ["mean_field"])["mean_field"].log_by_layer[0]).all()


@needs_hooked
@pytest.mark.parametrize("kinds", ["proof", [], ["truth"], [3], None, 7])
def test_kinds_that_are_none_are_refused(kinds: object) -> None:
    with pytest.raises(InputError, match=r"expected (a list of|one of) mean_field, proof"):
        osl.profiles(small_trace(), kinds)


def test_what_is_no_trace_is_told_what_to_do() -> None:
    with pytest.raises(InputError, match="expected a Trace"):
        osl.profiles(object())
