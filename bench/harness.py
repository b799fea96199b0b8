"""What every benchmark shares: the machine's header, interleaved timing, measurements, JSON results.

A result is a JSON object: the header (machine, versions, commit, format), `benchmark`, `equality` ("passed",
or what differed) where providers are compared, whatever rows the benchmark has, and `measurements`, a flat
list that report.py and compare.py read. As JSON lines: the header, then one addition to a list per line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import reprlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import torch

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parent.parent
FORMAT = 1  # of the results; read() refuses every other
COUNTS = ("width", "batch", "updates", "num_envs")  # options of benchmarks that count something
THREADS = 1024  # at most
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
    floor: float | None  # what it is held against: a time or a rate of the machine
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
    """A file holds no results of this format, or not what is made of them; the message has the remedy."""


class Kind(NamedTuple):
    """What a value of a file may be: JSON's own types, and no other number than a finite one."""

    told: str
    types: tuple[type, ...]


TEXT, TEXT_OR_NULL = Kind("text", (str,)), Kind("text or null", (str, NoneType))
WHOLE, NUMBER = Kind("a whole number", (int,)), Kind("a finite number or null", (int, float, NoneType))
HEADER = {  # what readers take from it
    "date": TEXT,
    "cpu": TEXT,
    "cores": Kind("a whole number or null", (int, NoneType)),
    "torch_threads": WHOLE,
    "gpu": TEXT_OR_NULL,
    "versions": Kind("an object", (dict,)),
    "commit": TEXT_OR_NULL,
    "dirty": Kind("true, false or null", (bool, NoneType)),
}
PERHAPS = {"benchmark": TEXT, "part": TEXT, "status": TEXT, "equality": TEXT_OR_NULL}
MEASURED = {
    **dict.fromkeys(("case", "provider", "unit", "better", "missing"), TEXT),
    **dict.fromkeys(("value", "low", "high", "floor"), NUMBER),
    "rounds": WHOLE,
}


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

    The header and the measurements are as they should be; whatever else a benchmark stores is not looked at.

    Raises:
        Unreadable: no such file, no JSON, another format, no measurements, or some that are none.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        told = error.strerror if isinstance(error, OSError) else "no text"
        raise Unreadable(f"{path} cannot be read ({told}); a benchmark's --save NAME makes one") from None
    try:
        found = _joined(text) if path.suffix == ".jsonl" else json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()  # else it holds half a character, which none can print
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{path} is not JSON ({error}); measure again") from None
    if not isinstance(found, dict):
        raise Unreadable(f"{path} holds no results: a JSON object is expected, not {type(found).__name__}")
    written = found.get("format", 0)
    if type(written) is not int or written > FORMAT:
        raise Unreadable(f"{path} has format {written}, newer than {FORMAT}: use the brc-fast that wrote it")
    if written < FORMAT:
        raise Unreadable(f"{path} has format {written}, older than {FORMAT}: {_remedy(found, path)}")
    entries = found.get("measurements")
    if not isinstance(entries, list) or not entries:
        why = f" ({found['reason']})" if "reason" in found else ""
        raise Unreadable(f"{path} holds no measurements{why}: {_remedy(found, path)}")
    for place, entry in enumerate(entries):
        if (told := _flaw(entry)) is not None:
            raise Unreadable(f"{path}: measurement {place} {told}; {_remedy(found, path)}")
    if lacks := ", ".join(sorted(HEADER.keys() - found.keys())):
        raise Unreadable(f"{path} lacks {lacks}; {_remedy(found, path)}")
    told = _unfit(found, HEADER | PERHAPS) or _unfit(found["versions"], TEXT_OR_NULL)
    if told is not None:
        raise Unreadable(f"{path}: {told}; {_remedy(found, path)}")
    return found


def _joined(text: str) -> dict[str, Any]:
    """The first line's object with what later lines add to its lists."""
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]  # the run was killed while it wrote
    if not lines:
        raise ValueError("no line is complete")
    found: dict[str, Any] = {}
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"line {number} is no object")
        if number == 1:
            found = content
            continue
        for name, entry in content.items():
            if not isinstance(entries := found.setdefault(name, []), list):
                raise ValueError(f"line {number} adds to {name!r}, which is no list")
            entries.append(entry)
    return found


def _flaw(entry: object) -> str | None:
    """Why this is no measurement, if so."""
    if not isinstance(entry, dict):
        return "is none"
    needed = KEYS_WITHOUT_VALUE if entry.get("value") is None else KEYS
    if lacks := ", ".join(sorted(needed - entry.keys())):
        return f"lacks {lacks}"
    if (told := _unfit(entry, MEASURED)) is not None:
        return f"is none: {told}"
    if entry["better"] not in ("more", "less"):
        return f"is none: better is {entry['better']!r}, not 'more' or 'less'"
    return None


def _unfit(found: Mapping[str, Any], kinds: Mapping[str, Kind] | Kind) -> str | None:
    """Which value is of another kind than it should be, if one is; a Kind alone is that of all values."""
    for key, value in found.items():
        kind = kinds if isinstance(kinds, Kind) else kinds.get(key)
        if kind is not None and not (type(value) in kind.types and finite(value)):
            return f"{key} is {reprlib.repr(value)}, not {kind.told}"
    return None


def finite(value: object) -> bool:
    """False for NaN, infinities and integers past the largest float alone."""
    try:
        return not isinstance(value, int | float) or math.isfinite(value)
    except OverflowError:
        return False


def _remedy(found: Mapping[str, Any], path: Path) -> str:
    """What to do where a result cannot be used."""
    if isinstance(command := found.get("command"), str):  # put together by hand from runs of it
        return f"no benchmark writes it; it holds runs of `{command}`"
    again = _again(found, path)
    return f"measure again with {again}" if again else "measure again with the benchmark that wrote it"


def _again(found: Mapping[str, Any], path: Path) -> str | None:
    """The command that makes a result anew, if it can be told."""
    from gpu_parts import PARTS

    benchmark, part = found.get("benchmark"), found.get("part")
    if benchmark is None and part is None and path.stem.startswith("gpu-"):
        part = path.stem.removeprefix("gpu-")
    if isinstance(part, str) and part in PARTS:
        return f"bench/gpu.py --parts {part}"
    if not isinstance(benchmark, str) or not benchmark.isidentifier():
        return None
    if benchmark == "kernels":
        return f"bench/bench_kernels.py --json {path}"
    script = Path("bench", f"bench_{benchmark}.py")
    if not (ROOT / script).exists():
        return None
    more = " --start" if "starts" in found else ""
    if benchmark == "replay" and found.get("device") in ("cpu", "cuda"):
        more = f" --device {found['device']}"  # else it is the comparison of buffers
    return f"{script.as_posix()}{more} --save {path.stem}"


@contextmanager
def making(what: str, path: Path, found: Mapping[str, Any]) -> Iterator[None]:
    """Around what makes a table or a picture of results, which may lack what it needs.

    Raises:
        Unreadable: in the place of what was raised inside.
    """
    try:
        yield
    except ImportError as error:
        raise Unreadable(f"a {what} needs {error.name}, which the [train] extra brings") from None
    except OSError as error:
        name = error.filename or f"the {what}"
        raise Unreadable(f"{name} cannot be written ({error.strerror or error})") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        told = f"it has no {error}" if isinstance(error, KeyError) else error
        raise Unreadable(f"{path} gives no {what} ({told}); {_remedy(found, path)}") from None


def failures(result: Mapping[str, Any]) -> dict[str, str]:
    """Why the figures of a result must not be trusted: in a word or two, and in full."""
    found = {}
    if result.get("status") == "failed":
        why = result.get("reason", "no reason given")
        found["failed run"] = f"its run failed ({why}): repair that and measure again"
    if (checked := result.get("equality")) not in (None, "passed"):
        found["failed equality check"] = f"its equality check {checked}"
    return found


def one_line(reason: object) -> str:
    """A reason as it is printed: what was raised in a run may have several lines."""
    return " ".join(str(reason).split("\n"))


def refusal(options: argparse.Namespace) -> str | None:
    """What is wrong with options that several benchmarks have, in one line."""
    for name in COUNTS:
        given = getattr(options, name, None)
        values = given if isinstance(given, list) else [1 if given is None else given]
        if any(value < 1 for value in values):
            return f"--{name.replace('_', '-')} must be at least 1"
    if not 1 <= getattr(options, "threads", 1) <= THREADS:
        return f"--threads must lie in 1..{THREADS}"
    if not 0.0 <= options.budget < math.inf:
        return "--budget must be a number of seconds, at least 0"
    if options.save is not None:
        folder = (RESULTS / options.save).parent
        if folder != RESULTS and not folder.is_dir():  # write() makes RESULTS
            return f"--save: there is no folder {folder}"
    return None
