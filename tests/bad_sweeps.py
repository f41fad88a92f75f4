"""What may be handed to `record_batch`, to `sweep`, and to those who read what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bad_days import PROMPT, Case, World

import oversquash_lens as osl
from oversquash_lens.sweeps.result import SweepResult

Call = Callable[[World], Any]


def _swept(
    model: Callable[[World], Any] = lambda w: w.model, prompts: Any = (PROMPT,), measures: Any = "flow", **how: Any
) -> Call:
    return lambda w: osl.sweep(model(w), list(prompts), measures, _out(w), **how)


def _out(world: World) -> Any:
    return world.folder / "rows.parquet"


def _read(name: str, content: bytes, **options: Any) -> Call:
    return lambda w: osl.sweep(w.model, w.file(name, content), "flow", _out(w), **options)


def _placed(place: str) -> Call:
    return lambda w: osl.sweep(w.model, [PROMPT], "flow", w.folder / place)


def _over(name: str) -> Call:
    return lambda w: osl.sweep(w.model, [PROMPT], "flow", w.file(name, b"my notes"))


def _another_run(w: World) -> None:
    osl.sweep(w.model, [PROMPT], "flow", _out(w))
    osl.sweep(w.model, [PROMPT], "flow", _out(w), seed=1)


def _batched(prompts: Any, **options: Any) -> Call:
    return lambda w: osl.record_batch(w.model, prompts, **options)


def _result(w: World) -> SweepResult:
    return osl.sweep(w.model, [PROMPT], "flow", _out(w))


CASES = [
    Case("record_batch", "no model", "NoneType", lambda w: osl.record_batch(None, [PROMPT])),
    Case("record_batch", "one text", "type str", _batched(PROMPT)),
    Case("record_batch", "no prompt", "no prompt", _batched([])),
    Case("record_batch", "a prompt that is too long", "got 17 tokens", _batched([PROMPT, [5] * 17])),
    Case("record_batch", "an empty text", "got an empty prompt", _batched([""])),
    Case("record_batch", "no probes", "node_probes=0", _batched([PROMPT], node_probes=0)),
    Case("record_batch", "a seed that is none", "seed=", _batched([PROMPT], seed=2**80)),
    Case("record_batch", "a hole in the mask", "hole", _batched([[5, 6, 7]], attention_mask=[[1, 0, 1]])),
    Case("record_batch", "a mask of zeros", "all 0", _batched([[5, 6]], attention_mask=[[0, 0]])),
    Case("record_batch", "a mask of other shape", "(1, 3)", _batched([[5, 6]], attention_mask=[[1, 1, 1]])),
    Case("record_batch", "a mask of twos", "other numbers", _batched([[5, 6]], attention_mask=[[1, 2]])),
    Case("record_batch", "a mask for texts", "list", _batched([PROMPT], attention_mask=[[1, 1]])),
    Case("sweep", "no model", "NoneType", _swept(lambda w: None)),
    Case("sweep", "transformers' own model", "GPT2LMHeadModel", _swept(lambda w: w.plain)),
    Case("sweep", "options of loading for a model that is there", "load=", _swept(load={"kind": "bridge"})),
    Case("sweep", "no prompt", "no prompt", _swept(prompts=())),
    Case("sweep", "a file that is not there", "nowhere.txt", lambda w: osl.sweep(w.model, "nowhere.txt")),
    Case("sweep", "an empty file", "holds no prompt", _read("empty.txt", b"\n")),
    Case("sweep", "a file that is no UTF-8", "latin.txt", _read("latin.txt", b"\xe9")),
    Case("sweep", "half a JSON file", "half.json", _read("half.json", b'["w5')),
    Case("sweep", "a table that is none", "t.parquet", _read("t.parquet", b"notes")),
    Case("sweep", "a column that is not there", "'question'", _read("t.jsonl", b'{"a": 1}', column="question")),
    Case("sweep", "a column of a text file", "column='text'", _read("t.txt", b"w5 w9", column="text")),
    Case("sweep", "a measure that is none", "'median'", _swept(measures="median")),
    Case("sweep", "no measure", "[]", _swept(measures=[])),
    Case("sweep", "no probes", "probes=0", _swept(probes=0)),
    Case("sweep", "no node probes", "node_probes=0", _swept(node_probes=0)),
    Case("sweep", "a seed that is none", "seed=", _swept(seed=2**80)),
    Case("sweep", "no memory", "memory=0", _swept(memory=0)),
    Case("sweep", "attention that is none", "'sparse'", _swept(attention="sparse")),
    Case("sweep", "Ray with a model that is loaded", "ray='auto'", _swept(ray="auto")),
    Case("sweep", "Ray nowhere", "ray=''", _swept(lambda w: "a-name", ray="")),
    Case("sweep", "a folder that is not there", "no-such", _placed("no-such/rows.parquet")),
    Case("sweep", "a folder in the file's place", "is a folder", lambda w: osl.sweep(w.model, [PROMPT], out=w.folder)),
    Case("sweep", "somebody's file", "notes.txt", _over("notes.txt")),
    Case("sweep", "rows of another run", "seed: 0 there, 1 now", _another_run),
    Case("SweepResult", "no path", "NoneType", lambda w: SweepResult.load(None)),
    Case("SweepResult", "no file", "nowhere", lambda w: SweepResult.load("nowhere.parquet")),
    Case("SweepResult", "a column that is none", "'share'", lambda w: _result(w).table(["share"])),
    Case("SweepResult", "bands of what was not measured", "'proof'", lambda w: _result(w).bands("proof")),
    Case("figures.bands", "no result", "NoneType", lambda w: osl.figures.bands(None)),
    Case("figures.bands", "no measure", "no measure", lambda w: osl.figures.bands(_result(w), [])),
]
