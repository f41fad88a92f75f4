"""From what the user typed to token ids and readable tokens: by the model's own rule, `model.to_tokens`.

A text becomes the ids that `model(text)` sees: BOS in front where `model.cfg.default_prepend_bos` says so, `bos=`
overrides it. Nothing is cut off at n_ctx, a longer prompt is refused. A special token that the tokenizer itself would
put behind the last word (an EOS) would be what every measure is about: TransformerBridge takes it off, with any other
class such a text is refused. A chat template keeps its own tokens. A list of messages goes through it by the rule of
transformers' own text generation: a last message of the assistant's is left open, behind any other its turn begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from oversquash_lens.capture.hooked_model import HookedModel, device_of
from oversquash_lens.errors import InputError, is_conversation, one_line
from oversquash_lens.results import About

TOKENS = 8  # of the proof that a model can be measured
# A text, a list of messages, or token ids [pos] / [1, pos] as tensor or sequence; `tokenize` checks what came.
Prompt = Any


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the model reads it, and whether it starts with BOS / went through the chat template."""

    ids: Int[Tensor, " pos"]
    tokens: tuple[str, ...]
    bos: bool
    chat: bool

    @property
    def doubled_bos(self) -> bool:
        """Whether BOS stands in front of a prompt that has it already: text from a chat template, most often."""
        return self.bos and len(self.ids) > 1 and bool(self.ids[0] == self.ids[1])

    def described(self, about: About) -> About:
        """The label of results of this prompt."""
        return about.with_prompt(bos=self.bos, chat=self.chat, doubled_bos=self.doubled_bos)

    def batch(self, model: HookedModel) -> Int[Tensor, "one pos"]:
        """The ids as the model takes them: one row, on its device."""
        return self.ids[None].to(device_of(model))


def tokenize(model: HookedModel, prompt: Prompt, *, chat: bool = False, bos: bool | None = None) -> TokenizedPrompt:
    """Check a prompt and turn it into ids; `bos` None is the model's own way, True or False forces it."""
    _check_model(model)
    if isinstance(prompt, str):
        ids = _encode(model, prompt, chat=chat, bos=bos)
    elif is_conversation(prompt):
        chat = True
        ids = _encode(model, _messages(prompt), chat=True, bos=bos)
    elif chat or bos is not None:
        raise InputError(
            "expected these for texts and messages only, got token ids together with chat= or bos=: put the special "
            "tokens into the ids themselves"
        )
    else:
        ids = _check_ids(prompt)
    _check_range(model, ids)
    return tokenized_ids(model, ids, chat=chat)


def _messages(prompt: Any) -> list[dict[str, Any]]:
    for number, each in enumerate(prompt):
        wrong = [name for name in ("role", "content") if not isinstance(each.get(name), str)]
        if wrong:
            raise InputError(
                f"expected messages such as {{'role': 'user', 'content': 'a text'}}, got message {number} whose "
                f"{wrong[0]!r} is {one_line(repr(each.get(wrong[0])), 60)}: give every message both, as texts"
            )
    return [dict(each) for each in prompt]


def tokenized_ids(model: HookedModel, ids: Int[Tensor, " pos"], *, chat: bool = False) -> TokenizedPrompt:
    """Ids that a model has already accepted, with their texts."""
    begin = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    return TokenizedPrompt(ids, token_strings(model, ids), begin is not None and int(ids[0]) == begin, chat)


def token_strings(model: HookedModel, ids: Int[Tensor, " pos"]) -> tuple[str, ...]:
    """Each token as text; a token that is not whole UTF-8 by itself as the tokenizer's own name for it."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return tuple(str(i) for i in ids.tolist())
    texts = [tokenizer.decode([i]) for i in ids.tolist()]
    names = tokenizer.convert_ids_to_tokens(ids.tolist())
    return tuple(name if "\ufffd" in text and name else text for text, name in zip(texts, names, strict=True))


def text_ids(model: Any, text: str, *, bos: bool | None = False) -> tuple[int, ...]:
    """The ids of a piece of text, one token or many, to build prompts from: without BOS, and nothing put behind it."""
    _check_model(model)
    return tuple(_encode(model, text, chat=False, bos=bos, piece=True).tolist())


def proof_ids(d_vocab: int, tokenizer: Any, n_ctx: int | None) -> tuple[Int[Tensor, "one pos"], Int[Tensor, "one pos"]]:
    """Two rows of up to eight ordinary tokens that differ at every position."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    ordinary = [i for i in range(d_vocab) if i not in special] or list(range(d_vocab))
    step = max(1, len(ordinary) // (TOKENS + 3))
    places = range(1, 1 + step * min(TOKENS, n_ctx or TOKENS), step)
    rows = [[ordinary[(place + shift) % len(ordinary)] for place in places] for shift in (0, 1)]
    first, second = (torch.tensor([row], device="cpu") for row in rows)
    return first, second


def _check_model(model: Any) -> None:
    if not hasattr(model, "cfg"):
        raise InputError(
            f"expected a HookedTransformer or TransformerBridge, got a {type(model).__name__} as the model: load one "
            "with oversquash_lens.load_model()"
        )


def _encode(model: Any, prompt: Any, *, chat: bool, bos: bool | None, piece: bool = False) -> Int[Tensor, " pos"]:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError(
            "expected token ids of shape [pos], got a text prompt for a model without tokenizer: make them with the "
            "tokenizer that belongs to it, or set model.tokenizer"
        )
    texts = [prompt] if isinstance(prompt, str) else [each["content"] for each in prompt] if chat else []
    if not texts:
        raise InputError(f"expected a text, got a {type(prompt).__name__} as a piece of a prompt: give one")
    if prompt == "":
        raise InputError("expected a text of at least two tokens, got an empty prompt")
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"expected UTF-8 text, got a prompt that is no valid Unicode ({error.reason}): take out the characters "
            "U+D800 … U+DFFF, or read its file with encoding='utf-8'"
        ) from error
    begin = tokenizer.bos_token_id
    if bos is True and begin is None:
        raise InputError("expected bos=None or bos=False, got bos=True for a tokenizer without a BOS token")
    if chat:
        ids = _chat_ids(tokenizer, prompt)
        starts = begin is not None and ids[:1] == [begin]
        ids = [begin, *ids] if bos is True and not starts else ids[1:] if bos is False and starts else ids
    else:
        ids = _own_ids(model, prompt, bos, piece)
    return torch.tensor(ids, dtype=torch.long, device="cpu")


def _own_ids(model: Any, text: str, bos: bool | None, piece: bool) -> list[int]:
    """What the model's own rule makes of a text; a `piece` of one has no special token behind it."""
    typed = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    if piece and bos is False:
        return typed
    own = {} if bos is None else {"prepend_bos": bos}
    try:
        ids = model.to_tokens(text, truncate=False, move_to_device=False, **own)[0].tolist()
    except Exception as error:
        raise InputError(
            f"expected a text that the model's tokenizer takes, got {type(error).__name__} from model.to_tokens: "
            f"{one_line(error, 160)}: give token ids, or set the tokenizer up"
        ) from error
    if (
        typed and ids[-len(typed) :] == typed
    ):  # also where the words themselves are special tokens, such as unknown ones
        return ids
    special = set(model.tokenizer.all_special_ids)
    added = _ending(ids, special) - _ending(typed, special)
    if added > 0 and typed and not piece:
        behind = model.tokenizer.decode(ids[-1:])
        raise InputError(
            f"expected a text whose last word stays last, got a tokenizer that puts {behind!r} behind it: give token "
            f"ids, such as model.to_tokens(text)[0, :-{added}], or set the tokenizer up without it"
        )
    return ids[: len(ids) - max(added, 0)]


def _ending(ids: list[int], special: set[int]) -> int:
    """How many special tokens stand at the end."""
    return next((count for count, token in enumerate(reversed(ids)) if token not in special), len(ids))


def _chat_ids(tokenizer: Any, prompt: str | list[dict[str, Any]]) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "expected an instruction-tuned model, or a text with chat=False, got chat=True (or messages) for a "
            "tokenizer without a chat template"
        )
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    open_ended = turns[-1]["role"] == "assistant"
    how = {"add_generation_prompt": not open_ended, "continue_final_message": open_ended}
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **how)
    except Exception as error:  # the template is a program of the model's; it refuses in errors of its own kinds
        roles = ", ".join(turn["role"] for turn in turns)
        raise InputError(
            f"expected messages that the model's chat template takes, got roles {one_line(roles, 80)} and "
            f"{type(error).__name__}: {one_line(error, 120)}: give other messages"
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_ids(prompt: Prompt) -> Int[Tensor, " pos"]:
    try:
        ids = prompt if isinstance(prompt, Tensor) else torch.as_tensor(prompt, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"expected a text, or token ids [pos] or [1, pos], got a prompt of type {type(prompt).__name__}: give "
            "one prompt, in one of these forms"
        ) from error
    kinds = {
        "on the meta device": ids.device.type == "meta",
        f"in the layout {ids.layout}": ids.layout != torch.strided or ids.is_nested,
        "that are quantised": ids.is_quantized,
    }
    if odd := [kind for kind, applies in kinds.items() if applies]:
        raise InputError(
            f"expected numbers in an ordinary tensor, got token ids {odd[0]}: give ids.tolist() of real ones"
        )
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(
            f"expected integers of shape [pos] or [1, pos], got token ids of shape {tuple(ids.shape)} and "
            f"{ids.dtype}: record one prompt at a time"
        )
    return ids.detach().long().cpu().clone()


def _check_range(model: HookedModel, ids: Int[Tensor, " pos"]) -> None:
    n, n_ctx = len(ids), getattr(model.cfg, "n_ctx", None)
    if n < 2:
        raise InputError(f"expected at least two, got a prompt of {n} token{'s' if n != 1 else ''}: give a longer one")
    if n_ctx and n > n_ctx:
        raise InputError(f"expected at most n_ctx = {n_ctx} tokens, got {n} tokens: shorten the prompt")
    d_vocab = model.cfg.d_vocab
    if int(ids.min()) < 0 or int(ids.max()) >= d_vocab:
        raise InputError(
            f"expected ids in 0 … {d_vocab - 1}, this model's vocabulary, got token id "
            f"{int(ids.max()) if int(ids.max()) >= d_vocab else int(ids.min())}"
        )
