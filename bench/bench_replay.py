"""`brc_fast.ReplayBuffer` against other replay buffers on one CPU thread.

    python bench/bench_replay.py [--cases ...] [--workload ...] [--capacity 1000000] [--budget SECONDS]
        [--save NAME]
    python bench/bench_replay.py --device cuda|cpu [--workload ...] [--capacity ...] [--budget ...] [--save]

Buffers run in turns in one process, and the figures are medians of process CPU time, with wall time beside
them. Before a buffer is timed, the transitions that it returns must be transitions that were stored. A buffer
that is not installed, fails or returns something else is listed with its reason.

--device asks for batches there instead, and times our two buffers (replay_device.py); on a CPU it tries the
same code.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import replay_cases as cases
import replay_device
import replay_timing as timing
import torch
from harness import RESULTS, Lines, equality, header, refusal, write
from plot_replay import draw
from workloads import WORKLOADS, named
from workloads import Workload as Named

from peers.replay_data import MAX_ROWS, Workload
from peers.replay_peers import PEERS, Ours, OursTensors

MIN_CAPACITY = 20_480  # 1024 transitions with wide observations

# Share of the budget per group.
SHARES = {
    "locomotion": 0.35,
    "ten-tasks": 0.10,
    "wide": 0.10,
    "insert": 0.25,
    "atari": 0.08,
    "memory": 0.0,
    "files": 0.12,
}
WORKLOAD_SHARE = 0.1

GROUPS: dict[str, Callable[[int, timing.Clock], list[dict[str, Any]]]] = {
    "locomotion": cases.locomotion,
    "ten-tasks": cases.ten_tasks,
    "wide": cases.wide,
    "insert": cases.insert,
    "atari": cases.atari,
    "memory": cases.memory,
    "files": cases.saved_files,
}


def summary(results: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Every goal by its timing.verdict."""
    verdicts: dict[str, list[str]] = {"met": [], "missed": [], "not measured": []}
    for result in results:
        for row in result["rows"]:
            if "met" in row:
                figure = row.get("ours") if row["goal"].endswith("MB") else row.get("ratio")
                what = f"{row['buffer']}" if "buffer" in row else f"{row['what']}, {row['unit']}"
                text = f"{result['case']}: {what}, goal {row['goal']}"
                verdicts[timing.verdict(row)].append(text if figure is None else f"{text}, is {figure:.3g}")
        for name, goal in result.get("open_goals", {}).items():
            verdicts["not measured"].append(f"{result['case']}: {name}, goal {goal:g}")
    return verdicts


def failures(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cases in which ours has no figure, with the reason."""
    pairs = itertools.product(results, (timing.OURS, OursTensors.name))
    return [
        f"{result['case']}, {name}: {result['missing'][name]}"
        for result, name in pairs
        if name in result.get("missing", {})
    ]


def versions() -> dict[str, str | None]:
    """Of the buffers' packages."""
    found: dict[str, str | None] = {}
    for kind in (Ours, *PEERS):
        if kind.package is not None:
            try:
                found[kind.package] = version(kind.package)
            except PackageNotFoundError:
                found[kind.package] = None
    return found


def held(shape: Named, capacity: int) -> Workload:
    """The same for `replay_device`."""
    streams, rows = cases.room(shape, capacity)
    return replay_device.stored(shape.observation, shape.action, shape.tasks, streams, rows)


def on_device(device: str, names: Sequence[str], capacity: int, seconds: float) -> dict[str, Any]:
    """Our buffers at the sizes of these workloads, or of the first case, with batches on a device."""
    usual = Named("", "the first case", cases.OBSERVATION, cases.ACTION)
    runs = []
    for shape in [WORKLOADS[name] for name in names] or [usual]:
        sizes = [(2, shape.batch)] if names else [(1, 1024), (16, 1024)]
        share = seconds / max(1, len(names))
        runs.append(replay_device.run(held(shape, capacity), sizes, device, share, shape.name))
    wrong = [run["equality"] for run in runs if run["equality"] != "passed"]
    return {
        "device": device,
        "rows": [row for run in runs for row in run["rows"]],
        "measurements": [entry for run in runs for entry in run["measurements"]],
        "equality": wrong[0] if wrong else equality([]),
    }


def one_thread() -> None:
    """Asks every library for one thread; those that are loaded later read the environment."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"):
        os.environ[name] = "1"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    torch.set_num_threads(1)


def options() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=tuple(GROUPS), help="default: all, without --workload")
    parser.add_argument(
        "--workload", nargs="+", metavar="NAME", default=[], help=f"among {', '.join(WORKLOADS)}"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="batches there, of ours alone")
    parser.add_argument(
        "--capacity",
        type=int,
        help="transitions in a buffer (default: 1000000, or 200000 where the budget is below a minute)",
    )
    parser.add_argument("--budget", type=float, default=120.0, help="seconds; a long set-up comes on top")
    parser.add_argument("--save", help="name of a file under bench/results")
    parser.add_argument(
        "--picture", type=Path, help="draw the batch of 1024, for example docs/replay-cpu.png"
    )
    return parser


def refused(arguments: argparse.Namespace) -> str | None:
    """Why these options cannot be, in one line."""
    try:
        for name in arguments.workload:
            named(name)
    except ValueError as error:
        return str(error)
    if (wrong := refusal(arguments)) is not None:
        return wrong
    if not MIN_CAPACITY <= arguments.capacity <= MAX_ROWS:
        return f"--capacity must lie in {MIN_CAPACITY}..{MAX_ROWS}"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device; --device cpu runs the same code"
    if arguments.device and (arguments.cases or arguments.picture):
        return "--device knows neither --cases nor --picture; leave them out"
    return None


def on_host(arguments: argparse.Namespace, lines: Lines | None) -> list[dict[str, Any]]:
    """The groups that were asked for; `lines` keeps what a run that is killed has measured."""
    chosen = arguments.cases or ([] if arguments.workload else list(GROUPS))
    groups = {name: GROUPS[name] for name in chosen}
    groups |= {name: partial(cases.on_workload, name) for name in arguments.workload}
    whole = sum(SHARES.get(name, WORKLOAD_SHARE) for name in groups) or 1.0
    results: list[dict[str, Any]] = []
    for name, group in groups.items():
        share = arguments.budget * SHARES.get(name, WORKLOAD_SHARE) / whole
        found = group(arguments.capacity, timing.Clock(share))
        results += found
        if lines is not None:
            for entry in itertools.chain(*(result["measurements"] for result in found)):
                lines.add("measurements", entry)
        gc.collect()
    return results


def print_summary(verdicts: Mapping[str, Sequence[str]], seconds: float) -> None:
    """Which goals are met, and the others by name."""
    print(f"\n{seconds:.0f} s in all")
    print(f"Goals: {', '.join(f'{len(names)} {word}' for word, names in verdicts.items())}")
    for word in ("missed", "not measured"):
        for name in verdicts[word]:
            print(f"  {word}: {name}")


def main() -> int:
    arguments = options().parse_args()
    if arguments.capacity is None:
        arguments.capacity = 1_000_000 if arguments.budget >= 60 else 200_000
    if (wrong := refused(arguments)) is not None:
        print(f"bench_replay: {wrong}", file=sys.stderr)
        return 2
    capacity: int = arguments.capacity
    if arguments.device:
        torch.set_num_threads(1)
        device_found = on_device(arguments.device, arguments.workload, capacity, arguments.budget)
        if arguments.save:
            print(write(arguments.save, {"benchmark": "replay", "capacity": capacity, **device_found}))
        return 0 if device_found["equality"] == "passed" else 1
    one_thread()
    start = time.perf_counter()
    kept = RESULTS / f"{arguments.save}.jsonl"
    lines = Lines(kept, benchmark="replay", capacity=capacity) if arguments.save else None
    results = on_host(arguments, lines)
    verdicts = summary(results)
    print_summary(verdicts, time.perf_counter() - start)
    content = {
        "benchmark": "replay",
        "capacity": capacity,
        "versions": {**header()["versions"], **versions()},
        "goals": verdicts,
        "measurements": [entry for result in results for entry in result.pop("measurements")],
        "equality": equality(failures(results)),
        "cases": results,
    }
    if lines is not None:
        print(write(arguments.save, content))
        lines.file.close()
        kept.unlink()
    if arguments.picture:
        draw({**header(), **content}, arguments.picture)
        print(arguments.picture)
    if content["equality"] != "passed":
        print(content["equality"], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
