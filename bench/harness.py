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
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from workloads import WORKLOADS

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parent.parent
FORMAT = 2  # of the results
PACKAGES = (
    "brc-fast", "torch", "triton", "numpy", "jax", "jaxlib", "mujoco", "mujoco-mjx", "playground",
    "gymnasium", "dm-control", "shimmy", "envpool", "cpprb", "torchrl", "stable-baselines3", "flashbax",
)  # fmt: skip
HEADER = ("date", "cpu", "gpu", "cores", "torch_threads", "versions", "commit", "dirty", "benchmark")
MEASUREMENT = ("case", "provider", "unit", "better", "rounds", "low", "high", "floor")
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
Item = TypeVar("Item")


class Unavailable(Exception):
    """A provider has no time here; the message says why."""


class Differs(Unavailable):
    """A provider computed something else; the message says what."""


class Refused(Exception):
    """Results that cannot or must not be used; the message is one line, with the remedy."""


class Missing(dict[str, Exception]):
    """Why providers have no time."""

    @contextmanager
    def of(self, *names: str) -> Iterator[None]:
        """What goes wrong in this block costs these providers their time, and the others nothing."""
        try:
            yield
        except Exception as error:
            self.update(dict.fromkeys(names, error) | self)  # the first reason stays


# ---------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    """Options that several benchmarks have; what is wrong with them is one line, exit code 2."""

    def __init__(self, told: str | None) -> None:
        kind = argparse.RawTextHelpFormatter
        super().__init__(description=told, formatter_class=kind, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}\n")

    def common(self, budget: float, workloads: str = "") -> None:
        """Add the options that most benchmarks have; --workload where it is wanted, of so many names."""
        self.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
        told = f"starts and what compiles may come on top (default {budget:g})"
        self.add_argument("--budget", type=seconds, default=budget, metavar="SECONDS", help=told)
        self.add_argument("--save", metavar="NAME", help="of a file under bench/results")
        if workloads:
            told = f"among {', '.join(WORKLOADS)}"
            self.add_argument("--workload", nargs=workloads, choices=WORKLOADS, metavar="NAME", help=told)
        else:
            self.add_argument("--dry", action="store_true", help="tiny sizes")

    def device(self, given: argparse.Namespace) -> str:
        """The device that was asked for, or the best one."""
        if given.device == "cuda" and not torch.cuda.is_available():
            self.error("torch sees no CUDA device; --device cpu runs the same code")
        return given.device or ("cuda" if torch.cuda.is_available() else "cpu")


def seconds(word: str) -> float:
    """Type of an option: a finite number, at least 0."""
    if not 0.0 <= (value := float(word)) < math.inf:
        raise ValueError
    return value


def positive(word: str) -> int:
    """Type of an option: a whole number, at least 1."""
    if (value := int(word)) < 1:
        raise ValueError
    return value


def use_cores(count: int = 1) -> None:
    """Asks every library for `count` threads; JAX takes every core that it sees, so it is shown as many."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    torch.set_num_threads(count)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-count:])


# ---------------------------------------------------------------- timing


class Clock:
    """A deadline."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self.end - time.perf_counter())


def shares(items: Sequence[Item], seconds: float) -> Iterator[tuple[Item, Clock]]:
    """Each item with an equal share of the time that is left when its turn comes."""
    whole = Clock(seconds)
    for place, item in enumerate(items):
        yield item, Clock(whole.left / (len(items) - place))


def wait(device: str) -> None:
    """Let queued GPU work finish, so that wall time covers it."""
    if device == "cuda":
        torch.cuda.synchronize()


def tensor_cores(device: str, precision: str = "high") -> None:
    """Float32 products of PyTorch in TF32 on a GPU from here on, or not ("highest"); ours choose themselves.

    Set for all of PyTorch: compilers of some versions refuse to work where only CUDA's own flag is set
    (pytorch issue 166387).
    """
    if device == "cuda":
        torch.set_float32_matmul_precision(precision)


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
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return low, middle, high


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

    def __init__(self, benchmark: str, save: str | None = None, judged: str = "", **more: Any) -> None:
        self.path, self.wrong = RESULTS / f"{save}.json" if save else None, list[str]()
        self.judged = judged  # how providers begin whose difference fails the result; others lose their time
        self.found: dict[str, Any] = {"benchmark": benchmark, **more}
        self.entries = list[dict[str, Any]]()

    def case(
        self, case: str, times: Mapping[str, Seconds], unit: str, scale: float = 1.0, *,
        ours: str | None = None, missing: Mapping[str, Exception] | None = None,
        floor: str | Mapping[str, float] = "", at: Mapping[str, str | int] | None = None,
    ) -> None:  # fmt: skip
        """Note, print and store a case.

        Args:
            times: seconds per call of every provider; a call does `scale` units of work.
            ours: the provider that others are compared with. missing: why providers have no time.
            floor: one of `times`, which then is no provider, or seconds by provider.
        """
        told: dict[str, Any] = {"at": at} if at else {}
        for name in (name for name in times if name != floor):
            values = sorted(value(each, unit, scale) for each in quartiles(times[name]))
            more = dict(told)
            if ours in times and name != ours:
                more["ratio"] = ratio(times[name], times[str(ours)])
            held = times.get(floor) if isinstance(floor, str) else [floor[name]]
            if held is not None:
                more["floor"] = value(quartiles(held)[1], unit, scale)
                more["over_floor"] = ratio(times[name], held)[0]
            rounds = times[name].samples if isinstance(times[name], Summary) else len(times[name])
            self.add(case, name, unit, values, rounds, **more)
        for name, error in (missing or {}).items():
            self.add(case, name, unit, None, 0, missing=reason(error), **told)
            if isinstance(error, Differs) and name.startswith(self.judged):
                self.wrong.append(f"{name} at {case} {reason(error)}")
        self.store()

    def add(
        self, case: str, provider: str, unit: str, values: Sequence[float] | None, rounds: int, **more: Any
    ) -> None:
        """Lower quartile, median and upper quartile in the unit."""
        low, middle, high = values or (None, None, None)
        better = "more" if unit.endswith("/s") else "less"
        entry = {"case": case, "provider": provider, "value": middle, "unit": unit, "better": better}
        self.entries.append(entry | {"low": low, "high": high, "rounds": rounds, "floor": None} | more)
        print(line(self.entries[-1]), flush=True)

    @property
    def equality(self) -> str:
        nothing = all(entry["value"] is None for entry in self.entries)
        wrong = self.wrong or ["nothing was compared"] * nothing
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


def reason(error: Exception) -> str:
    """Why there is no time, in one line."""
    words = ("RESOURCE_EXHAUSTED", "out of memory", "can't allocate memory")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words):
        return "out of memory"
    name = "" if isinstance(error, Unavailable | ValueError | ImportError) else f"{type(error).__name__}: "
    return f"{name}{one_line(error)[:300]}"


def one_line(told: object) -> str:
    """What was raised in a run may have several lines."""
    return " ".join(str(told).split())


# ---------------------------------------------------------------- files


def header() -> dict[str, Any]:
    """Machine, versions and commit: what a number needs to mean something."""
    status = git("status", "--porcelain", "--", ".", ":!bench/results")
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def installed(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None


def git(*words: str) -> str | None:
    with suppress(OSError, subprocess.CalledProcessError):
        told = subprocess.run(["git", *words], text=True, cwd=ROOT, capture_output=True, check=True)
        return told.stdout.strip()
    return None


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Store results with their header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**header(), **results}, indent=1) + "\n")


def no_figure(word: str) -> NoReturn:
    raise ValueError(f"{word} is no figure")


def read(path: Path, formats: Sequence[int] = (FORMAT,)) -> dict[str, Any]:
    """Results, with a header and with measurements that have what all readers take from them.

    Raises:
        Refused: no such file, no JSON of finite numbers, another format, or no measurements.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(), parse_constant=no_figure)
        if found.get("format") not in formats:
            raise ValueError(f"its format is {found.get('format')}, not {formats[-1]}")
        if not found["measurements"]:
            raise ValueError(f"it holds no measurements {found.get('reason', '')}")
        _ = [found[key] for key in HEADER]
        for entry in found["measurements"]:
            _ = [entry[key] for key in MEASUREMENT]
            _ = entry["missing"] if entry["value"] is None else float(entry["value"])
    except Exception as error:  # of a file that may hold anything
        why = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
        remedy = f"measure again with the benchmark that wrote it and --save {path.stem}"
        raise Refused(f"{path} cannot be read ({why}); {remedy}") from None
    return found


def failures(result: Mapping[str, Any]) -> list[str]:
    """Why the figures of a result must not be trusted."""
    found = []
    if result.get("status") == "failed":
        found.append(f"its run failed ({result.get('reason')}): repair that and measure again")
    if (checked := result.get("equality")) not in (None, "passed"):
        found.append(f"its equality check {checked}")
    return found
