"""What people do to a model and around it: every door works, or says in one line what is in the way.

A situation is a row of WORKS (numbers as without it), CHANGES (other numbers, for the function is another one) or
REFUSED (with the words that name what is in the way). Each is tried on both classes, at every kind of door.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from mixers import bridge_over
from small_models import NO_BRIDGE, NO_HOOKED, has_bridge, has_hooked
from torch.nn.utils import parametrize, prune
from zoo import transformers_model, zoo

import oversquash_lens as osl
from oversquash_lens.errors import InputError, OversquashError

Model = Any
IDS = [1, 7, 9, 3, 20, 11]
DOORS: dict[str, Callable[[Model, Any], Any]] = {
    "record": lambda model, ids: osl.record(model, ids).last_residuals,
    "batch": lambda model, ids: osl.record_batch(model, [ids, ids])[1].last_residuals,
    "truth": lambda model, ids: osl.measured_sensitivity(model, ids, probes=None).values,
    "norms frozen": lambda model, ids: osl.measured_sensitivity(model, ids, probes=2, freeze=("norms",)).values,
    "attention frozen": lambda model, ids: osl.measured_sensitivity(model, ids, probes=2, freeze=("attention",)).values,
    "collapse": lambda model, ids: osl.collapse_curve(model, lambda k: [1, *[7] * k, 9], (1, 2), ("float32",)).l2[
        "float32"
    ],
    "support": lambda model, ids: [verdict.state for verdict in osl.support(model).values()],
}


@pytest.fixture(params=["bridge", "hooked"])
def model(request: pytest.FixtureRequest) -> Model:
    if request.param == "bridge" and not has_bridge():
        pytest.skip(NO_BRIDGE)
    if request.param == "hooked" and not has_hooked():
        pytest.skip(NO_HOOKED)
    return zoo("llama", request.param, dtype=torch.float32)


def numbers(model: Model, around: Callable[[], AbstractContextManager] = nullcontext, ids: Any = IDS) -> dict[str, Any]:
    """What every door gives, or the one line that it refuses with; any other exception fails the test."""
    found: dict[str, Any] = {}
    for door, ask in DOORS.items():
        try:
            with around():
                found[door] = ask(model, ids)
        except OversquashError as error:
            found[door] = str(error)
    assert not [said for said in found.values() if isinstance(said, str) and "\n" in said], "one line each"
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-6)
    return one == other


# ---------------------------------------------------------------- what changes nothing


@contextmanager
def undone(on: Callable[[], Any], off: Callable[[], Any]) -> Iterator[None]:
    on()
    try:
        yield
    finally:
        off()


@contextmanager
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def deterministic(on: bool) -> None:
    torch.use_deterministic_algorithms(on)


def a_global_hook() -> AbstractContextManager:
    return torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)


AROUND: dict[str, Callable[[], AbstractContextManager]] = {
    "default dtype float64": lambda: undone(
        lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)
    ),
    "default dtype bfloat16": lambda: undone(
        lambda: torch.set_default_dtype(torch.bfloat16), lambda: torch.set_default_dtype(torch.float32)
    ),
    "default device meta": lambda: torch.device("meta"),
    "deterministic algorithms": lambda: undone(lambda: deterministic(True), lambda: deterministic(False)),
    "saved tensors on the CPU": torch.autograd.graph.save_on_cpu,
    "saved tensor hooks off": lambda: torch.autograd.graph.disable_saved_tensors_hooks("none"),
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "forward-mode AD": torch.autograd.forward_ad.dual_level,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "warnings are errors": warnings_are_errors,
    "NumPy raises": lambda: np.errstate(all="raise"),
    "a global module hook": a_global_hook,
}


@pytest.mark.parametrize("name", AROUND)
def test_surroundings_change_no_number(name: str, model: Model) -> None:
    expected, found = numbers(copy_of(model)), numbers(model, AROUND[name])
    for door, number in found.items():
        assert same(number, expected[door]), (door, number, expected[door])


def copy_of(model: Model) -> Model:
    """The same model once more."""
    return zoo("llama", "hooked" if not hasattr(model, "original_model") else "bridge", dtype=torch.float32)


def with_a_backward_hook(model: Model) -> None:
    model.blocks[1].register_full_backward_hook(lambda module, given, got: None)


def with_a_backward_pre_hook(model: Model) -> None:
    model.blocks[1].mlp.register_full_backward_pre_hook(lambda module, got: None)


def with_their_backward_hook(model: Model) -> None:
    model.add_hook("blocks.1.hook_resid_post", lambda gradient, hook: None, dir="bwd")


def with_gradient_checkpointing(model: Model) -> None:
    if hasattr(model, "original_model"):
        model.original_model.gradient_checkpointing_enable()


def with_caches_and_states_on(model: Model) -> None:
    if hasattr(model, "original_model"):
        model.original_model.config.use_cache = True
        model.original_model.config.output_hidden_states = True


NO_CHANGE: dict[str, Callable[[Model], Any]] = {
    "a backward hook": with_a_backward_hook,
    "a backward pre-hook": with_a_backward_pre_hook,
    "a backward hook of TransformerLens": with_their_backward_hook,
    "a hook on a parameter": lambda model: next(model.parameters()).register_hook(lambda gradient: gradient),
    "no gradients for weights": lambda model: model.requires_grad_(False),
    "gradient checkpointing": with_gradient_checkpointing,
    "cache and states on": with_caches_and_states_on,
    "no tokenizer": lambda model: setattr(model, "tokenizer", None),
    "no n_ctx": lambda model: setattr(model.cfg, "n_ctx", None),
    "a name of two lines": lambda model: setattr(model.cfg, "model_name", "a\nb"),
    "results of each head": lambda model: model.set_use_attn_result(True),
    "the MLP's input": lambda model: model.set_use_hook_mlp_in(True),
}


@pytest.mark.parametrize("name", NO_CHANGE)
def test_what_is_done_to_a_model_without_changing_its_function(name: str, model: Model) -> None:
    expected = numbers(copy_of(model))
    NO_CHANGE[name](model)
    for door, number in numbers(model).items():
        assert same(number, expected[door]), (door, number, expected[door])


# ---------------------------------------------------------------- what makes it another function, and is measured


class Doubled(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def a_weight(model: Model) -> tuple[torch.nn.Module, str]:
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return (linear[0], "weight") if hasattr(model, "original_model") else (model.blocks[0].mlp, "W_in")


def scaled_in_place(value: torch.Tensor, hook: Any = None) -> None:
    value.mul_(1.5)


CHANGES: dict[str, Callable[[Model], Any]] = {
    "a parametrised weight": lambda model: parametrize.register_parametrization(*a_weight(model), Doubled()),
    "a pruned weight": lambda model: prune.l1_unstructured(*a_weight(model), amount=0.5),
    "a hook that writes in place": lambda model: model.add_hook("hook_embed", scaled_in_place),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_function_is_measured_as_it_is(name: str, model: Model) -> None:
    before = numbers(model)
    CHANGES[name](model)
    after = numbers(model)
    assert not same(after["truth"], before["truth"])
    reached = osl.measured_sensitivity(model, IDS, probes=None).values
    assert torch.allclose(reached, differences(model), rtol=0.03)


def differences(model: Model, step: float = 0.02) -> torch.Tensor:
    """‖∂y_n/∂v_i‖_F by central differences, an entry at a time."""
    ids, nudge, kept = torch.tensor([IDS]), {}, []

    def move(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
        moved = value.clone()
        moved[0, nudge["pos"], nudge["entry"]] += nudge["by"]
        return moved

    hooks = [("blocks.0.hook_resid_pre", move)]
    reading = model.unembed.register_forward_pre_hook(lambda module, read: kept.append(read[0][0, -1].double()))
    rows = []
    for pos in range(len(IDS)):
        columns = []
        for entry in range(model.cfg.d_model):
            for by in (step, -step):
                nudge.update(pos=pos, entry=entry, by=by)
                with torch.no_grad():
                    model.run_with_hooks(ids, fwd_hooks=hooks)
            columns.append((kept[-2] - kept[-1]) / (2 * step))
        rows.append(torch.stack(columns).norm())
    reading.remove()
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_between_calls(dtype: torch.dtype, model: Model) -> None:
    before = numbers(model)
    after = numbers(model.to(dtype))
    assert torch.allclose(after["truth"].double(), before["truth"].double(), rtol=0.1)
    again = numbers(model.to(torch.float32))
    assert torch.allclose(again["truth"].double(), before["truth"].double(), rtol=0.1)


# ---------------------------------------------------------------- what is refused, and named


def halved(model: Model) -> None:
    model.blocks[1].mlp.half()


def no_numbers(model: Model) -> None:
    with torch.no_grad():
        list(model.blocks[1].parameters())[-1].view(-1)[-1] = torch.nan


def fails(*args: Any, **kwargs: Any) -> None:
    raise ValueError("boom\nof two lines")


REFUSED: dict[str, tuple[Callable[[Model], Any], str]] = {
    "an MLP in half precision": (halved, "own forward pass"),
    "weights in float8": (lambda model: [weight for weight in model.parameters() if _to(weight)], "Float8"),
    "a forward that fails": (lambda model: setattr(model.blocks[0].mlp, "forward", fails), "boom of two lines"),
    "a NaN in one weight": (no_numbers, "NaN"),
    "a cfg without vocabulary": (lambda model: setattr(model.cfg, "d_vocab", None), "cfg"),
    "a cfg of a larger vocabulary": (lambda model: setattr(model.cfg, "d_vocab", 500), "own forward pass"),
    "no blocks": (lambda model: setattr(model, "blocks", torch.nn.ModuleList()), "a list of blocks"),
    "a hook that gives NaN": (
        lambda model: model.add_hook("blocks.1.hook_resid_pre", lambda value, hook: value * torch.nan),
        "NaN or infinite logits",
    ),
    "a hook that opens the mask": (
        lambda model: model.add_hook("blocks.1.attn.hook_attn_scores", lambda value, hook: 0 * value.nan_to_num()),
        "not causal",
    ),
    "a random hook": (
        lambda model: model.add_hook("blocks.1.hook_resid_pre", lambda value, hook: value + torch.rand_like(value)),
        "the hooks of yours on blocks.1",
    ),
}


def _to(weight: torch.Tensor) -> None:
    weight.data = weight.data.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_refused_by_name_at_every_door(name: str, model: Model) -> None:
    change, words = REFUSED[name]
    change(model)
    for door, said in numbers(model).items():
        assert isinstance(said, str), door
        assert words in said, (door, said)


@pytest.mark.parametrize("mode", ["vmap", "grad", "fake tensors"])
def test_transforms_and_fake_tensors_are_named(mode: str, model: Model) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    said: list[str] = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        said.extend(str(number) for number in numbers(model).values())
        return x.sum()

    if mode == "vmap":
        torch.func.vmap(ask)(torch.ones(2, 3))
    elif mode == "grad":
        torch.func.grad(ask)(torch.ones(3))
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            said.extend(str(number) for number in numbers(model).values())
    assert len(said) == len(DOORS)
    assert all("expected ordinary tensors" in line for line in said)


def test_a_hook_that_gives_what_the_model_cannot_take_is_named(model: Model) -> None:
    model.add_hook(
        "blocks.1.hook_resid_pre", lambda value, hook: value[..., :3]
    )  # a HookedTransformer takes another dtype
    found = numbers(model)
    for door in ("record", "batch", "truth", "collapse"):
        assert "blocks.1" in str(found[door]), (door, found[door])


def test_a_hook_that_raises_raises_its_own(model: Model) -> None:
    def raises(value: torch.Tensor, hook: Any = None) -> None:
        raise KeyError("mine")

    model.add_hook("blocks.1.hook_resid_pre", raises)
    for door, ask in DOORS.items():
        if door != "support":
            with pytest.raises(KeyError, match="mine"):
                ask(model, IDS)


def test_checkpointing_in_training_refuses_what_it_breaks() -> None:
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    model = zoo("llama", "bridge", dtype=torch.float32)
    model.original_model.gradient_checkpointing_enable()
    model.train()
    found = numbers(model)
    assert isinstance(found["record"], torch.Tensor)
    if osl.support(model)["truth"].state == "refused":
        assert "cannot be differentiated" in found["truth"]
    else:
        assert torch.allclose(found["truth"].double(), numbers(copy_of(model))["truth"].double(), rtol=1e-4)


def test_split_inputs_are_normalised_out_of_sight_and_not_frozen() -> None:
    """A bridge then calls the norm that it wraps three times, where a detached divisor would not be noticed."""
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    model = zoo("llama", "bridge", dtype=torch.float32)
    model.set_use_split_qkv_input(True)
    assert "out of the hooks' sight" in numbers(model)["norms frozen"]


def test_blocks_that_are_not_all_of_the_models_are_not_taken_for_it() -> None:
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    model = zoo("llama", "bridge", dtype=torch.float32)
    model.blocks = torch.nn.ModuleList(list(model.blocks)[:1])
    found = numbers(model)
    for door in ("norms frozen", "attention frozen", "collapse"):
        assert "is not what the final norm reads" in found[door], door


def test_a_copy_is_measured_as_its_original(model: Model) -> None:
    osl.support(model)
    if hasattr(model, "original_model"):
        twin = copy.deepcopy(model)  # its forward looks at the original, which must be there
        assert same(numbers(twin)["truth"], numbers(model)["truth"])
        return
    assert same(numbers(copy.deepcopy(model))["truth"], numbers(model)["truth"])


def test_weights_that_are_no_longer_tied_are_the_models_own(model: Model) -> None:
    before = numbers(model)
    with torch.no_grad():
        next(model.unembed.parameters()).mul_(1.5)
    assert same(numbers(model)["truth"], before["truth"])  # y is what the unembedding reads


@pytest.mark.parametrize("n_ctx", [2, 4, 7])
def test_a_context_shorter_than_the_proof(n_ctx: int, model: Model) -> None:
    expected = osl.measured_sensitivity(model, IDS[:n_ctx], probes=None).values
    model.cfg.n_ctx = n_ctx
    assert torch.allclose(osl.measured_sensitivity(model, IDS[:n_ctx], probes=None).values, expected)
    assert "n_ctx" in numbers(model, ids=[1] * 9)["record"]


@pytest.mark.parametrize(
    "config",
    [
        {"n_layers": 1, "num_hidden_layers": 1},
        {"n_heads": 1, "n_key_value_heads": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
        {"vocab_size": 3, "d_vocab": 3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
    ],
    ids=["one layer", "one head", "three tokens"],
)
def test_small_structures(config: dict[str, int], model: Model) -> None:
    hooked = not hasattr(model, "original_model")
    known = {"n_layers", "n_heads", "n_key_value_heads", "d_vocab"}
    own = {key: value for key, value in config.items() if (key in known) == hooked}
    if hooked and "n_heads" in own:
        own |= {"d_head": 4, "rotary_dim": 4}
    small = zoo("llama", "hooked" if hooked else "bridge", dtype=torch.float32, **own)
    found = numbers(small, ids=[1, 2, 0, 1])
    assert torch.allclose(osl.measured_sensitivity(small, [1, 2, 0, 1], probes=None).values, found["truth"]), found[
        "truth"
    ]
    assert isinstance(found["record"], torch.Tensor), found["record"]


# ---------------------------------------------------------------- adapters


class Adapter(torch.nn.Module):
    """A linear module with something of low rank beside it, which a word switches off."""

    def __init__(self, inside: torch.nn.Linear) -> None:
        super().__init__()
        self.inside, self.off = inside, False
        self.beside = torch.nn.Linear(inside.in_features, inside.out_features, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.inside.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x) if self.off else self.inside(x) + self.beside(x)


def test_an_adapter_that_is_switched_on_and_off_is_noticed() -> None:
    """No weight and no mode changes, and what was proven with it off would be said of it on."""
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    model = zoo("llama", "bridge", dtype=torch.float32)
    plain = numbers(copy_of(model))
    projection = model.blocks[1].attn.q
    projection._modules["_original_component"] = adapter = Adapter(projection.original_component)
    adapter.off = True
    assert same(numbers(model)["record"], plain["record"])
    adapter.off = False
    found = numbers(model)
    assert not same(found["truth"], plain["truth"])
    assert "differs from hook_q" in found["record"]
    assert "refused" in found["support"][:4]
    adapter.off = True
    assert same(numbers(model)["support"], plain["support"])


def test_low_rank_adapters_of_peft() -> None:
    """Active, disabled and merged: what the model computes is what is measured."""
    if not has_bridge():
        pytest.skip(NO_BRIDGE)
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    wanted = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    plain = transformers_model("llama", dtype=torch.float32)
    adapted = peft.get_peft_model(copy.deepcopy(plain), wanted).eval()
    merged = numbers(bridge_over(copy.deepcopy(adapted).merge_and_unload()))
    active = bridge_over(adapted.get_base_model())
    with adapted.disable_adapter():
        assert same(numbers(active)["record"], numbers(bridge_over(plain))["record"])
    found = numbers(active)
    assert torch.allclose(found["truth"], merged["truth"], rtol=1e-3)
    assert isinstance(merged["record"], torch.Tensor)
    assert found["support"][0] == "refused"


# ---------------------------------------------------------------- token ids of all kinds

GOOD_IDS: dict[str, Callable[[], Any]] = {
    "a tuple": lambda: tuple(IDS),
    "a range": lambda: range(1, 7),
    "NumPy": lambda: np.array(IDS),
    "NumPy int32": lambda: np.array(IDS, dtype=np.int32),
    "uint8": lambda: torch.tensor(IDS, dtype=torch.uint8),
    "int32": lambda: torch.tensor(IDS, dtype=torch.int32),
    "one row": lambda: [IDS],
    "every other": lambda: torch.arange(1, 13)[::2],
}
BAD_IDS: dict[str, Callable[[], Any]] = {
    "bool": lambda: torch.ones(4, dtype=torch.bool),
    "float": lambda: torch.tensor(IDS).float(),
    "floats": lambda: [1.0, 2.0],
    "complex": lambda: torch.tensor([1j, 2]),
    "meta": lambda: torch.tensor(IDS, device="meta"),
    "sparse": lambda: torch.tensor(IDS).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.tensor([1.0, 2.0]), 1.0, 0, torch.quint8),
    "nested": lambda: torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([1])]),
    "negative": lambda: [1, -1, 3],
    "out of range": lambda: [1, 50, 3],
    "huge": lambda: [1, 2**70],
    "nearly huge": lambda: [1, 2**63 - 1],
    "empty": list,
    "no text": str,
    "one": lambda: [3],
    "too long": lambda: [3] * 40,
    "two rows": lambda: [IDS, IDS],
    "ragged": lambda: [[1, 2], [3]],
    "three axes": lambda: torch.zeros(1, 1, 4, dtype=torch.long),
    "no axis": lambda: torch.tensor(3),
    "nothing": lambda: None,
    "a dict": lambda: {"input_ids": IDS},
    "bytes": lambda: b"abc",
    "words": lambda: ["a", "b"],
    "a set": lambda: {1, 2},
    "a generator": lambda: (i for i in IDS),
    "mixed": lambda: [1, "a"],
    "surrogates": lambda: "a\ud800",
}


@pytest.mark.parametrize("name", GOOD_IDS)
def test_ids_that_are_whole_numbers(name: str, model: Model) -> None:
    expected = osl.record(model, list(range(1, 7)) if name == "a range" else IDS).last_residuals
    if name == "every other":
        expected = osl.record(model, [1, 3, 5, 7, 9, 11]).last_residuals
    assert torch.equal(osl.record(model, GOOD_IDS[name]()).last_residuals, expected)


@pytest.mark.parametrize("name", BAD_IDS)
def test_ids_that_are_none(name: str, model: Model) -> None:
    for door in ("record", "truth", "batch"):
        with pytest.raises(InputError) as caught:
            DOORS[door](model, BAD_IDS[name]())
        assert "\n" not in str(caught.value)
