"""What tells a model from others, for results that are kept: label, weights, and what it computes as it is now."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from oversquash_lens.capture.about import software_versions
from oversquash_lens.capture.subject import Subject

SAMPLES = 64  # numbers of each weight that its mark looks at
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
        digest.update(_sample(weight.detach()))
    versions = software_versions()
    for name in ("python", "oversquash-lens"):  # measures have numbers of definition instead
        versions.pop(name)
    label = {"model": about.model, "class": about.model_class, "dtype": about.dtype}
    return label | {"weights": digest.hexdigest()[:32], "computes": _computes(subject), "versions": versions}


def _sample(weight: Tensor) -> bytes:
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
