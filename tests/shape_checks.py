"""Shape checks where there are shapes; elsewhere beartype alone checks, which takes far less time.

jaxtyping's import hook wraps every function of the package in one that remembers axes. Most have none to remember, and
the wrapping, not the model, was what most of the tests' time went to. Imported before the package is.
"""

from __future__ import annotations

import builtins
import inspect
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, get_args

import jaxtyping

ORIGINAL = jaxtyping.jaxtyped
UNKNOWN = object()
NAME = re.compile(r"(?<![\w.])[A-Za-z_]\w*")


def shaped(hint: Any, names: dict[str, Any]) -> bool:
    """Whether an annotation, or the source of one, speaks of a jaxtyping shape, by itself or by an alias.

    So may a name that is not known yet: a class of the same module further down, or one that only type checkers import.
    """
    if isinstance(hint, str):
        known = [names.get(name, getattr(builtins, name, UNKNOWN)) for name in NAME.findall(hint)]
        return any(each is UNKNOWN or (not isinstance(each, str) and shaped(each, names)) for each in known)
    return type(hint).__module__.startswith("jaxtyping") or any(shaped(each, {}) for each in get_args(hint))


def checked(function: Callable, typechecker: Callable) -> Callable:
    """By the type checker alone, or not where jaxtyping is switched off; with the annotations as they are written."""
    written = dict(function.__annotations__)
    strict = typechecker(function)
    function.__annotations__ = written  # beartype puts what they mean in their place

    @wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else strict)(*args, **kwargs)

    return either


def jaxtyped(*args: Any, typechecker: Any = None, **kwargs: Any) -> Any:
    """In the place of jaxtyping's own decorator."""
    if args:
        return ORIGINAL(*args, typechecker=typechecker, **kwargs)

    def decorate(function: Callable) -> Callable:
        if inspect.isfunction(function):
            names = function.__globals__
            if not any(shaped(hint, names) for hint in function.__annotations__.values()):
                inner = "<locals>" in function.__qualname__  # made anew at each call of what it is in
                return function if inner or typechecker is None else checked(function, typechecker)
        return ORIGINAL(typechecker=typechecker, **kwargs)(function)

    return decorate


jaxtyping.jaxtyped = jaxtyped
