"""Attention as row blocks [head, dest, src]; the measures never see how they are kept.

Below them what positions do to queries, keys and scores, where the hooks show these before it only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from oversquash_lens.errors import InputError

BLOCK = 1 << 22  # scores [head, dest, src] that are alive at once while log-normalisers are computed


@runtime_checkable
class AttentionRows(Protocol):
    """One layer's attention, asked for a block of rows at a time."""

    @property
    def n_positions(self) -> int: ...

    @property
    def mixed(self) -> Float[Tensor, "head pos d_head"] | None:
        """Σ_k α^h_jk v_k as the model made it (hook_z); None where it must be computed from rows."""
        ...

    def rows(self, start: int, stop: int) -> Float[Tensor, "head dest src"]:
        """α^h_jk for dest positions start … stop-1 and every src position; rows sum to 1 (less with a sink)."""
        ...

    def causal(self, start: int, stop: int, out: Tensor | None = None) -> Float[Tensor, "head dest src"]:
        """The same for src positions 0 … stop-1, beyond which there is nothing.

        To be read, not written: it may be a view of what is kept. `out`, of the block's dtype and of at least its
        size, may be used as its memory, so that a loop over blocks asks for none.
        """
        ...


@dataclass(frozen=True)
class KeptAttention:
    """A whole layer's pattern as the model made it, in its own dtype."""

    pattern: Float[Tensor, "head dest src"]
    mixed: Float[Tensor, "head pos d_head"] | None = None

    @property
    def n_positions(self) -> int:
        return self.pattern.shape[-1]

    def rows(self, start: int, stop: int) -> Float[Tensor, "head dest src"]:
        _check(start, stop, self.n_positions)
        return self.pattern[:, start:stop]

    def causal(self, start: int, stop: int, out: Tensor | None = None) -> Float[Tensor, "head dest src"]:
        return self.rows(start, stop)[:, :, :stop]


@dataclass(frozen=True)
class UniformAttention:
    """Every head looks evenly at its own position and all earlier ones: what the causal mask alone would do."""

    n_positions: int
    n_heads: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    mixed: None = None

    def rows(self, start: int, stop: int) -> Float[Tensor, "head dest src"]:
        return _widened(self.causal(start, stop), self.n_positions)

    def causal(self, start: int, stop: int, out: Tensor | None = None) -> Float[Tensor, "head dest src"]:
        """One head's block, shown for all of them."""
        _check(start, stop, self.n_positions)
        share = 1 / torch.arange(start + 1, stop + 1, dtype=self.dtype, device=self.device)
        return share[:, None].expand(-1, stop).tril(start).expand(self.n_heads, -1, -1)


@dataclass(frozen=True)
class RecomputedAttention:
    """Rows made anew from queries and keys when asked for: exp(scale·q·k - log Σ exp), in memory that grows with pos.

    `query` and `key` are those that meet in the score, rotated and normalised, in the model's own dtype, keys once for
    each group of heads. `log_normaliser[h, j]` is the log of what row j of head h divides by; an attention sink is
    inside, so that rows then sum to less than 1. `soft_cap` is c of c·tanh(score / c); `window` how many positions a
    row sees; `bias[h, k]` what is added to every score of source k (ALiBi counted from the first position). Blocks
    come in float32, in float64 if queries are: half-precision models round their own scores and weights, by which
    theirs differ (SmolLM2: measures by 2 % in bfloat16, 0.3 % in float16).
    """

    query: Float[Tensor, "head pos d_head"]
    key: Float[Tensor, "kv_head pos d_head"]
    log_normaliser: Float[Tensor, "head pos"]
    mixed: Float[Tensor, "head pos d_head"] | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    window: int | None = None
    bias: Float[Tensor, "head pos"] | None = None

    def __post_init__(self) -> None:
        heads, n, d_head = self.query.shape
        shapes = {
            "keys": (self.key.shape[1:], (n, d_head)),
            "log-normalisers": (self.log_normaliser.shape, (heads, n)),
            "mixed values": ((heads, n) if self.mixed is None else self.mixed.shape[:2], (heads, n)),
            "biases": ((heads, n) if self.bias is None else self.bias.shape, (heads, n)),
            "heads to a group": ((heads % len(self.key) if len(self.key) else heads,), (0,)),
        }
        for name, (came, expected) in shapes.items():
            if tuple(came) != tuple(expected):
                raise InputError(
                    f"expected {tuple(expected)}, got attention of queries {tuple(self.query.shape)} with {name} of "
                    f"{tuple(came)}: record the prompt again"
                )

    @property
    def n_positions(self) -> int:
        return self.query.shape[1]

    def grouped(self, keys: Float[Tensor, "kv_head row d_head"]) -> Float[Tensor, "head row d_head"]:
        """Keys or values as each head reads them: repeated within its group."""
        return per_head(keys, len(self.query))

    def rows(self, start: int, stop: int) -> Float[Tensor, "head dest src"]:
        return _widened(self.causal(start, stop), self.n_positions)

    def causal(self, start: int, stop: int, out: Tensor | None = None) -> Float[Tensor, "head dest src"]:
        _check(start, stop, self.n_positions)
        first = self._first(start)
        if first:  # nothing before the window is computed
            near = self._weights(start, stop, first, None)
            block = _memory(near, (len(near), stop - start, stop), out)
            block[:, :, :first] = 0
            block[:, :, first:] = near
            return block
        return self._weights(start, stop, first, out)

    def at(self, rows: Int[Tensor, " row"]) -> Float[Tensor, "head row src"]:
        """Single rows, wherever they lie."""
        rows = rows.to(self.query.device)
        scores = self._scores(self.query[:, rows], 0, self.n_positions, None)
        scores.sub_(self.log_normaliser[:, rows, None].to(scores)).exp_()
        return scores.masked_fill_(self._hidden(rows, 0, self.n_positions), 0.0)

    def _weights(self, start: int, stop: int, first: int, out: Tensor | None) -> Float[Tensor, "head dest src"]:
        scores = self._scores(self.query[:, start:stop], first, stop, out)
        weights = scores.sub_(self.log_normaliser[:, start:stop, None].to(scores)).exp_()
        weights[:, :, start - first :].tril_()
        if self.window is not None and stop - self.window > first:
            weights.triu_(start - first - self.window + 1)
        return weights

    def _scores(
        self, query: Float[Tensor, "head dest d_head"], first: int, stop: int, out: Tensor | None
    ) -> Float[Tensor, "head dest src"]:
        """What the softmax reads, from some queries to keys first … stop-1; nothing is masked yet."""
        work = torch.promote_types(query.dtype, torch.float32)
        key = self.key[:, first:stop].to(work)
        grouped = (query.to(work) * self.scale).reshape(len(key), -1, query.shape[2])  # heads that share keys: as one
        memory = _memory(grouped, (len(key), grouped.shape[1], stop - first), out)
        scores = torch.bmm(grouped, key.mT, out=memory).view(*query.shape[:2], stop - first)
        if self.soft_cap is not None:
            scores.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        if self.bias is not None:
            scores += self.bias[:, None, first:stop].to(work)
        return scores

    def _hidden(self, rows: Int[Tensor, " row"], first: int, stop: int) -> Bool[Tensor, "row src"]:
        """What is later than a row, or before its window."""
        src = torch.arange(first, stop, device=rows.device)
        hidden = src > rows[:, None]
        return hidden if self.window is None else hidden | (rows[:, None] - src >= self.window)

    def _first(self, start: int) -> int:
        """The first position that anyone from `start` on sees."""
        return 0 if self.window is None else max(0, start - self.window + 1)


def recomputed_attention(
    query: Float[Tensor, "head pos d_head"],
    key: Float[Tensor, "kv_head pos d_head"],
    mixed: Float[Tensor, "head pos d_head"] | None = None,
    *,
    sinks: Float[Tensor, " head"] | None = None,
    **scores: Any,
) -> RecomputedAttention:
    """Attention of queries and keys alone: its log-normalisers are computed, some rows at a time.

    `sinks`: each head's score of nothing at all (gpt-oss), one more term of every row's sum; `scores`: scale, soft_cap,
    window and bias of `RecomputedAttention`.
    """
    heads, n, _ = query.shape
    unknown = query.new_zeros(heads, n, dtype=torch.promote_types(query.dtype, torch.float32))
    made = RecomputedAttention(query, key, unknown, mixed, **scores)
    rows = max(1, BLOCK // (heads * n))
    for start in range(0, n, rows):
        stop = min(n, start + rows)
        unknown[:, start:stop] = _log_sums(made, start, stop)
    if sinks is not None:
        torch.logaddexp(unknown, sinks.to(unknown)[:, None], out=unknown)
    return made


def _log_sums(attention: RecomputedAttention, start: int, stop: int) -> Float[Tensor, "head dest"]:
    """log Σ_k exp(score_jk) over what each row sees."""
    first = attention._first(start)
    scores = attention._scores(attention.query[:, start:stop], first, stop, None)
    dest = torch.arange(start, stop, device=scores.device)
    scores.masked_fill_(attention._hidden(dest, first, stop), -math.inf)
    most = scores.amax(-1, keepdim=True)
    return scores.sub_(most).exp_().sum(-1).log_().add_(most[..., 0])


def per_head(grouped: Tensor, n_heads: int, axis: int = 0) -> Tensor:
    """Grouped key/value heads repeated for the query heads that read them."""
    return grouped.repeat_interleave(n_heads // grouped.shape[axis], dim=axis)


def _memory(like: Tensor, shape: tuple[int, ...], out: Tensor | None) -> Tensor:
    """Memory for a block: the beginning of `out`, or new."""
    if out is None:
        return like.new_empty(shape)
    size = math.prod(shape)
    if out.numel() < size or out.dtype != like.dtype:
        raise InputError(
            f"expected at least {size} of {like.dtype}, got a buffer of {out.numel()} numbers of {out.dtype}: give "
            "none, or one of the largest block's size"
        )
    return out.view(-1)[:size].view(shape)


def _widened(block: Float[Tensor, "head dest src"], n: int) -> Float[Tensor, "head dest pos"]:
    """With the zeros of all later positions."""
    return torch.nn.functional.pad(block, (0, n - block.shape[2]))


def _check(start: int, stop: int, n: int) -> None:
    if not 0 <= start < stop <= n:
        raise InputError(f"expected 0 ≤ start < stop ≤ {n}, the number of positions, got rows {start}:{stop}")


# ------------------------------------------------------------ what positions do to queries, keys and scores


def halves_turned(
    x: Float[Tensor, "pos head d_head"], cos: Float[Tensor, "pos rotary"], sin: Float[Tensor, "pos rotary"]
) -> Float[Tensor, "pos head d_head"]:
    """The first `rotary` coordinates turned, each of their first half with its like in the second (NeoX, Llama)."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    across = torch.cat((-second, first), -1)
    return torch.cat((turned * cos[:, None] + across * sin[:, None], rest), -1)


def halves_turned_back(
    x: Float[Tensor, "pos head d_head"], cos: Float[Tensor, "pos rotary"], sin: Float[Tensor, "pos rotary"]
) -> Float[Tensor, "pos head d_head"]:
    """What `halves_turned` was given, also where the turn stretched it (YaRN)."""
    stretched = cos.square() + sin.square()
    return halves_turned(x, cos / stretched, -sin / stretched)


def pairs_turned(x: Float[Tensor, "pos head d_head"], rotary_dim: int) -> Float[Tensor, "pos head d_head"]:
    """Neighbouring pairs of the first `rotary_dim` coordinates turned by the position, at base 10000 (GPT-J)."""
    if not rotary_dim:
        return x
    place = torch.arange(0, rotary_dim, 2, device=x.device, dtype=torch.float64)
    position = torch.arange(len(x), device=x.device, dtype=torch.float64)
    angle = position[:, None, None] * 10000.0 ** (-place / rotary_dim)
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    even, odd = x[..., :rotary_dim:2], x[..., 1:rotary_dim:2]
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
    return torch.cat((pairs.flatten(-2), x[..., rotary_dim:]), -1)


def linear_bias(heads: int, n: int, like: Tensor) -> Float[Tensor, "head pos"]:
    """ALiBi: what every score of a source position gains, counted from the first position (Press et al. 2022).

    Slopes are 2^(-8/h), 2^(-16/h), … for h heads; where h is no power of two, those of the next lower one and then
    every other of the next higher one.

    >>> linear_bias(2, 3, torch.zeros(1))
    tensor([[0.0000, 0.0625, 0.1250],
            [0.0000, 0.0039, 0.0078]])
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]
    places = torch.arange(n, device=like.device, dtype=torch.float32)
    return (torch.tensor(slopes, device=like.device)[:, None] * places).to(like.dtype)
