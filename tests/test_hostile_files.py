"""A small part of the fuzz of files, which .ci/nightly runs in full: nothing foreign is raised, nothing wrong loads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from bad_days import as_users_run_it

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.hostile_files import KINDS, run


def test_hostile_files_are_refused_in_one_line_or_read_as_what_they_are() -> None:
    with as_users_run_it():
        counted, wrong = run(150, seed=1)
    assert wrong == []
    assert {name.split(": ")[0] for name in counted} == set(KINDS)
    assert sum(outcomes["refused"] for outcomes in counted.values()) > 90


def test_the_fuzz_sees_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check of what a trace holds, foreign exceptions are raised, and counted."""
    monkeypatch.setattr("oversquash_lens.capture.trace._check", lambda header, tensors: None)
    with as_users_run_it():
        counted, wrong = run(60, seed=2, only="trace")
    assert len(wrong) == sum(outcomes["WRONG"] for outcomes in counted.values()) > 0
