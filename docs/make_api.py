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

What `import oversquash_lens as osl` gives, from A to Z. Made from the docstrings by `python docs/make_api.py`; a test
holds it to them.
Names behind these are reached through their modules, see [architecture.md](architecture.md).

Every result has a short `repr`, a table in a notebook, `to_dict()` for JSON and `to_frame()` for pandas. Options that
several functions share: `chat` puts a text into the tokenizer's chat template; `bos` begins with BOS (True), without
(False), or as the model itself does (None); `seed` is of whatever is drawn; `verify`, `attention` and `node_probes` are
those of `record`; `memory` is in bytes; `progress` shows a bar. Shapes are in brackets, with axes as in
[glossary.md](glossary.md). What goes wrong is an `OversquashError`: `InputError` for an argument, `ModelError` for a
model, `HookMismatchError` for a recording that does not describe the model, `TraceFileError` for a file.
"""
WIDTH = 100  # of a signature on one line
SECTIONS = {"Args:": "Arguments:", "Returns:": "Returns:", "Raises:": "Raises:"}


def page() -> str:
    by_folder: dict[str, list[str]] = {}
    for name in oversquash_lens.__all__:
        by_folder.setdefault(oversquash_lens._HOME[name].partition(".")[0], []).append(f"[`{name}`](#{name.lower()})")
    lists = [f"- {folder}: {', '.join(names)}" for folder, names in sorted(by_folder.items())]
    entries = [entry(name, getattr(oversquash_lens, name)) for name in oversquash_lens.__all__]
    return "\n".join([HEAD, *lists, "", *entries])


def entry(name: str, found: Any) -> str:
    """One name: its signature, where it is defined, its docstring; of a module or a class, also what it holds."""
    if isinstance(found, ModuleType):
        place = f"Module `{found.__name__}`."
    else:
        code = f"class {name}" if inspect.isclass(found) else f"{name}{shown(found)}"
        place = f"```python\n{code}\n```\n\nIn `oversquash_lens.{oversquash_lens._HOME[name]}`."
    parts = [f"## `{name}`", place, in_markdown(inspect.getdoc(found) or "")]
    if not inspect.isfunction(found) and (members := listed(found)):
        parts.append("\n".join(members))
    return "\n\n".join(parts) + "\n"


def listed(holder: Any) -> list[str]:
    """The public functions of a module, or a class's own methods and properties, with the first line of each."""
    found = []
    for name, each in sorted(vars(holder).items()):
        each = each.__func__ if isinstance(each, classmethod) else each
        own = inspect.isclass(holder) or getattr(each, "__module__", None) == holder.__name__
        line = (inspect.getdoc(each) or "").partition("\n")[0].strip()
        if name.startswith("_") or not line:
            continue
        if isinstance(each, property):
            found.append(f"- `{name}`: {line}")
        elif inspect.isfunction(each) and own:
            found.append(f"- `{name}({', '.join(parameters(each))})`: {line}")
    return found


def shown(function: Callable) -> str:
    """A function's signature, annotations as they are written; one parameter a line where it is long."""
    taken, gives = parameters(function), inspect.signature(function).return_annotation
    line = f"({', '.join(taken)}) -> {gives}"
    return line if len(line) <= WIDTH else "(\n" + "".join(f"    {each},\n" for each in taken) + f") -> {gives}"


def parameters(function: Callable) -> list[str]:
    found: list[str] = []
    for each in inspect.signature(function).parameters.values():
        if each.name in ("self", "cls"):
            continue
        if each.kind is each.KEYWORD_ONLY and not any(one.startswith("*") for one in found):
            found.append("*")
        text = re.sub(r": ('|\")(.*?)\1", r": \2", str(each), count=1)
        found.append(re.sub(r"<built-in function (\w+)>", r"\1", text))
    return found


def in_markdown(doc: str) -> str:
    """A docstring with the entries of its sections as lists."""
    lines, section = [], ""
    for line in doc.splitlines():
        if line in SECTIONS:
            section = line
            lines += [SECTIONS[line], ""]
        elif not section or not line.startswith("    "):
            section = section if not line else ""
            lines.append(line)
        elif section != "Returns:" and (start := re.match(r" {4}(\w+): ", line)):
            lines.append(f"- `{start[1]}`: {line[start.end() :]}")
        else:
            lines.append(line[4:] if section == "Returns:" else line[6:])
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(page(), "utf-8")
