"""A replay buffer in files: JSON and raw rows, never pickle.

    FOLDER/manifest.json            what there is: fields, counters, segments with their checksums
    FOLDER/manifest.previous.json   the generation before
    FOLDER/segment-ID.bin           rows; written once, never changed

A save writes one segment with the rows that are new since the last save (with all rows, if there is none),
then a manifest under another name, and renames it: whoever is killed on the way leaves the generation before.
A segment that neither manifest names is deleted. When the segments hold more than twice the rows that are
still stored, the next save starts anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from brc_fast import _core
from brc_fast.disk import LONGEST, REGULAR, opened, read_json, require, sync
from brc_fast.errors import InputError

from .fields import Schema

FORMATS = (1, 2)  # 2: with priorities
MANIFEST, PREVIOUS = "manifest.json", "manifest.previous.json"
MOST_SEGMENTS = 64
MOST_STREAMS = 2**16  # of a buffer whose number is not known before its manifest is read
SEGMENT = re.compile(r"segment-[0-9a-f]{32}\.bin")
OWN = re.compile(rf"(manifest(\.previous)?\.json|{SEGMENT.pattern})(\.partial)?")
Manifest = dict[str, Any]


def save(
    store: _core.ReplayStore,
    schema: Schema,
    folder: Path,
    saved: str | None,
    previous: str | os.PathLike[str] | None,
) -> str:
    """Write a generation and return its manifest; `saved` is that of the one that the store goes on from."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = sorted(folder.iterdir())
    foreign = [entry.name for entry in entries if not OWN.fullmatch(entry.name)]
    if foreign:
        raise ValueError(f"{folder} must hold replay files only, found {foreign[0]}; name another folder")
    for entry in entries:
        require(entry, REGULAR, remedy="name another folder")
    most = _longest(len(schema.task_ids))
    with _alone(folder):
        made: list[Path] = []  # files that no manifest names yet
        try:
            base = _base(folder, saved, previous, made, most)
            identity = uuid.uuid4().hex
            segment = folder / f"segment-{identity}.bin"
            made.append(segment)
            snapshot = _write_segment(store, segment, _start(base, len(schema.task_ids)))
            content = snapshot["content"]
            table = {"file": segment.name, **snapshot["table"]}
            segments = [old for old in (base["segments"] if base else []) if _useful(old, content)]
            manifest = {
                "format": 2 if "priorities" in table else 1,
                "id": identity,
                "byte_order": sys.byteorder,
                "fields": schema.describe(),
                "seed": store.seed,
                "content": content,
                "segments": [*segments, table],
            }
            _commit(folder, manifest, made, most)
        except OSError as error:
            for path in made:
                path.unlink(missing_ok=True)
            kept = (
                "the save before it is intact" if (folder / MANIFEST).exists() else "there is no earlier save"
            )
            raise OSError(
                error.errno, f"the replay could not be saved: {error.strerror or error}; {kept}", str(folder)
            ) from error
        _sweep(folder, most)
        return json.dumps(manifest)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one save at a time write to a folder, of whatever buffer and process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):  # a child forked meanwhile would keep it locked
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def load(
    store: _core.ReplayStore, schema: Schema, folder: Path, previous: bool, same_capacity: bool = False
) -> str:
    """Read a generation into the store and return its manifest."""
    with _found(folder, previous) as file:
        manifest = _read(file, _longest(len(schema.task_ids)))
        if not isinstance(manifest["id"], str):
            raise TypeError(f"id must be a text, got {manifest['id']!r:.60}")
        _require_numbers(manifest)
        _require_schema(manifest["fields"], schema, folder)
        if same_capacity:
            _require_capacity(manifest, store, schema, folder)
        with ExitStack() as stack:
            segments = []
            for segment in manifest["segments"]:
                path = folder / segment["file"]
                try:
                    handle = stack.enter_context(opened(path)).fileno()
                except FileNotFoundError:
                    raise ValueError(f"{path} is missing") from None
                segments.append((handle, str(path), segment))
            store.load(manifest["content"], segments, manifest["seed"])
    return json.dumps(manifest)


def saved_schema(schema: Schema, folder: Path, previous: bool) -> Schema:
    """`schema` with the tasks and streams that were saved in a folder, and room for what they hold."""
    with _found(folder, previous) as file:
        manifest = _read(file, _longest(MOST_STREAMS))
        _require_numbers(manifest)
        saved, sizes = manifest["fields"], manifest["content"]["size"]
        _require_schema({**saved, "task_ids": schema.task_ids.tolist()}, schema, folder)
        ids = saved["task_ids"]
        if not isinstance(ids, list) or len(ids) != len(sizes) or not all(type(task) is int for task in ids):
            raise TypeError(f"task_ids must be one of every stream, got {ids!r:.60}")
        if set(ids) != set(range(len(set(ids)))):
            raise TypeError(f"task_ids must name every task from 0 on, got {ids!r:.60}")
        largest: dict[int, int] = {}
        for task, size in zip(ids, sizes, strict=True):
            largest[task] = max(1, size, largest.get(task, 1))
        capacities = [largest[task] * count for task, count in sorted(Counter(ids).items())]
        return Schema.of(capacities, schema.observation, schema.action, schema.extras, ids)


@contextmanager
def _found(folder: Path, previous: bool) -> Iterator[Path]:
    """The manifest of a generation, for a block that reads it; ValueError for what is wrong with it."""
    file = folder / (PREVIOUS if previous else MANIFEST)
    if not file.exists():
        raise ValueError(f"{folder} holds no saved replay: {file.name} is missing")
    try:
        yield file
    except ValueError as error:
        if not previous and (folder / PREVIOUS).exists():
            remedy = "the generation before is there: load it with previous=True"
            raise ValueError(f"{error}; {remedy}") from error
        raise
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{file} does not hold what it must: {error}") from error


def _base(
    folder: Path, saved: str | None, previous: str | os.PathLike[str] | None, made: list[Path], most: int
) -> Manifest | None:
    """The generation that the store goes on from, its segments in `folder`; None if it is not to be had."""
    for source in (folder,) if previous is None else (folder, Path(previous)):
        manifest = _intact(source / MANIFEST, most)
        if manifest is None or json.dumps(manifest) != saved:  # equal: its content has been checked
            continue
        stored, kept = (sum(map(sum, rows)) for rows in _rows(manifest))
        files = [source / segment["file"] for segment in manifest["segments"]]
        there = all(file.is_file() and not file.is_symlink() for file in files)
        if not there or stored > 2 * kept or len(files) >= MOST_SEGMENTS:
            continue
        for file in files if source != folder else []:
            target, partial = folder / file.name, folder / f"{file.name}.partial"
            partial.unlink(missing_ok=True)
            made += [partial] if target.exists() else [partial, target]
            try:
                os.link(file, partial)
            except OSError:  # another file system, or one without links
                _copy(file, partial)
            os.replace(partial, target)
        return manifest
    return None


def _rows(manifest: Manifest) -> tuple[list[list[int]], list[list[int]]]:
    """Rows in the segments, and rows that are kept."""
    return [segment["rows"] for segment in manifest["segments"]], [manifest["content"]["kept"]]


def _start(base: Manifest | None, streams: int) -> list[int]:
    """Sequence number of the first row to write of each stream.

    The newest row of the base is written again: where its successor lies was not settled then.
    """
    return [0] * streams if base is None else [max(0, count - 1) for count in base["content"]["count"]]


def _write_segment(store: _core.ReplayStore, path: Path, start: list[int]) -> dict[str, Any]:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        snapshot = store.write_segment(handle, start)
        os.fsync(handle)
    finally:
        os.close(handle)
    return snapshot


def _useful(segment: dict[str, Any], content: dict[str, Any]) -> bool:
    """Whether any of its rows is still kept."""
    each = zip(segment["first"], segment["rows"], content["count"], content["kept"], strict=True)
    return any(rows > 0 and first + rows > count - kept for first, rows, count, kept in each)


def _commit(folder: Path, manifest: Manifest, made: list[Path], most: int) -> None:
    """Make it the folder's generation in one step, and the one before the previous; then clear `made`."""
    text = json.dumps(manifest)
    partial = folder / (MANIFEST + ".partial")
    partial.unlink(missing_ok=True)
    with partial.open("x") as file:
        json.dump({"checksum": zlib.crc32(text.encode()), "manifest": manifest}, file)
        file.flush()
        os.fsync(file.fileno())
    if _intact(folder / MANIFEST, most):
        older = folder / (PREVIOUS + ".partial")
        older.unlink(missing_ok=True)
        _copy(folder / MANIFEST, older)
        os.replace(older, folder / PREVIOUS)
    os.replace(partial, folder / MANIFEST)
    made.clear()
    sync(folder)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    sync(target)


def _sweep(folder: Path, most: int) -> None:
    """Delete what no generation names."""
    named = {MANIFEST, PREVIOUS}
    for name in (MANIFEST, PREVIOUS):
        if manifest := _intact(folder / name, most):
            named |= {segment["file"] for segment in manifest["segments"]}
    for entry in folder.iterdir():
        if entry.name not in named and OWN.fullmatch(entry.name):
            entry.unlink(missing_ok=True)


def _longest(streams: int) -> int:
    """Bytes of a manifest at most: five numbers of every stream in every segment, and checksums."""
    return LONGEST + 2**13 * streams


def _intact(file: Path, most: int) -> Manifest | None:
    """A manifest, or None where it is missing or damaged."""
    try:
        return _read(file, most)
    except (FileNotFoundError, ValueError):
        return None


def _read(file: Path, most: int) -> Manifest:
    """A manifest, checked; ValueError names the file and what is wrong, FileNotFoundError nothing."""
    try:
        outer = read_json(file, most)
        manifest: Manifest = outer["manifest"]
        whole = zlib.crc32(json.dumps(manifest).encode()) == outer["checksum"]
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not whole:
        raise ValueError(f"{file} is damaged: its checksum differs")
    try:
        version, order = manifest["format"], manifest["byte_order"]
        newer = version > max(FORMATS)
        names = [segment["file"] for segment in manifest["segments"]] if version in FORMATS else []
        foreign = [index for index, name in enumerate(names) if not SEGMENT.fullmatch(name)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} does not hold what it must: {error}") from error
    if version not in FORMATS:
        remedy = "upgrade brc-fast" if newer else "use the version that wrote it"
        raise ValueError(
            f"{file} has replay format {version!r:.20}, this version of brc-fast reads formats "
            f"{' and '.join(map(str, FORMATS))}: {remedy}"
        )
    if order != sys.byteorder:
        raise ValueError(
            f"{file} was written in {order!s:.20}-endian order, this machine is {sys.byteorder}-endian"
        )
    if len(names) > MOST_SEGMENTS:
        raise ValueError(f"{file} names {len(names)} segments, and a save has at most {MOST_SEGMENTS}")
    if foreign:
        raise ValueError(
            f"{file} gives segment {foreign[0] + 1} of {len(names)} a name that no save gives: it must be "
            "segment-ID.bin, with 32 hexadecimal digits as ID"
        )
    return manifest


def _require_numbers(manifest: Manifest) -> None:
    """TypeError or KeyError unless every number that the store takes is one, in the range of its kind."""
    content = manifest["content"]
    single, lists = [(manifest, "seed", 64), (content, "draws", 64)], []
    lists += [(content, name, 64 if name == "count" else 32) for name in ("count", "size", "kept", "phase")]
    lists.append((content, "capacity", 63))
    for segment in manifest["segments"]:
        single += [(segment, name, 64) for name in ("bytes", *({"priorities"} & segment.keys()))]
        lists += [(segment, name, 32) for name in ("rows", "side", "checksums")]
        lists += [(segment, "first", 64), (segment, "head", 1)]
    found = [(name, [holder[name]], bits) for holder, name, bits in single]
    found += [(name, holder[name], bits) for holder, name, bits in lists]
    for name, values, bits in found:
        if not isinstance(values, list) or not all(type(x) is int and 0 <= x < 2**bits for x in values):
            raise TypeError(f"{name} must be of integers in [0, 2**{bits}), got {values!r:.60}")


def _require_capacity(manifest: Manifest, store: _core.ReplayStore, schema: Schema, folder: Path) -> None:
    """ValueError for another capacity, or for more rows than saves of this one leave in their segments."""
    own, saved = store.capacities().tolist(), manifest["content"]["capacity"]
    if saved != own:
        raise ValueError(f"capacities of the replay in {folder} must be {own!s:.80}, got {saved!s:.80}")
    frames = max(part.stack for part in schema.parts.values())
    rows, most = sum(map(sum, _rows(manifest)[0])), 3 * (sum(own) + frames * len(own))
    if rows > most:
        raise ValueError(f"the replay in {folder} must have at most {most} rows in its files, got {rows}")


def _require_schema(saved: dict[str, Any], schema: Schema, folder: Path) -> None:
    """ValueError with both values where a field or the streams differ."""
    for name, own in schema.describe().items():
        if json.dumps(saved[name]) != json.dumps(own):  # the order of extras is that of a row
            told = f"{name} of the replay in {folder} must be {own}, got {saved[name]!s:.200}"
            remedy = "load(folder, tasks={saved task: own task}) deals out its streams over those of a task"
            raise ValueError(f"{told}; {remedy}" if name == "task_ids" else told)
