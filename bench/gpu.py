"""Tests and timings on a CUDA machine, with what is installed there.

    python bench/gpu.py [--budget SECONDS] [--parts build test kernels update ...] [--dry]

Builds the package into .site, runs `pytest -m gpu`, then times the kernels, the update, the replay, the
environment step and the training loop, and writes bench/results/gpu-<part>.json. What is not installed is
skipped with its reason.
`--dry` runs the same code, tests included, on the CPU at tiny sizes and writes to build/gpu-dry.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / ".site"
PARTS = ("build", "test", "kernels", "update", "replay", "envs", "train")
WIDTHS, BATCHES = (256, 512, 1024, 2048, 4096, 8192, 11200), (1024, 256, 4096)  # what matters most first
DRY_WIDTHS, DRY_BATCHES = (32,), (16,)
DRY_PROVIDERS = ("ours", "ours-bf16", "plain", "compiled", "jax")


# The environments of one table, what matters most first: compiling takes most of the time.
ENVIRONMENTS = [
    *((f"mjx/{task}", 1024) for task in ("CheetahRun", "HumanoidRun", "WalkerRun")),
    ("mjx/dmc25", 128),
    *((f"mjx/{task}", slots) for slots in (4096, 128) for task in ("CheetahRun", "HumanoidRun", "WalkerRun")),
]
RATES = ("time/updates_per_second", "time/environment_steps_per_second")
_MANY = "--num-envs 128 --updates-per-step 8 --batch-size 1024 --critic.width 1024 --steps 100000000"
_REPORTS = "--report-every 20000 --eval-every 500000 --checkpoint-every 100000000"
RUNS = {
    "cheetah": f"mjx/CheetahRun {_MANY} {_REPORTS}",
    "humanoid": f"mjx/HumanoidRun {_MANY} {_REPORTS}",
    "dmc-easy": f"mjx/dmc-easy {_MANY} --num-envs 16 {_REPORTS}",
}
DRY_RUNS = {
    "cartpole": "mjx/CartpoleSwingup --device cpu --steps 3000 --random-steps 1000 --critic.width 32 "
    "--report-every 1000 --eval-every 3000"
}


class Skip(Exception):
    """A part cannot run here; the message says why."""


def results(dry: bool) -> Path:
    """The folder of the JSON files."""
    return ROOT / "build" / "gpu-dry" if dry else ROOT / "bench" / "results"


def need(*modules: str) -> None:
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise Skip(f"{name} is not installed")


def build(_: Part) -> dict[str, Any]:
    """Build the extension with what is installed: no network, no isolation."""
    need("scikit_build_core", "pybind11", "pip")
    words = ["install", "-q", "--no-index", "--no-build-isolation", "--no-deps", "--upgrade", "--target"]
    subprocess.run([sys.executable, "-m", "pip", *words, str(SITE), str(ROOT)], check=True)
    importlib.invalidate_caches()
    return {"site": str(SITE.relative_to(ROOT))}


def pytest(files: list[str], part: Part) -> dict[str, Any]:
    """The tests marked gpu of these files, in a process of their own; a dry run sends them to the CPU."""
    environment = os.environ | {"BRC_FAST_GPU_DRY": "1" if part.dry else "0"}
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"  # keeps the checkout off sys.path
    words = ["-m", "gpu", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", *files]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *words],
            cwd=ROOT,
            env=environment,
            timeout=max(300.0, part.seconds),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        returncode, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        told = late.stdout or b""
        returncode, output = 124, told.decode(errors="replace") if isinstance(told, bytes) else told
    took = time.perf_counter() - start
    return {"files": files, "returncode": returncode, "seconds": took, "output": output}


def test(part: Part) -> dict[str, Any]:
    """The tests marked gpu, several files at a time: most of the time goes into compiling kernels."""
    need("pytest")
    # Only files that hold such tests: the others may import what is not installed here.
    found = [path for path in sorted(ROOT.glob("tests/test_*.py")) if "mark.gpu" in path.read_text()]
    files = [str(path.relative_to(ROOT)) for path in found]
    groups = [files] if part.dry else [[name] for name in files]
    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        runs = list(pool.map(lambda group: pytest(group, part), groups))
    for run in runs:
        good = run["returncode"] in (0, 5)
        lines = run.pop("output").strip().splitlines()
        run["summary"] = lines[-1] if lines else ""
        run["failed"] = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        names = ", ".join(Path(name).name for name in run["files"])
        print(f"  {names}: {run['summary']}" if good else "\n".join(lines[-60:]), flush=True)
    wrong = [run for run in runs if run["returncode"] not in (0, 5)]
    if wrong:
        names = ", ".join(f"{Path(run['files'][0]).name} ({run['returncode']})" for run in wrong)
        return {"status": "failed", "reason": f"pytest -m gpu failed: {names}", "runs": runs}
    return {"runs": runs}


def kernels(part: Part) -> dict[str, Any]:
    """Every kernel beside its floor, its twin and others (bench_kernels.py)."""
    need("triton")
    import torch
    from bench_kernels import run

    found = run(torch.device(part.device), 60.0 if part.dry else part.seconds, dry=part.dry)
    if found["aborted"] is not None:
        return {**found, "status": "failed", "reason": found["aborted"]}
    return found


def update(part: Part) -> dict[str, Any]:
    """Updates per second over width and batch, ours and others, with floors (bench_update.py)."""
    from bench_update import run, table, wanted, wrong
    from harness import write

    found = run(
        part.device,
        wanted(DRY_PROVIDERS if part.dry else None, part.device),
        DRY_WIDTHS if part.dry else WIDTHS,
        DRY_BATCHES if part.dry else BATCHES,
        seconds=120.0 if part.dry else part.seconds,
        updates=2,
        dry=part.dry,
        keep=lambda rows: write("gpu-update", {"part": "update", **rows}, results(part.dry)),
    )
    print(table(found["rows"]), flush=True)
    if differing := wrong(found["rows"]):
        return {**found, "status": "failed", "reason": "; ".join(differing)}
    return found


def replay(part: Part) -> dict[str, Any]:
    """Batches on the device: from a buffer there, prefetched from the host, and copied from there."""
    import torch
    from harness import interleave

    from brc_fast import DeviceReplayBuffer, ReplayBuffer

    capacity, streams = (2_000, 8) if part.dry else (1_000_000, 1024)
    sizes = ((1, 64),) if part.dry else ((1, 1024), (16, 1024))
    there = DeviceReplayBuffer(capacity, 67, 24, task_ids=[0] * streams, device=part.device)
    host = ReplayBuffer(capacity, 67, 24, task_ids=[0] * streams)
    flags = torch.zeros(streams, dtype=torch.bool)
    successors = torch.randn(streams, 67)
    for _ in range(capacity // streams):
        seen, successors = successors, torch.randn(streams, 67)
        arguments = (seen, torch.rand(streams, 24), torch.rand(streams), flags, flags, successors)
        host.add(*arguments)
        there.add(*(value.to(part.device) for value in arguments))
    for updates, size in sizes:  # equality first
        with host.prefetch(size, updates, device=part.device) as batches:
            for _ in range(3):
                pairs = zip(next(batches), there.sample(size, updates), strict=True)
                if not all(torch.equal(a, b) for a, b in pairs):
                    raise RuntimeError("the buffers return different batches")
    rows = []
    for updates, size in sizes:
        with host.prefetch(size, updates, device=part.device) as batches:
            providers: dict[str, Callable[[], object]] = {
                "device": partial(there.sample, size, updates),
                "prefetched": partial(next, batches),
            }
            times = interleave(providers, seconds=part.seconds / 4, calls=20, device=part.device)
        copied = {"copied": lambda size=size, updates=updates: host.sample(size, updates).to(part.device)}
        times |= interleave(copied, seconds=part.seconds / 8, calls=20, device=part.device)
        per = {name: statistics.median(t) / (updates * size) * 1e9 for name, t in times.items()}
        rows.append({"num_batches": updates, "batch_size": size, "nanoseconds_per_transition": per})
        told = ", ".join(f"{name} {value:.1f}" for name, value in per.items())
        print(f"  {updates} x {size}, ns per transition: {told}", flush=True)
    return {"capacity": capacity, "streams": streams, "device": part.device, "rows": rows}


def envs(part: Part) -> dict[str, Any]:
    """Steps per second beside bare Playground, and of the 25 tasks side by side; actions from torch."""
    need("jax", "mujoco", "mujoco_playground", "gymnasium")
    from bench_envs import compare, line

    end = time.perf_counter() + part.seconds
    rows: list[dict[str, Any]] = []
    for task, slots in [("mjx/CartpoleSwingup", 4)] if part.dry else ENVIRONMENTS:
        if time.perf_counter() > end:
            rows.append({"task": task, "num_envs": slots, "missing": "the time was used up"})
        elif task in ("mjx/dmc25", "mjx/dmc-easy"):
            rows.append(_alone(task, slots, part))
        else:
            rows.append(compare(task, slots, part.seconds / 20, part.device))
        told = rows[-1]
        print(
            f"  {line(told) if 'steps_per_second' not in told or 'times_library' in told else told}",
            flush=True,
        )
    return {"rows": rows}


def _alone(suite: str, slots: int, part: Part) -> dict[str, Any]:
    """A suite's tasks side by side; the library has no loop for several."""
    import torch
    from harness import wait

    from brc_fast.envs import make

    start = time.perf_counter()
    env: Any = make(suite, slots)
    env.reset_tensors(0)
    actions = torch.zeros(env.num_envs, env.action_size, device=part.device)
    wait(env.step_tensors(actions).observations.device.type)
    started = time.perf_counter() - start
    times = []
    end = time.perf_counter() + part.seconds / 20
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        for _ in range(10):
            observations = env.step_tensors(actions).observations
        wait(observations.device.type)
        times.append((time.perf_counter() - start) / 10)
    env.close()
    rate = {"ours": env.num_envs / statistics.median(times)}
    return {"task": suite, "num_envs": env.num_envs, "steps_per_second": rate, "start_seconds": started}


def train(part: Part) -> dict[str, Any]:
    """The whole loop through the command line, stopped when its share of the time is over."""
    need("jax", "mujoco", "mujoco_playground", "gymnasium", "safetensors", "tyro", "tqdm", "matplotlib")
    from brc_fast.metrics import read_rows

    runs = {}
    for name, words in (DRY_RUNS if part.dry else RUNS).items():
        folder = ROOT / "build" / f"gpu-{name}"
        command = [sys.executable, "-m", "brc_fast.cli", "train", *words.split()]
        command += ["--run", str(folder), "--overwrite"]
        seconds = 300.0 if part.dry else part.seconds / len(RUNS)
        with subprocess.Popen(command) as process:
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:  # Ctrl-C: it ends its step and saves
                process.send_signal(signal.SIGINT)
                code = process.wait()
        if code not in (0, 130):
            raise RuntimeError(f"{name}: brc-fast train ended with {code}")
        rows = read_rows(folder / "metrics.jsonl")
        rates = [row for row in rows if row.get("time/updates_per_second", 0) > 0][1:]
        told = {key: statistics.median(row[key] for row in rates) for key in RATES} if rates else {}
        print(f"  {name}: {told}", flush=True)
        curve = [{k: v for k, v in row.items() if k == "step" or k.startswith("eval/")} for row in rows]
        runs[name] = {"settings": words, "rates": told, "evaluations": [row for row in curve if len(row) > 1]}
    return {"runs": runs}


class Part:
    """What a part is given: its share of the time, the device and whether this is a dry run."""

    def __init__(self, seconds: float, device: str, dry: bool) -> None:
        self.seconds, self.device, self.dry = seconds, device, dry


def run_part(work: Callable[[Part], dict[str, Any]], part: Part) -> tuple[str, dict[str, Any]]:
    """Status ("ok", "skipped" or "failed") and what there is to store."""
    start = time.perf_counter()
    try:
        out: dict[str, Any] = {"status": "ok", **work(part)}
    except Skip as reason:
        out = {"status": "skipped", "reason": str(reason)}
    except Exception as error:  # one part's failure must not cost the others their machine
        out = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    return out["status"], out | {"seconds": time.perf_counter() - start}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budget", type=float, default=480.0, help="seconds in all (default 480)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("bench/gpu.py: torch is not installed here", file=sys.stderr)
        return 2
    if not arguments.dry and not torch.cuda.is_available():
        print("bench/gpu.py: torch sees no CUDA device; --dry runs on the CPU", file=sys.stderr)
        return 2
    parts = [name for name in arguments.parts if not (arguments.dry and name == "build")]
    if "build" in parts:
        # Later parts, and their child processes, use what was just built.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))
        sys.path.insert(0, str(SITE))
    if arguments.dry:
        torch.set_num_threads(1)

    device = "cpu" if arguments.dry else "cuda"
    folder = results(arguments.dry)
    work = {
        "build": build,
        "test": test,
        "kernels": kernels,
        "update": update,
        "replay": replay,
        "envs": envs,
        "train": train,
    }
    seconds = (2.0 if arguments.dry else arguments.budget) / max(1, len(parts) - ("build" in parts))
    table = []
    for name in parts:
        print(f"{name} ...", flush=True)
        status, out = run_part(work[name], Part(seconds, device, arguments.dry))
        from harness import write

        path = write(f"gpu-{name}", {"part": name, "dry": arguments.dry, **out}, folder)
        table.append((name, status, out.get("reason", ""), out["seconds"], path.relative_to(ROOT)))
    print()
    for name, status, reason, took, path in table:
        print(f"{name:<8}{status:<9}{took:7.1f} s  {path}  {reason}".rstrip())
    return 1 if any(status == "failed" for _, status, *_ in table) else 0


if __name__ == "__main__":
    sys.exit(main())
