"""Files in folders of other people: no link is followed, no pipe opened, no device replaced."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from .errors import InputError

REGULAR, FOLDER = "regular file", "folder"
_KINDS = {stat.S_IFREG: REGULAR, stat.S_IFDIR: FOLDER, stat.S_IFLNK: "link", stat.S_IFIFO: "FIFO"}
_KINDS |= {stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
COPY = "replace it by a copy or delete it"
DEEPEST = 100  # folders in a folder; Python deletes some 900 at once
LONGEST = 2**20  # bytes of a JSON file, and of a line of one that has lines


def require(path: Path, *kinds: str, remedy: str = COPY) -> None:
    """InputError where there is something of none of the `kinds` at `path`; links are not followed."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except ValueError as error:
        raise InputError(f"{str(path)!a} cannot be the name of a file: {error}") from error
    found = _KINDS.get(stat.S_IFMT(status.st_mode), "special file")
    if found not in kinds:
        raise InputError(f"{path} must be a {' or a '.join(kinds)}, got a {found}; {remedy}")


def require_shallow(folder: Path) -> None:
    """InputError unless `folder` holds regular files and folders only, and is at most 100 folders deep."""
    waiting = [(folder, 0)]
    while waiting:
        inner, depth = waiting.pop()
        require(inner, FOLDER)
        if depth > DEEPEST:
            raise InputError(f"{folder} must be at most {DEEPEST} folders deep; delete what is deeper")
        with os.scandir(inner) as entries:
            for entry in entries:
                require(Path(entry), REGULAR, FOLDER)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((Path(entry), depth + 1))


def require_replaceable(path: Path, *kinds: str, remedy: str = COPY) -> None:
    """InputError where `replace_file(path)` would put a file in the place of something else.

    kinds: that pass besides regular files.
    """
    for each in (path, _partial(path)):
        require(each, REGULAR, *kinds, remedy=remedy)


def replace_file(path: Path, data: bytes) -> None:
    """Make a file, or replace it in one step, and wait until it is on the disk. A link in the way is replaced
    itself, not what it names."""
    partial = _partial(path)
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        with suppress(OSError):  # a folder that may be written and not read
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    long = len(os.fsencode(path.name)) > 240  # of 255 bytes, the most that file systems take
    return path.with_name(f"{path.name[:50] if long else path.name}.partial")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, to be read; InputError for anything else, FileNotFoundError for nothing."""
    require(path, REGULAR)
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO would wait for its writer
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise InputError(f"{path} has become something else than a {REGULAR}; {COPY}")
        yield file


def read_json(path: Path, most: int = LONGEST) -> Any:
    """What a JSON file of at most `most` bytes holds.

    ValueError for what is none, see `parse_json`; InputError, OSError: see `opened`.
    """
    with opened(path) as file:
        return parse_json(file.read(most + 1), most)


def parse_json(data: bytes, most: int = LONGEST) -> Any:
    """What JSON in UTF-8 says; ValueError for more than `most` bytes, a name that an object has twice, a
    number that no float holds, text that UTF-8 does not hold, and anything else that is not JSON."""
    if len(data) > most:
        raise ValueError(f"it has more than {most} bytes")
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_once,
            parse_float=_finite,
            parse_constant=_not_a_number,
        )
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds half a character: {error.reason}") from error
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!a:.60} twice")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text:.60}, which is too large")
    return value


def _not_a_number(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def lines_of(path: Path) -> list[bytes]:
    """Lines of a file, with their ends; InputError for one of more than a megabyte, before it is read."""
    lines: list[bytes] = []
    with opened(path) as file:
        while line := file.readline(LONGEST + 1):
            if len(line) > LONGEST:
                raise InputError(f"{path} line {len(lines) + 1} has more than {LONGEST} bytes: delete it")
            lines.append(line)
    return lines


def sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
