"""Arrays by name in safetensors files: what a file says it holds is looked at before any of it is read.

A file is 8 bytes with the length of a JSON header, the header, and the arrays one after the other. It is
opened once, read once, and nothing of it is used unless all of it is as the header says.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from brc_fast.disk import parse_json

Arrays = dict[str, NDArray[Any]]
LONGEST_HEADER = 2**24  # bytes; a network of 1000 blocks and its moments take 3 million
BLOCK = 2**22  # bytes read or written at once
NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
WRITTEN = {name: short for short, name in NAMES.items()}


class Kind(NamedTuple):
    """Of an array: numpy's name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: Any) -> Kind:
        """Of an array, or of a tensor."""
        return cls(str(array.dtype).removeprefix("torch."), tuple(array.shape))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


Kinds = dict[str, Kind]


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> tuple[int, int]:
    """A new file, on the disk when this returns: its bytes and their CRC-32."""
    order = sorted(
        arrays, key=lambda name: (-arrays[name].itemsize, name)
    )  # each lies at a multiple of its size
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        kind, begin = Kind.of(arrays[name]), end
        end += kind.nbytes
        header[name] = {
            "dtype": WRITTEN[kind.dtype],
            "shape": list(kind.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        value = _put(file, len(text).to_bytes(8, "little") + text, 0)
        for name in order:
            value = _put(file, _bytes(np.ascontiguousarray(arrays[name])), value)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), value


def _bytes(array: NDArray[Any]) -> memoryview:
    """The memory of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def _put(file: BinaryIO, data: bytes | memoryview, value: int) -> int:
    for begin in range(0, len(data), BLOCK):
        file.write(data[begin : begin + BLOCK])
        value = zlib.crc32(data[begin : begin + BLOCK], value)
    return value


class ArrayFile:
    """An open file: `kinds` by name, and what `read` gives. ValueError for one that contradicts itself."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size = file, os.fstat(file.fileno()).st_size
        begin = file.read(8)
        length = int.from_bytes(begin, "little")
        if len(begin) < 8 or length > self.size - 8:
            raise ValueError("its header is longer than the file")
        if length > LONGEST_HEADER:
            raise ValueError(f"its header has {length} bytes, and at most {LONGEST_HEADER} are read")
        self._begin = begin + file.read(length)
        header = parse_json(self._begin[8:], LONGEST_HEADER)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        entries = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda each: each[1:])
        self.kinds: Kinds = {}
        end = 0
        for name, first, last, kind in entries:
            if (first, last) != (end, end + kind.nbytes):
                raise ValueError(
                    f"{told(name)} must lie at [{end}, {end + kind.nbytes}], got [{first}, {last}]"
                )
            self.kinds[name], end = kind, last
        if end != self.size - 8 - length:
            raise ValueError(f"it has {self.size - 8 - length} bytes of arrays, and its header says {end}")

    def read(self) -> tuple[Arrays, int]:
        """All arrays, and the CRC-32 of the whole file; to be called once."""
        value, arrays = zlib.crc32(self._begin), {}
        for name, kind in self.kinds.items():
            array = np.empty(kind.shape, kind.dtype)
            data = _bytes(array)
            for begin in range(0, len(data), BLOCK):
                block = data[begin : begin + BLOCK]
                if self.file.readinto(block) != len(block):  # type: ignore[attr-defined]
                    raise ValueError("it has become shorter while it was read")
                value = zlib.crc32(block, value)
            if kind.dtype == "bool" and max(data, default=0) > 1:
                raise ValueError(f"{told(name)} holds a truth value that is neither 0 nor 1")
            arrays[name] = array
        return arrays, value


def checksum_of(file: BinaryIO) -> int:
    """The CRC-32 of a whole file."""
    value = 0
    file.seek(0)
    while block := file.read(BLOCK):
        value = zlib.crc32(block, value)
    return value


def _entry(name: str, entry: Any) -> tuple[str, int, int, Kind]:
    """An array's name, offsets and kind."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{told(name)} must have dtype, shape and data_offsets")
    short, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(short, str) or short not in NAMES:
        raise ValueError(f"{told(name)} must have one of the dtypes {', '.join(NAMES)}, got {short!r:.60}")
    if not _naturals(shape) or len(shape) > 32 or math.prod(max(1, size) for size in shape) >= 2**60:
        raise ValueError(f"{told(name)} must have a shape that an array can have, got {shape!r:.60}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{told(name)} must have two offsets, got {offsets!r:.60}")
    return name, offsets[0], offsets[1], Kind(NAMES[short], tuple(shape))


def told(name: str) -> str:
    """A name out of a file, as it may be printed."""
    return ascii(name)[1:-1][:80]


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def kinds_of(arrays: Mapping[str, NDArray[Any]]) -> Kinds:
    return {name: Kind.of(array) for name, array in arrays.items()}


def require_kinds(what: str, mine: Mapping[str, Kind], given: Mapping[str, Kind]) -> None:
    """ValueError with the first name that is missing or unknown, or has another dtype or shape."""
    for name in sorted(mine.keys() | given.keys()):
        if name not in given or name not in mine:
            raise ValueError(f"{what} {'lacks' if name in mine else 'has an unknown entry'} {told(name)}")
        if mine[name] != given[name]:
            (dtype, shape), named = mine[name], name.replace("/", " ")
            raise ValueError(f"{named} must be {dtype} and must have shape {list(shape)}, got {given[name]}")
