"""Bad inputs at every door: what comes back is one line that says what came, what was expected and what to do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from bad_commands import COMMANDS, FILES, Command
from bad_days import Case, World, as_users_run_it, faults
from bad_files import CASES as FILE_CASES
from bad_inputs import CASES as INPUT_CASES
from bad_sweeps import CASES as SWEEP_CASES
from small_generators import characters
from small_generators import model as speaking_model

import oversquash_lens as osl
from oversquash_lens.models import loading
from oversquash_lens.models.sources import Weights

CASES = [*INPUT_CASES, *FILE_CASES, *SWEEP_CASES]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def shared() -> World:
    return World()


@pytest.fixture
def world(shared: World, tmp_path: Path) -> Iterator[World]:
    shared.folder = tmp_path
    with as_users_run_it():
        yield shared


# Messages that are still to be mended, in modules that somebody else is at work on: each must go from this list.
def known(cases: Sequence[Case | Command]) -> list[Any]:
    return [pytest.param(case, id=str(case)) for case in cases]


@pytest.mark.parametrize("case", known(CASES))
def test_a_mistake_is_answered(case: Case, world: World) -> None:
    with pytest.raises(case.kind) as caught:
        case.call(world)
    assert faults(str(caught.value), case.came) == [], str(caught.value)


@pytest.fixture
def shell(cli: Callable, shared: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """The command line; where no model is named, a small one stands in for the embedded default."""

    small = Weights(speaking_model(), characters(), "a small model")
    monkeypatch.setattr(loading, "_find_embedded", lambda loading: small)
    monkeypatch.setattr(loading, "_bridge", lambda *arguments: shared.model)
    monkeypatch.setattr(loading, "_predicted", lambda found: None)  # the model that answers is another one
    with as_users_run_it():
        yield cli


@pytest.mark.parametrize("command", known(COMMANDS))
def test_a_mistyped_command_is_one_line(command: Command, shell: Callable, tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    result = shell(*(argument.replace("@", str(tmp_path)) for argument in command.arguments))
    assert (result.code, result.out) == (2, "")
    *progress, line = [each for each in result.err.splitlines() if each.strip()]
    assert all(each.startswith("loading ") for each in progress), progress
    assert line.startswith("oversquash-lens"), line
    assert faults(line, command.came) == [], line
    assert not list(Path().iterdir()), "something half-written was left behind"


# ---------------------------------------------------------------- the catalogue is whole

# Given out, never taken in: nobody makes one by hand, so there is nothing to do wrong.
GIVEN_OUT = {"About", "Audit", "Findings", "HeavyEdge", "HeavyPath", "MeasuredSensitivity", "Squashing", "WhatIf"}
GIVEN_OUT |= {"CorrectedSensitivity", "ExpectedError", "Plan", "SupportVerdict"}
# These cannot be asked wrongly: they take nothing.
UNASKED = {
    "families.as_family",
    "families.repeats_last",
    "edits.with_bos",
    "edits.without_bos",
    "edits.without_first",
    "edits.adaptive_temperature",
}


def public_doors() -> list[str]:
    """Every public callable: by its name, those of a public module by both names."""
    doors = []
    for name in osl.__all__:
        found = getattr(osl, name)
        if isinstance(found, ModuleType) and not callable(found):
            doors += [f"{name}.{each}" for each in own_functions(found)]
        elif not (inspect.isclass(found) and issubclass(found, Exception)):
            doors.append(name)
    return doors


def own_functions(module: ModuleType) -> list[str]:
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    inside = [name for name in names if inspect.isfunction(getattr(module, name))]
    ours = "oversquash_lens.viz" if module.__name__ == "oversquash_lens.viz.views" else module.__name__
    return [name for name in inside if getattr(module, name).__module__.startswith(ours)]


def test_every_public_name_has_its_bad_day() -> None:
    tried = {case.name for case in CASES}
    assert sorted(set(public_doors()) - tried - GIVEN_OUT - UNASKED) == []
    assert sorted((GIVEN_OUT | UNASKED) & tried) == [], "listed as having none"


def test_every_command_and_every_option_has_its_bad_day() -> None:
    from oversquash_lens.cli import build_parser

    (commands,) = (action for action in build_parser()._actions if action.choices)
    typed = {}
    for command in COMMANDS:
        if command.arguments:
            typed.setdefault(command.arguments[0], set()).update(command.arguments[1:])
    missing = [
        f"{name} {option.option_strings[0]}"
        for name, parser in commands.choices.items()
        for option in parser._actions
        if option.option_strings and option.nargs != 0 and option.option_strings[0] not in ANY_TEXT
        if not {text.split("=")[0] for text in typed.get(name, ())} & set(option.option_strings)
    ]
    assert missing == []
    assert set(commands.choices) <= set(typed)


# Options for which every text will do, or of which every form is tried with another one beside.
ANY_TEXT = {"--question", "--separator", "--words", "--then", "--bos", "--chat", "--device-map"}


def test_no_case_is_there_twice() -> None:
    names = [str(case) for case in [*CASES, *COMMANDS]]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
    assert len(names) >= 150
