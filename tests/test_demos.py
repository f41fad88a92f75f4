"""The notebooks' form; that they run is what `pytest --nbmake demos` says."""

import json
from pathlib import Path

import pytest

DEMOS = sorted((Path(__file__).parent.parent / "demos").glob("*.ipynb"))


@pytest.fixture(params=DEMOS, ids=lambda path: path.stem)
def notebook(request):
    return request.param.stem, json.loads(request.param.read_text("utf-8"))


def sources(notebook: dict, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_demos_are_there():
    names = {"01_first_trace", "02_representational_collapse", "03_paper_figures", "05_hooks_in_your_code"}
    assert names <= {path.stem for path in DEMOS}


def test_the_first_cell_installs_the_package_only_where_it_is_missing(notebook):
    _, content = notebook
    first, *rest = sources(content, "code")
    assert content["cells"][0]["cell_type"] == "code"
    assert 'importlib.util.find_spec("oversquash_lens") is None' in first
    pip = [line for line in first.splitlines() if "pip" in line]
    assert pip == ["    %pip install -q oversquash-lens"]  # no constraints, no torch, inside the `if`
    assert not any("pip install" in source for source in rest)


def test_the_badge_opens_this_notebook_in_colab(notebook):
    name, content = notebook
    badge = sources(content, "markdown")[0].splitlines()[0]
    assert badge.startswith("[![Open In Colab]")
    assert badge.endswith(f"/demos/{name}.ipynb)")


def test_no_output_is_stored_and_any_python_kernel_opens_it(notebook):
    _, content = notebook
    assert content["nbformat"] == 4
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
