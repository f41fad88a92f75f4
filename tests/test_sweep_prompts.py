"""Prompts of a sweep: every form of a list and of a file, and what is wrong with those that are none."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oversquash_lens.errors import InputError
from oversquash_lens.sweeps.prompt_files import lines_of, mark_of, messages_in, read_prompt, read_prompts


def named(prompts: Any, column: str | None = None) -> list[tuple[str | None, Any]]:
    found = read_prompts(prompts, column)
    assert [each.index for each in found] == list(range(len(found)))
    return [(each.name, each.prompt) for each in found]


def test_lists_of_every_form() -> None:
    assert named(["a b", [3, 4], ("x", "c"), ["y", "d"]]) == [(None, "a b"), (None, [3, 4]), ("x", "c"), ("y", "d")]
    assert named({"x": "a", 2: "b"}) == [("x", "a"), ("2", "b")]
    assert named(each for each in ("a", "b")) == [(None, "a"), (None, "b")]
    assert [each.text for each in read_prompts(["a", [1]])] == ["a", None]


FILES: dict[str, tuple[str, list[tuple[str | None, Any]]]] = {
    "lines.txt": ("one\n\n  two words \r\nthree\u2028", [(None, "one"), (None, "  two words "), (None, "three\u2028")]),
    "separators.txt": ("a\u2028b\x85c\x0bd\x0ce\rf", [(None, "a\u2028b\x85c\x0bd\x0ce"), (None, "f")]),
    "rows.csv": (
        '\ufeffname,text\r\nx,"a, ""b""\nc"\r\n,d\r\n',
        [("x", 'a, "b"\nc'), (None, "d")],
    ),
    "rows.tsv": ("prompt\tid\na b\t7\n", [("7", "a b")]),
    "lines.prompts": ("\ufeffone\ntwo", [(None, "one"), (None, "two")]),
    "list.json": ('["a", [5, 9]]', [(None, "a"), (None, [5, 9])]),
    "named.json": ('{"x": "a", "y": [5, 9]}', [("x", "a"), ("y", [5, 9])]),
    "rows.jsonl": (
        '"a"\n\n[5, 9]\n{"text": "b\\u2028c", "name": "x"}\n{"prompt": [3], "id": 4}\n',
        [(None, "a"), (None, [5, 9]), ("x", "b\u2028c"), ("4", [3])],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_form(name: str, tmp_path: Path) -> None:
    content, expected = FILES[name]
    (tmp_path / name).write_bytes(content.encode())
    assert named(tmp_path / name) == expected
    assert named(str(tmp_path / name)) == expected


def test_columns_of_tables(tmp_path: Path) -> None:
    table = pyarrow.table({"id": [7, 8], "question": ["a", "b"], "ids": [[3, 4], [5, 6]], "text": ["c", None]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert named(tmp_path / "t.parquet") == [("7", "c"), ("8", None)]
    assert named(tmp_path / "t.parquet", "question") == [("7", "a"), ("8", "b")]
    assert named(tmp_path / "t.parquet", "ids") == [("7", [3, 4]), ("8", [5, 6])]
    pyarrow.parquet.write_table(table.select(["text"]), tmp_path / "u.parquet")
    assert named(tmp_path / "u.parquet") == [(None, "c"), (None, None)]
    (tmp_path / "t.csv").write_text("question,text\na,b\n")
    assert named(tmp_path / "t.csv", "question") == [(None, "a")]
    (tmp_path / "t.jsonl").write_text('{"question": "a"}')
    assert named(tmp_path / "t.jsonl", "question") == [(None, "a")]


WRONG: dict[str, tuple[bytes, str]] = {
    "empty.txt": (b"\n \n", "holds no prompt"),
    "empty.json": (b"", "holds no prompt"),
    "none.json": (b"[]", "holds no prompt"),
    "empty.jsonl": (b"\n", "holds no prompt"),
    "latin.txt": ("\xe9".encode("latin-1"), "UTF-8"),
    "half.json": (b'["a", "b', "is no JSON"),
    "one.json": (b'"a"', "holds a str; expected a list"),
    "half.jsonl": (b'"a"\n{"text": "b\n', r"half\.jsonl, line 2 is no JSON"),
    "other.csv": (b"query,answer\na,b\n", "has query, answer, but not one 'text' or .* name their column"),
    "open.csv": (b'text\n"a', r"open\.csv is no table"),
    "header.tsv": (b"text\n", "holds no prompt"),
    "deep.json": (b"[" * 100_000, "is no JSON"),
    "other.jsonl": (b'{"query": "a"}', "has query, but not one 'text' or 'prompt' or 'messages'"),
    "fake.parquet": (b"my notes", "is no parquet file"),
    "empty.parquet": (b"", "is no parquet file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_none(name: str, tmp_path: Path) -> None:
    content, said = WRONG[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_prompts(tmp_path / name)


def test_tables_without_the_column(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet has a, but not one 'b'"):
        read_prompts(tmp_path / "t.parquet", "b")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(tmp_path / "t.parquet")
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(InputError, match=r"got column='b' with t\.txt"):
        read_prompts(tmp_path / "t.txt", "b")


@pytest.mark.parametrize("wrong", [7, None, b"a", "no-such-file.txt", "/dev/zero", "a\0b"])
def test_no_list_and_no_file(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected"):
        read_prompts(wrong)
    with pytest.raises(InputError, match="is not a file"):
        read_prompts(tmp_path)


def test_the_mark_tells_lists_apart() -> None:
    base = ["a", [3, 4], ("x", "c")]
    others = [["a", [3, 4], "c"], ["a", [3, 4], ("y", "c")], [[3, 4], "a", ("x", "c")], ["a", [3, 4]], ["a", [34], "c"]]
    mark = mark_of(read_prompts(base))
    assert mark == mark_of(read_prompts(["a", torch.tensor([3, 4]), ("x", "c")]))
    marks = {mark_of(read_prompts(other)) for other in others}
    assert len(marks) == len(others)
    assert mark not in marks
    assert len(json.dumps(mark)) == 66
    assert mark_of(read_prompts(["\ud800"])) != mark_of(read_prompts(["?"]))


@pytest.mark.parametrize(
    ("content", "prompt"),
    [("a b", "a b"), ("a b\n", "a b"), ("a b\r\n", "a b"), ("a b\r", "a b"), ("a\n\n", "a\n"), ("\ufeffa\n", "a")],
)
def test_a_prompt_of_a_file_or_stream(
    content: str, prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line end at the end and a byte order mark are no part of it."""
    (tmp_path / "prompt.txt").write_bytes(content.encode())
    assert read_prompt(tmp_path / "prompt.txt") == prompt
    for stream in (io.TextIOWrapper(io.BytesIO(content.encode())), io.StringIO(content)):
        monkeypatch.setattr(sys, "stdin", stream)
        assert read_prompt("-") == prompt


def test_standard_input_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (None, io.StringIO("a")):
        if stream is not None:
            stream.close()
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(InputError, match="it is closed"):
            read_prompt("-")


# ---------------------------------------------------------------- tables in memory, messages, other codings

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class Columns:
    """A table as polars and datasets have them: named columns, one by its name."""

    def __init__(self, **columns: list) -> None:
        self.held, self.columns = columns, list(columns)

    def __getitem__(self, name: str) -> list:
        return self.held[name]

    def __iter__(self) -> Any:
        return iter(self.columns)


def test_tables_in_memory_are_read_by_column() -> None:
    pandas = pytest.importorskip("pandas")
    held = {"id": [7, 8], "question": ["a", "b"], "text": ["c", "d"]}
    for table in (pandas.DataFrame(held, index=[5, 3]), pyarrow.table(held), Columns(**held)):
        assert named(table) == [("7", "c"), ("8", "d")]
        assert named(table, "question") == [("7", "a"), ("8", "b")]
        with pytest.raises(InputError, match="has id, question, text, but not one 'answer'"):
            read_prompts(table, "answer")
    assert named(pandas.Series(["a", "b"])) == [(None, "a"), (None, "b")]
    with pytest.raises(InputError, match="has query, but not one 'text'"):
        read_prompts(pandas.DataFrame({"query": ["a"]}))
    doubled = pandas.DataFrame([["a", "b"]], columns=["text", "text"])
    with pytest.raises(InputError, match="not one 'text'"):
        read_prompts(doubled)


def test_objects_are_read_by_column() -> None:
    rows = [{"question": "a", "id": 1}, {"question": "b"}]
    assert named(rows, "question") == [("1", "a"), (None, "b")]
    with pytest.raises(InputError, match="at 0 has question, id, but not one 'text'"):
        read_prompts(rows)
    with pytest.raises(InputError, match="got column='text' with the list of prompts, which has no columns"):
        read_prompts(["a"], "text")
    with pytest.raises(InputError, match="got column='text' with the list of prompts"):
        read_prompts({"x": "a"}, "text")


def test_a_list_of_messages_is_one_prompt(tmp_path: Path) -> None:
    expected = [(None, TALK)]
    assert named(TALK) == expected
    assert named([TALK]) == expected
    assert named([{"messages": TALK}]) == expected
    assert named([("x", TALK)]) == [("x", TALK)]
    for name, content in {
        "talk.json": json.dumps(TALK),
        "talks.json": json.dumps([TALK]),
        "talk.jsonl": json.dumps(TALK),
        "rows.jsonl": json.dumps({"messages": TALK}),
        "rows.ndjson": json.dumps({"messages": TALK, "id": ""}),
    }.items():
        (tmp_path / name).write_text(content)
        assert named(tmp_path / name) == expected
        assert read_prompt(tmp_path / name) == TALK
    pyarrow.parquet.write_table(pyarrow.table({"messages": [TALK]}), tmp_path / "t.parquet")
    assert named(tmp_path / "t.parquet") == expected


def test_text_that_is_a_list_of_messages() -> None:
    assert messages_in(f" {json.dumps(TALK)}\n") == TALK
    for other in ("", "[", "[]", "[1]", '["a"]', '[{"role": "user"}]', '{"role": "user"}', "[" * 100_000, "a [b]"):
        assert messages_in(other) is None


def test_one_prompt_of_a_table_and_not_its_text(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text\na b\n")
    assert read_prompt(tmp_path / "one.csv") == "a b"
    (tmp_path / "two.csv").write_text("text\na\nb\n")
    with pytest.raises(InputError, match=r"two\.csv holds 2 prompts; expected one: .*--prompts-file"):
        read_prompt(tmp_path / "two.csv", "--prompt-file")


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "lines.txt", "one.md"])
def test_byte_order_marks_say_how_a_text_is_written(coding: str, name: str, tmp_path: Path) -> None:
    content = {"rows.csv": "text\né\n", "rows.jsonl": '"é"'}.get(name, "é")
    (tmp_path / name).write_bytes(content.encode(coding))
    assert named(tmp_path / name) == [(None, "é")]
    assert read_prompt(tmp_path / name) == "é"


@pytest.mark.parametrize("coding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_codings_without_a_mark_are_refused(coding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("a prompt".encode(coding))
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8 \(it holds NUL characters\)"):
        read_prompts(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes("\ufeffhalf".encode("utf-16")[:-1])
    with pytest.raises(InputError, match="is not UTF-8"):
        read_prompts(tmp_path / "a.txt")


def test_a_long_cell_is_no_mistake(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f'text\n"{"a " * 100_000}"\n')
    assert len(named(tmp_path / "a.csv")[0][1]) == 200_000
    assert csv.field_size_limit() == before


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    with pytest.raises(InputError, match="has text, text, but not one 'text'"):
        read_prompts(tmp_path / "a.csv")


def test_a_small_file_that_unfolds_beyond_all_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pyarrow.table({"text": pyarrow.array(["a" * 10_000] * 2000).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    monkeypatch.setattr("oversquash_lens.sweeps.prompt_files.MOST_TABLE", 1 << 20)
    with pytest.raises(InputError, match="its prompts are more than"):
        read_prompts(tmp_path / "a.parquet")


def test_lines_of_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffa\u2028b\r\n\nc\n".encode())))
    assert named("-") == [(None, "a\u2028b"), (None, "c")]


SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


@given(st.lists(st.text(st.sampled_from(f"ab é{SEPARATORS}")), min_size=1), st.sampled_from(["\n", "\r\n", "\r"]))
def test_lines_end_at_line_ends_only(lines: list[str], end: str) -> None:
    assert lines_of(end.join(lines) + end) == lines
    assert lines_of(end.join(lines)) == (lines if lines[-1] or len(lines) == 1 else lines[:-1])


def test_prompts_that_hold_themselves() -> None:
    endless: list = [3, 4]
    endless.append(endless)
    with pytest.raises(InputError, match="prompt 0 is no prompt"):
        mark_of(read_prompts([endless]))
