"""The commands of the paper's experiments: tables, JSON, files; bad input is one line, exit code 2, no model loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest
from small_generators import KINDS, loaded

from oversquash_lens.cli.common import FAMILY_NAMES, FIGURE_FILES, FIGURE_NAMES, TASK_NAMES
from oversquash_lens.cli.paper import lengths_of
from oversquash_lens.collapse import families
from oversquash_lens.collapse.curve import collapse_curve
from oversquash_lens.errors import InputError
from oversquash_lens.paper.generator import Generator, Sampling
from oversquash_lens.paper.prompts import COTS, TASKS
from oversquash_lens.paper.reproduce import FIGURES, Reproduced
from oversquash_lens.paper.tasks import NEW_TOKENS, run_task
from oversquash_lens.viz.chart import Chart, Panel, Series, Verdict

HOOKED = KINDS[1]
SHORT = ("--lengths", "1-4", "--dtypes", "float64", "--no-floor")


@pytest.fixture
def cli(cli: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """As everywhere, with the tiny model in place of any; `.asked`: how it was asked for."""

    def giving(model: Any) -> Callable[..., Any]:
        def load(name: str, **options: Any) -> Any:
            run.asked.append({"name": name, **options})
            return model

        return load

    hooked, twin = loaded(HOOKED), loaded("twin")
    monkeypatch.setattr("oversquash_lens.models.loading.load_model", giving(hooked))
    monkeypatch.setattr("oversquash_lens.models.loading.load_twin", giving(twin))

    def run(*arguments: str) -> SimpleNamespace:
        run.asked = []
        return cli(*arguments)

    return run


def refused(result: SimpleNamespace, *said: str) -> None:
    """Exit code 2, nothing on standard output, exactly one line from us on standard error, nothing left behind."""
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err
    (line,) = (line for line in result.err.splitlines() if line.startswith("oversquash-lens"))
    assert result.err.splitlines()[-1] == line
    for part in said:
        assert part in line
    assert not [path for path in Path().rglob("*") if path.is_file()]


# ---------------------------------------------------------------- lists and lengths


def test_the_lists_of_names_agree() -> None:
    assert tuple(FIGURES) == FIGURE_NAMES
    assert tuple(TASKS) == TASK_NAMES
    assert set(COTS) == set(NEW_TOKENS)


def test_help_names_everything() -> None:
    for command, names in (("collapse", FAMILY_NAMES), ("tasks", TASK_NAMES), ("reproduce", FIGURE_NAMES)):
        done = subprocess.run(
            [sys.executable, "-m", "oversquash_lens.cli", command, "--help"], capture_output=True, timeout=120
        )
        assert done.returncode == 0
        said = "".join(done.stdout.decode().split())
        assert "".join(", ".join(names).split()) in said


@pytest.mark.parametrize("command", ["collapse", "tasks", "reproduce 5"])
def test_nothing_heavy_is_imported_for_what_can_be_refused_at_once(command: str) -> None:
    bad = {"collapse": "--family=nonsense", "tasks": "--lengths=x", "reproduce 5": "--nonsense"}[command]
    code = f"from oversquash_lens.cli import main\ntry: main({[*command.split(), bad]!r})\nexcept SystemExit: pass"
    heavy = "{'torch', 'transformer_lens', 'transformers', 'numpy', 'matplotlib', 'rich'}"
    check = f"{code}\nimport sys\nfound = {heavy} & set(sys.modules)\nassert not found, found"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("7", (7,)),
        ("1,11,101", (1, 11, 101)),
        ("1-5", (1, 2, 3, 4, 5)),
        ("5-95:30", (5, 35, 65, 95)),
        ("5-96:30", (5, 35, 65, 95)),
        ("1-3,10-30:10,100", (1, 2, 3, 10, 20, 30, 100)),
        (" 1 , 2 - 3 ", (1, 2, 3)),
        ("4-4", (4,)),
    ],
)
def test_lengths(text: str, lengths: tuple[int, ...]) -> None:
    assert lengths_of(text) == lengths


@pytest.mark.parametrize(
    "text",
    ["", "x", "1,,2", "1-", "-1", "0", "0-3", "5-1", "3,2", "2,2", "1-5:0", "1-5:-1", "1-3,2", "1.5", "1-2-3", "1e3"],
)
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="--lengths") as caught:
        lengths_of(text)
    assert repr(text) in str(caught.value)


def test_lengths_beyond_all_measure_cost_nothing() -> None:
    with pytest.raises(InputError, match="at most"):
        lengths_of(f"1-{10**15}")


# ---------------------------------------------------------------- collapse


def test_collapse_prints_a_table(cli: Callable) -> None:
    result = cli("collapse", "--lengths", "1-4", "--dtypes", "float64, bfloat16")
    assert result.code == 0, result.err
    (asked,) = cli.asked
    assert (asked["name"], asked["kind"], asked["dtype"], asked["device"]) == ("smollm2-135m", "auto", "float32", None)
    model = loaded(HOOKED)
    curve = collapse_curve(model, families.counting(model), (1, 2, 3, 4), ("float64", "bfloat16"), noise_floor=True)
    blocks = result.out.split("\n\n")
    assert blocks[0].splitlines() == [str(curve.about), f"counting ones: {'; '.join(curve.notes)}"]
    for name, block in zip(("float64", "bfloat16"), blocks[1:], strict=True):
        title, head, *rows, last = block.strip().splitlines()
        assert title == name
        assert head.split() == ["ones", "L1", "L2", "L∞", "relative", "heads", "L∞", "same", "top-1"]
        assert [int(row.split()[0]) for row in rows] == [1, 2, 3, 4]
        for row, value in zip(rows, curve.l1[name].tolist(), strict=True):
            assert row.split()[1] == f"{value:.3g}"
        assert last.startswith("the same from: epsilon ")
    assert result.err.startswith("loading smollm2-135m …")


def test_a_long_table_is_thinned_but_keeps_its_ends(cli: Callable) -> None:
    rows = cli("collapse", "--lengths", "1-40", *SHORT[2:]).out.split("\n\n")[1].splitlines()[2:-1]
    shown = [int(row.split()[0]) for row in rows]
    assert len(shown) == 12
    assert (shown[0], shown[-1]) == (1, 40)


FAMILIES: dict[str, tuple[list[str], Callable[[Any], Any]]] = {
    "counting": ([], families.counting),
    "counting, spaced": (["--spaced"], lambda model: families.counting(model, spaced=True)),
    "copying": (["--family", "copying"], families.copying),
    "a question": (["--question", "How many?"], lambda model: families.counting(model, question="How many?")),
    "separated": (["--family", "separated"], families.separated),
    "separated otherwise": (
        ["--family", "separated", "--separator", ";", "--every", "2", "--counted-from", "right", "--step", "2"],
        lambda model: families.separated(model, separator=";", every=2, counted_from="right", step=2),
    ),
    "digits": (["--family", "digits", "--seed", "3"], lambda model: families.sampled_digits(model, seed=3)),
    "interleaved": (["--family", "interleaved", "--step", "2"], lambda model: families.alternating(model, step=2)),
    "words": (["--family", "words", "--words", "a bc d"], lambda model: families.word_list(model, ["a", "bc", "d"])),
    "no bos": (["--bos"], lambda model: families.counting(model, bos=True)),
    "then": (
        ["--then", " Answer:"],
        lambda model: families.followed_by(model, families.counting(model), " Answer:"),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_collapse_as_json_is_the_curve(name: str, cli: Callable) -> None:
    arguments, make = FAMILIES[name]
    result = cli("collapse", *arguments, *SHORT, "--json")
    assert result.code == 0, result.err
    curve = collapse_curve(loaded(HOOKED), make(loaded(HOOKED)), (1, 2, 3, 4), ("float64",))
    found = json.loads(result.out)
    assert found == json.loads(json.dumps(curve.to_dict(), allow_nan=False))


def test_two_prompts_of_ones_own(cli: Callable) -> None:
    found = json.loads(cli("collapse", "--prompts", "one 1", "two 11", *SHORT, "--json").out)
    model = loaded(HOOKED)
    curve = collapse_curve(model, families.two_prompts(model, "one 1", "two 11"), (1,), ("float64",))
    assert (found["lengths"], found["l1"]) == ([1], {"float64": curve.l1["float64"].tolist()})


def test_collapse_writes_its_files(cli: Callable) -> None:
    result = cli("collapse", *SHORT, "--out", "curve.json", "--figure", "curve.svg", "--json")
    assert result.code == 0, result.err
    assert sorted(path.name for path in Path().iterdir()) == ["curve.json", "curve.svg"]
    assert json.loads(Path("curve.json").read_text()) == json.loads(result.out)
    assert "<svg" in Path("curve.svg").read_text("utf-8")
    assert "wrote curve.svg" in result.err
    assert cli("collapse", *SHORT, "--figure", "other.png").code == 0
    assert Path("other.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- tasks


def test_tasks_prints_a_table(cli: Callable) -> None:
    result = cli("tasks", "--task", "copy_last", "--lengths", "5,9", "--max-new-tokens", "4", "--dtype", "float64")
    assert result.code == 0, result.err
    assert cli.asked == [{"name": "smollm2-135m", "dtype": "float64", "device": None, "device_map": None}]
    expected = run_task(Generator(loaded("twin")), "copy_last", (5, 9), sampling=Sampling(max_new_tokens=4))
    title, settings, empty, head, *rows, last = result.out.splitlines()
    assert title == "copy_last, chain of thought: none"
    assert "max_new_tokens 4" in settings
    assert "temperature 0.0" in settings
    assert empty == ""
    columns = [row.split() for row in rows]
    head = " ".join(head.split())
    assert head == "length truth accuracy strict error unparsable expected p(right) rank"
    assert [row[0] for row in columns] == ["5", "9"]
    assert [row[2] for row in columns] == [f"{value:.3g}" for value in expected.accuracy()]
    assert [row[7] for row in columns] == [f"{value:.3g}" for value in expected.scores.mean("probability")]
    assert last.startswith("accuracy, error and unparsable: leniently read")


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--task", "ones", "--cot", "zero_shot"], {"task": "ones", "cot": "zero_shot"}),
        (["--task", "bernoulli", "--samples", "2"], {"task": "bernoulli", "samples": 2}),
        (["--task", "type_1", "--no-chat"], {"task": "type_1"}),
    ],
)
def test_tasks_as_json_is_the_result(arguments: list[str], options: dict[str, Any], cli: Callable) -> None:
    sampled = ("--lengths", "5-9:4", "--max-new-tokens", "3", "--temperature", "0.5", "--seed", "2")
    result = cli("tasks", *arguments, *sampled, "--json")
    assert result.code == 0, result.err
    generator = Generator(loaded("twin"), chat=False if "--no-chat" in arguments else None)
    expected = run_task(generator, lengths=(5, 9), sampling=Sampling(0.5, 2, 3), **options)
    assert json.loads(result.out) == json.loads(json.dumps(expected.to_dict(), allow_nan=False))


def test_tasks_keeps_answers_and_goes_on_with_them(cli: Callable) -> None:
    common = ("tasks", "--task", "ones", "--max-new-tokens", "3", "--answers", "kept.parquet")
    assert cli(*common, "--lengths", "5").code == 0
    kept = pyarrow.parquet.read_table("kept.parquet").to_pylist()
    result = cli(*common, "--lengths", "5,7", "--out", "scores.json", "--json")
    assert result.code == 0, result.err
    assert json.loads(Path("scores.json").read_text()) == json.loads(result.out)
    rows = pyarrow.parquet.read_table("kept.parquet").to_pylist()
    assert rows[: len(kept)] == kept
    keys = [row["key"] for row in rows]
    assert len(keys) == len(set(keys)) == 4


# ---------------------------------------------------------------- reproduce


def test_reproduce_prints_verdicts_and_the_page(cli: Callable) -> None:
    result = cli("reproduce", "12", "1", "--longest", "5", "--out", "figures", "--dtypes", "float64")
    assert result.code == 0, result.err
    assert [asked["name"] for asked in cli.asked] == ["smollm2-135m"]  # loaded once
    *lines, page = result.out.splitlines()
    assert page == str(Path("figures/index.html").absolute())
    written = {name: json.loads(Path(f"figures/{name}.json").read_text("utf-8")) for name in ("1", "12")}
    verdicts = {name: [Verdict(**each) for each in chart["verdicts"]] for name, chart in written.items()}
    assert lines == [f"{name}: {verdict}" for name in ("1", "12") for verdict in verdicts[name]]


def test_reproduce_as_json_is_every_chart(cli: Callable) -> None:
    result = cli("reproduce", "1", "--longest", "3", "--out", "made/here", "--json")
    assert result.code == 0, result.err
    (name, chart) = next(iter(json.loads(result.out).items()))
    assert (name, chart) == ("1", json.loads(Path("made/here/1.json").read_text("utf-8")))


def test_every_option_reaches_reproduce(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def reproduce(names: list[str], done: Callable[[Reproduced], None], **options: Any) -> tuple[Reproduced, ...]:
        seen.update(names=names, **options)
        panel = Panel("", series=(Series("a", (1,), (1.0,)),))
        one = Reproduced("5", Chart("5", "", (panel,), (Verdict("a claim", "7", None),)), {})
        done(one)
        return (one,)

    monkeypatch.setattr("oversquash_lens.paper.reproduce.reproduce", reproduce)
    place = ["--model", "some/name", "--kind", "bridge", "--dtype", "bfloat16", "--device", "cuda:1", "--no-bos"]
    tasks = ["--samples", "3", "--temperature", "0.7", "--no-chat", "--seed", "4"]
    result = cli(
        "reproduce", "5", "all", *place, *tasks, "--quick", "--longest", "50", "--probes", "9", "--dtypes=float64"
    )
    assert result.out.splitlines()[0] == "5: not decided: a claim (7)"
    assert seen == {
        **{"names": ["5", "all"], "model": "some/name", "kind": "bridge", "dtype": "bfloat16", "device": "cuda:1"},
        **{"device_map": None, "bos": False, "chat": False, "dtypes": ("float64",), "quick": True, "longest": 50},
        **{"samples": 3, "temperature": 0.7, "probes": 9, "seed": 4, "progress": True, "out": "figures"},
    }


# ---------------------------------------------------------------- bad input

BAD: dict[str, tuple[list[str], str]] = {
    "family": (["collapse", "--family", "sheep"], "words, got family 'sheep'"),
    "lengths": (["collapse", "--lengths", "3-1"], "got --lengths '3-1'"),
    "lengths of tasks": (["tasks", "--lengths", ""], "got --lengths ''"),
    "number format": (["collapse", "--dtypes", "float32,float7"], "got 'float7'"),
    "float8 cannot compute": (["collapse", "--dtypes", "float8_e5m2"], "no device here computes in it"),
    "no number format": (["collapse", "--dtypes", ""], "got '' as the format to compute in"),
    "a figure of no kind": (["collapse", "--figure", "curve.gif"], "got --figure curve.gif"),
    "a figure's name": (["collapse", "--figure", "a curve.png"], "got the file name 'a curve.png'"),
    "a figure in no folder": (["collapse", "--figure", "no/such/curve.png"], "does not exist"),
    "out, a folder": (["collapse", "--out", "/"], "is a folder"),
    "out in no folder": (["tasks", "--out", "/no/such/folder/x.json"], "does not exist"),
    "answers in no folder": (["tasks", "--answers", "/no/such/folder/x.parquet"], "does not exist"),
    "task": (["tasks", "--task", "sing"], "copy_last_control, got task 'sing'"),
    "chain of thought": (["tasks", "--cot", "much"], "expected one of none, zero_shot, few_shot, got cot 'much'"),
    "temperature": (["tasks", "--temperature", "-1"], "got temperature=-1.0"),
    "temperature, nan": (["tasks", "--temperature", "nan"], "got temperature=nan"),
    "no samples": (["tasks", "--samples", "0"], "expected at least 1, got --samples 0"),
    "no tokens": (["tasks", "--max-new-tokens", "0"], "expected at least 1, got max_new_tokens=0"),
    "figure": (["reproduce", "5", "13"], "got figure 13"),
    "no figures": (["reproduce"], "FIGURE"),
    "longest": (["reproduce", "2", "--longest", "50"], "the shortest of figure 2, got a longest length of 50"),
    "reproduce's number format": (["reproduce", "5", "--dtypes", "float7"], "got 'float7'"),
    "reproduce's samples": (["reproduce", "3", "--samples", "-1"], "got samples=-1"),
    "reproduce's probes": (["reproduce", "window", "--probes", "0"], "got probes=0"),
    "reproduce's temperature": (["reproduce", "3", "--temperature", "inf"], "got temperature=inf"),
    "no whole number": (["reproduce", "3", "--samples", "many"], "--samples"),
    "an unknown option": (["reproduce", "3", "--hurry"], "--hurry"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_no_model(name: str, cli: Callable) -> None:
    arguments, said = BAD[name]
    refused(cli(*arguments), said)
    assert cli.asked == []


WITH_A_MODEL: dict[str, tuple[list[str], str]] = {
    "groups of none": (["collapse", "--family", "separated", "--every", "0"], "got every=0, step=1"),
    "a side": (["collapse", "--family", "separated", "--counted-from", "above"], "got counted_from='above'"),
    "no words": (["collapse", "--family", "words"], "got [] as the words"),
    "two equal prompts": (["collapse", "--prompts", "the same", "the same"], "are equal"),
    "a short prompt": (["collapse", "--prompts", "a", "b"], "1 token"),
    "beyond n_ctx": (
        ["collapse", "--lengths", "1,2000"],
        "at most n_ctx = 1024 tokens, this model's, got family 'counting ones'",
    ),
    "tasks beyond n_ctx": (["tasks", "--task", "sum", "--lengths", "400"], "n_ctx = 1024"),
    "a length too short to ask about": (["tasks", "--task", "copy_last", "--lengths", "1"], "got a length of 1"),
}


@pytest.mark.parametrize("name", WITH_A_MODEL)
def test_what_only_the_model_can_tell_is_one_line_too(name: str, cli: Callable) -> None:
    arguments, said = WITH_A_MODEL[name]
    refused(cli(*arguments), said)


def test_reproduce_into_a_file_is_one_line(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("not a folder")
    refused(cli("reproduce", "5", "--out", str(tmp_path / "taken")), "cannot be made")
    assert cli.asked == []


@pytest.mark.parametrize("command", ["collapse", "tasks", "reproduce 1"])
def test_a_model_that_is_not_there_is_one_line(command: str, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "oversquash_lens.cli", *command.split(), "--model", "no/such.gguf"]
    done = subprocess.run(arguments, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"Traceback" not in done.stderr
    assert "Unknown model" in done.stderr.decode().splitlines()[-1]


def test_a_failing_disk_leaves_nothing(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    refused(cli("collapse", *SHORT, "--out", "curve.json"), "No space left on device")
    refused(cli("collapse", *SHORT, "--figure", "curve.png"), "No space left on device")
    refused(cli("reproduce", "1", "--longest", "2"), "No space left on device")


def test_the_figure_files_are_those_that_can_be_written() -> None:
    from oversquash_lens.viz.figures import FORMATS

    assert {suffix.removeprefix(".") for suffix in FIGURE_FILES} == set(FORMATS)


def test_a_plan_of_every_experiment(cli: Callable) -> None:
    for command, measure in (
        (("collapse", "--lengths", "1-3", "--dtypes", "float64,float32"), "collapse"),
        (("tasks", "--task", "ones", "--lengths", "3,5", "--max-new-tokens", "2"), "generate"),
        (("reproduce", "1", "--quick", "--longest", "4"), "forward"),
    ):
        result = cli(*command, "--plan", "--json")
        assert result.code == 0, result.err
        told = json.loads(result.out)
        assert (told["kind"], told["measure"]) == ("plan", measure)
        assert told["n"] >= 2
        assert told["passes"] >= 2
        assert "memory, while" in cli(*command, "--plan").out
    assert cli("reproduce", "9", "--plan").out == "figures 9 run no model\n"
    assert not list(Path().iterdir())
