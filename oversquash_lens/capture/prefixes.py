"""Many token sequences as few forward passes: what is a prefix of another is read off that one's pass.

A causal model's activations at a position know nothing of what follows, so a sequence that begins another costs
nothing; one that shares a beginning with another branches off it and costs its own ending only: it is run against the
keys and values of the trunk. A bridge runs many endings as one sequence: a mask lets each see its own beginning and
itself, and positions say where each stands. A HookedTransformer takes neither, so there they are a batch whose cached
keys are masked out beyond each beginning; with gaps, each unbroken piece is a pass of its own, and what it computes
takes its place among the keys and values that the next piece sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from oversquash_lens.capture.hooked_model import HookedModel, device_of, is_hooked_transformer, wrapped_model
from oversquash_lens.capture.hooks import without_cache
from oversquash_lens.errors import ModelError

TOKENS = 256  # of endings in one pass: enough to fill the cores, few enough for [head, TOKENS, pos] to be small

Ids = tuple[int, ...]
Start = tuple[int, int, int]  # a branch's number, and the batch row and column of its first token in a pass
Watch = Callable[[list[Start]], AbstractContextManager[Any]]  # entered around a pass, with what lies where in it


@dataclass(frozen=True)
class Branch:
    """`suffix` stands in place of a trunk's tokens at `positions`: those from `fork` on, where these are not given.

    With gaps between the positions, what lies between keeps the trunk's keys and values.
    """

    fork: int
    suffix: Ids
    positions: Ids = ()

    @property
    def places(self) -> Sequence[int]:
        return self.positions or range(self.fork, self.fork + len(self.suffix))


@dataclass(frozen=True)
class Trunk:
    """A sequence run whole, and those that leave it on the way."""

    ids: Ids
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Place:
    """Where a sequence's last token is computed: row `position` of a trunk's own pass, or of one of its branches."""

    trunk: int
    branch: int | None
    position: int


@dataclass(frozen=True)
class Home:
    """Where a sequence that begins no other is run; its first `shared` tokens are its trunk's."""

    trunk: int
    branch: int | None
    fork: int
    shared: int


@dataclass(frozen=True)
class PassPlan:
    """`places[i]` belongs to the i-th sequence that was planned for."""

    trunks: tuple[Trunk, ...]
    places: tuple[Place, ...]

    @property
    def tokens(self) -> int:
        """How many tokens are run in all."""
        return sum(len(t.ids) + sum(len(b.suffix) for b in t.branches) for t in self.trunks)


def plan(sequences: Sequence[Ids], *, branching: bool = True, together: Set[Ids] = frozenset()) -> PassPlan:
    """The fewest trunks for these sequences; without `branching` only whole prefixes are shared.

    A sequence branches off where at least half of it is shared; else it is a trunk itself. The last token of a
    sequence in `together` is run in one pass with the token before it: where it would be the first of a branch, the
    branch begins one token earlier.

    >>> plan([(7, 1), (7, 1, 1), (8, 2)]).trunks
    (Trunk(ids=(7, 1, 1), branches=()), Trunk(ids=(8, 2), branches=()))
    >>> plan([(7, 8, 1, 1, 1), (7, 8, 2)]).trunks
    (Trunk(ids=(7, 8, 1, 1, 1), branches=(Branch(fork=2, suffix=(2,), positions=()),)),)
    """
    waiting = sorted(_leaves(set(sequences)), key=len, reverse=True)
    trunks: list[Trunk] = []
    homes: dict[Ids, Home] = {}
    while waiting:
        ids = waiting.pop(0)
        homes[ids] = Home(len(trunks), None, 0, 0)
        branches: list[Branch] = []
        others: list[Ids] = []
        for leaf in waiting:
            shared = common(ids, leaf)
            fork = shared - 1 if leaf[: shared + 1] in together else shared
            if branching and 2 * fork >= len(leaf):
                homes[leaf] = Home(len(trunks), len(branches), fork, shared)
                branches.append(Branch(fork, leaf[fork:]))
            else:
                others.append(leaf)
        trunks.append(Trunk(ids, tuple(branches)))
        waiting = others
    return PassPlan(tuple(trunks), _places(sequences, homes))


def separate(sequences: Sequence[Ids]) -> PassPlan:
    """Every sequence in a pass of its own: the way that sharing is checked against."""
    places = tuple(Place(number, None, len(ids) - 1) for number, ids in enumerate(sequences))
    return PassPlan(tuple(Trunk(ids, ()) for ids in sequences), places)


def _leaves(sequences: Set[Ids]) -> list[Ids]:
    """Those that begin no other; in lexical order a prefix stands right before what it begins."""
    ordered = sorted(sequences)
    return [one for one, after in zip(ordered, [*ordered[1:], ()], strict=False) if after[: len(one)] != one]


def common(a: Ids, b: Ids) -> int:
    """Length of the common beginning, by halving: slices compare fast, Python loops do not.

    >>> common((7, 1, 1), (7, 1, 2))
    2
    """
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _places(sequences: Sequence[Ids], homes: dict[Ids, Home]) -> tuple[Place, ...]:
    """Each sequence in the leaf that it begins, found by one walk in lexical order; trunks before branches."""
    found: dict[Ids, Place] = {}
    home = Home(0, None, 0, 0)
    for one in sorted(set(sequences), reverse=True):
        home = homes.get(one, home)
        aside = len(one) > home.shared
        found[one] = Place(home.trunk, home.branch if aside else None, len(one) - 1 - (home.fork if aside else 0))
    return tuple(found[one] for one in sequences)


# ------------------------------------------------------------ passes


def run_trunk(model: HookedModel, ids: Ids, *, cached: bool = False, batch: int = 1) -> Any:
    """One pass over a sequence; its key/value cache if that is wanted."""
    rows = torch.tensor([ids] * batch, device=device_of(model))
    if not cached:
        model(rows, **without_cache(model))
        return None
    if is_hooked_transformer(model):
        cache = hooked_cache_class().init_cache(model.cfg, model.cfg.device, batch)
        model(rows, past_kv_cache=cache, attention_mask=torch.ones_like(rows))
        return cache
    from transformers import DynamicCache

    cache = DynamicCache()
    with cache_argument(model, cache) as given:
        model(rows, use_cache=True, **given)
    return cache


@contextmanager
def cache_argument(model: HookedModel, cache: Any) -> Iterator[dict[str, Any]]:
    """The keys and values that came before, under the name that transformers' model inside a bridge has for them.

    From transformers 5.24 on that is `cache`; a bridge of an earlier TransformerLens looks for `past_key_values`, and
    within the block its attention is told both.
    """
    known = signature(wrapped_model(model).forward).parameters
    if "past_key_values" in known or "cache" not in known:
        yield {"past_key_values": cache}
        return

    def also(attn: Any, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return arguments, {"past_key_values": named.get("cache"), **named}

    with ExitStack() as stack:
        for block in model.blocks:
            if isinstance(getattr(block, "attn", None), nn.Module):
                stack.enter_context(block.attn.register_forward_pre_hook(also, with_kwargs=True))
        yield {"cache": cache}


def run_branches(
    model: HookedModel, trunk: Trunk, cache: Any, watch: Watch, windows: Sequence[int | None] = ()
) -> None:
    """All endings of a trunk, some at a time, each pass inside `watch`; `windows`: how far each layer sees."""
    if is_hooked_transformer(model):
        gaps = any(branch.positions for branch in trunk.branches)
        (_run_pieces if gaps else _run_batches)(model, trunk, cache, watch)
    else:
        _run_trees(model, trunk, cache, watch, windows)


def branch_mask(branches: Sequence[Branch], trunk: int, window: int | None = None) -> Bool[Tensor, "token key"]:
    """What each token of the branches sees: the trunk's tokens before it, but those in whose place its own branch has
    others, and its own branch up to itself; of both at most `window` positions back. Keys: the trunk's, then theirs.
    """
    positions = branch_positions(branches)
    branch = torch.arange(len(branches), device="cpu").repeat_interleave(
        torch.tensor([len(each.suffix) for each in branches], device="cpu")
    )
    before = torch.arange(trunk, device="cpu")
    replaced = torch.zeros(len(branches), trunk, dtype=torch.bool, device="cpu")
    inside = positions < trunk
    replaced[branch[inside], positions[inside]] = True
    past = (before < positions[:, None]) & ~replaced[branch]
    own = (branch[:, None] == branch) & (positions[:, None] >= positions)
    seen = torch.cat([past, own], dim=1)
    if window is not None:
        seen &= positions[:, None] - torch.cat([before, positions]) < window
    return seen


def branch_positions(branches: Sequence[Branch]) -> Int[Tensor, " token"]:
    return torch.tensor([place for branch in branches for place in branch.places], device="cpu")


def _run_trees(model: HookedModel, trunk: Trunk, cache: Any, watch: Watch, windows: Sequence[int | None]) -> None:
    device, dtype, n = device_of(model), next(iter(model.parameters())).dtype, len(trunk.ids)

    def mask_of(branches: Sequence[Branch], window: int | None) -> Tensor:
        seen = branch_mask(branches, n, window).to(device)
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)[
            None, None
        ]

    kinds = sorted(set(windows), key=lambda window: window or 0) or [None]
    for numbered in _chunks(list(enumerate(trunk.branches)), lambda pair: len(pair[1].suffix)):
        branches = [branch for _, branch in numbered]
        sizes = [len(each.suffix) for each in branches]
        masks: Any = mask_of(branches, kinds[0])
        if len(kinds) > 1:  # transformers' names of a layer that sees all, and of one that sees a window
            masks = {"full_attention": masks, "sliding_attention": mask_of(branches, kinds[-1])}
        starts = torch.tensor([0, *sizes], device="cpu").cumsum(0).tolist()
        begins = [(number, 0, start) for (number, _), start in zip(numbered, starts[:-1], strict=True)]
        with watch(begins), cache_argument(model, cache) as given:
            model(
                torch.tensor([[token for each in branches for token in each.suffix]], device=device),
                use_cache=True,
                attention_mask=masks,
                position_ids=branch_positions(branches)[None].to(device),
                **given,
            )
        cache.crop(-sum(sizes))  # what this pass added: newer versions take no positive length


def _run_batches(model: HookedModel, trunk: Trunk, cache: Any, watch: Watch) -> None:
    device, n = device_of(model), len(trunk.ids)
    cache.freeze()
    keys = [(entry.past_keys, entry.past_values) for entry in cache.entries]
    numbered = sorted(enumerate(trunk.branches), key=lambda pair: len(pair[1].suffix))
    for _, same in groupby(numbered, key=lambda pair: len(pair[1].suffix)):
        # The cache is repeated for each row of the batch: n tokens' worth of memory a row.
        for some in _chunks(list(same), lambda pair: max(len(pair[1].suffix), TOKENS // 16)):
            rows = len(some)
            for entry, (past_keys, past_values) in zip(cache.entries, keys, strict=True):
                entry.past_keys = past_keys.expand(rows, -1, -1, -1)
                entry.past_values = past_values.expand(rows, -1, -1, -1)
            forks = torch.tensor([branch.fork for _, branch in some], device=device)
            cache.previous_attention_mask = (torch.arange(n, device=device) < forks[:, None]).int()
            ids = torch.tensor([branch.suffix for _, branch in some], device=device)
            with watch([(number, row, 0) for row, (number, _) in enumerate(some)]):
                model(ids, past_kv_cache=cache, attention_mask=torch.ones_like(ids))


def _run_pieces(model: HookedModel, trunk: Trunk, cache: Any, watch: Watch) -> None:
    """Branches in the same places are one batch; only the last tokens of each are inside `watch`."""
    device = device_of(model)
    base = [(entry.past_keys, entry.past_values) for entry in cache.entries]
    numbered = sorted(enumerate(trunk.branches), key=lambda pair: tuple(pair[1].places))
    for places, same in groupby(numbered, key=lambda pair: tuple(pair[1].places)):
        for some in _chunks(list(same), lambda pair: max(len(pair[1].suffix), TOKENS // 16)):
            ids = torch.tensor([branch.suffix for _, branch in some], device=device)
            now = [tuple(each.repeat(len(some), 1, 1, 1) for each in pair) for pair in base]
            for first, stop in _pieces(places):
                start, size = places[first], stop - first
                for entry, (keys, values) in zip(cache.entries, now, strict=True):
                    entry.past_keys, entry.past_values = keys[:, :start], values[:, :start]
                cache.previous_attention_mask = torch.ones(len(some), start, dtype=torch.int, device=device)
                cache.unfreeze()
                last = stop == len(places)
                with watch([(number, row, -first) for row, (number, _) in enumerate(some)]) if last else nullcontext():
                    model(ids[:, first:stop], past_kv_cache=cache, attention_mask=torch.ones_like(ids[:, first:stop]))
                for entry, (keys, values) in zip(cache.entries, now, strict=True):
                    keys[:, start : start + size] = entry.past_keys[:, start:]
                    values[:, start : start + size] = entry.past_values[:, start:]


def _pieces(places: Ids) -> list[tuple[int, int]]:
    """Where runs without gaps begin and end, as indices.

    >>> _pieces((3, 4, 8, 9))
    [(0, 2), (2, 4)]
    """
    ends = [i for i in range(1, len(places)) if places[i] != places[i - 1] + 1]
    return list(zip([0, *ends], [*ends, len(places)], strict=True))


def hooked_cache_class() -> Any:
    """HookedTransformer's key/value cache, under the name that this TransformerLens has for it."""
    import transformer_lens

    for name in ("TransformerLensKeyValueCache", "HookedTransformerKeyValueCache"):  # 3.x, 2.x
        if hasattr(transformer_lens, name):
            return getattr(transformer_lens, name)
    raise ModelError("this TransformerLens has no key/value cache for HookedTransformer; expected version 2 or 3")


def _chunks(
    items: list[tuple[int, Branch]], cost: Callable[[tuple[int, Branch]], int]
) -> Iterator[list[tuple[int, Branch]]]:
    """Runs of items that cost at most TOKENS together (one at least)."""
    some: list[tuple[int, Branch]] = []
    spent = 0
    for item in items:
        if some and spent + cost(item) > TOKENS:
            yield some
            some, spent = [], 0
        some.append(item)
        spent += cost(item)
    if some:
        yield some
