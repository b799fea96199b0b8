"""Files in folders of other people: no link is followed, no pipe opened, no device replaced."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import InputError

REGULAR, FOLDER = "regular file", "folder"
_KINDS = {stat.S_IFREG: REGULAR, stat.S_IFDIR: FOLDER, stat.S_IFLNK: "link", stat.S_IFIFO: "FIFO"}
_KINDS |= {stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
COPY = "replace it by a copy or delete it"


def require(path: Path, *kinds: str, remedy: str = COPY, single: bool = False) -> None:
    """InputError where there is something at `path` that is of none of the `kinds`; links are not followed.

    single: a regular file must have no other name (hard link), which might lie anywhere.
    """
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in the name
        return
    found = _KINDS.get(stat.S_IFMT(status.st_mode), "special file")
    if found not in kinds:
        raise InputError(f"{path} must be a {' or a '.join(kinds)}, got a {found}; {remedy}")
    if single and found == REGULAR and status.st_nlink > 1:
        raise InputError(f"{path} must have one name, got a file with {status.st_nlink} hard links; {remedy}")


def require_replaceable(path: Path, *kinds: str, remedy: str = COPY, single: bool = False) -> None:
    """InputError where `replace_file(path)` would put a file in the place of something else.

    kinds: that pass besides regular files.
    """
    for each in (path, _partial(path)):
        require(each, REGULAR, *kinds, remedy=remedy, single=single)


def replace_file(path: Path, data: bytes) -> None:
    """Make a file, or replace it in one step. A link in the way is replaced itself, not what it names."""
    partial = _partial(path)
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, to be read; InputError for anything else, FileNotFoundError for nothing."""
    require(path, REGULAR)
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO would wait for its writer
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise InputError(f"{path} has become something else than a {REGULAR}; {COPY}")
        yield file


def sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
