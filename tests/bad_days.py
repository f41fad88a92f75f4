"""What a bad day is, and what a message about it has to say: shared by every `test_bad_days*` module.

A `Case` is one thing that a user may do wrong and what then comes back. `faults` reads the message as that user
would: it must be one line, not a page, name what came, say what was expected and what to do now.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from small_models import bridge, has_bridge, hooked, tokenizer

import oversquash_lens as osl
from oversquash_lens.errors import InputError

LONGEST = 400  # characters of a message
PROMPT = "w5 w9 w5 w30"

# What an instruction begins with, at the start of a message's clause.
VERBS = (
    *("ask", "build", "call", "change", "check", "choose", "close", "convert", "delete", "draw", "get", "give", "go"),
    *("install", "leave", "load", "look", "make", "measure", "mend", "move", "open", "pass", "put", "record", "run"),
    *("set", "shorten", "show", "step", "take", "try", "upgrade", "use", "wait", "write", "see", "cut", "compare"),
    *("name", "keep", "start", "turn", "add", "list", "raise", "let", "wrap"),
)
INSTRUCTION = re.compile(rf"(?:\(|(?:[:;,.]|\bor\b|\band\b) +)(?:{'|'.join(VERBS)})\b", re.IGNORECASE)
EXPECTATION = re.compile(r"\b(?:expected|reads at most)\b", re.IGNORECASE)
# An expectation that holds the very values which would do is an instruction: "expected 'left' or 'right'".
VALUES = re.compile(
    r"\bexpected\b.*(?:'[^']*'|\d|\b(?:one|two|some|any) of\b|\bat least (?:one|two)\b|None|=)", re.IGNORECASE
)


@dataclass(frozen=True)
class Case:
    """One mistake: `call` makes it, `came` is what the message must show of it, `kind` what is raised.

    `name` is the public name (or the command) that is asked; `mistake` says in words what is wrong.
    """

    name: str
    mistake: str
    came: str
    call: Callable[[World], Any]
    kind: type[Exception] = InputError

    def __str__(self) -> str:
        return f"{self.name}: {self.mistake}"


def faults(message: str, came: str) -> list[str]:
    """What is wrong with a message about `came`; empty if a user can go on from it."""
    checks = {
        "it is not one line": "\n" not in message and "\r" not in message,
        f"it has more than {LONGEST} characters ({len(message)})": len(message) <= LONGEST,
        f"got it does not name what ({came!r})": came in message,
        "it does not say what was expected": EXPECTATION.search(message) is not None,
        "it does not say what to do": bool(INSTRUCTION.search(message) or VALUES.search(message)),
        "it is nobody's words but Python's": "Traceback" not in message and " object at 0x" not in message,
    }
    return [fault for fault, fine in checks.items() if not fine]


class World:
    """What the cases take for granted: a small model and what is measured on it, each made when first asked for.

    `folder` is the running test's own.
    """

    folder: Path

    @cached_property
    def model(self) -> Any:
        """A model of 2 layers, 4 heads, 50 tokens and a context of 16, with a tokenizer that knows w0 … w49."""
        return fresh_model()

    @cached_property
    def mute(self) -> Any:
        """The same without a tokenizer."""
        model = fresh_model()
        model.tokenizer = None
        return model

    @cached_property
    def plain(self) -> Any:
        """What transformers alone makes: no hooks."""
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=16))

    @cached_property
    def trace(self) -> Any:
        return osl.record(self.model, PROMPT)

    @cached_property
    def profile(self) -> Any:
        return osl.path_bound(self.trace)

    @cached_property
    def flow(self) -> Any:
        return osl.flow(self.trace)

    @cached_property
    def truth(self) -> Any:
        return osl.measured_sensitivity(self.model, PROMPT, probes=2)

    @cached_property
    def curve(self) -> Any:
        return osl.collapse_curve(self.model, lambda k: [5, 9] + [7] * k, (1, 2, 3), ("float32",))

    def model_with(self, value: float, *path: str) -> Any:
        """A model of its own with one weight matrix full of `value`, named by parts of its name."""
        model = fresh_model()
        found = [p for name, p in model.named_parameters() if all(part in name for part in path)]
        with torch.no_grad():
            found[0].fill_(value)
        return model

    def file(self, name: str, content: bytes = b"") -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path


def fresh_model(seed: int = 17) -> Any:
    if has_bridge():
        return bridge(seed, "llama")
    model = hooked(seed, norm="RMS", gated=True, act="silu", positions="rotary", n_heads=4, kv_heads=2, d_model=16)
    model.set_tokenizer(tokenizer())
    return model


@contextmanager
def as_users_run_it() -> Iterator[None]:
    """Without the type checker that only tests have: it would answer before our own doors do."""
    from jaxtyping import config

    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)
