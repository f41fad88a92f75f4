"""collapse_curve(): every number against the model's own passes, kept whole and compared by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import NO_BRIDGE, NO_HOOKED, bridge, has_bridge, has_hooked, hooked
from small_readers import Reader
from small_results import about
from zoo import each, zoo

import oversquash_lens as osl
from oversquash_lens.collapse import families
from oversquash_lens.collapse.curve import CollapseCurve, collapse_curve
from oversquash_lens.collapse.families import Family, as_family, repeats_last
from oversquash_lens.collapse.precision import computing_in, number_format
from oversquash_lens.errors import HookMismatchError, InputError

Model = Any
Watch = Callable[..., dict[str, torch.Tensor]]
LEAD = (11, 12, 13, 14, 15)
LENGTHS = (1, 2, 4, 7)
CURVES = ("l1", "l2", "linf", "relative", "logits", "margin_shift")


def ones(k: int) -> list[int]:
    return [*LEAD, *[7] * k]


def turning(k: int) -> tuple[list[int], list[int]]:
    """Digits that change with k, then one 7 against two: every length leaves the longest one's way."""
    return [*LEAD, *range(20, 20 + k), 7], [*LEAD, *range(20, 20 + k), 7, 7]


def made(name: str) -> Model:
    if name == "hooked":
        if not has_hooked():
            pytest.skip(NO_HOOKED)
        return hooked(3, n_heads=4, kv_heads=2, d_model=16, norm="RMS", gated=True, act="silu", positions="rotary")
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    return bridge(4, name)


def passes(model: Model, ids: list[int], watch: Watch) -> dict[str, torch.Tensor]:
    """One prompt's whole pass: residual streams, y, z of the last layer, logits, every pattern."""
    layers = range(len(model.blocks))
    residuals = [*(f"blocks.{i}.hook_resid_pre" for i in layers), f"blocks.{layers[-1]}.hook_resid_post"]
    patterns = [f"blocks.{i}.attn.hook_pattern" for i in layers]
    z = f"blocks.{layers[-1]}.attn.hook_z"
    tokens = torch.tensor([ids])
    seen = watch(model, tokens, *residuals, *patterns, z, "unembed.hook_in")
    with torch.no_grad():
        logits = model(tokens)[0, -1]
    return {
        "residuals": torch.stack([seen[name][0, -1] for name in residuals]),
        "y": seen["unembed.hook_in"][0, -1],
        "z": seen[z][0, -1],
        "logits": logits,
        "patterns": torch.stack([seen[name][0] for name in patterns]),
    }


def by_hand(model: Model, pair: tuple[list[int], list[int]], spec: str, watch: Watch) -> dict[str, Any]:
    """Everything that a curve says of one pair, number by number, from two passes of their own."""
    fmt = number_format(spec)
    with computing_in(model, fmt):
        a, b = (passes(model, ids, watch) for ids in pair)

    def kept(value: torch.Tensor) -> torch.Tensor:
        return value.double() if fmt.storage is None else value.to(getattr(torch, fmt.storage)).double()

    change = kept(a["y"]) - kept(b["y"])
    shift, own = [], []
    layers = zip(a["patterns"].double(), b["patterns"].double(), strict=True) if repeats_last(*map(tuple, pair)) else ()
    for one, other in layers:
        before = torch.cat([one[:, -1], torch.zeros(len(one), 1)], dim=1)
        shift.append((other[:, -1] - before).abs().sum().item() / len(one))
        own.append(other[:, -1, -1].mean().item())
    z = zip(kept(a["z"]).tolist(), kept(b["z"]).tolist(), strict=True)
    heads = [max(abs(p - q) for p, q in zip(one, other, strict=True)) for one, other in z]
    margins = []
    for one in (a, b):
        best, second = one["logits"].double().topk(2).values.tolist()
        margins.append(best - second)
    best = a["logits"].double().max().item()
    return {
        "l1": sum(map(abs, change.tolist())),
        "l2": math.sqrt(sum(x * x for x in change.tolist())),
        "linf": max(map(abs, change.tolist())),
        "relative": change.norm().item() / kept(a["y"]).norm().item(),
        "per_head": heads,
        "by_layer": [
            ((kept(p) - kept(q)).norm() / kept(p).norm()).item()
            for p, q in zip(a["residuals"], b["residuals"], strict=True)
        ],
        "bit_equal": torch.equal(kept(a["y"]), kept(b["y"])),
        **({"attention_shift": shift, "self_attention": own} if shift else {}),
        # Of what was stored in another format the logits are not the pass's own.
        **({} if fmt.storage else {
            "logits": (a["logits"].double() - b["logits"].double()).abs().max().item(),
            "top1_agree": int(a["logits"].argmax()) == int(b["logits"].argmax()),
            "margin_shift": abs(margins[0] - margins[1]) / (fmt.epsilon * abs(best)),
        }),
    }  # fmt: skip


def agree(curve: CollapseCurve, name: str, at: int, truth: dict[str, Any], tolerance: float) -> None:
    for key, expected in truth.items():
        values = getattr(curve, key)[name]
        found = values[at] if key in (*CURVES, "per_head", "bit_equal", "top1_agree") else values[:, at]
        if isinstance(expected, bool):
            assert bool(found) is expected, key
            continue
        if key == "margin_shift":  # a difference of differences of logits, in roundings
            assert found.item() == pytest.approx(expected, rel=1e-3, abs=100 * tolerance / number_format(name).epsilon)
            continue
        expected = torch.tensor(expected, dtype=torch.float64)
        assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()), key


# ---------------------------------------------------------------- against passes of their own


@each("gemma2", "granite", "llama")
def test_logits_are_capped_and_scaled_as_the_model_does(family: str, kind: str) -> None:
    model = zoo(family, kind)
    curve = collapse_curve(model, ones, LENGTHS, ("float32",))
    for at, length in enumerate(curve.lengths):
        first, second = (model(torch.tensor([list(ones(k))]))[0, -1].double() for k in (length, length + 1))
        shift = (first - second).abs().max().item()
        assert curve.logits["float32"][at].item() == pytest.approx(shift, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["hooked", "gpt2", "llama"])
@pytest.mark.parametrize("family", [as_family(ones), Family("turning", turning)], ids=["chain", "branches"])
@pytest.mark.parametrize("share", [True, False])
def test_every_number_is_what_two_whole_passes_give(name: str, family: Family, share: bool, watch: Watch) -> None:
    model = made(name)
    curve = collapse_curve(model, family, LENGTHS, ("float64", "float32"), share=share)
    assert curve.covered.all()
    assert not any("cache" in note for note in curve.notes)
    exact = 2e-6 if name == "llama" else 1e-11  # a bridge's Llama computes norms and softmax in float32
    for at, k in enumerate(LENGTHS):
        pair = tuple(list(ids) for ids in family.pair(k))
        agree(curve, "float64", at, by_hand(model, pair, "float64", watch), exact)
        agree(curve, "float32", at, by_hand(model, pair, "float32", watch), 1e-4)


def test_logits_go_through_a_few_pairs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs that overlap, in any order of their prompts, over the edges of the pieces."""
    model, family = made("gpt2"), as_family(lambda k: ones(8 - k), step=1)
    whole = collapse_curve(model, family, range(1, 7), ("float64",))
    monkeypatch.setattr("oversquash_lens.collapse.pairs.LOGITS", 2)
    pieces = collapse_curve(model, family, range(1, 7), ("float64",))
    for key in ("logits", "margin_shift"):
        assert torch.allclose(getattr(whole, key)["float64"], getattr(pieces, key)["float64"], rtol=1e-6), key
    assert torch.equal(whole.top1_agree["float64"], pieces.top1_agree["float64"])
    assert not whole.covered.any(), "here the second prompt is the shorter one"


@pytest.mark.parametrize("name", ["hooked", "gpt2"])
def test_distances_are_those_of_recorded_traces(name: str) -> None:
    model = made(name)
    curve = collapse_curve(model, ones, LENGTHS, ("float64",))
    for at, k in enumerate(LENGTHS):
        one, other = osl.record(model, ones(k)), osl.record(model, ones(k + 1))
        change = one.prediction_input - other.prediction_input
        assert curve.l1["float64"][at].item() == pytest.approx(change.abs().sum().item(), rel=1e-9)
        assert curve.linf["float64"][at].item() == pytest.approx(change.abs().max().item(), rel=1e-9)
        for layer in range(one.n_layers):
            last = other.attention[layer].rows(len(LEAD) + k, len(LEAD) + k + 1)[:, 0].double()
            before = one.attention[layer].rows(len(LEAD) + k - 1, len(LEAD) + k)[:, 0].double()
            moved = (last[:, :-1] - before).abs().sum(1) + last[:, -1]
            assert curve.attention_shift["float64"][layer, at].item() == pytest.approx(moved.mean().item(), rel=1e-9)
            assert curve.self_attention["float64"][layer, at].item() == pytest.approx(
                last[:, -1].mean().item(), rel=1e-9
            )


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_a_storage_format_rounds_what_a_wider_one_computes(storage: str, watch: Watch) -> None:
    """Computed once; each storage rounds the same y, heads and residuals, and leaves the patterns alone."""
    model = made("gpt2")
    spec = f"float64:store={storage.removesuffix('fn')}"
    curve = collapse_curve(model, ones, LENGTHS, ("float64", spec, f"float64:store={storage.removesuffix('fn')}"))
    assert [one.name for one in curve.formats] == ["float64", spec]
    for at, k in enumerate(LENGTHS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, storage.removesuffix("fn"), getattr(torch, storage), raising=False)
            truth = by_hand(model, (ones(k), ones(k + 1)), spec, watch)
        agree(curve, spec, at, truth, 1e-12)
    assert torch.equal(curve.attention_shift[spec], curve.attention_shift["float64"])


def test_storing_is_not_computing() -> None:
    """bfloat16 that computes rounds after every step, bfloat16 that stores rounds once: two curves, none exact."""
    model = made("gpt2")
    curve = collapse_curve(model, ones, LENGTHS, ("float32", "bfloat16", "float32:store=bfloat16"))
    assert list(curve.l1) == ["float32", "bfloat16", "float32:store=bfloat16"]
    stored, computed = curve.l1["float32:store=bfloat16"], curve.l1["bfloat16"]
    assert not torch.equal(stored, computed)
    assert not torch.equal(stored, curve.l1["float32"])
    assert torch.equal(curve.self_attention["float32:store=bfloat16"], curve.self_attention["float32"])
    assert not torch.equal(curve.self_attention["bfloat16"], curve.self_attention["float32"])
    # Rounding both y by half a spacing moves their L1 by no more than that; float32 itself by far less.
    size = {k: osl.record(model, ones(k)).prediction_input.abs().sum() for n in LENGTHS for k in (n, n + 1)}
    bound = 1.01 * torch.stack([size[k] + size[k + 1] for k in LENGTHS]) * number_format("bfloat16").epsilon / 2
    assert ((stored - curve.l1["float32"]).abs() <= bound).all()


def test_quantised_weights_are_another_model_s(watch: Watch) -> None:
    model = made("llama")
    curve = collapse_curve(model, ones, LENGTHS, ("float32", "float32:weights=int8"))
    for at, k in enumerate(LENGTHS):
        truth = by_hand(model, (ones(k), ones(k + 1)), "float32:weights=int8", watch)
        agree(curve, "float32:weights=int8", at, truth, 1e-4)
    assert not torch.allclose(curve.l1["float32"], curve.l1["float32:weights=int8"], rtol=1e-4)


@pytest.mark.parametrize("name", ["hooked", "gpt2", "llama"])
def test_the_model_is_as_it_was(name: str, count_hooks: Callable[[Any], int]) -> None:
    model = made(name)
    tokens = torch.tensor([ones(3)])
    with torch.no_grad():
        before, hooks = model(tokens), count_hooks(model)
        curve = collapse_curve(model, ones, LENGTHS, ("bfloat16", "float16:weights=int4"), noise_floor=True)
        assert torch.equal(model(tokens), before)
    assert count_hooks(model) == hooks
    assert curve.about.dtype == "float64", "what the model itself is; the formats say what computed"


def test_the_noise_floor_is_the_same_prompt_in_another_batch(watch: Watch) -> None:
    model = made("gpt2").to(torch.float32)
    curve = collapse_curve(model, Family("turning", turning), (1, 2, 3, 4, 5, 6, 7), ("float32",), noise_floor=True)
    for at in range(7):
        ids = turning(at + 1)[0]
        y = watch(model, torch.tensor([ids, ids]), "unembed.hook_in")["unembed.hook_in"][0, -1].double()
        floor = curve.noise_floor["float32"][at].item()
        assert floor <= 1000 * number_format("float32").epsilon * y.abs().sum().item()
        assert floor < 1e-3 * curve.l1["float32"][at].item()
        assert curve.head_floor["float32"][at].item() < 1e-3 * curve.per_head["float32"][at].mean().item()
    without = collapse_curve(model, ones, LENGTHS, ("float32",))
    assert without.noise_floor["float32"].isnan().all()
    assert without.head_floor["float32"].isnan().all()


def test_the_noise_floor_sees_what_batches_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose heads are a quarter larger in a batch of two: the floor says so, rounded as what is stored is."""
    model = made("gpt2")

    def batched(z: torch.Tensor, hook: Any) -> torch.Tensor:
        return 1.25 * z if z.shape[0] == 2 else z

    model.hook_dict["blocks.1.attn.hook_z"].add_hook(batched)
    curve = collapse_curve(model, ones, LENGTHS, ("float64", "float64:store=float8_e4m3"), noise_floor=True)
    plain = osl.record(model, ones(LENGTHS[0]))
    with torch.no_grad():
        seen: dict[str, torch.Tensor] = {}
        model.run_with_hooks(
            torch.tensor([ones(1)] * 2),
            fwd_hooks=[
                ("unembed.hook_in", lambda value, hook: seen.update(y=value[0, -1])),
                ("blocks.1.attn.hook_z", lambda value, hook: seen.update(z=value[0, -1])),
            ],
        )
    moved = (seen["y"] - plain.prediction_input).abs().sum().item()
    assert curve.noise_floor["float64"][0].item() == pytest.approx(moved, rel=1e-9)
    assert curve.head_floor["float64"][0].item() == pytest.approx((seen["z"] / 5).abs().amax(1).mean().item(), rel=1e-9)
    rounded = [value.to(torch.float8_e4m3fn).double() for value in (seen["y"], plain.prediction_input)]
    stored = curve.noise_floor["float64:store=float8_e4m3"][0].item()
    assert stored == pytest.approx((rounded[0] - rounded[1]).abs().sum().item(), rel=1e-9)


def test_the_floor_is_measured_at_a_few_lengths_of_many() -> None:
    curve = collapse_curve(made("gpt2"), ones, range(1, 11), ("float32",), noise_floor=True)
    measured = (~curve.noise_floor["float32"].isnan()).nonzero()[:, 0].tolist()
    assert len(measured) == 9
    assert measured[0] == 0
    assert measured[-1] == 9


def test_some_lengths_of_a_curve_are_that_curve_there() -> None:
    whole = collapse_curve(made("gpt2"), ones, range(1, 11), ("float64",), noise_floor=(2, 9))
    few = whole.at((2, 5, 9))
    assert few.lengths == (2, 5, 9)
    for key, curve in vars(few).items():
        if isinstance(curve, dict):
            (mine,), (all_of_it,) = curve.values(), getattr(whole, key).values()
            layered = key in ("by_layer", "attention_shift", "self_attention")
            columns = (all_of_it[:, k - 1] if layered else all_of_it[k - 1] for k in few.lengths)
            expected = torch.stack(list(columns), dim=1 if layered else 0)
            assert torch.equal(mine.nan_to_num(-1.0), expected.nan_to_num(-1.0)), key
    assert few.covered.tolist() == [whole.covered[k - 1] for k in few.lengths]
    assert (~few.noise_floor["float64"].isnan()).tolist() == [True, False, True]


def test_lengths_that_a_curve_has_not_are_refused() -> None:
    with pytest.raises(InputError, match=r"got lengths \[11\]"):
        collapse_curve(made("gpt2"), ones, range(1, 11), ("float64",), noise_floor=(11, 2))
    with pytest.raises(InputError, match=r"got lengths \[3\]"):
        collapse_curve(made("gpt2"), ones, (1, 2), ("float64",)).at((1, 3))


def test_folded_weights_give_the_same_distances() -> None:
    """Folding moves the final gain into the unembedding; where the embedding is tied it is known, and y has it back."""
    if not has_hooked():
        pytest.skip(NO_HOOKED)
    plain, folded = (hooked(5, norm="RMS", act="silu", gated=True, positions="rotary") for _ in range(2))
    for model in (plain, folded):
        with torch.no_grad():
            model.unembed.W_U.copy_(model.embed.W_E.T)
            model.unembed.b_U.zero_()
    folded.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    one, other = (collapse_curve(model, ones, LENGTHS, ("float64", "float32")) for model in (plain, folded))
    assert (other.about.folded, other.about.final_gain) == (True, "restored")
    for key in ("l1", "relative", "logits"):
        assert torch.allclose(getattr(one, key)["float64"], getattr(other, key)["float64"], rtol=1e-4), key
        assert torch.allclose(getattr(one, key)["float32"], getattr(other, key)["float32"], rtol=1e-3), key


# ---------------------------------------------------------------- the family


def test_a_function_is_paired_with_itself_one_further_on(watch: Watch) -> None:
    model = made("gpt2")
    mine = collapse_curve(model, ones, LENGTHS, ("float64",))
    assert mine.family == "ones"
    tensors = collapse_curve(model, lambda k: torch.tensor([ones(k)]), LENGTHS, ("float64",))
    assert torch.equal(mine.l1["float64"], tensors.l1["float64"])
    by_three = collapse_curve(model, as_family(ones, step=3), LENGTHS, ("float64",))
    agree(by_three, "float64", 2, {"l1": by_hand(model, (ones(4), ones(7)), "float64", watch)["l1"]}, 1e-11)
    assert not by_three.covered.any()


def test_a_pair_of_one_s_own(watch: Watch) -> None:
    model = made("gpt2")
    first, second = [3, 4, 5, 6], [9, 8, 7]
    curve = collapse_curve(model, (first, second), (1,), ("float64",))
    truth = by_hand(model, (first, second), "float64", watch)
    agree(curve, "float64", 0, {key: truth[key] for key in ("l1", "relative", "per_head", "by_layer")}, 1e-11)
    assert not curve.covered.any()
    assert curve.attention_shift["float64"].isnan().all()
    assert any("1 of 1 pairs are outside Theorem B.3" in note for note in curve.notes)


def test_only_pairs_that_repeat_their_last_token_are_covered() -> None:
    assert repeats_last((1, 2), (1, 2, 2))
    assert not repeats_last((1, 2), (1, 2, 3))
    assert not repeats_last((1, 2), (1, 2, 2, 2))
    assert not repeats_last((1, 2, 2), (1, 2))

    def sometimes(k: int) -> tuple[list[int], list[int]]:
        return ones(k), [*ones(k), 7 if k % 2 else 8]

    curve = collapse_curve(made("gpt2"), Family("sometimes", sometimes), (1, 2, 3), ("float64",))
    assert curve.covered.tolist() == [True, False, True]
    assert curve.attention_shift["float64"].isnan().any(0).tolist() == [False, True, False]
    assert curve.self_attention["float64"].isnan().any(0).tolist() == [False, True, False]
    assert curve.notes == (
        "1 of 3 pairs are outside Theorem B.3: their second prompt is not the first with its last token repeated",
    )


def test_a_second_prompt_that_two_pairs_share_is_compared_for_the_one_that_repeats() -> None:
    """(…7, 7) is once its partner with the last token repeated, and once some other prompt."""

    def pair(k: int) -> tuple[list[int], list[int]]:
        return ([*LEAD, 7] if k == 1 else [*LEAD, 9]), [*LEAD, 7, 7]

    curve = collapse_curve(made("gpt2"), Family("shared second", pair), (1, 2), ("float64",))
    assert curve.covered.tolist() == [True, False]
    assert curve.attention_shift["float64"].isnan().any(0).tolist() == [False, True]


def test_a_model_whose_cache_cannot_be_used_says_so() -> None:
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    model = zoo("bloom", "bridge", 3)
    shared = collapse_curve(model, Family("turning", turning), LENGTHS, ("float64",))
    alone = collapse_curve(model, Family("turning", turning), LENGTHS, ("float64",), share=False)
    assert [note for note in shared.notes if "run whole" in note]
    assert alone.notes == ()
    assert torch.allclose(shared.l1["float64"], alone.l1["float64"], rtol=1e-5)
    assert torch.allclose(shared.attention_shift["float64"], alone.attention_shift["float64"], rtol=1e-5)


@pytest.mark.parametrize("name", ["gemma", "gpt2", "qwen2", "mistral"])
def test_every_architecture_of_a_hub_goes_through(name: str) -> None:
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    model = bridge(6, name, dtype=torch.float32) if name == "gpt2" else zoo(name, "bridge", 6, dtype=torch.float32)
    curve = collapse_curve(model, ones, LENGTHS, noise_floor=True)
    assert list(curve.l1) == ["float32", "bfloat16"]
    for key in ("l1", "l2", "linf", "relative", "per_head", "by_layer", "logits", "attention_shift", "self_attention"):
        for values in getattr(curve, key).values():
            assert torch.isfinite(values).all(), key
    # What a format computes is the exact number up to its roundings; seen are 12 and, of y's own size, 0.4 epsilons.
    exact = collapse_curve(model, ones, LENGTHS, ("float64",))
    size = {k: osl.record(model, ones(k)).prediction_input.abs().sum() for n in LENGTHS for k in (n, n + 1)}
    sizes = torch.stack([size[k] + size[k + 1] for k in LENGTHS]).double()
    few, half = (number_format(name).epsilon for name in ("float32", "bfloat16"))
    assert torch.allclose(curve.l1["float32"], exact.l1["float64"], rtol=1000 * few)
    assert torch.allclose(curve.self_attention["float32"], exact.self_attention["float64"], atol=1000 * few)
    assert ((curve.l1["bfloat16"] - exact.l1["float64"]).abs() <= 4 * half * sizes).all()
    assert torch.allclose(curve.self_attention["bfloat16"], exact.self_attention["float64"], atol=8 * half)
    branching = collapse_curve(model, Family("turning", turning), LENGTHS)
    assert not any("cache" in note for note in branching.notes)


# ---------------------------------------------------------------- from which length on they are the same


def drawn(
    relative: list[float],
    *,
    bits: list[bool] | None = None,
    top1: list[bool] | None = None,
    margin: list[float] | None = None,
    layers: list[list[float]] | None = None,
    fmt: str = "float32",
) -> CollapseCurve:
    """A curve of these numbers, at lengths 1, 2, …; the rest is zero."""
    n = len(relative)
    zeros = torch.zeros(n, dtype=torch.float64)
    values = {
        "relative": torch.tensor(relative, dtype=torch.float64),
        "bit_equal": torch.tensor(bits or [False] * n),
        "top1_agree": torch.tensor(top1 or [False] * n),
        "margin_shift": torch.tensor(margin or [0.0] * n, dtype=torch.float64),
        "by_layer": torch.tensor(layers or [[1.0] * n], dtype=torch.float64),
        "per_head": zeros[:, None],
        "attention_shift": zeros[None] + math.nan,
        "self_attention": zeros[None] + math.nan,
    }
    keys = ("l1", "l2", "linf", "logits", "noise_floor", "head_floor")
    return CollapseCurve(
        family="drawn",
        unit="ones",
        lengths=tuple(range(1, n + 1)),
        formats=(number_format(fmt),),
        covered=torch.ones(n, dtype=torch.bool),
        about=about(),
        **{key: {fmt: values.get(key, zeros)} for key in (*keys, *values)},
    )


EPS = 2.0**-23


@pytest.mark.parametrize(
    ("relative", "first"),
    [
        ([1, 0.1, EPS / 2, EPS / 4], 3),
        ([1, 0.1, EPS, EPS], None),  # epsilon itself is a difference
        ([1, 0.1, 0.01], None),
        ([0, 0, 0], 1),
        ([0, EPS / 2, 0.1, EPS / 2, 0], 4),  # not monotone: only what stays counts
        ([1, 0, 0, 1], None),
        ([1, math.nan, 0], 3),
        ([1, 0, math.nan], None),
    ],
)
def test_collapsed_below_epsilon(relative: list[float], first: int | None) -> None:
    assert drawn(relative).first_collapsed("float32") == first
    assert drawn(relative).first_collapsed(torch.float32, "epsilon") == first


@pytest.mark.parametrize(
    ("bits", "first"),
    [([False, False, True, True], 3), ([True, False, True, False], None), ([True], 1), ([False, True, False, True], 4)],
)
def test_collapsed_to_the_bit(bits: list[bool], first: int | None) -> None:
    assert drawn([0.0] * len(bits), bits=bits).first_collapsed("float32", "bits") == first


@pytest.mark.parametrize(
    ("top1", "margin", "first"),
    [
        ([True, True, True], [5, 0.5, 0.9], 2),
        ([True, True, True], [5, 1.0, 0.9], 3),  # moved by a whole rounding
        ([True, False, True], [0, 0, 0], 3),
        ([True, True, False], [0, 0, 0], None),
        ([True, True], [0.1, math.nan], None),
    ],
)
def test_collapsed_to_the_same_next_token(top1: list[bool], margin: list[float], first: int | None) -> None:
    assert drawn([1.0] * len(top1), top1=top1, margin=margin).first_collapsed("float32", "top1") == first


def test_each_format_has_its_own_epsilon() -> None:
    relative = [1e-1, 1e-3, 1e-5, 1e-8]
    expected = {"float32": 4, "bfloat16": 2, "float16": 3, "float32:store=float8_e4m3": 1, "float64": None}
    for fmt, first in expected.items():
        assert drawn(relative, fmt=fmt).first_collapsed(fmt) == first


def test_the_layer_where_two_prompts_merge() -> None:
    layers = [[1, 1, 0, 1], [1, 0, 0, 0], [EPS / 2, 1, 0, 0], [EPS / 2, 0, 0, EPS]]
    curve = drawn([1.0] * 4, layers=[list(map(float, row)) for row in layers])
    assert curve.merging_layer("float32") == (2, 3, 0, None)


def test_what_the_curve_does_not_hold_is_told() -> None:
    curve = drawn([1.0, 0.0])
    for wrong, says in (("bfloat16", r"this curve holds, float32, got dtype 'bfloat16'"), ("float31", "float31")):
        for ask in (curve.first_collapsed, curve.merging_layer):
            with pytest.raises(InputError, match=says):
                ask(wrong)
    with pytest.raises(InputError, match="expected one of epsilon, bits, top1, got criterion 'bytes'"):
        curve.first_collapsed("float32", "bytes")


def test_a_curve_as_plain_data() -> None:
    model = made("gpt2")
    curve = collapse_curve(model, ones, LENGTHS, ("float64", "float64:store=float8_e4m3"))
    plain = json.loads(json.dumps(curve.to_dict(), allow_nan=False))
    assert plain["lengths"] == list(LENGTHS)
    assert plain["l1"]["float64"] == pytest.approx(curve.l1["float64"].tolist())
    assert plain["noise_floor"]["float64"] == [None] * len(LENGTHS)
    assert plain["about"]["model_class"] == "TransformerBridge"
    for criterion in ("epsilon", "bits", "top1"):
        for name in curve.l1:
            assert plain["first_collapsed"][criterion][name] == curve.first_collapsed(name, criterion)


def test_bit_equal_prompts_are_found_so() -> None:
    """A model that writes nothing and knows no positions: the repeated token changes no bit, by every criterion."""
    model = made("gpt2")
    with torch.no_grad():
        model.original_model.transformer.wpe.weight.zero_()
        for block in model.original_model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
    curve = collapse_curve(model, ones, LENGTHS, ("float64", "bfloat16"))
    for name in curve.l1:
        assert curve.bit_equal[name].all()
        assert curve.top1_agree[name].all()
        assert not curve.l1[name].any()
        assert not curve.logits[name].any()
        assert [curve.first_collapsed(name, c) for c in ("epsilon", "bits", "top1")] == [1, 1, 1]
        assert curve.merging_layer(name) == (0,) * len(LENGTHS)
        assert (curve.attention_shift[name] > 0).all(), "attention moved all the same"


# ---------------------------------------------------------------- bad input


BAD = {
    "no family": ({"family": None}, "got a NoneType as the family"),
    "a name": ({"family": "counting"}, "got a str as the family"),
    "equal prompts": ({"family": Family("same", lambda k: ([1, 2], [1, 2]))}, "two prompts of length 1 are equal"),
    "a constant function": ({"family": lambda k: [5, 6, 7]}, r"are equal \(3 tokens\)"),
    "one token": ({"family": lambda k: [5] * k}, "expected at least 2, got .*: a prompt of 1 tokens for length 1"),
    "no pair": ({"family": Family("one", lambda k: [1, 2, 3])}, r"pair\(1\) gave a list"),
    "three prompts": ({"family": Family("three", lambda k: ([1, 2], [1, 3], [1, 4]))}, "expected two token lists"),
    "texts": (
        {"family": lambda k: "1" * (k + 1)},
        "expected token ids, .*: a str as a prompt of length 1",
    ),
    "fractions": ({"family": lambda k: [1.5, 2.5, *[3] * k]}, "expected token ids, whole numbers"),
    "a number": ({"family": lambda k: k}, "a int as a prompt"),
    "beyond n_ctx": (
        {"lengths": (1, 5, 12, 200)},
        r"at most n_ctx = 16 tokens, .*: length 12 makes 18 tokens: 5 is the longest that fits",
    ),
    "all beyond n_ctx": ({"lengths": (200,)}, "no length that fits came before it"),
    "beyond the vocabulary": ({"family": lambda k: [5, *[50] * k]}, r"expected ids in 0 … 49, .*: token id 50"),
    "below the vocabulary": ({"family": lambda k: [5, *[-1] * k]}, "expected ids in 0 … 49, .*: token id -1"),
    "no lengths": ({"lengths": ()}, "expected increasing whole numbers"),
    "length 0": ({"lengths": (0, 1)}, "expected increasing whole numbers"),
    "falling": ({"lengths": (3, 2)}, "expected increasing whole numbers"),
    "twice": ({"lengths": (2, 2)}, "expected increasing whole numbers"),
    "half": ({"lengths": (1.5, 2)}, "expected increasing whole numbers"),
    "words": ({"lengths": ("1", "2")}, "expected increasing whole numbers"),
    "no dtypes": ({"dtypes": ()}, "got no dtypes"),
    "an unknown dtype": ({"dtypes": ("float31",)}, "float31"),
    "float8 computing": ({"dtypes": ("float8_e4m3",)}, "store="),
}


@pytest.mark.parametrize(("wrong", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_told_in_one_line(wrong: dict[str, Any], says: str) -> None:
    given = {"family": ones, "lengths": (1, 2), "dtypes": ("float32",)} | wrong
    with pytest.raises(InputError, match=says) as raised:
        collapse_curve(made("gpt2"), **given)
    assert "\n" not in str(raised.value)


def test_something_that_is_no_hooked_model_is_told() -> None:
    with pytest.raises(InputError, match="expected a HookedTransformer or TransformerBridge"):
        collapse_curve(torch.nn.Linear(2, 2), ones)


def test_a_format_that_overflows_is_told_and_leaves_the_model_whole() -> None:
    model = made("gpt2")
    with torch.no_grad():
        model.original_model.transformer.wte.weight.mul_(1e5)
    tokens = torch.tensor([ones(2)])
    with torch.no_grad():
        before = model(tokens)
    with pytest.raises(HookMismatchError, match="use a wider dtype"):
        collapse_curve(model, ones, LENGTHS, ("float32", "float16"))
    with torch.no_grad():
        assert torch.equal(model(tokens), before)


# ---------------------------------------------------------------- shared against apart, and the real model


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "gemma", "mistral"])
def test_float64_shared_and_apart_meet(name: str) -> None:
    """Also in classes that would compute norms and softmax in float32: rounding is all that sharing changes."""
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    model = bridge(6, name) if name in ("gpt2", "llama") else zoo(name, "bridge", 6)
    for family in (as_family(ones), Family("turning", turning)):
        shared, apart = (collapse_curve(model, family, LENGTHS, ("float64",), share=share) for share in (True, False))
        assert shared.notes == apart.notes == ()
        assert furthest(shared, apart, "float64") <= 1e-11


def furthest(one: CollapseCurve, other: CollapseCurve, name: str) -> float:
    """Largest relative difference of any number that two curves hold."""
    keys = ("l1", "l2", "linf", "relative", "per_head", "by_layer", "logits", "attention_shift", "self_attention")
    pairs = [(getattr(one, key)[name], getattr(other, key)[name]) for key in keys]
    return max((((a - b).abs() / b.abs()).nan_to_num(0).max().item()) for a, b in pairs)


# The L1 distances measured on SmolLM2-135M-Instruct (Q4_1), without BOS and chat template.
MEASURED: dict[str, tuple[Callable[[Model], Family], dict[int, float]]] = {
    "counting": (families.counting, {1: 296, 11: 98, 101: 27}),
    "counting, sequences?": (
        lambda model: families.counting(model, question="How many ones are in the following sequences?"),
        {1: 288},
    ),
    "counting, spaced": (lambda model: families.counting(model, spaced=True), {1: 271, 11: 39, 101: 15}),
    "commas": (families.separated, {1: 308, 101: 348}),
    "commas, k against k+3": (lambda model: families.separated(model, step=3), {9: 94, 99: 23}),
    "commas from the right": (lambda model: families.separated(model, counted_from="right"), {101: 28}),
}


@pytest.mark.parametrize(("make", "measured"), MEASURED.values(), ids=MEASURED)
def test_distances_on_the_real_model(make: Callable[[Model], Family], measured: dict[int, float], smollm2: Any) -> None:
    """To the digits printed, or 1 %."""
    family = make(Reader(tokenizer=smollm2.tokenizer))
    curve = collapse_curve(smollm2, family, tuple(measured), ("float32",))
    for k, l1 in zip(curve.lengths, curve.l1["float32"].tolist(), strict=True):
        assert abs(l1 - measured[k]) <= max(0.5, 0.01 * measured[k]), (k, l1)
    assert curve.about.bos is False


def test_shared_and_apart_meet_on_the_real_model(smollm2: Any) -> None:
    """Endings that branch off a trunk, and prefixes of it."""
    family = families.sampled_digits(Reader(tokenizer=smollm2.tokenizer))
    curves = [collapse_curve(smollm2, family, (1, 9, 40), ("float64",), share=share) for share in (True, False)]
    assert not any("cache" in note for note in curves[0].notes)
    assert furthest(*curves, "float64") <= 1e-9


# ---------------------------------------------------------------- a curve shown


def test_a_curve_shows_itself_in_a_few_lines() -> None:
    curve = collapse_curve(made("gpt2"), ones, range(1, 11), ("float32", "bfloat16"), noise_floor=True)
    lines = repr(curve).splitlines()
    assert len(lines) <= 12
    assert "'ones' at 10 lengths" in lines[0]
    assert {line.split()[0] for line in lines[2:-1]} == {"1", "4", "7", "10"}, "lengths spread over all"
    assert lines[-1] == "… 12 more rows: to_frame()"
    frame = curve.to_frame()
    assert len(frame) == 20
    assert frame["l1"][frame["format"] == "bfloat16"].tolist() == curve.l1["bfloat16"].tolist()
    assert "<td><bdi>&#x27;bfloat16&#x27;</bdi></td>" in curve._repr_html_()


def test_families_and_formats_show_themselves_in_a_line() -> None:
    family = Family("turning", turning, "digits", "a question")
    assert repr(family) == "Family('turning', k in digits, 'a question')"
    assert family.to_dict() == {"kind": "family", "name": "turning", "unit": "digits", "note": "a question"}
    frame = family.to_frame((1, 2))
    assert frame["first"].tolist() == [turning(1)[0], turning(2)[0]]
    assert frame["repeats_last"].tolist() == [True, True]
    fmt = number_format("float32:store=float8_e4m3")
    assert repr(fmt) == "NumberFormat('float32:store=float8_e4m3')"
    assert json.loads(json.dumps(fmt.to_dict()))["largest"] == 448.0
