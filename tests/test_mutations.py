"""The table of mutations is about the package as it is now; .ci/nightly runs it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import mutations
from benchmarks.mutation_rows import ROWS, Mutation
from benchmarks.mutations import judged, occurrences

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.file.split('/')[-1]}: {row.name}")
def test_every_old_text_stands_once_and_every_test_is_there(row: Mutation) -> None:
    assert occurrences(row) == 1
    assert row.new != row.old
    assert row.tests
    for each in row.tests:
        file, _, name = each.partition("::")
        text = (ROOT / file).read_text("utf-8")
        assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE), each


def test_there_are_enough_of_them_and_each_but_once() -> None:
    assert len(ROWS) >= 49
    assert len({row.name for row in ROWS}) == len({(row.file, row.old) for row in ROWS}) == len(ROWS)
    folders = {row.file.split("/")[1] for row in ROWS}
    assert folders >= {"capture", "paths", "jacobian", "collapse", "analyses"}


def test_a_row_is_judged_by_its_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "module.py"
    file.write_text("answer = 42\nother = answer\n", "utf-8")

    def passes(root: Path, tests: Sequence[str]) -> bool:
        return "42" in file.read_text("utf-8") or tests == ("blind",)

    monkeypatch.setattr(mutations, "passes", passes)
    row = Mutation("another", "module.py", "42", "43", ("sees",))
    assert judged(row, tmp_path, {}) == "killed"
    assert judged(row._replace(tests=("blind",)), tmp_path, {}) == "survived"
    assert judged(row._replace(old="answer"), tmp_path, {}) == "stale"
    assert judged(row._replace(tests=("blind",), equivalent="why"), tmp_path, {}) == "equivalent"
    assert judged(row._replace(equivalent="why"), tmp_path, {}) == "stale"
    file.write_text("answer = 44\n", "utf-8")
    assert judged(row._replace(old="44"), tmp_path, {}) == "stale"  # its tests fail as it is
    assert file.read_text("utf-8") == "answer = 44\n"
