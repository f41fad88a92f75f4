"""The work of a sweep on one machine: prompts in, rows out; short prompts together, as many as the memory allows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from oversquash_lens.capture.batch import batch_bytes, record_tokens_batch
from oversquash_lens.capture.recorder import record_tokens
from oversquash_lens.capture.size import Size
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import TokenizedPrompt
from oversquash_lens.errors import HookMismatchError, InputError, ModelError, OversquashError, one_line
from oversquash_lens.memory import available_bytes
from oversquash_lens.sweeps.prompts import SweepPrompt
from oversquash_lens.sweeps.rows import MEASURES, Effort, Values, columns, measured_values

# Of one prompt; the others may still do. RuntimeError: torch's, inside the model itself (out of memory is one, too).
UNUSABLE = (InputError, HookMismatchError, ModelError, MemoryError, RuntimeError)
MOST = {"cpu": 16}  # prompts in one pass; on a CPU more are no faster, and a kill loses more
MOST_ELSEWHERE = 64
TOKENS = 4096  # positions in one pass, padding included
WASTE = 1.25  # … over real tokens

Ready = tuple[SweepPrompt, TokenizedPrompt]


def check_measurable(subject: Subject, effort: Effort) -> None:
    """Refuse a model that cannot be measured so, before any prompt is run."""
    for name in effort.measures:
        subject.require(MEASURES[name].support)


def rows_of(
    subject: Subject, prompts: Sequence[SweepPrompt], effort: Effort, memory: int | None = None
) -> Iterator[list[Values]]:
    """Rows of these prompts, some at a time, in the order in which they are done; refused ones first."""
    ready: list[Ready] = []
    refused: list[Values] = []
    for each in prompts:
        try:
            ready.append((each, _tokenized(subject, each, effort)))
        except InputError as error:
            refused.append(_refusal(each, error, effort))
    if refused:
        yield refused
    for batch in batches(subject, ready, memory):
        yield _batch_rows(subject, batch, effort)


def _tokenized(subject: Subject, each: SweepPrompt, effort: Effort) -> TokenizedPrompt:
    text = each.text is not None  # token ids carry their special tokens themselves
    return subject.tokenize(each.prompt, chat=effort.chat and text, bos=effort.bos if text else None)


def batches(subject: Subject, ready: Sequence[Ready], memory: int | None) -> Iterator[list[Ready]]:
    """Prompts of similar length together: within memory, and without much padding."""
    budget = available_bytes(subject.device) // 2 if memory is None else memory
    most = MOST.get(subject.device.type, MOST_ELSEWHERE)
    some: list[Ready] = []
    for one in sorted(ready, key=lambda pair: len(pair[1].ids)):
        lengths = [len(tokenized.ids) for _, tokenized in (*some, one)]
        if some and (len(some) == most or not _fit(subject.size, lengths, budget)):
            yield some
            some = []
        some.append(one)
    if some:
        yield some


def _fit(size: Size, lengths: Sequence[int], budget: int) -> bool:
    area = len(lengths) * max(lengths)
    return area <= min(TOKENS, WASTE * sum(lengths)) and sum(batch_bytes(size, lengths).values()) <= budget


def _batch_rows(subject: Subject, batch: Sequence[Ready], effort: Effort) -> list[Values]:
    options = {"node_probes": effort.node_probes, "seed": effort.seed, "verify": effort.verify}
    tokenized = [each for _, each in batch]
    begun = time.perf_counter()
    try:
        if len(batch) == 1:
            traces = [record_tokens(subject.model, tokenized[0], attention=effort.attention, **options)]
        else:
            traces = record_tokens_batch(subject.model, tokenized, **options)
    except UNUSABLE as error:
        if len(batch) == 1:
            return [_refusal(batch[0][0], error, effort, tokenized[0])]
        return [row for one in batch for row in _batch_rows(subject, [one], effort)]  # whose fault it is
    each_token = (time.perf_counter() - begun) / sum(len(each.ids) for each in tokenized)
    rows = []
    for prompt, tokens in batch:
        begun = time.perf_counter()
        try:
            values = measured_values(subject, traces.pop(0), effort)
        except UNUSABLE as error:
            rows.append(_refusal(prompt, error, effort, tokens))
            continue
        seconds = each_token * len(tokens.ids) + time.perf_counter() - begun
        rows.append(_row(prompt, effort, tokens) | {"status": "done", "seconds": seconds} | values)
    return rows


def refused_rows(prompts: Sequence[SweepPrompt], reason: str, effort: Effort) -> list[Values]:
    """Rows of prompts that nothing is known of but why."""
    return [_row(each, effort, None) | {"status": "refused", "reason": reason} for each in prompts]


def _refusal(
    prompt: SweepPrompt, error: BaseException, effort: Effort, tokens: TokenizedPrompt | None = None
) -> Values:
    said = one_line(error, 500)
    reason = said if said and isinstance(error, OversquashError | MemoryError) else f"{type(error).__name__}: {said}"
    return _row(prompt, effort, tokens) | {"status": "refused", "reason": reason}


def _row(prompt: SweepPrompt, effort: Effort, tokens: TokenizedPrompt | None) -> Values:
    row = dict.fromkeys(columns(effort.measures))
    row |= {"index": prompt.index, "name": _storable(prompt.name), "text": _storable(prompt.text)}
    if tokens is not None:
        ids = tokens.ids.tolist()
        row |= {"token_ids": ids, "tokens": list(tokens.tokens), "n_tokens": len(ids)}
    return row


def _storable(text: str | None) -> str | None:
    """What is no Unicode is why a prompt was refused, and shows as question marks."""
    return None if text is None else text.encode("utf-8", "replace").decode("utf-8")
