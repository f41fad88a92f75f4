"""One forward pass with a key/value cache, the same for every class of model that can answer.

`Plain` drives a transformers model or a TransformerBridge around one, which take transformers' cache, masks and
positions; `Hooked` drives a HookedTransformer with its own cache. The user's hooks see every pass of a hooked model.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oversquash_lens.capture.prefixes import hooked_cache_class
from oversquash_lens.errors import InputError, ModelError


def engine_for(model: Any) -> Plain | Hooked:
    """What drives `model`: a transformers model, a TransformerBridge or a HookedTransformer."""
    if hasattr(model, "run_with_hooks"):
        return Plain(model) if hasattr(model, "original_model") else Hooked(model)
    if hasattr(model, "generate") and hasattr(model, "config"):
        return Plain(model)
    raise InputError(
        "expected what load_twin() or load_model() return, or a transformers model with tokenizer=, got a "
        f"{type(model).__name__} as the model"
    )


def numbers(logits: Float[Tensor, "*axes vocab"]) -> Float[Tensor, "*axes vocab"]:
    """Logits in float32 or better, checked to be numbers: of nan every pick would be token 0, without a word."""
    if logits.isnan().any():
        raise ModelError(
            f"the model's logits are no numbers (nan, in {logits.dtype}); expected finite ones: load it with "
            "dtype='float32'"
        )
    return logits if logits.dtype == torch.float64 else logits.float()


class Plain:
    """A transformers model, or a TransformerBridge around one.

    `tree` says whether it reads a tree mask as it is meant; None until that was tried.
    """

    def __init__(self, model: Any) -> None:
        bridge = hasattr(model, "original_model")
        inner = model.original_model if bridge else model
        if not hasattr(inner, "config"):
            raise InputError(
                f"expected one around a transformers model, got a {type(model).__name__} around a "
                f"{type(inner).__name__}, which keeps no key/value cache: load it with load_model()"
            )
        self.model = model
        self.kind = "bridge" if bridge else "twin"
        self.tree: bool | None = None
        self.config = inner.config.get_text_config()
        if not hasattr(self.config, "num_attention_heads"):
            raise ModelError(
                f"{type(inner).__name__} has no attention heads; expected a Transformer that keeps a key/value cache"
            )
        self.generation = getattr(inner, "generation_config", None)
        takes_it = "logits_to_keep" in inspect.signature(inner.forward).parameters
        self._last_only = {"logits_to_keep": 1} if takes_it else {}

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def pads(self) -> bool:
        """Whether rows of different lengths may share a batch: float64's lowest number, by which transformers masks,
        is -inf in the float32 of its softmax, and a padding token that may see nothing becomes nan.
        """
        return self.dtype != torch.float64

    @property
    def n_ctx(self) -> int | None:
        """The most tokens that the model says it reads; None where it does not say."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def sliding_window(self) -> int | None:
        used = getattr(self.config, "use_sliding_window", True)
        return getattr(self.config, "sliding_window", None) if used else None

    def cache_bytes(self, length: int) -> int:
        """What one row of the key/value cache takes after `length` tokens."""
        heads = self.config.num_attention_heads
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        kept = getattr(self.config, "num_key_value_heads", None) or heads
        return 2 * self.config.num_hidden_layers * kept * width * self.dtype.itemsize * length

    def prompt_bytes(self, n: int) -> int:
        """About what one row takes while its n tokens are read: a layer's scores, and logits where all are made."""
        logits = 1 if self._last_only else n
        return (2 * self.config.num_attention_heads * n * n + self.config.vocab_size * logits) * self.dtype.itemsize

    def cache(self, rows: int) -> Any:
        from transformers import DynamicCache

        return DynamicCache()

    def forward(
        self, ids: Int[Tensor, "row new"], cache: Any, mask: Tensor, positions: Int[Tensor, "row new"], *, last: bool
    ) -> Float[Tensor, "row kept vocab"]:
        """Logits of the new tokens, of the last one alone if `last`; the cache grows by them.

        `mask`: [row, past + new], 1 where a token is to be seen, or what is added to the scores,
        [1, 1, new, past + new].
        """
        out = self.model(
            ids,
            past_key_values=cache,
            use_cache=True,
            attention_mask=mask,
            position_ids=positions,
            **(self._last_only if last else {}),
        )
        if cache.get_seq_length() != mask.shape[-1]:
            raise ModelError(
                f"{type(self.model).__name__} kept {cache.get_seq_length()} positions in its key/value cache after "
                f"{mask.shape[-1]} tokens; expected all of them: load a causal language model that attends to them"
            )
        logits = out if isinstance(out, Tensor) else out.logits
        return logits[:, -1:] if last else logits

    def fork(self, cache: Any, rows: int, length: int) -> Any:
        """A copy of a one-row cache's first `length` positions for `rows` continuations."""
        forked = copy.deepcopy(cache)
        self.forget(forked, forked.get_seq_length() - length)
        forked.batch_repeat_interleave(rows)
        return forked

    def keep(self, cache: Any, rows: list[int]) -> None:
        cache.batch_select_indices(torch.tensor(rows, device=self.device))

    def forget(self, cache: Any, tokens: int) -> None:
        """Take the last `tokens` out of the cache again."""
        if tokens:
            cache.crop(-tokens)  # new versions refuse a length to keep, old ones take both


class Hooked:
    """A HookedTransformer. Its masks are [row, token] only, so candidates cannot share a pass as a tree."""

    kind = "hooked"
    tree = False
    pads = True
    generation = None
    sliding_window = None

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        return self.model.W_E.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.W_E.dtype

    @property
    def n_ctx(self) -> int | None:
        return self.model.cfg.n_ctx

    def cache_bytes(self, length: int) -> int:
        cfg = self.model.cfg
        return 2 * cfg.n_layers * (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head * self.dtype.itemsize * length

    def prompt_bytes(self, n: int) -> int:
        return (4 * self.model.cfg.n_heads * n * n + self.model.cfg.d_vocab * n) * self.dtype.itemsize

    def cache(self, rows: int) -> Any:
        return hooked_cache_class().init_cache(self.model.cfg, self.device, rows)

    def forward(
        self, ids: Int[Tensor, "row new"], cache: Any, mask: Tensor, positions: Int[Tensor, "row new"], *, last: bool
    ) -> Float[Tensor, "row kept vocab"]:
        """As `Plain.forward`; positions follow from the mask, by the model's own count."""
        logits = self.model(ids, past_kv_cache=cache, attention_mask=mask[:, -ids.shape[1] :])
        return logits[:, -1:] if last else logits

    def fork(self, cache: Any, rows: int, length: int) -> Any:
        forked = copy.copy(cache)
        forked.previous_attention_mask = cache.previous_attention_mask[:, :length].expand(rows, -1)
        forked.entries = [copy.copy(entry) for entry in cache.entries]
        for entry in forked.entries:
            entry.past_keys = entry.past_keys[:, :length].expand(rows, -1, -1, -1)
            entry.past_values = entry.past_values[:, :length].expand(rows, -1, -1, -1)
        return forked

    def keep(self, cache: Any, rows: list[int]) -> None:
        cache.previous_attention_mask = cache.previous_attention_mask[rows]
        for entry in cache.entries:
            entry.past_keys, entry.past_values = entry.past_keys[rows], entry.past_values[rows]
