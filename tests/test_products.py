"""The truth checkpointed by block, and with fused attention, against that of the whole graph: the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from elsewhere import Elsewhere
from small_models import CASES, bridge, case, has_bridge, hooked, tokens_for
from zoo import CELLS, lacking, zoo

import oversquash_lens as osl
from oversquash_lens.capture.architecture import read_architecture
from oversquash_lens.capture.fused import why_not_fused
from oversquash_lens.capture.hooked_model import size_of
from oversquash_lens.capture.subject import Subject
from oversquash_lens.errors import HookMismatchError, ModelError
from oversquash_lens.jacobian import products
from oversquash_lens.jacobian.measured import MEMORY
from oversquash_lens.jacobian.products import differentiate, vjp

FREEZES = [(), ("attention",), ("norms",), ("attention", "norms")]
FUSED = 1e-6  # float64 weights, but most of transformers' classes take the softmax or the rotations in float32

quiet = pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")
needs_bridge = pytest.mark.skipif(not has_bridge(), reason="this TransformerLens has no TransformerBridge")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.Tensor]:
    """measured(route, model, tokens, …): the truth on that route."""

    def measured(route: str, model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        monkeypatch.setattr(products, "truth_route", lambda *_: route)
        return osl.measured_sensitivity(model, tokens, **{"probes": None} | options).values

    return measured


def same(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-12) -> bool:
    """Zeros, positions out of every window's reach, are the same zeros."""
    return torch.allclose(found.double(), wanted.double(), rtol=tolerance, atol=0)


@quiet
@pytest.mark.parametrize("freeze", FREEZES, ids=str)
@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_blocks_give_what_the_whole_graph_gives(
    name: str, kind: str, freeze: tuple[str, ...], measured: Callable[..., torch.Tensor]
) -> None:
    """Every family on every class; where one is refused, the other is."""
    if lacking(name, kind) is not None:
        pytest.skip(lacking(name, kind))
    model, tokens = zoo(name, kind), tokens_for(4, 8)
    try:
        whole = measured("whole", model, tokens, freeze=freeze)
    except ModelError:
        with pytest.raises(ModelError):
            measured("blocks", model, tokens, freeze=freeze)
        return
    assert same(measured("blocks", model, tokens, freeze=freeze), whole)
    if "attention" not in freeze and why_not_fused(model, read_architecture(model)) is None:
        assert same(measured("fused", model, tokens, freeze=freeze), whole, FUSED)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", [{"norm": "spectral"}, {"probes": 5, "seed": 2}], ids=["spectral", "probes"])
def test_other_norms_and_probes_agree_too(name: str, options: dict, measured: Callable[..., torch.Tensor]) -> None:
    model, tokens = case(name)
    whole, blocks = (measured(route, model, tokens, **options) for route in ("whole", "blocks"))
    assert same(blocks, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", [("llama", "hooked"), ("gpt2", "bridge"), ("gemma", "bridge")], ids="-".join)
def test_half_precision_loses_no_more_than_the_whole_graph_does(
    cell: tuple[str, str], dtype: torch.dtype, measured: Callable[..., torch.Tensor]
) -> None:
    if lacking(*cell) is not None:
        pytest.skip(lacking(*cell))
    model, tokens = zoo(*cell, dtype=dtype), tokens_for(4, 8)
    whole, blocks = (measured(route, model, tokens).double() for route in ("whole", "blocks"))
    rounding = {torch.float32: 1e-6, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
    assert (blocks.log() - whole.log()).abs().max() < rounding


@needs_bridge
def test_fused_truth_of_the_real_model_is_the_eager_one_to_float32_rounding(
    smollm2: Any, measured: Callable[..., torch.Tensor]
) -> None:
    ids = torch.tensor(smollm2.tokenizer("The committee met on Tuesday to discuss the budget.")["input_ids"])
    whole, fused = (measured(route, smollm2, ids, probes=4) for route in ("whole", "fused"))
    assert same(fused, whole, 2e-5)


# ---------------------------------------------------------------- memory


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many covectors went together through the whole graph, or through one block, each time."""
    seen: dict[str, list[int]] = {"whole": [], "blocks": []}

    def spied(output: torch.Tensor, leaf: torch.Tensor, covectors: torch.Tensor) -> torch.Tensor:
        seen["whole" if output.ndim == 1 else "blocks"].append(len(covectors))
        return vjp(output, leaf, covectors)

    monkeypatch.setattr(products, "vjp", spied)
    return seen


@pytest.mark.parametrize("route", ["whole", "blocks"])
def test_no_more_products_go_together_than_the_memory_holds(
    route: str, batches: dict[str, list[int]], measured: Callable[..., torch.Tensor]
) -> None:
    model, tokens = case("bridge-gpt2")
    one, seen = products.product_bytes(size_of(model), tokens.shape[1], route), batches[route]
    enough = measured(route, model, tokens, memory=MEMORY)
    assert max(seen) == model.cfg.d_model
    for memory, most in ((3 * one, 3), (1, 1)):
        seen.clear()
        assert same(measured(route, model, tokens, memory=memory), enough)
        assert max(seen) == most


def test_products_of_long_prompts_go_alone() -> None:
    """Where one keeps the processor busy: measured, no batch is faster from 512 positions on."""
    assert [products.products_at_once(n, MEMORY, 1) for n in (8, 128, 512, 2048)] == [64, 8, 2, 1]


def kept_for_backward(differentiated: Callable[[], object]) -> int:
    """Numbers that autograd keeps while something is run."""
    sizes: list[int] = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        sizes.append(value.numel())
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        differentiated()
    return sum(sizes)


@pytest.mark.parametrize("name", ["rms-gated-rotary-gqa", "bridge-llama", "bridge-gpt2"])
def test_the_pass_keeps_no_graph_of_the_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = case(name)
    subject = Subject.of(model)
    tokenized = subject.tokenize(tokens)
    kept = {}
    for route in ("whole", "blocks"):
        monkeypatch.setattr(products, "truth_route", lambda *_, route=route: route)
        kept[route] = kept_for_backward(lambda: differentiate(subject, tokenized))
    assert kept["blocks"] < kept["whole"] / 4


# ---------------------------------------------------------------- the user's own hooks


@pytest.mark.parametrize("name", ["ln-plain-learned", "bridge-llama"])
def test_the_users_hooks_are_heard_at_both_runs(name: str, measured: Callable[..., torch.Tensor]) -> None:
    model, tokens = case(name)
    plain = measured("whole", model, tokens)
    edits = [
        ("blocks.0.hook_resid_pre", lambda value, hook: value * 1.5),
        ("blocks.1.attn.hook_pattern", lambda value, hook: value * 0.5),
        ("blocks.1.hook_resid_post", lambda value, hook: value + value.square().mean(-1, keepdim=True)),
        ("unembed.hook_in", lambda value, hook: value.tanh()),
    ]
    with model.hooks(fwd_hooks=edits):
        whole, blocks = (measured(route, model, tokens) for route in ("whole", "blocks"))
    assert same(blocks, whole)
    assert not same(blocks, plain, 1e-3)


@pytest.mark.parametrize("name", ["ln-plain-learned", "bridge-llama"])
def test_torch_hooks_on_whole_blocks_are_heard_too(name: str, measured: Callable[..., torch.Tensor]) -> None:
    model, tokens = case(name)

    def before(block: Any, inputs: tuple) -> tuple:
        return (inputs[0] * 2, *inputs[1:])

    def behind(block: Any, inputs: tuple, output: Any) -> Any:
        return (output[0] * 3, *output[1:]) if isinstance(output, tuple) else output * 3

    block = model.blocks[1]
    handles = [block.register_forward_pre_hook(before), block.register_forward_hook(behind)]
    try:
        whole, blocks = (measured(route, model, tokens) for route in ("whole", "blocks"))
    finally:
        for handle in handles:
            handle.remove()
    assert same(blocks, whole)


def test_a_hook_that_does_another_thing_the_second_time_is_found_out(measured: Callable[..., torch.Tensor]) -> None:
    model, tokens = case("bridge-gpt2")
    factors = iter((1.0, 1.2, 1.4, 1.6))

    def restless(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value * next(factors)

    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", restless)]),
        pytest.raises(HookMismatchError, match=r"block 1, run a second time .*, differs from its first run by"),
    ):
        measured("blocks", model, tokens)


# ---------------------------------------------------------------- nothing is left behind


def hooks_on(model: Any) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())


@pytest.fixture(params=["blocks", "fused"])
def route(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "fused" and not has_bridge():
        pytest.skip("this TransformerLens has no TransformerBridge")
    return request.param


def test_the_model_is_left_as_it_was(route: str, measured: Callable[..., torch.Tensor]) -> None:
    model, tokens = bridge(5, "llama") if has_bridge() else hooked(5), tokens_for(5, 6)
    with torch.no_grad():
        before = model(tokens).clone()  # a bridge adds hooks of its own at its first pass
    hooks, wants = hooks_on(model), [parameter.requires_grad for parameter in model.parameters()]
    with torch.inference_mode():
        inside = measured(route, model, tokens)
        assert torch.is_inference_mode_enabled()
    assert same(measured(route, model, tokens), inside)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        measured(route, model, tokens, probes=2)
        assert not torch.is_grad_enabled()
        assert torch.equal(model(tokens), before)
    assert hooks_on(model) == hooks
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    assert all(parameter.grad is None for parameter in model.parameters())


def test_also_after_a_failure(route: str, measured: Callable[..., torch.Tensor]) -> None:
    model, tokens = bridge(5, "llama") if has_bridge() else hooked(5), tokens_for(5, 6)
    model(tokens)
    hooks, countdown = hooks_on(model), iter((False, False, False, True))  # the proof makes two passes with it

    def bursts(block: Any, inputs: tuple) -> None:
        if next(countdown):
            raise KeyError("mine")

    handle = model.blocks[1].mlp.register_forward_pre_hook(bursts)
    with pytest.raises(KeyError, match="mine"):  # in the second run of the block
        measured(route, model, tokens)
    handle.remove()
    assert torch.is_grad_enabled()
    assert hooks_on(model) == hooks
    assert measured(route, model, tokens).isfinite().all()


def test_all_is_where_the_model_is(route: str, measured: Callable[..., torch.Tensor]) -> None:
    """On a pretended accelerator no operation of ours mixes its tensors with the CPU's."""
    dtype = {"dtype": torch.float32}
    model, tokens = bridge(5, "gpt2", **dtype) if has_bridge() else hooked(5, **dtype), tokens_for(6, 7)
    with Elsewhere() as there:
        there.move(model)
        for freeze in ((), ("norms",)):
            measured(route, model, tokens, probes=3, freeze=freeze)
    assert not there.mixed, sorted(there.mixed)
