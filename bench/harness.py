"""What every benchmark shares: the machine's header, interleaved timing, measurements, JSON results.

A result is a JSON object: the header (machine, versions, commit, format), `benchmark`, `equality` ("passed",
or what differed) where providers are compared, whatever rows the benchmark has, and `measurements`, a flat
list that report.py and compare.py read. As JSON lines: the header, then one addition to a list per line.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NotRequired, TypedDict

import torch

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parent.parent
FORMAT = 1  # of the results; read() refuses every other
PACKAGES = ("brc-fast", "torch", "triton", "jax", "jaxlib", "mujoco", "mujoco-mjx", "playground", "numpy")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    try:
        out = subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def header() -> dict[str, Any]:
    """Machine, versions and commit: what a number needs to mean something."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None
        if (status := _git("status", "--porcelain", "--", ".", ":!bench/results")) is None
        else bool(status),
    }


def wait(device: str) -> None:
    """Let queued GPU work finish, so that wall time covers it."""
    if device == "cuda":
        torch.cuda.synchronize()


class Times(dict[str, list[float]]):
    """Wall seconds per call of every provider, round by round; in `cpu` those of the process, all threads."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__({name: [] for name in names})
        self.cpu: dict[str, list[float]] = {name: [] for name in names}


def interleave(
    providers: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    calls: int,
    device: str = "cpu",
    warmup: int = 3,
) -> Times:
    """Seconds per call of every provider, in rounds: each runs `calls` times per round, one after the other.

    Interleaving lets a busy machine slow all of them alike; compare medians, or ratios round by round.
    """
    for work in providers.values():
        for _ in range(warmup):
            work()
    wait(device)
    times = Times(list(providers))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, work in providers.items():
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                work()
            wait(device)
            times[name].append((time.perf_counter() - start) / calls)
            times.cpu[name].append((time.process_time() - cpu) / calls)
    return times


def median_ratio(slower: list[float], faster: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratio, round by round."""
    ratios = sorted(a / b for a, b in zip(slower, faster, strict=True))
    quarter = len(ratios) // 4
    return statistics.median(ratios), ratios[quarter], ratios[-1 - quarter]


# ---------------------------------------------------------------- measurements

Better = Literal["more", "less"]


class Measurement(TypedDict):
    """One figure of one provider. `value` is a median, `low` and `high` are quartiles, all in `unit`."""

    case: str  # with the provider it names the measurement: no two have both
    provider: str
    value: float | None  # None: there is none, and `missing` says why
    unit: str  # "updates/s", "ns per transition", "steps/s", "us", "GB/s", ...
    better: Better
    low: float | None
    high: float | None
    rounds: int
    floor: float | None  # what cannot be beaten here: the least time, the highest rate
    missing: NotRequired[str]


KEYS = Measurement.__annotations__.keys() - {"missing"}
KEYS_WITHOUT_VALUE = {"case", "provider", "value", "unit", "better", "missing"}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return ordered[quarter], statistics.median(ordered), ordered[-1 - quarter]


def measured(
    case: str, provider: str, values: Sequence[float], unit: str, better: Better, floor: float | None = None
) -> Measurement:
    """Of one value per round, in `unit`.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError(f"{case}, {provider}: no round was measured; absent() says why there is no value")
    low, middle, high = quartiles(values)
    return {
        "case": case,
        "provider": provider,
        "value": middle,
        "unit": unit,
        "better": better,
        "low": low,
        "high": high,
        "rounds": len(values),
        "floor": floor,
    }


def absent(
    case: str, provider: str, reason: str, unit: str, better: Better, floor: float | None = None
) -> Measurement:
    """In the place of a value that there is not."""
    return {
        "case": case,
        "provider": provider,
        "value": None,
        "unit": unit,
        "better": better,
        "low": None,
        "high": None,
        "rounds": 0,
        "floor": floor,
        "missing": reason,
    }


def equality(reasons: Sequence[str]) -> str:
    """The `equality` of a result: passed, or what differs from what it should equal."""
    return f"failed: {'; '.join(reasons)}" if reasons else "passed"


# ---------------------------------------------------------------- files


class Unreadable(Exception):
    """A file holds no results of this format; the message is one line with the remedy."""


def write(name: str, results: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Store results with their header under bench/results."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**header(), **results}, indent=1) + "\n")
    return path


class Lines:
    """Results as JSON lines, each on disk as soon as it is known: what a killed run has measured stays.

    with Lines(path, benchmark="update") as lines:
        lines.add("measurements", measured(...))
    """

    def __init__(self, path: Path, **results: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w")
        self._line({**header(), **results})

    def add(self, name: str, entry: Mapping[str, Any] | Measurement) -> None:
        """Append to the list of this name."""
        self._line({name: entry})

    def _line(self, content: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(content) + "\n")
        self.file.flush()

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()


def read(path: Path) -> dict[str, Any]:
    """Results from JSON or JSON lines, of which the last may be cut off.

    Raises:
        Unreadable: no such file, no JSON, another format, no measurements.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        told = error.strerror if isinstance(error, OSError) else "no text"
        raise Unreadable(f"{path} cannot be read ({told}); a benchmark's --save NAME makes one") from None
    try:
        found = _joined(text) if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise Unreadable(f"{path} is not JSON ({error}); measure again") from None
    if not isinstance(found, dict):
        raise Unreadable(f"{path} holds no results: a JSON object is expected, not {type(found).__name__}")
    written = found.get("format", 0)
    if not isinstance(written, int) or written > FORMAT:
        raise Unreadable(f"{path} has format {written}, newer than {FORMAT}: use the brc-fast that wrote it")
    if written < FORMAT:
        again = _again(found, path)
        raise Unreadable(f"{path} has format {written}, older than {FORMAT}: measure again with {again}")
    entries = found.get("measurements")
    if not isinstance(entries, list) or not entries:
        raise Unreadable(f"{path} holds no measurements: measure again with {_again(found, path)}")
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise Unreadable(f"{path}: measurement {place} is none; measure again with {_again(found, path)}")
        needed = KEYS_WITHOUT_VALUE if entry.get("value") is None else KEYS
        if lacks := ", ".join(sorted(needed - entry.keys())):
            told = f"measurement {place} lacks {lacks}"
            raise Unreadable(f"{path}: {told}; measure again with {_again(found, path)}")
    return found


def _joined(text: str) -> dict[str, Any]:
    """The first line's object with what later lines add to its lists."""
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]  # the run was killed while it wrote
    if not lines:
        raise ValueError("no line is complete")
    found: dict[str, Any] = json.loads(lines[0])
    for line in lines[1:]:
        for name, entry in json.loads(line).items():
            found.setdefault(name, []).append(entry)
    return found


def _again(found: Mapping[str, Any], path: Path) -> str:
    """The command that makes a result anew."""
    benchmark = found.get("benchmark", found.get("part", "update"))
    if path.stem.startswith("gpu-"):
        return f"bench/gpu.py --parts {path.stem.removeprefix('gpu-')}"
    return f"bench/bench_{benchmark}.py --save {path.stem}"
