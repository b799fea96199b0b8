"""The parts of bench/gpu.py: each takes a `Part` and returns what there is to store."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / ".site"  # where the extension is built to
WIDTHS, BATCHES = (256, 512, 1024, 2048, 4096, 8192, 11200), (1024, 256, 4096)  # what matters most first
DRY_WIDTHS, DRY_BATCHES = (32,), (16,)
DRY_PROVIDERS = ("ours", "ours-bf16", "critic", "plain", "compiled", "jax")


# The environments of one table, what matters most first: compiling takes most of the time.
ENVIRONMENTS = [
    *((f"mjx/{task}", 1024) for task in ("CheetahRun", "HumanoidRun", "WalkerRun")),
    ("mjx/dmc25", 128),
    *((f"mjx/{task}", slots) for slots in (4096, 128) for task in ("CheetahRun", "HumanoidRun", "WalkerRun")),
]
TESTS = 480.0  # seconds of all tests, which end before their part is stopped
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


class Part(NamedTuple):
    """What a part is given."""

    seconds: float  # its share of the time
    device: str
    dry: bool
    folder: Path  # of the results


def results(dry: bool) -> Path:
    """The folder of the JSON files."""
    return ROOT / "build" / "gpu-dry" if dry else ROOT / "bench" / "results"


SIMULATOR = ("jax", "mujoco", "mujoco_playground", "gymnasium")
NEEDS = {
    "build": ("scikit_build_core", "pybind11", "pip"),
    "test": ("pytest",),
    "kernels": ("triton",),
    "envs": SIMULATOR,
    "train": (*SIMULATOR, "safetensors", "tyro", "tqdm", "matplotlib"),
}


def missing(part: str) -> str | None:
    """The first module that this part needs and that is not installed."""
    return next((name for name in NEEDS.get(part, ()) if importlib.util.find_spec(name) is None), None)


def need(part: str) -> None:
    if name := missing(part):
        raise Skip(f"{name} is not installed")


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """The results, as failed where their equality check is."""
    if found["equality"] == "passed":
        return found
    return {**found, "status": "failed", "reason": found["equality"]}


def keep(part: Part, name: str, found: dict[str, Any]) -> None:
    """Store what a part has so far, for the case that it does not come to its end."""
    from harness import write

    write(f"gpu-{name}", {"part": name, **found}, part.folder)


def site(dry: bool) -> Path:
    """The folder that the package is built to; a dry run leaves the other one alone."""
    return ROOT / "build" / "gpu-dry-site" if dry else SITE


def build(part: Part) -> dict[str, Any]:
    """Build the extension with what is installed: no network, no isolation."""
    need("build")
    folder = site(part.dry)
    words = ["install", "-q", "--no-index", "--no-build-isolation", "--no-deps", "--upgrade", "--target"]
    subprocess.run([sys.executable, "-m", "pip", *words, str(folder), str(ROOT)], check=True)
    importlib.invalidate_caches()
    return {"site": str(folder.relative_to(ROOT))}


def limits(part: Part) -> dict[str, Any]:
    """What the machine can do at all (bench_limits.py)."""
    from bench_limits import run

    return run(part.device, part.seconds, dry=part.dry)


def pytest(files: list[str], part: Part, end: float) -> dict[str, Any]:
    """The tests marked gpu of these files, in a process of their own that is stopped at `end`; a dry run
    sends them to the CPU."""
    environment = os.environ | {"BRC_FAST_GPU_DRY": "1" if part.dry else "0"}
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"  # keeps the checkout off sys.path
    words = ["-m", "gpu", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", *files]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *words],
            cwd=ROOT,
            env=environment,
            timeout=max(1.0, end - start),
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
    need("test")
    # Only files that hold such tests: the others may import what is not installed here.
    found = [path for path in sorted(ROOT.glob("tests/test_*.py")) if "mark.gpu" in path.read_text()]
    files = [str(path.relative_to(ROOT)) for path in found]
    groups = [files] if part.dry else [[name] for name in files]
    end, runs = time.perf_counter() + TESTS, list[dict[str, Any]]()
    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        for done in as_completed([pool.submit(pytest, group, part, end) for group in groups]):
            run = done.result()
            runs.append(run)
            good = run["returncode"] in (0, 5)
            lines = run.pop("output").strip().splitlines()
            run["summary"] = lines[-1] if lines else ""
            run["failed"] = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
            names = ", ".join(Path(name).name for name in run["files"])
            print(f"  {names}: {run['summary']}" if good else "\n".join(lines[-60:]), flush=True)
            keep(part, "test", {"runs": runs})
    wrong = [run for run in runs if run["returncode"] not in (0, 5)]
    if wrong:
        names = ", ".join(f"{Path(run['files'][0]).name} ({run['returncode']})" for run in wrong)
        return {"status": "failed", "reason": f"pytest -m gpu failed: {names}", "runs": runs}
    return {"runs": runs}


def kernels(part: Part) -> dict[str, Any]:
    """Every kernel beside its floor, its twin and others (bench_kernels.py)."""
    need("kernels")
    import torch
    from bench_kernels import run

    seconds = 60.0 if part.dry else part.seconds
    found = run(torch.device(part.device), seconds, dry=part.dry, keep=partial(keep, part, "kernels"))
    if found["aborted"] is not None:
        return {**found, "status": "failed", "reason": found["aborted"]}
    return found


def update(part: Part) -> dict[str, Any]:
    """Updates per second over width and batch, ours and others, with floors (bench_update.py)."""
    from bench_update import run, table, wanted, wrong

    found = run(
        part.device,
        wanted(DRY_PROVIDERS if part.dry else None, part.device),
        DRY_WIDTHS if part.dry else WIDTHS,
        DRY_BATCHES if part.dry else BATCHES,
        seconds=120.0 if part.dry else part.seconds,
        updates=2,
        dry=part.dry,
        keep=partial(keep, part, "update"),
    )
    print(table(found["rows"]), flush=True)
    if differing := wrong(found["rows"]):
        return {**found, "status": "failed", "reason": "; ".join(differing)}
    return found


def scaling(part: Part) -> dict[str, Any]:
    """How the cost of an update grows with width, batch and tasks, that of a step with environments
    (bench_scaling.py)."""
    from bench_scaling import AXES, run

    found = run(
        part.device,
        [axis for axis in AXES if axis != "environments" or not missing("envs")],
        seconds=20.0 if part.dry else part.seconds,
        dry=part.dry,
        keep=partial(keep, part, "scaling"),
    )
    return judged(found)


def replay(part: Part) -> dict[str, Any]:
    """Batches on the device: from a buffer there, prefetched from the host, and copied from there
    (replay_device.py)."""
    from replay_device import run, stored

    transitions, streams = (2_000, 8) if part.dry else (1_000_000, 1024)
    sizes = ((1, 64),) if part.dry else ((1, 1024), (16, 1024))
    return judged(run(stored(67, 24, 1, streams, transitions), sizes, part.device, part.seconds))


def envs(part: Part) -> dict[str, Any]:
    """Steps per second beside bare Playground, and of the 25 tasks side by side; actions from torch."""
    need("envs")
    from bench_envs import alone, collected, compare, line

    end = time.perf_counter() + part.seconds
    rows: list[dict[str, Any]] = []
    for task, slots in [("mjx/CartpoleSwingup", 4)] if part.dry else ENVIRONMENTS:
        if time.perf_counter() > end:
            rows.append({"task": task, "num_envs": slots, "missing": "the time was used up"})
        elif task in ("mjx/dmc25", "mjx/dmc-easy"):
            rows.append(alone(task, slots, part.seconds / 20, part.device))
        else:
            rows.append(compare(task, slots, part.seconds / 20, part.device))
        print(f"  {line(rows[-1])}", flush=True)
        keep(part, "envs", collected([dict(row) for row in rows]))
    return judged(collected(rows))


def train(part: Part) -> dict[str, Any]:
    """The whole loop: through the command line, each run stopped when its share of half the time is over, and
    with our learner beside a plain one (bench_train.py)."""
    need("train")
    runs = {}
    for name, words in (DRY_RUNS if part.dry else RUNS).items():
        try:
            runs[name] = trained(name, words, 300.0 if part.dry else part.seconds / 2 / len(RUNS))
        except RuntimeError as error:  # of one run: the others, and the learners, go on
            runs[name] = {"settings": words, "missing": str(error)}
        print(f"  {name}: {runs[name].get('missing', runs[name].get('rates'))}", flush=True)
        keep(part, "train", {"runs": runs})
    found = time_to_return(part)
    broken = [run["missing"] for run in runs.values() if "missing" in run]
    failed = {"status": "failed", "reason": "; ".join([*broken, *filter(None, [found.get("reason")])])}
    return {**found, "runs": runs, "seeds": found["runs"], **(failed if broken else {})}


def trained(name: str, words: str, seconds: float) -> dict[str, Any]:
    """Rates and evaluations of a run that is stopped after so many seconds; RuntimeError if it broke."""
    from brc_fast.runs.metrics import read_rows

    folder = ROOT / "build" / f"gpu-{name}"
    command = [sys.executable, "-m", "brc_fast", "train", *words.split()]
    with subprocess.Popen([*command, "--run", str(folder), "--overwrite"]) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:  # Ctrl-C: it ends its step and saves
            process.send_signal(signal.SIGINT)
            try:
                code = process.wait(60.0)
            except subprocess.TimeoutExpired:
                process.kill()
                raise RuntimeError(f"{name}: brc-fast train did not end within a minute") from None
    if code not in (0, 130):
        raise RuntimeError(f"{name}: brc-fast train ended with {code}")
    rows = read_rows(folder / "metrics.jsonl")
    rates = [row for row in rows if row.get("time/updates_per_second", 0) > 0][1:]
    told = {key: statistics.median(row[key] for row in rates) for key in RATES} if rates else {}
    curve = [{k: v for k, v in row.items() if k == "step" or k.startswith("eval/")} for row in rows]
    return {"settings": words, "rates": told, "evaluations": [row for row in curve if len(row) > 1]}


def time_to_return(part: Part) -> dict[str, Any]:
    """Both learners in one process, for half of the part's time."""
    import dataclasses

    from bench_train import TASK, THRESHOLDS, run, settings

    task = TASK[part.device]
    config = settings(task, part.device)
    if part.dry:
        config = dataclasses.replace(config, random_steps=200, eval_every=400, eval_episodes=2)
    return judged(run(task, THRESHOLDS[task], part.device, 2.0 if part.dry else part.seconds / 2, config))


PARTS: dict[str, Callable[[Part], dict[str, Any]]] = {
    "build": build,
    "limits": limits,
    "test": test,
    "kernels": kernels,
    "update": update,
    "scaling": scaling,
    "replay": replay,
    "envs": envs,
    "train": train,
}
