"""Sabotage: a model that does not do what its hooks show is caught, and the hook and its layer are named.

The patches go beneath the hooks, into the modules themselves (torch's own hooks on them), so that nothing but the
gate can notice. Nine layers, both classes, LayerNorm and RMSNorm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import NO_BRIDGE, NO_HOOKED, bridge, has_bridge, has_hooked, hooked, tokens_for
from torch import nn

import oversquash_lens as osl
from oversquash_lens.errors import HookMismatchError, ModelError

Model = Any
LAYERS = 9
MODELS: dict[str, Callable[[], Model]] = {
    "hooked-ln": lambda: hooked(31, n_layers=LAYERS, n_heads=4, d_model=16, strength=0.3),
    "hooked-rms": lambda: hooked(
        32, norm="RMS", gated=True, act="silu", positions="rotary", n_layers=LAYERS, kv_heads=1, strength=0.3
    ),
    "bridge-gpt2": lambda: bridge(33, "gpt2", n_layers=LAYERS),
    "bridge-llama": lambda: bridge(34, "llama", n_layers=LAYERS),
}
PROMPT = tokens_for(5, 12)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    if not (has_hooked() if request.param.startswith("hooked") else has_bridge()):
        pytest.skip(NO_HOOKED if request.param.startswith("hooked") else NO_BRIDGE)
    made = MODELS[request.param]()
    osl.record(made, PROMPT, verify=True)  # before the sabotage all is well
    return made


def point(model: Model, layer: int, name: str) -> nn.Module:
    return model.hook_dict[f"blocks.{layer}.{name}"]


def refused(model: Model, *said: str, **how: Any) -> None:
    with pytest.raises(HookMismatchError) as caught:
        osl.record(model, PROMPT, attention="kept", **how)  # rows made anew have their own in test_attention.py
    message = str(caught.value)
    assert all(word in message for word in said), message
    assert "expected" in message
    assert "\n" not in message


def beneath(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """What the module returns is changed, out of sight of every TransformerLens hook on it."""
    module.register_forward_hook(lambda module, inputs, output: change(output))


def test_one_layer_shows_another_pattern_than_it_uses(model: Model) -> None:
    """Whoever looks sees another head's pattern; the true one goes on."""
    shown = point(model, 3, "attn.hook_pattern")
    look = type(shown).__call__
    lie = {"__call__": lambda self, pattern: (look(self, pattern.roll(1, dims=1)), pattern)[1]}
    shown.__class__ = type("Liar", (type(shown),), lie)
    refused(model, "layer 3, attn.hook_z", "pattern · v differs")


def test_one_layer_uses_rows_that_do_not_sum_to_one(model: Model) -> None:
    beneath(point(model, 3, "attn.hook_pattern"), lambda pattern: pattern * 0.9)
    refused(model, "layer 3, attn.hook_pattern", "sum to 1")


@pytest.mark.parametrize(("layer", "name"), [(2, "attn.hook_z"), (5, "mlp.hook_pre"), (8, "hook_resid_pre")])
def test_one_hook_never_fires(layer: int, name: str, model: Model) -> None:
    silent = point(model, layer, name)
    silent.__class__ = type("Mute", (type(silent),), {"__call__": lambda self, value: value})
    refused(model, f"layer {layer}", name, "did not fire")


def test_one_hook_fires_twice(model: Model) -> None:
    twice = point(model, 4, "mlp.hook_pre")
    calls = type(twice).__call__
    twice.__class__ = type("Echo", (type(twice),), {"__call__": lambda self, value: calls(self, calls(self, value))})
    refused(model, "layer 4, mlp.hook_pre", "second time")


def test_a_norm_is_misplaced(model: Model) -> None:
    """It reads more than the residual: what it divides by is not what the residual has."""
    model.blocks[6].ln1.register_forward_pre_hook(lambda module, inputs: (2.5 * inputs[0],))
    refused(model, "layer 6, ln1.hook_scale", "stands elsewhere")


def test_the_norm_of_the_mlp_is_misplaced(model: Model) -> None:
    """Where a class shows the residual as what this norm reads, it is the residual that is said to be wrong."""
    model.blocks[6].ln2.register_forward_pre_hook(lambda module, inputs: (2.5 * inputs[0],))
    hooked = type(model).__name__ == "HookedTransformer"
    refused(model, "layer 6, ln2.hook_scale" if hooked else "layer 6, hook_resid_mid", "expected")


def test_attention_leaks_to_the_future(model: Model) -> None:
    def unmasked(scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(scores < -1e4, 0.0)

    beneath(point(model, 1, "attn.hook_attn_scores"), unmasked)
    with pytest.raises(ModelError, match="is not causal: later tokens change the logits"):  # the proof is there first
        osl.record(model, PROMPT)


def test_one_nan_appears_at_layer_7(model: Model) -> None:
    def poisoned(out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[0, 4, 2] = torch.nan
        return out

    beneath(point(model, 7, "hook_mlp_out"), poisoned)
    with pytest.raises(ModelError, match="gives NaN or infinite logits"):  # the proof is there first
        osl.record(model, PROMPT)


def test_a_layer_writes_something_else(model: Model) -> None:
    beneath(point(model, 2, "hook_attn_out"), lambda out: out * 1.1)
    refused(model, "layer 2, hook_resid_mid", "residual stream")


def test_the_logits_are_not_those_of_what_the_unembedding_reads(model: Model) -> None:
    beneath(model.unembed, lambda logits: logits * 1.1)
    refused(model, "the unembedding", "W_U")


def test_a_lie_between_the_sampled_positions_is_found_by_the_full_gate(model: Model) -> None:
    """One MLP writes something else at one early position: only `verify` looks there."""

    def once(out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[0, 3] *= 1.5
        return out

    beneath(point(model, 2, "hook_mlp_out"), once)
    osl.record(model, PROMPT)
    refused(model, "layer 2", "hook_resid_post", "residual stream", verify=True)


def test_a_pass_that_recording_changes(model: Model) -> None:
    """A model whose answer depends on who is listening."""
    listened = point(model, 5, "mlp.hook_post")

    def vain(out: torch.Tensor) -> torch.Tensor:
        return out * (1.2 if listened.fwd_hooks else 1.0)

    beneath(point(model, 0, "hook_resid_pre"), vain)
    refused(model, "logits", "a plain pass", verify=True)
