"""What tells that a model is the one that something was found of: its weights, its settings, the user's hooks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from oversquash_lens.capture.hooked_model import HookedModel, wrapped_config, wrapped_model
from oversquash_lens.capture.passes import all_modules, hooks_on

SAMPLES = 64  # numbers of a large weight that its fingerprint looks at; of a small one it looks at all
SMALL = 4096


def weights_fingerprint(model: HookedModel) -> tuple:
    """Changes when a weight does: where it lies, how often it was written, and a sample of its numbers."""
    marks, samples = [], []
    for _, weight in named_weights(model):
        marks.append((weight.data_ptr(), weight._version, tuple(weight.shape), weight.dtype))
        samples.append(_sample(weight))
    home = samples[0].device if samples else torch.device("cpu")
    digest = torch.cat([each.to(home) for each in samples]).cpu() if samples else torch.zeros(0, device="cpu")
    return tuple(marks), digest.numpy().tobytes()


def named_weights(model: HookedModel) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer once."""
    seen: set[int] = set()
    for owner in (model, wrapped_model(model)):
        if isinstance(owner, nn.Module):
            for name, weight in (*nn.Module.named_parameters(owner), *nn.Module.named_buffers(owner)):
                if id(weight) not in seen:
                    seen.add(id(weight))
                    yield name, weight.detach()


def _sample(weight: Tensor) -> Float[Tensor, " number"]:
    if not weight.is_contiguous():
        return weight.reshape(-1)[:: max(1, weight.numel() // SAMPLES)].float()
    flat = weight.view(-1)
    return (flat if weight.numel() <= SMALL else flat[:: weight.numel() // SAMPLES]).float()


def settings_fingerprint(model: HookedModel) -> tuple:
    """Changes with the settings of either config and with the mode of any module."""
    words = [
        (key, value)
        for config in (model.cfg, wrapped_config(model))
        for key, value in sorted(vars(config).items() if config is not None else ())
        if isinstance(value, str | int | float | bool | None | torch.dtype)
    ]
    return tuple(words), bytes(module.training for module in all_modules(model))


def hooks_fingerprint(model: HookedModel) -> tuple[int, ...]:
    """The user's forward hooks by their ids, which are never given twice."""
    return tuple(number for module in all_modules(model) for number in hooks_on(module))
