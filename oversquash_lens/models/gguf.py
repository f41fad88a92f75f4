"""What transformers leaves to its caller when it reads a GGUF file: a header to trust, speed, plain weights, BOS.

gguf believes every count that a header names: an array of 2⁶⁰ numbers in a file of a hundred bytes keeps it busy
until the memory is gone. `check_header` holds each length against what is left of the file, so that it takes no longer
than the file allows.
"""

from __future__ import annotations

import mmap
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from oversquash_lens.models.default_model import say

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_LAYERS = 1000  # the deepest published models have some hundred; each costs a loader time before it sees a weight
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of GGUF's scalar types
_WHOLE = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_STRING, _ARRAY = 8, 9
_PATCHING = threading.Lock()


def dense() -> dict[str, Any]:
    """Newer transformers may keep GGUF weights packed; the measures need plain matrices."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def bos(path: Path) -> dict[str, Any]:
    """What the file itself says about a BOS token; transformers 4 does not look and always adds one."""
    import gguf

    field = gguf.GGUFReader(str(path)).get_field("tokenizer.ggml.add_bos_token")
    return {} if field is None else {"add_bos_token": bool(field.contents())}


def notice_scaled_rope(path: Path) -> None:
    """transformers drops what a GGUF file says of scaled rotary positions (Llama 3.1 and later): say so."""
    import gguf

    reader: Any = gguf.GGUFReader(str(path))
    tensors = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    architecture = reader.get_field("general.architecture")
    scaling = None if architecture is None else reader.get_field(f"{architecture.contents()}.rope.scaling.type")
    if tensors or (scaling is not None and scaling.contents() != "none"):
        say(
            f"{path.name} scales its rotary positions, which transformers does not read from GGUF: far "
            "positions are not as the model was trained. Its Hugging Face folder or hub name has them right."
        )


@contextmanager
def read_once(*, show_progress: bool) -> Iterator[None]:
    """For the time of one load, remember what transformers would otherwise ask gguf for again and again.

    It parses the file's header three times (49,152 tokens, each a slice of a memory map) and builds gguf's
    name map once per submodule (397 times for SmolLM2). Remembered, and sliced from a plain array, loading
    takes a quarter of the time. If transformers changes how it reads, this saves nothing and harms nothing.
    """
    import gguf
    import numpy as np

    class PlainReader(gguf.GGUFReader):
        """Slices of a plain array over the same pages: np.memmap pays for each one."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(np.ndarray)

    remembered = lru_cache(maxsize=1)
    with _PATCHING, ExitStack() as undo:
        _wrap(undo, gguf, "GGUFReader", lambda _: remembered(PlainReader))
        _wrap(undo, gguf, "get_tensor_name_map", remembered)
        with suppress(ImportError):  # transformers is about to retire this module
            from transformers import modeling_gguf_pytorch_utils as older

            _wrap(undo, older, "tqdm", lambda bar: partial(bar, disable=not show_progress))
        yield


def _wrap(undo: ExitStack, module: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace `module.name`, if there is one, until `undo` closes."""
    if hasattr(module, name):
        undo.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, wrap(getattr(module, name)))


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
