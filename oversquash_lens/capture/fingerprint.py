"""What tells that a model is the one that something was found of: its weights, its settings, the user's hooks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from oversquash_lens.capture.hooked_model import HookedModel, software_versions, wrapped_config, wrapped_model
from oversquash_lens.capture.passes import all_modules, hooks_on

if TYPE_CHECKING:
    from oversquash_lens.capture.subject import Subject


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


PROBE = 8  # tokens of the pass that tells a hooked model from the plain one, and log-probabilities kept of it
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # of these, in nats: other rounding, not another function
COARSE = 0.25  # … in formats of 16 bits


def model_identity(subject: Subject) -> dict[str, Any]:
    """Label, class and format, a mark of the weights (a sample of each), some log-probabilities, and the versions.

    The log-probabilities are those of a pass of at most eight tokens with all hooks that are on the model: a model
    with a steering hook is another one than without. They compare within a tolerance, everything else exactly.
    """
    about, digest = subject.about, hashlib.sha256()
    for name, weight in sorted(subject.model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(_weight_bytes(weight.detach()))
    versions = software_versions()
    for name in ("python", "oversquash-lens"):  # measures have numbers of definition instead
        versions.pop(name)
    label = {"model": about.model, "class": about.model_class, "dtype": about.dtype}
    return label | {"weights": digest.hexdigest()[:32], "computes": _computes(subject), "versions": versions}


def _weight_bytes(weight: Tensor) -> bytes:
    if weight.is_meta or not weight.numel():  # offloaded: its shape has to do
        return b""
    flat = weight.flatten()
    return flat[:: max(1, len(flat) // SAMPLES)].cpu().double().contiguous().numpy().tobytes()


@torch.no_grad()
def _computes(subject: Subject) -> dict[str, Any]:
    """Log-probabilities of some tokens behind a few others, spread over the vocabulary."""
    model, vocabulary = subject.model, subject.model.cfg.d_vocab
    n = min(PROBE, subject.architecture.n_ctx)
    ids = torch.tensor([[vocabulary * (2 * i + 1) // (2 * n) for i in range(n)]], device=subject.device)
    logs = model(ids)[0, -1].detach().cpu().double().log_softmax(-1)
    places = [vocabulary * (2 * i + 1) // (2 * PROBE) for i in range(PROBE)]
    dtype = next(model.parameters()).dtype
    return {"values": logs[places].tolist(), "tolerance": TOLERANCE.get(dtype, COARSE)}
