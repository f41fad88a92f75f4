"""A model with its tokenizer that completes prompts, in batches, and says how likely a completion is.

The model's own `generate` writes, and one way to pick each token serves every class of model, so a hooked model and
the transformers model that it was made from complete alike. A completion depends on the model, the prompt, the
sampling settings and the number of the draw, and on nothing else but rounding (a batch's shape moves logits by some
1e-5 in float32, which matters only where two tokens tie). The global random state is neither read nor moved.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oversquash_lens.errors import InputError, ModelError, whole_number
from oversquash_lens.identity import model_identity
from oversquash_lens.models.sources import Weights
from oversquash_lens.numerics import drawn_index
from oversquash_lens.paper.backends import backend_for

BATCH = 8  # completions at a time even where memory allows more
MEMORY = 1 << 30  # bytes that one batch's caches, scores and logits may take
# Tokens that end a turn in chat templates; a model's own list of end tokens is not always at hand.
TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|endoftext|>")


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


class Draws:
    """Picks the tokens of a batch: the likeliest, or by one uniform number a token from a generator a row."""

    def __init__(self, sampling: Sampling, rows: Iterable[tuple[str, int]]) -> None:
        """`rows`: each row's prompt and the number of its draw."""
        self.temperature = sampling.temperature
        self.random = [
            torch.Generator().manual_seed(_seed(f"{sampling.seed}:{draw}:{prompt}")) for prompt, draw in rows
        ]

    def __call__(self, ids: Any, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
        """Logits whose largest is the token picked; what a logits processor of transformers is called with."""
        logits = checked(logits)
        if self.temperature == 0:
            return logits
        picked = torch.full_like(logits, -math.inf)
        for row, random, own in zip(picked, self.random, logits.cpu(), strict=True):
            row[drawn_index((own.double() / self.temperature).softmax(0), random)] = 0.0
        return picked


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def checked(logits: Float[Tensor, "*axes vocab"]) -> Float[Tensor, "*axes vocab"]:
    """Logits in float32 or better, checked to be numbers: of nan every pick would be token 0, without a word."""
    if logits.isnan().any():
        raise ModelError(
            f"the model's logits are no numbers (nan, in {logits.dtype}); expected finite ones: load it with "
            "dtype='float32'"
        )
    return logits if logits.dtype == torch.float64 else logits.float()


@dataclass(frozen=True)
class Completion:
    """What the model wrote; `finished` if it ended by itself, not at the limit of tokens or of its context."""

    text: str
    tokens: int
    finished: bool


@runtime_checkable
class Answering(Protocol):
    """What the tasks need of what answers them; a model behind somebody's service can stand in for a `Generator`."""

    @property
    def settings(self) -> dict[str, Any]: ...

    def batches(self, prompts: Sequence[str], sampling: Sampling) -> list[list[int]]: ...

    def completions(
        self, prompts: Sequence[str], sampling: Sampling, *, draws: Sequence[int]
    ) -> tuple[Completion, ...]: ...

    def log_likelihoods(
        self, prompt: str, candidates: Sequence[str], *, whole_numbers: bool
    ) -> Float[Tensor, " candidate"]: ...


class Generator:
    """A model that completes prompts.

    `model`: what `load_twin` returns (fastest), a hooked model (the user's hooks and `edited_attention` act on what it
    writes), or a transformers model with `tokenizer`. `chat` None applies the chat template where there is one;
    without one a prompt is plain text with a line break behind it. `batch_size` and `memory` (bytes) bound a batch.
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
        self.backend = backend_for(model.model if isinstance(model, Weights) else model)
        self.tokenizer: Any = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        if self.tokenizer is None:
            raise InputError(f"expected one, got a {type(model).__name__} without a tokenizer: pass tokenizer=")
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if chat and not has_template:
            raise InputError("expected chat=None or chat=False, got chat=True for a tokenizer without a chat template")
        self.chat = has_template if chat is None else chat
        self.label = label or _label(model)
        self.batch_size, self.memory = batch_size, memory
        self.stops = self._stop_ids()

    @property
    def settings(self) -> dict[str, Any]:
        """What a completion depends on besides prompt and sampling; JSON-able."""
        dtype = str(self.backend.dtype).removeprefix("torch.")
        return {"model": self.label, "generator": self.backend.kind, "dtype": dtype, "chat": self.chat}

    @property
    def identity(self) -> dict[str, Any]:
        """What kept answers depend on besides the settings: weights, hooks, tokenizer. JSON-able."""
        return model_identity(self.backend.model, self.tokenizer)

    def render(self, prompt: str) -> str:
        """The text that the model reads, up to where its completion begins."""
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
        """Indices of prompts that are to be completed together: similar lengths, within `memory` and `batch_size`.

        Follows from the prompts alone, so a resumed run that asks for all its prompts gets the batches it had.
        """
        sizes = [len(self._prompt_ids(prompt)) for prompt in prompts]
        pads = self.backend.pads
        batches: list[list[int]] = []
        for index in sorted(range(len(prompts)), key=lambda index: (sizes[index], index)):
            rows = self._rows_at_once(sizes[index], sampling.max_new_tokens)
            full = not batches or len(batches[-1]) >= rows
            if full or (not pads and sizes[batches[-1][0]] != sizes[index]):
                batches.append([])
            batches[-1].append(index)
        return batches

    def completions(
        self,
        prompts: Sequence[str],
        sampling: Sampling = GREEDY,
        *,
        draws: Sequence[int] | None = None,
        progress: bool = False,
    ) -> tuple[Completion, ...]:
        """One completion of each prompt; `draws` numbers repeated draws of one prompt (0 unless said)."""
        from tqdm import tqdm

        draws = [0] * len(prompts) if draws is None else draws
        if len(draws) != len(prompts):
            raise InputError(f"expected one for each, got {len(draws)} draws with {len(prompts)} prompts: give as many")
        found: dict[int, Completion] = {}
        with tqdm(total=len(prompts), desc=self.label, unit="answer", disable=not progress, leave=False) as bar:
            for batch in self.batches(prompts, sampling):
                ids, mask = self._left_padded([self._prompt_ids(prompts[index]) for index in batch])
                limit = min(sampling.max_new_tokens, (self.backend.n_ctx or 1 << 60) - ids.shape[1])
                pick = Draws(sampling, [(prompts[index], draws[index]) for index in batch])
                with torch.no_grad():
                    written = self.backend.generate(ids, mask, limit, self.stops, pick)
                found |= zip(batch, map(self._completion, written.tolist()), strict=True)
                bar.update(len(batch))
        return tuple(found[index] for index in range(len(prompts)))

    def log_likelihoods(
        self, prompt: str, candidates: Sequence[str], *, whole_numbers: bool = False
    ) -> Float[Tensor, " candidate"]:
        """Joint log-probability (natural, float64) of each candidate's tokens as the beginning of the completion.

        `whole_numbers`: a candidate that ends in a digit stands for all completions that go on with anything but one
        more digit, so "1" does not count what goes on to "12", and the probabilities of different numbers add up.

        The prompt and what the candidates begin with are read once; the rest of each is a row of a batch behind it.
        """
        rows, n = self._candidate_ids(prompt, candidates)
        longer = [row for row in rows if len(row) > common_beginning(*rows)]
        shared = common_beginning(*longer or rows)
        closed = [whole_numbers and candidate[-1:].isdigit() for candidate in candidates]
        found = torch.empty(len(rows), dtype=torch.float64)
        with torch.no_grad():
            read = (longer or rows)[0][:shared]
            logits, memory = self.backend.read(read, shared - n + 1)
            before = checked(logits).log_softmax(-1)
            begun = torch.zeros(len(before), dtype=torch.float64, device=before.device)
            begun[1:] = before[range(shared - n), read[n:]].double().cumsum(0)
            for chosen in self._together([max(len(row) - shared, 0) for row in rows], shared):
                ends = [min(len(rows[index]), shared) - n for index in chosen]
                rest = torch.tensor([rows[index][shared:] for index in chosen], device=self.backend.device).long()
                after = before[ends][:, None]
                if rest.shape[1]:
                    after = torch.cat([after, checked(self.backend.extend(memory, rest)).log_softmax(-1)], 1)
                own = after[:, :-1].gather(2, rest[..., None]).double().sum((1, 2))
                shut = torch.tensor([closed[index] for index in chosen], device=own.device)
                found[chosen] = (begun[ends] + own + shut * self._stop(after[:, -1])).cpu()
        return found

    def _together(self, sizes: Sequence[int], read: int) -> Iterable[list[int]]:
        """Indices of candidates with as many tokens left, as many as fit into the memory, one at the least."""
        for size, same in groupby(sorted(range(len(sizes)), key=sizes.__getitem__), key=sizes.__getitem__):
            some = list(same)
            row = self.backend.cache_bytes(read + size) + 3 * 4 * (size + 1) * len(self.tokenizer)
            row += 0 if self.backend.keeps_cache else self.backend.prompt_bytes(read + size)
            rows = max(1, self.memory // row)
            yield from (some[start : start + rows] for start in range(0, len(some), rows))

    def _stop(self, log_probabilities: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
        """Log-probability that no digit follows."""
        others = torch.ones(log_probabilities.shape[-1], dtype=torch.bool, device=log_probabilities.device)
        others[self.digit_tokens] = False
        return log_probabilities[:, others].logsumexp(-1).double()

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

    def _check_fits(self, prompt: int, completion: int) -> None:
        n_ctx = self.backend.n_ctx
        if n_ctx and prompt + completion > n_ctx:
            raise InputError(
                f"a prompt of {prompt} tokens came, with at least {completion} to follow; {self.label} reads at most "
                f"n_ctx = {n_ctx}: ask about a shorter sequence"
            )

    def _rows_at_once(self, n: int, new: int) -> int:
        """How many prompts of n tokens fit; one that comes to the end of the context goes alone, without padding."""
        if self.backend.n_ctx and n + new > self.backend.n_ctx:
            return 1
        row = self.backend.cache_bytes(n + new) + self.backend.prompt_bytes(n)
        return max(1, min(self.batch_size, self.memory // row))

    def _left_padded(self, rows: list[list[int]]) -> tuple[Int[Tensor, "row n"], Int[Tensor, "row n"]]:
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = min(self.stops, default=0)  # masked anyway
        n = max(map(len, rows))
        ids = [[pad] * (n - len(row)) + row for row in rows]
        mask = [[0] * (n - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=self.backend.device), torch.tensor(mask, device=self.backend.device)

    def _completion(self, written: list[int]) -> Completion:
        ends = [place for place, token in enumerate(written) if token in self.stops]
        tokens = written[: ends[0]] if ends else written
        return Completion(self.tokenizer.decode(tokens, skip_special_tokens=True), len(tokens), bool(ends))

    def _stop_ids(self) -> tuple[int, ...]:
        named = self.backend.end_tokens
        found = set(named if isinstance(named, list | tuple) else [named]) | {self.tokenizer.eos_token_id}
        special = self.tokenizer.get_added_vocab()
        found |= {special.get(text) for text in TURN_ENDS}
        return tuple(sorted(found - {None}))

    @cached_property
    def digit_tokens(self) -> list[int]:
        """Tokens that go on with a number: those that begin with a digit, no space before it."""
        names = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        return [token for token, name in enumerate(names) if name and name[0] in "0123456789"]


def common_beginning(*rows: Sequence[int]) -> int:
    """How many tokens at their beginning all rows have in common.

    >>> common_beginning((7, 1, 1), (7, 1, 2))
    2
    """
    columns = zip(*rows, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, rows)))


def _label(model: Any) -> str:
    """What the model calls itself, as every result shows it."""
    if isinstance(model, Weights):
        return model.label
    if hasattr(model, "cfg"):
        return model.cfg.model_name
    return getattr(model.config, "_name_or_path", "") or type(model).__name__
