"""Tokenizers without models, for what only spells: characters, and whatever merges of them a test wants."""

from __future__ import annotations

import string
from types import SimpleNamespace
from typing import Any

import torch


class Reader:
    """What a family asks of a model: a tokenizer and a name, no weights."""

    def __init__(self, *merges: tuple[str, str], begins: bool = False, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer or characters(merges, begins)
        self.begins = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        self.cfg = SimpleNamespace(model_name="a reader of characters")
        self.hook_dict: dict[str, Any] = {}

    def __call__(self, *arguments: Any, **options: Any) -> None: ...

    def run_with_hooks(self, *arguments: Any, **options: Any) -> None: ...

    def to_tokens(self, text: str, prepend_bos: bool | None = None, **options: Any) -> torch.Tensor:
        """By TransformerLens' rule, BOS where the tokenizer itself puts it, or as it is asked for."""
        ids, begin = self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.bos_token_id
        return torch.tensor([[begin, *ids] if prepend_bos or (prepend_bos is None and self.begins) else ids])

    def text(self, ids: tuple[int, ...]) -> str:
        return self.tokenizer.decode(list(ids))

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text)["input_ids"])


def characters(merges: tuple[tuple[str, str], ...], begins: bool) -> Any:
    """A BPE tokenizer of printable characters with these merges; it prepends <s> if it begins."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    texts = ["<s>", *string.printable, *("".join(pair) for pair in merges)]
    bpe = Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, list(merges)))
    bpe.decoder = decoders.Fuse()
    if begins:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", clean_up_tokenization_spaces=False)
