"""Results that are kept part by part: nothing lost, nothing doubled, nothing mixed, whatever happens in the middle."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from oversquash_lens import parts, storage
from oversquash_lens.errors import InputError
from oversquash_lens.parts import AnswerFile, Parts, differences

SETTINGS = {"model": "a model", "temperature": 0.0, "chat": True}
RESULTS = [
    (("reply", "ones", 5), {"text": "five\u2028\n✓"}),
    (("reply", "ones", 15), None),
    (("score", 3), [0.5, -1e-9]),
]
COLUMNS = {"name": "word", "share": "row", "tensors": "bytes"}
ROWS = [{"name": name, "share": [0.25, float("nan")], "tensors": b"\0\xff" * 300} for name in "abc"]


class StoppedError(Exception):
    pass


def write(path: Path, results: list = RESULTS) -> bytes:
    with AnswerFile(path, SETTINGS) as file:
        for result in results:
            file.append([result])
    return path.read_bytes()


def read_without_an_end(path: Path, more: list | tuple = ()) -> dict:
    """What is there at the beginning of a run that adds some and is ended by an error."""
    found = {}
    with suppress(StoppedError), AnswerFile(path, SETTINGS) as file:
        found |= file.answers
        for result in more:
            file.append([result])
        raise StoppedError
    return found


def broken_off(path: Path, results: list = RESULTS) -> list[Path]:
    """The parts of a run that an error ended, in the order in which they were written."""
    read_without_an_end(path, results)
    return sorted(path.with_name(f"{path.name}.parts").glob("*.parquet"))


def read(path: Path) -> dict:
    with AnswerFile(path, SETTINGS) as file:
        return file.answers


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.parquet"


def test_what_is_written_is_read(path: Path) -> None:
    content = write(path)
    assert read(path) == dict(RESULTS)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]  # no lock, no part and no draft is left
    table = pyarrow.parquet.read_table(path)  # by anybody who knows parquet
    assert [json.loads(key) for key in table["key"].to_pylist()] == [list(key) for key, _ in RESULTS]
    assert json.loads(table.schema.metadata[b"oversquash-lens-run"]) == SETTINGS


def test_a_batch_is_as_good_as_one_by_one(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "b", SETTINGS) as file:
        file.append(RESULTS)
        file.append([])
    assert (tmp_path / "b").read_bytes() == write(tmp_path / "a")


def test_without_a_path_results_are_kept_in_memory() -> None:
    with AnswerFile(None, SETTINGS) as file:
        file.append(RESULTS)
    assert file.answers == dict(RESULTS)


@pytest.mark.parametrize("done", range(4))
def test_a_run_that_was_broken_off_goes_on_and_ends_with_the_same_file(done: int, path: Path) -> None:
    whole = write(path)
    path.unlink()
    assert len(broken_off(path, RESULTS[:done])) == done
    assert not path.exists()
    assert read_without_an_end(path) == dict(RESULTS[:done])
    assert write(path, RESULTS[done:]) == whole
    assert list(path.parent.iterdir()) == [path]


def test_a_finished_file_grows(path: Path) -> None:
    whole = write(path)
    path.unlink()
    write(path, RESULTS[:1])
    assert write(path, RESULTS[1:]) == whole


def test_killed_between_the_file_and_the_tidying(path: Path) -> None:
    """Rows that lie in the file and in parts count once."""
    kept = everything(broken_off(path)[0].parent)
    whole = write(path, [])
    next(iter(kept)).parent.mkdir()
    for each, payload in kept.items():
        each.write_bytes(payload)
    assert read(path) == dict(RESULTS)
    assert path.read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]


def test_a_part_that_is_cut_anywhere_is_named_and_made_again(path: Path) -> None:
    one = broken_off(path)[1]
    content = one.read_bytes()
    for size in (0, 1, 4, len(content) // 2, len(content) - 1):
        one.write_bytes(content[:size])
        with pytest.raises(InputError, match=rf"{one.name} is damaged or .* delete it"):
            read(path)
    one.unlink()
    with AnswerFile(path, SETTINGS) as file:
        missing = [result for result in RESULTS if result[0] not in file.answers]
        file.append(missing)
    assert missing == RESULTS[1:2]
    assert read(path) == dict(RESULTS)


def test_a_bit_that_flips_is_found(path: Path) -> None:
    """Checksums: what the drive changed is never taken for a result."""
    content = bytearray(write(path, [(("long", 1), random.Random(0).randbytes(1 << 15).hex())]))
    content[len(content) // 2] ^= 1  # in the middle of the value
    path.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        read(path)


@pytest.mark.parametrize(
    "content", [b"my shopping list", b"", b"\0" * 5000, b'{"settings": 1, "key": [2], "value": 3}\n']
)
def test_a_file_of_something_else_is_refused_and_left_alone(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match="is there and holds no results that this version keeps"):
        read(path)
    assert path.read_bytes() == content
    path.unlink()
    pyarrow.parquet.write_table(pyarrow.table({"key": ["mine"]}), path)
    with pytest.raises(InputError, match="is there and holds no results that this version keeps"):
        read(path)


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.JSON"])
def test_json_lines_of_an_earlier_version_are_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    for there in (False, True):
        if there:
            (tmp_path / name).write_text('{"settings": {}, "key": ["x"], "value": 1}\n')
        with pytest.raises(InputError, match=r"ends in \.parquet .* give answers\.parquet .* made again"):
            AnswerFile(tmp_path / name, SETTINGS)


def test_a_part_of_something_else_is_refused_and_left_alone(path: Path) -> None:
    folder = broken_off(path)[0].parent
    (folder / "mine.parquet").write_bytes(b"PAR1")
    pyarrow.parquet.write_table(pyarrow.table({"key": ["mine"]}), folder / "yours.parquet")
    for name in ("mine", "yours"):
        with pytest.raises(InputError, match=rf"{name}\.parquet is damaged or somebody else's"):
            read(path)
        (folder / f"{name}.parquet").unlink()
    write(path.with_name("other.parquet"))
    with AnswerFile(path.with_name("another.parquet"), {**SETTINGS, "seed": 1}) as file:
        file.append(RESULTS)
    os.replace(path.with_name("another.parquet"), folder / "0-another.parquet")
    with pytest.raises(InputError, match=r"0-another\.parquet belongs to another run \(seed: 1 there, nothing now"):
        read(path)


def test_a_part_that_was_renamed_is_read_all_the_same(path: Path) -> None:
    one, *_ = broken_off(path)
    os.replace(one, one.with_name("zzz.parquet"))
    (one.parent / "notes.txt").write_text("mine")
    assert read(path) == dict(RESULTS)
    assert [each.name for each in one.parent.iterdir()] == ["notes.txt"]  # what is not ours stays


def test_a_part_with_other_columns_is_damaged(path: Path) -> None:
    one, *_ = broken_off(path)
    table = pyarrow.parquet.read_table(one)
    pyarrow.parquet.write_table(table.append_column("more", [[1]]), one)
    with pytest.raises(InputError, match="checksum is not that of its content"):  # edited by another program
        read(path)
    one.write_bytes(storage.sealed(one.read_bytes()))
    with pytest.raises(InputError, match=r"somebody else's \(it has other columns\)"):
        read(path)


def test_every_byte_of_a_file_counts(path: Path) -> None:
    """Pages, their headers, the footer, the seal itself: one byte that is another one, and the file is damaged."""
    content = write(path)
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x20]) + content[at + 1 :])
        with pytest.raises(InputError):
            read(path)


def test_parts_that_are_no_files(path: Path) -> None:
    folder = broken_off(path)[0].parent
    (folder / "all.parquet").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"all\.parquet is damaged or somebody else's \(it is no file\)"):
        read(path)
    (folder / "all.parquet").unlink()
    os.mkfifo(folder / "pipe.parquet")
    with pytest.raises(InputError, match=r"pipe\.parquet is damaged or somebody else's \(it is no file\)"):
        read(path)
    (folder / "pipe.parquet").unlink()
    assert read(path) == dict(RESULTS)


def test_what_came_meanwhile_is_left_alone(path: Path) -> None:
    with AnswerFile(path, SETTINGS) as file:
        file.append(RESULTS)
        (path.with_name("a.parquet.parts") / "mine.parquet").write_bytes(b"mine")
    assert [each.name for each in path.with_name("a.parquet.parts").iterdir()] == ["mine.parquet"]


def test_rights_are_private_while_it_is_written_and_the_users_own_afterwards(path: Path) -> None:
    umask = os.umask(0o022)
    try:
        (part, *_) = broken_off(path)
        assert part.parent.stat().st_mode & 0o777 == 0o700
        read(path)
        assert path.stat().st_mode & 0o777 == 0o644
        path.chmod(0o640)
        seen: list[int] = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(os, "fsync", lambda handle: seen.append(os.fstat(handle).st_mode & 0o777))
            write(path, [(("more",), 1)])
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(umask)


def test_a_lock_that_is_a_link_leads_nowhere(path: Path) -> None:
    (path.parent / "theirs").write_text("theirs")
    (path.parent / "a.parquet.lock").symlink_to(path.parent / "theirs")
    with pytest.raises(InputError, match="could not be opened"):
        write(path)
    assert (path.parent / "theirs").read_text() == "theirs"


@pytest.mark.parametrize("values", [None, 5, {}, [None, 2.0], ["1", "2"], [[1.0], 2.0]])
def test_an_identity_of_other_types_is_another_run(values: Any) -> None:
    ours = {"computes": {"values": [1.0, 2.0], "tolerance": 1e-3}}
    theirs = {"computes": {"values": values, "tolerance": 1e-3}}
    assert list(differences(theirs, ours)) == ["computes"]
    assert list(differences({"computes": values}, ours)) == ["computes"]


def test_other_settings_are_refused_by_name(path: Path) -> None:
    content = write(path)
    for settings, said in (
        ({**SETTINGS, "model": "another"}, r"\(model: 'a model' there, 'another' now\)"),
        ({**SETTINGS, "temperature": 0.7}, r"\(temperature: 0\.0 there, 0\.7 now\)"),
        ({"model": "a model", "temperature": 0.0}, r"\(chat: True there, nothing now\)"),
        ({**SETTINGS, "top_p": 1}, r"\(top_p: nothing there, 1 now\)"),
    ):
        with pytest.raises(InputError, match=f"belongs to another run {said}"):
            AnswerFile(path, settings).__enter__()
    assert everything(path.parent) == {path: content}
    assert read(path) == dict(RESULTS)  # and a refusal leaves no lock
    broken_off(path.with_name("b"))
    with pytest.raises(InputError, match="belongs to another run"):
        AnswerFile(path.with_name("b"), {**SETTINGS, "top_p": 1}).__enter__()


def test_what_is_compared_of_two_identities() -> None:
    base = {"model": {"weights": "abc", "computes": {"values": [1.0, 2.0], "tolerance": 1e-3}}, "recorded": {"v": 1}}

    def computing(*values: float) -> dict[str, Any]:
        return {"model": {"weights": "abc", "computes": {"values": list(values), "tolerance": 1e-3}}}

    assert differences(base, computing(1.0, 2.0)) == {}
    assert differences(base, computing(1.0009, 1.9992)) == {}
    for values in ((1.0, 2.002), (1.0,), (1.0, float("nan"))):
        assert list(differences(base, computing(*values))) == ["model.computes"]
    assert list(differences(base, {"model": {"weights": "abd"}})) == ["model.weights", "model.computes"]


def test_nothing_is_appended_twice(path: Path) -> None:
    with AnswerFile(path, SETTINGS) as file:
        file.append(RESULTS[:1])
        for doubled in (RESULTS[:1], [RESULTS[1], RESULTS[1]]):
            with pytest.raises(AssertionError, match="answered twice"):
                file.append(doubled)
    assert read(path) == dict(RESULTS[:1])


def test_a_number_that_json_has_no_word_for_is_not_written(path: Path) -> None:
    with AnswerFile(path, SETTINGS) as file, pytest.raises(ValueError, match="JSON"):
        file.append([(("x",), float("nan"))])
    assert read(path) == {}


def test_rows_of_numbers_and_bytes_to_the_last_bit(path: Path) -> None:
    with Parts(path, SETTINGS, COLUMNS) as kept:
        kept.add(ROWS[:2])
        kept.add(ROWS[2:])
        kept.finish(["c", "a", "b"])
    with Parts(path, SETTINGS, COLUMNS) as kept:
        assert kept.keys == ["c", "a", "b"]
        found = list(kept.rows())
    assert [(row["name"], row["tensors"]) for row in found] == [(name, ROWS[0]["tensors"]) for name in "cab"]
    assert repr([row["share"] for row in found]) == repr([row["share"] for row in ROWS])


def test_more_rows_than_are_held_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "WINDOW", 3)
    results = [((k,), k) for k in range(10)]
    write(path, results[::2])
    write(path, results[1::2])
    assert list(read(path).items()) == results[::2] + results[1::2]


def full_after(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with room for so many files."""
    whole, written = storage.replace_file, []

    def replace(target: Path, payload: bytes) -> None:
        written.append(target)
        if len(written) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(target, payload)

    monkeypatch.setattr(storage, "replace_file", replace)


def append_one_by_one(path: Path, safe: list) -> None:
    with AnswerFile(path, SETTINGS) as file:
        for result in RESULTS:
            file.append([result])
            safe.append(result)


@pytest.mark.parametrize("room", range(5))
def test_a_full_disk_loses_nothing(room: int, path: Path) -> None:
    """Full at run.json, at any part or at the file: what was reported written is there, and the resumed run ends
    with the same."""
    whole, safe = write(path), []
    path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        full_after(room, patch)
        with pytest.raises(InputError, match=r"could not be written \(No space left"):
            append_one_by_one(path, safe)
    assert len(safe) == max(room - 1, 0)
    assert read_without_an_end(path) == dict(safe)
    assert write(path, RESULTS[len(safe) :]) == whole


def test_the_message_counts_what_is_safe(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_after(3, monkeypatch)
    with pytest.raises(InputError, match="the 2 results so far are safe: make room and run the same"):
        append_one_by_one(path, [])


def test_a_row_is_on_the_disk_when_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    whole = os.fsync
    monkeypatch.setattr(
        storage.os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_size > 0), whole(handle))
    )
    with AnswerFile(path, SETTINGS) as file:
        for k in (1, 2):
            synced.clear()
            file.append([((k,), k)])
            assert len(synced) >= 2, "the part, and the folder that names it"
            assert all(synced)
            assert len(list(path.with_name(f"{path.name}.parts").glob("*.parquet"))) == k


@pytest.fixture(params=["system lock", "no fcntl", "no locks on this drive"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "no fcntl":
        monkeypatch.setattr(parts, "fcntl", None)
    if request.param == "no locks on this drive":

        def refuse(*arguments: Any) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(parts.fcntl, "flock", refuse)
    return request.param


def test_two_runs_at_once_are_refused(path: Path, locks: str) -> None:
    with AnswerFile(path, SETTINGS) as first:
        first.append(RESULTS[:1])
        with pytest.raises(InputError, match="another run is writing into"):
            AnswerFile(path, SETTINGS).__enter__()
        first.append(RESULTS[1:2])
    assert read(path) == dict(RESULTS[:2])
    with pytest.raises(ZeroDivisionError), AnswerFile(path, SETTINGS):
        _ = 1 / 0
    assert read(path) == dict(RESULTS[:2])  # an error in the middle gives the lock back
    assert list(path.parent.iterdir()) == [path]


def test_a_lock_whose_run_has_just_ended_is_not_ours(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the lock's file and locking it, the other run takes the file away: it is made anew."""
    lock, whole, taken = path.with_name(f"{path.name}.lock"), parts.fcntl.flock, []

    def flock(*arguments: Any) -> None:
        if not taken:
            lock.unlink()
        taken.append(1)
        whole(*arguments)

    monkeypatch.setattr(parts.fcntl, "flock", flock)
    with AnswerFile(path, SETTINGS):
        assert lock.exists()
        with pytest.raises(InputError, match="another run is writing into"):
            AnswerFile(path, SETTINGS).__enter__()
    assert len(taken) == 3


def test_another_process_is_refused_and_a_killed_one_forgotten(path: Path) -> None:
    holder = """
        import sys, time
        from oversquash_lens.parts import AnswerFile
        with AnswerFile(sys.argv[1], {"model": "a model"}) as file:
            file.append([(("one",), 1)])
            print("held", flush=True)
            time.sleep(60)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(holder), str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run is writing into"):
            AnswerFile(path, {"model": "a model"}).__enter__()
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    with AnswerFile(path, {"model": "a model"}) as file:
        assert file.answers == {("one",): 1}
    assert list(path.parent.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        AnswerFile(tmp_path, SETTINGS)
    with pytest.raises(InputError, match="does not exist"):
        AnswerFile(tmp_path / "none" / "a", SETTINGS)
    with pytest.raises(InputError, match="is a device or a pipe"):
        AnswerFile("/dev/null", SETTINGS)


def test_a_lock_that_cannot_be_opened_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    file = AnswerFile(path, SETTINGS)
    monkeypatch.setattr(parts.os, "open", refuse)
    with pytest.raises(InputError, match=r"could not be opened \(Permission denied\).* mend the rights"):
        file.__enter__()
