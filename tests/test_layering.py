"""Imports run one way: errors ← files ← models, record ← measure ← render ← paper ← cli; nothing heavy at import."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import oversquash_lens

ROOT = Path(oversquash_lens.__file__).parent
# Rooms by height: a module may import from rooms below its own, and from its own room.
HEIGHTS = {"errors": 0, "files": 1, "models": 2, "record": 2, "measure": 3, "render": 4, "paper": 5, "cli": 6}
MODEL_ROOM = ("models.loading", "models.default_model", "weights", "sources", "conversion", "gguf_file", "gguf_header")
NEVER_AT_IMPORT = {"transformer_lens", "transformers", "matplotlib", "gguf", "safetensors", "rich", "huggingface_hub"}
NEVER_AT_IMPORT |= {"pyarrow", "ray"}
NEVER_AT_ALL = {"pickle", "dill", "joblib", "cloudpickle", "requests"}
MODULES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str | None:
    """errors, files, models, record, …; None for the package itself, which holds names only."""
    parts = module.split(".")[1:]
    if not parts:
        return None
    return "models" if parts[0] in MODEL_ROOM else parts[0]


def imports(tree: ast.AST, everywhere: bool) -> list[str]:
    """Modules named by import statements; `everywhere` includes those inside functions."""
    found = []
    stack = list(ast.iter_child_nodes(tree))
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only: they say which room they come from"
            found += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            stack += ast.iter_child_nodes(node)
    return found


def modules_of_ours(names: list[str]) -> set[str]:
    known = {name_of(path) for path in MODULES}
    return {name for name in names if name in known}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    mine = room(name_of(path))
    if mine is None:
        return
    assert mine in HEIGHTS, f"{mine} is a room that nobody has given a place"
    for other in modules_of_ours(imports(ast.parse(path.read_text()), everywhere=True)):
        theirs = room(other)
        if theirs is None or theirs == mine:
            continue
        assert HEIGHTS[theirs] < HEIGHTS[mine], f"{name_of(path)} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_imports_wait_until_they_are_needed(path: Path) -> None:
    name = name_of(path)
    found = {other.split(".")[0] for other in imports(ast.parse(path.read_text()), everywhere=False)}
    assert not found & NEVER_AT_IMPORT
    if room(name) != "render":
        assert "circuitsvis" not in found
    if room(name) in (None, "errors", "storage", "cli") or name.endswith(("models.default_model", "record")):
        assert not found & {"torch", "numpy", "einops", "jaxtyping", "tqdm"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_pickles_or_asks_the_network_by_itself(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not {other.split(".")[0] for other in imports(tree, everywhere=True)} & NEVER_AT_ALL
    calls = {
        f"{node.func.value.id}.{node.func.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
    }
    assert not calls & {"torch.load", "torch.save", "numpy.load", "np.load"}


def test_models_and_record_do_not_know_each_other() -> None:
    for path in MODULES:
        mine = room(name_of(path))
        if mine in ("models.loading", "record"):
            rooms = {room(other) for other in modules_of_ours(imports(ast.parse(path.read_text()), everywhere=True))}
            assert not rooms & ({"models.loading", "record"} - {mine}), name_of(path)


def test_only_record_knows_hook_names() -> None:
    """Two names are where the truth starts and ends; all else that differs between models is a row there."""
    for path in MODULES:
        if room(name_of(path)) in ("record", None):
            continue
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value
        }
        named = {text for text in strings if text.startswith(("attn.hook", "mlp.hook", "ln1.", "ln2.", "hook_resid"))}
        assert not named, f"{name_of(path)}: {named}"


@pytest.mark.parametrize("name", oversquash_lens.__all__)
def test_every_public_name_is_there(name: str) -> None:
    found = getattr(oversquash_lens, name)
    home = oversquash_lens._HOME[name]
    module = importlib.import_module(f"oversquash_lens.{home}")
    assert found is (module if name in oversquash_lens._MODULES else getattr(module, name))
    assert found.__doc__


def test_the_public_names_are_sorted_and_listed() -> None:
    assert oversquash_lens.__all__ == sorted(set(oversquash_lens.__all__))
    assert set(oversquash_lens.__all__) <= set(dir(oversquash_lens))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = oversquash_lens.no_such_name


def test_record_is_a_package_and_a_verb() -> None:
    assert oversquash_lens.capture.__name__ == "oversquash_lens.capture"
    assert callable(oversquash_lens.capture)
    assert oversquash_lens.capture.hooks.Hook is not None
