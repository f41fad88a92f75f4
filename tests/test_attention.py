"""Rows made anew are those that were kept, on every route and architecture; what does not hear an edit is not taken."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from routes import compared, differences, on_route, tolerance
from safetensors.torch import load_file
from small_models import NO_BRIDGE, NO_HOOKED, bridge, has_bridge, has_hooked, hooked, tokens_for
from torch import nn
from zoo import CELLS, WINDOW, lacking, zoo

import oversquash_lens as osl
from oversquash_lens.capture import attention, fused, layer
from oversquash_lens.capture.architecture import read_architecture
from oversquash_lens.capture.attention import (
    AttentionRows,
    KeptAttention,
    RecomputedAttention,
    UniformAttention,
    recomputed_attention,
)
from oversquash_lens.capture.edits import edited_attention, window
from oversquash_lens.capture.fused import planned_route, why_not_fused
from oversquash_lens.capture.trace import FORMAT, packed
from oversquash_lens.errors import HookMismatchError, InputError, ModelError
from oversquash_lens.memory import MEMORY_VARIABLE

Model = Any
HEADS, KV_HEADS, D_HEAD, N = 4, 2, 3, 21
needs_hooked = pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)
needs_bridge = pytest.mark.skipif(not has_bridge(), reason=NO_BRIDGE)

# What the scores of an architecture may have besides q·k.
SCORES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "capped": {"soft_cap": 1.5},
    "windowed": {"window": 5},
    "biased": {"bias": torch.linspace(-2, 3, HEADS * N, dtype=torch.float64).view(HEADS, N)},
    "with sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
    "all of them": {"scale": 0.7, "soft_cap": 2.0, "window": 7, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}
EXACTNESS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}


def heads(dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(h, N, D_HEAD, generator=generator) for h in (HEADS, KV_HEADS))
    return 2 * query.to(dtype), 2 * key.to(dtype)


def softmax_of(query: torch.Tensor, key: torch.Tensor, **how: Any) -> torch.Tensor:
    """The whole pattern in float64, by torch's own softmax."""
    scores = query.double() @ key.double().repeat_interleave(HEADS // KV_HEADS, 0).mT * how.get("scale", 1.0)
    if "soft_cap" in how:
        scores = how["soft_cap"] * torch.tanh(scores / how["soft_cap"])
    if "bias" in how:
        scores = scores + how["bias"][:, None, :]
    dest, src = torch.arange(N)[:, None], torch.arange(N)
    scores = scores.masked_fill((src > dest) | (dest - src >= how.get("window", N)), -torch.inf)
    if "sinks" in how:
        scores = torch.cat([scores, how["sinks"].double()[:, None, None].expand(-1, N, 1)], -1)
    return scores.softmax(-1)[:, :, :N]


# ---------------------------------------------------------------- rows, block by block


@pytest.mark.parametrize("dtype", EXACTNESS, ids=str)
@pytest.mark.parametrize("name", SCORES)
def test_rows_made_anew_are_the_softmax(name: str, dtype: torch.dtype) -> None:
    query, key = heads(dtype)
    rows, expected = recomputed_attention(query, key, **SCORES[name]), softmax_of(query, key, **SCORES[name])
    wide = torch.promote_types(dtype, torch.float32)
    buffer = torch.full((HEADS * N * N + 7,), torch.nan, dtype=wide)  # whatever was there before
    for size in (1, 4, N):
        for start in range(0, N, size):
            stop = min(N, start + size)
            whole, block = rows.rows(start, stop), rows.causal(start, stop)
            assert (whole.dtype, block.shape) == (wide, (HEADS, stop - start, stop))
            assert (whole.double() - expected[:, start:stop]).abs().max() <= EXACTNESS[dtype]
            assert torch.equal(block, whole[:, :, :stop])
            into = rows.causal(start, stop, buffer)
            assert into.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
            assert torch.equal(into, block)
    some = torch.tensor([0, 3, N - 1])
    assert (rows.at(some).double() - expected[:, some]).abs().max() <= EXACTNESS[dtype]


def test_log_normalisers_are_the_same_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = heads(torch.float64)
    whole = recomputed_attention(query, key, window=5).log_normaliser
    monkeypatch.setattr(attention, "BLOCK", HEADS * N * 3)
    assert torch.allclose(recomputed_attention(query, key, window=5).log_normaliser, whole, atol=1e-14, rtol=0)


def test_rows_sum_to_one_and_with_a_sink_to_less() -> None:
    query, key = heads(torch.float64)
    assert torch.allclose(recomputed_attention(query, key).rows(0, N).sum(-1), torch.ones(1, dtype=torch.float64))
    sums = recomputed_attention(query, key, sinks=torch.zeros(HEADS)).rows(0, N).sum(-1)
    assert 0 < sums.min() < sums.max() < 1


def test_kept_and_uniform_rows_have_the_same_surface() -> None:
    pattern = softmax_of(*heads(torch.float32)).float()
    uniform = UniformAttention(N, HEADS, torch.float64)
    for rows in (KeptAttention(pattern), uniform, recomputed_attention(*heads(torch.float32))):
        assert isinstance(rows, AttentionRows)
        assert rows.mixed is None
        assert torch.equal(rows.causal(2, 5), rows.rows(2, 5)[:, :, :5])
        assert not rows.rows(2, 5)[:, :, 5:].any()
        with pytest.raises(InputError, match="number of positions"):
            rows.causal(5, 5)
    even = torch.ones(N, N, dtype=torch.float64).tril() / torch.arange(1, N + 1)[:, None]
    assert torch.equal(uniform.rows(0, N), even.expand(HEADS, -1, -1))


def test_a_buffer_that_does_not_fit() -> None:
    rows = recomputed_attention(*heads(torch.float32))
    for buffer in (torch.empty(HEADS * 4 - 1), torch.empty(HEADS * N * N, dtype=torch.float64)):
        with pytest.raises(InputError, match="a buffer of"):
            rows.causal(0, 2, buffer)


def test_parts_that_do_not_fit_together() -> None:
    query, key = heads(torch.float32)
    sums = torch.zeros(HEADS, N)
    wrong = {
        "keys": (query, key[:, 1:], sums),
        "log-normalisers": (query, key, sums[:, 1:]),
        "mixed values": (query, key, sums, query[:, 1:]),
        "heads to a group": (query[:3], key, sums[:3]),
    }
    for said, parts in wrong.items():
        with pytest.raises((InputError, TypeError)) as caught:  # where types are checked, that comes first
            RecomputedAttention(*parts)
        assert said in str(caught.value) or isinstance(caught.value, TypeError)


def test_turning_back_undoes_a_stretched_turn() -> None:
    x, angle = torch.randn(5, 2, 8, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    cos, sin = (1.3 * torch.cat((part, part), -1) for part in (angle.cos(), angle.sin()))
    turned = attention.halves_turned(x, cos, sin)
    assert torch.equal(turned[..., 6:], x[..., 6:])
    assert torch.allclose(turned[..., :6].norm(dim=-1), 1.3 * x[..., :6].norm(dim=-1))
    assert torch.allclose(attention.halves_turned_back(turned, cos, sin), x)


@pytest.mark.parametrize("n_heads", [1, 2, 4, 6, 12])
@needs_bridge
def test_the_bias_is_transformers_alibi(n_heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 7), n_heads, torch.float32).view(n_heads, 7)
    assert torch.allclose(attention.linear_bias(n_heads, 7, torch.zeros(1)), theirs)


# ---------------------------------------------------------------- every architecture, every route


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_every_measure_is_the_same_on_every_route(name: str, kind: str, dtype: torch.dtype) -> None:
    why = lacking(name, kind)
    if why is not None:
        pytest.skip(why)
    found = compared(name, kind, dtype)
    assert bool(found) == (name not in ("bloom-residual", "llama4"))  # not recorded at all; on one route only
    for each in found:
        assert each.why or max(each.measures.values()) <= tolerance(name, kind, dtype), (each.route, each.measures)


# Why a bridge's attention is not fused, in a word of the reason.
NOT_FUSED = {
    ("gpt2", "compatible"): "compatibility",
    ("gpt-neox", "compatible"): "compatibility",
    ("gpt-j", "bridge"): "transformers' code",
    ("falcon", "bridge"): "transformers' code",
    ("gpt-neo", "bridge"): "transformers' code",
    **{(name, "bridge"): "bias" for name in ("bloom", "bloom-residual", "mpt", "mpt-clip")},
    ("gemma2", "bridge"): "capped",
    ("gemma2", "compatible"): "capped",
    ("gpt-oss", "bridge"): "sinks",
}


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_which_architectures_are_fused(name: str, kind: str) -> None:
    why = lacking(name, kind)
    if why is not None:
        pytest.skip(why)
    model = zoo(name, kind)
    found = why_not_fused(model, read_architecture(model))
    expected = "HookedTransformer" if kind == "hooked" else NOT_FUSED.get((name, kind))
    assert (found is None) if expected is None else (expected in found)


@needs_bridge
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_made_anew_to_what_its_own_softmax_rounds(dtype: torch.dtype) -> None:
    """The model rounds scores and weights to its dtype; rows made anew do not, of the same queries and keys."""
    model, tokens = zoo("llama", "bridge", dtype=dtype), tokens_for(4, 12)
    kept = on_route(model, tokens, "kept")
    for route in ("recomputed", "fused"):
        other = on_route(model, tokens, route)
        for one, two in zip(kept.attention, other.attention, strict=True):
            assert (two.query.dtype, two.rows(0, 1).dtype, two.mixed) == (dtype, torch.float32, None)
            assert (one.rows(0, 12).float() - two.rows(0, 12)).abs().max() <= 8 * torch.finfo(dtype).eps


@needs_bridge
def test_on_a_real_model(smollm2: Model) -> None:
    tokens = smollm2.to_tokens("The quick brown fox jumps over the lazy dog. " * 8)[:, :80]
    kept = on_route(smollm2, tokens, "kept", node_probes=2)
    for route in ("recomputed", "fused"):
        other = on_route(smollm2, tokens, route, node_probes=2, verify=True)
        assert max(differences(kept, other).values()) <= 1e-4
        assert max(abs(kept.last_residuals - other.last_residuals).amax(-1) / kept.last_residuals.norm(dim=-1)) < 1e-4


# ---------------------------------------------------------------- which route is taken


@pytest.fixture
def llama() -> Model:
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    return zoo("llama", "bridge")


def kinds(trace: osl.Trace) -> set[type]:
    return {type(each) for each in trace.attention}


def test_a_bridge_is_recorded_by_fused_attention(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned_route(llama, 12) == "fused"
    osl.support(llama)  # its proof compares both
    monkeypatch.setattr(type(llama.blocks[0].attn), "forward", _never)  # the class's own attention is not run
    assert kinds(osl.record(llama, tokens_for(4, 12))) == {RecomputedAttention}


def _never(*arguments: Any, **options: Any) -> None:
    raise AssertionError("the class's own attention was run")


@needs_hooked
def test_short_prompts_keep_their_patterns_and_long_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = zoo("llama", "hooked"), tokens_for(4, 12)
    assert kinds(osl.record(model, tokens)) == {KeptAttention}
    assert kinds(osl.record(model, tokens, attention="recomputed")) == {RecomputedAttention}
    monkeypatch.setenv(MEMORY_VARIABLE, "300MB")  # enough to record, less than four times of it
    assert kinds(osl.record(model, tokens)) == {RecomputedAttention}
    assert kinds(osl.record(model, tokens, attention="kept")) == {KeptAttention}


@needs_hooked
def test_what_cannot_be_recomputed_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = zoo("gpt2", "hooked"), tokens_for(4, 12)
    monkeypatch.setattr("oversquash_lens.capture.architecture.rotation", lambda model, hooks: "unknown")
    monkeypatch.setenv(MEMORY_VARIABLE, "300MB")
    assert kinds(osl.record(model, tokens)) == {KeptAttention}
    with pytest.raises(ModelError, match="expected a model that shows it"):
        osl.record(model, tokens, attention="recomputed")


@pytest.mark.parametrize("asked", ["fused", "", "Kept"], ids=repr)
def test_an_attention_that_there_is_not(asked: str, fresh: tuple[Model, torch.Tensor]) -> None:
    with pytest.raises(InputError, match="expected one of 'auto', 'kept', 'recomputed'"):
        osl.record(*fresh, attention=asked)


def test_the_pass_of_somebody_else_is_kept_or_recomputed(fresh: tuple[Model, torch.Tensor]) -> None:
    model, tokens = fresh
    for asked, kind in ((None, KeptAttention), ("kept", KeptAttention), ("recomputed", RecomputedAttention)):
        with osl.recording(model, **({} if asked is None else {"attention": asked})) as recorder, torch.no_grad():
            model(tokens)
        assert kinds(recorder.trace()) == {kind}
    with (
        pytest.raises(InputError, match="expected one of 'kept', 'recomputed'"),
        osl.recording(model, attention="auto"),
    ):
        pass


@pytest.mark.parametrize("name", ["attn.hook_pattern", "attn.hook_attn_scores", "attn.hook_z", "attn.hook_v"])
def test_somebodys_hook_inside_attention_is_heard(name: str, fresh: tuple[Model, torch.Tensor]) -> None:
    model, tokens = fresh
    model.add_hook(f"blocks.1.{name}", lambda value, hook=None: None)
    assert planned_route(model, 6) == "kept"
    assert kinds(osl.record(model, tokens)) == {KeptAttention}
    with pytest.raises(InputError, match=r"a hook of yours on blocks\.1\.attn"):
        osl.record(model, tokens, attention="recomputed")
    with pytest.raises(InputError, match="hook of yours"), osl.recording(model, attention="recomputed"):
        pass
    model.reset_hooks()
    assert kinds(osl.record(model, tokens, attention="recomputed")) == {RecomputedAttention}


def test_an_edit_of_the_attention_is_heard(fresh: tuple[Model, torch.Tensor]) -> None:
    model, tokens = fresh
    with edited_attention(model, window(2)):
        trace = osl.record(model, tokens)
    dest, src = torch.arange(6)[:, None], torch.arange(6)
    for rows in trace.attention:
        assert not rows.rows(0, 6)[:, dest - src >= 2].any()
    plain = osl.record(model, tokens)
    assert plain.attention[0].rows(0, 6)[:, dest - src >= 2].any() or plain.attention[0].n_positions < 3


def test_hooks_outside_attention_are_heard_on_the_fused_route(llama: Model) -> None:
    """An edit of the residual stream changes the recording as it changes the model."""
    tokens = tokens_for(4, 12)
    llama.add_hook("blocks.0.hook_resid_pre", lambda value, hook=None: 1.7 * value)
    assert planned_route(llama, 12) == "fused"
    kept, own = on_route(llama, tokens, "kept"), osl.record(llama, tokens, node_probes=None)
    assert max(differences(kept, own).values()) < 1e-5


# ---------------------------------------------------------------- what is left out of a pass of our own


def test_only_the_last_position_is_unembedded(fresh: tuple[Model, torch.Tensor]) -> None:
    model, tokens = fresh
    osl.support(model)  # what is proven once is proven on every position
    inner = getattr(model.unembed, "original_component", model.unembed)
    sizes: list[int] = []
    inner.forward = _counted(inner.forward, sizes)
    for attention_ in ("kept", "recomputed"):
        osl.record(model, tokens, attention=attention_)
    assert sizes == [1, 1]
    with osl.recording(model), torch.no_grad():
        assert model(tokens).shape[1] == 6
    osl.record(model, tokens, verify=True)
    assert set(sizes[2:]) == {6}


def _counted(forward: Callable, sizes: list[int]) -> Callable:
    def counted(*arguments: Any, **options: Any) -> Any:
        logits = forward(*arguments, **options)
        sizes.append(logits.shape[1])
        return logits

    return counted


def test_who_listens_to_the_unembedding_hears_every_position(fresh: tuple[Model, torch.Tensor]) -> None:
    model, tokens = fresh
    heard = []
    model.add_hook("unembed.hook_in", lambda y, hook=None: heard.append(y.shape[1]))
    osl.record(model, tokens)
    assert heard == [8, 8, 6]  # twice by the proof that this hook leaves the model a fixed function


# ---------------------------------------------------------------- nothing that grows as pos² stays


@pytest.mark.parametrize("route", ["recomputed", "fused"])
@needs_bridge
def test_no_square_is_alive_after_a_recording(route: str) -> None:
    n = 15  # no other size of the model
    model, tokens = zoo("llama", "bridge"), tokens_for(4, n)
    model(tokens)
    before = squares(n)
    trace = on_route(model, tokens, route)
    assert squares(n) == before
    for each in trace.attention:
        for part in (each.query, each.key, each.log_normaliser, each.mixed):
            assert part.untyped_storage().nbytes() == part.numel() * part.itemsize  # no view that pins more


def squares(n: int) -> int:
    gc.collect()
    alive = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
    return sum(each.untyped_storage().nbytes() >= n * n * 4 and tuple(each.shape[-2:]) == (n, n) for each in alive)


@needs_bridge
def test_no_square_is_made_by_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch is asked to allocate, operator by operator."""
    from torch.utils._python_dispatch import TorchDispatchMode

    n, made = 15, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend(
                tuple(each.shape)
                for each in (out if isinstance(out, tuple) else (out,))
                if isinstance(each, torch.Tensor)
            )
            return out

    model, tokens = zoo("llama", "bridge"), tokens_for(4, n)
    monkeypatch.setattr("oversquash_lens.capture.checks.ROWS", 2)
    with Watch():
        on_route(model, tokens, "fused", node_probes=2)
    assert len(made) > 100
    assert not [shape for shape in made if shape[-2:] == (n, n) and len(shape) > 2]


# ---------------------------------------------------------------- sabotage


def caught(model: Model, route: str, *said: str, **how: Any) -> None:
    with pytest.raises(HookMismatchError) as found:
        on_route(model, tokens_for(5, 12), route, **how)
    assert all(word in str(found.value) for word in said), str(found.value)


def sabotaged() -> Iterator[Any]:
    for name in ("llama", "gpt-neox"):
        for kind in ("bridge", "hooked"):
            if lacking(name, kind) is None:
                yield pytest.param(name, kind, id=f"{name}-{kind}")


@pytest.mark.parametrize(("name", "kind"), list(sabotaged()))
def test_a_wrong_scale_is_caught(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo(name, kind)
    monkeypatch.setattr("oversquash_lens.capture.architecture.score_factor", lambda model: 1.05)
    caught(model, "recomputed", "layer 0", "differs from")


@pytest.mark.parametrize(("name", "kind"), list(sabotaged()))
def test_a_scale_that_the_weights_do_not_tell_is_caught(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo(name, kind)
    monkeypatch.setattr("oversquash_lens.capture.weights._score_scale", lambda attn: 0.55)
    for route in ("recomputed", "fused") if kind == "bridge" else ("recomputed",):
        caught(model, route, "layer 0")


@needs_bridge
@pytest.mark.parametrize("name", ["gpt-neox", "phi3", "falcon", "gpt-j"])
def test_a_wrong_turn_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the rotation is ours: the other way round, it is not the model's."""
    halves, pairs = attention.halves_turned, attention.pairs_turned
    monkeypatch.setattr(layer, "halves_turned", lambda x, cos, sin: halves(x, cos, -sin))
    monkeypatch.setattr(layer, "pairs_turned", lambda x, dim: pairs(x.flip(-1), dim))
    caught(zoo(name, "bridge"), "recomputed", "layer 0", "attn.hook_pattern")


@pytest.mark.parametrize(("name", "kind"), list(sabotaged()))
def test_a_pattern_edited_beneath_the_hooks_is_caught(name: str, kind: str) -> None:
    """By torch's own hook, which nobody's list of hooks shows; `auto` then keeps the pattern that was used."""
    model = zoo(name, kind)
    point = model.hook_dict["blocks.1.attn.hook_pattern"]
    point.register_forward_hook(lambda module, inputs, pattern: pattern.flip(1))
    caught(model, "recomputed", "layer 1, attn.hook_pattern", "softmax")
    assert planned_route(model, 12) == "kept"
    assert kinds(osl.record(model, tokens_for(5, 12))) == {KeptAttention}


@needs_bridge
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fused_attention_that_computes_something_else_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the proof of a model, and by the recording itself where the proof was made before."""
    proven, model, attend = zoo(name, "bridge"), zoo(name, "bridge"), fused._attend
    osl.support(proven)

    def other(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any
    ) -> Any:
        mixed, none = attend(module, query, key, value, *rest, **options)
        return mixed * 1.1, none

    monkeypatch.setattr(fused, "_attend", other)
    caught(proven, "fused", "layer 0")
    with pytest.raises(ModelError, match="computes another function than the fused pass"):
        osl.record(model, tokens_for(4, 6))


@needs_bridge
def test_a_log_normaliser_that_is_off_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    output = fused._Listener.output
    monkeypatch.setattr(fused._Listener, "output", lambda self, z, sums: output(self, z, sums + 0.05))
    caught(zoo("llama", "bridge"), "fused", "layer 0, attn.hook_z", "pattern · v")


def test_a_hook_that_fires_twice_is_caught(fresh: tuple[Model, torch.Tensor]) -> None:
    model, _ = fresh
    twice = model.hook_dict["blocks.1.mlp.hook_post"]
    calls = type(twice).__call__
    twice.__class__ = type("Echo", (type(twice),), {"__call__": lambda self, value: calls(self, calls(self, value))})
    for route in ("recomputed", "fused") if why_not_fused(model, read_architecture(model)) is None else ("recomputed",):
        caught(model, route, "layer 1, mlp.hook_post", "second time")


def test_auto_falls_back_to_what_the_hooks_show(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    osl.support(llama)  # proven while it is right
    monkeypatch.setattr("oversquash_lens.capture.fused._CPU_KERNEL", "none")
    monkeypatch.setattr(fused.functional, "scaled_dot_product_attention", lambda query, *rest, **options: query)
    assert kinds(osl.record(llama, tokens_for(4, 12))) == {KeptAttention}
    with pytest.raises(HookMismatchError, match="pattern · v"):
        osl.record(llama, tokens_for(4, 12), attention="recomputed")


def test_without_the_kernel_sums_are_our_own(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokens_for(4, 12)
    before = on_route(llama, tokens, "fused")
    monkeypatch.setattr("oversquash_lens.capture.fused._CPU_KERNEL", "none")
    assert max(differences(before, on_route(llama, tokens, "fused")).values()) < 1e-9


# ---------------------------------------------------------------- the model is left as it was


class InterruptedPassError(Exception):
    pass


@needs_bridge
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("where", ["before", "inside", "never"])
def test_the_model_is_left_as_it_was(name: str, where: str, count_hooks: Callable, monkeypatch: Any) -> None:
    model, tokens = zoo(name, "bridge"), tokens_for(4, 12)
    osl.support(model)  # proven: what is interrupted is the recording
    logits, hooks = model(tokens), count_hooks(model)
    implementation = model.original_model.config._attn_implementation
    attend, calls = fused._attend, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if where == "inside" and len(calls) == 2:
            raise InterruptedPassError
        return attend(*arguments, **options)

    monkeypatch.setattr(fused, "_attend", interrupted)
    if where == "before":
        monkeypatch.setattr("oversquash_lens.capture.recorder.last_logits_only", _interrupt)
    if where == "never":
        osl.record(model, tokens)
    else:
        expected = ModelError if where == "inside" else InterruptedPassError  # what the model itself raises is told
        with pytest.raises(expected) as raised:
            osl.record(model, tokens)
        assert InterruptedPassError in (type(raised.value), type(raised.value.__cause__))
    assert model.original_model.config._attn_implementation == implementation
    for block in model.blocks:
        assert "forward" not in block.attn.__dict__
        assert fused.NAME not in block.attn.original_component.__dict__
    assert count_hooks(model) == hooks
    assert torch.equal(model(tokens), logits)


def _interrupt(*arguments: Any) -> None:
    raise InterruptedPassError


# ---------------------------------------------------------------- on disk


@pytest.mark.parametrize(
    "cell", [("llama", "bridge"), ("gemma2", "hooked"), ("bloom", "bridge"), ("gpt-oss", "bridge")]
)
def test_rows_made_anew_come_back_from_disk(cell: tuple[str, str], tmp_path: Path) -> None:
    why = lacking(*cell)
    if why is not None:
        pytest.skip(why)
    trace = on_route(zoo(*cell), tokens_for(4, 12), "recomputed")
    again = osl.Trace.load(trace.save(tmp_path / "t.safetensors"))
    assert kinds(again) == {RecomputedAttention}
    for one, two in zip(trace.attention, again.attention, strict=True):
        assert (one.scale, one.soft_cap, one.window) == (two.scale, two.soft_cap, two.window)
        assert torch.equal(one.rows(0, 12), two.rows(0, 12))
        assert torch.equal(one.mixed, two.mixed)
    assert max(differences(trace, again).values()) == 0


def header_of(path: Path) -> dict:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()[FORMAT])


@pytest.mark.parametrize("number", ["'3'", [], {"a": 1}], ids=repr)
def test_a_header_that_holds_no_number(number: Any, llama: Model, tmp_path: Path) -> None:
    path = osl.record(llama, tokens_for(4, 12)).save(tmp_path / "t.safetensors")
    header = header_of(path)
    header["attention"][0]["scale"] = number
    path.write_bytes(packed(header, load_file(path)))  # with a checksum that is right
    with pytest.raises(osl.OversquashError, match="lacks a part of a trace"):
        osl.Trace.load(path)


@needs_hooked
def test_windows_are_where_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose window is not seen would look further back than the model does: caught where it is as wide."""
    model, tokens = zoo("mistral-window", "hooked"), tokens_for(4, 12)
    assert read_architecture(model).windows == (WINDOW, WINDOW)
    monkeypatch.setattr("oversquash_lens.capture.architecture.window", lambda model, layer: None)
    with pytest.raises(HookMismatchError, match="softmax"):
        on_route(model, tokens, "recomputed")


def test_the_hook_points_of_a_fresh_model_are_nobodys(fresh: tuple[Model, torch.Tensor]) -> None:
    """What TransformerLens installs for itself at a first pass is not taken for a hook of the user's."""
    model, tokens = fresh
    expected = "kept" if isinstance(model, nn.Module) and not hasattr(model, "original_model") else "fused"
    assert planned_route(model, 6) == expected
    osl.record(model, tokens)
    assert planned_route(model, 6) == expected


def test_small_models_have_both_kinds_of_rows() -> None:
    """Without a cell of the zoo: the smallest models of both classes."""
    made = [hooked(3)] if has_hooked() else []
    made += [bridge(3, "gpt2")] if has_bridge() else []
    for model in made:
        kept, other = (osl.record(model, tokens_for(1, 6), attention=each) for each in ("kept", "recomputed"))
        assert max(differences(kept, other).values()) <= 1e-5
