"""The paper's lemmas on collapse as measures: what a softmax over a growing sequence can still tell apart.

Numbered as in the paper's appendix B. "x*" is x with its last token repeated (B.1), or other scores over the same
positions (B.2, B.4). The total variation carries no ½, as the paper's does not: Σ|p - q|, between 0 and 2.
Bounds that the paper leaves to a limit are worked out here for every n; each is proved in its docstring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.collapse.precision import number_format
from oversquash_lens.errors import InputError, whole_number


def total_variation(p: Float[Tensor, "*batch n"], q: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Σ|p - q| of two distributions: 0 where they are the same, 2 where they share nothing.

    >>> total_variation(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]))
    tensor(1.)
    """
    _check_alike(p, q)
    return (p - q).abs().sum(-1)


def softmax_total_variation(x: Float[Tensor, "*batch n"], x_star: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Total variation of softmax(x) and softmax(x*), computed in float64 (Lemma B.2, Proposition B.4)."""
    _check_alike(x, x_star)
    return total_variation(x.double().softmax(-1), x_star.double().softmax(-1))


def largest_weight(n: int, score_range: float) -> float:
    """No softmax weight over n scores is larger, if the scores lie within `score_range` of one another.

    1 / (1 + (n-1) e^-range): reached where one score is high and all others are low; tends to 0 as n grows.

    >>> largest_weight(4, 0.0)
    0.25
    """
    _check_length(n)
    return 1 / (1 + (n - 1) * math.exp(-score_range))


@dataclass(frozen=True)
class LastWeights:
    """How much the last token attends to itself at every length, and after it was repeated once more (Lemma B.1).

    `before[k]` is softmax(x_1 … x_k)_k and `after[k]` softmax(x_1 … x_k, x_k)_{k+1}; `bound` is what neither passes.
    """

    before: Float[Tensor, "*batch n"]
    after: Float[Tensor, "*batch n"]
    bound: Float[Tensor, "*batch n"]


def last_weights(scores: Float[Tensor, "*batch n"]) -> LastWeights:
    """Lemma B.1 at every length k = 1 … n of the scores: before > after, and both tend to 0.

    With a = e^{x_k}/Z the weight before, repeating makes it e^{x_k}/(Z + e^{x_k}) = a/(1+a), smaller by a²/(1+a).
    `bound` is `largest_weight` for the range of the first k scores, so bounded scores make both decay like 1/k.

    >>> last_weights(torch.zeros(3)).after
    tensor([0.5000, 0.3333, 0.2500], dtype=torch.float64)
    """
    _check_alike(scores, scores)
    x = scores.double()
    log_sum = x.logcumsumexp(-1)
    spread = x.cummax(-1).values - x.cummin(-1).values
    others = torch.arange(x.shape[-1], dtype=torch.float64, device=x.device)
    return LastWeights(
        before=(x - log_sum).exp(),
        after=(x - torch.logaddexp(log_sum, x)).exp(),
        bound=1 / (1 + others * (-spread).exp()),
    )


def total_variation_bound(x: Float[Tensor, " n"], x_star: Float[Tensor, " n"]) -> float:
    """Lemma B.2 with its rate: softmax(x) and softmax(x*) are no further apart than this (0 … 2).

    The smaller of two bounds, with d = x - x*, p = softmax(x*) and R the range of x*:

    - 2 tanh((max d - min d)/4): on any set A of positions, q(A) = mr/(mr + 1 - m) with m = p(A) and r at most
      e^(max d - min d), and q(A) - p(A) is largest at m = 1/(1 + √r). Sharp: Proposition B.4 reaches it.
    - 2 `largest_weight`(n, R) Σ|e^{d_i} - 1|: u = p e^d has ‖u/‖u‖ - p‖ ≤ 2 ‖u - p‖, in the 1-norm. For n scores
      of bounded range this is at most 2 e^R times the mean of |e^{d_i} - 1|, so it tends to 0 whenever d_i does:
      that is the lemma, whatever the first k differences are.

    >>> total_variation_bound(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == alternating_total_variation(2)
    True
    """
    _check_alike(x, x_star)
    x, x_star = x.double(), x_star.double()
    difference = x - x_star
    sharp = 2 * math.tanh((difference.max() - difference.min()).item() / 4)
    weight = largest_weight(len(x), (x_star.max() - x_star.min()).item())
    return min(sharp, 2 * weight * difference.expm1().abs().sum().item())


def alternating_total_variation(n: int) -> float:
    """Total variation of softmax(1, 0, 1, 0, …) and softmax(0, 1, 0, 1, …) over n scores (Proposition B.4).

    With a = ⌈n/2⌉ and b = ⌊n/2⌋ it is 2ab(e²-1) / ((ae+b)(be+a)): 2(e-1)/(e+1) = 0.924 for every even n, and tends
    to that for odd n. So B.2 needs its assumption: where scores differ at all lengths, nothing collapses.

    >>> round(alternating_total_variation(1000), 4)
    0.9242
    """
    _check_length(n)
    a, b = (n + 1) // 2, n // 2
    if a == b:
        return 2 * math.tanh(0.5)
    return 2 * a * b * (math.e**2 - 1) / ((a * math.e + b) * (b * math.e + a))


def ratio_representation(
    digits: str, *, n_layers: int = 1, d_model: int = 16, n_heads: int = 2, causal: bool = False, seed: int = 0
) -> Float[Tensor, " d_model"]:
    """The last token's final representation in a random Transformer without positions (Proposition B.9).

    Without a causal mask only the ratio of token kinds survives, for a weighted mean does not change when all of its
    terms are doubled: "10" and "1100" give the same vector. With the mask they do not from two layers on, as tokens
    then differ by what precedes them; the last token of a single layer sees all of the others either way.
    float64, pre-norm (RMS) with a plain MLP; the weights depend on the seed and the sizes alone.
    """
    sizes = min(n_layers, d_model, n_heads)
    if not (digits.isascii() and digits.isdigit()) or sizes < 1 or d_model % n_heads:
        raise InputError(
            "expected digits such as '1100', at least one layer, and heads that divide d_model, got "
            f"digits={digits!r}, n_layers={n_layers}, d_model={d_model}, n_heads={n_heads}"
        )
    source = torch.Generator().manual_seed(seed)

    def drawn(rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        return torch.randn(rows, columns, generator=source, dtype=torch.float64, device="cpu") / math.sqrt(d_model)

    v = drawn(10, d_model)[[int(digit) for digit in digits]] * math.sqrt(d_model)
    hidden = torch.full((len(v), len(v)), causal, device="cpu").triu(1)
    for _ in range(n_layers):
        query, key, value, output = (drawn(d_model, d_model) for _ in range(4))
        q, k, u = (_heads(_normed(v) @ weight, n_heads) for weight in (query, key, value))
        scores = (q @ k.mT / math.sqrt(d_model // n_heads)).masked_fill(hidden, -math.inf)
        z = v + (scores.softmax(-1) @ u).transpose(0, 1).reshape(len(v), d_model) @ output
        v = z + torch.tanh(_normed(z) @ drawn(d_model, 4 * d_model)) @ drawn(4 * d_model, d_model)
    return _normed(v)[-1]


def _normed(v: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
    return v / v.square().mean(-1, keepdim=True).sqrt()


def _heads(x: Float[Tensor, "pos d_model"], n_heads: int) -> Float[Tensor, "head pos d_head"]:
    return x.reshape(len(x), n_heads, -1).transpose(0, 1)


def counting_limit(relative: Float[Tensor, " n"], fmt: Any) -> int | None:
    """The number of ones from which on a format cannot promise to tell k of them from k+1 (Corollary B.10).

    `relative[k-1]` is ‖y(k) - y(k+1)‖ / ‖y(k)‖ for k = 1 … n. The limit is the first k from which on all of them are
    below the format's machine epsilon ε; None if the last is not. The promise: numbers that round to the same one
    are at most ε of it apart, so while a relative distance is above ε/(1 - ε/2) the stored vectors differ (in the
    format's normal range). Beyond the limit neighbours may still differ by luck, where a rounding boundary lies
    between them.

    >>> counting_limit(torch.tensor([0.5, 0.005, 0.02, 0.006, 0.004]), "bfloat16")
    4
    """
    apart = (~(relative < number_format(fmt).epsilon)).nonzero()  # NaN is apart too: it promises nothing
    limit = int(apart[-1]) + 2 if len(apart) else 1
    return limit if limit <= len(relative) else None


def averaging_counting_limit(v0: Float[Tensor, " d_model"], v1: Float[Tensor, " d_model"], fmt: Any) -> int | None:
    """`counting_limit` in closed form for the simplest model: one layer that averages, no positions.

    After a token v0 and k ones its representation is (v0 + k v1)/(k+1), which moves by ‖v1 - v0‖/((k+1)(k+2)) with
    the next one. That is below ε‖v1‖, v1 being where all tend to, from k = √(‖v1 - v0‖/(ε‖v1‖) + ¼) - 1½ on: about
    10 ones in bfloat16, 31 in float16, 2895 in float32 if v0 = 0. None where v1 = 0.
    """
    step, size = (v1.double() - v0.double()).norm().item(), v1.double().norm().item()
    if size == 0:
        return None
    root = math.sqrt(step / (number_format(fmt).epsilon * size) + 0.25) - 1.5
    return max(1, math.floor(root) + 1)


def _check_length(n: int) -> None:
    whole_number("n", n)


def _check_alike(p: Any, q: Any) -> None:
    """Two tensors of one shape, with something in them."""
    if not all(isinstance(each, Tensor) for each in (p, q)):
        came = next(type(each).__name__ for each in (p, q) if not isinstance(each, Tensor))
        raise InputError(f"expected a torch.Tensor, got a {came}: wrap the numbers in torch.tensor(…)")
    if p.shape != q.shape or not p.numel():
        raise InputError(
            f"expected both of one shape, at least one number each, got tensors of the shapes {tuple(p.shape)} and "
            f"{tuple(q.shape)}"
        )
