"""Is a GGUF file's header one that its own bytes can fill? Asked before any library reads it.

gguf believes every count that a header names: an array of 2⁶⁰ numbers in a file of a hundred bytes keeps it busy
until the memory is gone. Here each length is held against what is left of the file, so a walk takes no longer than
the file allows.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_LAYERS = 1000  # the deepest published models have some hundred; each costs a loader time before it sees a weight
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of GGUF's scalar types
_WHOLE = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_STRING, _ARRAY = 8, 9


def check_header(path: Path) -> None:
    """Raise ValueError where the header promises more than the file holds, or a depth that no model has."""
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != MAGIC:
            raise ValueError(f"it starts with {magic!r}, not with {MAGIC!r}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(data).header()


class _Walk:
    """A position in the file that only moves forward, and never past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, len(MAGIC)

    def header(self) -> None:
        version = self._number("<I")
        if version not in VERSIONS:
            raise ValueError(f"its GGUF version is {version}, expected one of {VERSIONS}")
        tensors, fields = self._number("<Q"), self._number("<Q")
        self._check_count(tensors, 24, "tensors")
        self._check_count(fields, 13, "fields")
        for _ in range(fields):
            name = self._text()
            value = self._value(self._number("<I"))
            if name.endswith(b".block_count") and isinstance(value, int) and not 0 < value <= MOST_LAYERS:
                raise ValueError(f"it names {value} layers, expected 1 … {MOST_LAYERS}")

    def _value(self, kind: int, depth: int = 0) -> int | None:
        """Step over one value; returns it where it is a whole number."""
        if kind in _WHOLE:
            return self._number(_WHOLE[kind])
        if kind in _SIZES:
            self._step(_SIZES[kind])
        elif kind == _STRING:
            self._text()
        elif kind == _ARRAY and depth < 4:
            inner, count = self._number("<I"), self._number("<Q")
            self._check_count(count, _SIZES.get(inner, 8), "values of an array")
            if inner in _SIZES:
                self._step(count * _SIZES[inner])
            else:
                for _ in range(count):
                    self._value(inner, depth + 1)
        else:
            raise ValueError(f"a value of the unknown kind {kind} stands at byte {self.at}")
        return None

    def _text(self) -> bytes:
        length = self._number("<Q")
        self._check_count(length, 1, "bytes of a text")
        self._step(length)
        return self.data[self.at - length : self.at] if length < 256 else b""

    def _number(self, form: str) -> int:
        size = struct.calcsize(form)
        self._step(size)
        return struct.unpack_from(form, self.data, self.at - size)[0]

    def _check_count(self, count: int, least: int, what: str) -> None:
        """`count` things of at least `least` bytes each must fit into what is left."""
        if count * least > len(self.data) - self.at:
            raise ValueError(f"it announces {count} {what} at byte {self.at}, more than the file holds")

    def _step(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, in the middle of its header")
