"""The step from a token's embedding to another one's, as the residual stream that enters the first block shows it.

A derivative knows no step of its own. Weighted with the steps that a token can really take, J_i (e_w − e_i) for words
w, it says to first order how far y_n moves when another word stands at i.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oversquash_lens.capture.architecture import LAYER_HOOKS
from oversquash_lens.capture.hooks import attached, without_cache
from oversquash_lens.capture.subject import Subject

AT_ONCE = 4096  # words that are embedded together


class _EnteredError(Exception):
    """Ends a pass where the first block begins, and carries what enters it."""


class VocabularySteps:
    """Makes of a covector ω_i one whose length is the root mean square of ω_i·(e_w − e_i) over all words w.

    The mean square is ω C ω with C = Σ + (μ − e_i)(μ − e_i)ᵀ, μ and Σ being the mean and covariance of the embeddings.
    """

    def __init__(self, subject: Subject, ids: Int[Tensor, " pos"]) -> None:
        words, width = torch.arange(subject.model.cfg.d_vocab, device="cpu"), subject.model.cfg.d_model
        mean = torch.zeros(width, dtype=torch.float64, device="cpu")
        square = torch.zeros(width, width, dtype=torch.float64, device="cpu")
        for part in words.split(AT_ONCE):
            embedded = _entering(subject, part)
            mean += embedded.sum(0) / len(words)
            square += embedded.mT @ embedded / len(words)
        values, vectors = torch.linalg.eigh(square - mean[:, None] * mean)
        self._root = vectors * values.clamp(min=0).sqrt()
        self._offset = mean - _entering(subject, ids)

    def __call__(
        self, rows: Float[Tensor, "row pos d_model"], positions: slice = slice(None)
    ) -> Float[Tensor, "row pos step"]:
        """`positions`: which of the prompt's the rows are of."""
        rows = rows.double().cpu()
        return torch.cat([rows @ self._root, (rows * self._offset[positions]).sum(-1, keepdim=True)], dim=-1)


def _entering(subject: Subject, words: Int[Tensor, " word"]) -> Float[Tensor, "word d_model"]:
    """What enters the first block for each word as the only token, scaled and normalised as the model does it.

    Differences between words do not depend on the position: what it adds is the same for all.
    """

    def stop(residual: Tensor, hook: Any = None) -> None:
        raise _EnteredError(residual.detach()[:, 0].clone())

    model = subject.model
    with torch.no_grad(), attached(model, [(f"blocks.0.{LAYER_HOOKS['residual']}", stop)]):
        try:
            model(words[:, None].to(subject.device), **without_cache(model))
        except _EnteredError as entered:
            (residual,) = entered.args
            return residual.double().cpu()
    raise AssertionError("the first block was not entered")
