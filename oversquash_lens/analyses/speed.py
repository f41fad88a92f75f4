"""How fast this machine is for this model: one layer's worth of each kind of work, timed before a forecast.

Seconds per unit of work, so that a forecast is shapes times speed and knows no machine: products at the model's own
shape, attention at the prompt's own length (what fits a cache is several times as fast).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from oversquash_lens.capture.size import Size

REPEATS = 3  # the fastest counts: a busy machine makes everything slower, nothing faster
ENTRIES = 1 << 24  # of [head, dest, src] at most, of a longer prompt some rows
BLOCK = 1 << 20  # of them at a time where all kinds of path are summed: measure/block.py
ROWS = 512  # positions of the product


@dataclass(frozen=True)
class Speed:
    """Seconds: per multiply-add of a matrix product; per entry of [head, dest, src] for one layer's attention (scores,
    mask, softmax, mix), and where blocks of its rows fit a cache; per multiply-add in float64.
    """

    product: float
    attention: float
    blocked: float
    double: float


def measure_speed(
    size: Size, n: int, dtype: torch.dtype, device: torch.device | str, clock: Callable[[], float] = time.perf_counter
) -> Speed:
    """Time one layer's worth of work at the prompt's length: less than a second for a small model."""
    made = {"dtype": dtype, "device": device}
    left = torch.ones(min(n, ROWS), size.d_model, **made)
    right = torch.ones(size.d_model, max(size.d_mlp, size.d_model), **made)
    wide = torch.ones(*(min(size.d_model, 512),) * 2, dtype=_widest(device), device=device)

    def attention(entries: int) -> float:
        rows = max(1, min(n, entries // (size.n_heads * n)))
        query, key = (torch.ones(size.n_heads, length, size.d_head, **made) for length in (rows, n))

        def attend() -> Tensor:
            scores = query @ key.mT
            return torch.where(scores > 0, scores, -1.0).softmax(-1) @ key

        return _fastest(attend, clock) / (size.n_heads * rows * n)

    with torch.no_grad():
        return Speed(
            product=_fastest(lambda: left @ right, clock) / (left.numel() * right.shape[1]),
            attention=attention(ENTRIES),
            blocked=attention(BLOCK),
            double=_fastest(lambda: wide @ wide, clock) / wide.numel() ** 1.5,
        )


def _widest(device: torch.device | str) -> torch.dtype:
    """Apple's accelerator has no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def _fastest(step: Callable[[], Tensor], clock: Callable[[], float]) -> float:
    """Seconds of the fastest of a few runs; the first, which warms up, does not count."""
    _finished(step())
    times = []
    for _ in range(REPEATS):
        begun = clock()
        _finished(step())
        times.append(clock() - begun)
    return min(times)


def _finished(result: Tensor) -> None:
    """Wait for an accelerator that works on by itself."""
    if result.device.type == "cuda":
        torch.cuda.synchronize(result.device)
    elif result.device.type == "mps":
        torch.mps.synchronize()
