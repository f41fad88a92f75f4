"""The house: imports one way, folders and modules of their size, unique names, typed public functions."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import runpy
import subprocess
import sys
import types
import typing
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

import oversquash_lens

ROOT = Path(oversquash_lens.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
DOCS = ROOT.parent / "docs"

# What each folder, or module at the root, may import besides itself.
BASE = {"errors", "numerics", "storage", "parts", "memory", "results"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "numerics": {"errors"},
    "results": {"errors", "numerics"},
    "storage": {"errors", "numerics"},
    "parts": {"errors", "numerics", "storage"},
    "memory": {"errors", "numerics"},
    "models": BASE | {"capture"},
    "capture": BASE,
    "identity": BASE | {"capture"},
    "paths": BASE | {"capture"},
    "jacobian": BASE | {"capture", "paths"},
    "collapse": BASE | {"capture", "jacobian", "identity"},
    "swaps": BASE | {"identity", "capture", "paths", "jacobian", "collapse"},
    "analyses": BASE | {"swaps", "capture", "paths", "jacobian", "collapse"},
    "sweeps": BASE | {"swaps", "models", "identity", "capture", "paths", "jacobian", "collapse", "analyses"},
    "viz": BASE | {"swaps", "capture", "paths", "jacobian", "collapse", "analyses", "sweeps"},
    "paper": BASE | {"swaps", "models", "identity", "capture", "paths", "jacobian", "collapse", "analyses", "viz"},
    "cli": BASE | {"swaps", "models", "capture", "paths", "jacobian", "collapse", "analyses", "sweeps", "viz", "paper"},
}
# From the library's own folders, paper/ takes what is public only: documented names, these modules, and these names:
# a result's class, the rule that makes ids of a piece of text, HookedTransformer's cache, and a model's caps of logits.
PAPER_MAY = {"capture.edits", "collapse.families", "collapse.curve", "collapse.precision", "collapse.lemmas"}
PAPER_MAY |= {"jacobian.measured.MeasuredSensitivity", "capture.tokens.text_ids", "capture.prefixes.hooked_cache_class"}
PAPER_MAY |= {"capture.checks.logits_from"}

NEVER_AT_IMPORT = {"transformer_lens", "transformers", "matplotlib", "gguf", "safetensors", "rich", "huggingface_hub"}
NEVER_AT_IMPORT |= {"pyarrow", "ray", "pandas", "jinja2"}
HEAVY = {"torch", "numpy", "einops", "jaxtyping", "tqdm"}
NEVER_AT_ALL = {"pickle", "dill", "joblib", "cloudpickle", "requests"}

SHARED_OPTIONS = {"chat", "bos", "seed", "verify", "node_probes", "attention", "memory", "progress"}
HOOK_NAME = re.compile(
    r"^(blocks\.|attn\.|mlp\.|ln[12]\.|ln_final\.)?(hook_(resid|attn|mlp|pattern|q|k|v|z|rot|scale))"
)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def folder(module: str) -> str | None:
    """errors, models, capture, …; None for the package itself, which holds names only."""
    parts = module.split(".")[1:]
    return parts[0] if parts else None


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree: ast.AST, everywhere: bool) -> list[str]:
    """Modules named by import statements; `everywhere` includes those inside functions and for type checkers only."""
    found: list[str] = []
    stack = list(ast.iter_child_nodes(tree))
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only: they say which folder they come from"
            found += [str(node.module)] + [f"{node.module}.{alias.name}" for alias in node.names]
        if everywhere or not (isinstance(node, ast.FunctionDef | ast.Lambda) or is_type_checking(node)):
            stack += ast.iter_child_nodes(node)
    return found


def ours(names: list[str]) -> set[str]:
    return {name for name in names if name in NAMES}


# ---------------------------------------------------------------- imports


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_are_those_that_are_allowed(path: Path) -> None:
    mine = folder(name_of(path))
    if mine is None:
        return
    assert mine in ALLOWED, f"{mine} has no row in ALLOWED"
    for other in ours(imports(ast.parse(path.read_text()), everywhere=True)):
        theirs = folder(other)
        if theirs not in (None, mine):
            assert theirs in ALLOWED[mine], f"{name_of(path)} imports {other}"


def test_no_module_imports_itself_by_a_detour() -> None:
    """What runs when a module is imported makes no circle; imports inside functions and for types are no part of it."""
    graph = {}
    for path in MODULES:
        found = ours(imports(ast.parse(path.read_text()), everywhere=False))
        graph[name_of(path)] = {other for other in found if other.count(".") and other != name_of(path)}
    done: set[str] = set()

    def walk(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " imports ".join([*above[above.index(module) :], module])
        if module not in done:
            for other in graph.get(module, ()):
                walk(other, (*above, module))
            done.add(module)

    for module in graph:
        walk(module, ())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_imports_wait_until_they_are_needed(path: Path) -> None:
    name = name_of(path)
    found = {other.split(".")[0] for other in imports(ast.parse(path.read_text()), everywhere=False)}
    assert not found & NEVER_AT_IMPORT
    if folder(name) != "viz":
        assert "circuitsvis" not in found
    if folder(name) in (None, "errors", "storage", "cli") or name.endswith("default_model"):
        assert not found & HEAVY


def test_importing_the_package_and_asking_for_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, oversquash_lens, oversquash_lens.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & set(sys.argv[1:])), file=sys.stderr)"
    )
    names = sorted(NEVER_AT_IMPORT | HEAVY - {"tqdm"})
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


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


def test_the_paper_is_a_client() -> None:
    """paper/ imports what docs/api.md documents, the modules named above, and viz."""
    public = {f"oversquash_lens.{oversquash_lens._HOME[name]}.{name}" for name in oversquash_lens.__all__}
    may = {f"oversquash_lens.{module}" for module in PAPER_MAY}
    for path in (ROOT / "paper").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("oversquash_lens"):
                continue
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                free = folder(str(node.module)) in (BASE | {"viz", "paper", "models", "identity"})
                assert (
                    free or full in public or full in may or node.module in may or node.module == "oversquash_lens"
                ), f"{name_of(path)} imports {full}"


# ---------------------------------------------------------------- hooks and model classes


def test_only_capture_knows_hook_names_and_model_classes() -> None:
    """Elsewhere neither a hook's name nor a class of TransformerLens stands in code; messages may name a class."""
    for path in MODULES:
        if folder(name_of(path)) in ("capture", "models"):
            continue
        tree = ast.parse(path.read_text())
        texts = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value
        }
        assert not {text for text in texts if HOOK_NAME.match(text)}, name_of(path)
        assert not texts & {"HookedTransformer", "TransformerBridge"}, name_of(path)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names & {"HookedTransformer", "TransformerBridge"}, name_of(path)


# ---------------------------------------------------------------- sizes and names


def test_folders_and_modules_keep_their_size() -> None:
    for place in [ROOT, *(each for each in ROOT.iterdir() if each.is_dir())]:
        modules = [path for path in place.glob("*.py") if path.name not in ("__init__.py", "__main__.py")]
        assert len(modules) <= 18, f"{place.name} has more than 18 modules: group them"
    for path in MODULES:
        if path.name in ("__init__.py", "__main__.py"):
            continue
        lines = path.read_text().count("\n")
        assert 40 <= lines <= 420, f"{name_of(path)} has {lines} lines: merge it, or split it by subject"


def test_names_of_modules_and_classes_are_unique() -> None:
    modules = Counter(path.stem for path in MODULES if path.name not in ("__init__.py", "__main__.py"))
    # A command's module is named like what it runs.
    twice = {name for name, count in modules.items() if count > 1} - {path.stem for path in (ROOT / "cli").glob("*.py")}
    assert not twice, twice
    classes = Counter(
        node.name
        for path in MODULES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not {name for name, count in classes.items() if count > 1}


@pytest.mark.parametrize("name", oversquash_lens.__all__)
def test_every_public_name_is_there(name: str) -> None:
    found = getattr(oversquash_lens, name)
    home = importlib.import_module(f"oversquash_lens.{oversquash_lens._HOME[name]}")
    assert found is getattr(home, name)
    assert isinstance(found, types.ModuleType) == (name in oversquash_lens._MODULES)
    assert found.__doc__


def test_public_names_are_few_sorted_documented_and_typed() -> None:
    assert oversquash_lens.__all__ == sorted(set(oversquash_lens.__all__))
    assert len(oversquash_lens.__all__) <= 40
    assert set(oversquash_lens.__all__) <= set(dir(oversquash_lens))
    assert set(oversquash_lens.__all__) == set(oversquash_lens._HOME)
    documented = re.findall(r"^## `([A-Za-z_]+)", (DOCS / "api.md").read_text("utf-8"), flags=re.M)
    assert sorted(documented) == oversquash_lens.__all__
    (block,) = [node for node in ast.parse((ROOT / "__init__.py").read_text()).body if is_type_checking(node)]
    typed = {
        alias.name: str(node.module).removeprefix("oversquash_lens.")
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == oversquash_lens._HOME


def test_no_module_of_the_package_hides_a_public_function() -> None:
    """Python binds a submodule on its package: one named like a function would take the function's place."""
    assert not {path.stem for path in ROOT.iterdir()} & set(oversquash_lens.__all__)


def test_a_misspelt_or_moved_name_says_what_was_meant() -> None:
    with pytest.raises(AttributeError, match="did you mean 'measured_sensitivity'"):
        _ = oversquash_lens.mesured_sensitivity
    for old, new in oversquash_lens._MOVED.items():
        with pytest.raises(AttributeError, match=re.escape(new)):
            getattr(oversquash_lens, old)
        module, _, attribute = new.rpartition(".")
        with suppress(ModuleNotFoundError):
            importlib.import_module(new)  # it is a module itself, which its package then has as an attribute
        assert hasattr(importlib.import_module(module), attribute)
    with pytest.raises(AttributeError, match=r"docs/api\.md"):
        _ = oversquash_lens.zzzzzzzzz
    assert re.fullmatch(r"\d+\.\d+.*", oversquash_lens.__version__)


# ---------------------------------------------------------------- functions


def functions() -> list[types.FunctionType]:
    found = []
    for name in sorted(NAMES):
        if name.endswith("__main__"):
            continue
        module = importlib.import_module(name)
        for each in vars(module).values():
            if getattr(each, "__module__", None) != name:
                continue
            members = vars(each).values() if inspect.isclass(each) else [each]
            found += [one for one in members if isinstance(one, types.FunctionType)]
    return found


def for_type_checkers(module: types.ModuleType) -> dict[str, object]:
    """The names that a module imports under `if TYPE_CHECKING:`."""
    found: dict[str, object] = {}
    for block in ast.parse(inspect.getsource(module)).body:
        if is_type_checking(block):
            exec(compile(ast.Module(block.body, []), "<types>", "exec"), found)
    return found


def test_every_annotation_means_something() -> None:
    unresolved = []
    for function in functions():
        module = sys.modules[function.__module__]
        try:
            typing.get_type_hints(function, vars(module) | for_type_checkers(module))
        except NameError as error:
            unresolved.append(f"{function.__module__}.{function.__qualname__}: {error}")
    assert not unresolved


def test_public_functions_take_few_options_and_explain_them() -> None:
    for name in oversquash_lens.__all__:
        found = getattr(oversquash_lens, name)
        if not isinstance(found, types.FunctionType):
            continue
        parameters = set(inspect.signature(found).parameters) - SHARED_OPTIONS
        assert len(parameters) <= 9, f"{name} has {len(parameters)} options of its own"
        doc = inspect.getdoc(found) or ""
        for parameter in parameters - {"model", "trace", "prompt"}:
            assert re.search(rf"\b{parameter}\b", doc), f"{name} does not say what {parameter} is"


def test_the_api_page_is_what_the_docstrings_say() -> None:
    made = runpy.run_path(str(DOCS / "make_api.py"))["page"]()
    assert (DOCS / "api.md").read_text("utf-8") == made, "run python docs/make_api.py"
