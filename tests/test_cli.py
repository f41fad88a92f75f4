"""The command line: results on standard output, progress on standard error, bad input is one line and exit code 2."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import NO_BRIDGE, bridge, has_bridge

import oversquash_lens
from oversquash_lens.cli.common import DEFAULT_PROMPT
from oversquash_lens.paths.kinds import VARIANTS

needs_bridge = pytest.mark.skipif(not has_bridge(), reason=NO_BRIDGE)
PROMPT = "w5 w9 w5 w30"


def command(*arguments: str, code: str | None = None, **options: Any) -> subprocess.CompletedProcess:
    """The command line, or `code`, in a Python of its own."""
    start = ["-c", code] if code else ["-m", "oversquash_lens.cli"]
    return subprocess.run([sys.executable, *start, *arguments], capture_output=True, timeout=120, **options)


def refused(result: SimpleNamespace, *said: str) -> str:
    """Exit code 2, nothing on standard output, and exactly one line from us on standard error."""
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    (line,) = (line for line in result.err.splitlines() if line.startswith("oversquash-lens"))
    assert result.err.splitlines()[-1] == line
    for part in said:
        assert part in line
    assert not list(Path().iterdir()), "something half-written was left behind"
    return line


# ---------------------------------------------------------------- nothing heavy before it is needed


@pytest.mark.parametrize(
    "code",
    [
        "import oversquash_lens; dir(oversquash_lens)",
        "import oversquash_lens.cli",
        "from oversquash_lens.cli import build_parser; build_parser().format_help()",
        "from oversquash_lens.cli import main\ntry: main(['--help'])\nexcept SystemExit as e: assert not e.code",
        "from oversquash_lens.cli import main\ntry: main(['audit', '--help'])\nexcept SystemExit: pass",
        "from oversquash_lens.cli import main; assert main(['bound', '--variant', 'nonsense']) == 2",
        "from oversquash_lens.cli import main; assert main(['bound', '--prompt-file', '/no/such/file']) == 2",
    ],
    ids=["import", "import cli", "parser", "help", "help of a command", "bad variant", "bad file"],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    heavy = "{'torch', 'transformer_lens', 'transformers', 'numpy', 'matplotlib', 'circuitsvis', 'einops', 'rich'}"
    done = command(code=f"{code}\nimport sys\nfound = {heavy} & set(sys.modules)\nassert not found, found")
    assert done.returncode == 0, done.stderr.decode()


def test_help_names_every_command() -> None:
    done = command("--help")
    assert done.returncode == 0
    for name in ("report", "bound", "audit", "models", "substitute", "swap"):
        assert name in done.stdout.decode()


def test_help_on_a_terminal_that_knows_ascii_only() -> None:
    for arguments in (["--help"], ["bound", "--help"], ["report", "--help"]):
        done = command(*arguments, env=os.environ | {"PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("name", ["bound", "flow", "what-if"])
def test_help_lists_every_kind_of_path(name: str) -> None:
    said = command(name, "--help").stdout.decode()
    for variant in VARIANTS:
        assert variant in said


# ---------------------------------------------------------------- results


def test_bound_prints_a_table(on_tiny: Callable) -> None:
    result = on_tiny("bound", "--prompt", PROMPT)
    assert result.code == 0
    assert on_tiny.asked == {
        "name": "smollm2-135m",
        "kind": "auto",
        "dtype": "float32",
        "device": None,
        "device_map": None,
    }
    lines = result.out.splitlines()
    assert "tiny-random-llama as TransformerBridge (float64), starts with BOS" in lines[0]
    assert lines[1].startswith("proof: ")
    assert {line.split()[-1] for line in lines[4:]} == {"'w1'", "'w5'", "'w9'", "'w30'"}
    shares = [float(line.split()[1]) for line in lines[4:]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=0.01)
    assert "loading smollm2-135m" in result.err


@pytest.mark.parametrize("variant", [*VARIANTS, "mean_field"])
def test_bound_json_is_the_profile(variant: str, on_tiny: Callable, tiny: Any) -> None:
    result = on_tiny("bound", "--prompt", PROMPT, "--variant", variant, "--json")
    trace = oversquash_lens.record(tiny, PROMPT)
    mean_field = variant == "mean_field"
    profile = (
        oversquash_lens.mean_field_sensitivity(trace) if mean_field else oversquash_lens.path_bound(trace, variant)
    )
    wanted = profile.to_dict()
    if mean_field:
        wanted["expected"] = oversquash_lens.expected_error(trace).to_dict()
    assert json.loads(result.out) == json.loads(json.dumps(wanted, allow_nan=False))


def test_options_reach_the_model_and_the_measure(on_tiny: Callable, tiny: Any) -> None:
    common = ("--model", "some/name", "--kind", "bridge", "--dtype", "float64", "--device", "cpu", "--json")
    result = on_tiny("bound", "--prompt", PROMPT, "--beta", "2.5", "--no-bos", "--seed", "4", *common)
    assert on_tiny.asked == {
        "name": "some/name",
        "kind": "bridge",
        "dtype": "float64",
        "device": "cpu",
        "device_map": None,
    }
    wanted = oversquash_lens.path_bound(oversquash_lens.record(tiny, PROMPT, bos=False, seed=4), "proof", 2.5)
    assert json.loads(result.out)["log_by_layer"] == wanted.to_dict()["log_by_layer"]
    assert json.loads(result.out)["about"]["bos"] is False


def test_top_cuts_the_table(on_tiny: Callable) -> None:
    lines = on_tiny("bound", "--prompt", PROMPT, "--top", "2").out.splitlines()
    assert len(lines) == 4 + 2 + 1
    assert lines[-1].startswith("… and 3 more")


def test_audit_prints_the_table_and_json(on_tiny: Callable, tiny: Any) -> None:
    table = on_tiny("audit", "--prompt", PROMPT)
    audit = oversquash_lens.audit(tiny, PROMPT)
    assert table.code == 0
    assert table.out.strip() == str(audit).strip()
    assert json.loads(on_tiny("audit", "--prompt", PROMPT, "--json").out) == json.loads(json.dumps(audit.to_dict()))
    probed = json.loads(on_tiny("audit", "--prompt", PROMPT, "--json", "--probes", "3").out)
    assert (probed["truth"]["exact"], probed["truth"]["probes"]) == (False, 3)


@pytest.mark.parametrize("name", ["bound", "audit"])
def test_out_writes_the_json(name: str, on_tiny: Callable) -> None:
    result = on_tiny(name, "--prompt", PROMPT, "--out", "result.json", "--json")
    assert result.code == 0
    assert json.loads(Path("result.json").read_text()) == json.loads(result.out)
    assert [path.name for path in Path().iterdir()] == ["result.json"]


def test_report_writes_the_page(on_tiny: Callable) -> None:
    result = on_tiny("report", "--prompt", PROMPT)
    assert result.code == 0
    assert [path.name for path in Path().iterdir()] == ["report.html"]
    page = Path("report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "w30" in page
    assert result.out.rstrip().endswith(str(Path("report.html").absolute()))
    assert "Of these 5 tokens" in result.out


def test_report_elsewhere_exact_and_as_json(on_tiny: Callable) -> None:
    result = on_tiny("report", "--prompt", PROMPT, "--out", "page.html", "--exact", "--json")
    assert json.loads(result.out)["audit"]["truth"]["exact"] is True
    assert [path.name for path in Path().iterdir()] == ["page.html"]


def test_the_same_prompt_from_everywhere(on_tiny: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    outputs = [
        on_tiny("bound", "--json", *source).out for source in (["--prompt", PROMPT], ["--prompt-file", str(file)])
    ]
    ended = tmp_path / "ended.txt"
    ended.write_bytes(b"\xef\xbb\xbf" + PROMPT.encode() + b"\r\n")
    outputs.append(on_tiny("bound", "--json", "--prompt-file", str(ended)).out)
    for source in (["--prompt", "-"], ["--prompt-file", "-"]):
        for text in (PROMPT, PROMPT + "\n"):
            monkeypatch.setattr(sys, "stdin", io.StringIO(text))
            outputs.append(on_tiny("bound", "--json", *source).out)
    assert len(set(outputs)) == 1


TALK = '[{"role": "user", "content": "w5 w9"}]'


def test_messages_from_everywhere(
    on_tiny: Callable, tiny: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A list of messages is never measured as its JSON: the chat template makes the text, and that is said."""
    assert "without a chat template" in on_tiny("bound", "--prompt", TALK).err
    monkeypatch.setattr(tiny.tokenizer, "chat_template", "w1 {{ messages[0].content }} w7")
    for name, content in (("talk.json", TALK), ("talk.txt", TALK), ("talk.jsonl", f'{{"messages": {TALK}}}')):
        (tmp_path / name).write_text(content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"\ufeff{TALK}\n".encode())))
    sources = [("--prompt", TALK), ("--prompt", "-")]
    sources += [("--prompt-file", str(tmp_path / f"talk.{kind}")) for kind in ("json", "txt", "jsonl")]
    for source in sources:
        result = on_tiny("bound", *source, "--json")
        assert result.code == 0, result.err
        found = json.loads(result.out)
        assert found["tokens"] == ["w1", "w5", "w9", "w7"]
        assert found["about"]["chat"]
        assert ("list of messages" in result.err) == (source[1][-5:] not in ("jsonl", ".json"))
    (tmp_path / "two.json").write_text('["w5 w9", "w7 w8"]')
    assert "holds 2 prompts; expected one" in on_tiny("bound", "--prompt-file", str(tmp_path / "two.json")).err


@pytest.mark.parametrize("command", [("bound",), ("audit", "--probes", "1"), ("flow",), ("report", "--probes", "1")])
def test_bos_that_is_there_twice_is_remarked(command: tuple[str, ...], on_tiny: Callable) -> None:
    result = on_tiny(*command, "--token-ids", "1 1 5 9")
    assert result.code == 0, result.err
    assert "oversquash-lens: the prompt begins with BOS twice" in result.err
    assert "BOS twice" not in on_tiny(*command, "--token-ids", "1 5 9").err


def test_without_a_prompt_it_asks_for_a_fact(on_tiny: Callable) -> None:
    """The fact stands at the beginning; the whole is far beyond what this model reads."""
    question = "The captain of the Merry Agnes is called"
    assert DEFAULT_PROMPT.startswith(f"{question} Rosalind.")
    assert DEFAULT_PROMPT.endswith(question)
    refused(on_tiny("bound"), "expected at most n_ctx = 16 tokens, got ")


def test_models_lists_the_cache(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERSQUASH_LENS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    assert str(tmp_path / "cache") in cli("models").out
    found = json.loads(cli("models", "--json").out)
    assert found["cache"] == str(tmp_path / "cache")
    for model in found["models"]:
        assert isinstance(model["bytes"], int)


# ---------------------------------------------------------------- bad input

WITH_TINY: dict[str, tuple[list[str], str]] = {
    "empty prompt": (["bound", "--prompt", ""], "empty"),
    "one token": (["bound", "--prompt", "w5", "--no-bos"], "got a prompt of 1 token"),
    "nothing but spaces": (["bound", "--prompt", "   ", "--no-bos"], "got a prompt of 0 tokens"),
    "beyond n_ctx": (["audit", "--prompt", "w5 " * 17], "n_ctx = 16"),
    "report beyond n_ctx": (["report", "--prompt", "w5 " * 17], "n_ctx = 16"),
    "unknown variant": (["bound", "--prompt", PROMPT, "--variant", "theorem_9"], "theorem_9"),
    "beta, a word": (["bound", "--prompt", PROMPT, "--beta", "much"], "much"),
    "beta, zero": (["bound", "--prompt", PROMPT, "--beta", "0"], "beta"),
    "beta, negative": (["bound", "--prompt", PROMPT, "--beta=-1"], "beta"),
    "beta, nan": (["bound", "--prompt", PROMPT, "--beta", "nan"], "beta"),
    "beta for rollout": (["bound", "--prompt", PROMPT, "--beta", "2", "--variant", "rollout"], "beta"),
    "beta for mean_field": (["bound", "--prompt", PROMPT, "--beta", "2", "--variant", "mean_field"], "beta"),
    "no template": (["bound", "--prompt", PROMPT, "--chat"], "chat template"),
    "top": (["bound", "--prompt", PROMPT, "--top", "0"], "--top 0"),
    "probes": (["audit", "--prompt", PROMPT, "--probes", "0"], "--probes 0"),
    "probes of a report": (["report", "--prompt", PROMPT, "--probes", "-1"], "--probes -1"),
    "a seed too large": (["audit", "--prompt", PROMPT, "--probes", "2", "--seed", str(2**80)], "seed"),
    "missing prompt file": (["bound", "--prompt-file", "no-such-file.txt"], "no-such-file.txt"),
    "prompt file, a folder": (["bound", "--prompt-file", "/"], "--prompt-file /"),
    "out, a folder": (["audit", "--prompt", PROMPT, "--out", "/"], "is a folder"),
    "out in no folder": (["audit", "--prompt", PROMPT, "--out", "/no/such/folder/x.json"], "does not exist"),
    "page in no folder": (["report", "--prompt", PROMPT, "--out", "/no/such/folder/x.html"], "does not exist"),
    "two prompts": (["bound", "--prompt", PROMPT, "--prompt-file", "x"], "not allowed with"),
    "unknown command": (["nonsense"], "nonsense"),
    "no command": ([], "COMMAND"),
    "unknown option": (["audit", "--nonsense"], "--nonsense"),
    "misspelt option": (["audit", "--prob", "2", "--exat"], "oversquash-lens audit: unrecognized arguments: --exat"),
    "misspelt option, what was meant": (["bound", "--promt", PROMPT], "did you mean --prompt?"),
    "misspelt command": (["reprot"], "did you mean report?"),
    "misspelt variant": (["bound", "--prompt", PROMPT, "--variant", "prof"], "did you mean proof?"),
    "a column of one prompt": (["report", "--prompt", PROMPT, "--column", "text"], "--column"),
    "bytes that are no text": (["bound", "--prompt", "w5 \udcff w9"], "expected"),
}


@pytest.mark.parametrize("name", WITH_TINY)
def test_bad_input_is_one_line(name: str, on_tiny: Callable) -> None:
    arguments, said = WITH_TINY[name]
    refused(on_tiny(*arguments), said)


BAD_MODELS: dict[str, tuple[list[str], str]] = {
    "no such file": (["--model", "no/such/model.gguf"], "Unknown model"),
    "no name at all": (["--model", ""], "Unknown model"),
    "no name of a hub": (["--model", "a name with spaces"], "Unknown model"),
    "a folder without a model": (["--model", "."], "holds no model"),
    "dtype": (["--dtype", "float7"], "float7"),
    "kind": (["--kind", "hoked"], "hoked"),
    "device": (["--device", "toaster"], "toaster"),
    "device that is not there": (["--device", "cuda:99"], "cuda:99"),
}


@pytest.mark.parametrize("name", ["report", "bound", "audit"])
@pytest.mark.parametrize("bad", BAD_MODELS)
def test_bad_models_are_one_line(bad: str, name: str, cli: Callable) -> None:
    options, said = BAD_MODELS[bad]
    refused(cli(name, "--prompt", PROMPT, *options), said)


@pytest.mark.parametrize("name", ["report", "bound", "audit"])
@pytest.mark.parametrize("part", ["blocks.0.mlp", "blocks.1.attn", "embed"])
def test_a_model_of_nans_is_one_line(part: str, name: str, cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bridge(18, "llama")
    module = model
    for step in part.split("."):
        module = module[int(step)] if step.isdigit() else getattr(module, step)
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))
    monkeypatch.setattr("oversquash_lens.models.loading.load_model", lambda *a, **o: model)
    refused(cli(name, "--prompt", PROMPT), "NaN")


def test_a_prompt_file_that_is_no_text(on_tiny: Callable, tmp_path: Path) -> None:
    file = tmp_path / "prompt.bin"
    file.write_bytes(b"w5 \xff\xfe w9")
    refused(on_tiny("bound", "--prompt-file", str(file)), "UTF-8")


def test_an_empty_prompt_file(on_tiny: Callable, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("")
    refused(on_tiny("bound", "--prompt-file", str(file)), "empty")


@pytest.mark.parametrize("locale", ["utf-8:strict", "utf-8:surrogateescape"])
def test_standard_input_that_is_no_text(locale: str) -> None:
    """UTF-8 is what a prompt is; --model leads nowhere, so that no model is loaded if this passes unseen."""
    env = os.environ | {"PYTHONIOENCODING": locale}
    done = command("bound", "--prompt", "-", "--model", "no/such.gguf", input=b"w5 \xff w9", env=env)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.decode().splitlines() if line.startswith("oversquash-lens"))
    assert "UTF-8" in line


def test_bad_input_in_a_process_of_its_own(tmp_path: Path) -> None:
    for arguments in (
        ["bound", "--variant", "x"],
        ["audit", "--out", "/no/such/folder/x"],
        ["report", "--probes", "x"],
    ):
        done = command(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, b"")
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(b"oversquash-lens")
    assert not list(tmp_path.iterdir())


def test_a_failing_disk_leaves_nothing(on_tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    refused(on_tiny("report", "--prompt", PROMPT), "No space left on device")
    refused(on_tiny("audit", "--prompt", PROMPT, "--out", "x.json"), "No space left on device")


def test_an_interrupt_is_said_and_leaves_nothing(on_tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("oversquash_lens.models.loading.load_model", interrupt)
    result = on_tiny("report", "--prompt", PROMPT)
    assert result.code == 130
    assert re.search(r"^oversquash-lens: interrupted", result.err, re.MULTILINE)
    assert not list(Path().iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs a shell with pipes")
def test_a_reader_that_leaves_is_no_error() -> None:
    """As in `oversquash-lens models | head -0`: quiet, exit code 0."""
    script = f"set -o pipefail; '{sys.executable}' -m oversquash_lens.cli models | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


@needs_bridge
def test_a_table_on_a_terminal_that_knows_ascii_only() -> None:
    """Greek letters and subscripts are replaced, not fatal."""
    code = (
        "import sys; sys.path.insert(0, 'tests'); from small_models import bridge\n"
        "import oversquash_lens.models.loading as m\n"
        "m.load_model = lambda *a, **o: bridge(1)\n"
        f"from oversquash_lens.cli import main; sys.exit(main(['audit', '--prompt', {PROMPT!r}, '--probes', '2']))"
    )
    env = os.environ | {"PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1"}
    done = command(code=code, cwd=Path(__file__).parent.parent, env=env)
    assert done.returncode == 0, done.stderr.decode()[-500:]
    assert b"mean_field" in done.stdout


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.txt", "w5 w9 w5 w30\n\nw7 w8 w9\n"),
        ("prompts.json", '["w5 w9 w5 w30", "w7 w8 w9"]'),
        ("named.json", '{"one": "w5 w9 w5 w30", "two": "w7 w8 w9"}'),
        ("ids.jsonl", "[5, 9, 5, 30]\n[7, 8, 9]\n"),
        ("rows.csv", "id,text\none,w5 w9 w5 w30\ntwo,w7 w8 w9\n"),
    ],
)
def test_many_prompts_make_pages_and_an_index(on_tiny: Callable, name: str, content: str) -> None:
    Path(name).write_text(content)
    result = on_tiny("report", "--prompts-file", name, "--out", "pages", "--probes", "2")
    assert result.code == 0
    assert result.out.strip() == str(Path("pages/index.html").absolute())
    pages = sorted(path.name for path in Path("pages").iterdir())
    assert len(pages) == 3
    index = Path("pages/index.html").read_text()
    assert all(f'href="{page}"' in index for page in pages if page != "index.html")


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        ("", (), "holds no prompt; expected at least one"),
        ("w5 w9", ("--prompt", "w5"), "got --prompts-file with one prompt or --json beside it"),
        ("w5 w9", ("--json",), "got --prompts-file with one prompt or --json beside it"),
        ("w5 w9", ("--out", "/proc/no"), "/proc/no"),
        ("w5 w9", ("--probes", "0"), "got --probes 0"),
    ],
)
def test_many_prompts_refused(
    on_tiny: Callable, content: str, arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(content)
    refused(on_tiny("report", "--prompts-file", str(file), *arguments), said)


def test_a_prompts_file_that_is_none(on_tiny: Callable, tmp_path: Path) -> None:
    refused(on_tiny("report", "--prompts-file", "nowhere.txt"), "nowhere.txt is not a file")
    bad = tmp_path / "bad.json"
    for content, said in (("{", "is no JSON"), ("[1]", "holds other things"), ("3", "holds a int")):
        bad.write_text(content)
        refused(on_tiny("report", "--prompts-file", str(bad)), said)


@pytest.mark.parametrize(("n", "probes"), [(2, 8), (2048, 8), (2049, 7), (4096, 4), (8192, 2), (100_000, 1)])
def test_a_report_s_truth_has_fewer_probes_on_a_long_prompt(monkeypatch, n, probes):
    from argparse import Namespace

    from oversquash_lens.capture import tokens
    from oversquash_lens.cli import many_prompts

    monkeypatch.setattr(tokens, "tokenize", lambda *args, **options: SimpleNamespace(ids=range(n)))
    assert many_prompts._usual_probes("model", "text", Namespace(chat=False, bos=None)) == probes


def test_version() -> None:
    from importlib.metadata import version

    done = command("--version")
    assert (done.returncode, done.stdout.decode()) == (0, f"oversquash-lens {version('oversquash-lens')}\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["models", "--json"], ["models"]])
def test_no_room_for_standard_output(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "oversquash_lens.cli", *arguments], stdout=full, stderr=subprocess.PIPE, timeout=120
        )
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("oversquash-lens: ")
    assert "No space left on device" in line


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("{python} -m oversquash_lens.cli bound --prompt - <&-", "it is closed"),
        ("mkdir gone && cd gone && rmdir ../gone && {python} -m oversquash_lens.cli report", "folder is gone"),
        (
            "mkdir gone && cd gone && rmdir ../gone && {python} -m oversquash_lens.cli sweep --prompts-file x",
            "folder is gone",
        ),
    ],
)
def test_a_shell_that_leaves_us_nothing(script: str, said: str, tmp_path: Path) -> None:
    """No standard input, or no working folder any more."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    shell = ["bash", "-c", script.format(python=f"'{sys.executable}'")]
    done = subprocess.run(shell, capture_output=True, timeout=120, cwd=tmp_path, env=env)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.decode().splitlines() if line.startswith("oversquash-lens")]
    assert said in line
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "measure"),
    [
        (["bound"], "bound"),
        (["audit"], "audit"),
        (["flow"], "measured_flow"),
        (["flow", "--probes", "4"], "measured_flow"),
        (["flow", "--estimate"], "flow"),
        (["report"], "report"),
        (["what-if", "--edit", "window:2", "--edit", "mask:1"], "what_if"),
        (["substitute"], "substitution"),
        (["swap", "--change", "w30=w7"], "forward"),
    ],
)
def test_a_plan_of_every_command_on_one_prompt(arguments: list[str], measure: str, on_tiny: Callable) -> None:
    found = on_tiny(*arguments, "--prompt", PROMPT, "--plan", "--json")
    assert found.code == 0, found.err
    told = json.loads(found.out)
    assert (told["kind"], told["n"], told["fits"]) == ("plan", 5, True)
    assert told["measure"] == measure
    assert not list(Path().iterdir())


# ---------------------------------------------------------------- what is measured by really replacing, and where


def test_flow_is_measured_and_of_the_likeliest_token(on_tiny: Callable, tiny: Any) -> None:
    found = on_tiny("flow", "--prompt", PROMPT, "--source", "w30", "--json")
    assert found.code == 0, found.err
    wanted = oversquash_lens.measured_flow(tiny, PROMPT, "w30", target="top").to_dict()
    assert json.loads(found.out) == json.loads(json.dumps(wanted))
    said = on_tiny("flow", "--prompt", PROMPT, "--target", "w7", "w8", "--top", "3")
    assert "logit of 'w7' less that of 'w8'" in said.out.splitlines()[0]
    assert len(re.findall("layer [0-9]+, head", said.out)) == 3
    estimate = on_tiny("flow", "--prompt", PROMPT, "--estimate")
    assert "an estimate (mean_field)" in estimate.out
    probed = on_tiny("flow", "--prompt", PROMPT, "--probes", "2", "--json")
    assert json.loads(probed.out)["probes"] == 2


def test_substitute_is_substitution(on_tiny: Callable, tiny: Any, tmp_path: Path) -> None:
    kept = str(tmp_path / "kept.parquet")
    arguments = ("substitute", "--prompt", PROMPT, "--positions", "w9", "1:3", "--draws", "4", "--keep", kept)
    found = on_tiny(*arguments, "--target", "w7", "--json")
    assert found.code == 0, found.err
    wanted = oversquash_lens.substitution(tiny, PROMPT, ["w9", "1:3"], 4, target="w7").to_dict()
    assert json.loads(found.out) == json.loads(json.dumps(wanted))
    assert Path(kept).exists()
    table = on_tiny("substitute", "--prompt", PROMPT, "--draws", "2", "--top", "2")
    assert "… and 3 more" in table.out
    assert "uniform over the vocabulary" in table.out


def test_swap_says_what_carries_it(on_tiny: Callable, tiny: Any) -> None:
    found = on_tiny("swap", "--prompt", PROMPT, "--change", "w30=w7", "--json")
    assert found.code == 0, found.err
    wanted = oversquash_lens.swap(tiny, PROMPT, {"w30": "w7"}).to_dict()
    assert json.loads(found.out) == json.loads(json.dumps(wanted))
    other = on_tiny("swap", "--prompt", PROMPT, "--with-prompt", "w5 w9 w5 w7", "--json")
    assert json.loads(other.out)["effect"] == wanted["effect"]
    said = on_tiny("swap", "--prompt", PROMPT, "--change", "w30=w7")
    for words in ("likeliest before", "residuals that carry it", "heads that carry it", "of the whole"):
        assert words in said.out


def test_the_measured_flow_is_drawn(on_tiny: Callable, tmp_path: Path) -> None:
    found = on_tiny("flow", "--prompt", PROMPT, "--figures", str(tmp_path / "drawn"))
    assert found.code == 0, found.err
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
        f"measured_flow.{x}" for x in ("pdf", "svg", "png")
    }
