"""Arrays in files: what is written is safetensors, and what is read is what the file says or refused."""

from __future__ import annotations

import json
import os
import stat
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import says
from safetensors.numpy import load_file, save_file

from brc_fast.disk import opened
from brc_fast.runs.arrays import NAMES, ArrayFile, Kind, require_kinds, write_arrays


def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found = {name: (rng.random((3, 5)) * 100).astype(name) for name in NAMES.values()}
    return {**found, "scalar": np.array(7), "empty": np.zeros((0, 4), np.float32), "é": np.ones(3, bool)}


def read(path: Path) -> dict[str, Any]:
    with opened(path) as file:
        return ArrayFile(file).read()[0]


def assert_equal(mine: dict[str, Any], others: dict[str, Any]) -> None:
    assert mine.keys() == others.keys()
    for name, values in mine.items():
        assert Kind.of(values) == Kind.of(others[name])
        np.testing.assert_array_equal(values, others[name])


def test_what_is_written_is_read_here_and_by_the_library(tmp_path: Path) -> None:
    size, checksum = write_arrays(tmp_path / "a", arrays())
    data = (tmp_path / "a").read_bytes()
    assert (size, checksum) == (len(data), zlib.crc32(data))
    assert_equal(arrays(), load_file(tmp_path / "a"))
    assert_equal(arrays(), read(tmp_path / "a"))


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(arrays(), tmp_path / "a", metadata={"by": "another"})
    assert_equal(arrays(), read(tmp_path / "a"))


def test_views_are_written_as_they_are_seen(tmp_path: Path) -> None:
    seen = {"turned": np.arange(6.0).reshape(2, 3).T, "reversed": np.arange(5)[::-1]}
    write_arrays(tmp_path / "a", seen)
    assert_equal(seen, load_file(tmp_path / "a"))


def test_a_file_follows_the_umask_and_replaces_nothing(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_arrays(tmp_path / "a", arrays())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        write_arrays(tmp_path / "link", arrays())
    assert not (tmp_path / "elsewhere").exists()


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ([], "its header is no JSON object"),
        ({"a": {**ENTRY, "dtype": "F8_E4M3"}}, "a must have one of the dtypes F64, "),
        ({"a": {**ENTRY, "dtype": ["F32"]}}, "a must have one of the dtypes"),
        ({"a": {**ENTRY, "shape": [True, 2]}}, "a must have a shape that an array can have, got [True, 2]"),
        ({"a": {**ENTRY, "shape": [-2]}}, "a must have a shape"),
        ({"a": {**ENTRY, "shape": [0, 2**60]}}, "a must have a shape"),
        ({"a": {**ENTRY, "shape": [1] * 33}}, "a must have a shape"),
        ({"a": {**ENTRY, "shape": [3]}}, "a must lie at [0, 12], got [0, 8]"),
        ({"a": {**ENTRY, "data_offsets": [0]}}, "a must have two offsets, got [0]"),
        ({"a": {**ENTRY, "data_offsets": [0, 8.0]}}, "a must have two offsets"),
        ({"a": ENTRY, "b": ENTRY}, "b must lie at [8, 16], got [0, 8]"),
        ({"a": {**ENTRY, "more": 1}}, "a must have dtype, shape and data_offsets"),
        ({"\x1b[2J": 5}, "\\x1b[2J must have dtype"),
        ({}, "it has 8 bytes of arrays, and its header says 0"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, told: str) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=says(told)):
        read(tmp_path / "a")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "its header is longer than the file"),
        (bytes(7), "its header is longer"),
        (b"\xff" * 8, "its header is longer"),
        (
            (2**24 + 1).to_bytes(8, "little") + bytes(2**24 + 1),
            "16777217 bytes, and at most 16777216 are read",
        ),
    ],
)
def test_a_header_of_another_length_is_refused(tmp_path: Path, data: bytes, told: str) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match=says(told)):
        read(tmp_path / "a")


def test_kinds_must_agree() -> None:
    mine = {"a/b": Kind("float32", (2,)), "c": Kind("int64", ())}
    require_kinds("it", mine, dict(mine))
    with pytest.raises(ValueError, match="it lacks c"):
        require_kinds("it", mine, {"a/b": mine["a/b"]})
    with pytest.raises(ValueError, match="it has an unknown entry d"):
        require_kinds("it", mine, {**mine, "d": mine["c"]})
    with pytest.raises(ValueError, match=says("a b must be float32 and must have shape [2], got int32[2]")):
        require_kinds("it", mine, {**mine, "a/b": Kind("int32", (2,))})
