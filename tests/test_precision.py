"""Number formats: text and back, rounding against every code of a format, models that compute in another dtype."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import NO_BRIDGE, NO_HOOKED, _gpt2, _llama, has_bridge, has_hooked, hooked, tokenizer, tokens_for

import oversquash_lens as osl
from oversquash_lens.collapse.precision import (
    COMPUTE,
    STORAGE,
    WEIGHTS,
    NumberFormat,
    computing_in,
    fake_quantised,
    number_format,
    overflowing,
    stored,
)
from oversquash_lens.errors import InputError

FLOAT8 = ("float8_e4m3", "float8_e5m2")
HOOKED = pytest.mark.skipif(not has_hooked(), reason=NO_HOOKED)
BRIDGE = pytest.mark.skipif(not has_bridge(), reason=NO_BRIDGE)


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens)


# ---------------------------------------------------------------- formats as text


@pytest.mark.parametrize("parts", list(product(COMPUTE, [None, *STORAGE], [None, *WEIGHTS])))
def test_every_format_is_read_back_from_its_name(parts: tuple) -> None:
    fmt = NumberFormat(*parts)
    assert number_format(fmt.name) == fmt
    assert number_format(fmt) is fmt
    assert fmt.name.isascii()
    coarsest = max(torch.finfo(STORAGE[name]).eps for name in parts[:2] if name)
    one = torch.tensor(1.0, dtype=torch.float64)
    assert fmt.epsilon == coarsest
    assert stored(one + fmt.epsilon, fmt) > 1  # it is a spacing …
    if parts[1] and fmt.epsilon == torch.finfo(STORAGE[parts[1]]).eps:
        assert stored(one + fmt.epsilon / 2, fmt) == 1  # … and half of it is lost


@pytest.mark.parametrize(
    ("spec", "name", "label"),
    [
        ("float32", "float32", "float32"),
        (torch.bfloat16, "bfloat16", "bfloat16"),
        ("torch.float16", "float16", "float16"),
        ("float32:store=float8_e4m3", "float32:store=float8_e4m3", "float32, stored as float8_e4m3"),
        ("float32:weights=int4", "float32:weights=int4", "float32, weights in int4"),
        (
            "bfloat16:weights=int8:store=float8_e5m2",
            "bfloat16:store=float8_e5m2:weights=int8",
            "bfloat16, stored as float8_e5m2, weights in int8",
        ),
    ],
)
def test_names_and_labels(spec: Any, name: str, label: str) -> None:
    assert (number_format(spec).name, number_format(spec).label) == (name, label)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("float8_e4m3", "no device here computes in it.*'float32:store=float8_e4m3'"),
        (torch.float8_e5m2, "'float32:store=float8_e5m2'"),
        ("float31", "expected one of float64, float32, bfloat16, float16, .*'float31' as the format to compute in"),
        ("", "got '' as the format to compute in"),
        ("float32:store=int8", "expected one of .*float8_e5m2, .* got 'int8' as the format to store in"),
        ("float32:weights=int3", "expected one of int8, int4, .* got 'int3' as the format of weights"),
        ("float32:weights=", "got '' as the format of weights"),
        ("float32:round=bfloat16", "got 'round=bfloat16' in the number format"),
        ("float32:bfloat16", "expected store=FORMAT and weights=FORMAT"),
        ("float32:store=float16:store=bfloat16", "each at most once"),
        (torch.int64, "got 'int64' as the format to compute in"),
        (32, "expected a text .* got 32 as a number format"),
        (None, "got None as a number format"),
    ],
)
def test_formats_that_are_none(spec: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        number_format(spec)


# ---------------------------------------------------------------- storage


def codes(name: str) -> torch.Tensor:
    """Every finite number of a format, in order, from its bit patterns."""
    bits = torch.arange(256, dtype=torch.uint8) if name in FLOAT8 else torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = bits.view(STORAGE[name]).double()
    return values[values.isfinite()].unique()


@pytest.mark.parametrize("name", ["float8_e4m3", "float8_e5m2", "float16", "bfloat16"])
def test_storage_rounds_to_the_nearest_number_and_ties_to_even(name: str) -> None:
    fmt = NumberFormat("float64", name)
    known = codes(name)
    assert torch.equal(stored(known, fmt), known)  # whatever is a number of the format stays
    low, high = known[:-1], known[1:]
    middle = (low + high) / 2
    for share in (0.01, 0.3, 0.49, 0.51, 0.99):
        assert torch.equal(stored(low + share * (high - low), fmt), low if share < 0.5 else high)
    steps = torch.arange(len(known)) - int(
        (known == 0).nonzero()
    )  # codes counted from zero: even ones have a 0 bit last
    assert torch.equal(stored(middle, fmt), torch.where(steps[:-1] % 2 == 0, low, high))


@pytest.mark.parametrize(("name", "largest"), [("float8_e4m3", 448.0), ("float8_e5m2", 57344.0), ("float16", 65504.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_storage_saturates_and_says_how_often(name: str, largest: float, dtype: torch.dtype) -> None:
    x = torch.tensor([largest / 2, -largest / 2, 4 * largest, -4 * largest, math.inf, -math.inf, math.nan], dtype=dtype)
    kept = stored(x, f"float32:store={name}")
    assert kept.dtype == torch.float64
    assert kept[:6].abs().tolist() == stored(x[:2].abs(), f"float32:store={name}").tolist() + [largest] * 4
    assert torch.equal(kept[:6].sign(), x[:6].double().sign())
    assert kept[6].isnan()
    assert overflowing(x, f"float32:store={name}") == 4
    assert overflowing(x, "float32") == 0


def test_no_storage_changes_nothing() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(stored(x, "bfloat16"), x.double())
    assert torch.equal(stored(x, "bfloat16:store=float32"), x.double())
    assert torch.equal(stored(x, "bfloat16:store=float16"), x.half().double())
    assert torch.equal(stored(x.float() / 3, "float64:store=float32"), (x.float() / 3).double())


# ---------------------------------------------------------------- quantised weights


def one_by_one(row: list[float], steps: int) -> list[float]:
    scale = max(abs(each) for each in row) / steps
    return [round(each / scale) * scale if scale else 0.0 for each in row]  # Python rounds ties to even as well


@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    bits=st.sampled_from([8, 4]),
    group=st.sampled_from([None, 1, 5, 32, 64]),
)
def test_fake_quantised_by_plain_loops(seed: int, rows: int, columns: int, bits: int, group: int | None) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight[0] *= seed % 3  # also rows of zeros
    found = fake_quantised(weight, bits, group)
    size, steps = group or columns, {8: 127, 4: 7}[bits]
    for row, kept in zip(weight.tolist(), found.tolist(), strict=True):
        expected = [q for start in range(0, columns, size) for q in one_by_one(row[start : start + size], steps)]
        assert kept == pytest.approx(expected, abs=1e-12)
    for part, kept in zip(weight.split(size, 1), found.split(size, 1), strict=True):
        largest = part.abs().amax(1, keepdim=True)
        assert ((kept - part).abs() <= largest / (2 * steps) * (1 + 1e-9)).all()
        assert torch.allclose(kept.abs().amax(1, keepdim=True), largest)  # the largest weight is kept


def test_fake_quantised_keeps_dtype_and_leading_axes() -> None:
    weight = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = fake_quantised(weight, 4, 32)
    assert (found.dtype, found.shape) == (weight.dtype, weight.shape)
    assert torch.equal(found[1], fake_quantised(weight[1], 4, 32))
    assert torch.equal(found, fake_quantised(weight.float(), 4, 32).bfloat16())


@pytest.mark.parametrize(
    ("shape", "options"), [((3, 3), {"bits": 5}), ((3,), {"bits": 4}), ((3, 3), {"bits": 8, "group": 0})]
)
def test_what_cannot_be_quantised(shape: tuple, options: dict) -> None:
    with pytest.raises(InputError, match="expected 8 or 4 bits"):
        fake_quantised(torch.ones(shape), **options)


# ---------------------------------------------------------------- computing in another dtype: the same numbers


@HOOKED
@pytest.mark.parametrize("positions", ["standard", "rotary"])
@pytest.mark.parametrize(("norm", "gated"), [("LN", False), ("RMS", True)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_hooked_as_if_made_in_that_dtype(positions: str, norm: str, gated: bool, dtype: str) -> None:
    spec: dict[str, Any] = {"norm": norm, "gated": gated, "positions": positions, "n_heads": 4, "d_model": 16}
    model, made = (hooked(3, **spec, kv_heads=2, dtype=each) for each in (torch.float32, COMPUTE[dtype]))
    tokens = tokens_for(3, 9)
    with computing_in(model, dtype):
        found = logits(model, tokens)
    assert found.dtype == COMPUTE[dtype]
    assert torch.equal(found, logits(made, tokens))
    assert not torch.equal(found.float(), logits(model, tokens))


@HOOKED
@pytest.mark.parametrize("positions", ["standard", "rotary"])
def test_hooked_upcast_is_its_float64_copy(positions: str) -> None:
    model = hooked(4, norm="RMS", positions=positions, dtype=torch.float32)
    tokens = tokens_for(4, 9)
    copied = copy.deepcopy(model).to(torch.float64, print_details=False)
    with computing_in(model, "float64"):
        found = logits(model, tokens)
    assert found.dtype == torch.float64
    assert torch.equal(found, logits(copied, tokens))


@pytest.fixture(scope="module", params=["llama", "gpt2", "llama-tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder in float32; every parameter is drawn."""
    path = tmp_path_factory.mktemp("folders") / f"tiny-{request.param}"
    model = (_gpt2 if request.param == "gpt2" else _llama)(2, 40)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.2)
    if request.param == "llama-tied":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@BRIDGE
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_bridge_as_if_loaded_in_that_dtype(folder: Path, dtype: str) -> None:
    model = osl.load_model(folder, kind="bridge", device="cpu")
    loaded = osl.load_model(folder, kind="bridge", device="cpu", dtype=dtype)
    tokens = tokens_for(5, 12)
    with computing_in(model, dtype):
        found = logits(model, tokens)
        assert model.cfg.dtype == COMPUTE[dtype]
    assert found.dtype == COMPUTE[dtype]
    assert torch.equal(found, logits(loaded, tokens))
    assert model.cfg.dtype == torch.float32


def test_the_twin_as_if_loaded_in_that_dtype(folder: Path) -> None:
    from oversquash_lens.models.loading import load_twin

    twin, loaded = (load_twin(folder, device="cpu", dtype=dtype).model for dtype in ("float32", "bfloat16"))
    tokens = tokens_for(5, 12)
    with computing_in(twin, "bfloat16"), torch.no_grad():
        found = twin(tokens).logits
    with torch.no_grad():
        assert torch.equal(found, loaded(tokens).logits)


@BRIDGE
def test_the_real_bridge_as_if_loaded_in_bfloat16(smollm2: Any) -> None:
    _same_as_loaded_in_bfloat16(smollm2, "bridge")


@HOOKED
@pytest.mark.skipif(not has_bridge(), reason="this TransformerLens (2.x) is too far off in bfloat16")
def test_the_real_hooked_model_as_if_loaded_in_bfloat16(smollm2_hooked: Any) -> None:
    _same_as_loaded_in_bfloat16(smollm2_hooked, "hooked")


def _same_as_loaded_in_bfloat16(model: Any, kind: str) -> None:
    tokens = model.to_tokens("How many ones are in the following sequence? 1 1 1 1 1 Answer:")
    before = logits(model, tokens)
    with computing_in(model, "bfloat16"):
        found = logits(model, tokens)
    loaded = osl.load_model(kind=kind, device="cpu", dtype="bfloat16")
    assert torch.equal(found, logits(loaded, tokens))
    assert torch.equal(logits(model, tokens), before)


# ---------------------------------------------------------------- given back as it was


class Snapshot:
    """Every tensor of a model, by identity, place and value; and what its config says."""

    def __init__(self, model: Any) -> None:
        self.model, self.dtype = model, getattr(getattr(model, "cfg", None), "dtype", None)
        self.parameters = [(p, p.data_ptr(), p.stride(), p.detach().clone(), p.requires_grad) for p in self._all()]
        self.buffers = [(m, n, b, b.clone()) for m in model.modules() for n, b in m._buffers.items() if b is not None]

    def _all(self) -> list[torch.nn.Parameter]:
        inner = getattr(self.model, "original_model", self.model)
        return list({id(p): p for each in (self.model, inner) for p in each.parameters()}.values())

    def check(self) -> None:
        found = self._all()
        assert len(found) == len(self.parameters)
        for now, (parameter, place, stride, value, grad) in zip(found, self.parameters, strict=True):
            assert now is parameter
            assert (now.data_ptr(), now.stride(), now.dtype, now.requires_grad) == (place, stride, value.dtype, grad)
            assert torch.equal(now, value)
        for module, name, buffer, value in self.buffers:
            assert module._buffers[name] is buffer
            assert (buffer.dtype, torch.equal(buffer, value)) == (value.dtype, True)
        assert getattr(getattr(self.model, "cfg", None), "dtype", None) == self.dtype


@pytest.mark.parametrize("fmt", ["bfloat16", "float32:weights=int4", "float64:weights=int8", "float16:weights=int8"])
def test_given_back_as_it_was(fresh: tuple[Any, torch.Tensor], fmt: str) -> None:
    model, tokens = fresh
    before, whole = logits(model, tokens), Snapshot(model)
    with computing_in(model, fmt):
        assert {p.dtype for p in whole._all()} == {number_format(fmt).dtype}
        assert not torch.equal(logits(model, tokens).double(), before)
    whole.check()
    assert torch.equal(logits(model, tokens), before)


def test_given_back_after_an_error_and_when_nested(fresh: tuple[Any, torch.Tensor]) -> None:
    model, tokens = fresh
    whole = Snapshot(model)
    with computing_in(model, "float32"):
        single = logits(model, tokens)
        with pytest.raises(ZeroDivisionError), computing_in(model, "bfloat16:weights=int8"):
            _ = logits(model, tokens).shape[0] / 0
        assert torch.equal(logits(model, tokens), single)
    whole.check()


def test_given_back_when_memory_ends_halfway(fresh: tuple[Any, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = fresh
    whole, calls = Snapshot(model), []

    def failing(weight: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(weight)
        if len(calls) == 3:
            raise MemoryError
        return fake_quantised(weight, *args)

    monkeypatch.setattr("oversquash_lens.collapse.precision.fake_quantised", failing)
    with pytest.raises(MemoryError), computing_in(model, "bfloat16:weights=int4"):
        pass
    whole.check()


def test_the_same_dtype_touches_nothing(fresh: tuple[Any, torch.Tensor]) -> None:
    model, _ = fresh
    whole = Snapshot(model)
    with computing_in(model, "float64:store=float8_e4m3"):
        whole.check()


def test_rotary_frequencies_stay_and_rotary_tables_go(make: Callable) -> None:
    model = make("bridge-llama" if has_bridge() else "hooked-rms")
    dtypes = {name: buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name}
    assert bool(dtypes) == has_bridge()
    with computing_in(model, "bfloat16"):
        assert {n: b.dtype for n, b in model.named_buffers() if "inv_freq" in n} == dtypes
        tables = [buffer for name, buffer in model.named_buffers() if "rotary_sin" in name or "rotary_cos" in name]
        assert all(table.dtype == torch.bfloat16 for table in tables)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = _llama(1, 16).double()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with computing_in(model, "float32:weights=int8"):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.float64


def test_measures_inside_the_block_see_the_other_model(fresh: tuple[Any, torch.Tensor]) -> None:
    model, tokens = fresh
    before = osl.mean_field_sensitivity(osl.record(model, tokens[0])).values
    with computing_in(model, "float32"):
        trace = osl.record(model, tokens[0])
        single = osl.mean_field_sensitivity(trace).values
    with computing_in(model, "float64:weights=int4"):
        coarse = osl.mean_field_sensitivity(osl.record(model, tokens[0])).values
    assert trace.about.dtype == "float32"
    assert 0 < (single / before - 1).abs().max() < 1e-4
    assert (coarse / before - 1).abs().max() > 1e-3
    assert torch.equal(osl.mean_field_sensitivity(osl.record(model, tokens[0])).values, before)


# ---------------------------------------------------------------- quantised weights in a model


def test_norms_biases_and_tables_are_not_quantised(fresh: tuple[Any, torch.Tensor]) -> None:
    model, _ = fresh
    inner = getattr(model, "original_model", model)
    kept = {name: p.detach().clone() for name, p in inner.named_parameters()}
    with computing_in(model, "float64:weights=int4"):
        changed = {name for name, p in inner.named_parameters() if not torch.equal(p, kept[name])}
    tables = ("W_E", "W_U", "W_pos", "embed_tokens", "lm_head", "wte", "wpe", "ln", "norm")
    for name, weight in kept.items():
        bias = weight.ndim < 2 or name.split(".")[-1].startswith(("b_", "_b_"))
        assert (name in changed) != (bias or any(table in name for table in tables)), name


@HOOKED
def test_hooked_groups_run_along_the_input() -> None:
    """By plain loops over HookedTransformer's own axes; d_model 40 leaves a short last group of 8."""
    model = hooked(6, norm="RMS", gated=True, n_heads=2, kv_heads=1, d_model=40, d_mlp=36, dtype=torch.float32)
    block = model.blocks[0]
    was = {name: p.detach().clone() for name, p in block.named_parameters()}
    with computing_in(model, "float32:weights=int4"):
        now = {name: p.detach().clone() for name, p in block.named_parameters()}
    for name, columns in {
        "attn.W_Q": [(was["attn.W_Q"][h, :, i], now["attn.W_Q"][h, :, i]) for h in range(2) for i in range(20)],
        "attn._W_V": [(was["attn._W_V"][0, :, i], now["attn._W_V"][0, :, i]) for i in range(20)],
        "attn.W_O": [(was["attn.W_O"][:, :, i].flatten(), now["attn.W_O"][:, :, i].flatten()) for i in range(40)],
        "mlp.W_gate": [(was["mlp.W_gate"][:, i], now["mlp.W_gate"][:, i]) for i in range(36)],
        "mlp.W_out": [(was["mlp.W_out"][:, i], now["mlp.W_out"][:, i]) for i in range(40)],
    }.items():
        for column, found in columns:
            values = column.tolist()
            expected = [q for start in range(0, len(values), 32) for q in one_by_one(values[start : start + 32], 7)]
            assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6), name


@HOOKED
@BRIDGE
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_both_classes_quantise_alike(weights: str, tmp_path: Path) -> None:
    model = _llama(2, 40)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.2)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    tokens, found = tokens_for(7, 12), {}
    for kind in ("hooked", "bridge"):
        model = osl.load_model(tmp_path, kind=kind, device="cpu")
        plain = logits(model, tokens)
        with computing_in(model, f"float32:weights={weights}"):
            found[kind] = logits(model, tokens)
        assert (found[kind] - plain).abs().max() > 1e-3
    assert (found["hooked"] - found["bridge"]).abs().max() <= 1e-4


@BRIDGE
def test_views_of_one_matrix_are_quantised_alike(make: Callable) -> None:
    """GPT-2's query, key and value matrices are views of one; Conv1D has the input first."""
    model = make("bridge-gpt2")
    attn = model.blocks[0].attn
    joint = attn.qkv._original_component.weight
    was = joint.detach().clone()
    assert attn.q._original_component.weight.data_ptr() == joint.data_ptr()
    with computing_in(model, "float64:weights=int8"):
        parts = [getattr(attn, name)._original_component.weight for name in "qkv"]
        assert torch.equal(torch.cat(parts), joint.T)
        assert torch.equal(joint.T, fake_quantised(was.T, 8))
    assert attn.q._original_component.weight.data_ptr() == joint.data_ptr()


# ---------------------------------------------------------------- other modules, and what is refused


class Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(5, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.last = torch.nn.Linear(4, 3)
        self.register_buffer("frequencies", torch.rand(4), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.table(ids)))


def test_any_other_module() -> None:
    model = Plain().eval()
    ids, whole = torch.arange(5), Snapshot(model)
    copied = copy.deepcopy(model).bfloat16()
    with computing_in(model, "bfloat16"):
        assert (model.norm.running_mean.dtype, model.frequencies.dtype) == (torch.bfloat16, torch.float32)
        assert model.norm.num_batches_tracked.dtype == torch.int64
        assert torch.equal(logits(model, ids), logits(copied, ids))
    with computing_in(model, "float32:weights=int8"):
        assert torch.equal(model.last.weight, fake_quantised(whole.parameters[3][3], 8))
        assert torch.equal(model.table.weight, whole.parameters[0][3])
    whole.check()


def test_a_module_without_matrices_has_nothing_to_quantise() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.LayerNorm(4))
    whole = Snapshot(model)
    with pytest.raises(InputError, match="no weight matrix to quantise"), computing_in(model, "bfloat16:weights=int4"):
        pass
    whole.check()


def test_what_is_no_model() -> None:
    with pytest.raises(InputError, match=r"got a str.*load_model"), computing_in("gpt2", "bfloat16"):
        pass


def test_a_device_that_does_not_compute_in_it(fresh: tuple[Any, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = fresh
    whole, ones = Snapshot(model), torch.ones

    def without_float16(*size: int, dtype: Any = None, **options: Any) -> torch.Tensor:
        if dtype == torch.float16:
            raise TypeError("Cannot convert to a tensor of that dtype\non this device")
        return ones(*size, dtype=dtype, **options)

    monkeypatch.setattr(torch, "ones", without_float16)
    said = r"'cpu' does not compute in torch\.float16 \(Cannot convert"
    with pytest.raises(InputError, match=said), computing_in(model, "float16"):
        pass
    whole.check()


def test_off_loaded_weights_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(InputError, match="off-loaded"), computing_in(model, "bfloat16"):
        pass
    assert model[0].weight.dtype == torch.float32
