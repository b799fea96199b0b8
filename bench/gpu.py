"""Tests and timings on a CUDA machine, with what is installed there: a list of commands with their seconds.

    python bench/gpu.py [--parts build limits test kernels update ...] [--budget SECONDS] [--dry]

Builds the package into .site, measures the machine's limits, runs `pytest -m gpu`, then the benchmarks, then
the studies of docs/studies.md at the scale small, which go on where an earlier call's budget ended them, and
writes bench/results/gpu-<part>.json. Each part is a process of its own: what breaks one, or the GPU's state
in it, does not reach the others. None takes more than nine minutes, its start included; what it had measured
until then stays. What is not installed is skipped with its reason. `--dry` runs the same on the CPU at tiny
sizes and writes to build/gpu-dry.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import RESULTS, ROOT, Parser, seconds, write

END = 540.0  # seconds after which a part is stopped
DRY_SECONDS = 4.0
STUDY = "study-"  # how the parts begin that are one


class Part(NamedTuple):
    needs: str  # a module
    seconds: float  # of its budget
    gpu: str = ""  # options of its benchmark
    dry: str = ""


WIDTHS = "256 512 1024 2048 4096 8192 11200"
TASKS = "mjx/CheetahRun mjx/HumanoidRun mjx/WalkerRun"
DRY_UPDATE = "--batch 16 --width 32 --providers ours ours-bf16 critic plain jax"
PARTS = {  # what matters most first
    "build": Part("scikit_build_core", 0.0),
    "limits": Part("torch", 40.0, "--device cuda", "--device cpu --dry"),
    "test": Part("pytest", 0.0),
    "kernels": Part("triton", 90.0, "", "--dry"),
    "update": Part(
        "torch", 120.0, f"--device cuda --batch 1024 256 4096 --width {WIDTHS}", f"--device cpu {DRY_UPDATE}"
    ),
    "scaling": Part("torch", 60.0, "--device cuda", "--device cpu --dry"),
    "replay": Part("torch", 60.0, "--device cuda", "--device cpu --capacity 20480"),
    "envs": Part(
        "mujoco_playground",
        60.0,
        f"--device cuda --tasks {TASKS} --num-envs 1024 4096 128",
        "--device cpu --tasks mjx/CartpoleSwingup --num-envs 4",
    ),
    "train": Part("mujoco_playground", 60.0, "--device cuda", "--device cpu"),
    **{
        f"{STUDY}{name}": Part("envpool", 420.0, "--scale small", "--scale tiny --steps 200")
        for name in ("loss", "headline", "metaworld", "conditioning", "transfer", "scaling")
    },
}


def site(dry: bool) -> Path:
    """The folder that the package is built to; a dry run leaves the other one alone."""
    return ROOT / "build" / "gpu-dry-site" if dry else ROOT / ".site"


def there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def command(part: str, seconds: float, dry: bool, path: Path) -> list[str]:
    """What a part runs; a benchmark writes its result to `path`."""
    if part == "build":  # with what is installed: no network, no isolation
        words = ["install", "-q", "--no-index", "--no-build-isolation", "--no-deps", "--upgrade", "--target"]
        return [sys.executable, "-m", "pip", *words, str(site(dry)), str(ROOT)]
    if part == "test":
        # Only files that hold such tests: the others may import what is not installed here.
        files = [str(file) for file in sorted(ROOT.glob("tests/test_*.py")) if "mark.gpu" in file.read_text()]
        code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"  # keeps the checkout off sys.path
        words = ["-m", "gpu", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
        if there("xdist") and not dry:  # most time goes into compiling kernels
            words += ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2)))]
        return [sys.executable, "-P", "-c", code, *words, *files]
    options = PARTS[part].dry if dry else PARTS[part].gpu
    if part.startswith(STUDY):
        folder = ROOT / "build" / ("gpu-dry-studies" if dry else "gpu-studies")
        words = ["study", part.removeprefix(STUDY), *options.split(), "--runs", str(folder)]
        words += ["--budget", f"{seconds:g}", "--save", str(path)]
        return [sys.executable, "-P", "-m", "brc_fast", *words]
    words = [*options.split(), "--budget", f"{seconds:g}", "--save", str(path.with_suffix(""))]
    return [sys.executable, str(ROOT / f"bench/bench_{part}.py"), *words]


def run(part: str, seconds: float, dry: bool, path: Path) -> dict[str, Any]:
    """Run a part in a process of its own; its result with how it ended."""
    start, found = time.perf_counter(), dict[str, Any]()
    path.unlink(missing_ok=True)
    if not there(PARTS[part].needs):
        told: dict[str, Any] = {"status": "skipped", "reason": f"{PARTS[part].needs} is not installed"}
    else:
        environment, words = os.environ | {"BRC_FAST_GPU_DRY": f"{dry:d}"}, command(part, seconds, dry, path)
        process = subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True)
        try:
            code = process.wait(END)
            told = {"status": "failed", "reason": f"it ended with {code}"} if code else {"status": "ok"}
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
    told |= {"part": part, "dry": dry, "seconds": time.perf_counter() - start}
    write(path, {"benchmark": part, **found, **told})
    return told


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--budget", type=seconds, help="seconds of each part, in place of its own")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    given = parser.parse_args(words)
    if not given.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry runs on the CPU")
    built, folder = site(given.dry), ROOT / "build" / "gpu-dry" if given.dry else RESULTS
    if "build" in given.parts or (built.exists() and not there("brc_fast")):
        # Later parts use what was just built, or built by an earlier call.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(built), os.environ.get("PYTHONPATH")]))
    table = list[str]()
    for part in given.parts:
        path = folder / f"gpu-{part}.json"
        print(f"{part} ...", flush=True)
        budget = PARTS[part].seconds if given.budget is None else given.budget
        told = run(part, DRY_SECONDS if given.dry else budget, given.dry, path)
        head = f"{part:<8}{told['status']:<9}{told['seconds']:7.1f} s"
        table.append(f"{head}  {path.relative_to(ROOT)}  {told.get('reason', '')}".rstrip())
    print("", *table, sep="\n")
    return 1 if any(" failed " in line for line in table) else 0


if __name__ == "__main__":
    sys.exit(main())
