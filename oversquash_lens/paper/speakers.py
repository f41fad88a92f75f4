"""Who answers: a model with its tokenizer, generating replies in batches and scoring candidates by likelihood.

The same loop and the same pick of each token for every class of model, so a hooked model and its transformers twin
say the same. What is guaranteed: a reply depends on the model, the prompt, the sampling settings and the number of
the draw, and on nothing else but rounding (a batch's shape moves logits by some 1e-5 in float32, which matters only
where two tokens tie). The very same batches give the very same bits on the same machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oversquash_lens.errors import InputError, whole_number
from oversquash_lens.models.sources import Weights
from oversquash_lens.paper.engines import engine_for, numbers
from oversquash_lens.paper.likelihood import Continuations, Trunk
from oversquash_lens.paper.sampling import GREEDY, Pick, Sampling

BATCH = 8  # replies at a time even where memory allows more
MEMORY = 1 << 30  # bytes that one batch's caches, scores and logits may take
# Tokens that end a turn in chat templates; a model's own list of end tokens is not always at hand.
TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|endoftext|>")


@dataclass(frozen=True)
class Reply:
    """What the model said; `finished` if it ended by itself, not at the limit of tokens or of its context."""

    text: str
    tokens: int
    finished: bool


@runtime_checkable
class Answering(Protocol):
    """What the tasks need of whoever answers them; a model behind somebody's service can stand in for a `Speaker`."""

    settings: dict[str, Any]

    def batches(self, prompts: Sequence[str], sampling: Sampling) -> list[list[int]]: ...

    def replies(self, prompts: Sequence[str], sampling: Sampling, *, draws: Sequence[int]) -> tuple[Reply, ...]: ...

    def trunk(self, prompts: Sequence[str]) -> Any: ...

    def log_likelihoods(
        self, prompt: str, candidates: Sequence[str], *, whole_numbers: bool, trunk: Any
    ) -> Float[Tensor, " candidate"]: ...


class Speaker:
    """A model that answers prompts.

    `model`: what `load_twin` returns (fastest), a TransformerBridge or HookedTransformer (the user's hooks act on it),
    or a transformers model with `tokenizer`. `chat` None applies the chat template where there is one; without one a
    prompt is plain text with a line break behind it. `batch_size` and `memory` (bytes) bound a batch.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        label: str | None = None,
        chat: bool | None = None,
        batch_size: int = BATCH,
        memory: int = MEMORY,
    ) -> None:
        whole_number("batch_size", batch_size)
        whole_number("memory", memory)
        self.engine = engine_for(model.model if isinstance(model, Weights) else model)
        self.tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        if self.tokenizer is None:
            raise InputError(f"expected one, got a {type(model).__name__} without a tokenizer: pass tokenizer=")
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if chat and not has_template:
            raise InputError("expected chat=None or chat=False, got chat=True for a tokenizer without a chat template")
        self.chat = has_template if chat is None else chat
        self.label = label or _label(model)
        self.batch_size, self.memory = batch_size, memory
        self._stops = self._stop_ids()

    @property
    def settings(self) -> dict[str, Any]:
        """What a reply depends on besides prompt and sampling; JSON-able."""
        dtype = str(self.engine.dtype).removeprefix("torch.")
        return {"model": self.label, "speaker": self.engine.kind, "dtype": dtype, "chat": self.chat}

    def render(self, prompt: str) -> str:
        """The text that the model reads, up to where its reply begins."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"expected a text, got the prompt {prompt!r}: give one that asks something")
        if not self.chat:
            return f"{prompt}\n"
        turn = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    def token_ids(self, text: str) -> list[int]:
        """A rendered text's tokens; BOS as the template, or without one the tokenizer, wants it."""
        try:
            return list(self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"])
        except (UnicodeEncodeError, TypeError) as error:
            raise InputError("expected UTF-8 text, got a prompt that is no valid Unicode") from error

    def batches(self, prompts: Sequence[str], sampling: Sampling = GREEDY) -> list[list[int]]:
        """Indices of prompts that are to be answered together: similar lengths, within `memory` and `batch_size`.

        Follows from the prompts alone, so a resumed run that asks for all its prompts gets the batches it had.
        """
        sizes = [len(self._prompt_ids(prompt)) for prompt in prompts]
        batches: list[list[int]] = []
        for index in sorted(range(len(prompts)), key=lambda index: (sizes[index], index)):
            rows = self._rows_at_once(sizes[index], sampling.max_new_tokens)
            full = not batches or len(batches[-1]) >= rows
            if full or (not self.engine.pads and sizes[batches[-1][0]] != sizes[index]):
                batches.append([])
            batches[-1].append(index)
        return batches

    def _rows_at_once(self, n: int, new: int) -> int:
        """How many prompts of n tokens fit; one that comes to the end of the context goes alone, without padding."""
        if self.engine.n_ctx and n + new > self.engine.n_ctx:
            return 1
        row = self.engine.cache_bytes(n + new) + self.engine.prompt_bytes(n)
        return max(1, min(self.batch_size, self.memory // row))

    def replies(
        self,
        prompts: Sequence[str],
        sampling: Sampling = GREEDY,
        *,
        draws: Sequence[int] | None = None,
        progress: bool = False,
    ) -> tuple[Reply, ...]:
        """One reply to each prompt; `draws` numbers repeated draws of one prompt (0 unless said)."""
        from tqdm import tqdm

        draws = [0] * len(prompts) if draws is None else draws
        if len(draws) != len(prompts):
            raise InputError(f"expected one for each, got {len(draws)} draws with {len(prompts)} prompts: give as many")
        found: dict[int, Reply] = {}
        with tqdm(total=len(prompts), desc=self.label, unit="reply", disable=not progress, leave=False) as bar:
            for batch in self.batches(prompts, sampling):
                picks = [Pick(sampling, prompts[index], draws[index]) for index in batch]
                rows = [self._prompt_ids(prompts[index]) for index in batch]
                found |= zip(batch, self._generate(rows, picks, sampling.max_new_tokens), strict=True)
                bar.update(len(batch))
        return tuple(found[index] for index in range(len(prompts)))

    def log_likelihoods(
        self, prompt: str, candidates: Sequence[str], *, whole_numbers: bool = False, trunk: Trunk | None = None
    ) -> Float[Tensor, " candidate"]:
        """Joint log-probability (natural, float64) of each candidate's tokens as the beginning of the reply.

        `whole_numbers`: a candidate that ends in a digit stands for all replies that go on with anything but one more
        digit, so "1" does not count what goes on to "12", and the probabilities of different numbers add up. `trunk`:
        what `self.trunk` made of prompts that begin alike, for speed alone.
        """
        rows, n = self._candidate_ids(prompt, candidates)
        closed = [whole_numbers and candidate[-1:].isdigit() for candidate in candidates]
        with torch.no_grad():
            read = Continuations.of(self.engine, rows[0][:n], self.memory, trunk)
            return read.log_likelihoods([row[n:] for row in rows], self.digit_tokens, closed)

    def trunk(self, prompts: Sequence[str]) -> Trunk:
        """The longest of the prompts, read once, for `log_likelihoods` of them all."""
        with torch.no_grad():
            return Trunk.of(self.engine, max(map(self._prompt_ids, prompts), key=len))

    def _candidate_ids(self, prompt: str, candidates: Sequence[str]) -> tuple[list[list[int]], int]:
        """Prompt and candidate tokenised as one text, and the prompt's own number of tokens."""
        if not candidates:
            raise InputError("expected at least one text, got no candidates")
        text, ids = self.render(prompt), self._prompt_ids(prompt)
        n = len(ids)
        rows = [self.token_ids(text + candidate) for candidate in candidates]
        for candidate, row in zip(candidates, rows, strict=True):
            if row[:n] != ids or len(row) == n:
                raise InputError(
                    f"the candidate {candidate!r} does not begin a token of its own behind the prompt's end "
                    f"{text[-20:]!r}: the tokenizer joins them; expected a candidate whose first token starts there, "
                    "with or without a leading space"
                )
        self._check_fits(n, max(map(len, rows)) - n)
        return rows, n

    def _prompt_ids(self, prompt: str) -> list[int]:
        ids = self.token_ids(self.render(prompt))
        self._check_fits(len(ids), 1)
        return ids

    def _check_fits(self, prompt: int, reply: int) -> None:
        n_ctx = self.engine.n_ctx
        if n_ctx and prompt + reply > n_ctx:
            raise InputError(
                f"a prompt of {prompt} tokens came, with at least {reply} to follow; {self.label} reads at most "
                f"n_ctx = {n_ctx}: ask about a shorter sequence"
            )

    def _generate(self, prompts: list[list[int]], picks: list[Pick], limit: int) -> list[Reply]:
        """Token by token with a key/value cache, prompts padded on the left; rows leave the batch as they end."""
        limit = min(limit, (self.engine.n_ctx or 1 << 60) - max(map(len, prompts)))
        said: list[list[int]] = [[] for _ in prompts]
        ended: set[int] = set()
        rows = list(range(len(prompts)))
        ids, mask = self._left_padded(prompts)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = self.engine.cache(len(rows))
        with torch.no_grad():
            for _ in range(limit):
                logits = self.engine.forward(ids, cache, mask, positions, last=True)[:, -1]
                logits = numbers(logits).cpu()
                new = [picks[row](logits[place]) for place, row in enumerate(rows)]
                stay = [place for place, token in enumerate(new) if token not in self._stops]
                ended |= set(rows) - {rows[place] for place in stay}
                for place in stay:
                    said[rows[place]].append(new[place])
                if not stay:
                    break
                if len(stay) < len(rows):
                    rows, mask, positions = [rows[place] for place in stay], mask[stay], positions[stay]
                    self.engine.keep(cache, stay)
                ids = torch.tensor([[new[place]] for place in stay], device=ids.device)
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
                positions = positions[:, -1:] + 1
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]
        return [Reply(text, len(said[row]), row in ended) for row, text in enumerate(texts)]

    def _left_padded(self, rows: list[list[int]]) -> tuple[Int[Tensor, "row n"], Int[Tensor, "row n"]]:
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = min(self._stops, default=0)  # masked anyway
        n = max(map(len, rows))
        ids = [[pad] * (n - len(row)) + row for row in rows]
        mask = [[0] * (n - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=self.engine.device), torch.tensor(mask, device=self.engine.device)

    def _stop_ids(self) -> frozenset[int]:
        named = getattr(self.engine.generation, "eos_token_id", None)
        found = set(named if isinstance(named, list | tuple) else [named]) | {self.tokenizer.eos_token_id}
        special = self.tokenizer.get_added_vocab()
        found |= {special.get(text) for text in TURN_ENDS}
        return frozenset(found - {None})

    @cached_property
    def digit_tokens(self) -> list[int]:
        """Tokens that go on with a number: those that begin with a digit, no space before it."""
        names = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        return [token for token, name in enumerate(names) if name and name[0] in "0123456789"]


def _label(model: Any) -> str:
    """What the model calls itself, as every result shows it."""
    if isinstance(model, Weights):
        return model.label
    if hasattr(model, "cfg"):
        return model.cfg.model_name
    return getattr(model.config, "_name_or_path", "") or type(model).__name__
