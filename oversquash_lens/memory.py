"""How much memory there is for a run: of the machine, of the container, of the accelerator, or what the user says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
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
