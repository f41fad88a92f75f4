"""How the tokens of a reply are picked from a model's logits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked: greedily at temperature 0, else drawn, by a seed of its own for every prompt and draw."""

    temperature: float = 0.0
    seed: int = 0
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"expected 0 (greedy) or more, got temperature={self.temperature}")
        if self.max_new_tokens < 1:
            raise InputError(f"expected at least 1, got max_new_tokens={self.max_new_tokens}")


GREEDY = Sampling()


class Pick:
    """Picks one reply's tokens: the likeliest, or by one uniform number a token from a generator of its own."""

    def __init__(self, sampling: Sampling, prompt: str, draw: int) -> None:
        self.temperature = sampling.temperature
        key = hashlib.sha256(f"{sampling.seed}:{draw}:{prompt}".encode("utf-8", "surrogatepass")).digest()
        self.random = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)

    def __call__(self, logits: Float[Tensor, " vocab"]) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        steps = (logits.double() / self.temperature).softmax(0).cumsum(0)
        height = torch.rand((), generator=self.random, dtype=torch.float64) * steps[-1]
        return min(int(torch.searchsorted(steps, height, right=True)), len(steps) - 1)
