"""Numbers in half precision, from seeds, under whatever the caller has set torch to, and on devices other than the CPU.

The reference of a half-precision model is the same model with the same (rounded) weights computed in float64. What is
left between the two is the model's own rounding: the measures themselves compute in float32 or wider, which is shown
apart. docs/compatibility.md states the tolerances.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from elsewhere import THERE, Elsewhere, is_there
from small_models import N_CTX, has_bridge, has_hooked, tokens_for
from soundness import jacobians, spectral_norms
from zoo import lacking, zoo

import oversquash_lens as osl
from oversquash_lens.capture.attention import KeptAttention
from oversquash_lens.collapse.lemmas import total_variation

PACKAGE = Path(osl.__file__).parent
CELLS = [
    cell
    for cell in (
        ("gpt2", "hooked"),
        ("llama", "hooked"),
        ("gpt2", "bridge"),
        ("llama", "bridge"),
        ("gemma", "bridge"),
    )
    if not lacking(*cell)
]
# Largest relative error of any measure at any position, two layers, by what the model computes in.
HALF = {torch.bfloat16: 0.06, torch.float16: 0.01}
BOUNDS = ("proof", "theorem_b5", "multi_head", "calibrated", "calibrated_full")


def model_in(cell: tuple[str, str], dtype: torch.dtype, rounded_to: torch.dtype, seed: int = 0, **config: Any) -> Any:
    """A model that computes in `dtype` with weights that `rounded_to` can hold."""
    model = zoo(*cell, seed=seed, dtype=dtype, **config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(rounded_to))
    return model


def of_trace(trace: osl.Trace) -> dict[str, torch.Tensor]:
    """Every measure of a recorded prompt, as logarithms."""
    found = {variant: osl.path_bound(trace, variant).log_values for variant in BOUNDS}
    found["rollout"] = osl.path_bound(trace, "rollout").log_by_layer[0]
    found["mean_field"] = osl.mean_field_sensitivity(trace).log_values
    return found


def of_model(model: Any, tokens: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every measure of a model on a prompt, as logarithms."""
    measured = {
        "exact": {"probes": None},
        "spectral": {"probes": None, "norm": "spectral"},
        "probes": {"probes": 5, "seed": seed},
        "frozen": {"probes": 5, "seed": seed, "freeze": ("attention", "norms")},
    }
    truths = {name: osl.measured_sensitivity(model, tokens, **how).values.log() for name, how in measured.items()}
    return of_trace(osl.record(model, tokens, seed=seed)) | truths


def relative_error(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest |one/other − 1| over positions; where both are 0 there is none."""
    alike = {name: torch.where(one[name] == other[name], 0.0, one[name] - other[name]) for name in other}
    return {name: torch.expm1(difference).abs().max().item() for name, difference in alike.items()}


# --- half precision ---


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_half_precision_errs_by_its_own_rounding(cell: tuple[str, str], dtype: torch.dtype) -> None:
    for seed in range(2):
        tokens = tokens_for(seed, 12)
        half = of_model(model_in(cell, dtype, dtype, seed), tokens)
        double = of_model(model_in(cell, torch.float64, dtype, seed), tokens)
        errors = relative_error(half, double)
        assert max(errors.values()) < HALF[dtype], errors


def widened(value: Any) -> Any:
    """A trace's numbers as float64, whatever they were kept in."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(widened(each) for each in value)
    if isinstance(value, osl.Trace | KeptAttention) or (is_dataclass(value) and "Gains" in type(value).__name__):
        return replace(value, **{field.name: widened(getattr(value, field.name)) for field in fields(value)})
    return value


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_measures_of_a_trace_compute_in_float32_at_least(cell: tuple[str, str], dtype: torch.dtype) -> None:
    """The very same recorded numbers, widened to float64 first, give the same measures."""
    trace = osl.record(zoo(*cell, seed=1, dtype=dtype), tokens_for(1, 12))
    errors = relative_error(of_trace(trace), of_trace(widened(trace)))
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell[1] == "hooked"], ids="-".join)
def test_neither_huge_residuals_nor_tiny_derivatives_leave_float16(cell: tuple[str, str], size: float) -> None:
    """Residuals of 1e4 have squares beyond float16's 65504, derivatives of 1e-6 have squares below its smallest."""
    tokens, measures = tokens_for(2, 8), []
    for dtype in (torch.float16, torch.float64):
        model = zoo(*cell, seed=2, dtype=dtype)
        with torch.no_grad():
            model.embed.W_E.copy_((model.embed.W_E.double() * size).half())
            for parameter in model.parameters():
                parameter.copy_(parameter.half())
        measures.append(of_model(model, tokens))
    errors = relative_error(*measures)
    assert all(torch.isfinite(each).all() for each in measures[0].values())
    assert max(errors.values()) < HALF[torch.float16], errors


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_bounds_of_half_precision_models_are_sound(cell: tuple[str, str], dtype: torch.dtype) -> None:
    """Never below the float64 Jacobian of the same weights, but for 8 roundings a layer."""
    allowed = 1 - 8 * 3 * torch.finfo(dtype).eps
    for seed in range(3):
        tokens = tokens_for(seed, 10)
        trace = osl.record(model_in(cell, dtype, dtype, seed), tokens)
        exact = model_in(cell, torch.float64, dtype, seed)
        for variant in ("calibrated", "calibrated_full"):
            truth = jacobians(exact, tokens, freeze_attention=variant == "calibrated")[0]
            bound = osl.path_bound(trace, variant).log_values
            assert (bound.exp() >= spectral_norms(truth) * allowed).all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_deep_and_long_stay_finite(dtype: torch.dtype) -> None:
    """24 layers, 300 tokens; rows of attention as flat as 1/300 still sum to 1."""
    cell = CELLS[0] if has_hooked() else ("gpt2", "bridge")
    long = {"n_ctx": 300} if cell[1] == "hooked" else {"n_positions": 300}
    deep = {"n_layers": 24} if cell[1] == "hooked" else {"n_layer": 24}
    for config, n in ((long, 300), (deep, N_CTX)):
        model, tokens = zoo(*cell, dtype=dtype, **config), tokens_for(3, n)
        trace = osl.record(model, tokens)
        assert all(torch.isfinite(each).all() for each in of_trace(trace).values())
        assert torch.isfinite(osl.measured_sensitivity(model, tokens, probes=2).values).all()


# --- from a seed ---


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(cell: tuple[str, str]) -> None:
    model, tokens = zoo(*cell, dtype=torch.float32), tokens_for(4, 9)
    first, again, other = (of_model(model, tokens, seed) for seed in (7, 7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = {name for name in first if not torch.equal(first[name], other[name])}
    assert drawn == {"mean_field", "probes", "frozen"}


def test_nobody_elses_random_numbers_move() -> None:
    model, tokens = zoo(*CELLS[-1], dtype=torch.float32), tokens_for(4, 6)
    before = torch.random.get_rng_state(), numpy.random.get_state()[1].tolist()
    of_model(model, tokens)
    osl.audit(model, tokens, probes=2)
    osl.flow(osl.record(model, tokens))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert numpy.random.get_state()[1].tolist() == before[1]


# --- under whatever the caller has set ---


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS: dict[str, tuple[Callable[[], Any], float]] = {  # and how far results may differ
    "one thread": (lambda: threads(1), 1e-5),  # parts of a bridge round to float32, and threads split sums
    "two threads": (lambda: threads(2), 1e-5),
    "default float64": (lambda: default_dtype(torch.float64), 0),
    "default bfloat16": (lambda: default_dtype(torch.bfloat16), 0),
    "no_grad": (torch.no_grad, 0),
    "inference_mode": (torch.inference_mode, 0),
    "enable_grad": (torch.enable_grad, 0),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_results_do_not_depend_on_what_torch_is_set_to(cell: tuple[str, str], setting: str) -> None:
    model, tokens = zoo(*cell, dtype=torch.float64), tokens_for(5, 9)
    context, allowed = SETTINGS[setting]
    wanted = of_model(model, tokens)
    with context():
        got = of_model(model, tokens)
    assert max(relative_error(got, wanted).values()) <= allowed


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_autocast_touches_the_model_only(cell: tuple[str, str]) -> None:
    """A trace's measures are the same bits under autocast; a recording in it is of the model as it then computes."""
    model, tokens = zoo(*cell, dtype=torch.float32), tokens_for(5, 9)
    trace = osl.record(model, tokens)
    wanted = of_trace(trace)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = of_trace(trace)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


# --- elsewhere ---


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_everything_works_where_the_model_is(cell: tuple[str, str]) -> None:
    """On a pretended accelerator no operation of ours mixes its tensors with the CPU's."""
    model, tokens = zoo(*cell, dtype=torch.float32), tokens_for(6, 7)
    with Elsewhere() as there:
        there.move(model)
        trace = osl.record(model, tokens)
        assert is_there(trace.attention[0].rows(0, 7))
        of_trace(trace)
        osl.flow(trace, kind="calibrated_full", source=2)
        of_model(model, tokens)
        osl.audit(model, tokens, probes=2)
    assert not there.mixed, sorted(there.mixed)


def test_the_pretended_accelerator_notices() -> None:
    """The judge judged: marks follow what is computed, and mixing is noted where our code does it."""
    model, tokens = zoo(*CELLS[-1], dtype=torch.float32), tokens_for(6, 7)
    with Elsewhere() as there:
        there.move(model)
        trace = osl.record(model, tokens)
        x = torch.ones(3).to(THERE)
        assert is_there(x * 2)
        assert (x * 2).device == THERE
        assert not is_there(x.cpu())
        assert is_there(torch.zeros(2, device=x.device))
        assert not is_there(torch.zeros(2))
        osl.flow(trace, source=1)
        assert not there.mixed
        total_variation(torch.zeros(3).softmax(0), x.softmax(0))
    (line,) = there.mixed
    assert line.startswith("collapse/lemmas.py")


FACTORIES = {"arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "tensor"}
FACTORIES |= {"tril_indices", "triu_indices", "zeros"}


def unplaced(path: Path) -> list[str]:
    """Calls that make a tensor wherever torch is set to make them."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        is_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        named = {"device", None} & {keyword.arg for keyword in node.keywords}  # None: **options
        if is_torch and node.func.attr in FACTORIES and not named:
            found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} torch.{node.func.attr}")
    return found


def test_every_tensor_is_made_on_a_named_device() -> None:
    """`torch.set_default_device` then cannot put one of two operands elsewhere."""
    assert has_bridge() or has_hooked()
    paths = [path for room in ("record", "measure") for path in sorted((PACKAGE / room).glob("*.py"))]
    assert not [call for path in paths for call in unplaced(path)]
