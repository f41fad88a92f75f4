"""The part of the full gate that needs passes of its own: recording changes nothing, and what is shown is used."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from oversquash_lens.capture import checks
from oversquash_lens.capture.architecture import LAYER_HOOKS, Architecture
from oversquash_lens.capture.hooked_model import HookedModel
from oversquash_lens.capture.passes import attached
from oversquash_lens.errors import HookMismatchError


def verify_pass(model: HookedModel, architecture: Architecture, ids: Int[Tensor, "one pos"], recorded: Any) -> None:
    """Run the model again without our hooks, and once with halved patterns; an error says what does not fit."""
    shown: list[Tensor] = []
    handle = model.unembed.register_forward_hook(lambda module, inputs, logits: shown.append(logits.detach()))
    try:
        with torch.no_grad():
            plain = model(ids)
    finally:
        handle.remove()
    checks.check_same("logits", recorded, plain, "the recorded pass", "a plain pass", architecture.dtype)
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or 0.0
    unembedded = cap * torch.tanh(shown[0] / cap) if cap > 0 else shown[0]
    checks.check_same(
        "logits", unembedded[:, -1:], plain[:, -1:], "y · W_U + b_U", "the model's logits", architecture.dtype
    )
    if not architecture.delegated and not patterns_are_used(model, architecture, ids):
        raise HookMismatchError(
            "attn.hook_pattern: halving all attention patterns changes nothing; expected the patterns that the hooks "
            "show to be those that the model uses: load it with attn_implementation='eager'"
        )


def patterns_are_used(model: HookedModel, architecture: Architecture, ids: Int[Tensor, "one pos"]) -> bool:
    """Whether an edit of hook_pattern reaches what the heads make of it; delegated attention drops it in silence."""
    caught = []

    def mixed(z: Tensor, hook: Any = None) -> None:
        caught.append(z.detach().clone())

    def halve(pattern: Tensor, hook: Any = None) -> Tensor:
        return pattern * 0.5

    halved = [(f"blocks.{i}.{LAYER_HOOKS['pattern']}", halve) for i in range(architecture.n_layers)]
    for hooks in ([], halved):
        with torch.no_grad(), attached(model, [(f"blocks.0.{LAYER_HOOKS['z']}", mixed), *hooks]):
            model(ids)
    return not torch.equal(*caught)
