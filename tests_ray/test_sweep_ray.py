"""A sweep on a real Ray cluster on this machine: the same rows as alone, also when workers are lost on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_models import N_CTX
from small_sweeps import MEASURES, exactly_once, model_folder, same_rows, texts

import oversquash_lens as osl
from oversquash_lens.errors import InputError
from oversquash_lens.sweeps import on_ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Any]:
    """Two workers on this machine for all tests here."""
    ray = on_ray._ray()
    ray.init(num_cpus=2, object_store_memory=1 << 27, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "CHUNK", 4)


def worker_pids() -> list[int]:
    """Processes below this one that are at work on a chunk (Ray's own agents have names of this kind too)."""
    children = psutil.Process().children(recursive=True)
    named = [(child.pid, " ".join(child.cmdline())) for child in children if child.is_running()]
    return [pid for pid, name in named if name.startswith("ray::_measure")]


@pytest.mark.usefixtures("small_chunks")
def test_rows_on_ray_are_the_rows_of_one_process(folder: Path, tmp_path: Path) -> None:
    prompts = [*texts(30), "w5 " * (N_CTX + 4), "", [3, 4, 5]]
    alone = osl.sweep(osl.load_model(folder), prompts, MEASURES, tmp_path / "alone.parquet")
    on_ray = osl.sweep(str(folder), prompts, MEASURES, tmp_path / "ray.parquet", ray="auto")
    assert (on_ray.done, on_ray.refused) == (alone.done, alone.refused) == (31, 2)
    exactly_once(on_ray, prompts)
    same_rows(on_ray.table(), alone.table())
    assert on_ray.identity == alone.identity


def kill_one(after: Callable[[], bool], killed: list[int]) -> None:
    """Kill the first worker that is found once `after` says so."""
    while not after():
        time.sleep(0.01)
    while not killed:
        for pid in worker_pids():
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            break
        time.sleep(0.01)


@pytest.mark.usefixtures("small_chunks")
def test_a_killed_worker_loses_no_row_and_doubles_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    prompts, out = texts(80), tmp_path / "rows.parquet"
    parts = tmp_path / "rows.parquet.parts"
    killed: list[int] = []
    later: list[int] = []
    killers = [
        threading.Thread(target=kill_one, args=(lambda n=n: len(list(parts.glob("*.parquet"))) >= n, mine), daemon=True)
        for n, mine in ((2, killed), (12, later))
    ]
    for each in killers:
        each.start()
    result = osl.sweep(str(folder), prompts, MEASURES, out, ray="auto")
    assert killed
    assert later, "both workers were to be killed while the sweep ran"
    assert (result.done, result.refused) == (80, 0)
    assert capsys.readouterr().out == ""
    exactly_once(result, prompts)


@pytest.mark.usefixtures("small_chunks")
def test_a_sweep_that_was_begun_alone_goes_on_on_ray(folder: Path, tmp_path: Path) -> None:
    prompts, out = texts(40), tmp_path / "rows.parquet"

    class StoppedError(Exception):
        pass

    def stop(parts: Any, keys: Any) -> None:
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oversquash_lens.parts.Parts.finish", stop)
        with pytest.raises(StoppedError):
            osl.sweep(osl.load_model(folder), prompts[:40], MEASURES, out)
    for part in sorted((tmp_path / "rows.parquet.parts").glob("*.parquet"))[1:]:
        part.unlink()
    result = osl.sweep(str(folder), prompts, MEASURES, out, ray="auto")
    assert 0 < result.reused < 40
    exactly_once(result, prompts)


@pytest.mark.usefixtures("small_chunks")
def test_a_prompt_that_kills_every_worker_is_refused_and_the_rest_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deadly(name: str, load: Any, memory: Any, effort: Any, chunk: Any) -> Any:
        """In a worker: what `_measure` does, but one prompt kills the process that touches it, every time."""
        if any(each.text == "w7 w7 w7" for each in chunk):
            os.kill(os.getpid(), signal.SIGKILL)
        return on_ray._measure(name, load, memory, effort, chunk)

    monkeypatch.setattr(on_ray, "_task", deadly)
    monkeypatch.setattr(on_ray, "RETRIES", 1)
    prompts = [*texts(9), "w7 w7 w7", *texts(6)]
    result = osl.sweep(str(folder), prompts, MEASURES, tmp_path / "rows.parquet", ray="auto")
    assert (result.done, result.refused) == (15, 1)
    (reason,) = result.reasons
    assert "worker" in reason
    assert result.table(["status"])["status"].to_pylist()[9] == "refused"


def test_an_error_of_ours_in_a_worker_is_that_error_here(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(osl.OversquashError, match="got kind 'hoked'"):
        osl.sweep(str(folder), texts(3), MEASURES, tmp_path / "x.parquet", ray="auto", load={"kind": "hoked"})
    assert list(tmp_path.iterdir()) == []


def test_no_cluster_answers(folder: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "init", unreachable)
    with pytest.raises(InputError, match=r"no Ray cluster answers at 192\.0\.2\.1:6379"):
        osl.sweep(str(folder), texts(3), MEASURES, tmp_path / "x.parquet", ray="192.0.2.1:6379")


def unreachable(**options: Any) -> None:
    raise ConnectionError("timed out")
