"""The numbers of a prediction that one may ask about, and the logits that they are read off."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oversquash_lens.capture.hooked_model import HookedModel
from oversquash_lens.capture.tokens import text_ids, token_strings
from oversquash_lens.errors import InputError, one_line


@dataclass(frozen=True)
class Target:
    """A number F of the prediction: a token's logit, a difference of two logits, or a token's log-probability.

    `kind` is one of `TARGETS`; `token` and `against` are ids, the second of a "contrast" only. `label` says it as
    results print it.
    """

    kind: str
    token: int
    against: int | None
    label: str

    def of(self, logits: Float[Tensor, "*axes d_vocab"]) -> Float[Tensor, "*axes"]:
        """F of these logits, in float32 at least."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.kind == "log_probability":
            return logits.log_softmax(-1)[..., self.token]
        return logits[..., self.token] - (0 if self.against is None else logits[..., self.against])


TARGETS = ("logit", "contrast", "log_probability")
TOP = "top"  # the prompt's own likeliest next token
_LOG_PROBABILITY = re.compile(r"log p\((.*)\)", re.DOTALL)


def target_of(model: HookedModel, target: Any, logits: Float[Tensor, " d_vocab"]) -> Target:
    """What a user's `target=` means for a prompt whose last token predicts these logits.

    A token (an id, or its text: with or without a leading space, whichever the model finds likelier here), "top" (the
    likeliest token), two of these for the contrast of their logits, "log p(token)" for a log-probability; or a
    `Target`. Raises InputError for what is no single token of the model's vocabulary.
    """
    if isinstance(target, Target):
        return target
    if isinstance(target, list | tuple):
        if len(target) != 2:
            raise InputError(f"expected a token or two to set against each other, got target={_shown(target)}")
        first, second = (_token_of(model, each, logits) for each in target)
        if first == second:
            raise InputError(
                f"expected two different tokens, got target={_shown(target)}, which are the same: give two"
            )
        return Target("contrast", first, second, f"logit of {_name(model, first)} less that of {_name(model, second)}")
    found = _LOG_PROBABILITY.fullmatch(target) if isinstance(target, str) else None
    if found:
        token = _token_of(model, found[1], logits)
        return Target("log_probability", token, None, f"log-probability of {_name(model, token)}")
    token = _token_of(model, target, logits)
    return Target("logit", token, None, f"logit of {_name(model, token)}")


def _token_of(model: HookedModel, target: Any, logits: Float[Tensor, " d_vocab"]) -> int:
    d_vocab = len(logits)
    expected = f'expected one token: its text, an id 0 … {d_vocab - 1}, or "{TOP}"'
    if type(target) is int and 0 <= target < d_vocab:
        return target
    if target == TOP:
        return int(logits.argmax())
    if not isinstance(target, str) or not target:
        raise InputError(f"{expected}, got target={_shown(target)}")
    pieces = {text: text_ids(model, text) for text in (target, f" {target}")}
    single = [ids[0] for ids in pieces.values() if len(ids) == 1]
    if not single:
        count = min(map(len, pieces.values()))
        begin = token_strings(model, torch.tensor(min(pieces.values(), key=len)))
        raise InputError(
            f"{expected}, got target={_shown(target)}, which is {count} tokens, {' + '.join(map(repr, begin[:6]))}: "
            "take the first of them"
        )
    return max(single, key=lambda token: float(logits[token]))


def _name(model: HookedModel, token: int) -> str:
    return repr(token_strings(model, torch.tensor([token]))[0])


def _shown(value: Any) -> str:
    return one_line(repr(value), 60)
