"""Files that are whole or absent: a temporary name in the same folder, then renamed."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from oversquash_lens.errors import InputError


def check_writable(path: str | os.PathLike) -> Path:
    """The absolute path, if a file can be put there; asked before long work whose result goes there."""
    target = Path(path).expanduser().absolute()
    folder = target.parent
    if target.is_dir():
        raise InputError(f"{target} is a folder; expected a file name: give {target / 'NAME'}")
    if not folder.is_dir():
        raise InputError(f"the folder {folder} does not exist; make it first, or give another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"the folder {folder} cannot be written to; give a path in one that can")
    return target


def check_place(folder: str | os.PathLike, file: str) -> Path:
    """Where the file will lie, if it can be put there; makes the folder. Asked before long work."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", file):
        raise InputError(f"the file name {file!r} came; expected letters, digits, '.', '-' and '_' only")
    place = Path(folder).expanduser().absolute()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {place} cannot be made ({error.strerror}); give another one") from error
    return check_writable(place / file)


def write_atomically(path: str | os.PathLike, payload: bytes) -> Path:
    """Put `payload` at `path`, whole or not at all; returns the absolute path."""
    target = check_writable(path)
    draft = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
    try:
        with draft.open("xb") as file:
            file.write(payload)
        os.replace(draft, target)
    except OSError as error:
        raise InputError(
            f"{target} could not be written ({error.strerror or error}); make room or mend the rights there, or "
            "give another path"
        ) from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    return target
