"""What every benchmark shares: options, a timer, and cases with their providers in one JSON.

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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from workloads import WORKLOADS, Workload, named

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parent.parent
FORMAT = 2  # of the results; read() refuses every other
PACKAGES = ("brc-fast", "torch", "triton", "jax", "jaxlib", "mujoco", "mujoco-mjx", "playground", "numpy")
SECONDS = {"s": 1.0, "us": 1e6, "ns": 1e9}  # units of a time begin with one of these
ROUNDS, TURN = 3, 0.05  # at least; seconds of a provider's calls in one round
TIME_UP = "time was up; raise --budget"


class Summary(NamedTuple):
    """Seconds per call, of which only quartiles are known, as brc_fast.kernels.tools.timing gives them."""

    median: float
    low: float
    high: float
    samples: int


Seconds = Sequence[float] | Summary  # per call, round by round
Missing = dict[str, BaseException]  # why providers have no time


class Unavailable(Exception):
    """A provider has no time here; the message says why."""


class Differs(Unavailable):
    """A provider computed something else; the message says what."""


class Unreadable(Exception):
    """A file holds no results of this format, or not what is made of them; the message has the remedy."""


# ---------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    """Options that several benchmarks have; what is wrong with them is one line, exit code 2."""

    def __init__(self, told: str | None) -> None:
        kind = argparse.RawTextHelpFormatter
        super().__init__(description=told, formatter_class=kind, allow_abbrev=False)
        self.prog = Path(self.prog).stem

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}\n")

    def common(
        self, budget: float, workloads: str = "", device: str = "default: cuda where there is one"
    ) -> None:
        """Add --device, --workload, --budget and --save."""
        self.add_argument("--device", choices=("cpu", "cuda"), help=device)
        if workloads:
            told = f"among {', '.join(WORKLOADS)}"
            self.add_argument("--workload", nargs=workloads, type=workload, metavar="NAME", help=told)
        told = f"starts and what compiles may come on top (default {budget:g})"
        self.add_argument("--budget", type=bounded(0.0), default=budget, metavar="SECONDS", help=told)
        self.add_argument("--save", type=place, metavar="NAME", help="of a file under bench/results")

    def device(self, given: argparse.Namespace) -> str:
        """The device that was asked for, or the best one."""
        if given.device == "cuda" and not torch.cuda.is_available():
            self.error("torch sees no CUDA device; --device cpu runs the same code")
        return given.device or ("cuda" if torch.cuda.is_available() else "cpu")


def bounded(least: float, kind: type = float) -> Callable[[str], Any]:
    """A number of an option."""

    def convert(word: str) -> Any:
        if not least <= (value := kind(word)) < math.inf:
            raise argparse.ArgumentTypeError(f"must be a number, at least {least:g}")
        return value

    return convert


positive = bounded(1, int)


def workload(word: str) -> Workload:
    try:
        return named(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}") from None


def place(word: str) -> Path:
    path = RESULTS / f"{word}.json"
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def one_core(threads: int = 1) -> None:
    """Asks every library for so many threads; JAX takes every core that it sees, so one keeps to one."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = f"{threads}"
    torch.set_num_threads(threads)
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


# ---------------------------------------------------------------- timing


class Clock:
    """A deadline."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self.end - time.perf_counter())


def wait(device: str) -> None:
    """Let queued GPU work finish, so that wall time covers it."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(
    work: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    turn: float = TURN,
    finish: Callable[[str], object] = lambda name: None,
    timer: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of every provider. In a round each makes calls for `turn` seconds, at least one, and
    then waits for them with `finish(name)`.

    Turns let a busy machine slow all of them alike; compare ratios round by round. Each round has another
    order, so that the neighbours change. There are three rounds at least.
    """
    turn, calls = min(turn, seconds / (ROUNDS * max(1, len(work)))), {}
    for name, call in work.items():
        call()
        finish(name)
        start, done = time.perf_counter(), 0
        while done < 1 or (done < 4096 and time.perf_counter() - start < turn / 10):
            call()
            done += 1
        finish(name)
        calls[name] = max(1, min(4096, int(turn * done / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in work}
    order, rng, clock = list(work), random.Random(0), Clock(seconds)
    while order and (clock.left > 0.0 or len(times[order[0]]) < ROUNDS):
        rng.shuffle(order)
        for name in order:
            start = timer()
            for _ in range(calls[name]):
                work[name]()
            finish(name)
            times[name].append((timer() - start) / calls[name])
    return times


def quartiles(values: Seconds) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if isinstance(values, Summary):
        return values.low, values.median, values.high
    ordered, quarter = sorted(values), len(values) // 4
    return ordered[quarter], statistics.median(ordered), ordered[-1 - quarter]


def ratio(these: Seconds, those: Seconds) -> tuple[float, float, float]:
    """Median and quartiles of these over those, round by round; of what ran apart what both leave open."""
    if not isinstance(these, Summary) and not isinstance(those, Summary) and len(these) == len(those):
        low, middle, high = quartiles([a / b for a, b in zip(these, those, strict=True)])
        return middle, low, high
    (low, middle, high), (least, half, most) = quartiles(these), quartiles(those)
    return middle / half, low / most, high / least


# ---------------------------------------------------------------- measurements


class Results:
    """What a benchmark found. The file is written anew after each case: a run that is killed keeps them.

    A measurement has `case` and `provider`, which no other one shares; `value`, a median, `low` and `high`,
    quartiles, all in `unit`; `better` ("more" or "less"); `rounds`; `floor`, in the unit; perhaps `ratio`,
    how many times as good ours is, with quartiles, `over_floor`, how many times as long as the floor it
    takes, and `at`, the columns of its table; and `missing`, the reason, where `value` is None.
    """

    def __init__(self, benchmark: str, path: Path | None = None, quiet: bool = False, **more: Any) -> None:
        self.path, self.quiet, self.wrong = path, quiet, list[str]()
        self.found: dict[str, Any] = {"benchmark": benchmark, **more}
        self.entries = list[dict[str, Any]]()

    def case(
        self,
        case: str,
        times: Mapping[str, Seconds],
        unit: str,
        scale: float = 1.0,
        *,
        ours: str | None = None,
        missing: Mapping[str, BaseException] | None = None,
        floor: str | Mapping[str, float] = "",
        at: Mapping[str, str | int] | None = None,
    ) -> None:
        """Note, print and store a case.

        Args:
            times: seconds per call of every provider; a call does `scale` units of work.
            ours: the provider that others are compared with. missing: why providers have no time.
            floor: one of `times`, which then is no provider, or seconds by provider.
        """
        for name, seconds in times.items():
            if name == floor:
                continue
            values = sorted(value(each, unit, scale) for each in quartiles(seconds))
            more: dict[str, Any] = {}
            if ours in times and name != ours:
                more["ratio"] = ratio(seconds, times[str(ours)])
            held = times.get(floor) if isinstance(floor, str) else [floor[name]]
            if held is not None:
                more["floor"] = value(quartiles(held)[1], unit, scale)
                more["over_floor"] = ratio(seconds, held)[0]
            rounds = seconds.samples if isinstance(seconds, Summary) else len(seconds)
            self.add(case, name, unit, values, rounds, **more, **({"at": at} if at else {}))
        for name, error in (missing or {}).items():
            self.add(case, name, unit, None, 0, missing=told(error), **({"at": at} if at else {}))
            if isinstance(error, Differs):
                self.wrong.append(f"{name} at {case} {told(error)}")
        self.store()

    def add(
        self,
        case: str,
        provider: str,
        unit: str,
        values: Sequence[float] | None,
        rounds: int = 1,
        **more: Any,
    ) -> None:
        """Lower quartile, median and upper quartile in the unit."""
        low, middle, high = (None,) * 3 if values is None else values
        better = "more" if unit.endswith("/s") else "less"
        entry = {"case": case, "provider": provider, "value": middle, "unit": unit, "better": better}
        self.entries.append(entry | {"low": low, "high": high, "rounds": rounds, "floor": None} | more)
        if not self.quiet:
            print(line(self.entries[-1]), flush=True)

    @property
    def equality(self) -> str:
        nothing = all(entry["value"] is None for entry in self.entries)
        wrong = self.wrong or (["nothing was compared"] if nothing else [])
        return f"failed: {'; '.join(wrong)}" if wrong else "passed"

    def store(self) -> None:
        if self.path is not None:
            write(self.path, {**self.found, "equality": self.equality, "measurements": self.entries})

    def end(self) -> int:
        """Store all; the exit code, with what differs on standard error."""
        self.store()
        if self.equality == "passed":
            return 0
        print(self.equality, file=sys.stderr)
        return 1


def value(seconds: float, unit: str, scale: float) -> float:
    """A rate where the unit ends in /s, else a time per unit of work."""
    return scale / seconds if unit.endswith("/s") else SECONDS[unit.split()[0]] * seconds / scale


def line(entry: Mapping[str, Any]) -> str:
    """A measurement as the terminal shows it."""
    head = f"{entry['case']:<40} {entry['provider']:<24}"
    if entry["value"] is None:
        return f"{head}{'-':>12}  {entry['missing']}"
    figure = f"{entry['value']:,.0f}" if abs(entry["value"]) >= 1000 else f"{entry['value']:.4g}"
    words = f"{head}{figure:>12} {entry['unit']}"
    if "ratio" in entry:
        words += ", ours {:.2f} times as good ({:.2f} to {:.2f})".format(*entry["ratio"])
    return words + (f", {entry['over_floor']:.2f} of the floor's time" if "over_floor" in entry else "")


def told(error: BaseException) -> str:
    """A reason in one line."""
    if out_of_memory(error):
        return "out of memory"
    name = "" if isinstance(error, Unavailable | ValueError | ImportError) else f"{type(error).__name__}: "
    return f"{name}{one_line(error)[:300]}"


def out_of_memory(error: BaseException) -> bool:
    words = ("RESOURCE_EXHAUSTED", "out of memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


# ---------------------------------------------------------------- files


def header() -> dict[str, Any]:
    """Machine, versions and commit: what a number needs to mean something."""
    status = _git("status", "--porcelain", "--", ".", ":!bench/results")
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (each.partition(":")[2].strip() for each in lines if each.startswith("model name"))
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": next(models, platform.processor() or platform.machine()),
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
    found: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _git(*words: str) -> str | None:
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.strip()
    return None


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Store results with their header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**header(), **results}, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Results, whose header and measurements are as they should be; nothing else is looked at.

    Raises:
        Unreadable: no such file, no JSON of finite numbers, another format, or no measurements.
    """

    def infinite(word: str) -> NoReturn:
        raise ValueError(f"{word} is no figure")

    found: Any = None
    try:
        found = json.loads(path.read_text(), parse_constant=infinite)
        if found.get("format") != FORMAT:
            raise ValueError(f"its format is {found.get('format', 'an older one')}, not {FORMAT}")
        if not found["measurements"]:
            raise ValueError(f"it holds no measurements {found.get('reason', '')}")
        for entry in found["measurements"]:
            figures = [entry[key] for key in ("low", "high", "floor", "rounds")] + [*entry.get("ratio", ())]
            figures += [0 if entry["value"] is None and str(entry["missing"]) else entry["value"]]
            names = [entry[key] for key in ("case", "provider", "unit")]
            if not all(isinstance(name, str) for name in names) or entry["better"] not in ("more", "less"):
                raise ValueError(f"{names} is no measurement")
            if not all(each is None or math.isfinite(each) for each in figures):
                raise ValueError(f"{names} has a figure that is none")
        texts = [found[key] for key in ("date", "cpu", "benchmark")]
        if not (all(isinstance(text, str) for text in texts) and isinstance(found["versions"], dict)):
            raise ValueError("its header is none")
        _ = [found[key] for key in ("gpu", "cores", "torch_threads", "commit", "dirty")]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, OverflowError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise Unreadable(f"{path} cannot be read ({one_line(why)}); {remedy(found, path)}") from None
    return dict(found)


def remedy(found: object, path: Path) -> str:
    """What to do where a result cannot be used."""
    found = found if isinstance(found, dict) else {}
    name = str(found.get("benchmark"))
    if "command" in found:  # put together by hand from runs of it
        return f"no benchmark writes it; it holds runs of `{found['command']}`"
    if path.stem.startswith("gpu-"):
        return f"measure again with bench/gpu.py --parts {path.stem.removeprefix('gpu-')}"
    if name.isidentifier() and (ROOT / f"bench/bench_{name}.py").exists():
        return f"measure again with bench/bench_{name}.py --save {path.stem}"
    return "measure again with the benchmark that wrote it; --save NAME makes one"


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
