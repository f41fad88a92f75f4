"""Many prompts in one forward pass: padded on the right, each one's part cut out for a recorder of its own.

A causal model's real positions never look to the right, so what stands there changes none of them: no mask is given
to the model, and cutting [prompt, …, :length] out of what each hook sees (both position axes of scores and patterns)
is masking without any rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from oversquash_lens.capture.architecture import LAYER_HOOKS
from oversquash_lens.capture.checks import verify_pass
from oversquash_lens.capture.fused import can_keep
from oversquash_lens.capture.hooked_model import HookedModel
from oversquash_lens.capture.hooks import Hook, NamedHook, attached, last_logits_only, without_cache
from oversquash_lens.capture.recorder import NODE_PROBES, Recorder, record_tokens
from oversquash_lens.capture.subject import Subject
from oversquash_lens.capture.tokens import TokenizedPrompt
from oversquash_lens.capture.trace import Trace
from oversquash_lens.errors import InputError
from oversquash_lens.memory import AT_WORK, BASE, Size, check_memory, kept_bytes

SQUARE = (LAYER_HOOKS["scores"], LAYER_HOOKS["pattern"])  # [prompt, head, dest, src]; all others [prompt, pos, …]


def record_batch(
    model: Any,
    prompts: Any,
    *,
    attention_mask: Any = None,
    chat: bool = False,
    bos: bool | None = None,
    verify: bool = False,
    node_probes: int | None = NODE_PROBES,
    seed: int = 0,
) -> list[Trace]:
    """Run several prompts through the model at once and keep of each what `record` would have kept of it alone.

    The traces equal those of `record` with attention="kept" but for the rounding of larger matrix products, on every
    architecture that can be recorded, mixtures of experts included (where an expert's tokens make up its products, so
    that what stands behind a prompt may change their rounding).

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompts: texts and token ids [pos] in any mixture and of any lengths, or ids [prompt, pos] that are padded
            already, on either side.
        attention_mask: [prompt, pos], 1 for the real tokens of ids that are padded.
        chat: as for `record`, and so are bos, verify, node_probes and seed.

    Returns:
        One Trace for each prompt.

    Raises:
        InputError: a prompt that cannot be used, by its number, or a batch that would not fit into memory.
        HookMismatchError: what the hooks showed does not fit the model.
    """
    subject = Subject.of(model)
    if attention_mask is not None:
        prompts = unpadded(prompts, attention_mask)
    tokenized = tokenize_all(subject, prompts, chat=chat, bos=bos)
    return record_tokens_batch(subject, tokenized, verify=verify, node_probes=node_probes, seed=seed)


def record_tokens_batch(
    model: Any,
    tokenized: Sequence[TokenizedPrompt],
    *,
    verify: bool = False,
    node_probes: int | None = NODE_PROBES,
    seed: int = 0,
) -> list[Trace]:
    """`record_batch` of a model or Subject for prompts that are already tokenized and checked."""
    subject, lengths = Subject.of(model), [len(each.ids) for each in tokenized]
    if not can_keep(subject.architecture):  # a batch keeps patterns
        return [record_tokens(subject, each, verify=verify, node_probes=node_probes, seed=seed) for each in tokenized]
    check_batch(subject, lengths)
    model = subject.model
    batch, shares = padded(tokenized).to(subject.device), _Shares(lengths, max(lengths))
    with ExitStack() as stack, torch.no_grad():
        first = Recorder(subject, node_probes, seed, verify)
        others = (Recorder(subject, node_probes, seed, verify, beside=first) for _ in tokenized[1:])
        recorders = [first, *others]
        for recorder in recorders:
            stack.callback(recorder.close)
        if not verify:
            stack.enter_context(last_logits_only(model, lengths))
        stack.enter_context(attached(model, _dispatched(recorders, shares)))
        for handle in _ends(model, recorders, shares):
            stack.callback(handle.remove)
        stack.enter_context(subject.failures_named("recording"))
        output = model(batch, **without_cache(model))
    if verify:
        verify_pass(model, subject.architecture, batch, output)
    return [recorder.trace(each) for recorder, each in zip(recorders, tokenized, strict=True)]


def tokenize_all(
    subject: Subject, prompts: Any, *, chat: bool = False, bos: bool | None = None
) -> list[TokenizedPrompt]:
    """Check and tokenize each; an InputError says which one cannot be used."""
    if isinstance(prompts, str | bytes) or not hasattr(prompts, "__iter__") or getattr(prompts, "ndim", 2) != 2:
        raise InputError(
            "expected a list of texts or token ids, or ids [prompt, pos] with their attention_mask, got prompts of "
            f"type {type(prompts).__name__}: put a single prompt into a list"
        )
    found = []
    for number, prompt in enumerate(prompts):
        try:
            found.append(subject.tokenize(prompt, chat=chat, bos=bos))
        except InputError as error:
            raise InputError(f"prompt {number}: {error}") from error
    if not found:
        raise InputError("expected a list of texts or token ids, got no prompt: give at least one")
    return found


def unpadded(ids: Any, attention_mask: Any) -> list[Int[Tensor, " pos"]]:
    """The real tokens of each row of ids [prompt, pos], wherever its padding is."""
    try:
        ids, mask = torch.as_tensor(ids), torch.as_tensor(attention_mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"expected token ids [prompt, pos], got an attention_mask with {type(ids).__name__} as prompts: give "
            "what the tokenizer's padding gave, as one tensor"
        ) from error
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise InputError(
            f"expected both [prompt, pos], got ids of shape {tuple(ids.shape)} with an attention_mask of shape "
            f"{tuple(mask.shape)}: give the mask that the tokenizer's padding gave"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise InputError("expected 1 for real tokens, got an attention_mask of other numbers than 0 and 1: give these")
    rows = []
    for number, (row, real) in enumerate(zip(ids, mask.bool(), strict=True)):
        places = real.nonzero()[:, 0]
        if not len(places):
            raise InputError(f"prompt {number}: its attention_mask is all 0; expected a real token: leave this row out")
        first, last = int(places[0]), int(places[-1])
        if last - first + 1 != len(places):
            raise InputError(
                f"prompt {number}: its attention_mask has a hole between positions {first} and {last}; expected all "
                "padding on one side: take the masked tokens out of the prompt, or use edits.mask_position"
            )
        rows.append(row[first : last + 1])
    return rows


def padded(tokenized: Sequence[TokenizedPrompt]) -> Int[Tensor, "prompt pos"]:
    """The ids side by side, each prompt's last token repeated behind it: a token that the model surely knows."""
    longest = max(len(each.ids) for each in tokenized)
    rows = [torch.cat([each.ids, each.ids[-1:].expand(longest - len(each.ids))]) for each in tokenized]
    return torch.stack(rows)


def batch_bytes(size: Size, lengths: Sequence[int]) -> dict[str, int]:
    """The most that recording prompts of these lengths in one pass holds at once, by what holds it."""
    kept: dict[str, int] = {}
    for n in lengths:
        for name, held in kept_bytes(size, n).items():
            kept[name] = kept.get(name, 0) + held
    longest, wide = max(lengths), max(4, size.itemsize) / size.itemsize
    working = len(lengths) * round((AT_WORK["kept"] * size.scores(longest) + 2 * size.position(longest)) * wide)
    return kept | {"one layer at work": max(working, size.unembedding), "the libraries": BASE}


def check_batch(subject: Subject, lengths: Sequence[int]) -> None:
    """Refuse a batch that would not fit, with the numbers, before it begins."""
    what = f"recording {len(lengths)} prompts of up to {max(lengths)} tokens with {subject.about.model}"
    check_memory(batch_bytes(subject.size, lengths), subject.device, what)


@dataclass(frozen=True)
class _Shares:
    """Which part of a batch is whose: prompt i has the first `lengths[i]` of `width` columns in row i."""

    lengths: Sequence[int]
    width: int

    def part(self, value: Tensor, row: int, square: bool = False) -> Tensor:
        rows, length = len(self.lengths), self.lengths[row]
        if value.shape[0] != rows:  # some classes hand their norms all positions of all prompts in one row
            assert value.shape[0] == rows * self.width, f"{tuple(value.shape)} of {rows} prompts"
            return value[row * self.width : row * self.width + length]
        part = value[row : row + 1]
        return part[:, :, :length, :length] if square else part[:, :length]


def _dispatched(recorders: Sequence[Recorder], shares: _Shares) -> list[NamedHook]:
    """One hook for each point, which gives every recorder its prompt's part."""
    found: list[NamedHook] = []
    for together in zip(*(recorder.hooks() for recorder in recorders), strict=True):
        (name,) = {name for name, _ in together}
        found.append((name, partial(_dispatch, [hook for _, hook in together], shares, name.endswith(SQUARE))))
    return found


def _dispatch(hooks: Sequence[Hook], shares: _Shares, square: bool, value: Tensor, hook: Any = None) -> None:
    for row, take_part in enumerate(hooks):
        take_part(shares.part(value, row, square), hook=hook)


def _ends(model: HookedModel, recorders: Sequence[Recorder], shares: _Shares) -> list[Any]:
    """Where a pass begins and where it ends: handles of what tells the recorders."""

    def begin(embed: Any, inputs: tuple) -> None:
        for row, recorder in enumerate(recorders):
            recorder.begin(embed, (shares.part(inputs[0], row),))

    def end(unembed: Any, inputs: tuple, logits: Tensor) -> None:
        for row, recorder in enumerate(recorders):
            recorder.end(unembed, inputs, shares.part(logits, row))

    return [model.embed.register_forward_pre_hook(begin), model.unembed.register_forward_hook(end)]
