"""The one door: a hooked model, read once and proven, in the form in which everything inside takes it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from oversquash_lens.capture.about import About, describe
from oversquash_lens.capture.architecture import Architecture, read_architecture
from oversquash_lens.capture.hooked_model import HookedModel
from oversquash_lens.capture.size import Size, device_of, size_of
from oversquash_lens.capture.support import Verdict, architecture_support, refuse_unsupported
from oversquash_lens.capture.tokens import Prompt, TokenizedPrompt, tokenize


@dataclass(frozen=True)
class Subject:
    """A model with what was read of it. Every public function makes one by `Subject.of`, everything inside takes it."""

    model: HookedModel
    architecture: Architecture

    @classmethod
    def of(cls, model: Any) -> Subject:
        """The subject of a HookedTransformer or TransformerBridge; a subject is handed through as it is."""
        return model if isinstance(model, Subject) else cls(model, read_architecture(model))

    @cached_property
    def about(self) -> About:
        """The label that every result carries."""
        return describe(self.model, self.architecture)

    @cached_property
    def support(self) -> dict[str, Verdict]:
        """Which measures hold, by name."""
        return architecture_support(self.architecture)

    @cached_property
    def size(self) -> Size:
        """The shapes that memory and work are counted from."""
        return size_of(self.model)

    @property
    def device(self) -> torch.device:
        """Where the first weight lies."""
        return device_of(self.model)

    def require(self, measure: str) -> None:
        """Raise the ModelError that says why, where this measure is refused."""
        refuse_unsupported(self.support, measure, self.about.model)

    def tokenize(self, prompt: Prompt, *, chat: bool = False, bos: bool | None = None) -> TokenizedPrompt:
        """The ids of a prompt, by the model's own rule, checked."""
        return tokenize(self.model, prompt, chat=chat, bos=bos)
