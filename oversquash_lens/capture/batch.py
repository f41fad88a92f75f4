"""Many prompts in one forward pass: padded on the right, each one's part cut out for a recorder of its own.

A causal model's real positions never look to the right, so what stands there changes none of them: no mask is given
to the model, and cutting [prompt, …, :length] out of what each hook sees (both position axes of scores and patterns)
is masking without any rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from oversquash_lens.capture.architecture import LAYER_HOOKS, read_architecture
from oversquash_lens.capture.hooks import Hook, NamedHook, attached
from oversquash_lens.capture.passes import without_cache
from oversquash_lens.capture.recorder import NODE_PROBES, Recorder
from oversquash_lens.capture.size import AT_WORK, BASE, Size, device_of, kept_bytes, size_of
from oversquash_lens.capture.tokens import TokenizedPrompt, tokenize
from oversquash_lens.capture.trace import Trace
from oversquash_lens.capture.verify import verify_pass
from oversquash_lens.errors import InputError
from oversquash_lens.memory import check_memory

SQUARE = (LAYER_HOOKS["scores"], LAYER_HOOKS["pattern"])  # [prompt, head, dest, src]; all others [prompt, pos, …]


def record_batch(
    model: Any,
    prompts: Any,
    *,
    attention_mask: Any = None,
    chat: bool = False,
    bos: bool | None = None,
    node_probes: int | None = NODE_PROBES,
    seed: int = 0,
    verify: bool = False,
) -> list[Trace]:
    """Run several prompts through the model at once and keep of each what `record` would have kept of it alone.

    `prompts`: texts and token ids [pos] in any mixture and of any lengths, or ids [prompt, pos] that are padded
    already, on either side, with the `attention_mask` [prompt, pos] that says which of them are real. All else as for
    `record` with attention="kept". The traces equal its own but for the rounding of larger matrix products, on every
    architecture that can be recorded, mixtures of experts included (where an expert's tokens make up its products, so
    that what stands behind a prompt may change their rounding). Raises InputError that names the prompt where one
    cannot be used.
    """
    if attention_mask is not None:
        prompts = unpadded(prompts, attention_mask)
    tokenized = tokenize_all(model, prompts, chat=chat, bos=bos)
    return record_tokens_batch(model, tokenized, node_probes=node_probes, seed=seed, verify=verify)


def record_tokens_batch(
    model: Any,
    tokenized: Sequence[TokenizedPrompt],
    *,
    node_probes: int | None = NODE_PROBES,
    seed: int = 0,
    verify: bool = False,
) -> list[Trace]:
    """`record_batch` for prompts that are already tokenized and checked."""
    lengths, architecture = [len(each.ids) for each in tokenized], read_architecture(model)
    check_batch(model, lengths)
    batch, shares = padded(tokenized).to(model.W_E.device), _Shares(lengths, max(lengths))
    with ExitStack() as stack, torch.no_grad():
        first = Recorder(model, node_probes, seed, verify, "kept", architecture)
        recorders = [
            first,
            *(Recorder(model, node_probes, seed, verify, "kept", architecture, first) for _ in tokenized[1:]),
        ]
        for recorder in recorders:
            stack.callback(recorder.close)
        if not verify:
            stack.enter_context(_last_logits_only(model, lengths))
        stack.enter_context(attached(model, _dispatched(recorders, shares)))
        for handle in _ends(model, recorders, shares):
            stack.callback(handle.remove)
        output = model(batch, **without_cache(model))
    if verify:
        verify_pass(model, architecture, batch, output)
    return [recorder.trace(each) for recorder, each in zip(recorders, tokenized, strict=True)]


def tokenize_all(model: Any, prompts: Any, *, chat: bool = False, bos: bool | None = None) -> list[TokenizedPrompt]:
    """Check and tokenize each; an InputError says which one cannot be used."""
    if isinstance(prompts, str | bytes) or not hasattr(prompts, "__iter__") or getattr(prompts, "ndim", 2) != 2:
        raise InputError(
            "expected a list of texts or token ids, or ids [prompt, pos] with their attention_mask, got prompts of "
            f"type {type(prompts).__name__}: put a single prompt into a list"
        )
    found = []
    for number, prompt in enumerate(prompts):
        try:
            found.append(tokenize(model, prompt, chat=chat, bos=bos))
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


def check_batch(model: Any, lengths: Sequence[int]) -> None:
    """Refuse a batch that would not fit, with the numbers, before it begins."""
    name = getattr(model.cfg, "model_name", None) or "this model"
    what = f"recording {len(lengths)} prompts of up to {max(lengths)} tokens with {name}"
    check_memory(batch_bytes(size_of(model), lengths), device_of(model), what)


@dataclass(frozen=True)
class _Shares:
    """Which part of a batch is whose: prompt i has the first `lengths[i]` of `width` columns in row i."""

    lengths: Sequence[int]
    width: int

    def of(self, value: Tensor, row: int, square: bool = False) -> Tensor:
        rows, length = len(self.lengths), self.lengths[row]
        if value.shape[0] != rows:  # some classes hand their norms all positions of all prompts in one row
            assert value.shape[0] == rows * self.width, f"{tuple(value.shape)} of {rows} prompts"
            return value[row * self.width : row * self.width + length]
        own = value[row : row + 1]
        return own[:, :, :length, :length] if square else own[:, :length]


def _dispatched(recorders: Sequence[Recorder], shares: _Shares) -> list[NamedHook]:
    """One hook for each point, which gives every recorder its prompt's part."""
    found = []
    for together in zip(*(recorder.hooks() for recorder in recorders), strict=True):
        (name,) = {name for name, _ in together}
        found.append((name, _dispatch([hook for _, hook in together], shares, name.endswith(SQUARE))))
    return found


def _dispatch(hooks: Sequence[Hook], shares: _Shares, square: bool) -> Hook:
    def take(value: Tensor, hook: Any = None) -> None:
        for row, own in enumerate(hooks):
            own(shares.of(value, row, square), hook=hook)

    return take


@contextmanager
def _last_logits_only(model: Any, lengths: Sequence[int]) -> Iterator[None]:
    """The unembedding gets each prompt's last real position alone, unless somebody's hook listens there."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.unembed.modules()):
        yield
        return

    def cut(unembed: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = torch.arange(len(lengths), device=inputs[0].device)
        last = torch.tensor(lengths, device=inputs[0].device) - 1
        return (inputs[0][rows, last][:, None], *inputs[1:])

    handle = model.unembed.register_forward_pre_hook(cut, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _ends(model: Any, recorders: Sequence[Recorder], shares: _Shares) -> list[Any]:
    """Where a pass begins and where it ends: handles of what tells the recorders."""

    def begin(embed: Any, inputs: tuple) -> None:
        for row, recorder in enumerate(recorders):
            recorder.begin(embed, (shares.of(inputs[0], row),))

    def end(unembed: Any, inputs: tuple, logits: Tensor) -> None:
        for row, recorder in enumerate(recorders):
            recorder.end(unembed, inputs, shares.of(logits, row))

    return [model.embed.register_forward_pre_hook(begin), model.unembed.register_forward_hook(end)]
