"""What the benchmark runs, by name: steps on models that a process loads once, and only those that are asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

import oversquash_lens as osl
from benchmarks import peers
from benchmarks.long_text import long_prompt
from benchmarks.timing import plain
from oversquash_lens.paths.kinds import VARIANTS

KINDS = (*VARIANTS, "mean_field")


class Bench:
    """One prompt of `n` tokens before one model class and before the plain transformers model of the same weights."""

    def __init__(self, kind: str, n: int) -> None:
        self.kind, self.n = kind, n
        self._trace: Any = None

    @cached_property
    def model(self) -> Any:
        model = osl.load_model(kind=self.kind, device="cpu")
        plain(model, torch.arange(8))  # a bridge's first pass installs hooks of its own
        return model

    @cached_property
    def twin(self) -> Any:
        return self._weights.model.eval()

    @cached_property
    def tokens(self) -> torch.Tensor:
        tokenizer = self.model.tokenizer if "model" in vars(self) else self._weights.tokenizer
        return torch.tensor(long_prompt(tokenizer, self.n))

    @cached_property
    def _weights(self) -> Any:
        from oversquash_lens.models.loading import load_twin

        return load_twin(device="cpu")

    @cached_property
    def kept(self) -> Any:
        """A trace with its patterns, for what is computed from the same ones."""
        return osl.record(self.model, self.tokens, attention="kept")

    def load(self, step: str) -> None:
        """What the step needs beside its own work."""
        _ = self.twin if step in PLAIN else self.model
        _ = self.tokens
        if step in FROM_KEPT:
            _ = self.kept

    # -- ours, and what it is set against --

    def forward(self) -> None:
        plain(self.model, self.tokens)

    def fused(self) -> None:
        """Hugging Face's own pass with fused attention, all logits."""
        with torch.no_grad():
            self.twin(self.tokens[None], use_cache=False)

    def record(self) -> None:
        self._trace = osl.record(self.model, self.tokens)

    def sweep(self) -> None:
        """Every bound and the mean-field estimate of what `record` has left."""
        from oversquash_lens.paths.profiles import profiles

        trace, self._trace = self._trace, None
        profiles(trace, KINDS)

    def lens(self) -> None:
        self.record()
        self.sweep()

    # -- peers --

    def row(self) -> None:
        osl.path_bound(self.kept, "rollout")

    def rollout(self) -> None:
        peers.rollout([layer.rows(0, self.n) for layer in self.kept.attention])

    def recomputed_row(self) -> None:
        osl.path_bound(osl.record(self.model, self.tokens, attention="recomputed"), "rollout")

    def cached_rollout(self) -> None:
        peers.rollout(peers.cached_patterns(self.model, self.tokens))

    def alti(self) -> None:
        peers.alti(self.model, self.tokens)

    def gradient(self) -> None:
        peers.gradient_times_input(self.twin, self.tokens)

    def inseq(self) -> None:
        peers.inseq_input_x_gradient(self.twin, self._weights.tokenizer, self.tokens)

    def captum(self) -> None:
        peers.integrated_gradients(self.twin, self.tokens)


PLAIN = ("fused", "gradient", "inseq", "captum")  # steps of the model without hooks
FROM_KEPT = ("row", "rollout")
STEPS: dict[str, Callable[[Bench], None]] = {
    name: getattr(Bench, name)
    for name in (
        *("forward", "fused", "record", "sweep", "lens", "row", "rollout", "recomputed_row", "cached_rollout"),
        *("alti", "gradient", "inseq", "captum"),
    )
}
