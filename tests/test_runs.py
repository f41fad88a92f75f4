"""Files of results: nothing lost, nothing doubled, nothing mixed, whatever happens in the middle."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oversquash_lens.errors import InputError, OversquashError
from oversquash_lens.parts import AnswerFile

SETTINGS = {"model": "a model", "temperature": 0.0, "chat": True}
RESULTS = [
    (("reply", "ones", 5), {"text": "five\u2028\n✓"}),
    (("reply", "ones", 15), None),
    (("score", 3), [0.5, -1e-9]),
]


def write(path: Path, results: list = RESULTS) -> bytes:
    with AnswerFile(path, SETTINGS) as file:
        for result in results:
            file.append([result])
    return path.read_bytes()


def read(path: Path) -> dict:
    with AnswerFile(path, SETTINGS) as file:
        return file.answers


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content = write(tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl") == dict(RESULTS)
    assert (tmp_path / "a.jsonl").read_bytes() == content
    lines = [json.loads(line) for line in content.decode("ascii").splitlines()]
    assert [line["settings"] for line in lines] == [SETTINGS] * 3
    assert list(tmp_path.iterdir()) == [tmp_path / "a.jsonl"]  # no lock and no draft is left


def test_a_batch_is_as_good_as_one_by_one(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "b", SETTINGS) as file:
        file.append(RESULTS)
        file.append([])
    assert (tmp_path / "b").read_bytes() == write(tmp_path / "a")


def test_without_a_path_results_are_kept_in_memory() -> None:
    with AnswerFile(None, SETTINGS) as file:
        file.append(RESULTS)
    assert file.answers == dict(RESULTS)


def test_a_file_cut_anywhere_is_mended(tmp_path: Path) -> None:
    """Killed after any number of bytes: whole lines stay, the torn one goes, and the run ends with the same file."""
    whole = write(tmp_path / "whole")
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path = tmp_path / "cut"
        path.write_bytes(whole[:size])
        kept = sum(end <= size for end in ends)
        assert read(path) == dict(RESULTS[:kept])
        assert path.read_bytes() == whole[: ([0, *ends])[kept]]
        assert write(path, RESULTS[kept:]) == whole


@pytest.mark.parametrize("tail", [b"\0\0\0\0", b"\0" * 5000, b'{"settings": {"mod\n', b'{"settings": \xff\xfe', b"{"])
def test_what_a_crash_leaves_at_the_end_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    whole = write(tmp_path / "a")
    (tmp_path / "a").write_bytes(whole + tail)
    assert read(tmp_path / "a") == dict(RESULTS)
    assert (tmp_path / "a").read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        b"my shopping list",
        b"my\nshopping\nlist\n",
        b"[1, 2]\n",
        b'{"key": [1]}\n',
        b'{"settings": 1, "key": 2, "value": 3}\n!',
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match="line 1 is damaged"):
        read(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == content


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    lines = write(tmp_path / "a").splitlines(keepends=True)
    (tmp_path / "a").write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    with pytest.raises(InputError, match="line 2 is damaged"):
        read(tmp_path / "a")


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    content = write(tmp_path / "a")
    with pytest.raises(InputError, match=r"results of model='a model', these are of model='another'"):
        AnswerFile(tmp_path / "a", {**SETTINGS, "model": "another"}).__enter__()
    with pytest.raises(InputError, match=r"temperature=0\.0, these are of temperature=0\.7"):
        AnswerFile(tmp_path / "a", {**SETTINGS, "temperature": 0.7}).__enter__()
    with pytest.raises(InputError, match="results of chat=True, these are of fewer settings"):
        AnswerFile(tmp_path / "a", {"model": "a model", "temperature": 0.0}).__enter__()
    with pytest.raises(InputError, match="these are of top_p=1"):
        AnswerFile(tmp_path / "a", {**SETTINGS, "top_p": 1}).__enter__()
    assert (tmp_path / "a").read_bytes() == content
    assert read(tmp_path / "a") == dict(RESULTS)  # and a refusal leaves no lock


def test_a_doubled_line_is_refused(tmp_path: Path) -> None:
    content = write(tmp_path / "a")
    (tmp_path / "a").write_bytes(content + content.splitlines(keepends=True)[0])
    with pytest.raises(InputError, match=r"line 4 repeats the key \['reply', 'ones', 5\]"):
        read(tmp_path / "a")


def test_nothing_is_appended_twice(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "a", SETTINGS) as file:
        file.append(RESULTS[:1])
        for doubled in (RESULTS[:1], [RESULTS[1], RESULTS[1]]):
            with pytest.raises(AssertionError, match="answered twice"):
                file.append(doubled)
    assert read(tmp_path / "a") == dict(RESULTS[:1])


def test_a_number_that_json_has_no_word_for_is_not_written(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "a", SETTINGS) as file, pytest.raises(ValueError, match="JSON"):
        file.append([(("x",), float("nan"))])
    assert read(tmp_path / "a") == {}


class FullDisk:
    """A file on a disk with room for so many bytes: writes come short, then fail, as a raw file's do."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: memoryview) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        size = min(len(content), self.room, 7)
        self.room -= size
        return self.file.write(content[:size])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def append_one_by_one(file: AnswerFile, room: int, safe: list) -> None:
    file._file = FullDisk(file._file, room)
    for result in RESULTS:
        file.append([result])
        safe.append(result)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """Full after any number of bytes: what was reported written is there, and the resumed run ends with the same."""
    whole, path = write(tmp_path / "whole"), tmp_path / "a"
    for room in range(len(whole)):
        safe: list = []
        with AnswerFile(path, SETTINGS) as file, pytest.raises(OversquashError, match=r"written \(No space left"):
            append_one_by_one(file, room, safe)
        assert read(path) == dict(safe)
        assert write(path, RESULTS[len(safe) :]) == whole
        path.unlink()


def test_the_message_counts_what_is_safe(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "a", SETTINGS) as file:
        file.append(RESULTS[:2])
        file._file = FullDisk(file._file, 10)
        with pytest.raises(OversquashError, match="the 2 results in it so far are safe: make room and run the same"):
            file.append(RESULTS[2:])
        assert file.answers == dict(RESULTS[:2])


def test_a_line_is_on_the_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(
        "oversquash_lens.storage.os.fsync", lambda handle: synced.append((tmp_path / "a").stat().st_size)
    )
    with AnswerFile(tmp_path / "a", SETTINGS) as file:
        file.append(RESULTS[:2])
        assert synced == [(tmp_path / "a").stat().st_size]
        file.append(RESULTS[2:])
    assert len(synced) == 2
    assert synced[1] == (tmp_path / "a").stat().st_size


@pytest.fixture(params=["system lock", "no fcntl", "no locks on this drive"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "no fcntl":
        monkeypatch.setattr("oversquash_lens.parts.fcntl", None)
    if request.param == "no locks on this drive":

        def refuse(*arguments: Any) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr("oversquash_lens.parts.fcntl.flock", refuse)
    return request.param


def test_two_runs_at_once_are_refused(tmp_path: Path, locks: str) -> None:
    path = tmp_path / "a"
    with AnswerFile(path, SETTINGS) as first:
        first.append(RESULTS[:1])
        with pytest.raises(InputError, match="another run is writing into"):
            AnswerFile(path, SETTINGS).__enter__()
        first.append(RESULTS[1:2])
    assert read(path) == dict(RESULTS[:2])
    with pytest.raises(ZeroDivisionError), AnswerFile(path, SETTINGS):
        _ = 1 / 0
    assert read(path) == dict(RESULTS[:2])  # an error in the middle gives the lock back
    assert not (tmp_path / "a.lock").exists()


def test_another_process_is_refused_and_a_killed_one_forgotten(tmp_path: Path) -> None:
    holder = """
        import sys, time
        from oversquash_lens.parts import AnswerFile
        with AnswerFile(sys.argv[1], {"model": "a model"}) as file:
            file.append([(("one",), 1)])
            print("held", flush=True)
            time.sleep(60)
    """
    path = tmp_path / "a"
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(holder), str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run is writing into"):
            AnswerFile(path, {"model": "a model"}).__enter__()
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    with AnswerFile(path, {"model": "a model"}) as file:
        assert file.answers == {("one",): 1}


def test_a_place_that_cannot_be_written_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        AnswerFile(tmp_path, SETTINGS)
    with pytest.raises(InputError, match="does not exist"):
        AnswerFile(tmp_path / "none" / "a", SETTINGS)


def test_a_file_that_cannot_be_opened_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    file = AnswerFile(tmp_path / "a", SETTINGS)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"could not be opened \(Permission denied\); mend the rights"):
        file.__enter__()
