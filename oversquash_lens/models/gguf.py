"""What transformers leaves to its caller when it reads a GGUF file: speed, plain weights, BOS, a warning."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from oversquash_lens.models.embedded import say

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

    reader = gguf.GGUFReader(str(path))
    tensors = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    scaling = reader.get_field(f"{reader.get_field('general.architecture').contents()}.rope.scaling.type")
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
