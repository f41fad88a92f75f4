"""How large a model is, and what a recording of n tokens needs of memory: from shapes alone, nothing is run.

The counts are of tensors that are alive together when a recording needs most, as measured on both model classes
(`python -m benchmarks.planned` compares them with runs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oversquash_lens.capture.hooked_model import is_hooked_transformer
from oversquash_lens.memory import check_memory

BASE = 50_000_000  # bytes that libraries take for themselves once anything runs: buffers, threads, code
SCRAP = 0.15  # of what is kept, lost between the blocks of the heap while it is recorded
HELD = 0.45  # the same afterwards: what the recording itself worked with stays in the heap, and is of little use there
# Copies of one layer's [head, dest, src] while it is recorded and checked.
AT_WORK = {"kept": 6, "recomputed": 5, "fused": 0}
EIGENVALUES = 3  # of a matrix, in products of it with itself
LINEAR = 12  # vectors of d_model, and half as many of d_mlp, that one position keeps in one layer at work


@dataclass(frozen=True)
class Size:
    """A model's shapes; `itemsize` is bytes of a number of it, `matrices` how many d_model × d_mlp an MLP has."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    matrices: int
    d_vocab: int
    itemsize: int
    kind: str

    def scores(self, n: int) -> int:
        """Bytes of one layer's attention weights, [head, dest, src]."""
        return self.n_heads * n * n * self.itemsize

    def logits(self, n: int) -> int:
        return n * self.d_vocab * self.itemsize

    def position(self, n: int) -> int:
        """Bytes of one layer's activations at n positions."""
        return n * (LINEAR * self.d_model + LINEAR // 2 * self.d_mlp) * self.itemsize

    @property
    def unembedding(self) -> int:
        """HookedTransformer turns its unembedding matrix around, a copy for every pass."""
        return self.d_model * self.d_vocab * self.itemsize if self.kind == "hooked" else 0

    @property
    def layer_weights(self) -> int:
        """Numbers in one layer's matrices."""
        attention = self.d_model * self.d_head * 2 * (self.n_heads + self.n_kv_heads)
        return attention + self.matrices * self.d_model * self.d_mlp

    def cache_bytes(self, n: int) -> int:
        """Keys and values of n tokens in all layers."""
        return 2 * self.n_layers * n * self.n_kv_heads * self.d_head * self.itemsize

    def attention_operations(self, n: int) -> int:
        """Multiply-adds of scores and mixing, [head, dest, src] whole, in all layers."""
        return 2 * self.n_layers * self.n_heads * self.d_head * n * n

    def logits_operations(self, n: int) -> int:
        """Multiply-adds of the logits of n positions."""
        return n * self.d_model * self.d_vocab

    def pass_operations(self, n: int) -> int:
        """Multiply-adds of a pass of n tokens: a part per token, a part per pair of tokens, one row of logits."""
        return n * self.n_layers * self.layer_weights + self.attention_operations(n) + self.logits_operations(1)

    @property
    def gram_operations(self) -> int:
        """Multiply-adds of the norms and Gram matrices of the weights, in float64, each counted as two."""
        small, large = sorted((self.d_model, max(self.d_mlp, 1)))
        mlp = self.matrices * (small**2 * large + EIGENVALUES * small**3)
        heads = self.d_model * self.d_head**2 * (self.n_heads + self.n_kv_heads) * EIGENVALUES
        grams = 2 * self.d_model * (self.d_head * self.n_heads) ** 2
        return 2 * self.n_layers * (mlp + heads + grams)


def size_of(model: Any) -> Size:
    """The shapes of a HookedTransformer or TransformerBridge, as its cfg and its first weight tell them."""
    cfg = model.cfg
    heads = cfg.n_heads
    gated = bool(getattr(cfg, "gated_mlp", False))
    experts = getattr(cfg, "experts_per_token", None) or 1
    return Size(
        n_layers=len(model.blocks),
        n_heads=heads,
        n_kv_heads=getattr(cfg, "n_key_value_heads", None) or heads,
        d_head=getattr(cfg, "d_head", None) or cfg.d_model // heads,
        d_model=cfg.d_model,
        d_mlp=(getattr(cfg, "d_mlp", None) or 0) * experts,
        matrices=3 if gated else 2,
        d_vocab=cfg.d_vocab,
        itemsize=next(model.parameters()).dtype.itemsize,
        kind="hooked" if is_hooked_transformer(model) else "bridge",
    )


def kept_bytes(size: Size, n: int, route: str = "kept", scrap: float = SCRAP) -> dict[str, int]:
    """What a Trace of n tokens holds, by the route (architecture.ROUTES) that it was recorded on.

    `scrap`: the share besides that the heap loses, `HELD` once the recording is over.
    """
    wide = max(4, size.itemsize)
    heads = size.n_heads * size.d_head * (wide if size.itemsize >= 4 else 0)  # what they read, kept where it is exact
    per_position = size.n_kv_heads * (2 * size.d_head + 1) * wide + heads + 2 * size.n_heads * wide + 5 * 8
    if route != "kept":
        per_position += (size.n_heads + size.n_kv_heads) * size.d_head * size.itemsize + size.n_heads * wide
        return {"queries, keys and values of all layers": round((1 + scrap) * size.n_layers * n * per_position)}
    patterns = size.n_layers * size.scores(n)
    return {
        "the attention patterns of all layers": round((1 + scrap) * patterns),
        "values and norms": size.n_layers * n * per_position,
    }


def record_bytes(size: Size, n: int, route: str = "kept", *, verify: bool = False) -> dict[str, int]:
    """The most that recording n tokens holds at once, by what holds it, beyond the model itself.

    All layers are kept when the last one is at work, and again when the unembedding is, which makes the logits of the
    last position alone but with `verify`; the larger of the two counts.
    """
    wide = max(4, size.itemsize) / size.itemsize
    copies = 1 if route == "fused" else 2
    working = {"one layer at work": round((AT_WORK[route] * size.scores(n) + copies * size.position(n)) * wide)}
    ending = {"the logits": 2 * logits_bytes(size, n)} if verify else {"the unembedding": size.unembedding}
    last = max(working, ending, key=lambda each: sum(each.values()))
    return kept_bytes(size, n, route) | last | {"the libraries": BASE}


def logits_bytes(size: Size, n: int) -> int:
    """What every forward pass ends with."""
    return round(1.5 * size.logits(n)) + size.unembedding


def check_recording(model: Any, n: int, route: str = "kept", *, verify: bool = False) -> None:
    """Refuse a recording that would not fit, with the numbers, before it begins."""
    name = getattr(model.cfg, "model_name", None) or "this model"
    needed = record_bytes(size_of(model), n, route, verify=verify)
    check_memory(needed, device_of(model), f"recording {n} tokens with {name}")


def device_of(model: Any) -> Any:
    """Where the model's first weight lies."""
    return next(model.parameters()).device
