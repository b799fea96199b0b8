"""What every benchmark shares: options, interleaved timing, cases with their providers, one JSON of a flat list.

A result is a JSON object: the machine, versions and commit; `benchmark`; `equality` ("passed", or what
differed); and `measurements`, the list that report.py, pictures.py and compare.py read.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import reprlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NoReturn, NotRequired, TypedDict

import torch

from brc_fast.kernels.tools.timing import Timing

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parent.parent
FORMAT = 2  # of the results; read() refuses every other
PACKAGES = ("brc-fast", "torch", "triton", "jax", "jaxlib", "mujoco", "mujoco-mjx", "playground", "numpy")
SECONDS = {"s": 1.0, "us": 1e6, "ns": 1e9}  # units of a time begin with one of these
THREADS = 1024
ROUNDS = 3  # at least
TURN = 0.05  # seconds of a provider's calls in one round
TIME_UP = "time was up; raise --budget"
Seconds = Sequence[float] | Timing  # per call: round by round, or their quartiles


class Unavailable(Exception):
    """A provider has no time here; the message says why."""


class Differs(Unavailable):
    """A provider computed something else; the message says what."""


class Unreadable(Exception):
    """A file holds no results of this format, or not what is made of them; the message has the remedy."""


# ---------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    """Tells what is wrong with the options in one line, exit code 2."""

    def __init__(self, told: str | None, **options: Any) -> None:
        super().__init__(
            description=told, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False, **options
        )
        self.prog = Path(self.prog).stem

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}\n")

    def budget(self, seconds: float, told: str = "seconds in all") -> None:
        """Add --budget and --save."""
        self.add_argument("--budget", type=_seconds, default=seconds, help=f"{told} (default {seconds:g})")
        self.add_argument("--save", type=_place, metavar="NAME", help="of a file under bench/results")

    def device(self, told: str = "default: cuda where there is one") -> None:
        self.add_argument("--device", choices=("cpu", "cuda"), help=told)

    def device_of(self, given: argparse.Namespace) -> str:
        """The device that was asked for, or the best one; an error where it is not there."""
        there = torch.cuda.is_available()
        if given.device == "cuda" and not there:
            self.error("torch sees no CUDA device; --device cpu runs the same code")
        return given.device or ("cuda" if there else "cpu")


def positive(word: str) -> int:
    if (value := int(word)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def threads(word: str) -> int:
    if not 1 <= (value := int(word)) <= THREADS:
        raise argparse.ArgumentTypeError(f"must lie in 1..{THREADS}")
    return value


def _seconds(word: str) -> float:
    if not 0.0 <= (value := float(word)) < math.inf:
        raise argparse.ArgumentTypeError("must be a number of seconds, at least 0")
    return value


def _place(word: str) -> Path:
    path = RESULTS / f"{word}.json"
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def one_core(count: int = 1) -> None:
    """Asks every library for one thread; JAX takes every core that it sees, so the process keeps to one."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = f"{count}"
    torch.set_num_threads(count)
    if count == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


# ---------------------------------------------------------------- timing


class Clock:
    """A deadline."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.end = seconds, time.perf_counter() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self.end - time.perf_counter())

    def share(self, count: int) -> float:
        """For each of so many that wait."""
        return self.left / max(1, count)


class Times(dict[str, list[float]]):
    """Wall seconds per call of every provider, round by round; in `cpu` those of the process, all threads."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__({name: [] for name in names})
        self.cpu: dict[str, list[float]] = {name: [] for name in names}


def wait(device: str) -> None:
    """Let queued GPU work finish, so that wall time covers it."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(
    work: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    turn: float = TURN,
    warmup: int = 1,
    finish: Callable[[str], object] = lambda name: None,
) -> Times:
    """Seconds per call of every provider. In a round each makes calls for `turn` seconds, at least one, and
    then waits for them with `finish(name)`.

    Turns let a busy machine slow all of them alike; compare ratios round by round. Each round has another
    order, so that the neighbours change. There are three rounds at least.
    """
    turn = min(turn, seconds / (ROUNDS * max(1, len(work))))
    calls = {}
    for name, call in work.items():
        for _ in range(warmup):
            call()
        finish(name)
        start, done = time.perf_counter(), 0
        while done < 1 or (done < 4096 and time.perf_counter() - start < turn / 10):
            call()
            done += 1
        finish(name)
        calls[name] = max(1, min(4096, int(turn * done / (time.perf_counter() - start))))
    times, order, rng, clock = Times(list(work)), list(work), random.Random(0), Clock(seconds)
    while order and (clock.left > 0.0 or len(times[order[0]]) < ROUNDS):
        rng.shuffle(order)
        for name in order:
            call = work[name]
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls[name]):
                call()
            finish(name)
            times[name].append((time.perf_counter() - start) / calls[name])
            times.cpu[name].append((time.process_time() - cpu) / calls[name])
    return times


def quartiles(values: Seconds) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if isinstance(values, Timing):
        return values.low, values.median, values.high
    ordered, quarter = sorted(values), len(values) // 4
    return ordered[quarter], statistics.median(ordered), ordered[-1 - quarter]


def ratio(these: Seconds, those: Seconds) -> tuple[float, float, float]:
    """Median and quartiles of these over those, round by round; of those that ran apart, what both leave open."""
    if not isinstance(these, Timing) and not isinstance(those, Timing) and len(these) == len(those):
        low, middle, high = quartiles([a / b for a, b in zip(these, those, strict=True)])
        return middle, low, high
    (low, middle, high), (least, half, most) = quartiles(these), quartiles(those)
    return middle / half, low / most, high / least


# ---------------------------------------------------------------- measurements


class Measurement(TypedDict):
    """One figure of one provider. `value` is a median, `low` and `high` are quartiles, all in `unit`."""

    case: str  # with the provider it names the measurement: no two have both
    provider: str
    value: float | None  # None: there is none, and `missing` says why
    unit: str  # "updates/s", "ns per transition", "steps/s", "us", "GB/s", ...
    better: Literal["more", "less"]
    low: float | None
    high: float | None
    rounds: int
    floor: float | None  # what it is held against: a time or a rate of the machine, in `unit`
    missing: NotRequired[str]
    ratio: NotRequired[Sequence[float]]  # how many times as good ours is: median and quartiles
    over_floor: NotRequired[float]  # how many times as long as the floor it takes
    at: NotRequired[Mapping[str, str | int]]  # columns of its table


def value(seconds: float, unit: str, scale: float = 1.0) -> float:
    """Of a call that does `scale` units of work: a rate where the unit ends in /s, else a time per unit."""
    return scale / seconds if unit.endswith("/s") else SECONDS[unit.split()[0]] * seconds / scale


def measured(case: str, provider: str, times: Seconds, unit: str, scale: float = 1.0) -> Measurement:
    """Of seconds per call, round by round."""
    low, middle, high = sorted(value(seconds, unit, scale) for seconds in quartiles(times))
    better: Literal["more", "less"] = "more" if unit.endswith("/s") else "less"
    return {
        "case": case, "provider": provider, "value": middle, "unit": unit, "better": better,
        "low": low, "high": high, "rounds": times.samples if isinstance(times, Timing) else len(times), "floor": None,
    }  # fmt: skip


def absent(case: str, provider: str, reason: str, unit: str) -> Measurement:
    """In the place of a value that there is not."""
    better: Literal["more", "less"] = "more" if unit.endswith("/s") else "less"
    return {
        "case": case, "provider": provider, "value": None, "unit": unit, "better": better,
        "low": None, "high": None, "rounds": 0, "floor": None, "missing": reason,
    }  # fmt: skip


def told(error: BaseException) -> str:
    """A reason in one line."""
    if isinstance(error, Unavailable | ValueError | ImportError):
        return one_line(error)
    if out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {one_line(error)[:300]}"


def out_of_memory(error: BaseException) -> bool:
    words = ("RESOURCE_EXHAUSTED", "out of memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error) for w in words)


class Results:
    """What a benchmark found. The file is written anew after each case: a run that is killed keeps them."""

    quiet = False

    def __init__(self, benchmark: str, path: Path | None = None, **more: Any) -> None:
        self.path, self.entries, self.wrong = path, list[Measurement](), list[str]()
        self.found: dict[str, Any] = {"benchmark": benchmark, **more}

    def case(
        self,
        case: str,
        times: Mapping[str, Seconds],
        unit: str,
        scale: float = 1.0,
        *,
        ours: str | None = None,
        missing: Mapping[str, BaseException] | None = None,
        floor: str | Mapping[str, float] | None = None,
        at: Mapping[str, str | int] | None = None,
    ) -> None:
        """Note, print and store a case.

        Args:
            times: seconds per call of every provider, round by round; a call does `scale` units of work.
            ours: the provider that others are compared with. missing: why providers have no time.
            floor: one of `times`, which then is no provider, or seconds by provider.
        """
        floors = times[floor] if isinstance(floor, str) and floor in times else None
        seconds = floor if isinstance(floor, Mapping) else {}
        for name, values in times.items():
            if name == floor:
                continue
            entry = measured(case, name, values, unit, scale)
            if ours in times and name != ours:
                entry["ratio"] = ratio(values, times[str(ours)])
            if floors is not None:
                entry["floor"] = value(quartiles(floors)[1], unit, scale)
                entry["over_floor"] = ratio(values, floors)[0]
            elif name in seconds:
                entry["floor"] = value(seconds[name], unit, scale)
                entry["over_floor"] = quartiles(values)[1] / seconds[name]
            self.add(entry, at)
        for name, error in (missing or {}).items():
            self.add(absent(case, name, told(error), unit), at)
            if isinstance(error, Differs):
                self.wrong.append(f"{name} at {case} {told(error)}")
        self.store()

    def add(self, entry: Measurement, at: Mapping[str, str | int] | None = None) -> None:
        if at is not None:
            entry["at"] = at
        self.entries.append(entry)
        if not self.quiet:
            print(line(entry), flush=True)

    @property
    def equality(self) -> str:
        wrong = self.wrong
        if not wrong and not any(entry["value"] is not None for entry in self.entries):
            wrong = ["nothing was compared"]
        return f"failed: {'; '.join(wrong)}" if wrong else "passed"

    def store(self) -> None:
        if self.path is not None:
            found = {**self.found, "equality": self.equality, "measurements": self.entries}
            write(self.path.stem, found, self.path.parent)

    def end(self) -> int:
        """Store all; the exit code, with what differs on standard error."""
        self.store()
        if self.equality == "passed":
            return 0
        print(self.equality, file=sys.stderr)
        return 1


def line(entry: Measurement) -> str:
    """An entry as the terminal shows it."""
    head = f"{entry['case']:<40} {entry['provider']:<24}"
    if entry["value"] is None:
        return f"{head}{'-':>12}  {entry['missing']}"
    figure = f"{entry['value']:,.0f}" if abs(entry["value"]) >= 1000 else f"{entry['value']:.4g}"
    words = f"{head}{figure:>12} {entry['unit']}"
    if "ratio" in entry:
        middle, low, high = entry["ratio"]
        words += f", ours {middle:.2f} times as good ({low:.2f} to {high:.2f})"
    if "over_floor" in entry:
        words += f", {entry['over_floor']:.2f} of the floor's time"
    return words


# ---------------------------------------------------------------- files


def header() -> dict[str, Any]:
    """Machine, versions and commit: what a number needs to mean something."""
    status = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def versions(names: Sequence[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (each.partition(":")[2].strip() for each in lines if each.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def write(name: str, results: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Store results with their header under bench/results."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**header(), **results}, indent=1) + "\n")
    return path


NONE = type(None)
HEADER: dict[str, tuple[type, ...]] = {  # what readers take from it
    "date": (str,), "cpu": (str,), "cores": (int, NONE), "torch_threads": (int,), "gpu": (str, NONE),
    "versions": (dict,), "commit": (str, NONE), "dirty": (bool, NONE), "benchmark": (str,),
}  # fmt: skip
ENTRY: dict[str, tuple[type, ...]] = {
    "case": (str,), "provider": (str,), "value": (int, float, NONE), "unit": (str,), "better": (str,),
    "low": (int, float, NONE), "high": (int, float, NONE), "rounds": (int,), "floor": (int, float, NONE),
}  # fmt: skip
PERHAPS: dict[str, tuple[type, ...]] = {
    "missing": (str,), "ratio": (list, tuple), "over_floor": (int, float), "at": (dict,),
    "status": (str,), "equality": (str, NONE),
}  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """Results, whose header and measurements are as they should be; nothing else is looked at.

    Raises:
        Unreadable: no such file, no JSON, another format, no measurements, or some that are none.
    """
    try:
        found = json.loads(path.read_text())
        json.dumps(found, ensure_ascii=False).encode()  # else it holds half a character, which none can print
    except OSError as error:
        raise Unreadable(f"{path} cannot be read ({error.strerror}); --save NAME makes one") from None
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{path} is not JSON ({error}); measure again") from None
    if not isinstance(found, dict):
        raise Unreadable(f"{path} holds no results: a JSON object is expected, not {type(found).__name__}")
    written = found.get("format", 0)
    if written != FORMAT or type(written) is not int:
        newer = isinstance(written, int) and written > FORMAT
        how = "use the brc-fast that wrote it" if newer else remedy(found, path)
        raise Unreadable(f"{path} has format {reprlib.repr(written)}, not {FORMAT}: {how}")
    entries = found.get("measurements")
    if not isinstance(entries, list) or not entries:
        raise Unreadable(f"{path} holds no measurements {found.get('reason', '')}: {remedy(found, path)}")
    flaw = _flaw(found, HEADER) or next(filter(None, (_flaw(entry, ENTRY) for entry in entries)), None)
    if flaw is not None:
        raise Unreadable(f"{path}: {flaw}; {remedy(found, path)}")
    return found


def _flaw(found: object, kinds: Mapping[str, tuple[type, ...]]) -> str | None:
    """What is not as it is written, if anything is not."""
    if not isinstance(found, dict):
        return f"{reprlib.repr(found)} is no measurement"
    if lacks := ", ".join(sorted(kinds.keys() - found.keys())):
        return f"{reprlib.repr(found.get('case', 'it'))} lacks {lacks}"
    for key, each in found.items():
        known = kinds.get(key, PERHAPS.get(key))
        if known is not None and not (type(each) in known and finite(each)):
            return f"{key} is {reprlib.repr(each)}"
    if "value" in kinds and found["value"] is None and "missing" not in found:
        return "a value is missing without a reason"
    if "better" in kinds and found["better"] not in ("more", "less"):
        return f"better is {found['better']!r}, not 'more' or 'less'"
    numbers = found.get("ratio", (1.0,) * 3)
    if len(numbers) != 3 or not all(isinstance(each, int | float) and finite(each) for each in numbers):
        return f"ratio is {reprlib.repr(numbers)}, not three numbers"
    return None


def finite(number: object) -> bool:
    """False for NaN, infinities and integers past the largest float alone."""
    try:
        return not isinstance(number, int | float) or math.isfinite(number)
    except OverflowError:
        return False


def remedy(found: Mapping[str, Any], path: Path) -> str:
    """What to do where a result cannot be used."""
    if isinstance(command := found.get("command"), str):  # put together by hand from runs of it
        return f"no benchmark writes it; it holds runs of `{command}`"
    if path.stem.startswith("gpu-"):
        return f"measure again with bench/gpu.py --parts {path.stem.removeprefix('gpu-')}"
    name = found.get("benchmark")
    if isinstance(name, str) and name.isidentifier() and (ROOT / f"bench/bench_{name}.py").exists():
        option = f"--json {path}" if name == "kernels" else f"--save {path.stem}"
        return f"measure again with bench/bench_{name}.py {option}"
    return "measure again with the benchmark that wrote it"


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
    return " ".join(str(reason).split())
