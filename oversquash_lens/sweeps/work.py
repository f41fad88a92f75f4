"""The work of a sweep on one machine: prompts in, rows out; short prompts together, as many as the memory allows."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from oversquash_lens.capture.about import describe, software_versions
from oversquash_lens.capture.architecture import read_architecture
from oversquash_lens.capture.batch import batch_bytes, record_tokens_batch
from oversquash_lens.capture.recorder import record_tokens
from oversquash_lens.capture.size import Size, device_of, size_of
from oversquash_lens.capture.support import architecture_support
from oversquash_lens.capture.tokens import TokenizedPrompt, tokenize
from oversquash_lens.errors import HookMismatchError, InputError, one_line
from oversquash_lens.memory import available_bytes
from oversquash_lens.sweeps.prompts import SweepPrompt
from oversquash_lens.sweeps.rows import Effort, Values, check_supported, columns, measured_values

UNUSABLE = (
    InputError,
    HookMismatchError,
    MemoryError,
    torch.OutOfMemoryError,
)  # of one prompt; the others may still do
MOST = {"cpu": 16}  # prompts in one pass; on a CPU more are no faster, and a kill loses more
MOST_ELSEWHERE = 64
TOKENS = 4096  # positions in one pass, padding included
WASTE = 1.25  # … over real tokens
SAMPLES = 64  # numbers of each weight that its mark looks at

Ready = tuple[SweepPrompt, TokenizedPrompt]


def model_identity(model: Any) -> dict[str, str]:
    """What tells a model from others: its label, class and format, and a mark of its weights (a sample of each)."""
    about = describe(model, read_architecture(model))
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(_sample(weight.detach()))
    versions = software_versions()
    versions.pop("python")
    label = {"model": about.model, "class": about.model_class, "dtype": about.dtype}
    return label | {"weights": digest.hexdigest()[:32], "versions": versions}


def _sample(weight: Tensor) -> bytes:
    if weight.is_meta or not weight.numel():  # offloaded: its shape has to do
        return b""
    flat = weight.flatten()
    return flat[:: max(1, len(flat) // SAMPLES)].cpu().double().contiguous().numpy().tobytes()


def check_measurable(model: Any, effort: Effort) -> None:
    """Refuse a model that cannot be measured so, before any prompt is run."""
    architecture = read_architecture(model)
    check_supported(architecture_support(architecture), effort, describe(model, architecture).model)


def rows_of(model: Any, prompts: Sequence[SweepPrompt], effort: Effort, memory: int | None = None) -> Iterator[list]:
    """Rows of these prompts, some at a time, in the order in which they are done; refused ones first."""
    ready: list[Ready] = []
    refused: list[Values] = []
    for each in prompts:
        try:
            ready.append((each, _tokenized(model, each, effort)))
        except InputError as error:
            refused.append(_refusal(each, error, effort))
    if refused:
        yield refused
    for batch in batches(model, ready, memory):
        yield _batch_rows(model, batch, effort)


def _tokenized(model: Any, each: SweepPrompt, effort: Effort) -> TokenizedPrompt:
    text = each.text is not None  # token ids carry their special tokens themselves
    return tokenize(model, each.prompt, **({"chat": effort.chat, "bos": effort.bos} if text else {}))


def batches(model: Any, ready: Sequence[Ready], memory: int | None) -> Iterator[list[Ready]]:
    """Prompts of similar length together: within memory, and without much padding."""
    size, device = size_of(model), device_of(model)
    budget = available_bytes(device) // 2 if memory is None else memory
    most = MOST.get(torch.device(device).type, MOST_ELSEWHERE)
    some: list[Ready] = []
    for one in sorted(ready, key=lambda pair: len(pair[1].ids)):
        lengths = [len(tokenized.ids) for _, tokenized in (*some, one)]
        if some and (len(some) == most or not _fit(size, lengths, budget)):
            yield some
            some = []
        some.append(one)
    if some:
        yield some


def _fit(size: Size, lengths: Sequence[int], budget: int) -> bool:
    area = len(lengths) * max(lengths)
    return area <= min(TOKENS, WASTE * sum(lengths)) and sum(batch_bytes(size, lengths).values()) <= budget


def _batch_rows(model: Any, batch: Sequence[Ready], effort: Effort) -> list[Values]:
    options = {"node_probes": effort.node_probes, "seed": effort.seed, "verify": effort.verify}
    tokenized = [each for _, each in batch]
    begun = time.perf_counter()
    try:
        if len(batch) == 1:
            traces = [record_tokens(model, tokenized[0], attention=effort.attention, **options)]
        else:
            traces = record_tokens_batch(model, tokenized, **options)
    except UNUSABLE as error:
        if len(batch) == 1:
            return [_refusal(batch[0][0], error, effort, tokenized[0])]
        return [row for one in batch for row in _batch_rows(model, [one], effort)]  # whose fault it is
    each_token = (time.perf_counter() - begun) / sum(len(each.ids) for each in tokenized)
    rows = []
    for prompt, tokens in batch:
        begun = time.perf_counter()
        try:
            values = measured_values(model, traces.pop(0), effort)
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
    reason = one_line(error, 500) or type(error).__name__
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
