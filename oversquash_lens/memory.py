"""Bytes that are there, bytes that a model's pass and recording need, and the refusal with both numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from oversquash_lens.errors import InputError, one_line

MEMORY_VARIABLE = "OVERSQUASH_LENS_MEMORY"
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_UNLIMITED = 1 << 60  # version 1 writes about 2⁶³ where there is no limit


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes that a run on this device may take beyond what the process already holds.

    OVERSQUASH_LENS_MEMORY ("12GB", "800 MiB", a number of bytes) is believed before anything else. Otherwise the least
    of what the machine, the container (cgroups 1 and 2) and the process's own limit leave, or what the accelerator
    says is free of its memory.
    """
    chosen = os.environ.get(MEMORY_VARIABLE)
    if chosen:
        return parse_bytes(chosen)
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    import psutil

    limits = [psutil.virtual_memory().available, *_container_limits(), *_process_limits()]
    return max(0, min(limits))


def resident_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes that this process holds now, in the machine's memory or the accelerator's."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    import psutil

    return psutil.Process().memory_info().rss


def parse_bytes(text: str) -> int:
    """Bytes of an amount as people write it.

    >>> parse_bytes("1.5 GB"), parse_bytes("2MiB"), parse_bytes("4096")
    (1500000000, 2097152, 4096)
    """
    found = _AMOUNT.fullmatch(text)
    if found is None or (found[3] and not found[2]):
        raise InputError(
            f"expected an amount of memory, got {MEMORY_VARIABLE}={one_line(text, 60)!r}: write 12GB, 800MiB or a "
            "number of bytes"
        )
    power = "kmgt".index(found[2].lower()) + 1 if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def in_words(size: float | int) -> str:
    """An amount for people: three digits and a unit of 1000.

    >>> in_words(18_119_393_280), in_words(999), in_words(52_000_000)
    ('18.1 GB', '999 B', '52 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def check_memory(needed: Mapping[str, int], device: torch.device | str, what: str) -> None:
    """Refuse what would not fit, with the numbers, before anything is allocated."""
    total, there = sum(needed.values()), available_bytes(device)
    if total <= there:
        return
    part, most = max(needed.items(), key=lambda each: each[1])
    raise InputError(
        f"{what} needs about {in_words(total)} of memory beyond what is in use ({in_words(most)} of it for {part}), "
        f"and {in_words(there)} are there; expected less than that: take a shorter prompt, load the model with "
        f"dtype='bfloat16', free some memory, or set {MEMORY_VARIABLE} if you know of more"
    )


def _container_limits() -> list[int]:
    """What the limits of this process's cgroup and of those above it leave."""
    try:
        lines = _OWN_CGROUP.read_text("ascii", "replace").splitlines()
    except OSError:  # no Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers not in ("", "memory"):
            continue
        root, names = (
            (_CGROUPS, ("memory.max", "memory.current"))
            if not controllers
            else (_CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"))
        )
        inside = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(inside) + 1):
            found += _left_in(root.joinpath(*inside[:depth]), *names)
    return found


def _left_in(folder: Path, limit_name: str, used_name: str) -> list[int]:
    """Limit less use of one cgroup, what the kernel can drop of file caches not counted as used; [] for no limit."""
    try:
        limit = int((folder / limit_name).read_text())
        used = int((folder / used_name).read_text())
    except (OSError, ValueError):  # not there, or "max"
        return []
    if limit >= _UNLIMITED:
        return []
    try:
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used -= int(counts.get("inactive_file", counts.get("total_inactive_file", 0)))
    except (OSError, ValueError):
        pass
    return [limit - used]


def _process_limits() -> list[int]:
    """What `ulimit -v` leaves of address space."""
    try:
        import resource
    except ImportError:  # Windows
        return []
    import psutil

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return [] if limit == resource.RLIM_INFINITY else [limit - psutil.Process().memory_info().vms]


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
