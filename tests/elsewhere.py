"""A pretended accelerator: tensors that say they are elsewhere, and are told apart from those on the CPU.

All of them lie on the CPU. Within `Elsewhere`, a marked tensor's `.device` is `THERE`, what is computed from it is
marked, `.to` and `.cpu()` move the mark, and mixing both kinds in one operation, which a real accelerator refuses, is
noted with the line of ours that did it. So is float64 there, which Apple's devices do not have.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import oversquash_lens

THERE = torch.device("cpu", 0)  # an index makes it differ from the CPU's own name
PACKAGE = Path(oversquash_lens.__file__).parent
CROSSES = {"copy_", "__getitem__", "__setitem__", "index_put_", "grad"}  # these may reach from one to the other


def is_there(x: Tensor) -> bool:
    return getattr(x, "_elsewhere", False)


def _marked(x: Tensor, there: bool) -> Tensor:
    if is_there(x) != there:
        x = x if there and x.grad_fn is None and not x.requires_grad else x.view_as(x)
        x._elsewhere = there
    return x


class Elsewhere(TorchFunctionMode):
    """`mixed` and `wide` fill with "file:line" of ours: devices mixed, and float64 elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed: set[str] = set()
        self.wide: set[str] = set()

    def move(self, model: torch.nn.Module) -> None:
        """The model's weights and buffers are elsewhere from now on."""
        for tensor in (*model.parameters(), *model.buffers()):
            tensor._elsewhere = True
        if hasattr(model.cfg, "device"):
            model.cfg.device = str(THERE)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if getattr(func, "__self__", None) is Tensor.device:
            return THERE if is_there(args[0]) else func(*args)
        if name in ("cpu", "to", "type"):
            return self._moved(func, name, args, kwargs)
        if name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__"):
            return func(*args, **kwargs)
        ours = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(is_there(x) for x in ours)
        if "device" in kwargs and kwargs["device"] is not None:
            there = _names_there(kwargs["device"])
            kwargs["device"] = torch.device("cpu")
        elif there and name not in CROSSES and any(not is_there(x) and x.ndim for x in ours):
            self.mixed.update(_our_line())
        result = func(*args, **kwargs)
        if there:
            self._check(result)
            return tree_map_only(Tensor, lambda x: _marked(x, True), result)
        return result

    def _moved(self, func: Any, name: str, args: tuple, kwargs: dict) -> Tensor:
        this, *rest = args
        there = is_there(this) and name != "cpu"
        for target in (*rest, *kwargs.values()):
            if isinstance(target, Tensor):
                there = is_there(target)
            elif isinstance(target, torch.device) or (isinstance(target, str) and name == "to"):
                there = _names_there(target)
        here = [torch.device("cpu") if isinstance(x, torch.device | str) and name == "to" else x for x in rest]
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        result = func(this, *here, **kwargs)
        result = _marked(result, there)
        if there:
            self._check(result)
        return result

    def _check(self, result: Any) -> None:
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves(result)):
            self.wide.update(_our_line())


def _names_there(device: Any) -> bool:
    return str(device) == str(THERE)


def _our_line() -> Iterator[str]:
    """The innermost line of the package that is running, if the call comes from there and not from the model."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(PACKAGE):
            yield f"{path.relative_to(PACKAGE)}:{frame.lineno} {frame.line}"
            return
        if "transformer_lens" in path.parts or "transformers" in path.parts:
            return
