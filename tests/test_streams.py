"""Streams that are closed, full or nobody's, a folder that is gone, and what must never reach a terminal raw."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_days import PROMPT, fresh_model

import oversquash_lens as osl
from oversquash_lens.errors import InputError, ModelError, OversquashError, visible
from oversquash_lens.sweeps.result import SweepResult

HERE = Path(__file__).parent
RUN = """
import sys
from bad_days import fresh_model
from oversquash_lens.models import loading
loading.load_model = lambda name, **options: fresh_model()
from oversquash_lens.cli import main
sys.exit(main(sys.argv[1:]))
"""
BOUND = ("bound", "--prompt", PROMPT)


def shell(redirected: str, *arguments: str, folder: Path) -> tuple[int, str, str]:
    """A command with its streams redirected as a shell does it: code, standard output, standard error."""
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirected}', "bash", sys.executable, "-c", RUN, *arguments],
        capture_output=True,
        text=True,
        env=env,
        cwd=folder,
        timeout=300,
        input="",
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("redirected", "arguments", "code", "said"),
    [
        ("<&-", ("bound", "--prompt", "-"), 2, "it is closed; give --prompt or --prompt-file"),
        (">&-", BOUND, 2, "standard output is closed; expected one for the result"),
        (">/dev/full", BOUND, 2, "No space left on device"),
        (">/dev/full", (*BOUND, "--json"), 2, "No space left on device"),
        (">/dev/full", ("--help",), 2, "No space left on device"),
        (">/dev/full", ("models", "--json"), 2, "No space left on device"),
        ("| true; exit ${PIPESTATUS[0]}", BOUND, 0, ""),
    ],
)
def test_streams_that_take_or_give_nothing(
    redirected: str, arguments: tuple[str, ...], code: int, said: str, tmp_path: Path
) -> None:
    came, _, err = shell(redirected, *arguments, folder=tmp_path)
    assert came == code, err
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    lines = [line for line in err.splitlines() if not line.startswith("loading ")]
    assert len(lines) == bool(said)
    assert said in err


@pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full"])
def test_notes_that_nobody_takes_do_not_harm_the_result(redirected: str, tmp_path: Path) -> None:
    code, out, _ = shell(redirected, *BOUND, "--json", folder=tmp_path)
    assert code == 0
    assert out.startswith("{")
    assert out.count("\n") == 1


def test_an_error_that_nobody_hears_is_an_error_all_the_same(tmp_path: Path) -> None:
    for redirected in ("2>&-", "2>/dev/full", ">/dev/full 2>/dev/full"):
        assert shell(redirected, "bound", "--prompt", "", folder=tmp_path)[0] == 2


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    before, model = os.getcwd(), fresh_model()
    os.chdir(gone)
    gone.rmdir()
    try:
        with pytest.raises(InputError, match="working folder, and that is gone"):
            osl.sweep(model, [PROMPT], out="rows.parquet")
        with pytest.raises(OversquashError, match="is not a file"):
            osl.Trace.load("t.safetensors")
        with pytest.raises(InputError, match="is not a file"):
            osl.sweep(model, "prompts.txt", out=tmp_path / "rows.parquet")
        assert osl.record(model, PROMPT).n_positions > 2
        with pytest.raises(InputError, match="working folder, and that is gone"):
            osl.report(model, PROMPT, "page.html")
        with pytest.raises(InputError, match="working folder is gone"):
            osl.load_model("gpt2")
        from oversquash_lens.cli import main

        assert main(list(BOUND)) == 2
    finally:
        os.chdir(before)


# ---------------------------------------------------------------- terminals

EVIL = "a\x1b[2J\x1b]0;owned\x07b\x9bc\r\u202egpj\x08\x7f\u2028d"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def harmless(text: Any) -> bool:
    return CONTROL.search(str(text)) is None


@pytest.fixture(scope="module")
def evil() -> Any:
    model = fresh_model()
    model.cfg.model_name = EVIL
    return model


RESULTS: dict[str, Callable[[Any], Any]] = {
    "record": lambda m: osl.record(m, PROMPT),
    "path_bound": lambda m: osl.path_bound(osl.record(m, PROMPT)),
    "mean_field_sensitivity": lambda m: osl.mean_field_sensitivity(osl.record(m, PROMPT)),
    "flow": lambda m: osl.flow(osl.record(m, PROMPT)),
    "heaviest_paths": lambda m: osl.heaviest_paths(osl.flow(osl.record(m, PROMPT)), 3),
    "squashing": lambda m: osl.squashing(osl.record(m, PROMPT)),
    "measured_sensitivity": lambda m: osl.measured_sensitivity(m, PROMPT, probes=1),
    "audit": lambda m: osl.audit(m, PROMPT, probes=1),
    "findings": lambda m: osl.findings(m, PROMPT, probes=1),
    "what_if": lambda m: osl.what_if(m, PROMPT, osl.edits.window(2), probes=1),
    "plan": lambda m: osl.plan(m, PROMPT, "bound"),
    "collapse_curve": lambda m: osl.collapse_curve(m, lambda k: [5, 9] + [7] * k, (1, 2), ("float32",)),
}


@pytest.mark.parametrize("name", RESULTS)
def test_no_result_controls_a_terminal(name: str, evil: Any) -> None:
    result = RESULTS[name](evil)
    assert harmless(repr(result))
    assert harmless(result)
    assert harmless(getattr(result, "about", ""))


def test_no_trace_from_a_file_controls_a_terminal(evil: Any, tmp_path: Path) -> None:
    trace = osl.record(evil, PROMPT)
    trace = dataclasses.replace(trace, tokens=(EVIL, *trace.tokens[1:]), route_reason=EVIL)
    again = osl.Trace.load(trace.save(tmp_path / "t"))
    assert again.tokens == trace.tokens
    for shown in (again, repr(again), osl.path_bound(again), osl.heaviest_paths(osl.flow(again), 3)):
        assert harmless(shown)


def test_no_row_of_a_sweep_controls_a_terminal(evil: Any, tmp_path: Path) -> None:
    result = osl.sweep(evil, {EVIL: PROMPT, f"{EVIL}2": EVIL * 40}, out=tmp_path / "rows.parquet")
    assert result.refused == 1
    for shown in (result, repr(result), SweepResult.load(result.path)):
        assert harmless(shown)


ERRORS: dict[str, Callable[[Path], Any]] = {
    "a trace": lambda folder: osl.Trace.load(folder / EVIL),
    "a prompt file": lambda folder: osl.sweep(fresh_model(), folder / f"{EVIL}.txt"),
    "a model": lambda folder: osl.load_model(EVIL),
    "a folder": lambda folder: osl.report(fresh_model(), PROMPT, folder / EVIL / "x.html"),
    "a variant": lambda folder: osl.path_bound(osl.record(fresh_model(), PROMPT), EVIL),
    "a source": lambda folder: osl.flow(osl.record(fresh_model(), PROMPT), source=EVIL),
    "a figure": lambda folder: osl.reproduce(EVIL, out=folder),
}


@pytest.mark.parametrize("name", ERRORS)
def test_no_error_controls_a_terminal(name: str, tmp_path: Path) -> None:
    with pytest.raises(OversquashError) as caught:
        ERRORS[name](tmp_path)
    assert harmless(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["--prompt-file", "--variant", "--out", "--nonsense", "--top"])
def test_no_line_of_the_command_line_controls_a_terminal(option: str, on_tiny: Callable) -> None:
    result = on_tiny("bound", "--prompt", PROMPT, option, f"no/{EVIL}")
    assert result.code == 2
    assert harmless(result.err)


def test_no_command_prints_what_a_model_is_called(
    on_tiny: Callable, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.cfg, "model_name", EVIL)
    for command in (BOUND, ("flow", "--estimate", "--prompt", PROMPT), (*BOUND, "--json"), (*BOUND, "--model", EVIL)):
        result = on_tiny(*command)
        assert result.code == 0, result.err
        assert harmless(result.out)
        assert harmless(result.err)


def test_what_is_visible() -> None:
    assert visible("plain 漢字 é 👩\u200d💻\n") == "plain 漢字 é 👩\u200d💻\n"
    assert visible("a\tb\rc") == "a b c"
    for code in (*range(32), *range(0x7F, 0xA0), 0x202E, 0x2066, 0x2028, 0xFEFF, 0xD800, 0xE0041):
        assert harmless(visible(chr(code)))
        assert str(ModelError(chr(code))).isprintable() or chr(code) == "\n"
