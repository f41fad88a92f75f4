"""Files that are whole or absent: a temporary name in the same folder, then renamed; and parquet files with a seal."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from oversquash_lens.errors import InputError, one_line

_DRAFT = ".oversquash-lens-"  # what the name of a file begins with while it is written
_DAY = 86_400.0  # seconds
MAGIC = b"PAR1"
SEAL = hashlib.sha256().digest_size


def check_working_folder() -> None:
    """Asked before anything of transformers: without a working folder its import ends in an error of its own."""
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(
            f"the working folder is gone ({error.strerror}); expected one that exists: change to another folder"
        ) from error


def check_writable(path: Any) -> Path:
    """The absolute path, if a file can be put there; asked before long work whose result goes there."""
    target = _absolute(path)
    folder = target.parent
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except NotADirectoryError:
        raise InputError(f"the folder {folder} does not exist; expected one that does: give another path") from None
    except (OSError, ValueError) as error:  # a name too long, a NUL byte, a loop of links
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"{one_line(repr(str(path)), 80)} cannot be a file here ({why}); expected a path that this system can "
            "write: give another one"
        ) from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{target} is a folder; expected a file name: give {target / 'NAME'}")
    if not folder.is_dir():
        raise InputError(
            f"the folder {folder} does not exist; expected one that does: make it first, or give another path"
        )
    if not os.access(folder if stat.S_ISREG(mode) else target, os.W_OK):
        raise InputError(
            f"the folder {folder} cannot be written to; expected one that can: give another path, or mend its rights"
        )
    return target


def check_place(folder: Any, file: str) -> Path:
    """Where the file will lie, if it can be put there; makes the folder. Asked before long work."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,199}", file):
        raise InputError(
            "expected letters, digits, '.', '-' and '_' only, at most 200 of them, got the file name "
            f"{one_line(repr(file), 80)}: give another name"
        )
    place = _absolute(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"the folder {one_line(place, 120)} cannot be made ({why}); expected one that can be written to: give "
            "another one"
        ) from error
    return check_writable(place / file)


@contextmanager
def folder_for(folder: Any, file: str) -> Iterator[Path]:
    """The folder that `file` will lie in, for work whose results go there; if it leaves nothing, nothing stays."""
    known = _absolute(folder).exists()
    place = check_place(folder, file).parent
    try:
        yield place
    finally:
        if not known:
            with suppress(OSError):  # it is not empty: that is as it should be
                place.rmdir()


def write_atomically(path: Any, payload: bytes) -> Path:
    """Put `payload` at `path`, whole or not at all; returns the absolute path.

    A link is followed. What is no file (a device, a pipe) is written to, never replaced.
    """
    target = check_writable(path)
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(payload)
        else:
            replace_file(Path(os.path.realpath(target)), payload)
    except OSError as error:
        raise InputError(
            f"{target} could not be written ({error.strerror or error}); expected room and rights for it there: make "
            "room or mend the rights, or give another path"
        ) from error
    return target


def replace_file(target: Path, payload: bytes) -> None:
    """While it is written nobody else may read it; then it has the rights of what it replaces, or the usual ones."""
    remove_drafts(target.parent, older_than=_DAY)
    draft = target.with_name(f"{_DRAFT}{uuid4().hex}.tmp")
    try:
        with draft.open("xb") as file:
            mode = stat.S_IMODE((os.stat(target) if target.exists() else os.fstat(file.fileno())).st_mode)
            os.chmod(draft, stat.S_IRUSR | stat.S_IWUSR)
            file.write(payload)
            file.flush()
            os.chmod(draft, mode)
            os.fsync(file.fileno())  # or a crash of the machine could leave the name without the content
        os.replace(draft, target)
        _sync_folder(target.parent)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def sealed(payload: bytes) -> bytes:
    """A parquet file with a seal: the SHA-256 of its content lies between pages and footer, where no reader looks."""
    body = _footer_at(payload)
    return payload[:body] + hashlib.sha256(payload).digest() + payload[body:]


def opened(path: Path) -> Any:
    """A sealed file as a `pyarrow.parquet.ParquetFile`; ValueError or OSError for what was not written here."""
    from pyarrow import parquet

    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is no file")
    try:
        payload = path.read_bytes()
    except MemoryError as error:
        raise ValueError("it is larger than the memory") from error
    body, view = _footer_at(payload), memoryview(payload)
    seal = hashlib.sha256(view[: body - SEAL])
    seal.update(view[body:])
    if payload[body - SEAL : body] != seal.digest():
        raise ValueError("its checksum is not that of its content")
    return parquet.ParquetFile(io.BytesIO(payload))


def _footer_at(payload: bytes) -> int:
    """Where the footer begins; ValueError where there is none."""
    if len(payload) < 12 or payload[:4] != MAGIC or payload[-4:] != MAGIC:
        raise ValueError("it is no whole parquet file")
    at = len(payload) - 8 - struct.unpack("<I", payload[-8:-4])[0]
    if at < len(MAGIC):
        raise ValueError("its footer is longer than the file")
    return at


def _sync_folder(folder: Path) -> None:
    """The name, too, is on the disk then; some drives cannot be asked for that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_drafts(folder: Path, older_than: float = -math.inf) -> None:
    """Remove what killed processes left behind more than so many seconds ago; at once where nobody writes any more."""
    for left in folder.glob(f"{_DRAFT}*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > older_than:
                left.unlink()


def _absolute(path: Any) -> Path:
    try:
        return Path(path).expanduser().absolute()
    except FileNotFoundError as error:
        raise InputError(
            f"{one_line(path, 120)} lies in the working folder, and that is gone; expected one that exists: change to "
            "another folder, or give an absolute path"
        ) from error
    except (TypeError, RuntimeError) as error:  # no path at all, or ~nobody
        raise InputError(
            f"expected a text or a pathlib.Path, got {one_line(repr(path), 60)} of type {type(path).__name__} as a "
            "path: give the name of a file or folder"
        ) from error
