"""What generates: a transformers model, the one inside a TransformerBridge, or a model with hooks of its own.

Each backend says how much it can take (`pads`: whether rows of different lengths may share a batch; `n_ctx`: the most
tokens that the model says it reads, None where it does not say; `keeps_cache`: whether what was read is not read again
for every new token) and has three verbs. Hooks of the user's see every
pass.

- `generate(ids, mask, limit, stops, pick)`: at most `limit` tokens behind each row, written by the model's own
  `generate`, each the largest of what `pick` makes of the logits;
- `read(ids, keep)`: one prompt; the logits at its last `keep` tokens, and the memory that `extend` needs;
- `extend(memory, rows)`: the logits at each token of each row behind what was read, which stays as it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oversquash_lens.capture.checks import logits_from
from oversquash_lens.capture.prefixes import hooked_cache_class
from oversquash_lens.errors import InputError, ModelError

Logits = Float[Tensor, "row vocab"]
Pick = Callable[[Any, Logits], Logits]  # as transformers' logits processors: (ids so far, logits) -> logits


def backend_for(model: Any) -> TransformersBackend | HookedBackend:
    """What drives `model`: a transformers model, a bridge around one, or a hooked model with its own `generate`."""
    if hasattr(model, "run_with_hooks") and not hasattr(model, "original_model"):
        return HookedBackend(model)
    if hasattr(model, "run_with_hooks") or (hasattr(model, "generate") and hasattr(model, "config")):
        return TransformersBackend(model)
    raise InputError(
        "expected what load_twin() or load_model() return, or a transformers model with tokenizer=, got a "
        f"{type(model).__name__} as the model"
    )


class TransformersBackend:
    """A transformers model, or the one inside a bridge: its passes run through the bridge's hooks."""

    def __init__(self, model: Any) -> None:
        bridge = hasattr(model, "original_model")
        inner = model.original_model if bridge else model
        if not hasattr(inner, "config"):
            raise InputError(
                f"expected one around a transformers model, got a {type(model).__name__} around a "
                f"{type(inner).__name__}, which keeps no key/value cache: load it with load_model()"
            )
        self.kind = "bridge" if bridge else "transformers"
        self.model, self.inner = model, inner
        self.config = inner.config.get_text_config()
        if not hasattr(self.config, "num_attention_heads"):
            raise ModelError(
                f"{type(inner).__name__} has no attention heads; expected a Transformer that keeps a key/value cache"
            )
        self._keeps_last = "logits_to_keep" in inspect.signature(inner.forward).parameters

    @property
    def pads(self) -> bool:
        """Not in float64: the lowest number, by which transformers masks, is -inf in the float32 of its softmax, and a
        padding token that may see nothing becomes nan. Not under hooks: a hook may speak of a position.
        """
        points = getattr(self.model, "hook_dict", {}).values()
        return self.dtype != torch.float64 and not any(point.fwd_hooks for point in points)

    @property
    def n_ctx(self) -> int | None:
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return next(self.inner.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.inner.parameters()).dtype

    @property
    def end_tokens(self) -> Any:
        return getattr(getattr(self.inner, "generation_config", None), "eos_token_id", None)

    def prompt_bytes(self, n: int) -> int:
        """A layer's scores, and the logits where all are made."""
        logits = 1 if self._keeps_last else n
        return (2 * self.config.num_attention_heads * n * n + self.config.vocab_size * logits) * self.dtype.itemsize

    def cache_bytes(self, length: int) -> int:
        heads = self.config.num_attention_heads
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        kept = getattr(self.config, "num_key_value_heads", None) or heads
        return 2 * self.config.num_hidden_layers * kept * width * self.dtype.itemsize * length

    def generate(
        self, ids: Int[Tensor, "row n"], mask: Int[Tensor, "row n"], limit: int, stops: Sequence[int], pick: Pick
    ) -> Int[Tensor, "row new"]:
        from transformers import GenerationConfig, LogitsProcessorList

        own = self.inner.generation_config
        # What the model's file asks for (penalties, suppressed tokens, …) would be filled in where ours says nothing.
        self.inner.generation_config = GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,
            use_cache=self.keeps_cache,
            eos_token_id=list(stops) or None,
            pad_token_id=min(stops, default=0),
        )
        try:
            out = self.inner.generate(ids, attention_mask=mask, logits_processor=LogitsProcessorList([pick]))
        finally:
            self.inner.generation_config = own
        return out[:, ids.shape[1] :]

    @cached_property
    def keeps_cache(self) -> bool:
        """Whether attention puts its keys and values into the cache that is handed through: a bridge of an older
        TransformerLens does not find it under its new name, and would attend to the newest token alone.
        """
        with torch.no_grad():
            _, cache = self._cached(torch.zeros(1, 2, dtype=torch.long, device=self.device))
        return cache is not None and cache[1].get_seq_length() == 2

    def read(self, ids: Sequence[int], keep: int) -> tuple[Float[Tensor, "keep vocab"], Any]:
        """The memory is (prompt, (the cache's name, the cache) or None)."""
        prompt = torch.tensor([list(ids)], device=self.device)
        logits, cache = self._cached(prompt, keep)
        return logits[0, -keep:], (prompt, cache if self.keeps_cache else None)

    def extend(self, memory: Any, rows: Int[Tensor, "row new"]) -> Float[Tensor, "row new vocab"]:
        prompt, kept = memory
        new = rows.shape[1]
        if kept is None:
            whole = torch.cat([prompt.expand(len(rows), -1), rows], 1)
            return self.inner(whole, use_cache=False, **self._last(new)).logits[:, -new:]
        name, cache = kept
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(rows))
        return self.inner(rows, use_cache=True, **{name: cache}).logits

    def _cached(self, ids: Int[Tensor, "row n"], keep: int = 1) -> tuple[Float[Tensor, "row some vocab"], Any]:
        """Logits of one pass and (name, cache): newer versions call past_key_values cache, in and out."""
        out = self.inner(ids, use_cache=True, **self._last(keep))
        found = ((name, getattr(out, name, None)) for name in ("cache", "past_key_values"))
        return out.logits, next(((name, cache) for name, cache in found if cache is not None), None)

    def _last(self, keep: int) -> dict[str, int]:
        return {"logits_to_keep": keep} if self._keeps_last else {}


class HookedBackend:
    """A hooked model with weights and a `generate` of its own. Rows of one length share a batch: it is not masked."""

    kind = "hooked"
    pads = False
    keeps_cache = True
    end_tokens = None

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def n_ctx(self) -> int | None:
        return self.model.cfg.n_ctx

    @property
    def device(self) -> torch.device:
        return self.model.W_E.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.W_E.dtype

    def prompt_bytes(self, n: int) -> int:
        return (4 * self.model.cfg.n_heads * n * n + self.model.cfg.d_vocab * n) * self.dtype.itemsize

    def cache_bytes(self, length: int) -> int:
        cfg = self.model.cfg
        return 2 * cfg.n_layers * (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head * self.dtype.itemsize * length

    def generate(
        self, ids: Int[Tensor, "row n"], mask: Int[Tensor, "row n"], limit: int, stops: Sequence[int], pick: Pick
    ) -> Int[Tensor, "row new"]:
        def picked(unembed: Any, inputs: Any, logits: Float[Tensor, "row n vocab"]) -> Float[Tensor, "row n vocab"]:
            last = logits_from(self.model, logits[:, -1])  # which it does behind this hook, and leaves their order
            return torch.cat([logits[:, :-1], pick(None, last)[:, None]], 1)

        begin = getattr(self.model.tokenizer, "bos_token_id", None)
        handle = self.model.unembed.register_forward_hook(picked)
        try:
            out = self.model.generate(
                ids,
                max_new_tokens=limit,
                stop_at_eos=bool(stops),
                eos_token_id=list(stops) or None,
                do_sample=False,
                prepend_bos=begin is not None and bool((ids[:, 0] == begin).all()),
                return_type="tokens",
                verbose=False,
            )
        finally:
            handle.remove()
        return out[:, ids.shape[1] :]

    def read(self, ids: Sequence[int], keep: int) -> tuple[Float[Tensor, "keep vocab"], Any]:
        cache = hooked_cache_class().init_cache(self.model.cfg, self.device, 1)
        return self.model(torch.tensor([list(ids)], device=self.device), past_kv_cache=cache)[0, -keep:], cache

    def extend(self, memory: Any, rows: Int[Tensor, "row new"]) -> Float[Tensor, "row new vocab"]:
        cache = copy.copy(memory)
        cache.previous_attention_mask = memory.previous_attention_mask.expand(len(rows), -1)
        cache.entries = [copy.copy(entry) for entry in memory.entries]
        for entry in cache.entries:
            entry.past_keys = entry.past_keys.expand(len(rows), -1, -1, -1)
            entry.past_values = entry.past_values.expand(len(rows), -1, -1, -1)
        return self.model(rows, past_kv_cache=cache, attention_mask=torch.ones_like(rows))
