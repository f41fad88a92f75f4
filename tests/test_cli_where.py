"""`flow` and `what-if` on the command line: tables, JSON, figures; bad input is one line and exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import NO_BRIDGE, has_bridge

import oversquash_lens as osl
from oversquash_lens.cli.one_prompt import edit_of
from oversquash_lens.errors import InputError

pytestmark = pytest.mark.skipif(not has_bridge(), reason=NO_BRIDGE)
PROMPT = "w5 w9 w5 w30"


def test_flow_prints_widths_edges_and_paths(on_tiny: Callable, tiny: object) -> None:
    result = on_tiny("flow", "--estimate", "--prompt", PROMPT, "--top", "3")
    assert result.code == 0
    trace = osl.record(tiny, PROMPT)
    squashing = osl.squashing(trace)
    assert squashing.sentence in result.out
    lines = result.out.splitlines()
    for layer in range(trace.n_layers):
        (line,) = (line for line in lines if line.startswith(f"{layer:5d}  "))
        assert float(line.split()[1]) == pytest.approx(squashing.flow.effective_width[layer].item(), abs=0.051)
    for edge in osl.heaviest_edges(squashing.flow, 3):
        assert f"{edge.share:8.2%}  layer {edge.layer}, head {edge.head}: {edge.src} " in result.out
    paths = lines[next(i for i, line in enumerate(lines) if line.startswith("heaviest whole paths")) + 1 :]
    assert [line.split()[0] for line in paths] == [f"{p.share:.2%}" for p in osl.heaviest_paths(squashing.flow, 3)]


def test_flow_of_one_source_by_number_and_by_text(on_tiny: Callable, tiny: object) -> None:
    trace = osl.record(tiny, PROMPT)
    place = next(i for i, token in enumerate(trace.tokens) if token.strip() == "w9")
    by_number = on_tiny("flow", "--estimate", "--prompt", PROMPT, "--source", str(place), "--json")
    by_text = on_tiny("flow", "--estimate", "--prompt", PROMPT, "--source", "w9", "--json")
    assert by_number.out == by_text.out
    written = json.loads(by_text.out)
    assert written["source"] == place
    expected = osl.flow(trace, source=place)
    assert torch.allclose(torch.tensor(written["node"], dtype=torch.float64), expected.node)
    assert written["paths"] == [path.to_dict() for path in osl.heaviest_paths(expected)]


def test_flow_writes_json_and_figures(on_tiny: Callable, tmp_path: Path) -> None:
    figures, out = tmp_path / "figures", tmp_path / "flow.json"
    result = on_tiny(
        "flow", "--estimate", "--prompt", PROMPT, "--variant", "proof", "--figures", str(figures), "--out", str(out)
    )
    assert result.code == 0
    names = {f"{name}.{kind}" for name in ("flow", "heads", "width", "route") for kind in ("pdf", "svg", "png")}
    assert {path.name for path in figures.iterdir()} == names
    written = json.loads(out.read_text())
    assert written["kind"] == "squashing"
    assert written["flow"]["paths"] == "proof"


def test_flow_prints_measured_edges(on_tiny: Callable, tiny: object) -> None:
    result = on_tiny("flow", "--prompt", PROMPT, "--edges", "3")
    assert result.code == 0
    lines = result.out.splitlines()
    printed = lines[lines.index("heaviest edges between positions, signed") + 1 :]
    expected = osl.measured_flow(tiny, PROMPT, target="top", edges=3).edges
    assert [line.split()[0] for line in printed] == [f"{edge.share:.2%}" for edge in expected]
    assert "edges" not in on_tiny("flow", "--prompt", PROMPT).out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--edges", "3"], "no --target, --probes or --edges with an estimate"),
        (["--variant", "prof"], "got variant 'prof': did you mean proof?"),
        (["--top", "0"], "expected at least 1, got --top 0"),
        (["--source", "9"], "slice of positions, got source='9'"),
        (["--source", "w5"], "got source='w5', which is at positions"),
        (["--source", "nothing"], "no token is that"),
        (["--out", "/proc/no/where.json"], "/proc/no"),
        (["--figures", "/proc/no"], "/proc/no"),
    ],
)
def test_flow_refuses_in_one_line(on_tiny: Callable, arguments: list[str], said: str) -> None:
    result = on_tiny("flow", "--estimate", "--prompt", PROMPT, *arguments)
    assert (result.code, result.out) == (2, "")
    assert said in result.err.splitlines()[-1]


def test_what_if_prints_a_table_and_json(on_tiny: Callable, tiny: object, tmp_path: Path) -> None:
    edits = ["window:2:keep-first", "ablate:1.0", "mask:1", "sharpen:2", "separators:1:w7", "without-bos"]
    options = [part for edit in edits for part in ("--edit", edit)]
    table = on_tiny("what-if", "--prompt", PROMPT, "--exact", *options)
    assert table.code == 0
    assert "head 0 of layer 1 off" in table.out
    out = tmp_path / "what_if.json"
    result = on_tiny("what-if", "--prompt", PROMPT, "--exact", "--json", "--out", str(out), *options)
    written = json.loads(result.out)
    assert written == json.loads(out.read_text())
    expected = osl.what_if(tiny, PROMPT, *map(edit_of, edits), probes=None)
    assert [change["label"] for change in written["changes"]] == [outcome.label for outcome in expected.after]
    for change, now in zip(expected.changes, written["changes"], strict=True):
        assert now["truth"]["median"] == pytest.approx(change.median("truth"), rel=1e-6)


@pytest.mark.parametrize(
    "edit",
    [
        "windows:3",
        "window",
        "window:x",
        "window:3:keep",
        "ablate:3",
        "ablate:a.b",
        "mask:",
        "sharpen:two",
        "with-bos:1",
        "",
    ],
)
def test_an_edit_that_is_none_is_refused(on_tiny: Callable, edit: str) -> None:
    result = on_tiny("what-if", "--prompt", PROMPT, "--edit", edit)
    assert result.code == 2
    assert f"without-bos, got --edit {edit!r}" in result.err.splitlines()[-1]
    assert on_tiny.asked is None, "a model was loaded for nothing"


def test_an_edit_that_cannot_be_is_refused_by_its_own_words(on_tiny: Callable) -> None:
    for edit, said in (("ablate:9.0", "layer 9"), ("window:0", "0"), ("sharpen:-1", "-1"), ("mask:77", "77")):
        result = on_tiny("what-if", "--prompt", PROMPT, "--edit", edit)
        assert result.code == 2
        assert said in result.err.splitlines()[-1]
    with pytest.raises(InputError):
        edit_of("window:0")
