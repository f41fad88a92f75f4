"""Swap one thing of a prompt for another: where the difference runs, and which nodes carry the effect.

The two prompts are run, and the difference of their residuals says where the news is. What it does there is measured by
activation patching: the prompt is run with one node's activation taken from the swapped prompt's run, and the change of
the target is a share of the whole change. Where all nodes are too many, attribution patching (gradient times
difference, of all nodes at once) says which are patched; Nanda (2023), Kramár et al. (2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from oversquash_lens.capture.architecture import LAYER_HOOKS
from oversquash_lens.capture.hooks import NamedHook, attached, last_logits_only, without_cache
from oversquash_lens.capture.readings import predictions
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import Prompt, TokenizedPrompt, token_strings
from oversquash_lens.errors import InputError, one_line, whole_number
from oversquash_lens.jacobian.block_products import BlockProducts
from oversquash_lens.jacobian.measured import MEMORY
from oversquash_lens.jacobian.products import checkpointed
from oversquash_lens.jacobian.targets import Target, target_of
from oversquash_lens.numerics import json_numbers, kl_divergence
from oversquash_lens.paths.flow import position_of, span_of
from oversquash_lens.results import About, Result
from oversquash_lens.swaps.replacements import aligned

BUDGET = 40_000  # tokens of patched passes for the nodes, and as many for the heads
ROWS = 512  # tokens of one batch of patched passes
TOP = 5  # likeliest tokens that are kept


@dataclass(frozen=True, repr=False)
class Swap(Result):
    """What replacing something of a prompt changes, where the change runs, and which nodes and heads carry it."""

    tokens: tuple[str, ...]
    swapped: tuple[str, ...]
    """The tokens after the swap."""
    positions: tuple[int, ...]
    """Where they differ."""
    spread: Float[Tensor, "layer_plus_1 pos"]
    """‖Δx_j⁽ˡ⁾‖/‖x_j⁽ˡ⁾‖: where the difference is, entering each layer and leaving the last."""
    distance: float
    """‖Δy_n‖₂."""
    relative: float
    """`distance` over ‖y_n‖."""
    kl: float
    """KL divergence of the next-token distribution after the swap from that before, in nats."""
    top_before: tuple[tuple[str, float], ...]
    """The likeliest next tokens and their probabilities."""
    top_after: tuple[tuple[str, float], ...]
    target: str
    before: float
    """The target's value before the swap, in logits or nats."""
    after: float
    patched: Float[Tensor, "layer_plus_1 pos"]
    """The target's change when one residual alone is the swapped prompt's, over its whole change; nan: not patched."""
    patched_heads: Float[Tensor, "layer head"]
    """The same of one head's output at all positions."""
    attributed: Float[Tensor, "layer_plus_1 pos"]
    """Gradient times difference, over the whole change: which nodes are worth patching."""
    attributed_heads: Float[Tensor, "layer head"]
    about: About

    @property
    def effect(self) -> float:
        """How far the swap moves the target."""
        return self.after - self.before

    @property
    def additivity(self) -> Float[Tensor, " layer_plus_1"]:
        """Sum of `patched` over the positions of a layer, 1 where effects add up; nan where not all were patched."""
        return self.patched.sum(-1)

    @property
    def kept(self) -> bool:
        """Whether the likeliest next token is the same."""
        return self.top_before[0][0] == self.top_after[0][0]

    def _title(self) -> str:
        old, new = ("".join(each[i] for i in self.positions) for each in (self.tokens, self.swapped))
        return (
            f"{one_line(repr(old), 40)} → {one_line(repr(new), 40)}: {self.target} {self.before:.3g} → "
            f"{self.after:.3g}, KL {self.kl:.3g}, y moves by {self.relative:.0%} of its size; {self.about}"
        )

    def _table(self) -> Mapping[str, Sequence[Any]]:
        """The nodes that carry most: layer, position, and what patching them does."""
        known = self.patched.nan_to_num(0).abs()
        order = known.flatten().argsort(descending=True)[: int((known > 0).sum())].tolist()
        layers, positions = zip(*(divmod(i, known.shape[1]) for i in order), strict=True) if order else ((), ())
        return {
            "layer": layers,
            "position": positions,
            "token": [self.tokens[i] for i in positions],
            "patched": [self.patched[at].item() for at in zip(layers, positions, strict=True)],
            "attributed": [self.attributed[at].item() for at in zip(layers, positions, strict=True)],
            "spread": [self.spread[at].item() for at in zip(layers, positions, strict=True)],
        }

    def to_dict(self) -> dict[str, Any]:
        """Every field, the effect and the additivity, as JSON takes them."""
        tensors = ("spread", "patched", "patched_heads", "attributed", "attributed_heads", "additivity")
        plain = ("distance", "relative", "kl", "target", "before", "after", "effect", "kept")
        lists = ("tokens", "swapped", "positions", "top_before", "top_after")
        return {
            "kind": "swap",
            **{name: list(getattr(self, name)) for name in lists},
            **{name: getattr(self, name) for name in plain},
            **{name: json_numbers(getattr(self, name)) for name in tensors},
            "about": self.about.to_dict(),
        }


def swap(
    model: Any,
    prompt: Prompt,
    change: Mapping[Any, Any] | Prompt,
    target: Any = None,
    *,
    patches: int | None = None,
    chat: bool = False,
    bos: bool | None = None,
    memory: int = MEMORY,
    progress: bool = False,
) -> Swap:
    """Replace something of a prompt by something else, and measure what changes and where.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks of your own stay on.
        prompt: a text, or token ids [pos] or [1, pos].
        change: {what: by what}, such as {"Alice": "Carol"}, of as many tokens each; what is replaced is a text, a
            position or a slice. Or another prompt of as many tokens.
        target: a number of the prediction, as `measured_sensitivity` takes it; None for the likeliest token before
            against the likeliest after, or for the likeliest where both are the same.
        patches: most patched passes for the residuals, and for the heads; None for as many as 40,000 tokens of passes.
        chat: as `record` takes it, and so is bos.
        memory: bytes for a batch of backward products.
        progress: show a bar.

    Returns:
        A `Swap`: differences [layer+1, pos], and shares of the effect [layer+1, pos] and [layer, head].

    Raises:
        InputError: a change that is none, is ambiguous or of another number of tokens, or a target that is no token.
    """
    if patches is not None:
        whole_number("patches", patches, least=0)
    subject = Subject.of(model)
    before = subject.tokenize(prompt, chat=chat, bos=bos)
    after = _changed(subject, before, change, chat, bos)
    pair = _Pair.of(subject, before, after, target)
    n = len(before.ids)
    most = BUDGET // n if patches is None else patches
    attributed, attributed_heads = pair.attributed(subject, before, memory, progress)
    patched = pair.patched_nodes(attributed, most, progress)
    patched_heads = pair.patched_heads(attributed_heads, most, progress)
    (y, logits), (other, others) = pair.ends
    log_p, log_q = (each.double().log_softmax(-1) for each in (logits, others))
    moved = (other - y)[-1].double().norm().item()
    return Swap(
        tokens=before.tokens,
        swapped=after.tokens,
        positions=pair.positions,
        spread=pair.spread,
        distance=moved,
        relative=moved / y[-1].double().norm().item(),
        kl=kl_divergence(log_p, log_q).item(),
        top_before=_likeliest(subject, log_p),
        top_after=_likeliest(subject, log_q),
        target=pair.target.label,
        before=pair.values[0],
        after=pair.values[1],
        patched=patched,
        patched_heads=patched_heads,
        attributed=attributed,
        attributed_heads=attributed_heads,
        about=before.described(subject.about),
    )


def _changed(subject: Subject, before: TokenizedPrompt, change: Any, chat: bool, bos: bool | None) -> TokenizedPrompt:
    if isinstance(change, Mapping):
        ids = before.ids.clone()
        for old, new in change.items():
            span = span_of(position_of(before.tokens, old))
            ids[slice(*span)] = torch.tensor(aligned(subject, before, span, new))
        after = subject.tokenize(ids)
    else:
        typed = isinstance(change, str)
        after = subject.tokenize(change, chat=chat and typed, bos=bos if typed else None)
    if len(after.ids) != len(before.ids):
        raise InputError(
            f"expected another prompt of {len(before.ids)} tokens, got one of {len(after.ids)}: every position must "
            'have its counterpart; replace single words by change={"old": "new"}'
        )
    if torch.equal(after.ids, before.ids):
        raise InputError(
            "expected a change, got the same tokens before and after the swap: give another prompt or replacement"
        )
    return after


def _likeliest(subject: Subject, log_p: Float[Tensor, " d_vocab"]) -> tuple[tuple[str, float], ...]:
    best = log_p.topk(min(TOP, len(log_p)))
    texts = token_strings(subject.model, best.indices.cpu())
    return tuple(zip(texts, best.values.exp().tolist(), strict=True))


Activations = dict[tuple[int, str], Tensor]  # (layer, "residual" or "z") -> of one prompt, [pos, …]


@dataclass(frozen=True)
class _Pair:
    """A prompt and the swapped one, run; `values` of the target, `ends`: y at every position and the last logits."""

    subject: Subject
    ids: Tensor
    positions: tuple[int, ...]
    target: Target
    ends: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    runs: tuple[Activations, Activations]
    values: tuple[float, float]

    @classmethod
    def of(cls, subject: Subject, before: TokenizedPrompt, after: TokenizedPrompt, target: Any) -> _Pair:
        runs: list[Activations] = []
        ends = []
        for each in (before, after):
            kept: Activations = {}
            with attached(subject.model, _keeping(subject, kept)):
                ends.append(predictions(subject, tuple(each.ids.tolist())))
            runs.append(kept)
        logits, others = (each[1] for each in ends)
        first, second = int(logits.argmax()), int(others.argmax())
        asked = target if target is not None else ((first, second) if first != second else first)
        chosen = target_of(subject.model, asked, logits)
        values = tuple(chosen.of(each.double()).item() for each in (logits, others))
        if values[0] == values[1]:
            raise InputError(
                f"expected a target that the swap moves, got the {chosen.label}, which stays {values[0]:.4g}"
            )
        positions = tuple((before.ids != after.ids).nonzero()[:, 0].tolist())
        return cls(
            subject, before.ids, positions, chosen, (ends[0], ends[1]), (runs[0], runs[1]), (values[0], values[1])
        )

    @property
    def whole(self) -> float:
        return self.values[1] - self.values[0]

    @property
    def layers(self) -> int:
        return self.subject.architecture.n_layers

    @property
    def spread(self) -> Float[Tensor, "layer_plus_1 pos"]:
        rows = []
        for layer in range(self.layers + 1):
            x, other = (run[layer, "residual"].double() for run in self.runs)
            rows.append(((other - x).norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-30)).cpu())
        return torch.stack(rows)

    def attributed(
        self, subject: Subject, before: TokenizedPrompt, memory: int, progress: bool
    ) -> tuple[Float[Tensor, "layer_plus_1 pos"], Float[Tensor, "layer head"]]:
        """Gradient times difference at every residual and every head, over the whole change."""
        made = checkpointed(subject, before)
        products = BlockProducts(made, memory, progress)
        gradients = products.gradients(made.prediction.covector(self.target)[None])
        change = {key: self.runs[1][key].double() - self.runs[0][key].double() for key in self.runs[0]}
        nodes = [
            (gradients.residual[layer][0].double() * change[layer, "residual"]).sum(-1).cpu()
            for layer in range(self.layers + 1)
        ]
        heads = [
            (each["z"][0].double() * change[layer, "z"]).sum((0, 2)).cpu()
            for layer, each in enumerate(gradients.watched)
            if "z" in each
        ]
        found = torch.stack(heads) if len(heads) == self.layers else torch.zeros(self.layers, 0, dtype=torch.float64)
        return torch.stack(nodes) / self.whole, found / self.whole

    def patched_nodes(
        self, attributed: Float[Tensor, "layer_plus_1 pos"], most: int, progress: bool
    ) -> Float[Tensor, "layer_plus_1 pos"]:
        """Where the prompts are the same so far nothing moves, and at the top only the last position counts."""
        found = torch.full_like(attributed, math.nan)
        found[:, : self.positions[0]] = 0.0
        found[-1] = 0.0
        found[-1, -1] = 1.0
        untouched = torch.ones(attributed.shape[1], dtype=torch.bool)
        untouched[list(self.positions)] = False
        found[0, untouched] = 0.0
        return self._fill(found, attributed, "residual", most, progress)

    def patched_heads(
        self, attributed: Float[Tensor, "layer head"], most: int, progress: bool
    ) -> Float[Tensor, "layer head"]:
        return self._fill(torch.full_like(attributed, math.nan), attributed, "z", most, progress)

    def _fill(self, found: Tensor, attributed: Tensor, key: str, most: int, progress: bool) -> Tensor:
        """Patch the places that are nan, those that attribution points to first."""
        places = _strongest(attributed, found.isnan(), most)
        for (row, column), share in zip(places, self._patched(places, key, progress).tolist(), strict=True):
            found[row, column] = share
        return found

    def _patched(self, places: Sequence[tuple[int, int]], key: str, progress: bool) -> Float[Tensor, " place"]:
        """The target's change under each patch, over the whole change; many patches in one batch."""
        model, parts = self.subject.model, []
        size = max(1, ROWS // len(self.ids))
        batches = [places[at : at + size] for at in range(0, len(places), size)]
        for some in tqdm(batches, desc="patching", unit="batch", disable=not progress, leave=False):
            ids = self.ids.to(self.subject.device).expand(len(some), -1).clone()
            with torch.no_grad(), last_logits_only(model), attached(model, list(self._patches(some, key))):
                logits = model(ids, **without_cache(model))[:, -1]
            parts.append((self.target.of(logits.double()).cpu() - self.values[0]) / self.whole)
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def _patches(self, places: Sequence[tuple[int, int]], key: str) -> Iterator[NamedHook]:
        """Row r of the batch gets the swapped run's activation at the r-th place, a position's or a head's."""
        for layer in sorted({layer for layer, _ in places}):
            rows = [(row, at) for row, (there, at) in enumerate(places) if there == layer]
            new = self.runs[1][layer, key]

            def patch(value: Tensor, hook: Any = None, rows: Any = rows, new: Tensor = new) -> Tensor:
                value = value.clone()
                for row, at in rows:
                    place = (row, at) if key == "residual" else (row, slice(None), at)
                    value[place] = new[place[1:]].to(value)
                return value

            yield f"blocks.{layer}.{LAYER_HOOKS[key]}", patch


def _keeping(subject: Subject, kept: Activations) -> list[NamedHook]:
    """Hooks that keep every residual and what every head writes."""

    def keeper(layer: int, key: str) -> NamedHook:
        name = f"blocks.{layer}.{LAYER_HOOKS[key]}" if layer < layers else subject.architecture.final_hooks()["last"]

        def keep(value: Tensor, hook: Any = None) -> None:
            kept[layer, key] = value[0].detach().clone()

        return name, keep

    layers, known = subject.architecture.n_layers, subject.model.hook_dict
    hooks = [keeper(layer, "residual") for layer in range(layers + 1)]
    return hooks + [keeper(i, "z") for i in range(layers) if f"blocks.{i}.{LAYER_HOOKS['z']}" in known]


def _strongest(values: Float[Tensor, "row column"], among: Tensor, most: int) -> list[tuple[int, int]]:
    """The places where `among` is true, those of the largest size first, at most so many."""
    size = values.abs().nan_to_num(math.inf).masked_fill(~among, -1.0).flatten()
    order = size.argsort(descending=True, stable=True)[: min(most, int(among.sum()))].tolist()
    return [divmod(i, values.shape[1]) for i in order]
