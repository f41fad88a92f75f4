"""`reproduce` on a tiny random model: every recipe, its five files and the index; runs that are killed and go on."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small_generators
from small_generators import KINDS, loaded
from test_page import Outline
from test_reproduce import FILES, WITH_A_MODEL, check_files, forbid_models, read

from oversquash_lens.errors import InputError
from oversquash_lens.paper.reproduce import Reproduced, reproduce
from oversquash_lens.paper.task_figures import COPYING, COUNTING
from oversquash_lens.paper.tasks import NEW_TOKENS
from oversquash_lens.parts import Parts, identity_of
from oversquash_lens.storage import _DRAFT

HOOKED = KINDS[1:]
SHORT = {"quick": True, "longest": 15, "probes": 2, "kind": HOOKED[0], "dtype": "float64", "device": "cpu"}
Made = tuple[dict[str, Reproduced], Path]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for cot in NEW_TOKENS:
        monkeypatch.setitem(NEW_TOKENS, cot, 4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model that reads characters, with room for worked examples."""
    folder = tmp_path_factory.mktemp("models") / "tiny-characters"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_generators, "N_CTX", 2048)
        small_generators.model().save_pretrained(folder)
    small_generators.characters().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """All figures that need a model, on a tiny random one, in one folder."""
    folder = tmp_path_factory.mktemp("figures") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        for cot in NEW_TOKENS:
            patch.setitem(NEW_TOKENS, cot, 4)
        done: list[Reproduced] = []
        found = reproduce(WITH_A_MODEL, tiny, folder, done=done.append, **SHORT)
    assert tuple(done) == found
    return {one.name: one for one in found}, folder


@pytest.mark.parametrize("name", WITH_A_MODEL)
def test_a_figure_is_five_files_and_a_verdict(name: str, made: Made) -> None:
    one = made[0][name]
    check_files(one, made[1])
    assert one.chart.name == name
    assert one.chart.model == "tiny-characters"
    assert one.chart.verdicts
    for verdict, line in zip(one.chart.verdicts, str(one).splitlines(), strict=True):
        words = {True: "held", False: "did not hold", None: "not decided"}
        assert line == f"{name}: {words[verdict.held]}: {verdict.claim} ({verdict.number})"


def test_the_folder_holds_these_files_and_no_drafts(made: Made) -> None:
    counted = [f"{task}-{cot}" for task in COUNTING for cot in NEW_TOKENS]
    answers = {f"answers-{one}-quick.parquet" for one in [*(f"{task}-none" for task in COPYING), *counted]}
    figures = {f"{name}.{kind}" for name in WITH_A_MODEL for kind in FILES}
    assert {path.name for path in made[1].iterdir()} == answers | figures | {"index.html"}


def test_the_index_lists_every_figure(made: Made) -> None:
    page = (made[1] / "index.html").read_text("utf-8")
    outline = Outline(page)
    text = " ".join(" ".join(outline.text).split())
    for one in made[0].values():
        assert f'id="figure-{one.name}"' in page
        for verdict in one.chart.verdicts:
            assert verdict.claim in text
        for kind in FILES:
            assert f'href="{one.name}.{kind}"' in page


def test_figures_3_and_6_are_of_the_same_answers(made: Made) -> None:
    found, _ = made
    assert found["3"].chart.data == found["6"].chart.data
    assert found["4"].chart.data == found["7"].chart.data


@pytest.mark.parametrize("name", ["1", "2", "window"])
def test_a_second_run_writes_over_the_first(name: str, made: Made, tiny: Path) -> None:
    one, folder = made[0][name], made[1]
    before = read(folder)
    for path in one.files.values():
        path.write_bytes(b"of an older run")
    (again,) = reproduce(name, tiny, folder, **SHORT)
    check_files(again, folder)
    after = read(folder)
    assert set(after) == set(before)
    same = [file for file in before if file.endswith((".json", ".csv", ".parquet"))]
    assert {file: after[file] for file in same} == {file: before[file] for file in same}


@pytest.mark.parametrize("name", ["1", "2", "12"])
def test_the_other_class_gives_the_same_figure(name: str, made: Made, tiny: Path, tmp_path: Path) -> None:
    loaded(HOOKED[1])  # or this TransformerLens has no such class
    (other,) = reproduce(name, tiny, tmp_path, **SHORT | {"kind": HOOKED[1]})
    for mine, theirs in zip(made[0][name].chart.panels, other.chart.panels, strict=True):
        for one, two in zip(mine.series, theirs.series, strict=True):
            if "bfloat16" not in one.label and one.kind != "floor":  # where rounding decides
                assert one.y == pytest.approx(two.y, rel=1e-3, abs=1e-5), one.label


@pytest.mark.parametrize("kind", HOOKED)
def test_a_hooked_model_at_hand_is_taken_as_it_is(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(kind)
    forbid_models(monkeypatch)
    found = reproduce(["1", "11"], model, tmp_path, quick=True, longest=10)
    assert [one.chart.model for one in found] == [model.cfg.model_name] * 2
    settings = {identity_of(path)["generator"] for path in tmp_path.glob("*.parquet")}
    assert settings == {kind}


# ---------------------------------------------------------------- runs that are killed


def answers_of(made: Made, figure: str) -> dict[str, bytes]:
    """The answer files of a figure whose data is by task, from the run that was left in peace."""
    names = [f"answers-{task}-none-quick.parquet" for task in made[0][figure].chart.data]
    return {name: (made[1] / name).read_bytes() for name in names}


class Killed(BaseException):
    """What ends a run in this test, as a signal would."""


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, bytes], None]]:
    """killed_at(n, torn): the run ends at the n-th part of answers, of which the draft holds the bytes `torn`."""
    with pytest.MonkeyPatch.context() as patch:

        def prepare(n: int, torn: bytes) -> None:
            add, count = Parts.add, [0]

            def die(self: Parts, rows: Any) -> None:
                count[0] += 1
                if count[0] == n:
                    self.folder.mkdir(exist_ok=True)
                    (self.folder / f"{_DRAFT}0.tmp").write_bytes(torn)
                    raise Killed
                add(self, rows)

            patch.setattr(Parts, "add", die)

        prepare.heal = patch.undo
        yield prepare


@pytest.mark.parametrize(("n", "torn"), [(1, b""), (3, b"PAR1"), (4, b"\0\0\0"), (9, b"PAR1" + b"x" * 100)])
def test_a_killed_run_goes_on_and_loses_and_doubles_nothing(
    n: int, torn: bytes, killed_at: Any, made: Made, tiny: Path, tmp_path: Path
) -> None:
    killed_at(n, torn)
    with pytest.raises(Killed):
        reproduce("2", tiny, tmp_path, **SHORT)
    assert not list(tmp_path.glob("2.*"))
    assert len([*tmp_path.glob("*.parquet"), *tmp_path.glob("*.parts/*.parquet")]) >= min(n - 1, 1)
    killed_at.heal()
    (again,) = reproduce("2", tiny, tmp_path, **SHORT)
    assert read(tmp_path, "*.parquet") == answers_of(made, "2")
    assert not list(tmp_path.glob("*.parts"))
    assert again.chart.to_dict() == made[0]["2"].chart.to_dict()


KILLED = """
import os, signal, sys
from oversquash_lens.paper.reproduce import reproduce
from oversquash_lens.paper.tasks import NEW_TOKENS
from oversquash_lens.parts import Parts

NEW_TOKENS.update(none=4)
add, left = Parts.add, int(sys.argv[2])

def counted(self, rows):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, rows)

Parts.add = counted
reproduce("2", sys.argv[3], sys.argv[1], quick=True, longest=15, dtype="float64", device="cpu")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system with SIGKILL")
def test_a_process_that_is_killed_outright(made: Made, tiny: Path, tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "6", str(tiny)], capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-500:]
    assert list(tmp_path.rglob("*.parquet"))
    reproduce("2", tiny, tmp_path, **SHORT)
    after, whole = read(tmp_path, "*.parquet"), answers_of(made, "2")
    assert after == whole


def test_answers_of_another_model_are_not_mixed_in(tiny: Path, tmp_path: Path) -> None:
    reproduce("2", tiny, tmp_path, **SHORT)
    before = read(tmp_path)
    with pytest.raises(InputError, match=r"another run \(temperature: 0\.0 there, 0\.5 now\)"):
        reproduce("2", tiny, tmp_path, temperature=0.5, **SHORT)
    assert read(tmp_path) == before
