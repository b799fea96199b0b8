"""Tests and timings on a CUDA machine, with what is installed there: a list of commands, each with its seconds.

    python bench/gpu.py [--budget SECONDS] [--parts build limits test kernels update ...] [--dry]

Builds the package into .site, measures the machine's limits, runs `pytest -m gpu`, then times the kernels,
the update, how its cost grows, the replay, the environment step and the training loop, and writes
bench/results/gpu-<part>.json. Each part is a process of its own: what breaks one, or the GPU's state in it,
does not reach the others. Parts have equal shares of the budget, but no more than they need; none takes more
than nine minutes, its start included, and what a part had measured until then stays. What is not installed is
skipped with its reason and has no share.
`--dry` runs the same commands, tests included, on the CPU at tiny sizes and writes to build/gpu-dry.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
LONGEST, END = 420.0, 540.0  # seconds of a part, and when it is stopped: compiling and starting come on top
SIMULATOR = ("jax", "mujoco", "mujoco_playground", "gymnasium")
NEEDS = {
    "build": ("scikit_build_core", "pybind11", "pip"),
    "test": ("pytest",),
    "kernels": ("triton",),
    "envs": SIMULATOR,
    "train": (*SIMULATOR, "safetensors", "tyro", "tqdm", "matplotlib"),
}
SHORT = {"limits": 40.0}  # seconds of a part that needs no more
ENVIRONMENTS = "mjx/CheetahRun mjx/HumanoidRun mjx/WalkerRun mjx/CartpoleSwingup"
COMMANDS = {
    "limits": "bench_limits.py --device cuda",
    "kernels": "bench_kernels.py",
    "update": "bench_update.py --device cuda --batch 1024 256 4096 --width 256 512 1024 2048 4096 8192 11200",
    "scaling": "bench_scaling.py --device cuda",
    "replay": "bench_replay.py --device cuda",
    "envs": f"bench_envs.py --device cuda --num-envs 1024 4096 128 --tasks {ENVIRONMENTS}",
    "train": "bench_train.py --device cuda",
}
DRY = {
    "limits": "bench_limits.py --device cpu --dry",
    "kernels": "bench_kernels.py --dry",
    "update": "bench_update.py --device cpu --providers ours ours-bf16 critic plain jax --width 32 --batch 16",
    "scaling": "bench_scaling.py --device cpu --dry",
    "replay": "bench_replay.py --device cpu --capacity 20480",
    "envs": "bench_envs.py --device cpu --tasks mjx/CartpoleSwingup --num-envs 4",
    "train": "bench_train.py --device cpu",
}
DRY_SECONDS = 4.0
PARTS = ("build", "limits", "test", *(name for name in COMMANDS if name != "limits"))


def site(dry: bool) -> Path:
    """The folder that the package is built to; a dry run leaves the other one alone."""
    return ROOT / "build" / "gpu-dry-site" if dry else ROOT / ".site"


def command(part: str, seconds: float, dry: bool, path: Path) -> list[str]:
    """What a part runs; it writes its result to `path`, if it measures."""
    if part == "build":  # with what is installed: no network, no isolation
        words = ["install", "-q", "--no-index", "--no-build-isolation", "--no-deps", "--upgrade", "--target"]
        return [sys.executable, "-m", "pip", *words, str(site(dry)), str(ROOT)]
    if part == "test":
        # Only files that hold such tests: the others may import what is not installed here.
        files = [str(file) for file in sorted(ROOT.glob("tests/test_*.py")) if "mark.gpu" in file.read_text()]
        code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"  # keeps the checkout off sys.path
        words = ["-m", "gpu", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
        if importlib.util.find_spec("xdist") is not None and not dry:  # most time goes into compiling kernels
            words += ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2)))]
        return [sys.executable, "-P", "-c", code, *words, *files]
    script, *words = (DRY if dry else COMMANDS)[part].split()
    save = ["--json", f"{path}"] if part == "kernels" else ["--save", f"{path.with_suffix('')}"]
    return [sys.executable, str(BENCH / script), *words, "--budget", f"{seconds:g}", *save]


def run(part: str, seconds: float, dry: bool, path: Path) -> dict[str, Any]:
    """Run a part in a process of its own; its result with how it ended."""
    from harness import write

    start, found = time.perf_counter(), dict[str, Any]()
    path.unlink(missing_ok=True)
    if (name := missing(part)) is not None:
        told: dict[str, Any] = {"status": "skipped", "reason": f"{name} is not installed"}
    else:
        environment = os.environ | {"BRC_FAST_GPU_DRY": "1" if dry else "0"}
        process = subprocess.Popen(
            command(part, seconds, dry, path), cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(END)
            told = (
                {"status": "failed", "reason": f"its process ended with {code}"} if code else {"status": "ok"}
            )
        except subprocess.TimeoutExpired:
            told = {"status": "failed", "reason": f"it was stopped after {END:.0f} s"}
        finally:  # and, at Ctrl-C too, whatever it started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text())
    if told["status"] == "failed" and found.get("equality", "passed") != "passed":
        told["reason"] = found["equality"]
    more = {"benchmark": part, **found, "part": part, "dry": dry, "seconds": time.perf_counter() - start}
    write(path.stem, more | told, path.parent)
    return more | told


def missing(part: str) -> str | None:
    """The first module that this part needs and that is not installed."""
    return next((name for name in NEEDS.get(part, ()) if importlib.util.find_spec(name) is None), None)


def shares(parts: Sequence[str], budget: float) -> Mapping[str, float]:
    """Seconds of every part: equal, but for those that need less; building takes what it takes."""
    timed = [name for name in parts if name != "build" and not missing(name)]
    short = {name: min(SHORT[name], budget / len(timed)) for name in timed if name in SHORT}
    each = (budget - sum(short.values())) / max(1, len(timed) - len(short))
    return {name: min(LONGEST, short.get(name, each)) for name in parts}


def main(words: Sequence[str] | None = None) -> int:
    from harness import RESULTS, Parser

    parser = Parser(__doc__)
    parser.add_argument("--budget", type=float, default=480.0, help="seconds in all (default 480)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    given = parser.parse_args(words)
    import torch

    if not given.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry runs on the CPU")
    built, folder = site(given.dry), ROOT / "build" / "gpu-dry" if given.dry else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    if "build" in given.parts or (built.exists() and importlib.util.find_spec("brc_fast") is None):
        # Later parts use what was just built, or built by an earlier call.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(built), os.environ.get("PYTHONPATH")]))
    seconds = {} if given.dry else shares(given.parts, given.budget)
    table = []
    for part in given.parts:
        path = folder / f"gpu-{part}.json"
        print(f"{part} ...", flush=True)
        table.append((part, run(part, seconds.get(part, DRY_SECONDS), given.dry, path), path))
    print()
    for part, told, path in table:
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        print(
            f"{part:<8}{told['status']:<9}{told['seconds']:7.1f} s  {shown}  {told.get('reason', '')}".rstrip()
        )
    return 1 if any(told["status"] == "failed" for _, told, _ in table) else 0


if __name__ == "__main__":
    sys.exit(main())
