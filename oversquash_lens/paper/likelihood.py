"""How likely each of many candidates is after one prompt, in few passes.

The prompt runs once and leaves its key/value cache. The candidates' tokens form a trie, each shared beginning once,
so the numbers 0 … 200 cost few tokens; all its nodes then run as one extra sequence in which every token sees the
prompt and its own ancestors only (a tree mask), at the position that it has in its own candidate. Prompts that begin
alike, such as the same question about ever longer sequences, share that beginning's cache (a trunk).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from oversquash_lens.capture.prefixes import common
from oversquash_lens.errors import ModelError
from oversquash_lens.paper.engines import Hooked, Plain, numbers

TRIAL = 3  # continuations that are checked against passes of their own before a tree mask is trusted
AGREEMENT = {torch.float64: 1e-3, torch.float32: 1e-2}  # in nats, by what the model computes in
COARSE_AGREEMENT = 0.5  # … for 16-bit formats; a mask that is read wrongly is off by several nats
REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, ModelError)  # of a model that wants other masks


@dataclass(frozen=True)
class Trie:
    """Candidates' tokens with shared beginnings once; node i hangs on `parents[i]` < i, -1 being the prompt's end."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Trie:
        """`ends[c]` is the node of candidate c's last token.

        >>> Trie.of([[7, 1], [7, 1, 2], [7, 3]])
        Trie(tokens=(7, 1, 2, 3), parents=(-1, 0, 1, 0), depths=(0, 1, 2, 1), ends=(1, 2, 3))
        """
        nodes: dict[tuple[int, int], int] = {}
        depths: list[int] = []
        ends = []
        for sequence in sequences:
            node = -1
            for depth, token in enumerate(sequence):
                node = nodes.setdefault((node, token), len(nodes))
                if node == len(depths):
                    depths.append(depth)
            ends.append(node)
        parents, tokens = zip(*nodes, strict=True) if nodes else ((), ())
        return cls(tokens, parents, tuple(depths), tuple(ends))

    def path(self, node: int) -> list[int]:
        """Nodes from the prompt's end down to `node`."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def ancestry(self) -> Bool[Tensor, "node node"]:
        """[i, j]: whether node j is i or one of its ancestors."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen

    def branch(self, node: int) -> list[int]:
        """The tokens down to `node`."""
        return [self.tokens[each] for each in self.path(node)]

    def leaves(self) -> list[int]:
        inner = set(self.parents)
        return [node for node in range(len(self.tokens)) if node not in inner]


@dataclass(frozen=True)
class Trunk:
    """A prompt that has been read, for others that begin as it does: each runs only from where it parts with it."""

    ids: tuple[int, ...]
    cache: Any

    @classmethod
    def of(cls, engine: Plain | Hooked, ids: Sequence[int]) -> Trunk:
        cache = engine.cache(1)
        _read(engine, ids, 0, cache)
        return cls(tuple(ids), cache)

    def shared(self, ids: Sequence[int]) -> int:
        """How many tokens at its beginning `ids` has in common with the trunk, its last one never counted."""
        return common(self.ids, tuple(ids[:-1]))


@dataclass(frozen=True)
class Continuations:
    """A prompt that has been read: its cache, its length and the logits of whatever comes next."""

    engine: Plain | Hooked
    cache: Any
    n: int
    first: Float[Tensor, " vocab"]
    memory: int

    @classmethod
    def of(
        cls, engine: Plain | Hooked, prompt: Sequence[int], memory: int, trunk: Trunk | None = None
    ) -> Continuations:
        """Run the prompt once; `memory` bytes are what everything after it may take."""
        start = trunk.shared(prompt) if trunk else 0
        cache = engine.fork(trunk.cache, 1, start) if start else engine.cache(1)
        return cls(engine, cache, len(prompt), _read(engine, prompt, start, cache), memory)

    def log_likelihoods(
        self,
        candidates: Sequence[Sequence[int]],
        closing: Sequence[int],
        closed: Sequence[bool],
    ) -> Float[Tensor, " candidate"]:
        """Joint log-probability of each candidate's tokens after the prompt's, natural log, float64.

        A candidate that is `closed` counts together with what may follow it: anything but the tokens in `closing`.
        """
        found = torch.empty(len(candidates), dtype=torch.float64)
        order = sorted(range(len(candidates)), key=lambda index: list(candidates[index]))
        most_nodes = max(8, self.memory // (3 * 4 * len(self.first)))
        for part in _parts(order, candidates, most_nodes):
            trie = Trie.of([candidates[index] for index in part])
            logits = torch.cat([self.first[None], self._node_logits(trie)])
            found[part] = _sums(trie, _log_softmax(logits), closing, [closed[index] for index in part])
        return found

    def _node_logits(self, trie: Trie) -> Float[Tensor, "node vocab"]:
        """What is predicted after each node: one pass where a tree mask can be trusted, else leaf by leaf."""
        window = self.engine.sliding_window
        if self.engine.tree is None:
            self.engine.tree = self._tree_agrees(trie)
        if not self.engine.tree or (window and self.n + max(trie.depths) >= window):
            return self.leaf_by_leaf(trie)
        logits = self.as_tree(trie, self.cache)
        self.engine.forget(self.cache, len(trie.tokens))
        return logits

    def _tree_agrees(self, trie: Trie) -> bool:
        """Whether this model reads a tree mask as it is meant, tried once on a few branches."""
        few = Trie.of([trie.branch(leaf) for leaf in trie.leaves()[:TRIAL]])
        expected = _log_softmax(self.leaf_by_leaf(few))
        try:
            found = _log_softmax(self.as_tree(few, self.engine.fork(self.cache, 1, self.n)))
        except REFUSALS:
            return False
        return bool((found - expected).abs().max() < AGREEMENT.get(self.first.dtype, COARSE_AGREEMENT))

    def as_tree(self, trie: Trie, cache: Any) -> Float[Tensor, "node vocab"]:
        """All nodes in one sequence: each sees the prompt and its own ancestors, at its own depth's position."""
        size, device, dtype = len(trie.tokens), self.engine.device, self.first.dtype
        mask = torch.zeros(size, self.n + size, dtype=dtype)
        mask[:, self.n :].masked_fill_(~trie.ancestry(), torch.finfo(dtype).min)
        positions = torch.tensor([trie.depths], device=device) + self.n
        ids = torch.tensor([trie.tokens], device=device)
        return self.engine.forward(ids, cache, mask[None, None].to(device), positions, last=False)[0]

    def leaf_by_leaf(self, trie: Trie) -> Float[Tensor, "node vocab"]:
        """Every leaf's branch as a row of its own behind a copy of the prompt's cache; slower, for any model."""
        paths = [trie.path(leaf) for leaf in trie.leaves()]
        width = max(map(len, paths))
        row_bytes = self.engine.cache_bytes(self.n + width) + 3 * 4 * width * len(self.first)
        rows = max(1, self.memory // row_bytes)
        found = self.first.new_empty(len(trie.tokens), len(self.first))
        for start in range(0, len(paths), rows):
            some = paths[start : start + rows]
            ids = torch.tensor([[trie.tokens[node] for node in path] + [0] * (width - len(path)) for path in some])
            positions = torch.arange(self.n, self.n + width).expand(len(some), -1)
            mask = torch.ones(len(some), self.n + width, dtype=torch.long)
            ids, mask, positions = (each.to(self.engine.device) for each in (ids, mask, positions))
            cache = self.engine.fork(self.cache, len(some), self.n)
            logits = self.engine.forward(ids, cache, mask, positions, last=False)
            for row, path in zip(logits, some, strict=True):
                found[path] = row[: len(path)]
        return found


def _read(engine: Plain | Hooked, ids: Sequence[int], start: int, cache: Any) -> Float[Tensor, " vocab"]:
    """Run `ids` from `start` on, where the cache ends; the logits of what comes next."""
    new = torch.tensor([list(ids[start:])], device=engine.device)
    positions = torch.arange(start, len(ids), device=engine.device)[None]
    mask = torch.ones(1, len(ids), dtype=torch.long, device=engine.device)
    return engine.forward(new, cache, mask, positions, last=True)[0, -1]


def _parts(order: list[int], candidates: Sequence[Sequence[int]], most_nodes: int) -> list[list[int]]:
    """Neighbouring candidates together, as many as make a trie of `most_nodes`, one at the least."""
    if len(order) == 1 or len(Trie.of([candidates[index] for index in order]).tokens) <= most_nodes:
        return [order]
    middle = len(order) // 2
    return _parts(order[:middle], candidates, most_nodes) + _parts(order[middle:], candidates, most_nodes)


def _sums(
    trie: Trie, log_probs: Float[Tensor, "node vocab"], closing: Sequence[int], closed: list[bool]
) -> Float[Tensor, " candidate"]:
    """Row 0 of `log_probs` is what follows the prompt, row i + 1 what follows node i."""
    parents = torch.tensor(trie.parents, device=log_probs.device) + 1
    own = log_probs[parents, torch.tensor(trie.tokens, device=log_probs.device)].tolist()
    joint: list[float] = []
    for node, parent in enumerate(trie.parents):
        joint.append(own[node] + (joint[parent] if parent >= 0 else 0.0))
    others = torch.ones(log_probs.shape[-1], dtype=torch.bool, device=log_probs.device)
    others[list(closing)] = False
    stops = log_probs[:, others].logsumexp(-1).tolist()
    return torch.tensor(
        [joint[end] + (stops[end + 1] if shut else 0.0) for end, shut in zip(trie.ends, closed, strict=True)],
        dtype=torch.float64,
    )


def _log_softmax(logits: Float[Tensor, "node vocab"]) -> Float[Tensor, "node vocab"]:
    return numbers(logits).log_softmax(-1)
