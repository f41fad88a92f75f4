"""Write docs/api.md from the docstrings of what is public: python docs/make_api.py"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import oversquash_lens

HEAD = """# Public names

What `import oversquash_lens as osl` gives. Made from the docstrings by `python docs/make_api.py`; a test
holds it to them.
Names behind these are reached through their modules, see [architecture.md](architecture.md).
"""


def page() -> str:
    return "\n".join([HEAD, *(entry(name, getattr(oversquash_lens, name)) for name in oversquash_lens.__all__)])


def entry(name: str, found: Any) -> str:
    """One name: its signature, where it is defined, its docstring; of a module, also what it holds."""
    home = oversquash_lens._HOME[name]
    if isinstance(found, ModuleType):
        members = [
            f"- `{member}{shown(each)}`: {first_line(each)}"
            for member, each in sorted(vars(found).items())
            if inspect.isfunction(each) and not member.startswith("_") and each.__module__ == found.__name__
        ]
        return f"## `{name}`\n\nModule `{found.__name__}`.\n\n{inspect.getdoc(found)}\n\n" + "\n".join(members) + "\n"
    signature = "" if inspect.isclass(found) else shown(found)
    code = f"```python\n{name}{signature}\n```"
    return f"## `{name}`\n\n{code}\n\nIn `oversquash_lens.{home}`.\n\n{inspect.getdoc(found)}\n"


def shown(function: Callable) -> str:
    """Its signature, annotations as they are written."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(function)))


def first_line(found: Any) -> str:
    return (inspect.getdoc(found) or "").partition("\n")[0]


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(page(), "utf-8")
