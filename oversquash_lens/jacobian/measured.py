"""The truth: how much y_n, what the unembedding reads, really moves with each position's embedding.

‖∂y_n/∂v_i⁽⁰⁾‖ by autograd from `unembed.hook_in` at the last position to `blocks.0.hook_resid_pre`. One backward pass
gives every position at once, so the exact norm costs d_model products whatever the prompt's length, and a few
Gaussian probes estimate the Frobenius norm with a standard error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.about import About, describe
from oversquash_lens.capture.architecture import Architecture, read_architecture
from oversquash_lens.capture.checks import patterns_are_used
from oversquash_lens.capture.hooked_model import HookedModel
from oversquash_lens.capture.mlp import random_source
from oversquash_lens.capture.size import size_of
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.support import architecture_support, refuse_unsupported
from oversquash_lens.capture.tokens import Prompt, TokenizedPrompt, tokenize
from oversquash_lens.errors import InputError, ModelError, whole_number
from oversquash_lens.jacobian.costs import fitting_memory, product_bytes, truth_route
from oversquash_lens.jacobian.relay import Relay, relayed
from oversquash_lens.jacobian.tape import Tape, taped
from oversquash_lens.numerics import json_numbers

NORMS = ("fro", "spectral")
FREEZABLE = ("attention", "norms")
ENOUGH = 16  # tokens that show whether a model uses the patterns that its hooks show
MEMORY = 1 << 30  # bytes that one batch of backward products may take


@dataclass(frozen=True)
class MeasuredSensitivity:
    """‖∂y_n/∂v_i‖ for every position i, measured. `standard_error` is 0 where `exact`."""

    tokens: tuple[str, ...]
    values: Float[Tensor, " pos"]
    standard_error: Float[Tensor, " pos"]
    exact: bool
    norm: str
    freeze: tuple[str, ...]
    probes: int | None
    seed: int | None
    about: About

    @property
    def share(self) -> Float[Tensor, " pos"]:
        """Each position's part of the sum of sensitivities; sums to 1."""
        return self.values / self.values.sum()

    def to_dict(self) -> dict:
        tensors = {name: json_numbers(getattr(self, name)) for name in ("values", "standard_error", "share")}
        rest = {name: value for name, value in vars(self).items() if name not in tensors and name != "about"}
        return {"kind": "measured", **rest, **tensors, "about": asdict(self.about)}


def measured_sensitivity(
    model: Any,
    prompt: Prompt,
    *,
    probes: int | None = 16,
    norm: str = "fro",
    freeze: Sequence[str] = (),
    seed: int = 0,
    chat: bool = False,
    bos: bool | None = None,
    memory: int = MEMORY,
    progress: bool = False,
) -> MeasuredSensitivity:
    """Measure how much the prediction's input moves with each position's embedding, in its own units.

    `probes=None` is exact (d_model vector-Jacobian products, batched within `memory` bytes), norm "fro" or
    "spectral"; `probes=K` estimates the Frobenius norm from K Gaussian probes (K = 16: about 6 %). `freeze`
    detaches the attention weights and/or the norms' divisors, as the paper's assumptions do.

    A graph that would take more than a quarter of the memory there is, is made one block at a time, each block being
    run twice: hooks of your own must do the same thing both times, which is checked. From 512 tokens on a bridge whose
    attention can be fused (and is not frozen, or hooked by you) makes no patterns, in memory that grows as n; the
    result then differs by float32 rounding.
    """
    _check_options(probes, norm, freeze)
    tokenized = tokenize(model, prompt, chat=chat, bos=bos)
    architecture = read_architecture(model)
    memory = fitting_memory(Subject.of(model), len(tokenized.ids), memory, spectral=norm == "spectral", freeze=freeze)
    tape = differentiate(model, architecture, tokenized, freeze)
    if probes is None:
        values = exact_norms(tape, (norm,), memory, progress)[norm]
        error = torch.zeros_like(values)
    else:
        rows, _ = probe_rows(tape, probes, seed, memory, progress)
        values, error = frobenius_estimate(rows)
    return MeasuredSensitivity(
        tokens=tokenized.tokens,
        values=values,
        standard_error=error,
        exact=probes is None,
        norm=norm,
        freeze=tuple(freeze),
        probes=probes,
        seed=None if probes is None else seed,
        about=replace(describe(model, architecture), bos=tokenized.bos, chat=tokenized.chat),
    )


def differentiate(
    model: HookedModel, architecture: Architecture, tokenized: TokenizedPrompt, freeze: Iterable[str] = ()
) -> Tape | Relay:
    """One forward pass that can be differentiated, the named parts held fixed, on the route of `truth_route`."""
    n, size = len(tokenized.ids), size_of(model)
    if "attention" in freeze:
        _check_pattern_is_used(model, architecture, tokenized)
    route = truth_route(Subject(model, architecture), n, freeze)
    one = product_bytes(size, n, route)
    if route == "whole":
        return taped(model, architecture, tokenized, freeze, one)
    return relayed(model, architecture, tokenized, freeze, one, fused=route == "fused")


def exact_norms(
    tape: Tape | Relay, norms: Sequence[str], memory: int = MEMORY, progress: bool = False
) -> dict[str, Float[Tensor, " pos"]]:
    """The asked norms of every ∂y_n/∂v_i from d_model products; the spectral one holds whole Jacobians.

    Where these pass `memory`, positions are taken in windows and the products computed again for each.
    """
    d_model, n = tape.output.shape[0], tape.leaf.shape[1]
    window = n
    if "spectral" in norms:
        window = max(1, min(n, memory // (d_model * d_model * tape.output.element_size())))
    found: dict[str, list[Tensor]] = {norm: [] for norm in norms}
    eye = torch.eye(d_model, device="cpu")
    for start in range(0, n, window):
        columns = slice(start, start + window)
        squares, jacobian = 0, []
        for rows in tape.products(eye, memory, progress):
            rows = rows[:, columns]
            squares = squares + torch.linalg.vector_norm(rows.cpu(), dim=(0, 2), dtype=torch.float64).square()
            if "spectral" in norms:
                jacobian.append(rows)
        if "fro" in norms:
            found["fro"].append(squares.sqrt())
        if "spectral" in norms:
            found["spectral"].append(_spectral(torch.cat(jacobian).transpose(0, 1)))
    return {norm: torch.cat(parts).cpu() for norm, parts in found.items()}


def probe_rows(
    tape: Tape | Relay, probes: int, seed: int, memory: int = MEMORY, progress: bool = False
) -> tuple[Float[Tensor, "probe pos d_model"], Float[Tensor, "probe d_model"]]:
    """ω ∂y_n/∂v_i for Gaussian ω, and the ω: each row's ‖·‖² is an unbiased estimate of ‖∂y_n/∂v_i‖_F²."""
    covectors = torch.randn(
        probes, tape.output.shape[0], generator=random_source(seed), dtype=torch.float64, device="cpu"
    )
    return torch.cat([rows.cpu() for rows in tape.products(covectors, memory, progress)]), covectors


def frobenius_estimate(
    rows: Float[Tensor, "probe pos d_model"],
) -> tuple[Float[Tensor, " pos"], Float[Tensor, " pos"]]:
    """Root of the mean square of ωJ, and its standard error: value · √(alike / 2K) from K probes.

    `alike` estimates ‖JJᵀ‖_F²/‖J‖_F⁴, one over J's effective rank, from how parallel the rows of two probes are, which
    tells more than the scatter of K squares does. One probe alone gets the largest error possible, that of rank 1.
    """
    gram = einsum(rows.double(), rows.double(), "a pos d, b pos d -> pos a b")
    squares = gram.diagonal(dim1=1, dim2=2)
    values = squares.mean(1).sqrt()
    pairs = 1 - torch.eye(len(rows), dtype=gram.dtype, device="cpu")
    parallel = (gram.square() * pairs).sum((1, 2))
    whole = (squares[:, :, None] * squares[:, None, :] * pairs).sum((1, 2))
    alike = torch.where(whole > 0, parallel / whole, 1.0)
    return values, values * (alike / (2 * len(rows))).sqrt()


def _spectral(jacobian: Float[Tensor, "pos out d_model"]) -> Float[Tensor, " pos"]:
    """Largest singular values, by way of Gram matrices of what is brought to size 1: no square underflows."""
    size = jacobian.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(jacobian.dtype).tiny)
    unit = (jacobian / size).cpu()  # not every device has eigenvalues, or float64
    largest = torch.linalg.eigvalsh(unit @ unit.mT)[:, -1].clamp(min=0).sqrt()
    return largest.double() * size[:, 0, 0].cpu().double()


def _check_options(probes: int | None, norm: str, freeze: Sequence[str]) -> None:
    if norm not in NORMS:
        raise InputError(f"expected 'fro' or 'spectral', got norm {norm!r}")
    if isinstance(freeze, str) or not set(freeze) <= set(FREEZABLE):
        raise InputError(f"expected a subset of ('attention', 'norms'), got freeze={freeze!r}")
    if probes is not None:
        whole_number("probes", probes, otherwise=", or None for the exact norm")
    if probes is not None and norm == "spectral":
        raise InputError("expected probes=None, got norm='spectral' with probes: probes estimate 'fro' only")


def _check_pattern_is_used(model: HookedModel, architecture: Architecture, tokenized: TokenizedPrompt) -> None:
    """Where attention is delegated, edits of hook_pattern are dropped in silence, and detaching freezes nothing."""
    refuse_unsupported(architecture_support(architecture), "attention frozen", model.cfg.model_name or "this model")
    if not patterns_are_used(model, architecture, tokenized.batch(model)[:, :ENOUGH]):
        raise ModelError(
            f"{model.cfg.model_name}: halving its attention patterns changes nothing; expected hook_pattern to be "
            "what the model uses: freezing attention is not possible with this model class"
        )
